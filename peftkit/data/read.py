"""Reads rows from files, the hub and the built-in tasks, and brings every known shape into one: `Row`."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from peftkit.builtin.tasks import builtin_rows
from peftkit.config import Config, ConfigError, suggest

FORMATS: dict[str, tuple[str, ...]] = {  # the columns each needs; a row is of the first format that it has all columns of
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
    "text": ("text",),
}
NEEDED = {name for needed in FORMATS.values() for name in needed}
OPTIONAL = {"input", "system", "tools"}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
HUB_ID = r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<subset>[\w.-]+))?(:(?P<split>[\w\[\]:%+-]+))?"


class DataConfig(Config):
    train: str
    """What to train on: `builtin:<task>/<split>`, a local .json, .jsonl, .csv, .parquet or .txt file, or a data set on the
    hub, `owner/name`, with `/subset` and `:split` where needed (`tatsu-lab/alpaca:train[:1%]`; `:train` if not given)."""

    eval: str | None = None
    """What to evaluate on, named in the same way (`:test` if a hub data set is named without a split)."""

    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of the training rows, the last ones, set aside for evaluation where `eval` is not given; of a .txt file, the
    last share of its tokens."""

    columns: dict[str, str] | None = None
    """The file's own column names for the standard ones, as in `{prompt: question, completion: answer}`."""

    system: str | None = None
    """System message put before rows that have none."""

    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """The tokens that are trained: every assistant turn, the last one, or the whole row. Of prompt and completion,
    `assistant` and `last` both mean the completion. Plain text is always trained as a whole."""

    max_length: int = Field(512, ge=2)
    """Longest row, in tokens; also the size of a packed row, and of the blocks a .txt file is cut into."""

    truncation: Literal["drop", "right"] = "drop"
    """What happens to a longer row: `drop` leaves it out, `right` cuts its end off. The report counts both."""

    packing: bool = False
    """Put several short rows into one of `max_length` tokens; none of them sees another."""

    train_rows: int | None = Field(None, ge=1)
    """Train on the first rows only, this many."""

    eval_rows: int | None = Field(None, ge=1)
    """Evaluate on the first rows only, this many."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens when rows cannot be used: stop and list them, or leave them out and list them in the report."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        names = sorted(NEEDED | OPTIONAL)
        for name in columns or {}:
            if name not in names:
                raise ValueError(f"{name!r} is no standard column{suggest(name, names)} (there are: {', '.join(names)})")
        return columns

    @model_validator(mode="after")
    def _one_evaluation_set(self) -> DataConfig:
        if self.eval and self.holdout:
            raise ValueError("'eval' names the rows to evaluate on, so 'holdout' would do nothing: give one of the two")
        return self


class HubError(ConfigError):
    """A data set on the hub that could not be read: the network, its name, its split, or a licence to accept."""


@dataclass(frozen=True)
class BadRow:
    """A row that is left out, and why."""

    where: str
    """`file:line` (JSON lines, CSV) or `source[index]`, counted from 0."""

    reason: str
    too_long: bool = False
    """Left out by `truncation: drop`, and nothing else is wrong with it."""


class Record(NamedTuple):
    """A row as it was read."""

    where: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row in its one normal shape: chat messages, or text."""

    where: str
    messages: list[dict[str, Any]]
    """`role` and `content` each (and what else the turn had); empty for a text row."""

    plain_prompt: str | None = None
    """How the prompt reads to a model without a chat template; None for text and for chats, which need one."""

    text: str = ""
    tools: Any = None
    """The tools column as it was read: a list, or its JSON."""


# Where rows come from


def local_file(spec: str) -> Path | None:
    """The file that `spec` names, whether or not it exists; None where it is a built-in task or reads as a hub id."""
    if spec.startswith("builtin:"):
        return None
    path = Path(spec).expanduser()
    in_folder = path.parent != Path(".") and path.parent.is_dir()
    looks_local = path.suffix.lower() in FILES or in_folder or spec.startswith((".", "~")) or ("/" not in spec and path.suffix)
    return path if path.exists() or looks_local or not re.fullmatch(HUB_ID, spec) else None


def check_file(path: Path) -> None:
    """Raises ConfigError, with the nearest names, where `path` is no file that can be read here."""
    listed = f"supported are {', '.join(FILES)}"
    if path.is_dir():
        inside = sorted(child.name for child in path.iterdir() if child.suffix.lower() in FILES)
        raise ConfigError(f"{path} is a folder; name one file in it ({', '.join(inside[:10]) or 'it has none that can be read'}; {listed})")
    if not path.parent.is_dir():
        raise ConfigError(f"no such file: {path} (there is no folder {path.parent})")
    if not path.exists():
        raise ConfigError(f"no such file: {path}{suggest(path.name, [child.name for child in path.parent.iterdir()])}")
    if path.suffix.lower() not in FILES:
        raise ConfigError(f"{path}: cannot read {path.suffix or 'a file without extension'}; {listed}")


def read_rows(spec: str, split: str) -> list[Record | BadRow]:
    """All rows that `spec` names; `split` is the hub split where it names none. Lines that are no rows come as BadRow.

    Raises ConfigError for a file, task or hub data set that is missing or cannot be read.
    """
    if spec.startswith("builtin:"):
        return read_builtin(spec)
    path = local_file(spec)
    if path is None:
        return read_hub(spec, split)
    check_file(path)
    if path.suffix.lower() == ".parquet":
        return read_parquet(path)
    try:
        return read_csv(path) if path.suffix.lower() == ".csv" else read_json(path)
    except UnicodeDecodeError as error:
        raise ConfigError(not_utf8(path)) from error


def not_utf8(path: Path) -> str:
    """What is wrong with a file that is not UTF-8, with the line."""
    raw = path.read_bytes()
    try:
        raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"{path}:{1 + raw.count(10, 0, error.start)}: not UTF-8 (byte 0x{raw[error.start]:02x}): save the file as UTF-8"
    return f"{path}: was written to while it was read"


def read_builtin(spec: str) -> list[Record | BadRow]:
    task, _, split = spec.removeprefix("builtin:").partition("/")
    if not split:
        raise ConfigError(f"{spec!r} names no split; write {spec}/train or {spec}/test")
    try:
        return [Record(f"{spec}[{i}]", row) for i, row in enumerate(builtin_rows(task, split))]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def read_json(path: Path) -> list[Record | BadRow]:
    """A JSON array of objects, or JSON lines (a .json file may hold either)."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(text) if text.strip() else []
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # one value after another: JSON lines
                raise ConfigError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
        else:
            if not isinstance(rows, list):
                keys = f" with the keys {', '.join(map(repr, rows))}" if isinstance(rows, dict) else ""
                raise ConfigError(f"{path}: expected an array of rows, found {kind(rows)}{keys}")
            return [as_record(f"{path}[{i}]", row) for i, row in enumerate(rows)]
    records: list[Record | BadRow] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                records.append(as_record(where, json.loads(line)))
            except json.JSONDecodeError as error:
                records.append(BadRow(where, f"not JSON ({error.msg}, column {error.colno})"))
    return records


def read_csv(path: Path) -> list[Record | BadRow]:
    """With the standard library rather than `datasets`: a cell `007` or `NA` stays the text it is, and lines have numbers."""
    records: list[Record | BadRow] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, line = csv.DictReader(file), 2
        try:
            for row in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                whole = None not in row and None not in row.values()
                records.append(Record(where, row) if whole else BadRow(where, f"not the {len(reader.fieldnames or ())} cells of the header"))
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.line_num}: {error}") from error
    return records


def read_parquet(path: Path) -> list[Record | BadRow]:
    from datasets import load_dataset  # takes a second to import
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        if not read_metadata(path).num_rows:
            return []
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)  # reads the file itself, without a copy in the cache
        return [Record(f"{path}[{i}]", dict(row)) for i, row in enumerate(rows)]
    except (ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as parquet ({first_line(error)}); write or download it again") from error


def read_hub(spec: str, split: str) -> list[Record | BadRow]:
    from datasets import load_dataset

    parts = re.fullmatch(HUB_ID, spec)
    assert parts is not None  # local_file() took everything else for a path
    name, subset, split = parts["name"], parts["subset"], parts["split"] or split
    try:
        rows = load_dataset(name, subset, split=split)
    except Exception as error:  # network, missing data set, missing split, gated: each library below has its own errors
        raise HubError(f"{spec!r} is no local file, and reading split {split!r} of the data set {name!r} from the hub failed: {first_line(error)}") from error
    source = f"{name}/{subset}:{split}" if subset else f"{name}:{split}"
    return [Record(f"{source}[{i}]", dict(row)) for i, row in enumerate(rows)]


def as_record(where: str, row: Any) -> Record | BadRow:
    return Record(where, row) if isinstance(row, dict) else BadRow(where, f"expected an object with columns, found {kind(row)}")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


# What a row means


def find_format(records: Sequence[Record | BadRow], config: DataConfig, source: str) -> str:
    """The format of the first record that has one. Raises ConfigError naming columns found, expected and nearest."""
    columns = config.columns or {}
    rows = [record.columns for record in records if isinstance(record, Record)]
    found = list(dict.fromkeys(name for row in rows for name in row))
    for standard, name in columns.items():
        if name not in found:
            raise ConfigError(f"{source}: data.columns reads {standard!r} from {name!r}, which no row has{suggest(name, found)} ({listing(found)})")
    # A mapped column says which format is meant, even where the rows would also pass for another.
    meant = set(columns) & NEEDED
    for row in rows:
        for form, needed in FORMATS.items():
            if meant <= set(needed) and all(columns.get(name, name) in row for name in needed):
                return form
    if not rows:
        return "unknown"  # every line is a BadRow, and says why
    near = "".join(f"\n  {name!r}{hint}" for name in found if name not in NEEDED and (hint := suggest(name, sorted(NEEDED))))
    raise ConfigError(
        f"{source}: no known row format ({listing(found)}). Known are: {'; '.join(' + '.join(needed) for needed in FORMATS.values())}."
        f" Name the columns in data.columns, as in {{prompt: question, completion: answer}}.{near}"
    )


def listing(found: Sequence[str]) -> str:
    return f"columns found: {', '.join(map(str, found)) or 'none'}"


def normalise(record: Record | BadRow, form: str, config: DataConfig) -> Row | BadRow:
    """The record as a Row, or what is wrong with it."""
    if isinstance(record, BadRow):
        return record
    where, columns, names = record.where, record.columns, config.columns or {}
    needed = [names.get(name, name) for name in FORMATS[form]]
    missing = [name for name in needed if name not in columns]
    if missing:
        near = suggest(missing[0], [name for name in columns if name not in needed])
        return BadRow(where, f"no {', '.join(map(repr, missing))} ({listing(list(columns))}; expected: {', '.join(needed)}{near})")

    def cell(standard: str) -> Any:
        return columns.get(names.get(standard, standard))

    def text(standard: str) -> str:
        return as_text(cell(standard), names.get(standard, standard))

    try:
        if form == "text":
            if not text("text").strip():
                raise ValueError("the text is empty")
            return Row(where, [], text=text("text"))
        system = cell("system") or config.system
        if form in ("messages", "conversations"):
            messages, plain = as_messages(cell(form), names.get(form, form)), None
        else:
            prompt_name, completion_name = FORMATS[form]
            prompt = text(prompt_name)
            plain = prompt + "\n"
            if form == "instruction/output":
                given = text("input") if cell("input") else ""
                plain = "".join(f"{title}:\n{part}\n\n" for title, part in (("Instruction", prompt), ("Input", given)) if part) + "Response:\n"
                prompt = f"{prompt}\n\n{given}" if given else prompt
            plain = f"{as_text(system, 'system')}\n\n{plain}" if system else plain
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text(completion_name)}]
        if system and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": as_text(system, "system")}, *messages]
        if config.loss_on != "all":
            check_answer(messages)
    except ValueError as error:
        return BadRow(where, str(error))
    return Row(where, messages, plain, tools=cell("tools"))


def as_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):  # JSON knows no NaN, Python's reader does
        raise ValueError(f"{name!r} must be text, found {value}: an empty cell of a table? fill it or leave the row out")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{name!r} must be text, found {kind(value)}")


def as_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Turns of `role` and `content`, or of ShareGPT's `from` and `value`, with the roles chat templates know."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} must be a list of turns, found {'an empty one' if value == [] else kind(value)}")
    messages = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} of {name!r} must be an object, found {kind(turn)}")
        keys = ("role", "content") if "role" in turn else ("from", "value")
        if keys[0] not in turn or (keys[1] not in turn and not turn.get("tool_calls")):
            raise ValueError(f"turn {number} of {name!r} needs 'role' and 'content', or 'from' and 'value'; its keys: {', '.join(turn)}")
        role, content = SHAREGPT_ROLES.get(turn[keys[0]], turn[keys[0]]), turn.get(keys[1])
        if role not in ROLES:
            raise ValueError(f"turn {number} of {name!r} has the unknown role {role!r}{suggest(str(role), [*ROLES, *SHAREGPT_ROLES])}")
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise ValueError(f"turn {number} of {name!r}: the {keys[1]} must be text, found {kind(content)}")
        rest = {key: value for key, value in turn.items() if key not in keys and value is not None}
        for call in rest.get("tool_calls") or []:
            check_arguments(call)
        messages.append({"role": role, "content": content, **rest})
    return messages


def check_arguments(call: Any) -> None:
    """Raises ValueError where the arguments of a tool call, which OpenAI's shape holds as a text, are not JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            json.loads(function["arguments"])
        except json.JSONDecodeError as error:
            raise ValueError(f"the arguments of the call of {function.get('name')!r} are not JSON ({error.msg}, column {error.colno})") from error


def check_answer(messages: list[dict[str, Any]]) -> None:
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    if not answers:
        raise ValueError(f"no assistant turn to learn from (roles: {', '.join(turn['role'] for turn in messages)})")
    if not (answers[-1]["content"] or "").strip() and not answers[-1].get("tool_calls"):
        raise ValueError("the answer is empty")
