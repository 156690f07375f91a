"""Whether a recipe fits: the rows it will meet, the memory there is, and the largest micro-batch for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from peftkit.config import ConfigError
from peftkit.data import Rows
from peftkit.forecast.skeleton import Skeleton
from peftkit.forecast.step import Forecast, Generation, Workload, forecast
from peftkit.memory import human
from peftkit.recipe import Recipe
from peftkit.train import MICRO_TOKENS

UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
GPU_RESERVE = 750 * 2**20
"""Bytes of a GPU that no tensor can have: CUDA's own, the products' workspaces, what the allocator cannot use."""
CPU_RESERVE = 0.5
"""Share of what comes and goes in a step that glibc may hold beyond it; measured, see docs/check.md."""


class Row(NamedTuple):
    """What counts of a row for memory."""

    tokens: int
    supervised: int
    documents: int = 1


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


def parse_bytes(text: str) -> int:
    """24GB -> 24 * 10^9, 24GiB -> 24 * 2^30. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0 or not match[2]:
        raise ConfigError(f"--gpu: {text!r} is no size of memory; write it as 24GB (10^9 bytes) or 24GiB (2^30)")
    return int(float(match[1]) * UNITS[match[2].upper()])


def budget(gpu: str | None = None) -> Budget:
    """The named GPU, else this machine's, else the memory that its processes can still have. Raises ConfigError."""
    if gpu is not None:
        return Budget(parse_bytes(gpu), f"a GPU of {gpu.strip()}", True)
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


def rows_of(rows: Rows) -> list[Row]:
    """Examples, as they stand in rows, as what counts for memory."""
    return [Row(*sizes) for sizes in rows.sizes()]


def worst(rows: Sequence[Row], count: int, packed: bool = False) -> Workload:
    """The largest batch of `count` rows: the longest ones, padded to the longest, with the most that `count` rows train."""
    count = min(count, len(rows))
    longest = sorted((row.tokens for row in rows), reverse=True)[:count]
    supervised = sum(sorted((row.supervised for row in rows), reverse=True)[:count])
    return Workload(count, longest[0], supervised, max(row.documents for row in rows), packed, padded=count > 1)


@dataclass(frozen=True)
class Plan:
    """What a recipe will be given."""

    rows: Sequence[Row]
    evaluated: Sequence[Row] = ()
    prompts: int = 0
    """Tokens of the longest prompt that is answered in evaluation, with the room for its answer; 0 where none is."""
    forecasts: dict[tuple[int, bool], Forecast] = field(default_factory=dict)
    """Those made already, by micro-batch and whether it is a part of the batch."""


def of_micro_batch(skeleton: Skeleton, plan: Plan, micro: int, processes: int = 1) -> Forecast:
    """The forecast for micro-batches of `micro` rows."""
    recipe = skeleton.recipe
    share = -(-recipe.train.batch_size // processes)
    evaluation = worst(plan.evaluated, recipe.eval.batch_size) if plan.evaluated else None
    generation = Generation(min(recipe.eval.batch_size, max(len(plan.evaluated), 1)), plan.prompts) if plan.prompts else None
    key = (micro, share > micro)
    if key not in plan.forecasts:
        plan.forecasts[key] = forecast(skeleton, worst(plan.rows, micro, recipe.data.packing), share > micro, evaluation, generation)
    return plan.forecasts[key]


def micro_batch(recipe: Recipe, plan: Plan, processes: int = 1) -> int | Literal["auto"]:
    """The recipe's own micro-batch: what it says, else as many of the longest rows as training puts together."""
    share = -(-recipe.train.batch_size // processes)
    return recipe.train.micro_batch_size or min(share, max(1, MICRO_TOKENS // max(row.tokens for row in plan.rows)))


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
    skeleton = Skeleton(recipe, config, there.gpu)
    count = largest_micro_batch(skeleton, plan, there, processes)
    if not count:
        raise ConfigError(
            f"train.micro_batch_size: one row at a time needs {human(of_micro_batch(skeleton, plan, 1, processes).total)} and what goes with it, and there are "
            f"{human(there.bytes)} {there.where}: shorten data.max_length, set train.gradient_checkpointing, quantize the model, or give a number to try it"
        )
    train = recipe.train.model_copy(update={"micro_batch_size": count})
    return recipe.model_copy(update={"train": train}), f"micro_batch_size auto: {count} rows at a time, for {human(there.bytes)} {there.where}"
