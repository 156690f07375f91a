"""The worker of a timing cell: step time and saved bytes of a recipe's methods over those of its frozen base, on its own batches.

    python -m peftkit.bench.steps cell.yaml 15

A step is forward, loss and backward, gradients flowing to the output of the input embedding: for the frozen base that is what no adapter can beat.
Both models share the base's weights (in full finetuning each has its own). Every round takes the same batches through both in turn, batch by batch, so
that what else the machine does falls on both alike; then the optimizer moves what trains, off the clock. Ratios are of the rounds' sums.
"""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn

from peftkit import data, methods
from peftkit.attention import attend_within_documents
from peftkit.loss import TokenLoss
from peftkit.memory import count_saved
from peftkit.model import load, load_tokenizer, resolve_dtype
from peftkit.optim import build_optimizer
from peftkit.recipe import Recipe, load_recipe
from peftkit.result import machine, versions, write_json
from peftkit.run import fitted, load_sets, one_accelerator, to_batch
from peftkit.train import enable_checkpointing, micro_batches_of

STEPS = 4  # optimizer steps' worth of batches in a round: enough that the clock's grain and single hiccups do not count


class Side:
    """The frozen base, or the model that trains: what a step of it is."""

    def __init__(self, model: Any, recipe: Recipe):
        self.model, self.loss, self.seconds = model.train(), TokenLoss(model), 0.0
        enable_checkpointing(model, recipe.train.gradient_checkpointing)
        model.enable_input_require_grads()
        self.mixed = recipe.train.full_finetuning and resolve_dtype(recipe.model.dtype) == torch.bfloat16

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        with self._arithmetic():
            total, tokens = self.loss(**batch)
        return total / tokens.clamp(min=1)

    def step(self, batch: dict[str, Any]) -> None:
        """Forward and backward, on the clock."""
        started = time.perf_counter()
        self.forward(batch).backward()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started

    def saved_bytes(self, batch: dict[str, Any]) -> int:
        """Bytes that autograd keeps of one forward for backward, parameters and buffers left out."""
        with count_saved(self.model) as kept:
            self.forward(batch)
        return sum(kept.values())

    def _arithmetic(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.model.device.type, torch.bfloat16) if self.mixed else nullcontext()


def measure(recipe: Recipe, rounds: int, console: Console) -> dict[str, Any]:
    """The content of a record's `timing`."""
    accelerator = one_accelerator(recipe)
    tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"metrics": ["loss"], "retained": []})})
    sets = load_sets(recipe, tokenizer, console)
    recipe = fitted(recipe, tokenizer, sets, accelerator, console)
    set_seed(recipe.train.seed)
    dtype = "float32" if recipe.train.full_finetuning else resolve_dtype(recipe.model.dtype)
    base, _ = load(recipe.model.name, recipe.quantize, dtype, device=accelerator.device, attention=recipe.model.attention, revision=recipe.model.revision)
    if recipe.attends_within_documents:
        attend_within_documents(base)
    fixed = {name for name, parameter in base.named_parameters() if not parameter.requires_grad}
    base.requires_grad_(False)
    trained = copy.deepcopy(base) if recipe.train.full_finetuning else sharing(base)
    if recipe.train.full_finetuning:
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_(name not in fixed)
    if recipe.methods:
        methods.attach(trained, recipe.build_methods())
    optimizer = build_optimizer(trained, recipe.train.learning_rate, recipe.train.weight_decay, recipe.train.optimizer)
    frozen, adapted = Side(base, recipe), Side(trained, recipe)
    batches = [to_batch(part, frozen.loss) for part in parts(recipe, sets["rows"])]

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # the next step's clock starts at rest

    seconds = interleaved(frozen, adapted, batches, update, rounds)
    ratios = [ours / theirs for theirs, ours in seconds]
    return {
        "rounds": ratios,
        "over_base": statistics.median(ratios),
        "seconds": statistics.median(ours for _, ours in seconds) / STEPS,
        "base_seconds": statistics.median(theirs for theirs, _ in seconds) / STEPS,
        "saved_bytes": adapted.saved_bytes(batches[0]),
        "base_saved_bytes": frozen.saved_bytes(batches[0]),
    }


def sharing(model: nn.Module) -> Any:
    """A copy of a model on the same weights: modules of its own, so that methods attached to it do not touch the other."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def parts(recipe: Recipe, rows: Sequence[Any]) -> list[list[Any]]:
    """The micro-batches of the first steps of training."""

    def length(row: Any) -> int:
        return sum(len(example.input_ids) for example in row)

    grouped = recipe.data.group_by_length and not recipe.data.packing
    order = data.DataOrder(len(rows), recipe.train.batch_size, recipe.train.seed, [length(row) for row in rows] if grouped else None)
    return [part for step in range(STEPS) for part in micro_batches_of([rows[i] for i in order[step]], recipe.train.micro_batch_size, length)]


def interleaved(base: Side, adapted: Side, batches: Sequence[dict[str, Any]], update: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
    """(seconds of the base, of the adapted model) of every round; the first round warms up and is not told."""
    found = []
    gc.disable()
    for round_ in range(rounds + 1):
        base.seconds = adapted.seconds = 0.0
        for i, batch in enumerate(batches):
            for side in (base, adapted) if (round_ + i) % 2 else (adapted, base):
                side.step(batch)
        update()
        if round_:
            found.append((base.seconds, adapted.seconds))
        gc.collect()
    gc.enable()
    return found


def main(cell: str, rounds: int) -> None:
    """Measures the recipe in cell.yaml and writes timing.json into its output_dir."""
    transformers.logging.disable_progress_bar()
    console = Console(stderr=True)
    recipe = load_recipe(cell)
    found = measure(recipe, rounds, console)
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "timing.json", {"timing": found, "machine": machine(), "versions": versions()})
    console.print(f"{found['over_base']:.3f} of the frozen base's step (rounds {min(found['rounds']):.3f} to {max(found['rounds']):.3f})", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
