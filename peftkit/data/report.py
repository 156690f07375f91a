"""DataReport: what became of the rows of a source, for people and for scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peftkit.data.read import BadRow

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
    """Tokens of all examples, those mixed in included; `supervised_tokens` and `lengths` likewise."""

    supervised_tokens: int = 0
    lengths: Any = field(default_factory=lambda: np.empty(0, np.int64))
    """(examples,) tokens of each, in order."""

    notes: list[str] = field(default_factory=list)
    parts: list[DataReport] = field(default_factory=list)
    """The sources mixed in."""

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.lengths.max(initial=0))

    def lines(self) -> list[str]:
        """The report for people, line by line."""
        if not self.rows:
            return [f"{self.source}: no rows"]
        share = self.supervised_tokens / self.tokens if self.tokens else 0.0
        median, most = np.quantile(self.lengths, [0.5, 0.95]) if len(self.lengths) else (0, 0)
        lines = [
            f"{self.source}: {self.format}, {self.kept} of {self.rows} rows kept",
            f"  {self.tokens} tokens{', all sources together,' if self.parts else ','} {self.supervised_tokens} of them supervised ({share:.0%})",
            f"  row lengths: median {median:.0f}, 95% up to {most:.0f}, longest {self.longest} tokens",
        ]
        if self.truncated:
            lines.append(f"  {self.truncated} rows longer than max_length were cut at the right")
        if self.dropped:
            too_long = sum(row.too_long for row in self.dropped)
            lines.append(f"  {len(self.dropped)} rows left out ({too_long} longer than max_length):")
            lines += [f"    {line}" for line in bad_lines(self.dropped)]
        lines += [f"  {note}" for note in self.notes]
        return lines + [f"  {line}" for part in self.parts for line in part.lines()]


def bad_lines(rows: list[BadRow]) -> list[str]:
    """The first rows with their reasons, and how many more there are."""
    more = [f"... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return [f"{row.where}: {row.reason}" for row in rows[:SHOWN]] + more
