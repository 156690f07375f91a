"""Biases of the base that an adapter trains: copies of them, so that the base keeps its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peftkit.layers.base import ADAPTER, AdapterLayer, Factor, Trained, adapter_layers, held, master_dtype


@dataclass(frozen=True)
class Bias:
    """The bias trains, in a copy."""


class TrainedBias(AdapterLayer):
    """y = f(x; b'), with b' trained and b kept: any module that has a bias and nothing inside, such as a norm.

    b' is fp32 (fp64 beside fp64) and cast to the dtype of b in forward: in bfloat16 most steps would round to nothing.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.biases = nn.ModuleDict()

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        return isinstance(module._parameters.get("bias"), nn.Parameter) and not any(True for _ in module.children())

    def add(self, adapter: str, spec: Bias) -> None:
        self._registered(adapter, spec)
        self.biases[adapter] = bias_copy(self.base_layer)

    def role_parameters(self, adapter: str = ADAPTER) -> list[Trained]:
        return [Trained("bias", f"biases.{adapter}.weight", "bias", held(self, "biases", adapter))] if adapter in self.specs else []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.enabled and self.active):
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, {"bias": self._bias()}, args, kwargs)

    @property
    def bias(self) -> Tensor:
        """What a model gets that reads the bias instead of calling the module."""
        return self._bias() if self.enabled and self.active else self.base_layer.bias

    def _bias(self) -> Tensor:
        return held(self, "biases", self.active[0]).to(self.base_layer.bias.dtype)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        return self.base_layer.weight if weight is None else weight

    @torch.no_grad()
    def merged(self, weight: Tensor | None = None) -> nn.Module:
        if self.active:
            self.base_layer.bias = nn.Parameter(self._bias().clone(), requires_grad=False)
        return self.base_layer


def bias_copy(module: Any) -> Factor:
    """What trains in place of the module's bias (out,)."""
    return Factor(module.bias.detach().to(master_dtype(module.bias), copy=True))


def other_biases(model: nn.Module) -> dict[str, nn.Module]:
    """Every module with a bias that is no adapter layer and in none. Raises ValueError where one cannot be trained."""
    layers = tuple(f"{name}." for name in adapter_layers(model))
    outside = [(name, module) for name, module in model.named_modules() if not f"{name}.".startswith(layers)]
    chosen = {name: module for name, module in outside if TrainedBias.stands_for(module)}
    covered = {id(module.bias) for module in chosen.values()}
    for name, module in outside:
        bias = module._parameters.get("bias")
        if bias is not None and id(bias) not in covered:
            raise ValueError(f"bias: {name} ({type(module).__name__}) holds a bias beside other modules, which cannot be trained; use bias: lora_only")
    return chosen
