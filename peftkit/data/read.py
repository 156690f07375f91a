"""Reads rows from files, folders, the hub and the built-in tasks, one after another: a source need not fit into memory."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peftkit.builtin.tasks import builtin_rows
from peftkit.config import ConfigError, suggest

SPLITS = {"train": "train", "training": "train"} | dict.fromkeys(("test", "testing", "eval", "evaluation", "dev", "val", "valid", "validation"), "test")
FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
HUB_ID = r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<subset>[\w.-]+))?(:(?P<split>[\w\[\]:%+-]+))?"


class HubError(ConfigError):
    """A data set on the hub that could not be read: the network, its name, its split, or a licence to accept."""


@dataclass(frozen=True)
class BadRow:
    """A row that is left out, and why."""

    where: str
    """`file:line`, counted from 1, or, where rows have no lines of their own, `source[index]`, counted from 0."""

    reason: str
    too_long: bool = False
    """Left out by `truncation: drop`, and nothing else is wrong with it."""


class Record(NamedTuple):
    """A row as it was read."""

    where: str
    columns: dict[str, Any]


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
    if not path.parent.is_dir():
        raise ConfigError(f"no such file: {path} (there is no folder {path.parent})")
    if not path.exists():
        raise ConfigError(f"no such file: {path}{suggest(path.name, [child.name for child in path.parent.iterdir()])}")
    if path.suffix.lower() not in FILES:
        raise ConfigError(f"{path}: cannot read {path.suffix or 'a file without extension'}; supported are {', '.join(FILES)}")


def local_files(spec: str) -> list[Path]:
    """The file that `spec` names, or those of the folder and the folders in it, sorted; none where it is not on this machine's disk.

    Raises ConfigError for a file that is missing or cannot be read, for a folder without any that can, and for one where it
    is not plain that all of them are meant: text files beside rows, a training split beside a test split.
    """
    path = local_file(spec)
    if path is None:
        return []
    if not path.is_dir():
        check_file(path)
        return [path]
    inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in FILES and file.is_file()]
    files = [file for file in inside if not any(name.startswith(".") for name in file.relative_to(path).parts)]
    listed = ", ".join(str(file.relative_to(path)) for file in files[:10])
    if not files:
        raise ConfigError(f"{path} is a folder without a file that can be read; supported are {', '.join(FILES)}")
    splits = [{found for word in re.split(r"[\W_\d]+", str(file.relative_to(path)).lower()) if (found := SPLITS.get(word))} for file in files]
    if {"train", "test"} <= set().union(*splits):
        raise ConfigError(f"{path} is a folder with rows to train on and rows to test on; name one file in it, or a folder of one kind: {listed}")
    if len({file.suffix.lower() == ".txt" for file in files}) > 1:
        raise ConfigError(f"{path} is a folder of text files and of rows; name one file in it, or a folder of one kind: {listed}")
    return files


class HubSet(NamedTuple):
    """A data set of the hub, which stays on the disk."""

    name: str
    rows: Any

    def __str__(self) -> str:
        return self.name


Piece = Path | HubSet | str  # a file, a data set of the hub, a built-in task


def pieces(spec: str, split: str) -> list[Piece]:
    """What has to be read for `spec`, in this order; `split` is the hub split where none is named. Raises ConfigError."""
    if spec.startswith("builtin:"):
        return [spec]
    return [*local_files(spec)] or [open_hub(spec, split)]


def read_rows(piece: Piece) -> Iterator[Record | BadRow]:
    """The rows of a piece; lines that are no rows come as BadRow. Raises ConfigError for what cannot be read."""
    if isinstance(piece, HubSet):
        yield from (from_columns(f"{piece.name}[{i}]", row) for i, row in enumerate(piece.rows))
    elif isinstance(piece, str):
        yield from read_builtin(piece)
    else:
        readers = {".parquet": read_parquet, ".csv": read_csv, ".json": read_json, ".jsonl": read_lines}
        try:
            yield from readers[piece.suffix.lower()](piece)
        except UnicodeDecodeError as error:
            raise ConfigError(not_utf8(piece)) from error


def not_utf8(path: Path) -> str:
    """What is wrong with a file that is not UTF-8, with the line."""
    raw = path.read_bytes()
    try:
        raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"{path}:{1 + raw.count(10, 0, error.start)}: not UTF-8 (byte 0x{raw[error.start]:02x}): save the file as UTF-8"
    return f"{path}: was written to while it was read"


def read_builtin(spec: str) -> Iterator[Record | BadRow]:
    task, _, split = spec.removeprefix("builtin:").partition("/")
    if not split:
        raise ConfigError(f"{spec!r} names no split; write {spec}/train or {spec}/test")
    try:
        rows = builtin_rows(task, split)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return (Record(f"{spec}[{i}]", row) for i, row in enumerate(rows))


def read_json(path: Path) -> Iterator[Record | BadRow]:
    """A JSON array of objects; a .json file may hold JSON lines too."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return read_array(path, text)
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # one value after another: JSON lines
            raise ConfigError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
        return read_lines(path)
    if rows:
        keys = f" with the keys {', '.join(map(repr, rows))}" if isinstance(rows, dict) else ""
        raise ConfigError(f"{path}: expected an array of rows, found {kind(rows)}{keys}")
    return iter(())


def read_array(path: Path, text: str) -> Iterator[Record | BadRow]:
    """The elements of a JSON array, one at a time, so that each can be told by the line it begins on (by its index, where all are on one)."""
    space, decode = re.compile(r"\s*"), json.JSONDecoder().raw_decode
    one_line = "\n" not in text.strip()
    at, counted, line, index = text.index("[") + 1, 0, 1, 0

    def after_space(place: int) -> int:
        found = space.match(text, place)
        return found.end() if found else place

    def wrong(message: str, place: int) -> ConfigError:
        error = json.JSONDecodeError(message, text, place)
        return ConfigError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})")

    at = after_space(at)
    closed = text[at : at + 1] == "]"
    while not closed:
        try:
            row, end = decode(text, at)
        except json.JSONDecodeError as error:
            raise wrong(error.msg, error.pos) from error
        line, counted = line + text.count("\n", counted, at), at
        yield as_record(f"{path}[{index}]" if one_line else f"{path}:{line}", row)
        index, at = index + 1, after_space(end)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            raise wrong("Expecting ',' delimiter", at)
        at = at if closed else after_space(at + 1)
    if text[at + 1 :].strip():
        raise wrong("Extra data", after_space(at + 1))


def read_lines(path: Path) -> Iterator[Record | BadRow]:
    """JSON lines, of which only one is in memory at a time."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield as_record(where, json.loads(line))
                except json.JSONDecodeError as error:
                    yield BadRow(where, f"not JSON ({error.msg}, column {error.colno})")


def read_csv(path: Path) -> Iterator[Record | BadRow]:
    """With the standard library rather than `datasets`: a cell `007` or `NA` stays the text it is, and lines have numbers."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(2**31 - 1)  # a cell may be a whole document
        reader, line = csv.DictReader(file), 2
        try:
            for row in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                whole = None not in row and None not in row.values()
                yield Record(where, row) if whole else BadRow(where, f"not the {len(reader.fieldnames or ())} cells of the header")
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.line_num}: {error}") from error


def read_parquet(path: Path) -> Iterator[Record | BadRow]:
    from datasets import load_dataset  # takes a second to import
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        if not read_metadata(path).num_rows:
            return
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as parquet ({first_line(error)}); write or download it again") from error
    try:  # streaming reads the file itself, without a copy in the cache
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for i, row in enumerate(rows):
            yield from_columns(f"{path}[{i}]", row)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as parquet ({first_line(error)})") from error


def open_hub(spec: str, split: str) -> HubSet:
    from datasets import load_dataset

    parts = re.fullmatch(HUB_ID, spec)
    assert parts is not None  # local_file() took everything else for a path
    name, subset, split = parts["name"], parts["subset"], parts["split"] or split
    try:
        rows = load_dataset(name, subset, split=split)
    except Exception as error:  # network, missing data set, missing split, gated: each library below has its own errors
        raise HubError(f"{spec!r} is no local file, and reading split {split!r} of the data set {name!r} from the hub failed: {first_line(error)}") from error
    return HubSet(f"{name}/{subset}:{split}" if subset else f"{name}:{split}", rows)


def from_columns(where: str, row: Any) -> Record:
    """A row of a columnar source. Arrow gives every struct the keys of all rows: a tool's arguments would hold those of all other tools, as nulls."""

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: own(inner) for key, inner in value.items() if inner is not None}
        return [own(inner) for inner in value] if isinstance(value, list) else value

    def cell(value: Any) -> Any:  # the keys of a turn stay, as `content: null` beside a call
        if isinstance(value, dict):
            return {key: own(inner) for key, inner in value.items()}
        return [cell(inner) for inner in value] if isinstance(value, list) else value

    return Record(where, {name: cell(value) for name, value in row.items()})


def as_record(where: str, row: Any) -> Record | BadRow:
    return Record(where, row) if isinstance(row, dict) else BadRow(where, f"expected an object with columns, found {kind(row)}")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
