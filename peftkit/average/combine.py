"""Averaging and arithmetic of adapters: one adapter whose update combines the updates of several.

    report = average(["runs/a", "runs/b"], [0.7, 0.3], "runs/average", rank=16)

What is averaged are the updates delta = s B A themselves, never A and B apart: (B1 + B2)(A1 + A2) holds the cross terms
B1 A2 and B2 A1, which nobody trained. All is computed in fp64 from the files alone, without the base, and stored in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import pad

from peftkit.average.algebra import dare, factored_norm, ties, truncate, truncate_factors
from peftkit.average.files import Update, check_together, common_config, common_layouts, few, find_adapter, plain_weights, ranks_of, read, write
from peftkit.config import ConfigError, suggest
from peftkit.console import bar

Dense = Callable[[Tensor, Tensor], Tensor]  # deltas (n, ...), weights (n,) -> (...)
METHODS = ("linear", "ties", "dare")
DENSITY = {"ties": 0.2, "dare": 0.5}  # TIES: the paper's k = 20%


@dataclass(frozen=True)
class AverageReport:
    """What was written, and how far it is from the combination that was asked for."""

    folder: Path
    method: str
    weights: list[float]
    ranks: dict[str, int]
    """Module -> rank of its update in the file."""
    errors: dict[str, float]
    """Module -> |delta - B A| / |delta|, Frobenius norms: what the rank and the rounding to fp32 cost."""
    error: float
    """The same for all modules as one long vector."""
    notes: list[str]
    """What else to know: modules that an adapter lacks, weights averaged plainly."""

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        weights = ", ".join(f"{weight:g}" for weight in self.weights)
        lines = [f"{self.method}, weights {weights}: {len(self.ranks)} modules of rank {low if low == high else f'{low} to {high}'}"]
        worst = max(self.errors, key=lambda name: self.errors[name])
        if self.errors[worst] < 1e-5:
            lines.append(f"exact but for the rounding to fp32: relative error {self.error:.1e}")
        else:
            lines.append(f"relative error of the update: {self.error:.3%} overall, at worst {self.errors[worst]:.3%} in {worst}")
        return "\n".join([*lines, *self.notes])


def average(
    folders: Sequence[str | Path], weights: Sequence[float] | None, output: str | Path, rank: int | None = None, method: str = "linear",
    density: float | None = None, seed: int | None = None, console: Console | None = None,
) -> AverageReport:  # fmt: skip
    """Writes the adapter folder `output`, whose update of each module combines those of the adapters in `folders`.

    linear  delta = sum_i w_i s_i B_i A_i: exact by concatenation, of rank sum_i r_i; with `rank`, the best approximation
    ties    trim, elect a sign, disjoint mean (Yadav et al. 2023, arXiv 2306.01708), then the best approximation of a rank
    dare    drop and rescale, then the weighted sum (Yu et al. 2023, arXiv 2311.03099), then likewise

    folders: adapter folders, or run folders. weights: one each, negative ones too; None is 1/n each. rank: of the result,
    less where a module has less; None is the sum of the ranks. density: the share of entries that ties (None: 0.2) and dare
    (None: 0.5) keep. seed: of what dare drops (None: 0). console: where a progress bar goes.

    A module that an adapter lacks counts as zero there. Weights that the files hold in full (modules_to_save, biases, rows
    of tokens) are averaged plainly, for which the weights must sum to 1. The files written are read back and compared.

    Raises ConfigError for wrong usage, adapters of different bases and what is no plain LoRA; CheckpointError for files that
    are damaged, hold numbers that are not finite, or do not fit together. `output` is then not made.
    """
    target = Path(output)
    weights = [1 / len(folders)] * len(folders) if weights is None and folders else list(weights or [])
    density = _check_usage(folders, weights, target, rank, method, density, seed)
    adapters = [read(find_adapter(folder)) for folder in folders]
    check_together(adapters)
    notes: list[str] = []
    state = plain_weights(adapters, weights, notes)
    layouts = common_layouts(adapters, notes)
    ranks = ranks_of(adapters, layouts, rank, factored=method == "linear")
    config = common_config(adapters, layouts, ranks)
    generator, total = torch.Generator().manual_seed(seed or 0), sum(map(abs, weights))

    def dense(deltas: Tensor, here: Tensor) -> Tensor:
        return ties(deltas, here, density, total) if method == "ties" else dare(deltas, here, density, generator)

    sizes, offs = {}, {}
    with bar(console, "averaging", len(ranks)) if console else nullcontext() as shown:
        for name in ranks:
            here = [(adapter.updates[name], weight) for adapter, weight in zip(adapters, weights, strict=True) if name in adapter.updates]
            a, b, sizes[name], offs[name] = _combined(here, ranks[name], exact=rank is None, dense=None if method == "linear" else dense)
            state |= layouts[name].to_state(name, a, b)
            if shown:
                shown.advance()
    zero = [name for name in ranks if not sizes[name]]
    if zero:
        notes.append(f"the updates of {len(zero)} modules cancel out or are zero: {few(zero)}")
    of = [{"folder": str(adapter.folder), "weight": weight} for adapter, weight in zip(adapters, weights, strict=True)]
    base = {"base": config["base_model_name_or_path"], "weights": next((found for adapter in adapters if (found := adapter.card.get("weights"))), None)}
    for key in ("revision", "stored", "template"):  # what the adapters have in common
        told = [adapter.card.get(key) for adapter in adapters]
        base |= {key: told[0]} if told[0] is not None and all(each == told[0] for each in told) else {}
    made = {"of": of, "method": method, "rank": rank, "density": density if method != "linear" else None, "seed": (seed or 0) if method == "dare" else None}
    write(target, state, config, base | {"average": made})
    size, off = math.hypot(*sizes.values()), math.hypot(*offs.values())
    errors = {name: offs[name] / sizes[name] if sizes[name] else 0.0 for name in ranks}
    return AverageReport(target, method, weights, ranks, errors, off / size if size else 0.0, notes)


def _check_usage(folders: Sequence, weights: list[float], target: Path, rank: int | None, method: str, density: float | None, seed: int | None) -> float:
    """The density to use (1 for linear). Raises ConfigError for what can be known without reading a file."""
    if not folders:
        raise ConfigError("no adapter to average; give one folder or more")
    if method not in METHODS:
        raise ConfigError(f"method: unknown {method!r}{suggest(method, METHODS)} (there are: {', '.join(METHODS)})")
    if len(weights) != len(folders):
        raise ConfigError(f"weights: {len(weights)} for {len(folders)} adapters; give one for each, in their order")
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights: {', '.join(f'{weight:g}' for weight in weights)}: each must be a finite number")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank: {rank} is no rank; give a whole number of at least 1")
    if density is not None and method == "linear":
        raise ConfigError("density: linear keeps every entry; it belongs to the methods ties and dare")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density: {density:g} is no share of entries to keep; give a number above 0 and at most 1")
    if seed is not None and method != "dare":
        raise ConfigError(f"seed: {method} draws nothing; it belongs to the method dare")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty; give a new folder")
    return density if density is not None else DENSITY.get(method, 1.0)


def _combined(updates: list[tuple[Update, float]], rank: int, exact: bool, dense: Dense | None) -> tuple[Tensor, Tensor, float, float]:
    """(A, B, |delta|, |delta - B A|) of one module's combination delta, with A and B in fp32 and of the rank of the file.

    dense combines updates (n, ..., out, in) that are built; None is their weighted sum, for which they are not.
    """
    factors = [(update.a.double(), update.scale * update.b.double()) for update, _ in updates]
    weights = torch.tensor([weight for _, weight in updates], dtype=torch.float64)
    if dense is None:
        long_a, long_b = torch.cat([a for a, _ in factors], -2), torch.cat([weight * b for weight, (_, b) in zip(weights, factors, strict=True)], -1)
        a, b = (factor.float() for factor in ((long_a, long_b) if exact else truncate_factors(long_a, long_b, rank)))
        size = factored_norm(long_a, long_b)
        off = factored_norm(torch.cat([long_a, -a.double()], -2), torch.cat([long_b, b.double()], -1))
    else:
        delta = dense(torch.stack([b @ a for a, b in factors]), weights)
        a, b = (factor.float() for factor in truncate(delta, rank))
        size, off = delta.norm().item(), (delta - b.double() @ a.double()).norm().item()
    parts = sum(abs(weight) * factored_norm(a, b) for weight, (a, b) in zip(weights.tolist(), factors, strict=True))
    if size <= 1e-12 * parts:  # they cancel out: what is left is rounding, of which no share can be told
        size = off = 0.0
    # Zero rows and columns up to the rank of the file: all experts share one there.
    return pad(a, (0, 0, 0, rank - a.shape[-2])), pad(b, (0, rank - b.shape[-1])), size, off
