"""What every adapter layer is: a frozen module with named adapters beside it.

Parameters are named as peft names them (`lora_A.default.weight`, ...), so that whoever asks transformers for the
adapter's state gets what it expects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from peftkit.layers.frozen import dense_weight

ADAPTER = "default"  # the name of the first adapter, peft's default


@dataclass(frozen=True)
class Spec:
    """The shape of one low-rank update: y += scale * d(x) A^T B^T, with A (r, in) and B (out, r)."""

    r: int
    scale: float
    dropout: float = 0.0
    dora: bool = False
    """Whether the row lengths of W + s B A are trained as a magnitude of their own."""
    bias: bool = False
    """Whether the bias of the frozen module is trained too, in a copy."""


class Trained(NamedTuple):
    """A trainable parameter of an adapter layer."""

    role: str
    """A, B, embedding (both factors of one), magnitude, bias, tokens or full."""
    name: str
    """Its name within the layer, as in named_parameters."""
    key: str
    """Its key within the layer in peft's adapter files."""
    parameter: nn.Parameter  # in `written` any tensor
    dtype: torch.dtype | None = None
    """What it is written in, where that is not its own dtype: a module trained whole in fp32 goes to the file as the base has it."""


class RoleParameter(NamedTuple):
    """A trainable parameter of a model, with its full name and its role."""

    name: str
    role: str
    parameter: nn.Parameter


class Factor(nn.Module):
    """Holds one trainable tensor as `.weight`; a module of its own only for the sake of its name."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def held(layer: nn.Module, factors: str, adapter: str) -> nn.Parameter:
    """The tensor of one adapter in one of the layer's dicts of factors. It is read in every forward, so past `__getattr__` where that can be."""
    factor: Any = layer._modules[factors]._modules[adapter]  # type: ignore[union-attr]
    found = factor._parameters.get("weight")
    return factor.weight if found is None else found  # a replica of nn.DataParallel holds no parameter


class AdapterLayer(nn.Module, ABC):
    """A frozen module with named adapters beside it. Contract, in eval mode: forward is that of `merged()`.

    The adapters in `active` apply, their updates summed. What the surrounding model reads off the module (`weight`,
    `bias`, `in_features`, ...) it reads off the frozen one.
    """

    in_all_linear: ClassVar[bool] = False
    """Whether target_modules="all-linear" adapts the modules that this kind stands for."""

    base_layer: Any  # a module of one of several libraries
    part: str = ""
    """The parameter of the module that this layer adapts, empty where it stands for the whole."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.specs: dict[str, Any] = {}
        self.active: list[str] = []
        self.chosen: list[str] = []  # the active adapters of the whole model, whether or not this layer has them
        self.enabled = True
        self.train(base_layer.training)

    @classmethod
    @abstractmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether this kind of layer can be put around the module."""

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...]:
        """The parameters of the module that are adapted one by one, by name; none where it is adapted as a whole."""
        return ()

    @abstractmethod
    def add(self, adapter: str, spec: Any) -> None:
        """Puts a fresh adapter in. It is active if it is the first; the outputs do not change."""

    def delete(self, adapter: str) -> None:
        """Takes an adapter and its parameters out. Raises ValueError where there is none of this name."""
        if adapter not in self.specs:
            raise ValueError(f"unknown adapter {adapter!r}; there is {', '.join(map(repr, self.specs)) or 'none'}")
        del self.specs[adapter]
        self.active = [name for name in self.active if name != adapter]
        for child in self.children():
            if isinstance(child, (nn.ModuleDict, nn.ParameterDict)) and adapter in child:
                del child[adapter]

    @abstractmethod
    def role_parameters(self, adapter: str = ADAPTER) -> list[Trained]:
        """All that one adapter trains here."""

    def written(self, adapter: str) -> list[Trained]:
        """What a file of the adapter holds of this layer: what it trains, or what computes the same on the base as it is."""
        return self.role_parameters(adapter)

    def target(self, name: str) -> str:
        """What `find_targets` calls that which this layer, which stands at `name`, adapts."""
        return name

    def original(self, model: nn.Module, name: str) -> Tensor:
        """The weight that stands at `name`, where this layer is, in a plain copy of its model; `merged_weight` takes it."""
        return dense_weight(model.get_submodule(name))

    @abstractmethod
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """The weight of the plain module that computes the same, in the base's compute dtype.

        `weight` stands in for the frozen weight, e.g. the original 16-bit one of a quantised base.
        """

    @abstractmethod
    def merged(self, weight: Tensor | None = None) -> nn.Module:
        """The plain module that computes the same; its frozen parts are the base's own."""

    def unmergeable(self) -> str | None:
        """Why the active adapters cannot be folded into a plain module, None where they can."""
        return None

    def _registered(self, adapter: str, spec: Any) -> None:
        if adapter in self.specs:
            raise ValueError(f"there is an adapter {adapter!r} already")
        self.specs[adapter] = spec
        if len(self.specs) == 1:
            self.active, self.chosen = [adapter], [adapter]

    # transformers reaches adapter layers through these (`disable_adapters`, `set_adapter`, `save_pretrained`, ...).
    @property
    def active_adapter(self) -> list[str]:
        return self.chosen

    @property
    def active_adapters(self) -> list[str]:
        return self.chosen

    def enable_adapters(self, enabled: bool) -> None:
        self.enabled = enabled

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones: they apply, summed, and train (unless `inference_mode`); others rest.

        Those that this layer does not have stand in others.
        """
        self.chosen = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.active = [adapter for adapter in self.chosen if adapter in self.specs]
        for adapter in self.specs:
            for trained in self.role_parameters(adapter):
                trained.parameter.requires_grad_(adapter in self.active and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.chosen = [name for name in self.chosen if name != adapter_name]
        if adapter_name in self.specs:
            self.delete(adapter_name)

    def face(self) -> nn.Module:
        """The module whose attributes the surrounding model reads and writes here."""
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.face(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A layer keeps its own parameters in dicts: one that is set on it (by tie_weights, say) is meant for the module it stands for.
        if isinstance(value, nn.Parameter):
            setattr(self.face(), name, value)
        else:
            super().__setattr__(name, value)


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Every adapter layer of the model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def trainable_parameters(model: nn.Module) -> Iterator[RoleParameter]:
    """All that trains, with its role; what belongs to no adapter layer has the role "full"."""
    declared = {
        f"{name}.{trained.name}": trained.role
        for name, layer in adapter_layers(model).items()
        for adapter in layer.specs
        for trained in layer.role_parameters(adapter)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield RoleParameter(name, declared.get(name, "full"), parameter)


def by_file_key(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Trained]:
    """What one adapter trains, by its keys in peft's files: `<module>.lora_A.weight`, ..."""
    return {
        f"{name}.{trained.key}": trained
        for name, layer in adapter_layers(model).items()
        if adapter in layer.specs
        for trained in layer.role_parameters(adapter)
    }


def file_tensors(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Tensor]:
    """One adapter by its keys in peft's files, in the dtypes of the files; what is shared stands there under each of its keys."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, layer in adapter_layers(model).items():
        for trained in layer.written(adapter) if adapter in layer.specs else ():
            tensor = trained.parameter.detach().to(trained.dtype or trained.parameter.dtype).contiguous()
            found[f"{name}.{trained.key}"] = tensor.clone() if id(trained.parameter) in seen else tensor
            seen.add(id(trained.parameter))
    return found


def refuse_stacked_dora(layer: AdapterLayer, adapters: str | Sequence[str]) -> None:
    """Raises ValueError where a DoRA adapter of the layer is among several of it that shall be active together."""
    here = [layer.specs[name] for name in ([adapters] if isinstance(adapters, str) else adapters) if name in layer.specs]
    if len(here) > 1 and any(spec.dora for spec in here):
        raise ValueError("a DoRA adapter scales whole rows of the weight and cannot be stacked with others; make it active alone, or merge it")


def master_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of what trains beside `weight`: fp32, or fp64 beside fp64."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
