"""Adapter layers: what stands where a linear stood, and the tools to find, swap and restore modules.

An AdapterLayer wraps the frozen module it stands for (nn.Linear, GPT-2's Conv1D, bitsandbytes 4-bit and 8-bit linears)
and declares which of its parameters train and in which role. Contract, in eval mode:

    forward(x) == F.linear(x, merged_weight(), bias)

Parameters are named as peft names them (`lora_A.default.weight`, ...), so that whoever asks transformers for the
adapter's state gets what it expects.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkit import quant
from peftkit.kernels import dora_norm, lowrank_linear

ADAPTER = "default"  # the name of the adapter in parameter names, peft's default


class RoleParameter(NamedTuple):
    """A trainable parameter, its full name in the model, and its role: A, B, magnitude, bias or full."""

    name: str
    role: str
    parameter: nn.Parameter


# ---------------------------------------------------------------------------------------------------------------- bases


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter layer can stand for this module."""
    return isinstance(module, (nn.Linear, Conv1D))


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


# --------------------------------------------------------------------------------------------------------------- layers


class Factor(nn.Module):
    """Holds one trainable tensor as `.weight`; a module of its own only for the sake of its name."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def _held(factors: nn.ModuleDict) -> nn.Parameter:
    factor = factors[ADAPTER]
    assert isinstance(factor, Factor)
    return factor.weight


class AdapterLayer(nn.Module, ABC):
    """A frozen module with something trainable beside it."""

    base_layer: Any  # a linear of one of several libraries

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self.train(base_layer.training)

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,) of the frozen module."""
        return self.base_layer.bias

    @abstractmethod
    def role_parameters(self) -> dict[str, tuple[str, nn.Parameter]]:
        """Role -> (name within this layer, parameter) of all that trains here."""

    @abstractmethod
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """The weight (out, in) of the plain linear that computes the same, in the base's compute dtype.

        `weight` (out, in) stands in for the frozen weight, e.g. the original 16-bit one of a quantised base.
        """

    # transformers reaches adapter layers through these three (`disable_adapters`, `save_pretrained`, ...).
    active_adapter = ADAPTER

    def enable_adapters(self, enabled: bool) -> None:
        self.enabled = enabled

    def set_adapter(self, adapter_name: str) -> None:
        if adapter_name != ADAPTER:
            raise ValueError(f"unknown adapter {adapter_name!r}; there is {ADAPTER!r}")


class LoRALinear(AdapterLayer):
    """y = x W^T + b + s d(x) A^T B^T    (Hu et al. 2021, arXiv 2106.09685)

    x (..., in), y (..., out), A (r, in) uniform, B (out, r) zero, s = alpha / r, or alpha / sqrt(r) when rank-stabilised;
    d is dropout, in training only. A and B are fp32 (fp64 on an fp64 base); the product runs in the dtype of the base's.
    """

    def __init__(self, base_layer: Any, r: int, scale: float, dropout: float = 0.0):
        super().__init__(base_layer)
        inputs, outputs = features(base_layer)
        weight = base_layer.weight
        master = torch.float64 if weight.dtype == torch.float64 else torch.float32
        bound = 1 / math.sqrt(inputs)
        # Drawn on the CPU: the same seed gives the same adapter on every device.
        a = torch.empty(r, inputs, dtype=master).uniform_(-bound, bound)
        self.lora_A = nn.ModuleDict({ADAPTER: Factor(a.to(weight.device))})
        self.lora_B = nn.ModuleDict({ADAPTER: Factor(torch.zeros(outputs, r, dtype=master, device=weight.device))})
        self.scale, self.dropout = scale, dropout

    @property
    def a(self) -> nn.Parameter:
        return _held(self.lora_A)

    @property
    def b(self) -> nn.Parameter:
        return _held(self.lora_B)

    def role_parameters(self) -> dict[str, tuple[str, nn.Parameter]]:
        return {"A": (f"lora_A.{ADAPTER}.weight", self.a), "B": (f"lora_B.{ADAPTER}.weight", self.b)}

    def delta(self) -> Tensor:
        """s B A (out, in), fp32 at least: trl's SFTTrainer makes the masters bf16 on a quantised base."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        return self.scale * (self.b.to(dtype) @ self.a.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base_layer(x)
        dtype = compute_dtype(self.base_layer, x)
        y = self.adapted(x.to(dtype), self.dropout if self.training else 0.0)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def adapted(self, x: Tensor, dropout: float) -> Tensor:
        base = self.base_layer
        return lowrank_linear(
            x,
            self.a,
            self.b,
            frozen=base,
            weight=lambda dtype: dense_weight(base, dtype),
            scale=self.scale,
            dropout=dropout,
            bias=base.bias,
            fuse=self.training,
        )

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        weight = dense_weight(self.base_layer) if weight is None else weight
        delta = self.delta()
        return (weight.to(delta.dtype) + delta).to(weight.dtype).detach()


class DoRALinear(LoRALinear):
    """y = g * (x W^T + s d(x) A^T B^T) + b,  g = m / |W + s B A|_row    (Liu et al. 2024, arXiv 2402.09353)

    m (out,) starts as the row norms of W, of the dequantised one on a quantised base. The norm is taken anew in every
    forward and is a constant for the gradient. m, the norm and g stay in the master dtype. With dropout, the dropped x
    enters the low-rank product only: the reference's dropped x W^T would be a second product with the base.
    """

    squares: Tensor

    def __init__(self, base_layer: Any, r: int, scale: float, dropout: float = 0.0):
        super().__init__(base_layer, r, scale, dropout)
        squares = row_squares(dense_weight(base_layer))
        self.register_buffer("squares", squares, persistent=False)  # |W|^2 by row: W is frozen
        self.lora_magnitude_vector = nn.ModuleDict({ADAPTER: Factor(squares.sqrt().to(self.a.dtype))})

    @property
    def magnitude(self) -> nn.Parameter:
        return _held(self.lora_magnitude_vector)

    def role_parameters(self) -> dict[str, tuple[str, nn.Parameter]]:
        return super().role_parameters() | {"magnitude": (f"lora_magnitude_vector.{ADAPTER}.weight", self.magnitude)}

    @torch.no_grad()
    def gain(self, weight: Tensor, squares: Tensor) -> Tensor:
        """m / |W + s B A|_row (out,); 1 where a row of W + s B A is zero and so is its m."""
        norm = dora_norm(weight, squares, self.a, self.b, self.scale)
        return torch.where(norm == 0, torch.ones_like(norm), self.magnitude / norm)

    def adapted(self, x: Tensor, dropout: float) -> Tensor:
        base = self.base_layer
        weight = dense_weight(base, x.dtype).detach()
        return lowrank_linear(
            x, self.a, self.b, frozen=lambda flat: flat @ weight.T, weight=lambda dtype: dense_weight(base, dtype), scale=self.scale,
            dropout=dropout, magnitude=self.magnitude, bias=base.bias, gain=self.gain(weight, self.squares),
        )  # fmt: skip

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        weight = dense_weight(self.base_layer) if weight is None else weight
        delta = self.delta()
        exact = weight.to(delta.dtype)
        gain = self.gain(exact, row_squares(exact))
        return ((exact + delta) * gain[:, None]).to(weight.dtype).detach()


# -------------------------------------------------------------------------------------------------- find, swap, restore


def find_targets(model: nn.Module, targets: str | list[str], exclude: str | list[str] | None = None) -> dict[str, nn.Module]:
    """The linears to adapt, by name.

    `targets` is "all-linear" (every linear but the output head), a list of names or name endings, or a regular
    expression for the whole name. Raises ValueError, with near names, where it or one of its entries matches nothing.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    if not linears:
        raise ValueError(f"{type(model).__name__} holds no linear layer that could be adapted")
    if targets == "all-linear":
        head = output_head(model)
        found = {name: module for name, module in linears.items() if module is not head}
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        found = {}
        for pattern in patterns:
            matches = {name: m for name, m in linears.items() if _matches(name, pattern, regex=isinstance(targets, str))}
            if not matches:
                raise ValueError(_nothing_matches(pattern, linears))
            found |= matches
    excluded = [exclude] if isinstance(exclude, str) else exclude or []
    for pattern in excluded:
        if not any(_matches(name, pattern, regex=isinstance(exclude, str)) for name in linears):
            raise ValueError("exclude_modules: " + _nothing_matches(pattern, linears))
    found = {n: m for n, m in found.items() if not any(_matches(n, p, regex=isinstance(exclude, str)) for p in excluded)}
    if not found:
        raise ValueError("target_modules and exclude_modules together leave no module to adapt")
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits, where the model names one."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if getter else None


def _matches(name: str, pattern: str, regex: bool) -> bool:
    if regex and re.fullmatch(pattern, name):
        return True
    return name == pattern or name.endswith(f".{pattern}")


def _nothing_matches(pattern: str, linears: dict[str, nn.Module]) -> str:
    from peftkit.config import suggest

    endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
    return f"target {pattern!r} matches no linear layer{suggest(pattern, endings)} (linear layers here: {', '.join(endings)})"


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where the submodule `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Every adapter layer of the model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def trainable_parameters(model: nn.Module) -> Iterator[RoleParameter]:
    """All that trains, with its role; what belongs to no adapter layer has the role "full"."""
    declared = {f"{name}.{local}": role for name, layer in adapter_layers(model).items() for role, (local, _) in layer.role_parameters().items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield RoleParameter(name, declared.get(name, "full"), parameter)


def unadapted_3d(model: nn.Module) -> dict[str, int]:
    """Frozen parameters of three or more dimensions (experts of MoE models) that no linear holds: name -> bytes."""
    return {
        name: parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not parameter.requires_grad
    }
