"""Memory that was used: the peak of a run, and what autograd keeps for backward."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed() -> None:
    """Gives the memory that glibc keeps of freed tensors back to the system; does nothing where there is no glibc, or a GPU holds the tensors.

    Freed memory that lies below other memory stays resident, and what comes next does not always fit into the gaps: over the steps of a run with batches of
    changing size resident memory grows to about twice what tensors ever need at one time.
    """
    if not torch.cuda.is_available() and (trim := _trim()) is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    """glibc's malloc_trim; None elsewhere."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


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
