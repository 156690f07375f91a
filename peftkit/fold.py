"""An adapter folded into its base, on disk: merged, compared with the adapted model, written, read back, compared again, and only then in its place."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit.adapter_file import CONFIG_FILE
from peftkit.config import ConfigError, suggest
from peftkit.layers import LoRAExperts, adapter_layers, dense_weight
from peftkit.merge import MergeCheck, compare_logits, merge_verified
from peftkit.model import load
from peftkit.save_model import logits_of, token_ids, write_verified
from peftkit.use import Origin, find_origin, load_adapted

ONTO = {
    "trained": "the weights it was trained on, dequantised: the model that was trained",
    "original": "the unquantised weights: another model, nearer to the base as published",
    "requantised": "the weights it was trained on, merged and quantised again: small, and most of the update may be lost",
}
MAX_KL = 1e-2  # nats


@dataclass(frozen=True)
class FoldReport:
    """What was written, and how far it is from the adapter on the base that it was folded into, and from the model that was trained."""

    folder: Path
    onto: str
    check: MergeCheck
    max_kl: float
    from_trained: MergeCheck | None = None
    """Where another model than the trained one was asked for: its distance from the trained one."""
    lost: float | None = None
    """requantised: |W written - (W + update)| / |update|, Frobenius norms over all adapted modules."""

    def __str__(self) -> str:
        lines = [f"folded into {ONTO[self.onto].split(':')[0]}", f"{self.check} (bound: KL {self.max_kl:g})"]
        if self.onto == "requantised":
            lines[1] = f"{self.check} (no bound: this is not the model that was trained)"
            lines.append(f"quantising again moved the weights by {self.lost:.0%} of the adapter's update; --onto trained loses nothing")
        elif self.from_trained is not None:
            lines.append(str(self.from_trained).replace("merged against adapted", "against the quantised model that was trained"))
        return "\n".join([*lines, "read back from disk: the same logits, bit for bit"])


def check_target(output: str) -> Path:
    """The folder to write. Raises ConfigError where something is there already."""
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        adapter_there = any((folder / CONFIG_FILE).exists() for folder in (target, target / "adapter"))
        hint = "; to average adapters, name the output with --output" if adapter_there else ""
        raise ConfigError(f"{output} exists and is not empty; give a new folder{hint}")
    return target


def fold(
    adapter: str, output: str, model: str | None = None, quantize: str | None = None, onto: str = "trained", max_kl: float = MAX_KL, dtype: str | None = None
) -> FoldReport:  # fmt: skip
    """Writes the model of an adapter (a run or adapter folder) as a plain model folder with its tokenizer.

    onto: one of ONTO. dtype: of the arithmetic and the folder; None is what the run used, else the hardware's.
    Raises ConfigError for wrong usage, MergeError where the mean KL divergence from the adapted model is above `max_kl` nats,
    CheckpointError where the folder read back computes something else; nothing is left behind then.
    """
    if onto not in ONTO:
        raise ConfigError(f"--onto: unknown {onto!r}{suggest(onto, ONTO)} (there are: {', '.join(ONTO)})")
    target, origin = check_target(output), find_origin(adapter, model, quantize)
    origin = origin._replace(dtype=dtype or origin.dtype)
    if origin.adapter is None:
        raise ConfigError(f"{adapter} holds no adapter to fold into a base")
    if onto == "requantised" and origin.quantize is None:
        raise ConfigError("--onto requantised: the base of this adapter is not quantised; --onto trained gives the model that was trained")
    trained = None
    if onto == "original" and origin.quantize is not None:
        adapted, _ = load_adapted(origin)
        trained = logits_of(adapted)
        del adapted  # the two bases need not be in memory together
        adapted, tokenizer = load_adapted(origin._replace(quantize=None), another_base=True)
        against = compare_logits(trained, logits_of(adapted))
    else:
        adapted, tokenizer = load_adapted(origin)
    if onto == "requantised":
        return _requantise(adapted, tokenizer, origin, target, max_kl)
    check = merge_verified(adapted, token_ids(adapted), max_kl)
    write_verified(adapted, tokenizer, target)
    return FoldReport(target, onto, check, max_kl, None if trained is None else against)


def _requantise(adapted: Any, tokenizer: Any, origin: Origin, target: Path, max_kl: float) -> FoldReport:
    if any(isinstance(layer, LoRAExperts) for layer in adapter_layers(adapted).values()):
        raise ConfigError("--onto requantised: a folder cannot hold experts in 4 bits; use --onto trained")
    before = logits_of(adapted)
    moved = sum(_square(layer.merged_weight() - dense_weight(layer.base_layer)) for layer in adapter_layers(adapted).values())
    names = list(adapter_layers(adapted))
    merge_verified(adapted, token_ids(adapted), max_kl)  # in place
    merged = adapted
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".merging-") as plain:
        merged.save_pretrained(plain)
        quantized, _ = load(plain, origin.quantize, merged.dtype)  # type: ignore[arg-type]
    lost = sum(_square(dense_weight(quantized.get_submodule(name)) - dense_weight(merged.get_submodule(name))) for name in names)
    check = compare_logits(before, logits_of(quantized))
    write_verified(quantized, tokenizer, target)
    return FoldReport(target, "requantised", check, float("inf"), lost=(lost / moved) ** 0.5 if moved else 0.0)


def _square(weight: Tensor) -> float:
    return weight.detach().double().square().sum().item()
