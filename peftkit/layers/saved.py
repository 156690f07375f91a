"""What trains beside the low-rank updates: copies of whole modules, and chosen rows of embeddings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from peftkit import quant
from peftkit.layers.base import ADAPTER, AdapterLayer, Trained, master_dtype
from peftkit.layers.embedding import row_scale


@dataclass(frozen=True)
class Saved:
    """The whole module trains, in a copy."""

    along: bool = False
    """Only what another module shares with it trains."""


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

    def add(self, adapter: str, spec: Saved, masters: dict[int, nn.Parameter] | None = None) -> None:
        """Puts a copy in. `masters` (id of a frozen parameter -> what trains for it) keeps ties among several modules."""
        if not isinstance(spec, Saved):
            raise ValueError(f"another adapter trains this {type(self.base_layer).__name__} as a whole (modules_to_save); do so here too, or leave it out")
        masters = {} if masters is None else masters
        trained: dict[int, Any] = {}
        for parameter in self.base_layer.parameters():
            if id(parameter) not in masters and not spec.along:
                masters[id(parameter)] = nn.Parameter(parameter.detach().to(master_dtype(parameter), copy=True))
            trained[id(parameter)] = masters.get(id(parameter), parameter)
        self._registered(adapter, spec)
        hooks = (self.base_layer._forward_hooks, self.base_layer._forward_pre_hooks)  # shared: who takes one off, such as NEFTune's noise, takes it off both
        self.modules_to_save[adapter] = copy.deepcopy(self.base_layer, trained | {id(each): each for each in hooks})

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        here = [name for name in adapter_name if name in self.specs]
        if not isinstance(adapter_name, str) and len(here) > 1:
            raise ValueError(f"adapters {', '.join(here)} each train a copy of the same module; make one of them active")
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

    def original(self, model: nn.Module, name: str) -> Tensor:
        """Any weight of the module: the copy replaces it as a whole."""
        return next(model.get_submodule(name).parameters())

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
        self.token_adapter = _Deltas()
        self.rows = nn.ModuleDict()

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        return isinstance(module, (nn.Embedding, nn.Linear)) and not quant.is_quantized(module)

    def add(self, adapter: str, spec: Tokens) -> None:
        if not isinstance(spec, Tokens):
            raise ValueError("another adapter trains tokens of this embedding (trainable_tokens); do so here too, or leave it out")
        weight = self.base_layer.weight
        self._registered(adapter, spec)
        self.rows[adapter] = rows = _Rows(spec.tokens, weight)
        if self.owner[0] is None:
            self.token_adapter.trainable_tokens_delta[adapter] = nn.Parameter(weight.detach()[rows.tokens].to(master_dtype(weight)))

    def delete(self, adapter: str) -> None:
        super().delete(adapter)
        if self.owner[0] is None:
            del self.token_adapter.trainable_tokens_delta[adapter]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        here = [name for name in adapter_name if name in self.specs]
        if not isinstance(adapter_name, str) and len(here) > 1:
            raise ValueError(f"adapters {', '.join(here)} each train tokens of the same embedding; make one of them active")
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
        scale = 1.0 if isinstance(base, nn.Linear) else row_scale(base)
        if scale is None:
            return functional_call(base, {"weight": self._replaced(base.weight)}, args, kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        y, rows, delta = base(x), self._chosen(), self.delta(self.active[0])
        # The difference is added: until a row has moved, outputs are the base's bit for bit, and what hooks do to them (noise) stays.
        moved = delta.to(base.weight.dtype).to(delta.dtype) - base.weight.detach()[rows.tokens]  # (n, d)
        if isinstance(base, nn.Linear):
            return y.index_add_(-1, rows.tokens, F.linear(x, moved.to(x.dtype)).to(y.dtype))
        slot = rows.slot[x]  # (...): which trained row, -1 where it is none
        update = F.embedding(slot.clamp_min(0), moved) * (slot >= 0).unsqueeze(-1)  # (..., d)
        return (y + scale * update).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """What a model gets that reads the weight of a head instead of calling it, as trl's losses do: with the trained rows in place."""
        base = self.base_layer
        if self.enabled and self.active and isinstance(base, nn.Linear):
            return self._replaced(base.weight)
        return base.weight

    def _chosen(self) -> _Rows:
        rows = self.rows[self.active[0]]
        assert isinstance(rows, _Rows)
        return rows

    def _replaced(self, weight: Tensor) -> Tensor:
        if not self.active:
            return weight
        return weight.index_copy(0, self._chosen().tokens, self.delta(self.active[0]).to(weight.dtype))

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        return self._replaced(self.base_layer.weight if weight is None else weight)

    def merged(self, weight: Tensor | None = None) -> nn.Module:
        """The plain module; its parameter stays the same object, so that what was tied to it gets the rows too."""
        self.base_layer.weight.data = self.merged_weight(weight)
        return self.base_layer


class _Deltas(nn.Module):
    """The trained rows (n, d) by adapter; a module of its own only for the sake of its name."""

    def __init__(self) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.ParameterDict()


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
