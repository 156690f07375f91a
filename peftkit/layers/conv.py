"""LoRA and DoRA for convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from peftkit.kernels import dora_norm, gain_of
from peftkit.layers.base import ADAPTER, AdapterLayer, Factor, Spec, Trained, held, master_dtype, refuse_stacked_dora
from peftkit.layers.frozen import row_squares

CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class LoRAConv(AdapterLayer):
    """y = W * x + b + s B * (A * d(x))                                 (Hu et al. 2021, arXiv 2106.09685)
    y = g (W * x + s B * (A * d(x))) + b,  g = m / |W + s B A|_channel  (DoRA, Liu et al. 2024, arXiv 2402.09353)

    * is the convolution, x (batch, in, ...), y (batch, out, ...). A (r, in, *kernel), uniform, has the stride, padding and
    dilation of W; B (out, r / groups, 1, ...), zero, is a convolution of kernel 1 with the groups of W; m (1, out, 1, ...);
    d is dropout, in training only, and enters the low-rank product alone. With groups, A reads all channels, as in peft's
    files: that is no update of W, so such a layer cannot be merged, and takes no DoRA.

    Several active LoRA adapters are summed; DoRA is active alone. Raises ValueError where r is no multiple of the groups.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.lora_A, self.lora_B, self.lora_magnitude_vector = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Convolutions that are nothing else: not those that compute their weight (weight norm) or standardise it."""
        kind = next((kind for kind in CONVOLUTIONS if isinstance(module, kind)), None)
        return kind is not None and type(module).forward is kind.forward and not is_parametrized(module)

    def add(self, adapter: str, spec: Spec) -> None:
        base, weight = self.base_layer, self.base_layer.weight
        if spec.r % base.groups:
            raise ValueError(f"a convolution with {base.groups} groups takes a rank that is a multiple of them, not {spec.r}")
        if spec.dora and base.groups > 1:
            raise ValueError("DoRA has no form for a convolution with groups; use lora there, or leave it out with exclude_modules")
        self._registered(adapter, spec)
        dtype, ones = master_dtype(weight), (1,) * len(base.kernel_size)
        bound = 1 / math.sqrt(base.in_channels * math.prod(base.kernel_size))
        # Drawn on the CPU: the same seed gives the same adapter on every device.
        a = torch.empty(spec.r, base.in_channels, *base.kernel_size, dtype=dtype).uniform_(-bound, bound)
        self.lora_A[adapter] = Factor(a.to(weight.device))
        self.lora_B[adapter] = Factor(torch.zeros(base.out_channels, spec.r // base.groups, *ones, dtype=dtype, device=weight.device))
        if spec.dora:
            norm = row_squares(weight.flatten(1)).sqrt().to(dtype)
            self.lora_magnitude_vector[adapter] = Factor(norm.view(1, -1, *ones))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        refuse_stacked_dora(self, adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def role_parameters(self, adapter: str = ADAPTER) -> list[Trained]:
        if adapter not in self.specs:
            return []
        found = [Trained(side, f"lora_{side}.{adapter}.weight", f"lora_{side}.weight", held(self, f"lora_{side}", adapter)) for side in "AB"]
        if self.specs[adapter].dora:
            magnitude = held(self, "lora_magnitude_vector", adapter)
            found.append(Trained("magnitude", f"lora_magnitude_vector.{adapter}.weight", "lora_magnitude_vector", magnitude))
        return found

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if not (self.enabled and self.active):
            return base(x)
        update = sum(self._update(adapter, x) for adapter in self.active)
        if not self._dora:
            return base(x) + update
        product, ones = self._convolved(x, base.weight), (1,) * len(base.kernel_size)
        y = (product + update) * self._gain(base.weight).view(-1, *ones)
        y = y if base.bias is None else y + base.bias.view(-1, *ones)
        return y.to(product.dtype)

    def _update(self, adapter: str, x: Tensor) -> Tensor:
        """s B * (A * d(x))."""
        spec, base = self.specs[adapter], self.base_layer
        a, b = (held(self, f"lora_{side}", adapter).to(x.dtype) for side in "AB")
        h = self._convolved(F.dropout(x, spec.dropout, self.training), a)  # (batch, r, ...)
        return _function(base)(h, b, groups=base.groups) * spec.scale

    def _convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        """weight * x without bias, over all channels, with the stride, padding and dilation of the base."""
        base, padding = self.base_layer, self.base_layer.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        return _function(base)(x, weight, None, base.stride, padding, base.dilation)

    # ---------------------------------------------------------------------------------------------------- DoRA, merging

    @property
    def _dora(self) -> bool:
        return bool(self.active) and self.specs[self.active[0]].dora

    def _gain(self, weight: Tensor) -> Tensor:
        """g (out,) of the active DoRA adapter for W (out, in, *kernel). The norm is a constant for the gradient."""
        [adapter] = self.active
        a, b = (held(self, f"lora_{side}", adapter).detach().flatten(1) for side in "AB")
        flat = weight.detach().flatten(1)  # (out, in * kernel)
        norm = dora_norm(flat, row_squares(flat).to(master_dtype(weight)), a, b, self.specs[adapter].scale)
        return gain_of(held(self, "lora_magnitude_vector", adapter).flatten(), norm)

    def unmergeable(self) -> str | None:
        return "with groups its update reads across them" if self.active and self.base_layer.groups > 1 else None

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        weight = self.base_layer.weight if weight is None else weight
        if reason := self.unmergeable():
            raise ValueError(f"this convolution cannot be merged: {reason}")
        total = weight
        for adapter in self.active:
            a, b = (held(self, f"lora_{side}", adapter).flatten(1) for side in "AB")
            total = total + self.specs[adapter].scale * (b @ a).view_as(weight)
        if self._dora:
            total = total * self._gain(weight).view(-1, *(1,) * (weight.ndim - 1))
        return total.to(weight.dtype)

    def merged(self, weight: Tensor | None = None) -> nn.Module:
        self.base_layer.weight = nn.Parameter(self.merged_weight(weight), requires_grad=False)
        return self.base_layer


def _function(module: nn.Module) -> Any:
    return next(function for kind, function in CONVOLUTIONS.items() if isinstance(module, kind))
