"""LoRA for the experts of mixture-of-experts layers, stored as 3-D parameters or in 4 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import quant
from peftkit.kernels.experts import Projection, routed_experts
from peftkit.layers import frozen_experts as frozen
from peftkit.layers.base import ADAPTER, AdapterLayer, Factor, Spec, Trained, held


class LoRAExperts(AdapterLayer):
    """u = x W_e^T + s d(x) A_e^T B_e^T    y = f(u) V_e^T + s d(f(u)) C_e^T D_e^T    for the experts e of a token, f the activation

    One layer holds the factors of one parameter, A_e (r, in) uniform and B_e (out, r) zero for every expert; where both are
    adapted, the layer of `down_proj` wraps that of `gate_up_proj`, and the outer one computes for both. That is how peft's
    `target_parameters` names and lays out the factors: A (experts * r, in), B (out, r * experts). Only the rows that the router
    sends to an expert pay for its update, and no update is added to a weight but in `merged`. Several active adapters are one
    of the summed rank. DoRA has no form here.
    """

    in_all_linear = True

    def __init__(self, base_layer: nn.Module, part: str = ""):
        """part: the name of the adapted parameter. Raises ValueError where the experts are computed in a way not known here."""
        super().__init__(base_layer)
        names = frozen.parts(self.experts())
        if part not in names:
            raise ValueError(f"{type(self.experts()).__name__} has no {part!r}; its linears are {' and '.join(names)}")
        self.part = part
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        return frozen.is_experts(module)

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...]:
        while isinstance(module, LoRAExperts):
            module = module.base_layer
        return () if frozen.unknown(module) else frozen.parts(module)

    def experts(self) -> Any:
        """The frozen module beneath all layers."""
        *_, innermost = self.chain()
        return innermost.base_layer

    def chain(self) -> Iterator[LoRAExperts]:
        """This layer and those inside it."""
        layer: Any = self
        while isinstance(layer, LoRAExperts):
            yield layer
            layer = layer.base_layer

    def add(self, adapter: str, spec: Spec) -> None:
        experts = self.experts()
        if spec.dora:
            raise ValueError(
                f"DoRA has no form for experts stored as 3-D parameters ({type(experts).__name__}.{self.part}); use lora, "
                "or leave them out with exclude_modules=['experts']"
            )
        self._registered(adapter, spec)
        count, outputs, inputs = frozen.shape(experts, self.part)
        dtype = torch.float64 if frozen.weight_dtype(experts) == torch.float64 else torch.float32
        device, bound = next(experts.parameters()).device, 1 / math.sqrt(inputs)
        # Drawn on the CPU: the same seed gives the same adapter on every device.
        a = torch.empty(count * spec.r, inputs, dtype=dtype).uniform_(-bound, bound)
        self.lora_A[adapter] = Factor(a.to(device))
        self.lora_B[adapter] = Factor(torch.zeros(outputs, spec.r * count, dtype=dtype, device=device))

    def role_parameters(self, adapter: str = ADAPTER) -> list[Trained]:
        if adapter not in self.specs:
            return []
        return [
            Trained("A", f"lora_A.{adapter}.weight", "lora_A.weight", held(self, "lora_A", adapter)),
            Trained("B", f"lora_B.{adapter}.weight", "lora_B.weight", held(self, "lora_B", adapter)),
        ]

    def target(self, name: str) -> str:
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        return f"{name}.{self.part}"

    # ---------------------------------------------------------------------------------------------------------- forward

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, experts per token) -> (tokens, hidden)"""
        experts = self.experts()
        updates = {layer.part: layer for layer in self.chain() if layer.enabled and layer.active}
        if not updates:
            return experts(hidden_states, top_k_index, top_k_weights)
        if any(parameter.requires_grad for parameter in experts.parameters()):
            raise ValueError(f"weights of {type(experts).__name__} are to train, and under an adapter they cannot: name the experts in modules_to_save")
        dtype = frozen.arithmetic(experts, hidden_states)
        first, second = frozen.parts(experts)
        out = routed_experts(
            hidden_states.to(dtype), top_k_index, top_k_weights, experts=frozen.shape(experts, second)[0], gate=frozen.activation(experts),
            first=_projection(experts, first, dtype, updates.get(first)), second=_projection(experts, second, dtype, updates.get(second)),
            first_factors=updates[first].factors() if first in updates else None,
            second_factors=updates[second].factors() if second in updates else None,
        )  # fmt: skip
        return out.to(hidden_states.dtype)

    @property
    def scale(self) -> float:
        return self.specs[self.active[0]].scale

    def dropout(self) -> float:
        """The dropout of the active adapters, 0 outside training. Raises ValueError where stacked ones differ."""
        rates = {self.specs[adapter].dropout for adapter in self.active}
        if not self.training:
            return 0.0
        if len(rates) > 1:
            raise ValueError(f"stacked adapters train with one dropout, and {', '.join(self.active)} have several")
        return rates.pop()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (experts, r, in) and B^T (experts, r, out) of the active adapters, one below the other, every scale but the first one's folded into B."""
        count, outputs, inputs = frozen.shape(self.experts(), self.part)
        found: list[tuple[Tensor, Tensor]] = []
        for adapter in self.active:
            spec = self.specs[adapter]
            a = held(self, "lora_A", adapter).view(count, spec.r, inputs)
            b = held(self, "lora_B", adapter).view(outputs, spec.r, count).permute(2, 1, 0)
            found.append((a, b * (spec.scale / self.scale) if found else b))
        return found[0] if len(found) == 1 else (torch.cat([a for a, _ in found], 1), torch.cat([b for _, b in found], 1))

    # ----------------------------------------------------------------------------------------------------------- merging

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """The 3-D parameter that computes the same, laid out as the frozen one is; `weight` likewise."""
        experts = self.experts()
        weight = frozen.dense(experts, self.part) if weight is None else weight
        if not self.active:
            return weight
        a, b = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.factors())
        delta = self.scale * (b.mT @ a)  # (experts, out, in)
        return (weight.to(delta.dtype) + (delta.mT if frozen.is_transposed(experts) else delta)).to(weight.dtype)

    def merged(self, weight: Tensor | None = None) -> nn.Module:
        merged = self.merged_weight(weight)
        inner = self.base_layer.merged() if isinstance(self.base_layer, LoRAExperts) else self.base_layer
        return frozen.plain_experts(inner, {self.part: merged})

    def original(self, model: nn.Module, name: str) -> Tensor:
        return model.get_parameter(self.target(name))


def _projection(experts: Any, part: str, dtype: torch.dtype, update: LoRAExperts | None) -> Projection:
    return frozen.projection(experts, part, dtype) if update is None else frozen.projection(experts, part, dtype, update.scale, update.dropout())


def left_out_experts(model: nn.Module) -> list[str]:
    """A line for the experts that no adapter changes, and one for those that stay as they are beside linears in 4 bits."""
    adapted = {(id(layer.experts()), layer.part) for layer in model.modules() if isinstance(layer, LoRAExperts)}
    some_in_4bit = any(quant.is_4bit(module) for module in model.modules())
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        for part, size in frozen.stored_bytes(module).items() if frozen.is_experts(module) else ():
            packed = isinstance(module, frozen.Experts4bit)
            if (id(module), part) not in adapted:
                found.setdefault("not adapted" if packed else "neither adapted nor quantised", {})[f"{name}.{part}"] = size
            elif some_in_4bit and not packed:
                found.setdefault("not quantised, as the linears are (peftkit.load quantises both)", {})[f"{name}.{part}"] = size
    return [f"{len(sizes)} expert tensors of {sum(sizes.values()):,} bytes, such as {next(iter(sizes))}: {what}" for what, sizes in found.items()]


# peft's adapter files name experts by their module, and wrap it once more for each parameter; which ones, its config says.


def as_target_parameters(targets: list[str], model: nn.Module) -> list[str]:
    """peft's `target_parameters` for these parameters of experts and no others: name endings where that is exact, else full names.

    Raises ValueError where experts have layers for other parameters too: in a file without those the layers would nest otherwise.
    """
    for name, layer in model.named_modules():
        owner = name.replace(".base_layer", "")
        if isinstance(layer, LoRAExperts) and any(target.startswith(f"{owner}.") for target in targets) and layer.target(name) not in targets:
            raise ValueError(f"{layer.target(name)} is adapted by another adapter only; adapters of one model adapt the same parameters of experts")
    endings = sorted({".".join(target.split(".")[-2:]) for target in targets})
    there = [f"{name}.{part}" for name, module in model.named_modules() if frozen.is_experts(module) for part in frozen.stored_bytes(module)]
    plain = {name.replace(".base_layer", "") for name in there}
    return endings if {name for name in plain if name.endswith(tuple(f".{ending}" for ending in endings))} == set(targets) else sorted(targets)


def from_file_modules(modules: list[str], target_parameters: list[str], model: nn.Module) -> list[str]:
    """What `find_targets` calls the modules of an adapter file, of which those of experts stand for their parameters.

    Raises ValueError where the file adapts other parameters of experts than the config says.
    """
    found = []
    for name in modules:
        owner = name.replace(".base_layer", "")
        module = dict(model.named_modules()).get(owner)
        while isinstance(module, LoRAExperts):  # adapted already
            module = module.base_layer
        if module is None or not frozen.is_experts(module):
            found.append(name)
            continue
        named = [part for part in frozen.parts(module) if f".{owner}.{part}".endswith(tuple(f".{target}" for target in target_parameters))]
        depth, wrappers = name.count(".base_layer"), sum(other.replace(".base_layer", "") == owner for other in modules)
        if wrappers != len(named):
            raise ValueError(f"the file has factors for {wrappers} parameters of {owner}, and target_parameters names {len(named)} of them")
        found.append(f"{owner}.{named[-1 - depth]}")
    return found
