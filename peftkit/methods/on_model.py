"""Putting methods on a model and taking them off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftkit import quant
from peftkit.config import ConfigError, suggest
from peftkit.layers import ADAPTER, AdapterLayer, adapter_layers, output_head, share_inputs, swap, trainable_parameters, unadapted_3d
from peftkit.methods.base import Group, Handle, Method

_ATTRIBUTE = "_peftkit"


@dataclass
class Attachment:
    """What `attach` left on a model: the methods of every adapter, their handles, and what trained before."""

    by_adapter: dict[str, list[Method]] = field(default_factory=dict)
    handles: dict[str, Handle] = field(default_factory=dict)
    trained_before: list[str] = field(default_factory=list)

    @property
    def methods(self) -> list[Method]:
        """The methods of all adapters."""
        return [method for methods in self.by_adapter.values() for method in methods]


def attachment(model: nn.Module) -> Attachment:
    """The record that `attach` left. Raises ValueError where the model has no adapters."""
    found = vars(model).get(_ATTRIBUTE)
    if found is None:
        raise ValueError(f"this {type(model).__name__} has no peftkit adapters; call peftkit.attach first")
    return found


def check_methods(methods: Sequence[Method]) -> None:
    """Raises ConfigError where the methods of a list contradict each other."""
    for method in methods:
        if not isinstance(method, Method):
            raise ConfigError(f"expected methods such as peftkit.LoRA(r=8), got {method!r}")
    swapping = [type(method).__name__ for method in methods if method.swaps_layers]
    if len(swapping) > 1:
        raise ConfigError(f"{' and '.join(swapping)} would both replace the linear layers; keep one of them")
    repeated = [name for name, count in Counter(type(method).__name__ for method in methods).items() if count > 1]
    if repeated:
        raise ConfigError(f"{repeated[0]} stands twice in the list of methods; keep one")


def attach(model: nn.Module, methods: Method | Sequence[Method], adapter: str = ADAPTER) -> Summary:
    """Adapts `model` in place with one method or a list of them, and freezes all else. Returns what was done.

    The model keeps its class; `generate`, `save_pretrained`, transformers' Trainer and trl's SFTTrainer work on as before.
    A model that has adapters takes another one under another name; `set_adapter` then chooses between them.
    Raises ValueError where a target matches nothing or the adapter is there already (the model is then as it was).
    """
    methods = [methods] if isinstance(methods, Method) else list(methods)
    check_methods(methods)
    found = vars(model).get(_ATTRIBUTE)
    if getattr(model, "peft_config", None) and found is None:
        raise ValueError("this model already has peft adapters; unload or merge them first")
    if found is None and adapter_layers(model):
        raise ValueError("this model already has adapters; peftkit.detach or peftkit.merge them first")
    if found is not None:
        return _attach_another(model, methods, adapter)
    quant.protect(model)
    record = Attachment({adapter: methods}, trained_before=[name for name, p in model.named_parameters() if p.requires_grad])
    setattr(model, _ATTRIBUTE, record)
    try:
        model.requires_grad_(False)
        for method in methods:
            handle = method.attach(model, adapter)
            if handle is not None:
                record.handles[type(method).__name__] = handle
        _open_doors(model, methods, adapter)
        return describe(model)
    except BaseException:
        detach(model)
        raise


def _attach_another(model: nn.Module, methods: list[Method], adapter: str) -> Summary:
    record = attachment(model)
    if adapter in record.by_adapter:
        raise ValueError(
            f"this model already has adapters, one of them named {adapter!r}; attach under another name (adapter=...), or peftkit.detach, "
            "peftkit.merge or peftkit.delete_adapter it first"
        )
    if "/" in adapter or "." in adapter or not adapter:
        raise ValueError(f"an adapter's name is part of parameter and file names: {adapter!r} must not be empty or hold '.' or '/'")
    lasting = [type(method).__name__ for method in methods if type(method).__name__ in record.handles]
    if lasting:
        raise ValueError(f"{lasting[0]} is on this model already and acts whichever adapter is active; leave it out here")
    active = active_adapters(model)
    record.by_adapter[adapter] = methods
    try:
        for method in methods:
            handle = method.attach(model, adapter)
            if handle is not None:
                record.handles[type(method).__name__] = handle
        _open_doors(model, methods, adapter)
        set_adapter(model, active)
        return describe(model)
    except BaseException:
        delete_adapter(model, adapter)
        raise


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that apply."""
    active = {name for layer in adapter_layers(model).values() if layer.enabled for name in layer.active}
    return [name for name in attachment(model).by_adapter if name in active]


def set_adapter(model: nn.Module, adapters: str | Sequence[str]) -> None:
    """Chooses the adapters that apply and train: one, several (their updates are summed), or none (an empty list).

    Raises ValueError for an unknown name, with the known ones, and where a DoRA adapter would be stacked.
    """
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    record = attachment(model)
    for name in names:
        if name not in record.by_adapter:
            raise ValueError(f"unknown adapter {name!r}{suggest(name, record.by_adapter)} (there are: {', '.join(record.by_adapter)})")
    layers = adapter_layers(model)
    before = {name: layer.active for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.set_adapter([name for name in names if name in layer.specs])
    except BaseException:
        for name, layer in layers.items():
            layer.set_adapter(before[name])
        raise


def delete_adapter(model: nn.Module, adapter: str) -> None:
    """Takes one adapter off, its parameters included; a module that has no other is the plain one again.

    Raises ValueError for an unknown name. Without the last adapter the model is the base, as after `detach`.
    """
    record = attachment(model)
    if adapter not in record.by_adapter:
        raise ValueError(f"unknown adapter {adapter!r}{suggest(adapter, record.by_adapter)} (there are: {', '.join(record.by_adapter)})")
    if len(record.by_adapter) == 1:
        detach(model)
        return
    for name, layer in adapter_layers(model).items():
        if adapter in layer.specs:
            layer.delete(adapter)
        if not layer.specs:
            swap(model, name, layer.base_layer)
    share_inputs(model)
    kept = {type(method).__name__ for name, methods in record.by_adapter.items() if name != adapter for method in methods}
    del record.by_adapter[adapter]
    for name in [name for name in record.handles if name not in kept]:
        record.handles.pop(name).remove()
    if isinstance(getattr(model, "peft_config", None), dict):
        model.peft_config.pop(adapter, None)  # type: ignore[union-attr, operator]


def _open_doors(model: Any, methods: Sequence[Method], adapter: str) -> None:
    """Makes the model known to transformers as one that carries adapters.

    Trainer and SFTTrainer train a quantised model only where `_hf_peft_config_loaded` is set; `save_pretrained` then asks
    `peft_config` and the layers for the adapter, by peft's names.
    """
    swapping = [method for method in methods if method.swaps_layers]
    if not swapping or not hasattr(model, "add_adapter"):  # not a transformers model
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    BaseTunerLayer.register(AdapterLayer)  # type: ignore[type-abstract]
    targets = sorted(name for name, layer in adapter_layers(model).items() if adapter in layer.specs)
    configs = vars(model).get("peft_config") or {}
    model.peft_config = configs | {adapter: swapping[0].peft_config(targets, model)}
    model._hf_peft_config_loaded = True


def forget(model: nn.Module) -> None:
    """Takes the record, the handles and the marks for transformers off the model; adapter layers are the caller's."""
    record = attachment(model)
    for handle in record.handles.values():
        handle.remove()
    delattr(model, _ATTRIBUTE)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(model):
            delattr(model, name)


def detach(model: nn.Module) -> nn.Module:
    """Takes the adapters off again: the base model, bit for bit, training what it trained before."""
    record = attachment(model)
    for name, layer in adapter_layers(model).items():
        swap(model, name, layer.base_layer)
    forget(model)
    trained = set(record.trained_before)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)
    return model


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes what its frozen base computes."""
    layers = list(adapter_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enable_adapters(enabled)


@dataclass(frozen=True)
class Summary:
    """What was adapted, what trains, what it costs."""

    methods: list[str]
    """Of the active adapters."""
    adapters: dict[str, bool]
    """Name of the adapter -> whether it is active."""
    modules: dict[str, int]
    """Name ending of the adapted linears -> how many of them."""
    trainable: dict[str, int]
    """Role -> trained parameters."""
    total_parameters: int
    """Parameters of the base, 4-bit ones counted as the parameters they stand for."""
    quantized: int
    """How many linears are quantised."""
    left_out: list[str]
    rates: dict[str, float]
    """Role -> its learning rate over the base rate."""

    @property
    def trainable_parameters(self) -> int:
        return sum(self.trainable.values())

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        modules = ", ".join(f"{ending} x{count}" for ending, count in self.modules.items()) or "none"
        rates = {role: f" at {rate:g} x the learning rate" if rate != 1 else "" for role, rate in self.rates.items()}
        roles = ", ".join(f"{role} {count:,}{rates.get(role, '')}" for role, count in self.trainable.items()) or "nothing"
        lines = [
            f"methods    {', '.join(self.methods)}",
            f"adapted    {sum(self.modules.values())} linears: {modules}" + (f" ({self.quantized} of the model's linears quantised)" if self.quantized else ""),
            f"trains     {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2f}%): {roles}",
        ]  # fmt: skip
        if len(self.adapters) > 1:
            lines.append("adapters   " + ", ".join(f"{name}{' (active)' if active else ''}" for name, active in self.adapters.items()))
        return "\n".join(lines + [f"left out   {note}" for note in self.left_out])


def describe(model: nn.Module) -> Summary:
    """What the adapters on this model are; printed, it tells what trains and what was left out."""
    record = attachment(model)
    layers = adapter_layers(model)
    trainable: Counter[str] = Counter()
    for _, role, parameter in trainable_parameters(model):
        trainable[role] += parameter.numel()
    groups: list[Group] = [{"role": role, "params": [], "lr": 1.0, "weight_decay": 0.0} for role in trainable]
    active = active_adapters(model) or list(record.by_adapter)
    methods = [method for adapter in active for method in record.by_adapter[adapter]]
    for method in methods:
        groups = method.param_groups(groups)
    own = {id(trained.parameter) for layer in layers.values() for adapter in layer.specs for trained in layer.role_parameters(adapter)}
    total = sum(_stands_for(parameter) for parameter in model.parameters() if id(parameter) not in own)
    left_out = []
    head = output_head(model)
    if layers and head is not None and not isinstance(head, AdapterLayer):
        name = next((name for name, module in model.named_modules() if module is head), "the output head")
        left_out.append(f"{name} (output head; name it in target_modules to adapt it)")
    experts = unadapted_3d(model)
    if experts:
        left_out.append(f"{len(experts)} expert tensors of {sum(experts.values()):,} bytes, such as {next(iter(experts))}: neither adapted nor quantised")
    return Summary(
        methods=[type(method).__name__ for method in methods],
        adapters={adapter: adapter in active for adapter in record.by_adapter},
        modules=dict(Counter(name.rsplit(".", 1)[-1] for name in layers)),
        trainable=dict(trainable),
        total_parameters=total,
        quantized=len(quant.quantized_modules(model)),
        left_out=left_out,
        rates={group["role"]: group["lr"] for group in groups},
    )


def _stands_for(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
