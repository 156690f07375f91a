"""Packs examples into bins of `max_length` tokens and turns bins into batches in which no example sees another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

from peftkit.data.config import DataConfig
from peftkit.data.examples import Example, Examples, Rows

IGNORED = -100  # the label that the loss leaves out
SHAPES = 8  # widths of batches between n and 2n tokens: every other shape costs a kernel and, on a CPU, a place of its own in memory


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Bins of at most `max_length` tokens, as `best_fit` finds them. Raises ValueError for an example that is longer."""
    return list(Rows(examples, best_fit([len(example.input_ids) for example in examples], max_length, lambda i: examples[i].where)))


def make_rows(examples: Examples, config: DataConfig) -> Rows:
    """What batches are made of: packed rows where the config says so, else each example for itself."""
    bins = best_fit(examples.lengths, config.max_length, lambda i: examples[i].where) if config.packing else None
    return Rows(examples, bins)


def best_fit(lengths: Sequence[int], max_length: int, where: Callable[[int], str]) -> list[list[int]]:
    """Bins of indices by best-fit decreasing: the longest first, each where the least space is left.

    The order of the data stays: indices within a bin, and bins by their first. Raises ValueError, naming the example by
    `where`, for one longer than `max_length`.
    """
    bins: list[list[int]] = []
    free: list[list[int]] = [[] for _ in range(max_length + 1)]  # heaps of the bins with that much space
    open_spaces = 0  # bit n is set where free[n] is not empty: the least sufficient space is found without a search
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = int(lengths[index])
        if length > max_length:
            raise ValueError(f"{where(index)} has {length} tokens and cannot be packed into {max_length}")
        fitting = open_spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            number = heappop(free[space])
            open_spaces ^= 0 if free[space] else 1 << space
        else:
            space, number = max_length, len(bins)
            bins.append([])
        bins[number].append(index)
        heappush(free[space - length], number)
        open_spaces |= 1 << (space - length)
    return sorted(sorted(members) for members in bins)


def batch_width(tokens: int, rows: int, packed: bool) -> int:
    """How wide a batch becomes whose longest row has so many tokens. One row by itself stays as it is: without padding it needs no mask."""
    grain = max(2 ** (tokens.bit_length() - 1) // SHAPES, SHAPES)
    return -(-tokens // grain) * grain if rows > 1 or packed else tokens


def collate(bins: Sequence[Sequence[Example]], pad_token_id: int, widths: bool = False) -> dict[str, Any]:
    """One row per bin, padded on the right to the longest, or with `widths` to the `batch_width` that it asks for.

    - `input_ids` (rows, length)
    - `labels` (rows, length): -100 where not trained, and at the first token of every document, which the token before
      it (another document's last) must not predict. Not shifted: the model predicts label i from position i - 1.
    - `position_ids` (rows, length): from 0 in every document; padding counts as a document of its own.
    - `attention_mask` (rows, length), only where no bin holds more than one document. Where it is absent, transformers
      keeps documents apart by the restarts of `position_ids`, but not where it builds a key-value cache, so that
      **the model must be called with `use_cache=False`**.
    - `document_lengths`: the real tokens of each document in each row, as lists.

    Raises ValueError for an empty batch.
    """
    import torch

    if not bins:
        raise ValueError("a batch needs at least one bin")
    lengths = [[len(example.input_ids) for example in row] for row in bins]
    longest = max(map(sum, lengths))
    width = batch_width(longest, len(bins), any(len(row) > 1 for row in bins)) if widths else longest
    input_ids = torch.full((len(bins), width), pad_token_id)
    labels = torch.full((len(bins), width), IGNORED)
    position_ids = torch.zeros(len(bins), width, dtype=torch.long)
    attention_mask = torch.zeros(len(bins), width, dtype=torch.long)
    for i, row in enumerate(bins):
        start = 0
        for example in row:
            end = start + len(example.input_ids)
            ids, trained = torch.tensor(example.input_ids), torch.tensor(example.trained)
            input_ids[i, start:end] = ids
            labels[i, start:end] = torch.where(trained, ids, IGNORED)
            labels[i, start] = IGNORED
            position_ids[i, start:end] = torch.arange(end - start)
            start = end
        position_ids[i, start:] = torch.arange(width - start)
        attention_mask[i, :start] = 1
    batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "document_lengths": lengths}
    if all(len(row) == 1 for row in bins):
        batch["attention_mask"] = attention_mask
    return batch
