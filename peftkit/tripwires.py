"""Tripwires: what shows only during training and makes it worthless. Each stops the run with cause and remedy, or warns where told to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from peftkit.layers import adapter_layers
from peftkit.methods import Handle

Tripwire = Literal["no_supervised_tokens", "adapter_not_moving", "not_finite", "loss_rising", "no_gradient", "noise_in_evaluation", "base_changed"]
NAMES: tuple[str, ...] = get_args(Tripwire)

STEPS_TO_MOVE = 5  # optimizer steps after which every adapter must have moved
START = 5  # steps whose lowest loss is the start that later ones are held against: a rise within them must not hide itself
DEAD = 5  # steps in a row without any gradient, at a loss that is not 0: one alone can come back
RECENT = 10  # steps whose median loss is held against the start: a few bad batches are no divergence
SHOWN = 5  # names and rows listed one by one; the others are counted


class TrainingStopped(RuntimeError):
    """Training cannot sensibly go on; the message says why and what to do."""


class Tripwires:
    """The checks of one run, by name. A check that trips raises TrainingStopped, or, where it is in `warn_only`, says it once through `warn`.

    Made before the first step: it then remembers what must move (adapters) and what must not (the frozen base).
    `moved` tells on several devices whether a flag is set on any of them.
    """

    def __init__(
        self, model: nn.Module, handles: Mapping[str, Handle], warn_only: Sequence[str], warn: Callable[[str], None],
        moved: Callable[[Tensor], Tensor] = lambda flags: flags,
    ):  # fmt: skip
        self.model, self.handles, self.warn_only, self.warn, self.moved = model, handles, warn_only, warn, moved
        self.warned: set[str] = set()
        self.losses: list[float] = []
        self.start: float | None = None
        self.dead = 0  # steps in a row without a gradient
        self.base = checksums({name: p for name, p in model.named_parameters() if not p.requires_grad})
        self.watched = _must_move(model)
        self.adapters_at_start = checksums({f"{name}[{i}]": p for name, group in self.watched.items() for i, p in enumerate(group)})

    def trip(self, name: Tripwire, problem: str) -> None:
        """Raises TrainingStopped, or warns at the first time where the tripwire is one that only warns."""
        if name not in self.warn_only:
            raise TrainingStopped(f"{problem}\n(tripwire {name}; `train.warn_only: [{name}]` goes on all the same)")
        if name not in self.warned:
            self.warned.add(name)
            self.warn(f"{problem} (tripwire {name}; it only warns, and only once)")

    def supervised(self, tokens: int, step: int, rows: Callable[[], list[str]]) -> None:
        """Every step must have something to learn."""
        if tokens == 0:
            self.trip(
                "no_supervised_tokens",
                f"step {step} has no supervised token, so its rows teach nothing: {listed(rows())}. Their answers are masked or cut off: look at them with "
                "`peftkit check`, then raise data.max_length, change data.loss_on, or leave the rows out",
            )

    def finite(self, loss: float, norm: float, step: int, rows: Callable[[], list[str]]) -> bool:
        """Whether loss and gradient norm are numbers; where the tripwire only warns, the step must be left out."""
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        self.trip(
            "not_finite",
            f"non-finite loss ({loss}) or gradient norm ({norm}) at step {step}, rows: {listed(rows())}. Lower train.learning_rate, look at these rows, "
            "or use dtype bfloat16 or float32 if this is float16. The step was not taken; earlier checkpoints are whole, `--resume` goes on from the newest",
        )
        return False

    def rising(self, loss: float, step: int) -> None:
        """The median loss of the last steps must not be far above that of the first ones: not twice as high, and not by 2 nats and more."""
        self.losses = [*self.losses, loss][-RECENT:]
        if self.start is None:
            if len(self.losses) == START:
                self.start, self.losses = min(self.losses), []
            return
        recent = median(self.losses)
        if len(self.losses) == RECENT and recent > max(2 * self.start, self.start + 2):
            self.trip(
                "loss_rising",
                f"the loss diverges: {recent:.3g} is the median of the last {RECENT} steps up to step {step}, {self.start:.3g} the lowest of the "
                f"first {START}. Lower train.learning_rate (of loraplus also ratio), raise train.warmup_ratio, or lower train.max_grad_norm",
            )

    def learning(self, loss: float, norm: float, step: int) -> None:
        """Some gradient must come: a model that has diverged until its logits stand still need not have a loss above that of the start."""
        self.dead = self.dead + 1 if norm == 0 and loss > 0.01 else 0
        if self.dead >= DEAD:
            self.trip(
                "no_gradient",
                f"the gradient of all that trains was zero in the last {DEAD} steps up to step {step}, at a loss of {loss:.3g}: the model diverged so far that "
                "nothing changes its logits. Lower train.learning_rate (of loraplus also ratio), raise train.warmup_ratio, or lower train.max_grad_norm",
            )

    def adapters_moved(self, step: int) -> None:
        """Every adapter must have moved since the start. To be asked once, after the first steps."""
        if not self.watched:
            return
        now = checksums({f"{name}[{i}]": p for name, group in self.watched.items() for i, p in enumerate(group)})
        groups = {name: [f"{name}[{i}]" for i in range(len(group))] for name, group in self.watched.items()}
        device = next(iter(self.watched.values()))[0].device
        flags = self.moved(torch.tensor([any(now[key] != self.adapters_at_start[key] for key in keys) for keys in groups.values()], device=device).int())
        still = [name for name, moved in zip(groups, flags.tolist(), strict=True) if not moved]
        if still:
            self.trip(
                "adapter_not_moving",
                f"after {step} steps {len(still)} of {len(groups)} adapters have not moved, their B is as it was at the start: {listed(still)}. No gradient "
                "reaches them: reentrant gradient checkpointing over frozen inputs (use train.gradient_checkpointing, which is not reentrant), "
                "modules that no token passes through (name them in exclude_modules), or a module that was detached or copied",
            )

    def base_unchanged(self, when: str) -> None:
        """Nothing that is frozen may have changed.

        All of every weight is summed, not a sample: one pass at the speed of the memory costs less than writing the checkpoint, and also a change
        of a single row is seen.
        """
        frozen = {name: p for name, p in self.model.named_parameters() if name in self.base}
        now = checksums(frozen)
        changed = [name for name in self.base if now.get(name) != self.base[name]]
        if changed:
            self.trip(
                "base_changed",
                f"{len(changed)} frozen weights of the base changed during training ({when}): {listed(changed)}. The adapter would not fit the base that it "
                "is loaded on: an optimizer, a hook or a callback writes to them. Nothing was saved of this state; earlier checkpoints are whole",
            )

    @contextmanager
    def quiet(self, when: str) -> Iterator[None]:
        """For evaluation: no random number may be drawn in it. Noise and dropout draw, greedy scoring does not."""
        before = {**_generators(), **{name: handle.state_dict() for name, handle in self.handles.items()}}
        yield
        after = {**_generators(), **{name: handle.state_dict() for name, handle in self.handles.items()}}
        drew = [name for name in before if not _equal(before[name], after[name])]
        if drew:
            self.trip(
                "noise_in_evaluation",
                f"noise is active in evaluation ({when}): random numbers were drawn from the generator of {listed(drew)}. The scores are not the model's "
                "own: take the noise out of evaluation (the whole model in eval mode, functional dropout with training=self.training)",
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge the loss as if it had not stopped."""
        return {"losses": list(self.losses), "start": self.start, "dead": self.dead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.start, self.dead = list(state["losses"]), state["start"], state.get("dead", 0)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _must_move(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """By layer: every trained B, or, where a layer has none (embeddings, modules trained whole), all that it trains together."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, layer in adapter_layers(model).items():
        for adapter in layer.active:
            trained = [each for each in layer.role_parameters(adapter) if each.parameter.requires_grad]
            b = [each.parameter for each in trained if each.role == "B"]
            for i, parameter in enumerate(b):
                found[name if len(b) == 1 else f"{name} ({i})"] = [parameter]
            if not b and trained:
                found[name] = [each.parameter for each in trained]
    return found


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The bits of every tensor as integers, summed: any change of one value changes it. One transfer from each device."""
    sums: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta:
            sums.setdefault(tensor.device, []).append((name, _sum_of_bits(tensor.detach())))
    return {name: value for found in sums.values() for (name, _), value in zip(found, torch.stack([s for _, s in found]).tolist(), strict=True)}


def _sum_of_bits(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1)
    width = flat.element_size()
    wide = flat.numel() * width % 8 == 0 and flat.storage_offset() * width % 8 == 0
    integers = torch.int64 if wide else {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return flat.view(integers).sum(dtype=torch.int64)


def _generators() -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other
