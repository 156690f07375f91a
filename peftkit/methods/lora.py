"""LoRA: Hu et al. 2021, arXiv 2106.09685; rank-stabilised scaling: Kalajdzievski 2023, arXiv 2312.03732."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_validator
from torch import nn

from peftkit.config import suggest
from peftkit.layers import (
    ADAPTER,
    Bias,
    LoRAExperts,
    LoRALinear,
    Rows,
    SavedModule,
    Spec,
    TrainedBias,
    TrainedTokens,
    adapt,
    adapter_layers,
    as_target_parameters,
    check_once,
    find_rows,
    find_targets,
    find_whole,
    heads,
    input_embedding,
    inside,
    other_biases,
    save_modules,
    share_inputs,
    sharing_embeddings,
    standing,
    swap,
    train_rows,
)
from peftkit.methods.base import Handle, Method
from peftkit.methods.init import check_init, start, takes_off

Number = TypeVar("Number", int, float)


class LoRA(Method):
    """Adds a trained low-rank product to frozen linears: y = x W^T + b + s x A^T B^T."""

    swaps_layers: ClassVar[bool] = True
    dora: ClassVar[bool] = False

    r: int = Field(8, gt=0)
    """Rank of the update."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the update only, in training."""
    target_modules: str | list[str] = "all-linear"
    """"all-linear" (all but the output head), a list of names or name endings, or one regular expression."""
    exclude_modules: str | list[str] | None = None
    """Names, name endings or one regular expression of linears to leave as they are."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = {}
    """Ranks of their own, by name ending or regular expression for the end of a module's name; the first that matches counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Values of alpha of their own, likewise."""
    layers_to_transform: int | list[int] | None = None
    """Adapt only these layers of the model, counted from 0."""
    layers_pattern: str | list[str] | None = None
    """Name of the list that layers_to_transform counts in, such as layers or h; by default the first number in a module's name counts."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train biases of the base too: those of the adapted modules (lora_only) or all of them. The base keeps its own."""
    init: str = "kaiming"
    """How A and B start: kaiming, gaussian, pissa, pissa_niter_<n> (a fast SVD of n iterations), olora or loftq."""
    init_weights: str | None = None
    """For loftq: folder or hub id of the weights before quantisation; by default those that the model was loaded from."""
    modules_to_save: list[str] | None = None
    """Names or name endings of modules to train as a whole, in a copy; by default the head of a classification model."""
    trainable_tokens: list[int] | dict[str, list[int]] | None = None
    """Tokens whose embeddings train and no others: of the input embedding (and a head tied to it), or by name of the embedding."""
    ensure_weight_tying: bool = True
    """Modules that share a weight with one in modules_to_save share the trained one too."""

    @field_validator("init")
    @classmethod
    def _known_init(cls, init: str) -> str:
        return check_init(init)

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _regular_expressions(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        return patterns

    @model_validator(mode="after")
    def _read_by_something(self) -> LoRA:
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts, and layers_to_transform is not set")
        if self.init_weights is not None and self.init != "loftq":
            raise ValueError(f"init_weights is read by init: loftq only, and init is {self.init}")
        return self

    @property
    def scale(self) -> float:
        """The scale where no pattern says otherwise."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def spec(self, name: str) -> Spec:
        """The update on the module `name`."""
        r, alpha = _first(self.rank_pattern, name, self.r), _first(self.alpha_pattern, name, self.alpha)
        return Spec(r, alpha / (math.sqrt(r) if self.rslora else r), self.dropout, dora=self.dora, bias=self.bias != "none")

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to adapt, by name. Raises ValueError where an entry of a target, layer or pattern matches nothing."""
        found = find_targets(model, self.target_modules, self.exclude_modules)
        if self.layers_to_transform is not None:
            found = {name: found[name] for name in self._in_layers(found)}
        for field, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            used = {deciding(patterns, name) for name in found}
            for pattern in patterns:
                if pattern not in used:
                    endings = sorted({name.rsplit(".", 1)[-1] for name in found})
                    near = suggest(pattern, endings)
                    raise ValueError(f"{field}: {pattern!r} decides over none of the adapted modules{near} (there are: {', '.join(endings)})")
        return found

    def _in_layers(self, names: Iterable[str]) -> list[str]:
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        layers = {name: _layer(name, patterns) for name in names}
        there = sorted({layer for layer in layers.values() if layer is not None})
        if not there:
            lists = sorted({part for name in layers for part in re.findall(r"([^.]+)\.\d+\.", name)})
            named = f" named {' or '.join(patterns)}{suggest(patterns[0], lists)}" if patterns else ""
            raise ValueError(f"layers_to_transform: no target stands in a list of layers{named} (there are: {', '.join(lists) or 'none'})")
        wanted = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform or []
        for layer in wanted:
            if layer not in there:
                raise ValueError(f"layers_to_transform: no target stands in layer {layer} (there are: {', '.join(map(str, there))})")
        if not wanted:
            raise ValueError("layers_to_transform is an empty list, which leaves no module to adapt")
        return [name for name, layer in layers.items() if layer in wanted]

    def plan(self, model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, bool], dict[str, Rows]]:
        """What `attach` would do: the modules to adapt, those to train as a whole, and the rows of embeddings, by name. Raises ValueError."""
        if self.trainable_tokens is not None and not self.trainable_tokens:
            raise ValueError("trainable_tokens names no token; leave it out to train none")
        found = self.targets(model)
        for name, module in found.items():
            if module is input_embedding(model) and (others := sharing_embeddings(model, module)):
                raise ValueError(f"{name} lends its weight to {' and '.join(others)} and is called by nobody: an adapter there would do nothing; name those")
        whole = find_whole(model, self._whole(model, found), self.ensure_weight_tying)
        rows = find_rows(model, self.trainable_tokens) if self.trainable_tokens else {}
        check_once([] if self.target_modules == "all-linear" else found, whole, rows)
        found = {name: module for name, module in found.items() if name not in whole and not inside(name, whole)}
        if not found:
            raise ValueError("modules_to_save covers every module that target_modules would adapt")
        return found, whole, rows

    def attach(self, model: nn.Module, adapter: str = ADAPTER) -> Handle | None:
        self._check_biases(model)
        found, whole, rows = self.plan(model)
        for name, module in found.items():
            adapt(model, name, module, adapter, self.spec(name))
        layers = {name: layer for name, layer in adapter_layers(model).items() if adapter in layer.specs}
        for name, layer in layers.items():
            if self.bias != "none" and not isinstance(layer, LoRALinear) and isinstance(getattr(layer.base_layer, "bias", None), nn.Parameter):
                raise ValueError(f"bias: the bias of {name}, a {type(layer.base_layer).__name__}, cannot be trained; use bias: none, or leave it out")
        start(model, layers, adapter, self.init, self.init_weights)
        share_inputs(model)
        save_modules(model, whole, adapter, self.ensure_weight_tying)
        train_rows(model, rows, adapter)
        if self.bias == "all":
            for name, module in other_biases(model).items():
                layer = TrainedBias(module)
                layer.add(adapter, Bias())
                swap(model, name, layer)
        return None

    def _check_biases(self, model: nn.Module) -> None:
        layers = adapter_layers(model).values()
        if (layers and self.bias == "all") or any(isinstance(layer, TrainedBias) for layer in layers):
            raise ValueError("an adapter with bias: all trains modules that other adapters may want, and stands alone; use bias: lora_only")
        trains = next((adapter for layer in layers if isinstance(layer, LoRALinear) for adapter in layer.biases), None)
        if self.bias != "none" and trains is not None:
            raise ValueError(f"adapter {trains!r} trains biases already, and one adapter of a model can; use bias: none here")

    def _whole(self, model: nn.Module, found: dict[str, nn.Module]) -> list[str]:
        """The entries of modules_to_save; by default the heads that are not among the targets themselves."""
        return [name for name in heads(model) if name not in found] if self.modules_to_save is None else self.modules_to_save

    def peft_config(self, targets: list[str], model: nn.Module, adapter: str = ADAPTER) -> Any:
        """This method as peft's LoraConfig for the modules `targets`, whose names are shortened where that is exact."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists
        from transformers.pytorch_utils import Conv1D

        layers = {name: model.get_submodule(name) for name in targets}
        whole = {name: layer for name, layer in layers.items() if isinstance(layer, SavedModule)}
        rows = {name: layer for name, layer in layers.items() if isinstance(layer, TrainedTokens)}
        experts = {name: layer for name, layer in layers.items() if isinstance(layer, LoRAExperts)}
        targets = [name for name, layer in layers.items() if not isinstance(layer, (SavedModule, TrainedTokens, LoRAExperts, TrainedBias))]
        options: dict[str, Any] = {}
        if experts:
            options["target_parameters"] = as_target_parameters([layer.target(name) for name, layer in experts.items()], model)
        if whole:
            options["modules_to_save"] = [name for name, layer in whole.items() if not layer.specs[adapter].along]
            weights = [id(parameter) for layer in whole.values() for parameter in layer.base_layer.parameters()]
            options["ensure_weight_tying"] = self.ensure_weight_tying and len(set(weights)) < len(weights)
        if rows:
            options["trainable_token_indices"] = {name: list(layer.specs[adapter].tokens) for name, layer in rows.items() if layer.owner[0] is None}
        names = [*targets, *(layer.target(name) for name, layer in experts.items())]
        double = takes_off(self.init)  # A and B stand in the file beside their start: an ordinary LoRA of twice the rank
        alphas = (math.sqrt(2) if self.rslora else 2) if double else 1
        options |= dict(
            r=2 * self.r if double else self.r,
            lora_alpha=_plain(alphas * self.alpha),
            lora_dropout=0.0 if experts else self.dropout,  # peft reads no file of experts that says otherwise, and it counts in training only
            use_rslora=self.rslora,
            use_dora=self.dora,
            rank_pattern={pattern: 2 * r if double else r for pattern, r in in_any_order(self.rank_pattern, names).items()},
            alpha_pattern={pattern: _plain(alphas * alpha) for pattern, alpha in in_any_order(self.alpha_pattern, names).items()},
            bias=self.bias,
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
            fan_in_fan_out=any(isinstance(getattr(model.get_submodule(n), "base_layer", None), Conv1D) for n in targets),
            task_type=_task_type(model, list(whole)),
            base_model_name_or_path=getattr(model, "name_or_path", None) or None,
            inference_mode=True,
        )
        if self.layers_to_transform is not None:
            endings = sorted({name.rsplit(".", 1)[-1] for name in targets})
            short = LoraConfig(target_modules=endings, layers_to_transform=self.layers_to_transform, layers_pattern=self.layers_pattern, **options)
            if {name for name, _ in standing(model) if check_target_module_exists(short, name)} == set(targets):
                return short
        return LoraConfig(target_modules=_as_peft_targets(targets, model), **options)


def _first(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    pattern = deciding(patterns, name)
    return default if pattern is None else patterns[pattern]


def deciding(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that matches the end of a module's name, from a dot on, as peft reads them."""
    return next((pattern for pattern in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name)), None)


def in_any_order(patterns: Mapping[str, Number], names: Sequence[str]) -> dict[str, Number]:
    """The patterns so that they decide the same over `names` in alphabetical order, which peft's files put them in: by whole names where they overlap."""
    if all(_first(patterns, name, 0) == _first({pattern: patterns[pattern] for pattern in sorted(patterns)}, name, 0) for name in names):
        return dict(patterns)
    return {f"^{re.escape(name)}": patterns[pattern] for name in names if (pattern := deciding(patterns, name)) is not None}


def _layer(name: str, lists: list[str]) -> int | None:
    """The layer that a module stands in, as its name tells: 3 for model.layers.3.mlp.up_proj; of lists within lists the outer one."""
    found = re.search(rf"(?:^|\.)(?:{'|'.join(lists) or '[^.0-9][^.]*'})\.([0-9]+)\.", name)
    return int(found[1]) if found else None


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _as_peft_targets(targets: list[str], model: nn.Module) -> list[str] | str:
    """What makes peft adapt these modules and no others: name endings, else full names, else (it takes those for endings too) an expression."""
    others = [name for name, _ in standing(model) if name not in set(targets)]
    endings = sorted({name.rsplit(".", 1)[-1] for name in targets})
    if not any(name.rsplit(".", 1)[-1] in endings for name in others):
        return endings
    if not any(name.endswith(f".{target}") for name in others for target in targets):
        return sorted(targets)
    return "|".join(re.escape(target) for target in sorted(targets))


_TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS"}


def _task_type(model: nn.Module, whole: list[str]) -> str | None:
    """peft's name for the model's task. It makes peft ask for a trained head, so a head that stays has none."""
    if not set(heads(model)) <= set(whole):
        return None
    return next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), None)
