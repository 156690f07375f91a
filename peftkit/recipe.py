"""Recipe: the configs of all stages put together, and the checks between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from peftkit import trackers
from peftkit.config import Config, ConfigError, Source, apply_overrides, dump_yaml, read_yaml, validate
from peftkit.data import DataConfig
from peftkit.evaluate import EvalConfig, check_installed
from peftkit.methods import Method, from_recipe, to_recipe
from peftkit.model import ModelConfig, locate
from peftkit.quant import Quantization
from peftkit.train import TrainConfig


class Recipe(Config):
    """What to do: base model, methods, data, training, evaluation, and where the results go."""

    model: ModelConfig
    methods: list[dict[str, dict[str, Any]]] = []
    """The methods by name, in any combination that makes sense: [{lora: {r: 8}}, {loraplus: {ratio: 16}}]."""
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    output_dir: str
    """The run folder."""

    def build_methods(self) -> list[Method]:
        return from_recipe(self.methods)

    @property
    def quantize(self) -> Quantization | None:
        """How the base is stored: as the model section says, else as a method wishes."""
        wishes = [wish for method in self.build_methods() if (wish := method.quantize())]
        return self.model.quantize or (wishes[0] if wishes else None)

    @property
    def attends_within_documents(self) -> bool:
        """Whether training on a CPU may have attention of ours: not compiled, which its loops are not for, nor where the output of torch's own is kept."""
        return self.model.attention == "auto" and not self.train.compile and self.train.gradient_checkpointing != "selective"

    def with_micro_batch(self, rows: int) -> Recipe:
        """The recipe with this many rows at a time."""
        return self.model_copy(update={"train": self.train.model_copy(update={"micro_batch_size": rows})})


def load_recipe(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), elsewhere: bool = False) -> Recipe:
    """The recipe in a YAML file, a dict or as it is, with `key=value` overrides, validated as a whole.

    elsewhere: it is to run on another machine, so what this one lacks is no matter. Raises ConfigError with file, line, key
    and a suggestion for everything that is wrong with it.
    """
    if isinstance(recipe, Recipe):
        if not overrides:
            return recipe
        recipe = recipe.model_dump()
    source = Source(recipe, "recipe") if isinstance(recipe, dict) else read_yaml(recipe)
    source = _spelt_out(apply_overrides(_spelt_out(source), list(overrides)))
    methods = from_recipe(source.data.get("methods", []), source)
    source.data["methods"] = to_recipe(methods)
    found = validate(Recipe, source)
    _check(found, methods, source, elsewhere)
    return found


def _spelt_out(source: Source) -> Source:
    """The source with mappings for methods: a bare name is short for the method with its defaults."""
    if isinstance(source.data, dict) and isinstance(listed := source.data.get("methods", []), list):
        return replace(source, data=source.data | {"methods": [{entry: {}} if isinstance(entry, str) else entry for entry in listed]})
    return source


def recipe_of_run(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run folder, with overrides of what is evaluated. It was checked when it ran: what this machine lacks for training is no matter now."""
    found = validate(Recipe, _spelt_out(apply_overrides(read_yaml(folder / "recipe.yaml"), list(overrides))))
    check_installed(found.eval.metrics)
    return found


def _check(recipe: Recipe, methods: list[Method], source: Source, elsewhere: bool) -> None:
    """What no single stage can see."""

    def wrong(keys: tuple[str, ...], problem: str) -> ConfigError:
        return ConfigError(source.problem(keys, problem))

    swapping = [method for method in methods if method.swaps_layers]
    full, quantize = recipe.train.full_finetuning, recipe.model.quantize
    if full and swapping:
        raise wrong(("methods",), "full_finetuning trains the base itself; leave out the adapter methods or set train.full_finetuning: false")
    if full and recipe.quantize:
        raise wrong(("model", "quantize"), "a quantised base cannot be trained in full; use qlora, or quantize: null")
    if full and recipe.model.attention == "flash_attention_2":
        raise wrong(("model", "attention"), "full finetuning keeps fp32 weights, which flash attention does not evaluate; use attention: sdpa")
    if not full and not swapping:
        raise wrong(("methods",), "nothing would train; add lora, dora or qlora, or set train.full_finetuning: true")
    wishes = {wish for method in methods if (wish := method.quantize())}
    if wishes and quantize not in (None, "nf4", "fp4"):
        raise wrong(("model", "quantize"), f"qlora needs a 4-bit base, not {quantize}; use nf4, or lora instead of qlora")
    if any(type(method).__name__ == "LoRAPlus" for method in methods) and not swapping:
        raise wrong(("methods",), "loraplus sets the learning rate of B matrices; add lora, dora or qlora")
    if recipe.data.packing and recipe.model.attention == "flash_attention_2" and recipe.train.micro_batch_size != 1:
        raise wrong(("train", "micro_batch_size"), "flash attention keeps packed documents apart only in batches of one row; use 1, or attention: sdpa")
    if recipe.train.compile and recipe.quantize:
        raise wrong(("train", "compile"), f"a base in {recipe.quantize} is not compiled here: its operators are outside of torch's graphs; leave compile out")
    if recipe.train.compile and recipe.train.gradient_checkpointing:
        raise wrong(("train", "compile"), "compiled blocks under gradient checkpointing are not tried here; leave one of the two out")
    if recipe.model.dtype == "float16":
        raise wrong(("model", "dtype"), "training in float16 would lose small gradients without loss scaling; use bfloat16 or float32")
    if recipe.train.optimizer == "paged_adamw_8bit" and not elsewhere:
        import torch

        if not torch.cuda.is_available():
            raise wrong(("train", "optimizer"), "paged_adamw_8bit needs a GPU; use adamw here")
    needy = [metric for metric in recipe.eval.metrics if metric not in ("loss", "perplexity")]
    if needy and not (recipe.data.eval or recipe.data.holdout):
        raise wrong(("eval", "metrics"), f"{needy[0]} needs an evaluation set: give data.eval or data.holdout")
    try:
        check_installed(recipe.eval.metrics)
    except ConfigError as error:
        raise ConfigError(f"{source.where(('eval', 'metrics'))}: {error}") from error
    if recipe.train.eval_every and not (recipe.data.eval or recipe.data.holdout):
        raise wrong(("train", "eval_every"), "there is nothing to evaluate on: give data.eval or data.holdout")
    if recipe.train.gradient_checkpointing == "selective" and recipe.model.attention == "eager":
        raise wrong(("train", "gradient_checkpointing"), "selective keeps the output of fused attention, and eager has none; use true, or attention: sdpa")
    if absent := trackers.missing(recipe.train.report_to):
        raise wrong(("train", "report_to"), absent)
    locate(recipe.model.name)


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out: what goes into the run folder."""
    return dump_yaml(recipe)
