"""Whether a recipe fits: the rows it will meet, the memory there is, and the largest micro-batch for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from peftkit.amounts import human, parse_bytes
from peftkit.config import ConfigError
from peftkit.data import Examples, Rows, batch_width
from peftkit.evaluate import GENERATING, answer_room
from peftkit.forecast.skeleton import Skeleton
from peftkit.forecast.step import Forecast, Generation, Workload, forecast
from peftkit.recipe import Recipe
from peftkit.train import MICRO_TOKENS

GPU_RESERVE = 750 * 2**20
"""Bytes of a GPU that no tensor can have: CUDA's own, the products' workspaces, what the allocator cannot use."""
CPU_RESERVE = 0.5
"""Share of what comes and goes in a step that glibc may hold beyond it; measured, see docs/check.md."""


class Row(NamedTuple):
    """What counts of a row for memory."""

    tokens: int
    supervised: int
    documents: int = 1


@dataclass(frozen=True, eq=False)
class Sizes:
    """What counts of many rows for memory, (rows,) each: three numbers a row, since there may be millions."""

    tokens: Any
    supervised: Any
    documents: Any
    pairs: bool = False
    """Whether the supervised tokens are written by a decoder of its own, and the others read by an encoder."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Sizes:
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Budget:
    """The memory that a run may take."""

    bytes: int
    where: str
    gpu: bool

    def reserve(self, found: Forecast) -> int:
        """What cannot be used, or is used by more than tensors."""
        return GPU_RESERVE if self.gpu else int(CPU_RESERVE * max(found.training, found.evaluation))

    def holds(self, found: Forecast) -> bool:
        return found.total + self.reserve(found) <= self.bytes


def budget(gpu: str | None = None, option: str = "--gpu") -> Budget:
    """The named GPU, else this machine's, else the memory that its processes can still have. Raises ConfigError."""
    if gpu is not None:
        try:
            return Budget(parse_bytes(gpu), f"a GPU of {gpu.strip()}", True)
        except ValueError as error:
            raise ConfigError(f"{option}: {error}") from None
    if torch.cuda.is_available():
        return Budget(torch.cuda.mem_get_info()[0], f"free on this machine's GPU ({torch.cuda.get_device_name()})", True)
    return Budget(_available(), "free on this machine, which has no GPU", False)


def _available() -> int:
    """Bytes that are free, or that the container of this process may still have."""
    import psutil  # accelerate's own requirement

    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return max(free, 0)


# ----------------------------------------------------------------------------------------------------------------- the batches


def sizes_of(rows: Rows | Examples, pairs: bool = False) -> Sizes:
    """Examples, each for itself or as they stand in rows, as what counts for memory; none of their tokens is read."""
    rows = rows if isinstance(rows, Rows) else Rows(rows)
    examples: Any = rows.examples
    return Sizes(rows.summed(examples.lengths), rows.summed(examples.supervised), rows.documents, pairs)


def worst(rows: Sizes, count: int, packed: bool = False) -> Workload:
    """The largest batch of `count` rows: the longest ones, padded to the longest, with the most that `count` rows train."""
    count = min(count, len(rows))
    supervised = int(np.sort(rows.supervised)[-count:].sum())
    if rows.pairs:  # the longest prompt and the longest answer need not be of one row, but may be of one batch
        return Workload(count, int((rows.tokens - rows.supervised).max()), supervised, answer=int(rows.supervised.max()))
    tokens = batch_width(int(rows.tokens.max()), count, packed)
    return Workload(count, tokens, supervised, int(rows.documents.max()), packed, padded=count > 1)


@dataclass(frozen=True)
class Plan:
    """What a recipe will be given."""

    rows: Sizes
    evaluated: Sizes = field(default_factory=lambda: Sizes.of([]))
    prompts: int = 0
    """Tokens of the longest prompt that is answered in evaluation, with the room for its answer; 0 where none is."""
    room: int = 0
    """That room."""
    forecasts: dict[tuple[Workload, bool], Forecast] = field(default_factory=dict)
    """Those made already, by micro-batch and whether it is a part of the batch."""


def plan_of(recipe: Recipe, tokenizer: Any, rows: Rows, evaluated: Examples, pairs: bool) -> Plan:
    """What training and evaluation will be given. pairs: the model reads with an encoder."""
    prompts = room = 0
    if len(evaluated) and any(metric in GENERATING for metric in recipe.eval.metrics):
        room = recipe.eval.max_new_tokens or answer_room(tokenizer, [example.answer for example in evaluated])
        prompts = max(len(example.prompt_ids) for example in evaluated) + room
    return Plan(sizes_of(rows, pairs), sizes_of(evaluated, pairs), prompts, room)


def by_tokens(rows: Sizes, count: int, packed: bool = False) -> list[Workload]:
    """Of the micro-batches of up to `count` rows that training puts together up to MICRO_TOKENS: the one of most tokens, and that of the longest row.

    The longest row need not be in the largest one: where it has 1,100 tokens it stands alone, and two of 1,000 make more.
    """
    found = [worst(rows, 1, packed)]
    for many in range(2, min(count, len(rows), MICRO_TOKENS // int(rows.tokens.min())) + 1):
        fits = rows.tokens <= MICRO_TOKENS // many
        if fits.sum() >= many:
            found.append(worst(Sizes(rows.tokens[fits], rows.supervised[fits], rows.documents[fits], rows.pairs), many, packed))
    largest = max(found, key=lambda workload: (workload.rows * (workload.tokens + workload.answer), workload.supervised))
    return [largest, max((each for each in found if each.tokens >= found[0].tokens), key=lambda workload: workload.rows)]


def of_recipe(skeleton: Skeleton, plan: Plan, processes: int = 1) -> tuple[int, Forecast]:
    """(rows at a time, forecast) of what the recipe says; of `auto`, one row at a time."""
    recipe, share = skeleton.recipe, -(-skeleton.recipe.train.batch_size // processes)
    if recipe.train.micro_batch_size is not None:
        micro = 1 if recipe.train.micro_batch_size == "auto" else recipe.train.micro_batch_size
        return micro, of_micro_batch(skeleton, plan, micro, processes)
    found = [(each.rows, of_workload(skeleton, plan, each, processes)) for each in by_tokens(plan.rows, share, recipe.data.packing)]
    return max(found, key=lambda pair: pair[1].total)


def of_micro_batch(skeleton: Skeleton, plan: Plan, micro: int, processes: int = 1) -> Forecast:
    """The forecast for micro-batches of `micro` rows."""
    return of_workload(skeleton, plan, worst(plan.rows, micro, skeleton.recipe.data.packing), processes)


def of_workload(skeleton: Skeleton, plan: Plan, workload: Workload, processes: int = 1) -> Forecast:
    """The forecast for this micro-batch as the largest."""
    recipe, accumulates = skeleton.recipe, -(-skeleton.recipe.train.batch_size // processes) > workload.rows
    evaluation = worst(plan.evaluated, recipe.eval.batch_size) if len(plan.evaluated) else None
    generation = Generation(min(recipe.eval.batch_size, max(len(plan.evaluated), 1)), plan.prompts, plan.room) if plan.prompts else None
    key = (workload, accumulates)
    if key not in plan.forecasts:
        plan.forecasts[key] = forecast(skeleton, workload, accumulates, evaluation, generation)
    return plan.forecasts[key]


def largest_micro_batch(skeleton: Skeleton, plan: Plan, there: Budget, processes: int = 1) -> int:
    """The most rows at a time that fit, at most the batch; 0 where not even one does."""
    most = min(-(-skeleton.recipe.train.batch_size // processes), len(plan.rows))

    def fits(count: int) -> bool:
        return there.holds(of_micro_batch(skeleton, plan, count, processes))

    return _largest(fits, most)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count up to `most` that fits, where every smaller one does too: both ends first, then halves."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_micro_batch(recipe: Recipe, config: Any, plan: Plan, processes: int = 1) -> tuple[Recipe, str]:
    """The recipe with a number in the place of `micro_batch_size: auto`, and a line that says which.

    Raises ConfigError where not even one row at a time fits.
    """
    if recipe.train.micro_batch_size != "auto":
        return recipe, ""
    there = budget()
    if not there.gpu:  # the processes of one machine share it
        there = replace(there, bytes=there.bytes // processes)
    skeleton = Skeleton(recipe, config, there.gpu)
    count = largest_micro_batch(skeleton, plan, there, processes)
    if not count:
        raise ConfigError(
            f"train.micro_batch_size: one row at a time needs {human(of_micro_batch(skeleton, plan, 1, processes).total)} and what goes with it, and there are "
            f"{human(there.bytes)} {there.where}: shorten data.max_length, set train.gradient_checkpointing, quantize the model, or give a number to try it"
        )
    return recipe.with_micro_batch(count), f"micro_batch_size auto: {count} rows at a time, for {human(there.bytes)} {there.where}"
