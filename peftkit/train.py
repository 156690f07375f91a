"""The training loop, on accelerate: accumulate, clip, step, log, save, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import nn

from peftkit.checkpoint import checkpoints, load_checkpoint, restore_parameters, save_checkpoint
from peftkit.config import Config
from peftkit.memory import peak_memory_bytes
from peftkit.methods import Handle
from peftkit.optim import schedule


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
    """Rows per forward on one device; null is the whole batch at once, auto as much of it as memory is forecast to hold."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, in every parameter group."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"
    """auto: paged 8-bit AdamW for qlora on a GPU, else AdamW."""
    gradient_checkpointing: bool = False
    """Compute activations again in backward instead of keeping them."""
    full_finetuning: bool = False
    """Train every parameter of the base (fp32 weights, bfloat16 arithmetic where there is any) instead of adapters."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of adapter weights, data order, dropout and noise."""
    log_every: int = Field(10, gt=0)
    """Steps between lines of metrics.jsonl."""
    save_every: int | None = Field(None, gt=0)
    """Steps between checkpoints; null saves none on the way."""
    keep_last: int = Field(2, gt=0)
    """How many checkpoints to keep."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.max_steps and self.num_epochs:
            raise ValueError("max_steps and num_epochs are both given; keep one")
        return self

    def steps(self, rows: int) -> int:
        """Optimizer steps for a training set of `rows` rows."""
        return self.max_steps or math.ceil(rows * (self.num_epochs or 1.0) / self.batch_size)


class TrainingStopped(RuntimeError):
    """Training cannot sensibly go on; the message says why and what to do."""


@dataclass
class TrainStats:
    """Counts of a run so far; a resumed run goes on counting."""

    seconds: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    steps: int = 0

    def summary(self) -> dict[str, float]:
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "peak_memory_bytes": peak_memory_bytes(),
            "steps": self.steps,
        }


def enable_checkpointing(model: Any) -> None:
    """Has a transformers model compute its activations again in backward (non-reentrant, so that frozen inputs do no harm)."""
    # Renamed in transformers 5.2x; the old name warns there, the new one is missing in 5.17.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class DataOrder:
    """Which rows make step k: the rows are shuffled anew each epoch, from the seed alone, so any step can be asked for."""

    def __init__(self, rows: int, batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._epoch = -1
        self._permutation: list[int] = []

    def __getitem__(self, step: int) -> list[int]:
        return [self._at(step * self.batch_size + i) for i in range(self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.rows, generator=generator).tolist()
        return self._permutation[place]


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
) -> TrainStats:
    """Trains `model` through `loss` on `rows`; checkpoints go to `folder`, metrics of every step to `on_step`.

    `to_batch` makes the loss's input of rows, `length` and `supervised` count a row's tokens, padding left out. Losses are summed over the
    micro-batches and devices of a step and divided once by the step's supervised tokens, so that accumulation does not
    change them. With `autocast` the forward runs in bfloat16 over weights of higher precision. Raises TrainingStopped on a loss or gradient that is not finite.
    """
    steps = config.steps(len(rows))
    order = DataOrder(len(rows), config.batch_size, config.seed)
    factor = schedule(config.lr_scheduler, steps, config.warmup_ratio)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    stats = TrainStats()
    if resume and (found := checkpoints(folder)):
        tensors, state = load_checkpoint(found[-1])
        restore_parameters(model, tensors)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        for name, handle in handles.items():
            handle.load_state_dict(state["handles"][name])
        stats = TrainStats(**state["stats"])
        _set_rng(state["rng"])
    rank, world = accelerator.process_index, accelerator.num_processes
    if config.micro_batch_size == "auto":
        raise ValueError("micro_batch_size: auto is decided before the loop; give it a number")
    micro = config.micro_batch_size or math.ceil(config.batch_size / world)
    prepared = accelerator.prepare(loss)
    model.train()
    while stats.steps < steps:
        started = time.perf_counter()
        batch = [rows[i] for i in order[stats.steps]]
        tokens = sum(supervised(row) for row in batch)  # of all devices: each holds the order, so no one needs to ask
        total = torch.zeros((), device=accelerator.device)
        mine = batch[rank::world]
        for start in range(0, len(mine), micro):
            inputs = to_batch(mine[start : start + micro])
            last = start + micro >= len(mine)
            with nullcontext() if last else accelerator.no_sync(prepared):
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=autocast):
                    part, _ = prepared(**inputs)
                accelerator.backward(part * (world / max(tokens, 1)))
            total += part.detach()
        norm = float(accelerator.clip_grad_norm_(list(trained.values()), config.max_grad_norm))
        value = float(accelerator.reduce(total, "sum")) / max(tokens, 1)
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingStopped(
                f"non-finite loss ({value}) or gradient norm ({norm}) at step {stats.steps + 1}, rows {order[stats.steps]}: "
                "lower train.learning_rate, or use dtype bfloat16 or float32 if this is float16; earlier checkpoints are whole"
            )
        rate = float(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        stats.steps += 1
        stats.tokens += sum(length(row) for row in batch)
        stats.supervised_tokens += tokens
        stats.seconds += time.perf_counter() - started
        on_step(stats.steps, {"loss": value, "gradient_norm": norm, "learning_rate": rate, **stats.summary()})
        if config.save_every and stats.steps % config.save_every == 0 and stats.steps < steps and accelerator.is_main_process:
            state = {
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "handles": {name: handle.state_dict() for name, handle in handles.items()},
                "stats": vars(stats),
                "rng": _rng(),
            }
            save_checkpoint(folder, stats.steps, trained, state, config.keep_last)
    return stats


def _rng() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
