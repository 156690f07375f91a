"""What a model sees that reads the weight of an adapter layer instead of calling the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def address(tensor: Tensor) -> int:
    """Where the data of a tensor lies; 0 where it has none, as in a forecast."""
    return 0 if isinstance(tensor.detach(), FakeTensor) else tensor.data_ptr()


class AdaptedWeight(Tensor):
    """The weight of an adapter layer to the model around it: W to whoever asks for its shape, dtype or device, W + s B A in any arithmetic.

    Some modules multiply with the weight of a linear themselves: WavLM's attention, Mamba's time steps, Bloom's sliced
    products, DeBERTa's packed projection, DETR's masks, and torch's fused encoder layer in evaluation. They would pass the
    adapter by in silence. With this they compute what the merged model computes, and gradients reach the adapter; only
    dropout, which acts on an input that is not seen here, does not apply.

    Raises RuntimeError where it is written to: the frozen weight is that of `base_layer`.
    """

    frozen: Tensor
    adapted: Callable[[], Tensor]

    @staticmethod
    def of(frozen: Tensor, adapted: Callable[[], Tensor]) -> Tensor:
        """`frozen` answers the questions, `adapted()` is what any arithmetic is done with."""
        if isinstance(frozen.detach(), FakeTensor):  # it has no data, and cannot become another class
            return adapted()
        weight = frozen.detach().as_subclass(AdaptedWeight)
        weight.frozen, weight.adapted = frozen, adapted
        if torch.is_grad_enabled() and weight.is_floating_point():
            with torch._C.DisableTorchFunctionSubclass():
                weight.requires_grad_().register_hook(_refuse_gradient)
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS:
            return super().__torch_function__(func, types, args, kwargs)
        name = func.__name__
        if name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__")):
            raise RuntimeError(f"{name} would write to the weight of an adapter layer; write to that of its base_layer, and merge or detach before")
        if func == _DATA:
            adapted = args[0].adapted
            return cls.of(args[0].frozen, lambda: adapted().detach())
        return func(*_plain(args), **_plain(kwargs or {}))


def _refuse_gradient(grad: Tensor) -> None:
    """A gradient comes here from an autograd function of somebody's own alone: arithmetic that torch sees is done with the adapted weight."""
    raise RuntimeError(
        "an autograd function took the weight of an adapter layer: its kernels may read the frozen weight alone, and its gradient reaches no adapter; "
        "leave that layer out (exclude_modules), or have the function take layer.base_layer.weight and the adapter's parameters"
    )


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_QUESTIONS = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "is_cuda", "is_meta", "is_sparse", "is_quantized")
        + ("requires_grad", "is_leaf", "grad", "grad_fn", "_version")
    ),
    *(
        getattr(Tensor, name)
        for name in ("size", "stride", "dim", "numel", "nelement", "ndimension", "element_size", "get_device", "data_ptr", "is_contiguous")
        + ("is_floating_point", "is_complex", "is_inference", "__len__", "__hash__")
    ),
    torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


def _plain(value: Any) -> Any:
    """`value` with every such weight in it, at any depth of lists, tuples and dicts, as the plain tensor it stands for."""
    if isinstance(value, AdaptedWeight):
        return value.adapted()
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
