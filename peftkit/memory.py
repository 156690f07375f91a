"""Memory: the peak of a run, what autograd keeps for backward, and what oneDNN keeps."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Has a GPU's peak counted anew; that of a process cannot be."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def keep_few_kernels() -> None:
    """Has oneDNN keep 128 compiled kernels instead of 1,024, unless its variable is set or it has begun.

    Batches of many shapes fill its cache with kernels that are hardly met again, and which take more memory than a small
    model's tensors. To compile some of them again costs 1% of a step.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


@contextmanager
def count_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collects what autograd keeps for backward within the block: address of the storage -> bytes. The model's own tensors are left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []  # a storage that was freed could lend its address to another

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        yield kept
