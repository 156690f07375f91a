"""The training loop, on accelerate: accumulate, clip, step, log, evaluate, save, resume."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftkit import quant
from peftkit.activations import Checkpointing, enable_checkpointing
from peftkit.checkpoint import CheckpointError, checkpoints, load_checkpoint, restore_parameters, save_checkpoint
from peftkit.config import Config
from peftkit.data import DataOrder
from peftkit.interrupts import Interrupted, Interrupts
from peftkit.memory import peak_memory_bytes
from peftkit.methods import Handle
from peftkit.optim import schedule
from peftkit.tripwires import STEPS_TO_MOVE, TrainingStopped, Tripwire, Tripwires

__all__ = ["MICRO_TOKENS", "TrainConfig", "TrainStats", "TrainingStopped", "enable_checkpointing", "randomness", "set_randomness", "train"]

logger = logging.getLogger(__name__)

MICRO_TOKENS = 1024
"""Tokens of a micro-batch where the recipe names no number of rows: enough to keep products busy, few enough for memory."""


class TrainConfig(Config):
    """How to train."""

    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of AdamW."""
    max_steps: int | None = Field(None, gt=0)
    """Optimizer steps; alternatively num_epochs."""
    num_epochs: float | None = Field(None, gt=0)
    """Passes over the rows, 1 where max_steps is not given either."""
    batch_size: int = Field(16, gt=0)
    """Rows per optimizer step, over all devices (packed rows, where rows are packed)."""
    micro_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    """Rows per forward on one device; null puts rows together up to 1,024 tokens with padding, auto as many as memory is forecast to hold (tried first)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, in every parameter group."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """auto: paged 8-bit AdamW for qlora on a GPU, else AdamW. The paged one needs a GPU."""
    gradient_checkpointing: Checkpointing = False
    """Compute activations again in backward instead of keeping them; selective keeps the output of fused attention."""
    compile: bool = False
    """Run the model's blocks through torch.compile, adapters included: costs a minute or so at the start; not for a quantised base."""
    full_finetuning: bool = False
    """Train every parameter of the base (fp32 weights, bfloat16 arithmetic where there is any) instead of adapters."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of adapter weights, data order, dropout and noise."""
    log_every: int = Field(10, gt=0)
    """Steps between lines of metrics.jsonl."""
    save_every: int | None = Field(None, gt=0)
    """Steps between checkpoints; null saves none on the way."""
    keep_last: int = Field(2, gt=0)
    """How many checkpoints to keep, the newest."""
    eval_every: int | None = Field(None, gt=0)
    """Steps between evaluations of the loss on the evaluation set; null evaluates before and after training only."""
    keep_best: int = Field(1, ge=0)
    """With eval_every: how many checkpoints to keep besides, those of the lowest evaluation loss. The run ends with the best; 0 ends with the last."""
    patience: int | None = Field(None, gt=0)
    """With eval_every: stop after this many evaluations in a row without a lower loss."""
    warn_only: list[Tripwire] = []
    """Tripwires that warn instead of stopping the run."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []
    """Where metrics go besides metrics.jsonl, through accelerate's trackers."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.max_steps and self.num_epochs:
            raise ValueError("max_steps and num_epochs are both given; keep one")
        if self.patience and not self.eval_every:
            raise ValueError("patience counts evaluations, and there are none on the way: give eval_every")
        return self

    def steps(self, rows: int) -> int:
        """Optimizer steps for a training set of `rows` rows."""
        return self.max_steps or math.ceil(round(rows * (self.num_epochs or 1.0) / self.batch_size, 6))  # 1.1 * 100 is 110.00000000000001

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether any stay when all is done."""
        return bool(self.save_every or (self.eval_every and self.keep_best))


@dataclass
class TrainStats:
    """Counts of a run so far; a resumed run goes on counting."""

    seconds: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    steps: int = 0
    peak_memory_bytes: int = 0
    """Of the process that trained, should another one end the run."""

    def summary(self) -> dict[str, float]:
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory_bytes()),
            "steps": self.steps,
        }


@dataclass
class Evaluations:
    """The evaluations on the way: the steps of lowest loss, and how long it has not fallen."""

    keep: int
    patience: int | None
    best: list[tuple[float, int]] = field(default_factory=list)
    """(loss, step), lowest first, at most `keep`."""
    lowest: float = math.inf
    without_progress: int = 0

    def add(self, step: int, loss: float) -> bool:
        """Takes a loss in; whether it is among the lowest."""
        self.without_progress = 0 if loss < self.lowest else self.without_progress + 1
        self.lowest = min(self.lowest, loss)
        self.best = sorted([*self.best, (loss, step)])[: self.keep]
        return (loss, step) in self.best

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.without_progress >= self.patience

    @property
    def steps(self) -> set[int]:
        return {step for _, step in self.best}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "lowest": self.lowest, "without_progress": self.without_progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.lowest, self.without_progress = state["best"], state["lowest"], state["without_progress"]


def train(
    loss: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Any],
    to_batch: Callable[[Sequence[Any]], dict[str, Any]],
    length: Callable[[Any], int],
    supervised: Callable[[Any], int],
    config: TrainConfig,
    accelerator: Accelerator,
    folder: Path,
    handles: dict[str, Handle],
    on_step: Callable[[int, dict[str, float]], None],
    resume: bool = False,
    autocast: bool = False,
    lengths: Sequence[int] | None = None,
    *,
    rows_id: int = 0,
    where: Callable[[Any], Sequence[str]] = lambda row: [repr(row)[:80]],
    evaluate: Callable[[], float] | None = None,
    on_evaluation: Callable[[int, float], None] = lambda step, loss: None,
    tripwires: Tripwires | None = None,
    saves_last: bool = False,
) -> TrainStats:
    """Trains `model` through `loss` on `rows`; checkpoints go to `folder`, metrics of every step to `on_step`.

    `to_batch` makes the loss's input of rows, in a thread of its own ahead of the steps; `length` and `supervised` count a row's tokens, padding
    left out; `where` says where a row comes from. With `lengths` (tokens of each row), rows of
    similar length share a step. `rows_id` tells these rows from others: a checkpoint that was written for others is refused. Losses are summed over the
    micro-batches and devices of a step and divided once by the step's supervised tokens, so that accumulation does not change them; the host waits for
    the device once a step. With `autocast` the forward runs in bfloat16 over weights of higher precision. `evaluate` gives the loss on the evaluation set,
    every config.eval_every steps. `saves_last` writes a checkpoint of the last step too: who is stopped after the training need not train again.

    Raises TrainingStopped where a tripwire trips, Interrupted after a signal and its checkpoint, CheckpointError where a checkpoint cannot be
    written or read.
    """
    steps = config.steps(len(rows))
    order = DataOrder(len(rows), config.batch_size, config.seed, lengths)
    factor = schedule(config.lr_scheduler, steps, config.warmup_ratio)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tripwires = tripwires or Tripwires(model, handles, config.warn_only, logger.warning)
    evaluations = Evaluations(config.keep_best, config.patience)
    parts: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "evaluations": evaluations, "tripwires": tripwires}
    stats = TrainStats()
    rank, world = accelerator.process_index, accelerator.num_processes
    if resume and (found := checkpoints(folder)):
        tensors, state = load_checkpoint(found[-1])
        restore_parameters(model, tensors)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        quant.page_again(optimizer)
        stats = TrainStats(**state["stats"])
        if (count := len(rows), rows_id) != tuple(state["rows"]):
            raise CheckpointError(
                f"{found[-1]} was written while training on {state['rows'][0]} rows, and now there are {count}, or other ones: the data has changed since; "
                "put the rows back, or train anew in another output_dir"
            )
        if len(state["devices"]) != world:
            raise CheckpointError(f"{found[-1]} was written by {len(state['devices'])} processes, this run has {world}: resume with as many")
        set_randomness(state["devices"][rank], handles)
    if config.micro_batch_size == "auto":
        raise ValueError("micro_batch_size: auto is decided before the loop; give it a number")

    def mine(step: int) -> list[list[Any]]:
        """The rows of a step that this process takes, by micro-batch."""
        return micro_batches_of([rows[i] for i in order[step]][rank::world], config.micro_batch_size, length)

    def save() -> Path:
        devices = gather_object([randomness(handles)])
        tripwires.base_unchanged(f"up to step {stats.steps}")
        path = folder / f"step-{stats.steps:06d}"
        try:
            if accelerator.is_main_process:
                state = {name: part.state_dict() for name, part in parts.items()} | {"stats": vars(stats), "devices": devices, "rows": [len(rows), rows_id]}
                path = save_checkpoint(folder, stats.steps, trained, state, config.keep_last, keep=evaluations.steps)
        finally:
            accelerator.wait_for_everyone()
        return path

    first, prepared = stats.steps, accelerator.prepare(loss)
    model.train()
    ahead = prefetched((part for step in range(stats.steps, steps) for part in mine(step)), to_batch)
    with Interrupts() as interrupts, closing(ahead):
        while stats.steps < steps and not evaluations.exhausted:
            started = time.perf_counter()
            step, batch = stats.steps + 1, [rows[i] for i in order[stats.steps]]
            tokens = sum(supervised(row) for row in batch)  # of all devices: each holds the order, so no one needs to ask
            tripwires.supervised(tokens, step, lambda batch=batch: _origins(batch, where))  # type: ignore[misc]
            micro_batches, losses = mine(stats.steps), []
            for i in range(len(micro_batches)):
                with nullcontext() if i == len(micro_batches) - 1 else accelerator.no_sync(prepared):
                    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=autocast):
                        part, _ = prepared(**next(ahead))
                    accelerator.backward(part * (world / max(tokens, 1)))
                losses.append(part.detach())
            norm = torch.as_tensor(accelerator.clip_grad_norm_(list(trained.values()), config.max_grad_norm))
            total, norm_value, signals = _to_host(accelerator, sum(losses, torch.zeros_like(losses[0])), norm, interrupts.number)
            value = total / max(tokens, 1)
            if tripwires.finite(value, norm_value, step, lambda m=micro_batches, p=losses: _bad_rows(m, p, where)):  # type: ignore[misc]
                optimizer.step()
                tripwires.rising(value, step)
                tripwires.learning(value, norm_value, step)
            rate = float(scheduler.get_last_lr()[0])
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            stats.steps += 1
            stats.tokens += sum(length(row) for row in batch)
            stats.supervised_tokens += tokens
            stats.seconds += time.perf_counter() - started
            stats.peak_memory_bytes = max(stats.peak_memory_bytes, peak_memory_bytes())
            on_step(step, {"loss": value, "gradient_norm": norm_value, "learning_rate": rate, **stats.summary()})
            if step == min(first + STEPS_TO_MOVE, steps):
                tripwires.adapters_moved(step - first)
            best = False
            if evaluate is not None and config.eval_every and (step % config.eval_every == 0 or step == steps):
                with tripwires.quiet(f"at step {step}"):
                    evaluation = broadcast_object_list([evaluate()])[0]  # or devices that differ in the last digit would part ways
                if not tripwires.finite(evaluation, 0.0, step, lambda: ["the evaluation set"]):
                    evaluation = math.inf
                best = evaluations.add(step, evaluation)
                on_evaluation(step, evaluation)
            if signals or (step < steps and (best or (config.save_every and step % config.save_every == 0))):
                path = save()
                if signals:
                    raise Interrupted(signals, step, path)
        if signals := _to_host(accelerator, zero := torch.zeros((), device=accelerator.device), zero, interrupts.number)[2]:
            raise Interrupted(signals, stats.steps, save())  # it came after the last step was taken
    if saves_last and stats.steps > first:
        try:
            save()
        except CheckpointError as error:  # what was trained is written in a moment, and takes less room
            logger.warning("%s", error)
    tripwires.base_unchanged("at the end")
    _end_with_the_best(model, evaluations, folder, stats.steps)
    return stats


def micro_batches_of(batch: Sequence[Any], size: int | Literal["auto"] | None, length: Callable[[Any], int]) -> list[list[Any]]:
    """The rows in parts of `size`; with None, as many rows as make MICRO_TOKENS tokens, each counted as long as the longest of its part."""
    if isinstance(size, int):
        return [list(batch[start : start + size]) for start in range(0, len(batch), size)]
    parts: list[list[Any]] = []
    longest = 0
    for row in sorted(batch, key=length, reverse=True):  # so that rows of like length come together
        if not parts or longest * (len(parts[-1]) + 1) > MICRO_TOKENS:
            parts.append([])
            longest = length(row)
        parts[-1].append(row)
    return parts


def prefetched(items: Iterable[Any], make: Callable[[Any], Any], ahead: int = 2) -> Generator[Any, None, None]:
    """make(item) for every item, in their order, made in another thread while the results before it are used. What `make` raises is raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting: deque[Any] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _to_host(accelerator: Accelerator, total: Tensor, norm: Tensor, signal: int) -> tuple[float, float, int]:
    """(loss summed over the devices, gradient norm, signal that any of them got): the step's one wait for the device."""
    if accelerator.num_processes == 1:  # a float, and not a tensor made of one: nothing is sent to the device
        value, length = torch.stack([total.float(), norm.to(total.device).float()]).tolist()
        return value, length, signal
    signals = nn.functional.one_hot(torch.tensor(signal, device=total.device), 32)  # by number, so that a sum over devices keeps it
    numbers: Tensor = accelerator.reduce(torch.cat([total.float().view(1), signals.float()]), "sum")  # type: ignore[assignment]
    value, *counts, length = torch.cat([numbers, norm.to(total.device).float().view(1)]).tolist()
    return value, length, max((i for i in range(1, 32) if counts[i]), default=0)


def _origins(batch: Sequence[Any], where: Callable[[Any], Sequence[str]]) -> list[str]:
    return [place for row in batch for place in where(row)]


def _bad_rows(micro_batches: list[list[Any]], losses: list[Tensor], where: Callable[[Any], Sequence[str]]) -> list[str]:
    """Where the rows of the micro-batches without a finite loss come from; of all, where only the gradient is not finite. To be asked on every device."""
    wild = [_origins(part, where) for part, loss in zip(micro_batches, losses, strict=True) if not math.isfinite(float(loss))]
    found = gather_object([(wild, [_origins(part, where) for part in micro_batches])])
    chosen = [places for wild, _ in found for places in wild] or [places for _, every in found for places in every]
    return [place for places in chosen for place in places]


def _end_with_the_best(model: nn.Module, evaluations: Evaluations, folder: Path, step: int) -> None:
    """Puts the parameters of the lowest evaluation loss back, where they are not those of the last step."""
    if evaluations.best and (best := evaluations.best[0][1]) != step:
        restore_parameters(model, load_checkpoint(folder / f"step-{best:06d}")[0])
        logger.info("the parameters of step %d, which had the lowest evaluation loss", best)


def randomness(handles: dict[str, Handle]) -> dict[str, Any]:
    """Every generator that this process draws from in training."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "handles": {name: handle.state_dict() for name, handle in handles.items()}}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_randomness(state: dict[str, Any], handles: dict[str, Handle]) -> None:
    """Puts them back."""
    torch.set_rng_state(state["torch"])
    for name, handle in handles.items():
        handle.load_state_dict(state["handles"][name])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
