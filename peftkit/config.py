"""The strict base of every config: YAML <-> pydantic, dotted overrides, errors with file, line, key and suggestion.

    source = apply_overrides(read_yaml("recipe.yaml"), ["train.max_steps=50"])
    recipe = validate(Recipe, source)        # a Config, or a ConfigError whose text is all a user needs

A `Config` class lives beside the code that uses it. A `Source` is the parsed document that still knows where each of its keys
stands, so whoever finds a wrong value later can say where it was written: `source.problem(keys, "what is wrong")`.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import pydantic
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

Keys = tuple[str | int, ...]
T = TypeVar("T", bound="Config")


class ConfigError(Exception):
    """A wrong recipe or a wrong usage. `str(error)` is the whole message for the user, one line per problem."""


class Config(pydantic.BaseModel):
    """Base of all configs: immutable, no unknown keys, no silent conversion of types; the text under a field describes it.

    An int is taken for a float; a bool is never a number and a text never becomes one; infinity and NaN are refused.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def suggest(word: object, choices: Iterable[object]) -> str:
    """`"; did you mean 'x'?"` for the choice nearest to `word` (case ignored), or `""` where none is near."""
    names = {str(choice).lower(): str(choice) for choice in choices}
    near = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f"; did you mean '{names[near[0]]}'?" if near else ""


def dotted(keys: Keys) -> str:
    """`("methods", 0, "lora")` as a user writes it: `methods.0.lora`."""
    return ".".join(map(str, keys))


@dataclass(frozen=True)
class Source:
    """Plain data (mappings, lists, scalars) and where each key of it was written."""

    data: Any
    path: str = "recipe"
    """The name shown in messages: the file, as the user gave it."""
    marks: dict[Keys, int | str] = field(default_factory=dict)
    """For each key its 1-based line in the file, or the text of the origin where it comes from elsewhere (the command line)."""

    def _mark(self, keys: Keys) -> int | str | None:
        return next((self.marks[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.marks), None)

    def line(self, keys: Keys) -> int | None:
        """1-based line of the key, or of its nearest parent; None at the root and for what the command line set."""
        mark = self._mark(tuple(keys))
        return mark if isinstance(mark, int) else None

    def where(self, keys: Keys) -> str:
        """`recipe.yaml:12`, or `command line: train.max_steps=50`, or `recipe.yaml` where no line is known."""
        mark = self._mark(tuple(keys))
        return mark if isinstance(mark, str) else self.path if mark is None else f"{self.path}:{mark}"

    def problem(self, keys: Keys, text: str) -> str:
        """One line for a `ConfigError`: where, which key, what is wrong."""
        return f"{self.where(keys)}: {dotted(keys)}: {text}" if keys else f"{self.where(keys)}: {text}"


# --- YAML text -> Source ----------------------------------------------------------------------------------------------------

_TAG = "tag:yaml.org,2002:"
_LEADING_ZERO = re.compile(r"[-+]?0o?[0-9_]+")
_NUMBER = re.compile(r"(?=[-+]?\.?[0-9])([-+]?)([0-9_]*)\.?([0-9_]*)(?:[eE]([-+]?[0-9]+))?")


def _scalar_problem(kind: str, text: str) -> str | None:
    """Why this unquoted scalar, which YAML 1.1 reads as `kind`, is not what its writer meant; None where it is clear.

    `dump_yaml` asks the same question, so that it quotes every text that the reader would refuse.
    """
    if kind == "bool" and text.lower() not in ("true", "false"):
        return f"YAML reads {text} as {str(text.lower() in ('yes', 'on')).lower()}: write true or false, or quote it if it is a text"
    if kind == "timestamp":
        return f"YAML reads {text} as a date: quote it"
    if kind in ("int", "float") and ":" in text:
        return f"YAML reads {text} as a number in base 60: quote it, or write a plain number"
    if kind in ("int", "str") and _LEADING_ZERO.fullmatch(text):
        meaning = "an octal number" if kind == "int" else "text"
        return f"YAML reads {text} as {meaning}: write a number without the leading zero, or quote it if it is a text"
    if kind == "str" and (match := _NUMBER.fullmatch(text)):
        sign, whole, fraction, exponent = match.groups()
        number = f"{sign}{whole or 0}.{fraction or 0}" + (f"e{int(exponent):+d}" if exponent else "")
        return f"YAML reads {text} as text, not as a number: write {number}, or quote it if it is a text"
    if kind == "str" and text == "None":
        return "YAML reads None as text: write null, or quote it if it is a text"
    return None


class _Builder:
    """Builds plain values from YAML nodes, keeping the line of each key and gathering all problems before it raises."""

    def __init__(self, path: str, at: Keys = (), origin: str | None = None) -> None:
        self.path, self.at, self.origin = path, at, origin
        self.marks: dict[Keys, int | str] = {}
        self.problems: list[str] = []
        self.constructor = yaml.constructor.SafeConstructor()

    def parse(self, text: str) -> Any:
        """The value of the document; None for an empty one. Raises ConfigError."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self.origin or (f"{self.path}:{mark.line + 1}:{mark.column + 1}" if mark else self.path)
            hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else "; quote the value" if self.origin else ""
            context = f" ({error.context})" if error.context else ""
            raise ConfigError(f"{place}: not valid YAML: {error.problem}{context}{hint}") from error
        except yaml.reader.ReaderError as error:
            before = text[: error.position].split("\n")
            place = self.origin or f"{self.path}:{len(before)}:{len(before[-1]) + 1}"
            raise ConfigError(f"{place}: not valid YAML: the character {chr(error.character)!a} is not allowed") from error
        value = None if node is None else self.build(node, self.at, ())
        if self.problems:
            raise ConfigError("\n".join(dict.fromkeys(self.problems)))
        return value

    def fail(self, node: yaml.Node, keys: Keys, text: str) -> None:
        place = self.origin or f"{self.path}:{node.start_mark.line + 1}"
        self.problems.append(f"{place}: {dotted(keys)}: {text}" if keys else f"{place}: {text}")

    def build(self, node: yaml.Node, keys: Keys, above: tuple[yaml.Node, ...]) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, keys)
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            self.fail(node, keys, f"the tag {node.tag.replace(_TAG, '!!')} is not supported: write plain values")
        elif any(node is parent for parent in above):
            self.fail(node, keys, "this anchor contains itself")
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.marks[*keys, i] = item.start_mark.line + 1
            return [self.build(item, (*keys, i), (*above, node)) for i, item in enumerate(node.value)]
        else:
            values = {}
            for key, (key_node, value_node) in self.entries(node, keys, above).items():
                self.marks[*keys, key] = key_node.start_mark.line + 1
                values[key] = self.build(value_node, (*keys, key), (*above, node))
            return values
        return None

    def entries(self, node: yaml.MappingNode, keys: Keys, above: tuple[yaml.Node, ...]) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The key and value nodes of a mapping, after `<<` merges: own keys win, then the bases in their order."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        inherited: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            merge = key_node.tag == _TAG + "merge"
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (_TAG + "str", _TAG + "value", _TAG + "merge"):
                self.fail(key_node, keys, f"a key must be a text: quote {key}" if isinstance(key, str) else "a key must be a text")
                continue
            if key in first:
                self.fail(key_node, (*keys, key), f"duplicate key: line {first[key]} already has it")
            elif not merge:
                own[key] = (key_node, value_node)
            else:
                for base in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    if not isinstance(base, yaml.MappingNode) or any(base is parent for parent in (*above, node)):
                        self.fail(key_node, keys, "'<<' takes a mapping, or a list of mappings, that stands elsewhere")
                    else:
                        inherited = self.entries(base, keys, (*above, node)) | inherited
            first.setdefault(key, key_node.start_mark.line + 1)
        return inherited | own

    def scalar(self, node: yaml.ScalarNode, keys: Keys) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind in ("value", "merge"):  # a lone "=" or "<<" that is no merge: a text
            return node.value
        problem = _scalar_problem(kind, node.value) if node.style is None else None
        if problem and self.origin and kind == "str" and _NUMBER.fullmatch(node.value) and not _LEADING_ZERO.fullmatch(node.value):
            return float(node.value.replace("_", ""))  # on the command line 2e-4 is the number
        if problem is None and kind not in ("null", "bool", "int", "float", "str"):
            problem = f"the tag {node.tag.replace(_TAG, '!!')} is not supported: write plain values"
        if problem is None:
            try:
                return self.constructor.construct_object(node)
            except (ValueError, KeyError):
                problem = f"{node.value!r} is no {kind}"
        self.fail(node, keys, problem)
        return None


def parse_yaml(text: str, path: str = "recipe") -> Source:
    """The Source of a YAML document; `path` is the name that messages show. Raises ConfigError as `read_yaml` does."""
    builder = _Builder(path)
    data = builder.parse(text)
    if not isinstance(data, dict):
        found = "nothing: the file is empty" if data is None else _describe(data)
        raise ConfigError(f"{path}: expected a mapping (key: value) at the top level, got {found}")
    return Source(data, path, builder.marks)


def read_yaml(path: str | os.PathLike[str]) -> Source:
    """Read a YAML file, keeping the line of each key.

    Raises ConfigError for a file that is missing, not readable, not UTF-8, not YAML, empty, or not a mapping; for duplicate keys;
    and for unquoted scalars that YAML 1.1 reads otherwise than people do (`2e-4`, `no`, `0123`, `1:30`, dates, `None`).
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError as error:
        here = "" if path.is_absolute() else f" (current directory: {Path.cwd()})"
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: no such file: there is no folder {path.parent}{here}") from error
        near = suggest(path.name, (entry.name for entry in path.parent.iterdir() if entry.is_file()))
        raise ConfigError(f"{path}: no such file{here}{near}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder: name a YAML file in it") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}): save the file as UTF-8") from error
    return parse_yaml(text, str(path))


# --- overrides --------------------------------------------------------------------------------------------------------------


def apply_overrides(source: Source, overrides: Iterable[str]) -> Source:
    """A new Source with each `dotted.key=value` set, in order; a number in the key is a list index, the value is YAML.

    Raises ConfigError for what is no `key=value`, a value that is not YAML, and a place that the document does not have.
    """
    data, marks = copy.deepcopy(source.data), dict(source.marks)
    for override in overrides:
        source = replace(source, data=data, marks=marks)
        origin = f"command line: {override}"
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{origin}: expected key=value, for example train.max_steps=50")
        value = _Builder("", tuple(parts), origin).parse(text)
        if value is None and text.strip() not in ("null", "Null", "NULL", "~"):
            raise ConfigError(f"{origin}: the value is empty: write {name.strip()}=null, or {name.strip()}='\"\"' for an empty text")
        node, keys = data, ()
        for part in parts:
            key: str | int = part
            if isinstance(node, list):
                if not part.isdecimal() or int(part) >= len(node):
                    size = f"{len(node)} {'item' if len(node) == 1 else 'items'}, counted from 0"
                    raise ConfigError(f"{origin}: {source.where(keys)}: '{dotted(keys)}' is a list of {size}: it has no '{part}'")
                key = int(part)
            elif not isinstance(node, dict):
                text = f"is {_describe(node)}, not a mapping or a list: it has no '{part}'"
                raise ConfigError(f"{origin}: {source.where(keys)}: '{dotted(keys)}' {text}")
            keys = (*keys, key)
            if len(keys) == len(parts):
                node[key] = value
            elif isinstance(node, dict) and key not in node:
                node[key], marks[keys] = {}, origin
            node = node[key]
        for old in [old for old in marks if old[: len(keys)] == keys]:
            del marks[old]
        marks[keys] = origin
    return replace(source, data=data, marks=marks)


# --- Source -> Config, and pydantic's errors in plain words -----------------------------------------------------------------

_EXPECTED = {  # by pydantic's error type, else by its first word
    **{"int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false", "none": "null"},
    **{"string": "a text", "path": "a path", "dict": "a mapping", "model": "a mapping", "mapping": "a mapping"},
    **{"list": "a list", "tuple": "a list", "set": "a list", "frozen": "a list", "literal": "{expected}", "enum": "{expected}"},
    **{"greater_than": "a number above {gt}", "greater_than_equal": "a number of at least {ge}"},
    **{"less_than": "a number below {lt}", "less_than_equal": "a number of at most {le}", "multiple_of": "a multiple of {multiple_of}"},
    **{"too_short": "{min_length} or more items", "too_long": "at most {max_length} items"},
    **{"string_too_short": "a text of {min_length} or more characters", "string_too_long": "a text of at most {max_length} characters"},
    "string_pattern_mismatch": "a text that matches the pattern {pattern}",
}


def _describe(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:60]!r}..."
    if isinstance(value, (list, dict)):
        size = f"{len(value)} {'item' if len(value) == 1 else 'items'}"
        return f"a list of {size}" if isinstance(value, list) else "a mapping"
    return f"the number {value}"


def _fields(model: type[pydantic.BaseModel]) -> dict[str, FieldInfo]:
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _models(annotation: Any, suffix: str = "") -> list[tuple[str, type[pydantic.BaseModel]]]:
    """The configs an annotation can hold, each with `[]` for every list or mapping around it."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [(suffix, annotation)]
    suffix += "[]" if isinstance(typing.get_origin(annotation), type) and typing.get_origin(annotation) is not types.UnionType else ""
    return [found for part in typing.get_args(annotation) for found in _models(part, suffix)]


def _walk(model: type[pydantic.BaseModel], above: Keys = (), seen: tuple[type, ...] = ()) -> Iterator[tuple[Keys, FieldInfo]]:
    """Every field of a config and of the configs inside it, with its keys; a config within itself is entered once."""
    for name, info in _fields(model).items():
        yield (*above, name), info
        for suffix, inner in _models(info.annotation):
            if inner not in (*seen, model):
                yield from _walk(inner, (*above, name + suffix), (*seen, model))


class _Error(NamedTuple):
    """One of pydantic's errors, placed in the data."""

    keys: Keys
    unions: list[tuple[Keys, str]]
    """The unions on the way: the keys at which each stands, and which of its members pydantic tried."""
    models: list[type[pydantic.BaseModel]]
    """The configs whose field, or unknown key, this is."""
    raw: dict[str, Any]


def _flatten(error: pydantic.ValidationError, loc: tuple[int | str, ...] = ()) -> Iterator[dict[str, Any]]:
    """pydantic's errors, those of a validation inside a validator included."""
    for raw in error.errors(include_url=False):
        inner = raw.get("ctx", {}).get("error")
        if isinstance(inner, pydantic.ValidationError):
            yield from _flatten(inner, loc + raw["loc"])
        else:
            yield {**raw, "loc": loc + raw["loc"]}


def _locate(model: type[pydantic.BaseModel], data: Any, raw: dict[str, Any]) -> _Error:
    """pydantic's `loc` mixes keys with names of union members: what is neither in the data nor a field is a member."""
    keys: Keys = ()
    unions: list[tuple[Keys, str]] = []
    models = [model]
    for part in raw["loc"]:
        fields = {name: info for owner in models for name, info in _fields(owner).items()}
        if part in fields or isinstance(part, int) or (isinstance(data, dict) and part in data):
            known = isinstance(part, int) == isinstance(data, list) and isinstance(data, (list, dict))
            data = data[part] if known and (part in data if isinstance(data, dict) else part < len(data)) else None
            models = [inner for _, inner in _models(fields[part].annotation)] if part in fields else models
            keys = (*keys, part)
        else:
            unions.append((keys, part))
            models = [inner for inner in models if inner.__name__ == part] or models
    return _Error(keys, unions, models, raw)


def _collapse(errors: list[_Error], depth: int = 0) -> Iterator[list[_Error]]:
    """Group the errors that make one problem: those of a union's members, unless one member fits but for what is inside it."""
    groups: dict[object, list[_Error]] = {}
    for number, error in enumerate(errors):
        groups.setdefault(error.unions[depth][0] if len(error.unions) > depth else number, []).append(error)
    for group in groups.values():
        if len(group[0].unions) <= depth:
            yield group
            continue
        members: dict[str, list[_Error]] = {}
        for error in group:
            members.setdefault(error.unions[depth][1], []).append(error)
        union = group[0].unions[depth][0]
        inside = [m for m in members.values() if all(len(e.keys) > len(union) or e.raw["type"] in _RAISED for e in m)]
        if inside:
            yield from _collapse(min(inside, key=len), depth + 1)
        else:
            yield group


_RAISED = ("value_error", "assertion_error")


def _explain(errors: list[_Error], root: type[pydantic.BaseModel]) -> str:
    """What is wrong, in plain words, for errors that make one problem."""
    keys, _, models, raw = errors[0]
    if raw["type"] == "extra_forbidden":
        sections = {dotted(place[:-1]) for place, _ in _walk(root) if place[-1] == keys[-1]}
        if sections:
            places = sorted(f"under '{section}'" if section else "at the top level" for section in sections)
            return f"unknown key; it belongs {' or '.join(places[:3])}"
        return "unknown key" + suggest(keys[-1], (name for model in models for name in _fields(model)))
    if raw["type"] in _RAISED:
        return str(raw["ctx"]["error"])
    expected, choices, value = [], [], raw["input"]
    for error in errors:
        kind, context = error.raw["type"], error.raw.get("ctx", {})
        phrase = _EXPECTED.get(kind) or _EXPECTED.get(kind.split("_")[0])
        expected.append(phrase.format(**context) if phrase else error.raw["msg"])
        choices += re.findall(r"'([^']*)'", context["expected"]) if phrase == "{expected}" else []
    expected = list(dict.fromkeys(expected))
    hint = suggest(value, choices) if isinstance(value, str) else ""
    if isinstance(value, str) and _NUMBER.fullmatch(value) and {"a number", "a whole number"} & {*expected}:
        hint = "; write it without quotes"
    elif isinstance(value, (int, float)) and "a text" in expected:
        hint = "; quote it if it is a text"
    elif value is None and "a mapping" in expected:
        hint = "; write {} for the defaults"
    return f"expected {' or '.join(expected)}, got {_describe(value)}{hint}"


def validate(model: type[T], source: Source, at: Keys = ()) -> T:
    """The config that `source` (or the part of it at the keys `at`; an absent part counts as empty) describes.

    Raises one ConfigError with one line per problem, in the order of the file.
    """
    data = source.data
    for depth, key in enumerate(at):
        if not isinstance(data, list if isinstance(key, int) else dict):
            raise ConfigError(source.problem(at[:depth], f"expected a mapping or a list, got {_describe(data)}"))
        data = data[key] if isinstance(key, int) else data.get(key, {})
    try:  # as JSON, which has the types of YAML: strict validation then takes a list for a tuple and a text for a path
        return model.model_validate_json(json.dumps(data, default=os.fspath))
    except pydantic.ValidationError as error:
        problems = []
        for group in _collapse([_locate(model, data, raw) for raw in _flatten(error)]):
            keys = (*at, *group[0].keys)
            if group[0].raw["type"] == "missing":
                text = f"{source.where(keys)}: missing key '{dotted(keys)}'"
            else:
                text = source.problem(keys, _explain(group, model))
            problems.append((source.line(keys) or float("inf"), text))
        raise ConfigError("\n".join(text for _, text in sorted(problems, key=lambda problem: problem[0]))) from error


# --- Config -> YAML text and tables -----------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(_TAG + "str", text, style="'" if _scalar_problem("str", text) else None)
)


def dump_yaml(config: Config | dict[str, Any]) -> str:
    """YAML text from which `read_yaml` and `validate` give an equal config back."""
    return yaml.dump(to_jsonable_python(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def _inline(value: object) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(to_jsonable_python(value), Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type as documentation shows it: `int (>= 1) | null`, `'a' | 'b'`, `list[str]`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    signs = {
        "gt": ">",
        "ge": ">=",
        "lt": "<",
        "le": "<=",
        "multiple_of": "multiple of",
        "min_length": "length >=",
        "max_length": "length <=",
    }
    bounds = [f"{sign} {getattr(rule, name)}" for rule in metadata for name, sign in signs.items() if getattr(rule, name, None) is not None]
    if origin is Annotated:
        text = _type_text(args[0], args[1:])
    elif origin in (typing.Union, types.UnionType):
        text = " | ".join(_type_text(part) for part in args)
    elif origin is Literal:
        text = " | ".join(repr(part) if isinstance(part, str) else _inline(part) for part in args)
    elif origin is not None:
        text = f"{origin.__name__}[{', '.join('...' if part is ... else _type_text(part) for part in args)}]"
    else:
        text = "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
    return f"{text} ({', '.join(bounds)})" if bounds else text


def defaults_table(model: type[Config]) -> list[tuple[str, str, str, str]]:
    """(key, type, default, description) of every field, sections flattened to dotted keys, `[]` for the items of a list.

    The default is YAML on one line, `required` where there is none.
    """
    rows = []
    for keys, info in _walk(model):
        if isinstance(info.annotation, type) and issubclass(info.annotation, pydantic.BaseModel):
            continue  # a section: its fields follow
        default = "required" if info.is_required() else _inline(info.get_default(call_default_factory=True))
        rows.append((dotted(keys), _type_text(info.annotation, info.metadata), default, info.description or ""))
    return rows
