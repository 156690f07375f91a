"""The methods by their recipe names. A new method is one file here and one line in REGISTRY."""

from __future__ import annotations

from typing import Any

from peftkit.config import ConfigError, Source, suggest, validate
from peftkit.methods.base import Attachment, Group, Handle, Method
from peftkit.methods.dora import DoRA
from peftkit.methods.lora import LoRA
from peftkit.methods.loraplus import LoRAPlus
from peftkit.methods.neftune import NEFTune
from peftkit.methods.on_model import (
    active_adapters,
    adapters_disabled,
    attach,
    attachment,
    check_methods,
    delete_adapter,
    describe,
    detach,
    find_attachment,
    set_adapter,
)
from peftkit.methods.qlora import QLoRA
from peftkit.methods.summary import Summary, parameter_groups

REGISTRY: dict[str, type[Method]] = {
    "lora": LoRA,
    "dora": DoRA,
    "qlora": QLoRA,
    "loraplus": LoRAPlus,
    "neftune": NEFTune,
}


def method_name(method: Method) -> str:
    """The name of a method in recipes."""
    return next(name for name, cls in REGISTRY.items() if type(method) is cls)


def to_recipe(methods: list[Method]) -> list[dict[str, Any]]:
    """The methods as they stand in a recipe: [{"lora": {"r": 8, ...}}, ...]."""
    return [{method_name(method): method.model_dump()} for method in methods]


def from_recipe(entries: Any, source: Source | None = None) -> list[Method]:
    """The methods of a recipe's `methods` list. Raises ConfigError for an unknown name or key, with the nearest one."""
    source = source or Source({"methods": entries}, "methods")
    if not isinstance(entries, list):
        raise ConfigError(source.problem(("methods",), f"expected a list such as [{{lora: {{r: 8}}}}], got {entries!r}"))
    methods = []
    for i, entry in enumerate(entries):
        at = ("methods", i)
        entry = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ConfigError(source.problem(at, f"expected one method such as 'lora: {{r: 8}}', got {entry!r}"))
        [(name, fields)] = entry.items()
        if name not in REGISTRY:
            raise ConfigError(source.problem(at, f"unknown method {name!r}{suggest(name, REGISTRY)} (there are: {', '.join(REGISTRY)})"))
        methods.append(REGISTRY[name]() if fields in (None, {}) else validate(REGISTRY[name], source, at=(*at, name)))
    try:
        check_methods(methods)
    except ConfigError as error:
        raise ConfigError(source.problem(("methods",), str(error))) from error
    return methods


__all__ = [
    "REGISTRY",
    "Attachment",
    "DoRA",
    "Group",
    "Handle",
    "LoRA",
    "LoRAPlus",
    "Method",
    "NEFTune",
    "QLoRA",
    "Summary",
    "active_adapters",
    "adapters_disabled",
    "attach",
    "attachment",
    "check_methods",
    "delete_adapter",
    "describe",
    "detach",
    "find_attachment",
    "from_recipe",
    "method_name",
    "parameter_groups",
    "set_adapter",
    "to_recipe",
]
