"""Adapter folders in peft's format, as updates that can be combined, and back."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftkit.adapter_file import ADAPTER_FILE, CARD_FILE, CONFIG_FILE, PREFIX, CheckpointError, checksum, local_folder, read_folder
from peftkit.config import ConfigError, suggest


class Layout(NamedTuple):
    """How a file holds the factors of one module: all that several adapters must have in common there."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()  # of a convolution, whose A is (r, in, *kernel) and B (out, r, 1, ...)
    experts: int = 1  # of a parameter (experts, out, in), whose A is (experts r, in) and B (out, r experts)
    embedding: bool = False

    def to_state(self, name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The file's tensors of the module `name`: A (experts, r, in) and B (experts, out, r)."""
        kind, end = (".lora_embedding_", "") if self.embedding else (".lora_", ".weight")
        a = a.reshape(-1, self.inputs, *self.kernel)
        b = b.permute(1, 2, 0).reshape(self.outputs, -1, *(1 for _ in self.kernel))
        return {f"{PREFIX}{name}{kind}A{end}": a.contiguous(), f"{PREFIX}{name}{kind}B{end}": b.contiguous()}


class Update(NamedTuple):
    """delta = scale B A of one module in one adapter."""

    a: Tensor  # (experts, r, in), in the file's dtype
    b: Tensor  # (experts, out, r)
    scale: float
    layout: Layout


class Adapter(NamedTuple):
    folder: Path
    config: dict[str, Any]
    card: dict[str, Any]  # what peftkit wrote beside it, or nothing
    updates: dict[str, Update]  # by module
    plain: dict[str, Tensor]  # by key: weights held in full


def few(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def find_adapter(folder: str | Path) -> Path:
    """The adapter folder that is meant by it or by its run folder. Raises ConfigError, with near names, where there is no folder."""
    folder = local_folder(folder)
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise ConfigError(f"there is no folder {folder}{suggest(folder.name, near)}")
    inner = folder / "adapter"
    return inner if not (folder / CONFIG_FILE).exists() and (inner / CONFIG_FILE).exists() else folder


def read(folder: Path) -> Adapter:
    """The updates and plain weights of an adapter folder. Raises ConfigError for what is no plain LoRA, else CheckpointError."""
    _, config, state, card = read_folder(folder)
    _check_config(folder, config)
    found: dict[str, dict[str, Tensor]] = {}
    plain = {}
    for key, tensor in state.items():
        stem, lora, part = key.rpartition(".lora_")
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{folder / ADAPTER_FILE}: {key} is no key of peft's files: it does not start with {PREFIX}")
        if lora and part not in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
            raise CheckpointError(f"{folder / ADAPTER_FILE}: {key} cannot be averaged: it is neither A nor B of a LoRA update")
        if lora:
            found.setdefault(stem.removeprefix(PREFIX), {})[part] = tensor
        else:
            plain[key] = tensor
    if not found:
        raise CheckpointError(f"{folder / ADAPTER_FILE} holds no LoRA update")
    return Adapter(folder, config, card, {name: _update(folder, config, name, parts) for name, parts in found.items()}, plain)


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    where = folder / CONFIG_FILE
    if config.get("use_dora"):
        raise ConfigError(
            f"{where}: a DoRA adapter: g (W + s B A) is not W plus an update, so averaging it needs the base; "
            f"merge it into its base first (peftkit merge {folder} OUTPUT) and average the merged weights"
        )
    ranks = [config["r"], *_patterns(config, "rank").values()]
    alphas = [config["lora_alpha"], *_patterns(config, "alpha").values()]
    if not all(isinstance(r, int) and r > 0 for r in ranks) or not all(isinstance(alpha, (int, float)) and math.isfinite(alpha) for alpha in alphas):
        raise ConfigError(f"{where}: r must be a whole number above 0 and lora_alpha a finite number, also in the patterns")
    # A key of experts does not say which of the module's parameters it belongs to.
    endings = {str(parameter).rpartition(".")[2] for parameter in config.get("target_parameters") or []}
    for pattern in {**_patterns(config, "rank"), **_patterns(config, "alpha")}:
        if pattern.rpartition(".")[2] in endings:
            raise ConfigError(f"{where}: a rank or alpha of its own for the parameter {pattern!r} is not supported in averaging")


def _patterns(config: dict[str, Any], kind: str) -> dict[str, Any]:
    return config.get(f"{kind}_pattern") or {}


def _update(folder: Path, config: dict[str, Any], name: str, parts: dict[str, Tensor]) -> Update:
    """One module's tensors as a batch of factors. Raises CheckpointError where they do not belong together."""
    where = f"{folder / ADAPTER_FILE}: {name}"
    embedding = "embedding_A" in parts or "embedding_B" in parts
    a, b = (parts.get(f"embedding_{side}" if embedding else f"{side}.weight") for side in "AB")
    if a is None or b is None:
        raise CheckpointError(f"{where} has {'no A beside its B' if a is None else 'no B beside its A'}")

    def of(kind: str, default: float) -> float:  # as peft does: the first pattern that matches the end of the name
        return next((value for pattern, value in _patterns(config, kind).items() if re.fullmatch(rf"(.*\.)?({pattern})", name)), default)

    r, experts = of("rank", config["r"]), 1
    alpha = of("alpha", config["lora_alpha"])
    shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
    if a.ndim > 2 and b.ndim == a.ndim and b.shape[1] != len(a):
        raise CheckpointError(f"{where} ({shapes}) is a convolution in groups, which is not supported in averaging")
    if len(a) != r and config.get("target_parameters") and a.ndim == 2 and len(a) % config["r"] == 0:
        r, alpha = config["r"], config["lora_alpha"]
        experts = len(a) // r
    if min(a.ndim, b.ndim) < 2 or a.ndim != b.ndim or b.shape[1] != len(a) or b.numel() != len(b) * len(a) or len(a) != experts * r:
        raise CheckpointError(f"{where}: {shapes} are no factors of rank {r}, which {CONFIG_FILE} gives it")
    layout = Layout(a.shape[1], b.shape[0], tuple(a.shape[2:]), experts, embedding)
    a, b = a.reshape(experts, len(a) // experts, -1), b.reshape(len(b), -1, experts).permute(2, 0, 1)
    return Update(a, b, alpha / (math.sqrt(r) if config.get("use_rslora") else r), layout)


# --------------------------------------------------------------------------------------------------------------- together


def _plainly(value: Any) -> Any:
    """A config's value for comparison: the order of a list and the kind of nothing do not matter."""
    return sorted(value) if isinstance(value, list) and value else value or None


def check_together(adapters: list[Adapter]) -> None:
    """Raises ConfigError where adapters belong to different bases, or train different things beside their updates."""
    for key in ("base_model_name_or_path", "revision", "bias", "modules_to_save", "trainable_token_indices", "target_parameters"):
        told = [(adapter.folder, adapter.config[key]) for adapter in adapters if adapter.config.get(key)]
        for folder, value in told[1:]:
            holder, first = told[0]
            same = _plainly(value) == _plainly(first) if key != "trainable_token_indices" else value == first  # rows stand in that order
            if not same and not (key == "base_model_name_or_path" and _same_base(value, first)):
                why = "updates of different bases cannot be averaged" if key in ("base_model_name_or_path", "revision") else "they must be the same"
                raise ConfigError(f"{key}: {holder} has {first!r}, {folder} has {value!r}: {why}")
    marked = [(adapter.folder, adapter.card["weights"]) for adapter in adapters if adapter.card.get("weights")]
    for folder, landmark in marked[1:]:
        holder, first = marked[0]
        if landmark["name"] == first["name"] and not _same_weights(landmark, first):
            raise ConfigError(f"{holder} and {folder} were trained on bases of one name whose {first['name']} differ: their updates cannot be averaged")


def _same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two cards show the same frozen weight, but for the rounding of 16-bit types."""
    if one["shape"] != other["shape"]:
        return False
    alike = torch.isclose(torch.tensor(one["values"]), torch.tensor(other["values"]), rtol=2**-7, atol=1e-6)
    return alike.float().mean().item() > 0.9


def _same_base(one: str, other: str) -> bool:
    """Two names of one local folder, or of the model that every installation brings."""
    one_path, other_path = Path(one), Path(other)
    ends = {path.parts[-3:] for path in (one_path, other_path)}
    return ends == {("peftkit", "builtin", "tiny")} or (one_path.is_dir() and other_path.is_dir() and one_path.samefile(other_path))


def plain_weights(adapters: list[Adapter], weights: list[float], notes: list[str]) -> dict[str, Tensor]:
    """sum_i w_i W_i of the weights held in full: W + sum_i w_i (W_i - W) where the w_i sum to 1, and unknown without W where not."""
    state, averaged = {}, []
    for key in sorted({key for adapter in adapters for key in adapter.plain}):
        holders = [adapter for adapter in adapters if key in adapter.plain]
        first = holders[0].plain[key]
        for other in holders[1:]:
            if other.plain[key].shape != first.shape:
                raise CheckpointError(f"{key}: {holders[0].folder} has {tuple(first.shape)}, {other.folder} has {tuple(other.plain[key].shape)}")
        if key.endswith(".base_layer.weight"):  # peft's copy of the frozen weight beneath an update
            for other in holders[1:]:
                if not torch.equal(other.plain[key], first):
                    raise CheckpointError(f"{key}, a frozen weight of the base, differs between {holders[0].folder} and {other.folder}")
            state[key] = first
            continue
        for adapter in adapters:
            if key not in adapter.plain:
                raise CheckpointError(f"{key} is held in full by {holders[0].folder} and is not in {adapter.folder}: averaging it needs the base's weight")
        if abs(sum(weights) - 1) > 1e-6:
            raise ConfigError(f"{key} is held in full, not as an update: averaging it without the base needs weights that sum to 1, not to {sum(weights):g}")
        parts = [weight * adapter.plain[key].double() for adapter, weight in zip(adapters, weights, strict=True)]
        state[key] = torch.stack(parts).sum(0).float()
        averaged.append(key.removeprefix(PREFIX))
    if averaged:
        notes.append(f"{len(averaged)} weights held in full are averaged plainly: {few(averaged)}")
    return state


def common_layouts(adapters: list[Adapter], notes: list[str]) -> dict[str, Layout]:
    """Module -> layout, in the order of names. Raises CheckpointError where two adapters differ on one."""
    found: dict[str, tuple[Layout, Path]] = {}
    for adapter in adapters:
        for name, update in adapter.updates.items():
            layout, folder = found.setdefault(name, (update.layout, adapter.folder))
            if layout != update.layout:
                raise CheckpointError(f"{name}: {folder} has an update {_shape(layout)}, {adapter.folder} one {_shape(update.layout)}; are the bases the same?")
    for adapter in adapters:
        absent = sorted(found.keys() - adapter.updates.keys())
        if absent:
            notes.append(f"{adapter.folder} has no update of {len(absent)} of the {len(found)} modules; it counts as zero there: {few(absent)}")
    return {name: found[name][0] for name in sorted(found)}


def _shape(layout: Layout) -> str:
    shape = (layout.outputs, layout.inputs, *layout.kernel)
    return f"{(layout.experts, *shape) if layout.experts > 1 else shape}{' of an embedding' * layout.embedding}"


def ranks_of(adapters: list[Adapter], layouts: dict[str, Layout], rank: int | None, factored: bool) -> dict[str, int]:
    """Module -> rank in the file: `rank` or the sum of the ranks, less where a module allows no more; all experts share one.

    factored: the combination is a sum of the factors, whose rank is at most the sum of theirs. Raises ConfigError for a rank
    that no module's combination can have.
    """
    sums = {name: sum(adapter.updates[name].a.shape[1] for adapter in adapters if name in adapter.updates) for name in layouts}
    sides = {name: min(layout.outputs, layout.inputs * math.prod(layout.kernel)) for name, layout in layouts.items()}
    most = {name: min(sums[name], sides[name]) if factored else sides[name] for name in layouts}
    if rank is not None and rank > max(most.values()):
        raise ConfigError(f"rank: {rank} is more than the combination of any module can have, which is {max(most.values())}")
    if rank is not None:
        ranks = {name: min(rank, most[name]) for name in layouts}
    else:
        ranks = sums if factored else {name: min(sums[name], sides[name]) for name in layouts}
    shared = max((ranks[name] for name, layout in layouts.items() if layout.experts > 1), default=0)
    return {name: shared if layout.experts > 1 else ranks[name] for name, layout in layouts.items()}


# ---------------------------------------------------------------------------------------------------------------- writing


def common_config(adapters: list[Adapter], layouts: dict[str, Layout], ranks: dict[str, int]) -> dict[str, Any]:
    """The adapter_config.json: scale 1 everywhere (alpha = r), patterns where ranks differ, the modules as the files named them."""
    configs = [adapter.config for adapter in adapters]

    def agreed(key: str) -> bool:
        return all(_plainly(config.get(key)) == _plainly(configs[0].get(key)) for config in configs)

    experts = [ranks[name] for name, layout in layouts.items() if layout.experts > 1]
    usual = experts[0] if experts else Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    changed: dict[str, Any] = {
        "r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": dict(pattern), "use_rslora": False, "init_lora_weights": True,
        "inference_mode": True, "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
    }  # fmt: skip
    for key in ("base_model_name_or_path", "revision", "target_parameters", "ensure_weight_tying"):
        changed[key] = next((config[key] for config in configs if config.get(key)), configs[0].get(key))
    for key, otherwise in {"lora_dropout": 0.0, "task_type": None, "auto_mapping": None}.items():
        changed[key] = configs[0].get(key) if agreed(key) else otherwise
    selection = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    if not all(map(agreed, selection)):  # then each by its full name; what target_parameters names is no module
        changed |= dict.fromkeys(selection) | {"target_modules": [name for name, layout in layouts.items() if layout.experts == 1]}
    return configs[0] | changed


def write(target: Path, state: dict[str, Tensor], config: dict[str, Any], card: dict[str, Any]) -> None:
    """Writes the folder beside its place, reads it back, compares, and only then puts it there."""
    wrong = [key for key, tensor in state.items() if not torch.isfinite(tensor.float()).all()]
    if wrong:
        raise CheckpointError(f"the combination of {wrong[0]} is too large for fp32; nothing was written")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as beside:
        folder = Path(beside) / "adapter"
        folder.mkdir()
        save_file(state, folder / ADAPTER_FILE, metadata={"format": "pt"})
        card = card | {"sha256": checksum(folder / ADAPTER_FILE)}
        for name, content in {CONFIG_FILE: config, CARD_FILE: card}.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        written = load_file(folder / ADAPTER_FILE)
        same = written.keys() == state.keys() and all(torch.equal(written[key], tensor) for key, tensor in state.items())
        if not same or json.loads((folder / CONFIG_FILE).read_text()) != config:
            raise CheckpointError(f"{folder} does not hold what was saved; nothing was left behind")
        folder.rename(target)
