"""The frozen experts of mixture-of-experts layers: seen alike whether stored as 3-D parameters or in 4 bits.

transformers stores the two linears of all experts of a layer as two parameters (experts, out, in), on a module that is
called with (hidden_states, top_k_index, top_k_weights) and whose class says how they lie. Those are what we know to compute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import quant
from peftkit.kernels.experts import Projection, routed_experts

Activation = Callable[[Tensor], Tensor]


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds the weights of experts as parameters of its own, in whatever layout."""
    if isinstance(module, Experts4bit):
        return True
    named = "Experts" in type(module).__name__ and any(parameter.ndim >= 3 for parameter in module.parameters(recurse=False))
    return named or _described(module)


def _described(module: nn.Module) -> bool:
    """Whether transformers says how the experts lie (`use_experts_implementation`)."""
    return {"has_gate", "has_bias", "is_transposed"} <= vars(module).keys()


def unknown(module: nn.Module) -> str | None:
    """What about these experts peftkit does not know to compute; None where it knows all."""
    if isinstance(module, Experts4bit):
        return None
    if not _described(module):
        return "transformers does not describe their layout"
    own = dict(module.named_parameters(recurse=False))
    names = _names(module)
    if not all(name in own and own[name].ndim == 3 for name in names):
        return f"{' and '.join(names)} are not both 3-D parameters"
    if not all(own[name].is_floating_point() and own[name].itemsize > 1 for name in names):
        return f"their dtype is {own[names[0]].dtype}"
    return "a norm follows each expert" if vars(module).get("has_post_expert_norm") else None  # older versions of transformers know no such norm


def parts(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters (experts, out, in) that hold the experts' linears, in the order in which they apply.

    Raises ValueError where the experts are stored or computed in a way that peftkit does not know.
    """
    if isinstance(module, Experts4bit):
        return tuple(module.shapes)
    reason = unknown(module)
    if reason is not None:
        raise ValueError(
            f"{type(module).__name__}: these experts can be neither adapted nor quantised, since {reason}; "
            "leave them as they are with exclude_modules=['experts'], or name the modules to adapt"
        )
    return _names(module)


def _names(module: Any) -> tuple[str, ...]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def stored_shape(module: Any, part: str) -> torch.Size:
    """(experts, out, in), or (experts, in, out) where the experts are stored transposed."""
    return module.shapes[part] if isinstance(module, Experts4bit) else getattr(module, part).shape


def is_transposed(module: Any) -> bool:
    """Whether weights are stored as (in, out)."""
    return (module.plain if isinstance(module, Experts4bit) else module).is_transposed


def shape(module: Any, part: str) -> tuple[int, int, int]:
    """(experts, out, in)."""
    experts, *sides = stored_shape(module, part)
    outputs, inputs = reversed(sides) if is_transposed(module) else sides
    return experts, outputs, inputs


def weight_dtype(module: Any) -> torch.dtype:
    """The dtype of the weights; in 4 bits, of those they stand for."""
    return module.dtype if isinstance(module, Experts4bit) else module.down_proj.dtype


def dense(module: Any, part: str) -> Tensor:
    """One parameter as it is stored: the tensor itself, or a new one from 4 bits."""
    return module.dense(part) if isinstance(module, Experts4bit) else getattr(module, part)


def stored_bytes(module: nn.Module) -> dict[str, int]:
    """Bytes of the tensors that hold experts, by name, in whatever layout."""
    if isinstance(module, Experts4bit):
        return {part: sum(tensor.nbytes for tensor in module.packed(part)) for part in module.shapes}
    return {name: parameter.nbytes for name, parameter in module.named_parameters(recurse=False) if parameter.ndim >= 3}


def activation(module: Any) -> Activation:
    """What stands between the two linears: (rows, outputs of the first) -> (rows, inputs of the second)."""
    plain = module.plain if isinstance(module, Experts4bit) else module
    return plain._apply_gate if plain.has_gate else plain.act_fn


def projection(module: Any, part: str, dtype: torch.dtype, scale: float = 1.0, dropout: float = 0.0) -> Projection:
    """One linear of the experts, for arithmetic in `dtype`."""
    if isinstance(module, Experts4bit):
        plain, packed, size = module.plain, module.packed(part), module.shapes[part][1:]
        kind = module.kind

        def stored(expert: int) -> Tensor:
            return quant.unpack(packed, expert, kind, size, dtype)
    else:
        plain, weight = module, getattr(module, part)  # the tensor itself: the module may hold another in backward

        def stored(expert: int) -> Tensor:
            return weight[expert].to(dtype)

    bias = getattr(plain, f"{part}_bias").to(dtype) if plain.has_bias else None
    turned = (lambda expert: stored(expert).T) if plain.is_transposed else stored
    return Projection(turned, shape(module, part)[1], bias, scale, dropout)


class Packed(nn.Module):
    """A 3-D parameter in 4 bits; its tensors are bytes, and move and save as any parameter does."""

    def __init__(self, packed: quant.Packed):
        super().__init__()
        self.codes = nn.Parameter(packed.codes, requires_grad=False)
        self.scales = nn.Parameter(packed.scales, requires_grad=False)
        self.scales_of_scales = nn.Parameter(packed.scales_of_scales, requires_grad=False)


class Experts4bit(nn.Module):
    """Experts stored in 4 bits (NF4 or FP4, double quantisation): 0.52 bytes per parameter. It computes what the experts did
    whose parameters it takes over, with weights that are dequantised one expert at a time and never kept.

    hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, experts per token) -> (tokens, hidden)
    """

    def __init__(self, experts: nn.Module, kind: quant.Quantization = "nf4"):
        super().__init__()
        names = parts(experts)
        self.kind, self.dtype = kind, weight_dtype(experts)
        self.shapes = {name: stored_shape(experts, name) for name in names}
        for name in names:
            self.add_module(name, Packed(quant.pack(experts.get_parameter(name), kind)))
            delattr(experts, name)
        self.plain: Any = experts  # all that is left: the activation, biases, flags
        self.train(experts.training)

    def packed(self, part: str) -> quant.Packed:
        """The bytes of one parameter."""
        held = self.get_submodule(part)
        assert isinstance(held, Packed)
        return quant.Packed(held.codes, held.scales, held.scales_of_scales)

    def dense(self, part: str) -> Tensor:
        """One parameter dequantised, as it was stored."""
        packed, size = self.packed(part), self.shapes[part]
        return torch.stack([quant.unpack(packed, expert, self.kind, size[1:], self.dtype) for expert in range(size[0])])

    def stands_for(self) -> int:
        """How many weights the bytes stand for."""
        return sum(size.numel() for size in self.shapes.values())

    def bytes(self) -> int:
        """How many bytes hold them, each a parameter of torch's."""
        return sum(stored_bytes(self).values())

    def with_weights(self, weights: dict[str, Tensor]) -> nn.Module:
        """The experts as they were before, with these parameters, as they were stored."""
        experts = copy.copy(self.plain)
        experts._parameters = dict(self.plain._parameters)  # copy.copy shares it
        for name, weight in weights.items():
            experts.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        return experts.train(self.training)

    def dequantized(self) -> nn.Module:
        """The plain experts that compute the same."""
        return self.with_weights({name: self.dense(name) for name in self.shapes})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        dtype = arithmetic(self, hidden_states)
        first, second = (projection(self, part, dtype) for part in self.shapes)
        out = routed_experts(
            hidden_states.to(dtype), top_k_index, top_k_weights,
            experts=shape(self, "down_proj")[0], first=first, second=second, gate=activation(self),
        )  # fmt: skip
        return out.to(hidden_states.dtype)


def arithmetic(module: Any, x: Tensor) -> torch.dtype:
    """The dtype in which these experts multiply x: autocast's, or that of their weights."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight_dtype(module)


def quantize_experts(model: nn.Module, kind: quant.Quantization) -> dict[str, str]:
    """Stores the experts of the model in 4 bits, in place, one module after the other.

    Returns the names of those that stay as they are, since they are stored in a way that peftkit does not know, and what that is.
    """
    left = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts4bit) or not is_experts(module):
            continue
        reason = unknown(module)
        if reason is not None:
            left[name] = f"{type(module).__name__}: {reason}"
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Experts4bit(module, kind))
    return left


def dequantize_experts(model: nn.Module) -> None:
    """Puts plain experts where there are 4-bit ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts4bit):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.dequantized())


def plain_experts(module: Any, weights: dict[str, Tensor]) -> nn.Module:
    """The plain experts with these parameters in place of their own: the module itself, or new ones where it is quantised."""
    if isinstance(module, Experts4bit):
        return module.with_weights({name: weights[name] if name in weights else module.dense(name) for name in module.shapes})
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return module
