"""What trains beside the low-rank updates of an adapter: finding the modules and embeddings, and putting the layers in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from peftkit import quant
from peftkit.layers.base import AdapterLayer
from peftkit.layers.embedding import refuse_embedding
from peftkit.layers.find import heads, input_embedding, inside, output_head, standing, swap
from peftkit.layers.saved import Saved, SavedModule, Tokens, TrainedTokens


def find_whole(model: nn.Module, patterns: Sequence[str], tie: bool) -> dict[str, bool]:
    """The modules to train as a whole, by name: those that the names or name endings match, nothing inside others.

    With `tie`, modules that share a weight with them come along; the value says that a module is there for that alone.
    Raises ValueError where an entry matches nothing, or matches what cannot be trained as a copy.
    """
    from peftkit.config import suggest

    there = dict(standing(model))
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matches = {name: module for name, module in there.items() if name == pattern or name.endswith(f".{pattern}")}
        if not matches:
            endings = sorted({name.rsplit(".", 1)[-1] for name in there})
            raise ValueError(f"modules_to_save: {pattern!r} matches no module of this {type(model).__name__}{suggest(pattern, endings)}")
        found |= matches
    named = [name for name in found if not inside(name, found)]
    along = []
    if tie:
        shared = {id(parameter) for name in named for parameter in _frozen(found[name]).parameters()}
        related = [name for name in there if name in named or inside(name, named) or any(inside(other, [name]) for other in named)]
        along = [name for name, module in there.items() if name not in related and _holds(module, shared)]
    for name in [*named, *along]:
        if reason := _not_a_copy(there[name]):
            raise ValueError(f"modules_to_save: {name} {reason}")
    return dict.fromkeys(named, False) | dict.fromkeys(along, True)


def _not_a_copy(module: nn.Module) -> str | None:
    """Why a module cannot be trained as a copy."""
    if isinstance(module, SavedModule):
        return None
    if any(isinstance(child, AdapterLayer) for child in module.modules()):
        return "carries an adapter already; name it once, and train it in the same way under every adapter"
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return f"is a {type(module).__name__}, which is never called itself; name the modules in it"
    if not SavedModule.stands_for(module):
        return "holds no parameters"
    if any(quant.is_quantized(child) for child in module.modules()) or not all(p.is_floating_point() for p in module.parameters()):
        return "is quantised, and quantised weights cannot train; leave it unquantised (llm_int8_skip_modules)"
    buffers = module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys()
    if buffers:
        return f"keeps {min(buffers)}, which training would change without a gradient; that is not supported"
    return None


def save_modules(model: nn.Module, found: dict[str, bool], adapter: str, tie: bool) -> None:
    """Puts a trainable copy beside each of the modules that `find_whole` gives; with `tie` what they share is shared by the copies."""
    masters: dict[int, nn.Parameter] = {}
    for name, along in found.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, SavedModule):
            swap(model, name, layer := SavedModule(layer))
        layer.add(adapter, Saved(along), masters if tie else None)


class Rows(NamedTuple):
    """Tokens of one embedding to train, and the modules that share its weight."""

    tokens: list[int]
    tied: list[str]


def find_rows(model: nn.Module, chosen: Sequence[int] | dict[str, list[int]]) -> dict[str, Rows]:
    """The embeddings of which tokens are to train, by name: the input embedding for a list, else those that the names match.

    Raises ValueError where a name matches nothing, a token is none of the embedding's, or its rows cannot be trained.
    """
    from peftkit.config import suggest

    there = dict(standing(model))
    if not isinstance(chosen, dict):
        embedding = input_embedding(model)
        name = next((name for name, module in there.items() if module is embedding), None)
        if name is None:
            raise ValueError(f"trainable_tokens: {type(model).__name__} does not name its input embedding; give {{name: tokens}}")
        chosen = {name: list(chosen)}
    found: dict[str, Rows] = {}
    for pattern, tokens in chosen.items():
        matches = [name for name in there if name == pattern or name.endswith(f".{pattern}")]
        if not matches:
            embeddings = [name for name, module in there.items() if isinstance(_frozen(module), nn.Embedding)]
            raise ValueError(f"trainable_tokens: {pattern!r} matches no module{suggest(pattern, embeddings)} (embeddings: {', '.join(embeddings) or 'none'})")
        for match in matches:
            weight = getattr(_frozen(there[match]), "weight", None)
            group = [name for name, module in there.items() if _holds(module, {id(weight)})] or [match]
            owner = next((name for name in group if isinstance(_frozen(there[name]), nn.Embedding)), group[0])
            for name in group:
                _check_rows(name, there[name], tokens)
            if found.setdefault(owner, Rows(tokens, [name for name in group if name != owner])).tokens != tokens:
                raise ValueError(f"trainable_tokens: {match} shares its weight with {owner}, so both train the same tokens")
    return found


def _check_rows(name: str, module: nn.Module, tokens: list[int]) -> None:
    base: Any = _frozen(module)
    if isinstance(module, AdapterLayer) and not isinstance(module, TrainedTokens):
        raise ValueError(f"trainable_tokens: {name} carries an adapter of another kind already")
    if not TrainedTokens.stands_for(base):
        raise ValueError(f"trainable_tokens: {name} ({type(base).__name__}) is neither an embedding nor an unquantised linear head")
    if isinstance(base, nn.Embedding):
        refuse_embedding(base)
    rows = base.weight.shape[0]
    wrong = [token for token in tokens if not 0 <= token < rows]
    if wrong:
        raise ValueError(f"trainable_tokens: {name} has {rows} rows and no token {wrong[0]}; call model.resize_token_embeddings({max(wrong) + 1}) first")
    if not tokens or len(set(tokens)) < len(tokens):
        raise ValueError(f"trainable_tokens: {name}: {'a token stands twice' if tokens else 'no token'} in the list")


def train_rows(model: nn.Module, found: dict[str, Rows], adapter: str) -> None:
    """Lets the rows that `find_rows` gives train, one set for all modules that share the weight."""
    for name, (tokens, tied) in found.items():
        owner = None
        for place in [name, *tied]:
            layer = model.get_submodule(place)
            if not isinstance(layer, TrainedTokens):
                swap(model, place, layer := TrainedTokens(layer, owner))
            layer.add(adapter, Tokens(tuple(tokens)))
            owner = owner or layer


def _frozen(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdapterLayer) else module


def _holds(module: nn.Module, ids: set[int]) -> bool:
    """Whether one of these parameters is the module's own."""
    return any(id(parameter) in ids for parameter in _frozen(module).parameters(recurse=False))


def check_once(targets: Iterable[str], whole: dict[str, bool], rows: dict[str, Rows]) -> None:
    """Raises ValueError where a module would be trained in two ways."""
    tokens = [name for owner, row in rows.items() for name in (owner, *row.tied)]
    both = {
        "target_modules and modules_to_save": [name for name in targets if name in whole],
        "target_modules and trainable_tokens": [name for name in targets if name in tokens],
        "modules_to_save and trainable_tokens": [name for name in tokens if name in whole or inside(name, whole)],
    }
    for options, names in both.items():
        if names:
            raise ValueError(f"{options} both train {names[0]} (by its name, or because it shares its weight with what is named); keep one")


def notes(model: nn.Module) -> list[str]:
    """What one should know about the heads, embeddings and copies of an adapted model, a line each."""
    there = dict(standing(model))
    found = []
    for name, layer in there.items():
        if not isinstance(layer, AdapterLayer) or not layer.active:
            continue
        weight = getattr(layer.base_layer, "weight", None)
        sharing = [other for other, module in there.items() if other != name and _holds(module, {id(weight)})]
        with_it = [other for other in sharing if type(there[other]) is type(layer) and there[other].active]
        if isinstance(layer, SavedModule):
            if not layer.specs[layer.active[0]].along:
                found.append(f"{name} trains as a whole" + _listed(", and with it {} that shares its weight", with_it))
        elif isinstance(layer, TrainedTokens):
            if layer.owner[0] is None:
                count = f"{len(layer.specs[layer.active[0]].tokens)} of {len(layer.weight):,} rows"
                found.append(f"{count} of {name} train" + _listed(", those of {} with them", with_it))
        elif sharing:
            found.append(f"{name} is adapted; {' and '.join(sharing)} shares its weight and keeps it as it is, after merging too")
        if reason := layer.unmergeable():
            found.append(f"{name} cannot be merged: {reason}")
    moving = [name for name, module in there.items() if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None]
    if moving:
        found.append(
            f"{len(moving)} modules, such as {moving[0]}, change their running statistics in training mode although nothing of them trains, and the adapter's "
            "file does not hold them: keep them in eval mode"
        )
    head = output_head(model)
    rows = any(isinstance(layer, TrainedTokens) for layer in there.values())
    for name, module in there.items():
        if module is head and rows and not isinstance(module, AdapterLayer):
            found.append(f"{name} has rows of its own, which stay: the tokens train as input only; name {name} in trainable_tokens too to have them written")
        if name in heads(model) and not any(isinstance(child, AdapterLayer) for child in module.modules()):
            found.append(f"{name} is the head of this {type(model).__name__} and stays as it is; name it in modules_to_save unless it was trained before")
    return found


def _listed(text: str, names: list[str]) -> str:
    return text.format(" and ".join(names)) if names else ""
