"""Counts the memory of a computation without doing it: tensors have shapes and no data, and every storage is counted while it lives.

What runs under `Trace` is the real code of the model, the adapters and the loss, so that nothing is known here of architectures.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftkit.kernels.lowrank import forget_constants

aten = torch.ops.aten
FAR = 2**31 - 1  # the value of integers that code asks for: the end of every slice


class Trace:
    """Within `with trace.running():` tensors have no data; `live` and `peak` count the bytes of those made there.

    Code that asks for the value of a tensor is told True, 1.0 or a very large integer. A mask that picks elements picks `chosen`
    of them, experts get even shares of the rows, and `documents` is what counting the documents of a row gives. `packed` maps
    weights to the bytes that an operation needs for a dequantised copy. `exact_head` answers whether two tensors are alike,
    which is what the loss asks of the output head.
    """

    def __init__(self, exact_head: bool):
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.chosen = self.documents = 1
        self.exact_head = exact_head
        self.live = self.peak = 0
        self.packed: dict[int, int] = {}
        self.counted: dict[int, tuple[int, int]] = {}
        self.active: dict[int, weakref.ref] = {}

    @contextmanager
    def running(self) -> Iterator[Trace]:
        try:
            with self.fake, _Answers(self), _Counter(self):
                yield self
        finally:
            forget_constants()

    def dequantised(self, weight: Tensor, needed: int) -> None:
        """Declares a weight that every operation on it must dequantise first, into `needed` bytes."""
        self.packed[weight.untyped_storage()._cdata] = needed

    def value(self, tensor: Tensor) -> Any:
        """What code is told that asks for the value of an element."""
        if (counted := self.counted.get(tensor.untyped_storage()._cdata)) is not None:
            total, places = counted
            return total // places + (tensor.storage_offset() < total % places)
        return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else FAR

    def restart_peak(self) -> None:
        self.peak = self.live

    def note(self, tensors: list[Tensor], borrowed: int) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.active:
                self.live += size
                self.active[key] = weakref.ref(storage, partial(self._gone, key, size))
        self.peak = max(self.peak, self.live + borrowed)

    def _gone(self, key: int, size: int, _: weakref.ref) -> None:
        self.live -= size
        self.active.pop(key, None)


class _Answers(TorchFunctionMode):
    """What Python code asks of tensors and only data could tell."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function is Tensor.data_ptr:
            return 0
        if function is torch.nn.functional.one_hot and len(args) == 1 and not kwargs:
            args = (*args, self.trace.documents)
        return function(*args, **(kwargs or {}))


class _Counter(TorchDispatchMode):
    """Sees every operation of torch, forward and backward."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        trace = self.trace
        if function is aten._local_scalar_dense.default:
            return trace.value(args[0])
        if function is aten.allclose.default:
            with self:
                torch.isclose(*args, **kwargs)
            return trace.exact_head
        if function is aten.equal.default:
            return True
        if function in _INDEXING:
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        if function is aten.nonzero.default:
            out = args[0].new_zeros((min(trace.chosen, args[0].numel()), args[0].ndim), dtype=torch.long)
        elif function is aten.bincount.default:  # how many rows the router gives to each expert
            out = args[0].new_zeros(args[2] if len(args) > 2 else kwargs.get("minlength", 0))
            trace.counted[out.untyped_storage()._cdata] = (args[0].numel(), out.numel())
        else:
            out = function(*args, **kwargs)
        borrowed = sum(trace.packed.get(leaf.untyped_storage()._cdata, 0) for leaf in args if isinstance(leaf, Tensor)) if trace.packed else 0
        trace.note([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)], 0 if _is_view(function) else borrowed)
        return out

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """An index as positions; a mask becomes one index for each of its dimensions."""
        if index is None or index.dtype != torch.bool:
            return [index]
        return [index.new_zeros(min(self.trace.chosen, index.numel()), dtype=torch.long)] * index.ndim


_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


def _is_view(function: Any) -> bool:
    """Whether an operation reads no element of what it is given."""
    return any(result.alias_info is not None and not result.alias_info.is_write for result in function._schema.returns)
