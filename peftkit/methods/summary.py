"""What the adapters on a model are, what trains, and the optimizer groups it trains in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from peftkit import quant
from peftkit.layers import LAYERS, AdapterLayer, Experts4bit, adapter_layers, left_out_experts, left_out_linears, notes, output_head, trainable_parameters
from peftkit.methods.base import Attachment, Group


@dataclass(frozen=True)
class Summary:
    """What was adapted, what trains, what it costs."""

    methods: list[str]
    """Of the active adapters."""
    adapters: dict[str, bool]
    """Name of the adapter -> whether it is active."""
    modules: dict[str, int]
    """Name ending of the adapted modules -> how many of them."""
    kind: str
    """What they are: linears, or modules where there are others too."""
    trainable: dict[str, int]
    """Role -> trained parameters; where several adapters are active, role and adapter."""
    total_parameters: int
    """Parameters of the base, 4-bit ones counted as the parameters they stand for."""
    quantized: int
    """How many linears are quantised."""
    left_out: list[str]
    notes: list[str]
    """What is particular about embeddings, heads and copies here."""
    rates: dict[str, float]
    """The same -> its learning rate over the base rate."""

    @property
    def trainable_parameters(self) -> int:
        return sum(self.trainable.values())

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        modules = ", ".join(f"{ending} x{count}" for ending, count in self.modules.items()) or "none"
        rates = {role: f" at {rate:g} x the learning rate" if rate != 1 else "" for role, rate in self.rates.items()}
        roles = ", ".join(f"{role} {count:,}{rates.get(role, '')}" for role, count in self.trainable.items()) or "nothing"
        quantized = f" ({self.quantized} of the model's linears quantised)" if self.quantized else ""
        lines = [
            f"methods    {', '.join(self.methods)}",
            f"adapted    {sum(self.modules.values())} {self.kind}: {modules}{quantized}",
            f"trains     {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2f}%): {roles}",
        ]  # fmt: skip
        if len(self.adapters) > 1:
            lines.append("adapters   " + ", ".join(f"{name}{' (active)' if active else ''}" for name, active in self.adapters.items()))
        return "\n".join(lines + [f"left out   {note}" for note in self.left_out] + [f"note       {note}" for note in self.notes])


def parameter_groups(model: nn.Module, record: Attachment | None, learning_rate: float, weight_decay: float) -> list[Group]:
    """One optimizer group per adapter and role of what trains, as the methods of that adapter want them.

    What belongs to no adapter is in groups of its own, whose adapter is None; what belongs to one that `record` does not know trains as it stands.
    """
    layers = adapter_layers(model).values()
    owners = {id(trained.parameter): adapter for layer in layers for adapter in layer.specs for trained in layer.role_parameters(adapter)}
    groups: dict[tuple[str | None, str], Group] = {}
    for _, role, parameter in trainable_parameters(model):
        key = (owners.get(id(parameter)), role)
        fresh: Group = {"adapter": key[0], "role": role, "params": [], "lr": learning_rate, "weight_decay": weight_decay}
        groups.setdefault(key, fresh)["params"].append(parameter)
    found = [group for (adapter, _), group in groups.items() if adapter is None]
    chosen = {name for layer in layers for name in layer.chosen}
    for adapter, methods in (record.by_adapter if record is not None else {}).items():
        own = [group for group in groups.values() if group["adapter"] == adapter]
        if adapter in chosen or not any(method.swaps_layers for method in methods):  # one that rests has no groups to ask for
            for method in methods:
                own = method.param_groups(own)
        found += own
    known = record.by_adapter if record is not None else {}
    return found + [group for (adapter, _), group in groups.items() if adapter is not None and adapter not in known]


def summarise(model: nn.Module, record: Attachment) -> Summary:
    """The summary of a model and of the record that `attach` left on it."""
    layers = adapter_layers(model)
    chosen = {name for layer in layers.values() for name in layer.chosen}
    active = [adapter for adapter in record.by_adapter if adapter in chosen]
    groups = parameter_groups(model, record, 1.0, 0.0)
    labels = [group["role"] if len(active) < 2 or group["adapter"] is None else f"{group['role']} of {group['adapter']}" for group in groups]
    own = {id(trained.parameter) for layer in layers.values() for adapter in layer.specs for trained in layer.role_parameters(adapter)}
    packed = [module for module in model.modules() if isinstance(module, Experts4bit)]
    total = sum(_stands_for(parameter) for parameter in model.parameters() if id(parameter) not in own)
    total += sum(module.stands_for() - module.bytes() for module in packed)
    left_out = []
    head = output_head(model)
    if layers and head is not None and not isinstance(head, AdapterLayer):
        name = next((name for name, module in model.named_modules() if module is head), "the output head")
        left_out.append(f"{name} (output head; name it in target_modules to adapt it)")
    left_out += left_out_experts(model) + left_out_linears(model)
    return Summary(
        methods=[type(method).__name__ for adapter in active or record.by_adapter for method in record.by_adapter[adapter]],
        adapters={adapter: adapter in active for adapter in record.by_adapter},
        modules=dict(Counter(layer.target(name).rsplit(".", 1)[-1] for name, layer in layers.items() if type(layer) in LAYERS)),
        kind="linears" if all(layer.in_all_linear for layer in layers.values() if type(layer) in LAYERS) else "modules",
        trainable={label: sum(parameter.numel() for parameter in group["params"]) for label, group in zip(labels, groups, strict=True)},
        total_parameters=total,
        quantized=len(quant.quantized_modules(model)),
        left_out=left_out,
        notes=notes(model) if layers else [],
        rates={label: group["lr"] for label, group in zip(labels, groups, strict=True)},
    )


def _stands_for(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
