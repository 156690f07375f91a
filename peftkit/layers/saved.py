"""What trains beside the low-rank updates: copies of whole modules, and chosen rows of embeddings."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from peftkit import quant
from peftkit.layers.base import ADAPTER, AdapterLayer, Trained, master_dtype
from peftkit.layers.embedding import refuse_embedding, row_scale
from peftkit.layers.find import swap


@dataclass(frozen=True)
class Saved:
    """The whole module trains, in a copy."""


@dataclass(frozen=True)
class Tokens:
    """These rows train, in the order of the file."""

    tokens: tuple[int, ...]


class SavedModule(AdapterLayer):
    """y = f(x; W'), with W' trained whole and W kept: any module, whatever its forward.

    W' is held in fp32 (fp64 beside fp64) and cast to the dtype of W in forward: in bfloat16 most steps would round to
    nothing. Attributes are read off the trained copy. One adapter can be active.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.modules_to_save = nn.ModuleDict()

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        return any(True for _ in module.parameters())

    def add(self, adapter: str, spec: Saved, masters: dict[int, nn.Parameter] | None = None, along: bool = False) -> None:
        """Puts a copy in. `masters` (id of a frozen parameter -> what trains for it) keeps ties among several modules.

        With `along`, only what is in `masters` trains: the module is here because it shares that with another one.
        """
        if not isinstance(spec, Saved):
            raise ValueError(f"another adapter trains this {type(self.base_layer).__name__} as a whole (modules_to_save); do so here too, or leave it out")
        masters = {} if masters is None else masters
        trained: dict[int, Any] = {}
        for parameter in self.base_layer.parameters():
            if id(parameter) not in masters and not along:
                masters[id(parameter)] = nn.Parameter(parameter.detach().to(master_dtype(parameter), copy=True))
            trained[id(parameter)] = masters.get(id(parameter), parameter)
        self._registered(adapter, spec)
        self.modules_to_save[adapter] = copy.deepcopy(self.base_layer, trained)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"adapters {', '.join(adapter_name)} each train a copy of the same module; make one of them active")
        super().set_adapter(adapter_name, inference_mode)

    def role_parameters(self, adapter: str = ADAPTER) -> list[Trained]:
        if adapter not in self.specs:
            return []
        stored = dict(self.base_layer.named_parameters(remove_duplicate=False))
        return [
            Trained("full", f"modules_to_save.{adapter}.{name}", name, master, stored[name].dtype)
            for name, master in self.modules_to_save[adapter].named_parameters(remove_duplicate=False)
            if master is not stored[name]
        ]

    def face(self) -> nn.Module:
        return self._trained() if self.enabled else self.base_layer

    def _trained(self) -> nn.Module:
        """The active copy, or the frozen module where none is active."""
        return self._modules["modules_to_save"]._modules[self.active[0]] if self.active else self.base_layer  # type: ignore[union-attr, return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        trained = self.face()
        if trained is self.base_layer:
            return trained(*args, **kwargs)
        stored = dict(self.base_layer.named_parameters())
        cast = {name: p.to(stored[name].dtype) for name, p in trained.named_parameters() if p.dtype != stored[name].dtype}
        return functional_call(trained, cast, args, kwargs) if cast else trained(*args, **kwargs)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """The trained weight in the dtype of the frozen one; `weight` would be replaced as a whole."""
        return self._trained().weight.to(self.base_layer.weight.dtype)  # type: ignore[operator, return-value]

    @torch.no_grad()
    def merged(self, weight: Tensor | None = None) -> nn.Module:
        """The trained copy, in the dtype of the frozen module; its parameters stay the same objects, and so tied."""
        trained = self._trained()
        stored = dict(self.base_layer.named_parameters())
        for name, parameter in trained.named_parameters():
            parameter.data = parameter.data.to(stored[name].dtype)
        return trained.requires_grad_(False)


class TrainedTokens(AdapterLayer):
    """y = f(i; W') for an embedding, y = x W'^T + b for a head; W' is W (V, d) with the rows of chosen tokens (n, d) trained.

    The rows start as W's and replace them; all others stay as they are, and no gradient or optimizer state is kept for
    them. A head that shares the embedding's weight shares the rows: `owner` holds them. One adapter can be active.
    """

    def __init__(self, base_layer: nn.Module, owner: TrainedTokens | None = None):
        super().__init__(base_layer)
        self.owner = (owner,)  # in a tuple, so that it is no submodule
        self.token_adapter = nn.Module()
        self.token_adapter.trainable_tokens_delta = nn.ParameterDict()
        self.rows = nn.ModuleDict()

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        return isinstance(module, (nn.Embedding, nn.Linear)) and not quant.is_quantized(module)

    def add(self, adapter: str, spec: Tokens) -> None:
        if not isinstance(spec, Tokens):
            raise ValueError("another adapter trains tokens of this embedding (trainable_tokens); do so here too, or leave it out")
        weight = self.base_layer.weight
        self._registered(adapter, spec)
        self.rows[adapter] = _Rows(spec.tokens, weight)
        if self.owner[0] is None:
            start = weight.detach()[self.rows[adapter].tokens].to(master_dtype(weight))
            self.token_adapter.trainable_tokens_delta[adapter] = nn.Parameter(start.clone())

    def delete(self, adapter: str) -> None:
        super().delete(adapter)
        if self.owner[0] is None:
            del self.token_adapter.trainable_tokens_delta[adapter]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"adapters {', '.join(adapter_name)} each train tokens of the same embedding; make one of them active")
        super().set_adapter(adapter_name, inference_mode)

    def delta(self, adapter: str) -> nn.Parameter:
        """The trained rows (n, d)."""
        return (self.owner[0] or self).token_adapter.trainable_tokens_delta[adapter]

    def role_parameters(self, adapter: str = ADAPTER) -> list[Trained]:
        if adapter not in self.specs or self.owner[0] is not None:
            return []
        key = "token_adapter.trainable_tokens_delta"
        return [Trained("tokens", f"{key}.{adapter}", key, self.delta(adapter), self.base_layer.weight.dtype)]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if not (self.enabled and self.active):
            return base(*args, **kwargs)
        rows, delta = self.rows[self.active[0]], self.delta(self.active[0])
        if isinstance(base, nn.Linear):
            [x] = args
            bias = None if base.bias is None else base.bias[rows.tokens]
            y = base(x)  # (..., V)
            return y.index_copy_(-1, rows.tokens, F.linear(x, delta.to(base.weight.dtype), bias).to(y.dtype))
        scale = row_scale(base)
        if scale is None:
            return functional_call(base, {"weight": self._replaced(base.weight)}, args, kwargs)
        y = base(*args, **kwargs)  # (..., d)
        slot = rows.slot[args[0] if args else next(iter(kwargs.values()))]  # (...): which trained row, -1 where it is none
        trained = F.embedding(slot.clamp_min(0), delta.to(base.weight.dtype)) * scale
        return torch.where((slot >= 0).unsqueeze(-1), trained.to(y.dtype), y)

    def _replaced(self, weight: Tensor) -> Tensor:
        if not self.active:
            return weight
        return weight.index_copy(0, self.rows[self.active[0]].tokens, self.delta(self.active[0]).to(weight.dtype))

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        return self._replaced(self.base_layer.weight if weight is None else weight)

    def merged(self, weight: Tensor | None = None) -> nn.Module:
        """The plain module; its parameter stays the same object, so that what was tied to it gets the rows too."""
        self.base_layer.weight.data = self.merged_weight(weight)
        return self.base_layer


class _Rows(nn.Module):
    """Which rows of a weight (V, d) train: `tokens` (n,), and for every token the place of its row, or -1, `slot` (V,)."""

    def __init__(self, tokens: Sequence[int], weight: Tensor):
        super().__init__()
        chosen = torch.tensor(tokens, device=weight.device)
        slot = torch.full((weight.shape[0],), -1, device=weight.device)
        slot[chosen] = torch.arange(len(tokens), device=weight.device)
        self.tokens: Tensor
        self.slot: Tensor
        self.register_buffer("tokens", chosen, persistent=False)
        self.register_buffer("slot", slot, persistent=False)


# -------------------------------------------------------------------------------------------------------- finding, putting


def find_whole(model: nn.Module, patterns: Sequence[str], tie: bool) -> dict[str, bool]:
    """The modules to train as a whole, by name: those that the names or name endings match, nothing inside others.

    With `tie`, modules that share a weight with them come along; the value says that a module is there for that alone.
    Raises ValueError where an entry matches nothing, or matches what cannot be trained as a copy.
    """
    from peftkit.config import suggest

    there = dict(_standing(model))
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
        layer.add(adapter, Saved(), masters if tie else None, along)


class Rows(NamedTuple):
    """Tokens of one embedding to train, and the modules that share its weight."""

    tokens: list[int]
    tied: list[str]


def find_rows(model: nn.Module, chosen: Sequence[int] | dict[str, list[int]]) -> dict[str, Rows]:
    """The embeddings of which tokens are to train, by name: the input embedding for a list, else those that the names match.

    Raises ValueError where a name matches nothing, a token is none of the embedding's, or its rows cannot be trained.
    """
    from peftkit.config import suggest

    there = dict(_standing(model))
    if not isinstance(chosen, dict):
        getter = getattr(model, "get_input_embeddings", None)
        name = next((name for name, module in there.items() if getter and module is getter()), None)
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


def inside(name: str, others: Iterable[str]) -> bool:
    """Whether the module `name` is part of one of the others."""
    return any(name.startswith(f"{other}.") for other in others)


def _standing(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every submodule with its name, adapter layers as one module each."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        yield full, child
        if not isinstance(child, AdapterLayer):
            yield from _standing(child, full)


def _frozen(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdapterLayer) else module


def _holds(module: nn.Module, ids: set[int]) -> bool:
    """Whether one of these parameters is the module's own."""
    return any(id(parameter) in ids for parameter in _frozen(module).parameters(recurse=False))
