"""Mean loss per supervised token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

Batch = dict[str, Any]


@torch.no_grad()
def mean_loss(loss: nn.Module, batches: Iterable[Batch], progress: Callable[[int], None] | None = None) -> float:
    """Cross-entropy in nats per supervised token over all batches; `loss` maps a batch to (sum, tokens).

    Sums are divided once at the end, so that the number does not depend on how rows fall into batches.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        part, count = loss(**batch)
        total, tokens = total + part.item(), tokens + int(count)
        if progress:
            progress(len(batch["labels"]))
    if tokens == 0:
        raise ValueError("the evaluation set has no supervised token")
    return total / tokens


def in_batches(items: Sequence, size: int) -> Iterable[Sequence]:
    """Slices of `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))
