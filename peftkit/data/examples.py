"""Examples: rows ready for training, in Arrow's compact columns, in memory or mapped from a file."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Example:
    """A row ready for training."""

    input_ids: list[int]
    trained: list[bool]
    """Token i is supervised: the model learns to write it. False for the first, which nothing precedes."""

    where: str
    prompt_ids: list[int] = field(default_factory=list)
    """What generation starts from: all before the last assistant turn and the generation prompt. Empty for text."""

    answer: str = ""
    """The last assistant turn as text, stripped: the reference for generated answers. Empty for text."""

    rejected: Example | None = None
    """Of a preference pair: the same prompt with the answer that was rejected."""


IDS, MARKS = pa.list_(pa.int32()), pa.list_(pa.bool_())
COLUMNS: dict[str, Any] = {
    "input_ids": IDS,
    "trained": MARKS,
    "where": pa.string(),
    "prompt_ids": IDS,
    "answer": pa.string(),
    "rejected_ids": IDS,
    "rejected_trained": MARKS,
    "rejected_answer": pa.string(),
    "supervised": pa.int32(),
}
SCHEMA = pa.schema(list(COLUMNS.items()))


def to_arrow(examples: Sequence[Example]) -> Any:
    """A record batch of these examples."""
    rejected = [example.rejected for example in examples]
    columns = {
        "input_ids": _lists([example.input_ids for example in examples], np.int32),
        "trained": _lists([example.trained for example in examples], np.bool_),
        "where": [example.where for example in examples],
        "prompt_ids": _lists([example.prompt_ids for example in examples], np.int32),
        "answer": [example.answer for example in examples],
        "rejected_ids": [other and other.input_ids for other in rejected],
        "rejected_trained": [other and other.trained for other in rejected],
        "rejected_answer": [other and other.answer for other in rejected],
        "supervised": [example.trained.count(True) for example in examples],
    }
    arrays = [values if isinstance(values, pa.Array) else pa.array(values, COLUMNS[name]) for name, values in columns.items()]
    return pa.record_batch(arrays, schema=SCHEMA)


def _lists(values: list[list[Any]], kind: Any) -> Any:
    """An Arrow array of lists, through numpy: many times faster than by Arrow, which looks at the type of every element."""
    starts = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=starts[1:])
    flat = np.fromiter(chain.from_iterable(values), kind, int(starts[-1]))
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(flat))


class Examples(Sequence[Example]):
    """The examples of a table, or some of them in any order; each is built when it is asked for."""

    def __init__(self, table: Any, picks: Any = None):
        self.table = table
        self.picks = np.arange(table.num_rows) if picks is None else np.asarray(picks, dtype=np.int64)

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        return cls(pa.Table.from_batches([to_arrow(examples)], SCHEMA))

    @classmethod
    def joined(cls, parts: Iterable[Examples]) -> Examples:
        """The parts one after another; nothing is copied."""
        parts = list(parts)
        starts = np.cumsum([0, *(part.table.num_rows for part in parts)])
        table = pa.concat_tables([part.table for part in parts])
        return cls(table, np.concatenate([start + part.picks for start, part in zip(starts[:-1], parts, strict=True)]))

    def __len__(self) -> int:
        return len(self.picks)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self.table, self.picks[index])
        row = int(self.picks[index])
        ids = self._list("rejected_ids", row)
        rejected = Example(ids, self._list("rejected_trained", row), self._text("where", row), [], self._text("rejected_answer", row)) if ids else None
        return Example(
            self._list("input_ids", row), self._list("trained", row), self._text("where", row),
            self._list("prompt_ids", row), self._text("answer", row), rejected,
        )  # fmt: skip

    def _list(self, column: str, row: int) -> list[Any]:
        cell = self.table.column(column)[row]
        # Through numpy: element by element, Arrow makes Python numbers much more slowly.
        return cell.values.to_numpy(zero_copy_only=False).tolist() if cell.is_valid else []

    def _text(self, column: str, row: int) -> str:
        return str(self.table.column(column)[row].as_py() or "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> Any:
        """(examples,) tokens of each."""
        return pc.list_value_length(self.table.column("input_ids")).to_numpy().astype(np.int64)[self.picks]

    @property
    def checksum(self) -> int:
        """Of how many tokens each has, and how many of them are supervised: tells other data from the same, without reading every token."""
        return zlib.crc32(self.supervised.tobytes(), zlib.crc32(self.lengths.tobytes()))

    @property
    def supervised(self) -> Any:
        """(examples,) supervised tokens of each."""
        return self.table.column("supervised").to_numpy().astype(np.int64)[self.picks]


class Rows(Sequence[list[Example]]):
    """What a batch is made of: rows of one example each, or of those that were packed together (lists of indices)."""

    def __init__(self, examples: Sequence[Example], bins: Sequence[Sequence[int]] | None = None):
        self.examples, self.bins = examples, bins

    def __len__(self) -> int:
        return len(self.examples) if self.bins is None else len(self.bins)

    @overload
    def __getitem__(self, index: int) -> list[Example]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Example]]: ...
    def __getitem__(self, index: int | slice) -> list[Example] | list[list[Example]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return [self.examples[index]] if self.bins is None else [self.examples[i] for i in self.bins[index]]

    def summed(self, by_example: Any) -> Any:
        """(rows,) the sum over each row's examples of a number (examples,) that each example has."""
        if self.bins is None or not len(self.bins):
            return by_example
        counts = self.documents
        return np.add.reduceat(by_example[np.fromiter((i for row in self.bins for i in row), np.int64, counts.sum())], np.cumsum(counts) - counts)

    @property
    def documents(self) -> Any:
        """(rows,) how many examples each is made of."""
        return np.ones(len(self.examples), np.int64) if self.bins is None else np.fromiter(map(len, self.bins), np.int64, len(self.bins))
