"""check(recipe): everything that can be known before training, without training and without loading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from transformers import AutoModelForCausalLM

from peftkit import data, methods
from peftkit.config import ConfigError
from peftkit.memory import human, weight_bytes
from peftkit.model import load_config, load_tokenizer, resolve_dtype
from peftkit.recipe import Recipe, load_recipe


@dataclass
class CheckReport:
    """Titles with their lines, and the first rows: coloured, and as text with [[trained]] spans."""

    recipe: Recipe
    sections: dict[str, list[str]]
    rows: list[tuple[Text, str]]


def check(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> CheckReport:
    """Validates the recipe, reads and renders its data, and builds the model's skeleton to see what would be adapted.

    Hub models and data that are not on this machine and cannot be reached are told as unknown, not as errors: the
    recipe itself is then all that was checked. Raises ConfigError for everything that would stop `run`.
    """
    recipe = load_recipe(recipe, overrides)
    sections: dict[str, list[str]] = {"recipe": _recipe_lines(recipe)}
    try:
        config, tokenizer = load_config(recipe.model.name, recipe.model.revision), load_tokenizer(recipe.model.name, recipe.model.revision)
    except ConfigError as error:
        if _is_local(recipe.model.name):
            raise
        sections["model"] = [f"{recipe.model.name} is not on this machine and the hub was not reached: model and data stay unchecked"]
        sections["model"] += [str(error).splitlines()[0]]
        return CheckReport(recipe, sections, [])
    sections["model"] = _model_lines(recipe, config)
    try:
        sections["data"], rows = _data_lines(recipe, tokenizer)
    except data.HubError as error:
        sections["data"], rows = [f"unchecked: {error}"], []
    return CheckReport(recipe, sections, rows)


def _is_local(name: str) -> bool:
    return name.startswith("builtin:") or Path(name).expanduser().is_dir()


def _recipe_lines(recipe: Recipe) -> list[str]:
    train = recipe.train
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.num_epochs or 1:g} epochs"
    what = "all parameters" if train.full_finetuning else " + ".join(methods.method_name(method) for method in recipe.build_methods())
    return [f"{what}, {length} of {train.batch_size} rows, learning rate {train.learning_rate:g}, results in {recipe.output_dir}"]


def _model_lines(recipe: Recipe, config: Any) -> list[str]:
    """What the model is, what would be adapted and what its weights take."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dtype = torch.float32 if recipe.train.full_finetuning else resolve_dtype(recipe.model.dtype)
    lines = [
        f"{recipe.model.name}: {type(model).__name__}, {model.num_parameters():,} parameters, "
        f"{human(weight_bytes(model, recipe.quantize, dtype))} of weights ({recipe.quantize or 'not quantised'}, {str(dtype).removeprefix('torch.')})"
    ]
    for method in recipe.build_methods():
        if not isinstance(method, methods.LoRA):
            continue
        try:
            found, whole, rows = method.plan(model)
        except ValueError as error:
            raise ConfigError(f"methods: {methods.method_name(method)}: {error}") from error
        endings: dict[str, int] = {}
        for name in found:
            ending = name.rsplit(".", 1)[-1]
            endings[ending] = endings.get(ending, 0) + 1
        lines.append(f"{methods.method_name(method)} adapts {len(found)} linears: " + ", ".join(f"{e} x{n}" for e, n in endings.items()))
        lines += [f"{name} trains as a whole" for name in whole] + [f"{len(row.tokens)} rows of {name} train" for name, row in rows.items()]
    return lines


def _data_lines(recipe: Recipe, tokenizer: Any) -> tuple[list[str], list[tuple[Text, str]]]:
    if tokenizer is None:
        raise ConfigError(f"model: {recipe.model.name} holds no tokenizer, and training needs one")
    examples, report = data.load_examples(recipe.data, tokenizer, "train")
    _, eval_report = data.load_examples(recipe.data, tokenizer, "eval")
    rows = len(data.make_rows(examples, recipe.data))
    lines = report.lines() + eval_report.lines()
    lines.append(f"{recipe.train.steps(rows)} steps over {rows} {'packed ' if recipe.data.packing else ''}rows")
    if recipe.data.packing:
        lines.append(f"packing fills {report.tokens / (rows * recipe.data.max_length):.1%} of the rows of {recipe.data.max_length} tokens")
    first = examples[0]
    return lines, [(data.colour_row(first, tokenizer), data.marked_row(first, tokenizer))]
