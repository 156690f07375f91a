"""The data stage: read rows, normalise them, render them with the chat template, mask, truncate, pack, collate.

`load_examples` is the way from a config to examples; `pack` and `collate` make batches of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import quantiles
from typing import TYPE_CHECKING, Literal

from peftkit.config import ConfigError
from peftkit.data.pack import collate, pack
from peftkit.data.read import FORMATS, BadRow, DataConfig, HubError, check_file, find_format, local_file, normalise, not_utf8, read_rows
from peftkit.data.render import Example, Renderer, colour_row, marked_row, render, render_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FORMATS",
    "BadRow",
    "DataConfig",
    "DataReport",
    "Example",
    "HubError",
    "bad_lines",
    "collate",
    "colour_row",
    "load_examples",
    "local_file",
    "marked_row",
    "pack",
    "render",
]

SHOWN = 10  # bad rows listed one by one; the others are counted


@dataclass
class DataReport:
    """What became of the rows of one source."""

    source: str
    format: str = "none"
    rows: int = 0
    kept: int = 0
    dropped: list[BadRow] = field(default_factory=list)
    truncated: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of each kept row, in order."""

    notes: list[str] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest kept row."""
        return max(self.lengths, default=0)

    def lines(self) -> list[str]:
        """The report for people, line by line."""
        if not self.rows:
            return [f"{self.source}: no rows"]
        share = self.supervised_tokens / self.tokens if self.tokens else 0.0
        cuts = quantiles(self.lengths, n=20, method="inclusive") if len(self.lengths) > 1 else [self.longest] * 19
        lines = [
            f"{self.source}: {self.format}, {self.kept} of {self.rows} rows kept",
            f"  {self.tokens} tokens, {self.supervised_tokens} of them supervised ({share:.0%})",
            f"  row lengths: median {cuts[9]:.0f}, 95% up to {cuts[18]:.0f}, longest {self.longest} tokens",
        ]
        if self.truncated:
            lines.append(f"  {self.truncated} rows longer than max_length were cut at the right")
        if self.dropped:
            too_long = sum(row.too_long for row in self.dropped)
            lines.append(f"  {len(self.dropped)} rows left out ({too_long} longer than max_length):")
            lines += [f"    {line}" for line in bad_lines(self.dropped)]
        return lines + [f"  {note}" for note in self.notes]


def load_examples(config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: Literal["train", "eval"]) -> tuple[list[Example], DataReport]:
    """The examples of one split, in the order of the data, and the report on them.

    No examples for `eval` where the config names neither `eval` nor `holdout`. Raises ConfigError for a source that is
    missing, unreadable, empty or of no known format, for chats without a chat template, where no row is left, and, with
    `on_bad_row: error`, where any row cannot be used.
    """
    held = split == "eval" and not config.eval
    if held and not config.holdout:
        return [], DataReport("no evaluation data")
    source = config.eval if split == "eval" and config.eval else config.train
    limit = config.train_rows if split == "train" else config.eval_rows
    report = DataReport(f"{source} ({'last' if held else 'first'} part)" if config.holdout else source)

    path = local_file(source)
    if path is not None and path.suffix.lower() == ".txt":
        check_file(path)
        refuse_for_text(config, source)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(not_utf8(path)) from error
        examples = render_text(text, source, tokenizer, config.max_length, config.holdout, held)[:limit]
        report.format, report.rows = f"blocks of {config.max_length} tokens", len(examples)
    else:
        records = read_rows(source, "train" if split == "train" or held else "test")
        if config.holdout:
            cut = len(records) - max(1, round(len(records) * config.holdout))
            records = records[cut:] if held else records[:cut]
        records = records[:limit]
        report.rows, report.format = len(records), find_format(records, config, source) if records else "none"
        if report.format == "text":
            refuse_for_text(config, source)
        renderer = Renderer(tokenizer, config)
        results = renderer([normalise(record, report.format, config) for record in records])
        examples = [result for result in results if isinstance(result, Example)]
        report.dropped = [result for result in results if isinstance(result, BadRow)]
        report.truncated, report.notes = renderer.truncated, renderer.notes()

    bad = [row for row in report.dropped if not row.too_long]
    if bad and config.on_bad_row == "error":
        listed = "\n".join(f"  {line}" for line in bad_lines(bad))
        raise ConfigError(f"{source}: {len(bad)} of {report.rows} rows cannot be used (data.on_bad_row: skip leaves them out):\n{listed}")
    if not examples:
        listed = "".join(f"\n  {line}" for line in bad_lines(report.dropped))
        listed += "\n  raise data.max_length, or cut rows: data.truncation: right" * all(row.too_long for row in report.dropped)
        raise ConfigError(f"{report.source}: " + (f"none of the {report.rows} rows is left:{listed}" if report.rows else "there are no rows"))
    if limit is not None and report.rows < limit:
        report.notes.append(f"data.{split}_rows asks for {limit} rows, there are {report.rows}")
    report.kept, report.lengths = len(examples), [len(example.input_ids) for example in examples]
    report.tokens, report.supervised_tokens = sum(report.lengths), sum(sum(example.trained) for example in examples)
    return examples, report


def refuse_for_text(config: DataConfig, source: str) -> None:
    """Raises ConfigError for what plain text has no place for, rather than leaving it unused."""
    if config.system:
        raise ConfigError(f"{source}: data.system has no place in plain text; leave it out")
    if config.columns and source.lower().endswith(".txt"):
        raise ConfigError(f"{source}: a .txt file has no columns; leave data.columns out")


def bad_lines(rows: list[BadRow]) -> list[str]:
    """The first rows with their reasons, and how many more there are."""
    more = [f"... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return [f"{row.where}: {row.reason}" for row in rows[:SHOWN]] + more
