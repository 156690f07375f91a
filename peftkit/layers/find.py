"""Finding the modules to adapt, and putting others in their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from peftkit.layers.base import AdapterLayer
from peftkit.layers.frozen import is_router
from peftkit.layers.kinds import layer_class


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that an adapter layer can stand for or already stands for, by name; nothing inside those.

    A module whose parameters are adapted one by one (experts) stands there by the name of each of them.
    """
    found: dict[str, nn.Module] = {}
    taken: list[str] = []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is not None and not any(name.startswith(f"{outer}.") for outer in taken):
            taken.append(name)
            found |= {f"{name}.{part}": module for part in kind.parts(module)} or {name: module}
    return found


def _kind(module: nn.Module) -> type[AdapterLayer] | None:
    return type(module) if isinstance(module, AdapterLayer) else layer_class(module)


def find_targets(model: nn.Module, targets: str | list[str], exclude: str | list[str] | None = None) -> dict[str, nn.Module]:
    """The modules to adapt, by name; experts by the name of each of their parameters, and found by their own name too.

    `targets` is "all-linear" (every linear but the head), a list of names or name endings, or a regular
    expression for the whole name. Raises ValueError, with near names, where it or one of its entries matches nothing.
    """
    there = candidates(model)
    if targets == "all-linear":
        left, head = [*heads(model), *written_to(model)], output_head(model)
        found = {n: m for n, m in there.items() if _in_all_linear(m) and m is not head and n not in left and not inside(n, left)}
        if not found:
            raise ValueError(f"{type(model).__name__} holds no linear layer that could be adapted")
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        found = {}
        for pattern in patterns:
            matches = {name: m for name, m in there.items() if _matches(name, m, pattern, regex=isinstance(targets, str))}
            if not matches:
                raise ValueError(_nothing_matches(pattern, there))
            found |= matches
    excluded = [exclude] if isinstance(exclude, str) else exclude or []
    for pattern in excluded:
        if not any(_matches(name, m, pattern, regex=isinstance(exclude, str)) for name, m in there.items()):
            raise ValueError("exclude_modules: " + _nothing_matches(pattern, there))
    # In the order of the model, which decides how layers around parameters of one module nest.
    found = {n: m for n, m in there.items() if n in found and not any(_matches(n, m, p, regex=isinstance(exclude, str)) for p in excluded)}
    if not found:
        raise ValueError("target_modules and exclude_modules together leave no module to adapt")
    return found


def _in_all_linear(module: nn.Module) -> bool:
    kind = _kind(module)
    return kind is not None and kind.in_all_linear


def adapt(model: nn.Module, name: str, module: nn.Module, adapter: str, spec: Any) -> None:
    """Adds an adapter to one of the targets of `find_targets`, with an adapter layer around it where there is none yet.

    Raises ValueError where the module's weights are elsewhere.
    """
    if any(parameter.is_meta for parameter in module.parameters()):  # arithmetic with those of an adapter made there gives whatever lies in memory
        raise ValueError(f"{name}: its weights are offloaded, or were never loaded (meta device); load the model onto one device, then attach")
    kind: Any = _kind(module)
    owner, _, part = name.rpartition(".") if kind.parts(module) else (name, "", "")
    standing = layer = model.get_submodule(owner)
    while isinstance(layer, AdapterLayer) and layer.part != part:
        layer = layer.base_layer
    if not isinstance(layer, AdapterLayer):
        others = set(standing.specs) - {adapter} if isinstance(standing, AdapterLayer) else set()
        if others:  # in their files the layers would nest otherwise
            raise ValueError(f"{name}: {' and '.join(sorted(others))} does not adapt {part!r}; adapters of one model adapt the same parameters of experts")
        layer = kind(standing, part) if part else kind(standing)
        swap(model, owner, layer)
    layer.add(adapter, spec)


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits, where the model names one."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if getter else None


def standing(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every submodule with its name, adapter layers as one module each."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        yield full, child
        if not isinstance(child, AdapterLayer):
            yield from standing(child, full)


_CLASSIFIES = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")
_HEADS = ("classifier", "score", "qa_outputs")  # where a model does not separate its body


def heads(model: nn.Module) -> list[str]:
    """Names of the modules that a classification model has beside its body, and that no pretraining has made."""
    if not _CLASSIFIES.search(type(model).__name__):
        return []
    body = getattr(model, "base_model", model)
    children = [(name, child) for name, child in model.named_children() if any(True for _ in child.parameters())]
    return [name for name, child in children if (name in _HEADS if body is model else child is not body)]


def inside(name: str, others: Iterable[str]) -> bool:
    """Whether the module `name` is part of one of the others."""
    return any(name.startswith(f"{other}.") for other in others)


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that embeds the inputs, where the model names one."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_input_embeddings", None)
    try:
        return getter() if getter else None
    except NotImplementedError:  # transformers' answer for speech models, which have none
        return None


def sharing_embeddings(model: nn.Module, embedding: nn.Module) -> list[str]:
    """Names of the other embeddings that have the weight of this one: encoder and decoder of T5 and BART have that of `shared`, which nothing calls."""
    weight = embedding.weight
    there = ((name, module.face() if isinstance(module, AdapterLayer) else module) for name, module in standing(model))
    return [name for name, module in there if isinstance(module, nn.Embedding) and module is not embedding and module.weight is weight]


_WRITTEN_TO = {"Gemma3nTextAltUp": ("prediction_coefs", "correction_coefs"), "RwkvSelfAttention": ("output",), "RwkvFeedForward": ("value",)}


def written_to(model: nn.Module) -> list[str]:
    """Names of linears whose frozen weight their model itself writes to when it runs, by clamping or rescaling it."""
    owners = [(name, _WRITTEN_TO.get(type(module).__name__, ())) for name, module in model.named_modules()]
    return [f"{name}.{child}" if name else child for name, children in owners for child in children]


def left_out_linears(model: nn.Module) -> list[str]:
    """Lines for torch's own attention modules, which call none of their linears, and for linears that are none to adapters."""
    attention = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    linears = [(name, module) for name, module in standing(model) if isinstance(module, nn.Linear)]
    computed = [name for name, module in linears if "weight" not in module._parameters]
    routers = [name for name, module in linears if is_router(module)]
    written = [name for name in written_to(model) if name in dict(linears)]
    lines = []
    if attention:
        lines.append(f"{len(attention)} nn.MultiheadAttention, such as {attention[0]}: its projections are no linears that are called, and not adapted")
    for names, what in (
        (computed, "whose weight is computed in each call (weight norm, spectral norm)"),
        (routers, "which route and give more than a product"),
        (written, "whose weight the model itself writes to"),
    ):
        if names:
            lines.append(f"{len(names)} linears, such as {names[0]}, {what}: not adapted")
    return lines


def _matches(name: str, module: nn.Module, pattern: str, regex: bool) -> bool:
    kind = _kind(module)
    names = [name, name.rpartition(".")[0]] if kind is not None and kind.parts(module) else [name]
    try:
        return any(name == pattern or name.endswith(f".{pattern}") or (regex and re.fullmatch(pattern, name)) for name in names)
    except re.error as error:
        raise ValueError(f"target {pattern!r} is no regular expression ({error}); escape it, or give a list of name endings") from error


def _nothing_matches(pattern: str, there: dict[str, nn.Module]) -> str:
    from peftkit.config import suggest

    endings = sorted({name.rsplit(".", 1)[-1] for name in there})
    return f"target {pattern!r} matches no layer that can be adapted{suggest(pattern, endings)} (there are: {', '.join(endings) or 'none'})"


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where the submodule `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)
