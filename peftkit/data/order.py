"""Which rows make step k: a function of seed, epoch and lengths alone, so that a resumed run needs no replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

GROUP = 50  # batches among which rows of similar length are brought together: enough to match well, few enough to stay random


class DataOrder:
    """The rows are shuffled anew each epoch, from the seed alone; any step can be asked for.

    With `lengths` (tokens of each row), the rows of a batch are of similar length, longest first, and the batches come
    in random order. A batch in which one epoch ends and the next begins takes what is left of the one, and any of the other.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None):
        if rows < 1 or (lengths is not None and len(lengths) != rows):
            raise ValueError(f"an order needs rows, and a length for each: {rows} rows, {'no' if lengths is None else len(lengths)} lengths")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)  # not a list: there may be millions of rows

    def __getitem__(self, step: int) -> list[int]:
        return [self._at(step * self.batch_size + i) for i in range(self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.rows)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._order_of(epoch)
        return int(self._permutation[place])

    def _order_of(self, epoch: int) -> Any:
        """(rows,) all rows in the order of this epoch."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(self.rows, generator=generator).numpy()
        if self.lengths is None:
            return shuffled
        lengths, size = self.lengths, self.batch_size
        head = -epoch * self.rows % size  # what completes the batch that the epoch before began
        first, rest = shuffled[:head], shuffled[head:]
        whole = len(rest) // size * size
        groups = [rest[start : min(start + GROUP * size, whole)] for start in range(0, whole, GROUP * size)]
        by_length = [group[np.argsort(-lengths[group], kind="stable")] for group in groups]
        batches = np.concatenate([first[:0], *by_length]).reshape(-1, size)
        turns = torch.randperm(len(batches), generator=generator).numpy()
        return np.concatenate([first, batches[turns].reshape(-1), rest[whole:]])
