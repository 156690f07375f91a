"""A live peft model on our layers, and back.

`adopt` puts a layer of ours where a LoRA or DoRA layer of peft's stood, `release` puts peft's back. Ours is a subclass of
the class it stands for: it takes over the very modules, parameters and settings and computes forward by itself. All else
stays peft's own code: files, merging, adding, switching and deleting adapters. What our forward does not cover (merged
weights, several adapters in one batch, other variants of LoRA) goes to peft's.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from peftkit import quant
from peftkit.layers import LoRALinear, Spec, adapter_layers, is_linear, share_inputs, swap
from peftkit.layers.frozen import is_bare


@dataclass(frozen=True)
class AdoptReport:
    """Which of a model's peft layers are ours now, which are not, and what differs."""

    adopted: list[str]
    """Names of the modules whose forward is ours, those of earlier calls included."""
    left: dict[str, str]
    """Name of a module, or of a module and an adapter in it -> why it stays with peft's forward."""
    notes: list[str]
    """Where ours computes otherwise than peft."""

    def __str__(self) -> str:
        endings = Counter(name.rsplit(".", 1)[-1] for name in self.adopted)
        lines = [f"adopted    {len(self.adopted)} layers: " + ", ".join(f"{ending} x{count}" for ending, count in endings.items())]
        for reason, count in Counter(self.left.values()).items():
            first = next(name for name, why in self.left.items() if why == reason)
            lines.append(f"left       {first}{f' and {count - 1} more' if count > 1 else ''}: {reason}")
        return "\n".join(lines + [f"note       {note}" for note in self.notes])


# ------------------------------------------------------------------------------------------------------------ the layers


class Engine(LoRALinear):
    """Our layer on the modules of one of peft's, outside the model's tree: `read` brings it up to what peft's layer says."""

    def __init__(self, layer: Any):
        super().__init__(layer.base_layer)
        self.lora_A, self.lora_B, self.lora_magnitude_vector = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
        vars(self)["layer"] = layer  # past nn.Module, which would make it a submodule

    def read(self) -> bool:
        """Takes over which adapters are active, their scales and dropout; returns whether ours computes that combination."""
        self._read()
        if self.training and self.shared is not None:  # whichever of them is called first takes the product for all
            for beside in self.shared.layers:
                assert isinstance(beside, Engine)
                beside._read()
        return self.enabled

    def _read(self) -> None:
        layer, modules = self.layer, self.layer._modules
        active = [adapter for adapter in layer.active_adapters if adapter in modules["lora_A"]]
        enabled = not (layer.disable_adapters or layer.merged) and modules["base_layer"] is self._modules["base_layer"]
        found = {adapter: spec_of(layer, adapter) for adapter in active}
        specs = {adapter: spec for adapter, spec in found.items() if isinstance(spec, Spec)}
        enabled = enabled and bool(active) and len(specs) == len(active) and _stack(list(specs.values()))
        training = layer.training or any(spec.dropout for spec in specs.values())
        vars(self).update(active=active, specs=specs, enabled=enabled, training=training)  # nn.Module's setattr costs more than all this

    def forget(self) -> None:
        """Drops what is kept of the frozen weight."""
        self.forget_norm()


class Adopted(nn.Module):
    """Stands before a class of peft's in the order of methods: forward is ours where `Engine` covers it."""

    peft_class: type[nn.Module]
    _engine: Engine
    _peft_layer: nn.Module  # what `release` puts back

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        engine = self._engine
        # A replica of nn.DataParallel carries the engine of the layer that it copies.
        if engine.layer is self and not args and not kwargs and engine.read():
            return engine.forward(x)
        return super().forward(x, *args, **kwargs)

    # What writes to the frozen weight and leaves no trace on it; unmerging follows a merge.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adopted:
        self._engine.forget()
        return super()._apply(fn, recurse)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self._engine.forget()
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.peft_class,), vars(self)


@cache
def _adopted_class(peft_class: Any) -> type[Adopted]:
    return type(f"Adopted{peft_class.__name__}", (Adopted, peft_class), {"peft_class": peft_class, "__module__": __name__})


def _blank(peft_class: Any) -> Adopted:
    adopted_class = _adopted_class(peft_class)
    return adopted_class.__new__(adopted_class)


def _take(layer: nn.Module) -> Adopted:
    adopted = _blank(type(layer))
    vars(adopted).update(vars(layer))
    vars(adopted).update(_engine=Engine(adopted), _peft_layer=layer)
    return adopted


def _give_back(adopted: Adopted) -> nn.Module:
    state, layer = dict(vars(adopted)), adopted._peft_layer
    del state["_engine"], state["_peft_layer"]
    vars(layer).clear()
    vars(layer).update(state)
    return layer


# ------------------------------------------------------------------------------------------------------ what is adopted


def spec_of(layer: Any, adapter: str) -> Spec | str:
    """What one of peft's layers says of an adapter, dropout as it acts now; or, in words, why ours does not compute it."""
    variant, scale = layer.lora_variant.get(adapter), layer.scaling[adapter]
    dropout: Any = layer._modules["lora_dropout"][adapter]  # past __getattr__: read in every forward
    if variant is not None:
        from peft.tuners.lora.variants import DoraLinearVariant

        if type(variant) is not DoraLinearVariant:
            return f"the variant {type(variant).__name__.removesuffix('LinearVariant')} of LoRA"
    if layer.lora_bias[adapter]:
        return "lora_bias, which trains a bias beside B"
    if not isinstance(dropout, (nn.Dropout, nn.Identity)):
        return f"dropout of the kind {type(dropout).__name__}"
    if not isinstance(scale, (int, float)):
        return f"a scale of the kind {type(scale).__name__}"
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Spec(layer.r[adapter], scale, rate, dora=variant is not None)


def _stack(specs: list[Spec]) -> bool:
    """Whether ours computes these adapters at once: LoRA alone, under one dropout, scaled relative to the first."""
    first = specs[0]
    return len(specs) == 1 or (first.scale != 0 and not any(spec.dora or spec.dropout != first.dropout for spec in specs))


def layer_problem(layer: Any) -> str | None:
    """Why a module of peft's cannot be adopted, whichever adapters it has; None where it can."""
    from peft.tuners import lora

    kinds = [lora.Linear]
    if any(quant.is_quantized(module) for module in layer.children()):  # naming these imports bitsandbytes
        kinds += [lora.Linear4bit, lora.Linear8bitLt]
    if type(layer) not in kinds:
        return f"a layer of the kind {type(layer).__module__.removeprefix('peft.tuners.').split('.')[0]}.{type(layer).__name__}"
    base = layer.base_layer
    if base is not layer.get_base_layer():
        return f"it stands around another adapter layer, {type(base).__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced by another library"
    if not is_linear(base) or not (type(base.weight) is nn.Parameter or quant.is_quantized(base)):
        return f"a base of the kind {type(base).__name__} with weights of the kind {type(base.weight).__name__}"
    if base.weight.device.type == "meta":
        return "its weights are offloaded"
    if not is_bare(base):
        return f"its {type(base).__name__} has hooks or a forward of its own"
    return None


def adopt(model: nn.Module) -> AdoptReport:
    """Turns the LoRA and DoRA layers that peft put into `model` into ours, in place; returns what was done.

    The model stays what it is, a PeftModel or a transformers model with adapters. Parameters are the same objects under the
    same names: an optimizer built before goes on, and every method of peft's works on. Called again after an adapter
    was added, it adopts the new modules. What cannot be adopted stays as it is, with a warning and its reason in the report.

    Raises ValueError, the model untouched, where there is no layer of peft's, none that can be adopted, or a merged one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if adapter_layers(model):
        raise ValueError("the adapters of this model are peftkit's already; there is nothing of peft's to adopt")
    found: dict[str, Any] = {name: module for name, module in model.named_modules(remove_duplicate=False) if name and isinstance(module, BaseTunerLayer)}
    if not found:
        raise ValueError(f"this {type(model).__name__} holds no adapter layer of peft's; call peft.get_peft_model first, or peftkit.attach instead of both")
    merged = [name for name, layer in found.items() if layer.merged]
    if merged:
        raise ValueError(f"the adapter is merged into the weights of {merged[0]}; call model.unmerge_adapter() first")
    left = {name: problem for name, layer in found.items() if not isinstance(layer, Adopted) and (problem := layer_problem(layer))}
    if len(left) == len(found):
        raise ValueError("none of peft's layers can be adopted: " + "; ".join(f"{name}: {problem}" for name, problem in left.items()))
    quant.protect(model)
    taken = {id(layer): layer if isinstance(layer, Adopted) else _take(layer) for name, layer in found.items() if name not in left}
    adopted: dict[str, Any] = {name: taken[id(layer)] for name, layer in found.items() if name not in left}
    for name, layer in adopted.items():
        swap(model, name, layer._engine)
    share_inputs(model)  # knows our layers by their places
    for name, layer in adopted.items():
        swap(model, name, layer)
    for name, layer in adopted.items():
        left |= {f"{name} ({adapter})": reason for adapter in layer.lora_A if isinstance(reason := spec_of(layer, adapter), str)}
    report = AdoptReport(list(adopted), left, _notes(list(taken.values())))
    if left:
        warnings.warn(f"{len(left)} of peft's layers stay with peft's forward:\n{report}", stacklevel=2)
    return report


def _notes(layers: list[Any]) -> list[str]:
    """Where ours computes otherwise than peft, in words."""
    notes = set()
    for layer in layers:
        base = layer.base_layer
        narrow = base.compute_dtype if quant.is_4bit(base) else base.weight.dtype
        for adapter in layer.lora_A:
            dropout, wide, dora = layer.lora_dropout[adapter], layer.lora_A[adapter].weight.dtype, adapter in layer.lora_variant
            if dora and isinstance(dropout, nn.Dropout) and dropout.p:
                notes.add("DoRA with dropout: the dropped input enters the low-rank product only; peft's enters x W^T too")
            if dora and quant.is_8bit(base):
                notes.add("DoRA on an 8-bit base: x is not rounded to 8 bits; peft takes the product of the 8-bit layer, which does")
            if narrow is not None and narrow.is_floating_point and narrow.itemsize < wide.itemsize:
                notes.add(f"the low-rank products run in {narrow}, as those of the base do; peft casts their input to {wide}")
    return sorted(notes)


def release(model: nn.Module) -> nn.Module:
    """Puts peft's own layers back in place of those that `adopt` put in, with the parameters as trained. Returns the model.

    Raises ValueError where the model holds none of ours.
    """
    adopted = {name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Adopted)}
    if not adopted:
        raise ValueError(f"this {type(model).__name__} holds no layer that peftkit.adopt put in")
    given_back = {id(layer): _give_back(layer) for layer in adopted.values()}
    for name, layer in adopted.items():
        swap(model, name, given_back[id(layer)])
    return model
