"""The strict base of every config: YAML <-> pydantic, dotted overrides, errors with file, line, key and suggestion.

    source = apply_overrides(read_yaml("recipe.yaml"), ["train.max_steps=50"])
    recipe = validate(Recipe, source)        # a Config, or a ConfigError whose text is all a user needs

A `Source` is a document that still knows where each key stands: `source.problem(keys, "what is wrong")` says where it was written.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

Keys = tuple[str | int, ...]
Model = type[pydantic.BaseModel]
T = TypeVar("T", bound="Config")


class ConfigError(Exception):
    """A wrong recipe or a wrong usage. `str(error)` is the whole message for the user, one line per problem."""


class Config(pydantic.BaseModel):
    """Base of all configs: immutable, no unknown keys, no silent conversion of types; the text under a field describes it.

    An int is taken for a float; a bool is never a number and a text never becomes one; infinity and NaN are refused.
    A union of several configs needs a `Field(discriminator=...)`, so that errors are about the one that was meant.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)


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
    path: str = "recipe"  # the name shown in messages: the file, as the user gave it
    marks: dict[Keys, int | str] = field(default_factory=dict)  # 1-based line of each key, or its origin (the command line)

    def _mark(self, keys: Keys) -> int | str | None:
        return next((self.marks[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.marks), None)

    def line(self, keys: Keys) -> int | None:
        """1-based line of the key, or of its nearest parent; None at the root and for what the command line set."""
        return mark if isinstance(mark := self._mark(keys), int) else None

    def where(self, keys: Keys) -> str:
        """`recipe.yaml:12`, or `command line: train.max_steps=50`, or `recipe.yaml` where no line is known."""
        mark = self._mark(keys)
        return mark if isinstance(mark, str) else self.path if mark is None else f"{self.path}:{mark}"

    def problem(self, keys: Keys, text: str) -> str:
        """One line for a `ConfigError`: where, which key, what is wrong."""
        return ": ".join([self.where(keys), *([dotted(keys)] if keys else []), text])


_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_LEADING_ZERO = re.compile(r"[-+]?0o?[0-9_]+")
_NUMBER = re.compile(r"(?=[-+]?\.?[0-9])([-+]?)([0-9_]*)\.?([0-9_]*)(?:[eE]([-+]?[0-9]+))?")


def _scalar_problem(kind: str, text: str) -> str | None:
    """Why this unquoted scalar, which YAML 1.1 reads as `kind`, is not what its writer meant; None where it is clear."""
    reading, remedy = "text", ""
    if kind == "bool" and text.lower() in ("yes", "no", "on", "off"):
        reading, remedy = "true" if text.lower() in ("yes", "on") else "false", "write true or false, or "
    elif kind == "timestamp":
        reading = "a date"
    elif kind in ("int", "float") and ":" in text:
        reading, remedy = "a number in base 60", "write a plain number, or "
    elif kind in ("int", "str") and _LEADING_ZERO.fullmatch(text):
        reading, remedy = "an octal number" if kind == "int" else "text", "write it without the leading zero, or "
    elif kind == "str" and (match := _NUMBER.fullmatch(text)):
        sign, whole, fraction, exponent = match.groups()
        number = f"{sign}{whole or 0}.{fraction or 0}" + (f"e{int(exponent):+d}" if exponent else "")
        reading, remedy = "text, not as a number", f"write {number}, or "
    elif kind == "str" and text == "None":
        remedy = "write null, or "
    else:
        return None
    return f"YAML reads {text} as {reading}: {remedy}quote it if it is a text"


class _Builder:
    """Builds plain values from YAML nodes, keeping the line of each key and gathering all problems before it raises."""

    def __init__(self, path: str, origin: str | None = None) -> None:
        self.path, self.origin = path, origin
        self.marks: dict[Keys, int | str] = {}
        self.problems: list[str] = []

    def parse(self, text: str, at: Keys = ()) -> Any:
        """The value of the document, which stands at the keys `at`; None for an empty one. Raises ConfigError."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            value = None if node is None else self.build(node, at)
        except yaml.MarkedYAMLError as error:
            mark, problem = error.problem_mark, error.problem or "it cannot be read"
            place = self.origin or (f"{self.path}:{mark.line + 1}:{mark.column + 1}" if mark else self.path)
            hint = "; indent with spaces, not tabs" if "\\t" in problem else "; quote the value" if self.origin else ""
            raise ConfigError(f"{place}: not valid YAML: {problem}{f' ({error.context})' if error.context else ''}{hint}") from error
        except yaml.reader.ReaderError as error:
            place = self.origin or f"{self.path}:{text.count(chr(10), 0, error.position) + 1}"
            raise ConfigError(f"{place}: not valid YAML: the character {chr(error.character)!a} is not allowed") from error
        except RecursionError as error:
            raise ConfigError(f"{self.origin or self.path}: nested too deeply; does an anchor contain itself?") from error
        if self.origin and node is not None and text[node.end_mark.index :].strip():
            self.fail(node, at, "the text after ' #' would be lost: quote the value")
        if self.problems:
            raise ConfigError("\n".join(self.problems))
        return value

    def fail(self, node: yaml.Node, keys: Keys, text: str) -> None:
        self.problems.append(Source(None, self.path, {(): self.origin or node.start_mark.line + 1}).problem(keys, text))

    def build(self, node: yaml.Node, keys: Keys) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(kind, node, keys)
        if kind != ("map" if isinstance(node, yaml.MappingNode) else "seq"):
            return self.fail(node, keys, f"the YAML tag {kind} is not supported: write plain values")
        listed = {i: (item.start_mark.line + 1, item) for i, item in enumerate(node.value)} if kind == "seq" else {}
        items = self.entries(node, keys) if isinstance(node, yaml.MappingNode) else listed
        self.marks |= {(*keys, key): line for key, (line, _) in items.items()}
        values = {key: self.build(item, (*keys, key)) for key, (_, item) in items.items()}
        return values if kind == "map" else list(values.values())

    def entries(self, node: yaml.MappingNode, keys: Keys) -> dict[Any, tuple[int, yaml.Node]]:
        """The line and value node of each key of a mapping, after `<<` merges: own keys win, then the bases in their order."""
        own: dict[Any, tuple[int, yaml.Node]] = {}
        for key_node, value_node in node.value:
            key = _MERGE if key_node.tag == _MERGE else key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (_TAG + "str", _TAG + "value", _MERGE):
                self.fail(key_node, keys, "a key must be a text" + (f": quote {key}" if isinstance(key, str) else ""))
            elif key in own:
                self.fail(key_node, (*keys, key_node.value), f"duplicate key: line {own[key][0]} already has it")
            else:
                own[key] = (key_node.start_mark.line + 1, value_node)
        inherited: dict[Any, tuple[int, yaml.Node]] = {}
        _, merged = own.pop(_MERGE, (0, None))
        for base in merged.value if isinstance(merged, yaml.SequenceNode) else [merged] if merged else []:
            if isinstance(base, yaml.MappingNode):
                inherited = self.entries(base, keys) | inherited
            else:
                self.fail(base, keys, "'<<' takes a mapping or a list of mappings")
        return inherited | own

    def scalar(self, kind: str, node: yaml.ScalarNode, keys: Keys) -> Any:
        if kind in ("value", "merge"):  # a lone "=" or "<<" that is no merge: a text
            return node.value
        problem = _scalar_problem(kind, node.value) if node.style is None else None
        if problem and self.origin and kind == "str" and _NUMBER.fullmatch(node.value) and not _LEADING_ZERO.fullmatch(node.value):
            return float(node.value.replace("_", ""))  # on the command line 2e-4 is the number
        if problem is None and kind not in ("null", "bool", "int", "float", "str"):
            problem = f"the YAML tag {kind} is not supported: write plain values"
        if problem is None:
            try:
                return yaml.constructor.SafeConstructor().construct_object(node)
            except (ValueError, KeyError):
                problem = f"{node.value!r} is no {kind}"
        return self.fail(node, keys, problem)


def parse_yaml(text: str, path: str = "recipe") -> Source:
    """The Source of a YAML document; `path` is the name that messages show. Raises ConfigError as `read_yaml` does."""
    builder = _Builder(path)
    data = builder.parse(text)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping (key: value), got {'an empty file' if data is None else _describe(data)}")
    return Source(data, path, builder.marks)


def read_yaml(path: str | os.PathLike[str]) -> Source:
    """Read a YAML file, keeping the line of each key.

    Raises ConfigError for a file that is missing, not readable, not UTF-8, not YAML, empty, or not a mapping; for duplicate keys;
    and for unquoted scalars that YAML 1.1 reads otherwise than people do (`2e-4`, `no`, `0123`, `1:30`, dates, `None`).
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        return parse_yaml(raw.decode("utf-8-sig"), str(path))
    except FileNotFoundError as error:
        here = "" if path.is_absolute() else f" (current directory: {Path.cwd()})"
        near = suggest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else f"; there is no folder {path.parent}"
        raise ConfigError(f"{path}: no such file{here}{near}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {'it is a folder' if path.is_dir() else error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}): save the file as UTF-8") from error


def apply_overrides(source: Source, overrides: Iterable[str]) -> Source:
    """A new Source with each `dotted.key=value` set, in order; a number in the key is a list index, the value is YAML.

    Raises ConfigError for what is no `key=value`, a value that is not YAML, and a place that the document does not have.
    """
    source = Source(copy.deepcopy(source.data), source.path, dict(source.marks))
    for override in overrides:
        origin = f"command line: {override}"
        name, equals, text = map(str.strip, override.partition("="))
        parts = name.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{origin}: expected key=value, for example train.max_steps=50")
        value = _Builder("", origin).parse(text, tuple(parts))
        if value is None and text.lower() not in ("null", "~"):
            raise ConfigError(f"{origin}: the value is empty: write {name}=null, or {name}='\"\"' for an empty text")
        node: Any = source.data
        keys: Keys = ()
        for part in parts:
            if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                key: str | int = int(part)
            elif isinstance(node, dict):
                key = part
            else:
                what = f"{_describe(node)}{', counted from 0' if isinstance(node, list) else ', not a mapping or a list'}"
                raise ConfigError(f"{origin}: {source.where(keys)}: '{dotted(keys)}' is {what}: it has no '{part}'")
            keys = (*keys, key)
            if len(keys) == len(parts):
                node[key] = value
            elif isinstance(node, dict) and node.get(key) is None:  # absent, or null, as a resolved recipe writes it
                node[key], source.marks[keys] = {}, origin
            node = node[key]
        for old in [old for old in source.marks if old[: len(keys)] == keys]:
            del source.marks[old]
        source.marks[keys] = origin
    return source


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
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:60]!r}..."
    if isinstance(value, (list, dict)):
        return "a mapping" if isinstance(value, dict) else f"a list of {len(value)} {'item' if len(value) == 1 else 'items'}"
    return json.dumps(value) if value is None or isinstance(value, bool) else f"the number {value}"


def _models(annotation: Any, suffix: str = "") -> list[tuple[str, Model]]:
    """The configs an annotation can hold, each with `[]` for every list or mapping around it."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [(suffix, annotation)]
    suffix += "[]" if typing.get_origin(annotation) in (list, tuple, set, frozenset, dict) else ""
    return [found for part in typing.get_args(annotation) for found in _models(part, suffix)]


def _walk(model: Model, above: Keys = (), seen: tuple[type, ...] = ()) -> Iterator[tuple[Keys, FieldInfo]]:
    """Every field of a config and of the configs inside it, with its keys; a config within itself is entered once."""
    for name, info in model.model_fields.items():
        yield (*above, name), info
        for suffix, inner in _models(info.annotation):
            if inner not in (*seen, model):
                yield from _walk(inner, (*above, name + suffix), (*seen, model))


def _locate(model: Model, data: Any, loc: tuple[int | str, ...]) -> tuple[Keys, list[Model]]:
    """The keys in pydantic's `loc`, which also names members of unions, and the configs that could own the last key."""
    keys, models = typing.cast(Keys, ()), [model]
    for part in loc:
        infos = [owner.model_fields[part] for owner in models if part in owner.model_fields]
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int) and part < len(data)
        if inside or infos or isinstance(part, int):
            keys, data = (*keys, part), data[part] if inside else None
            models = [inner for info in infos for _, inner in _models(info.annotation)] if infos else models
        else:  # neither in the data nor a field: a member of a union
            models = [inner for inner in models if inner.__name__ == part] or models
    return keys, models


def _explain(errors: list[tuple[Any, list[Model]]], keys: Keys, root: Model) -> str:
    """What is wrong with one key, in plain words; there are several errors where it can be of several types."""
    raw = errors[0][0]
    if raw["type"] == "extra_forbidden":
        sections = sorted({dotted(place[:-1]) for place, _ in _walk(root) if place[-1] == keys[-1]})
        if sections:
            return "unknown key; it belongs " + " or ".join(f"under '{name}'" if name else "at the top level" for name in sections[:3])
        return "unknown key" + suggest(keys[-1], (name for _, owners in errors for owner in owners for name in owner.model_fields))
    if "error" in raw.get("ctx", {}):  # a validator raised it
        return str(raw["ctx"]["error"])
    value, hint, expected = raw["input"], "", []
    for error, _ in errors:
        phrase = _EXPECTED.get(error["type"]) or _EXPECTED.get(error["type"].split("_")[0])
        expected.append(phrase.format(**error.get("ctx", {})) if phrase else error["msg"])
    if isinstance(value, str) and _NUMBER.fullmatch(value) and {"a number", "a whole number"} & {*expected}:
        hint = "; write it without quotes"
    elif isinstance(value, str):
        hint = suggest(value, re.findall(r"'([^']*)'", " ".join(expected)))
    elif isinstance(value, (int, float)) and "a text" in expected:
        hint = "; quote it if it is a text"
    elif value is None and "a mapping" in expected:
        hint = "; write {} for the defaults"
    return f"expected {' or '.join(dict.fromkeys(expected))}, got {_describe(value)}{hint}"


def validate(model: type[T], source: Source, at: Keys = ()) -> T:
    """The config that `source` (or the part of it at the keys `at`; an absent part counts as empty) describes.

    Raises one ConfigError with one line per problem, in the order of the file.
    """
    data: Any = source.data
    for depth, key in enumerate(at):
        if type(data) is not {int: list, str: dict}[type(key)]:
            raise ConfigError(source.problem(at[:depth], f"expected a mapping or a list, got {_describe(data)}"))
        data = data[key] if isinstance(key, int) else data.get(key, {})
    try:  # as JSON, which has the types of YAML: strict validation then takes a list for a tuple and a text for a path
        return model.model_validate_json(json.dumps(data, default=os.fspath))
    except pydantic.ValidationError as error:
        found: dict[Keys, list[tuple[Any, list[Model]]]] = {}
        for raw in error.errors(include_url=False):
            keys, owners = _locate(model, data, raw["loc"])
            found.setdefault(keys, []).append((raw, owners))
        problems = []
        for keys, errors in found.items():
            if any(other[: len(keys)] == keys != other for other in found):
                continue  # one member of a union fits but for what is inside it: the other members say nothing new
            place = (*at, *keys)
            missing = f"{source.where(place)}: missing key '{dotted(place)}'" if errors[0][0]["type"] == "missing" else ""
            problems.append((source.line(place) or float("inf"), missing or source.problem(place, _explain(errors, keys, model))))
        raise ConfigError("\n".join(text for _, text in sorted(problems, key=lambda problem: problem[0]))) from error


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the reader would refuse unquoted."""


_Dumper.add_representer(str, lambda self, text: self.represent_scalar(_TAG + "str", text, "'" if _scalar_problem("str", text) else None))


def dump_yaml(config: Config | dict[str, Any]) -> str:
    """YAML text from which `read_yaml` and `validate` give an equal config back."""
    return str(yaml.dump(to_jsonable_python(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140))


def _type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type as documentation shows it: `int (>= 1) | null`, `'a' | 'b'`, `list[str]`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{sign} {getattr(rule, name)}" for rule in metadata for name, sign in signs.items() if getattr(rule, name, None) is not None]
    if origin is Annotated:
        text = _type_text(args[0], args[1:])
    elif origin is Literal:
        text = " | ".join(json.dumps(part) if part is None or isinstance(part, bool) else repr(part) for part in args)
    elif origin in (typing.Union, types.UnionType):
        text = " | ".join(map(_type_text, args))
    elif args:
        text = f"{origin.__name__}[{', '.join(map(_type_text, args))}]"
    else:
        text = "null" if annotation is type(None) else "..." if annotation is ... else getattr(annotation, "__name__", str(annotation))
    return f"{text} ({', '.join(bounds)})" if bounds else text


def defaults_table(model: type[Config]) -> list[tuple[str, str, str, str]]:
    """(dotted key, type, default as YAML or `required`, description) of every field; `[]` stands for the items of a list."""
    rows = []
    for keys, info in _walk(model):
        if not isinstance(info.annotation, type) or not issubclass(info.annotation, pydantic.BaseModel):  # else its fields follow
            value = "required" if info.is_required() else to_jsonable_python(info.get_default(call_default_factory=True))
            default = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            rows.append((dotted(keys), _type_text(info.annotation, info.metadata), default, info.description or ""))
    return rows
