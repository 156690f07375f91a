"""From a config to examples: read, render, truncate, mix, and report; tokenised once and kept where they are many."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from peftkit.config import ConfigError
from peftkit.data.cache import DamagedCacheError, Store, cache_folder, content_hash, load
from peftkit.data.config import DataConfig
from peftkit.data.examples import Example, Examples, to_arrow
from peftkit.data.formats import find_format, normalise
from peftkit.data.pairs import PairRenderer
from peftkit.data.read import BadRow, Piece, Record, not_utf8, pieces, read_rows
from peftkit.data.render import CHUNK, Renderer, render_text
from peftkit.data.report import DataReport, bad_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERING = [Path(__file__).parent / name for name in ("read.py", "formats.py", "render.py", "encode.py", "load.py", "examples.py", "pairs.py")]
SMALL = 2**20  # bytes of files; the rows of less are tokenised in about a second


def load_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: Literal["train", "eval"], encoder_decoder: bool = False
) -> tuple[Examples, DataReport]:
    """The examples of one split, in the order of the data, and the report on them; for `train`, then those mixed in.

    encoder_decoder: the prompt is for an encoder, and the answer for a decoder (see `pairs.py`).
    No examples for `eval` where the config names neither `eval` nor `holdout`. Raises ConfigError for a source that is
    missing, unreadable, empty or of no known format, for chats without a chat template, where no row is left, and, with
    `on_bad_row: error`, where any row cannot be used.
    """
    held = split == "eval" and not config.eval
    if held and not config.holdout:
        return Examples.of([]), DataReport("no evaluation data")
    source = config.eval if split == "eval" and config.eval else config.train
    limit = config.train_rows if split == "train" else config.eval_rows
    examples, report = load_source(Source(source, config, split, held, limit, encoder_decoder=encoder_decoder), tokenizer)
    if split == "train" and config.parts:
        examples = mix(examples, report, config, tokenizer, encoder_decoder)
    report.lengths = examples.lengths
    report.tokens, report.supervised_tokens = int(report.lengths.sum()), int(examples.supervised.sum())
    return examples, report


def mix(examples: Examples, report: DataReport, config: DataConfig, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool = False) -> Examples:
    """The examples and, of every other source, as many as make up its share of the tokens.

    Which ones is drawn once, the same for every seed of the training, so that runs with different seeds see the same data.
    """
    tokens = int(examples.lengths.sum())
    total = tokens / (1 - sum(part.share for part in config.parts))
    joined = [examples]
    for number, part in enumerate(config.parts):
        alone = config.alone(part.source, columns=part.columns)
        try:
            others, own = load_source(Source(part.source, alone, "train", False, None, True, encoder_decoder), tokenizer)
        except ConfigError as error:
            key = "data.replay" if part is config.replay else f"data.mix.{number - bool(config.replay)}"
            raise type(error)(f"{key}: {error}") from error
        lengths, wanted = others.lengths, part.share * total
        picks: list[int] = []
        taken, passes, draw = 0, 0, Random(0)
        while taken < wanted:
            passes += 1
            for pick in draw.sample(range(len(others)), len(others)):
                if taken >= wanted:
                    break
                picks.append(pick)
                taken += int(lengths[pick])
        joined.append(Examples(others.table, others.picks[sorted(picks)]))
        own.lengths = joined[-1].lengths
        own.tokens, own.supervised_tokens = taken, int(joined[-1].supervised.sum())
        again = f"; all {len(others)} rows are taken {len(picks) / len(others):.1f} times" if passes > 1 else ""
        own.notes.append(f"mixed in: {len(picks)} rows of {len(others)}{again}")
        report.parts.append(own)
    everything = Examples.joined(joined)
    total = int(everything.lengths.sum())
    for part, own in zip(config.parts, report.parts, strict=True):
        own.notes.append(f"{own.tokens / total:.1%} of all tokens, {part.share:.1%} were asked for")
    return everything


# ------------------------------------------------------------------------------------------------------ one source


@dataclass(frozen=True)
class Source:
    """A source with the part of it that is wanted."""

    spec: str
    config: DataConfig
    split: Literal["train", "eval"]
    held: bool
    """Whether the held-out last rows are wanted, or the others."""
    limit: int | None
    mixed_in: bool = False
    """Beside `data.train`, which alone must have a use for every option."""
    encoder_decoder: bool = False
    """Whether rows become a prompt to read and an answer to write."""

    @property
    def name(self) -> str:
        return f"{self.spec} ({'last' if self.held else 'first'} part)" if self.config.holdout else self.spec

    @cached_property
    def pieces(self) -> list[Piece]:
        """The file or the files of a folder; else the task or hub data set. Raises ConfigError."""
        return pieces(self.spec, "train" if self.split == "train" or self.held else "test")

    @property
    def files(self) -> list[Path]:
        return [piece for piece in self.pieces if isinstance(piece, Path)]

    def records(self) -> Iterator[tuple[str, Record | BadRow]]:
        """(its piece's name, record) of every record that is wanted, read as it is asked for."""

        first, stop = 0, None
        if self.config.holdout:
            cut = max(0, self.total - max(1, round(self.total * self.config.holdout)))
            first, stop = (cut, None) if self.held else (0, cut)
        if self.limit is not None:
            stop = first + self.limit if stop is None else min(stop, first + self.limit)
        return islice(self.everything(), first, stop)

    def everything(self) -> Iterator[tuple[str, Record | BadRow]]:
        return chain.from_iterable(((str(piece), record) for record in read_rows(piece)) for piece in self.pieces)

    @cached_property
    def total(self) -> int:
        """Records of the whole source, for the sake of which it is read once more."""
        return sum(1 for _ in self.everything())


@dataclass
class Seen:
    """What was seen while rows became examples; kept in the cache beside them."""

    format: str = "none"
    rows: int = 0
    dropped: list[BadRow] = field(default_factory=list)
    truncated: int = 0
    notes: list[str] = field(default_factory=list)


def load_source(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[Examples, DataReport]:
    """The examples of one source and the report on it. Raises ConfigError as `load_examples` says."""
    config, report = source.config, DataReport(source.name)
    table, seen, notes = tokenised(source, tokenizer)
    report.format, report.rows, report.dropped, report.truncated = seen.format, seen.rows, seen.dropped, seen.truncated
    report.notes = seen.notes + notes
    bad = [row for row in report.dropped if not row.too_long]
    if bad and config.on_bad_row == "error":
        listed = "\n".join(f"  {line}" for line in bad_lines(bad))
        raise ConfigError(f"{source.spec}: {len(bad)} of {report.rows} rows cannot be used (data.on_bad_row: skip leaves them out):\n{listed}")
    if not table.num_rows:
        listed = "".join(f"\n  {line}" for line in bad_lines(report.dropped))
        listed += "\n  raise data.max_length, or cut rows: data.truncation: right" * all(row.too_long for row in report.dropped)
        raise ConfigError(f"{report.source}: " + (f"none of the {report.rows} rows is left:{listed}" if report.rows else "there are no rows"))
    if source.limit is not None and report.rows < source.limit:
        report.notes.append(f"data.{source.split}_rows asks for {source.limit} rows, there are {report.rows}")
    report.kept = table.num_rows
    return Examples(table), report


def tokenised(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Seen, list[str]]:
    """(table, what was seen, notes on the cache): from the cache where it holds them, else made."""
    before = states(source)
    if not source.config.cache or source.spec.startswith("builtin:") or (before and sum(size for size, _ in before) < SMALL):
        return *make(source, tokenizer, Store(None)), []
    notes = []
    path = cache_folder() / f"{cache_key(source, tokenizer)}.arrow"
    try:
        table, told = load(path)
        return table, Seen(**told | {"dropped": [BadRow(**row) for row in told["dropped"]]}), [f"tokenised rows are read from {path}"]
    except FileNotFoundError:
        missing = "tokenised rows are kept in"
    except (DamagedCacheError, OSError) as error:
        missing = "tokenised anew, because the rows kept could not be used"
        notes.append(f"the cache file {path} could not be used: {error}")
    store = Store(path)
    try:
        table, seen = make(source, tokenizer, store)
    except OSError as error:
        notes.append(f"tokenised rows are not kept, because {cache_folder()} cannot be written: {error}")
        return *make(source, tokenizer, Store(None)), notes
    finally:
        store.drop()
    if states(source) != before:  # written to in between: what is kept may not be what its name says
        path.unlink(missing_ok=True)
    return table, seen, [*notes, f"{missing} {path}"] if path.exists() else notes


def states(source: Source) -> list[tuple[int, int]]:
    """(bytes, time of the last change) of each file."""
    return [(path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]


def cache_key(source: Source, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that the examples depend on: rows, tokenizer, template, options, and the code that puts them together."""
    template = json.dumps(tokenizer.chat_template)  # or several, by name
    backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    options = source.config.model_dump(include={"columns", "system", "loss_on", "max_length", "truncation", "holdout"})

    def parts() -> Iterator[str]:
        yield from (path.read_text(encoding="utf-8") for path in RENDERING)
        yield from (f"{package} {version(package)}" for package in ("transformers", "tokenizers", "jinja2"))
        yield from (type(tokenizer).__name__, backend.to_str() if backend else "", json.dumps(tokenizer.special_tokens_map, default=str), template)
        if "strftime_now" in template:
            yield date.today().isoformat()
        yield json.dumps([options, source.held, source.limit, source.encoder_decoder])
        if source.files:  # rows and their lines are what the bytes of the files say; reading them as rows takes many times as long
            yield from (part for path in source.files for part in (str(path), file_hash(path)))
        else:
            for _, record in source.records():
                yield f"{record.where}\n" + (record.reason if isinstance(record, BadRow) else json.dumps(record.columns, default=as_hex))

    return content_hash(parts())


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_hex(value: Any) -> str:
    """What JSON has no form for (dates, bytes, arrays), in full."""
    return pickle.dumps(value).hex()


def make(source: Source, tokenizer: PreTrainedTokenizerBase, store: Store) -> tuple[Any, Seen]:
    """Reads and renders the source, some rows at a time, into the store."""
    seen, config = Seen(), source.config
    if is_text(source):
        if source.encoder_decoder:
            raise ConfigError(f"{source.spec}: plain text has no answer, and an encoder-decoder model reads a prompt and writes an answer; give rows of both")
        refuse_for_text(source)
        blocks = [
            example for path in source.files for example in render_text(read_text(path), str(path), tokenizer, config.max_length, config.holdout, source.held)
        ][: source.limit]
        seen.format, seen.rows = f"blocks of {config.max_length} tokens", len(blocks)
        store.add(to_arrow(blocks))
        return store.finish(asdict(seen)), seen
    renderer: Renderer | PairRenderer = (PairRenderer if source.encoder_decoder else Renderer)(tokenizer, config)
    formats = dict[str, str]()
    waiting: list[Record | BadRow] = []
    current = ""

    def flush() -> None:
        if waiting and formats.get(current, "unknown") == "unknown":
            formats[current] = find_format(waiting, config, current)
            if formats[current] == "text":
                refuse_for_text(source)
        results = renderer.chunk([normalise(record, formats[current], config) for record in waiting])
        seen.rows += len(waiting)
        seen.dropped += [result for result in results if isinstance(result, BadRow)]
        if kept := [result for result in results if isinstance(result, Example)]:
            store.add(to_arrow(kept))
        waiting.clear()

    for piece, record in source.records():
        if piece != current or len(waiting) == CHUNK:
            flush()
        current = piece
        waiting.append(record)
    flush()
    seen.format = " and ".join(dict.fromkeys(formats.values())) or "none"
    seen.truncated, seen.notes = renderer.truncated, renderer.notes()
    return store.finish(asdict(seen)), seen


def is_text(source: Source) -> bool:
    return all(isinstance(piece, Path) and piece.suffix.lower() == ".txt" for piece in source.pieces)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(not_utf8(path)) from error


def refuse_for_text(source: Source) -> None:
    """Raises ConfigError for what plain text has no place for, rather than leaving it unused."""
    if source.config.system and not source.mixed_in:
        raise ConfigError(f"{source.spec}: data.system has no place in plain text; leave it out")
    if source.config.columns and is_text(source):
        raise ConfigError(f"{source.spec}: a .txt file has no columns; leave data.columns out")
