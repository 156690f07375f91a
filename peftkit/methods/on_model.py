"""Putting methods on a model and taking them off again."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from peftkit import quant
from peftkit.config import ConfigError, suggest
from peftkit.layers import ADAPTER, AdapterLayer, adapter_layers, file_tensors, share_inputs, swap
from peftkit.methods.base import Attachment, Method
from peftkit.methods.summary import Summary, summarise

_ATTRIBUTE = "_peftkit"
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def find_attachment(model: nn.Module) -> Attachment | None:
    """The record that `attach` left on a model, None where there is none."""
    record: Attachment | None = vars(model).get(_ATTRIBUTE)
    if record is not None:
        held = {adapter for layer in adapter_layers(model).values() for adapter in layer.specs}
        for adapter, methods in list(record.by_adapter.items()):
            if adapter not in held and any(method.swaps_layers for method in methods):
                _take_off(model, record, adapter)  # transformers' own delete_adapter emptied its layers
    return vars(model).get(_ATTRIBUTE)


def attachment(model: nn.Module) -> Attachment:
    """The record that `attach` left. Raises ValueError where the model has no adapters."""
    found = find_attachment(model)
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
    A model that has adapters takes another one under another name, which rests until `set_adapter` chooses it; only where no
    other is active it is active at once. Raises ValueError where a target matches nothing or the adapter is there already (the
    model is then as it was).
    """
    methods = list(methods) if isinstance(methods, (list, tuple)) else [methods]  # type: ignore[list-item]  # anything else is told by `check_methods`
    check_methods(methods)
    if isinstance(model, WRAPPERS) or "_orig_mod" in model._modules:
        raise ValueError(f"this {type(model).__name__} stands around the model: attach to the model itself, then compile it or share it out")
    record = find_attachment(model)
    if record is None and getattr(model, "peft_config", None):
        raise ValueError("this model already has peft adapters; unload or merge them first")
    if record is None and adapter_layers(model):
        raise ValueError("this model already has adapters; peftkit.detach or peftkit.merge them first")
    _check_name(model, record, adapter)
    lasting = [type(method).__name__ for method in methods if record is not None and type(method).__name__ in record.handles]
    if lasting:
        raise ValueError(f"{lasting[0]} is on this model already and acts whichever adapter is active; leave it out here")
    if record is None:
        quant.protect(model)
        record = Attachment(trained_before=[name for name, p in model.named_parameters() if p.requires_grad])
        setattr(model, _ATTRIBUTE, record)
    before = _chosen(model)
    record.by_adapter[adapter] = methods
    try:
        if len(record.by_adapter) == 1:
            model.requires_grad_(False)
        for method in methods:
            handle = method.attach(model, adapter)
            if handle is not None:
                record.handles[type(method).__name__] = handle
        _open_doors(model, methods, adapter)
        _choose(model, before or [adapter])
        return summarise(model, record)
    except BaseException:
        _take_off(model, record, adapter)
        raise


def _check_name(model: nn.Module, record: Attachment | None, adapter: str) -> None:
    if record is not None and adapter in record.by_adapter:
        raise ValueError(
            f"this model already has adapters, one of them named {adapter!r}; attach under another name (adapter=...), or peftkit.detach, "
            "peftkit.merge or peftkit.delete_adapter it first"
        )
    if not adapter or "." in adapter or "/" in adapter:
        raise ValueError(f"an adapter's name is part of parameter and file names: {adapter!r} must not be empty or hold '.' or '/'")
    # peft and transformers find an adapter's parameters by its name between two dots.
    if adapter in {part for name, _ in model.named_modules() for part in name.split(".")} or adapter in dir(nn.ModuleDict):
        raise ValueError(f"the adapter cannot be named {adapter!r}: modules of the model or of torch have that name")


def _take_off(model: nn.Module, record: Attachment, adapter: str) -> None:
    """Undoes `attach` of one adapter; with the last one the model is what it was before the first."""
    for name, layer in reversed(adapter_layers(model).items()):  # what wraps another layer, after it
        layer.delete_adapter(adapter)
        if not layer.specs:
            swap(model, name, layer.base_layer)
    share_inputs(model)
    del record.by_adapter[adapter]
    kept = {type(method).__name__ for method in record.methods}
    for name in [name for name in record.handles if name not in kept]:
        record.handles.pop(name).remove()
    configs = vars(model).get("peft_config")
    if isinstance(configs, dict):
        configs.pop(adapter, None)
    if not record.by_adapter:
        forget(model)
        for name, parameter in model.named_parameters():
            if name in record.trained_before:
                parameter.requires_grad_(True)


def _chosen(model: nn.Module) -> list[str]:
    """The adapters that apply unless they are disabled."""
    return list(dict.fromkeys(name for layer in adapter_layers(model).values() for name in layer.chosen))


def _choose(model: nn.Module, adapters: Sequence[str]) -> None:
    layers = adapter_layers(model)
    before = {name: layer.chosen for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.set_adapter([adapter for adapter in adapters if adapter in layer.specs])
            layer.chosen = list(adapters)
    except BaseException:
        for name, layer in layers.items():
            layer.set_adapter([adapter for adapter in before[name] if adapter in layer.specs])
            layer.chosen = before[name]
        raise


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that apply now."""
    attachment(model)
    return _chosen(model) if any(layer.enabled for layer in adapter_layers(model).values()) else []


def set_adapter(model: nn.Module, adapters: str | Sequence[str]) -> None:
    """Chooses the adapters that apply and train: one, several (their updates are summed), or none (an empty list).

    Raises ValueError for an unknown name, with the known ones, and where a DoRA adapter would be stacked.
    """
    names = [adapters] if isinstance(adapters, str) else list(dict.fromkeys(adapters))
    for name in names:
        _known(attachment(model), name)
    _choose(model, names)


def delete_adapter(model: nn.Module, adapter: str) -> None:
    """Takes one adapter off, its parameters included; a module that has no other is the plain one again.

    No other adapter becomes active in its place. Without the last adapter the model is the base, as after `detach`. Raises
    ValueError for an unknown name, with the known ones.
    """
    record = attachment(model)
    _known(record, adapter)
    _take_off(model, record, adapter)


def _known(record: Attachment, adapter: str) -> None:
    if adapter not in record.by_adapter:
        raise ValueError(f"unknown adapter {adapter!r}{suggest(adapter, record.by_adapter)} (there are: {', '.join(record.by_adapter)})")


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
    model.peft_config = configs | {adapter: swapping[0].peft_config(targets, model, adapter)}
    model._hf_peft_config_loaded = True
    # peft would pick the adapter's tensors by its own classes: modules trained as a whole and rows of embeddings would be left out.
    model.get_adapter_state_dict = partial(_adapter_state_dict, model)


def _adapter_state_dict(model: nn.Module, adapter_name: str | None = None, state_dict: dict[str, Any] | None = None) -> dict[str, Any]:
    """The active adapter, or the one named, as transformers' `save_pretrained` writes it."""
    chosen = _chosen(model)  # disabled or not: what would apply
    if adapter_name is None and not chosen:
        raise ValueError("no adapter is active, so there is none to save; choose one with peftkit.set_adapter, or use peftkit.save_adapter(adapter=...)")
    return file_tensors(model, adapter_name or chosen[0])


def forget(model: nn.Module) -> None:
    """Takes the record, the handles and the marks for transformers off the model; adapter layers are the caller's."""
    record: Attachment = vars(model)[_ATTRIBUTE]
    for handle in record.handles.values():
        handle.remove()
    delattr(model, _ATTRIBUTE)
    for name in ("peft_config", "_hf_peft_config_loaded", "get_adapter_state_dict"):
        if name in vars(model):
            delattr(model, name)


def detach(model: nn.Module) -> nn.Module:
    """Takes all adapters off again: the base model, bit for bit, training what it trained before."""
    record = attachment(model)
    for adapter in list(record.by_adapter):
        _take_off(model, record, adapter)
    return model


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes what its frozen base computes, without NEFTune's noise too; peft's adapters, adopted or not, rest as well.

    Raises ValueError where the model has no adapters.
    """
    record, theirs = find_attachment(model), _peft_layers(model)
    layers = list(adapter_layers(model).values())
    if record is None and not layers and not theirs:
        attachment(model)
    handles = list(record.handles.values()) if record is not None else []
    before, acted, resting = [layer.enabled for layer in layers], [handle.enabled for handle in handles], [layer.disable_adapters for layer in theirs]
    training = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer in (*layers, *theirs):
        layer.enable_adapters(False)
    for handle in handles:
        handle.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enable_adapters(enabled)
        for layer, rests in zip(theirs, resting, strict=True):
            layer.enable_adapters(not rests)
        for handle, enabled in zip(handles, acted, strict=True):
            handle.enabled = enabled
        for parameter, trains in training:  # which peft changes along
            parameter.requires_grad_(trains)


def _peft_layers(model: nn.Module) -> list[Any]:
    """peft's own layers on a model, none where peft was never imported."""
    tuners, others = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is None or others is None:
        return []
    kinds = (tuners.BaseTunerLayer, others.AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds) and not isinstance(module, AdapterLayer)]


def describe(model: nn.Module) -> Summary:
    """What the adapters on this model are; printed, it tells what trains and what was left out."""
    return summarise(model, attachment(model))
