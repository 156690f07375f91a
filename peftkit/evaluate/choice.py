"""Multiple choice by log-likelihood: the answer that the model finds likeliest, without generating."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch

from peftkit.evaluate.loss import Batch, in_batches

ChoiceLength = Literal["total", "token", "character"]


class Candidate(Protocol):
    """One choice after its prompt: token ids, of which the choice's own are trained, and its text."""

    @property
    def input_ids(self) -> list[int]: ...

    @property
    def trained(self) -> list[bool]: ...

    @property
    def answer(self) -> str: ...


class ChoiceRow(NamedTuple):
    """A question with its choices, of which the one at `correct` is right."""

    where: str
    candidates: Sequence[Candidate]
    correct: int


class Picked(NamedTuple):
    """What was picked beside what is right, and the scores of all choices."""

    prediction: str
    answer: str
    scores: list[float]

    @property
    def correct(self) -> bool:
        return self.prediction == self.answer


@torch.no_grad()
def pick(
    loss: Any, rows: Sequence[ChoiceRow], to_batch: Callable[[Sequence], Batch], batch_size: int, length: ChoiceLength = "total",
    progress: Callable[[int], None] | None = None,
) -> list[Picked]:  # fmt: skip
    """The likeliest choice of each row, in their order.

    A choice scores log p(choice and its end | prompt), in nats, over its tokens or characters where `length` says so: the
    total favours short choices. Candidates of like length share a batch. `loss.by_row` maps a batch to (sums, tokens).
    """
    flat = [(len(candidate.input_ids), i, j) for i, row in enumerate(rows) for j, candidate in enumerate(row.candidates)]
    scores = [[0.0] * len(row.candidates) for row in rows]
    left = [len(row.candidates) for row in rows]
    for part in in_batches(sorted(flat), batch_size):
        batch = to_batch([rows[i].candidates[j] for _, i, j in part])
        sums, tokens = loss.by_row(**batch)
        for (_, i, j), total, count in zip(part, sums.tolist(), tokens.tolist(), strict=True):
            if not math.isfinite(total):
                raise ValueError(f"{rows[i].where}: the log-likelihood of choice {j + 1} is {-total}: the model's logits are not finite")
            size = {"total": 1, "token": count, "character": max(len(rows[i].candidates[j].answer), 1)}[length]
            scores[i][j] = -total / size
            left[i] -= 1
            if progress and not left[i]:
                progress(1)
    return [
        Picked(row.candidates[max(range(len(found)), key=found.__getitem__)].answer, row.candidates[row.correct].answer, found)
        for row, found in zip(rows, scores, strict=True)
    ]
