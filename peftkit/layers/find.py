"""Finding the modules to adapt, and putting others in their place."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from peftkit.layers.base import AdapterLayer
from peftkit.layers.kinds import layer_class


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that an adapter layer can stand for or already stands for, by name; nothing inside those."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and (isinstance(module, AdapterLayer) or layer_class(module) is not None):
            found[name] = module
    return found


def find_targets(model: nn.Module, targets: str | list[str], exclude: str | list[str] | None = None) -> dict[str, nn.Module]:
    """The modules to adapt, by name.

    `targets` is "all-linear" (every linear but the output head), a list of names or name endings, or a regular
    expression for the whole name. Raises ValueError, with near names, where it or one of its entries matches nothing.
    """
    there = candidates(model)
    if targets == "all-linear":
        head = output_head(model)
        found = {name: module for name, module in there.items() if _in_all_linear(module) and module is not head}
        if not found:
            raise ValueError(f"{type(model).__name__} holds no linear layer that could be adapted")
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        found = {}
        for pattern in patterns:
            matches = {name: m for name, m in there.items() if _matches(name, pattern, regex=isinstance(targets, str))}
            if not matches:
                raise ValueError(_nothing_matches(pattern, there))
            found |= matches
    excluded = [exclude] if isinstance(exclude, str) else exclude or []
    for pattern in excluded:
        if not any(_matches(name, pattern, regex=isinstance(exclude, str)) for name in there):
            raise ValueError("exclude_modules: " + _nothing_matches(pattern, there))
    found = {n: m for n, m in found.items() if not any(_matches(n, p, regex=isinstance(exclude, str)) for p in excluded)}
    if not found:
        raise ValueError("target_modules and exclude_modules together leave no module to adapt")
    return found


def _in_all_linear(module: nn.Module) -> bool:
    kind = type(module) if isinstance(module, AdapterLayer) else layer_class(module)
    return kind is not None and kind.in_all_linear


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits, where the model names one."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if getter else None


def _matches(name: str, pattern: str, regex: bool) -> bool:
    if regex and re.fullmatch(pattern, name):
        return True
    return name == pattern or name.endswith(f".{pattern}")


def _nothing_matches(pattern: str, there: dict[str, nn.Module]) -> str:
    from peftkit.config import suggest

    endings = sorted({name.rsplit(".", 1)[-1] for name in there})
    return f"target {pattern!r} matches no layer that can be adapted{suggest(pattern, endings)} (there are: {', '.join(endings) or 'none'})"


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where the submodule `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)


def unadapted_3d(model: nn.Module) -> dict[str, int]:
    """Frozen parameters of three or more dimensions (experts of MoE models) that no linear holds: name -> bytes."""
    return {
        name: parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not parameter.requires_grad
    }
