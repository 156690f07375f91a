"""The frozen modules under adapter layers, seen alike whether plain, transposed or quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkit import quant


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear that is called as one, of a weight that can be read.

    nn.MultiheadAttention reads the weight of its output projection and never calls the module: an adapter there would be
    passed by in silence. Weights below 16 bits (FP8) have their scales elsewhere, unless they are bitsandbytes'; weights that
    are computed anew for each call (weight norm, spectral norm) are no parameters.
    """
    if not isinstance(module, (nn.Linear, Conv1D)) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if not isinstance(module._parameters.get("weight"), Tensor) or is_router(module):
        return False
    return module.weight.dtype.itemsize > 1 or quant.is_quantized(module)


def is_router(module: nn.Module) -> bool:
    """Whether the module is a linear by inheritance whose call gives more than a product: the routers of Llama 4 and Phi-3.5-MoE give what they chose, too."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward and type(module).__name__.endswith("Router")


_FORWARDS = (nn.Linear.forward, Conv1D.forward)


def is_bare(module: Any) -> bool:
    """Whether a call of this linear is x W^T + b and nothing else: no hooks and no forward of its own, by its class or put on it (accelerate's offloading)."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__:
        return False
    return type(module).forward in _FORWARDS or quant.is_quantized(module)


def features(module: Any) -> tuple[int, int]:
    """(in, out) of a linear."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def dense_weight(module: Any, dtype: torch.dtype | None = None) -> Tensor:
    """W (out, in) of a linear: a view of a plain weight, a new tensor for a quantised one."""
    if quant.is_quantized(module):
        return quant.dequantize(module, dtype)
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return weight if dtype is None else weight.to(dtype)


def weight_reader(module: Any) -> Callable[[torch.dtype], Tensor]:
    """Gives W (out, in) of a linear in any dtype, later too: a plain weight is remembered, since the module may hold another by then."""
    if quant.is_quantized(module):
        return lambda dtype: quant.dequantize(module, dtype)
    weight = dense_weight(module)
    return lambda dtype: weight if weight.dtype == dtype else weight.to(dtype)


def as_stored(module: Any, weight: Tensor) -> Tensor:
    """A weight (out, in) the way round in which the module stores it."""
    return weight.T if isinstance(module, Conv1D) else weight


def plain_linear(module: Any, weight: Tensor) -> nn.Module:
    """The plain module with this weight (out, in) and the bias of `module`: itself with a new weight, an nn.Linear for a quantised one."""
    if not quant.is_quantized(module):
        module.weight = nn.Parameter(as_stored(module, weight).contiguous(), requires_grad=False)
        return module
    if issubclass(getattr(module, "source_cls", None) or nn.Linear, Conv1D):  # GPT-2's, which transformers quantises as linears
        with torch.device("meta"):
            turned = Conv1D(*weight.shape)
        turned.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
        turned.bias = nn.Parameter(module.bias.detach().to(weight.dtype), requires_grad=False)
        return turned.train(module.training)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(weight.dtype), requires_grad=False)
    return plain.train(module.training)


def compute_dtype(module: Any, x: Tensor) -> torch.dtype:
    """The dtype in which this linear multiplies `x`: autocast's, a 4-bit layer's own, or that of the input."""
    if x.dtype == torch.float64:
        return x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if quant.is_4bit(module) and module.compute_dtype is not None:
        return module.compute_dtype
    return x.dtype


def row_squares(weight: Tensor) -> Tensor:
    """|W|^2 of every row of W (out, in), fp64 (out,)."""
    return weight.detach().double().square().sum(1)
