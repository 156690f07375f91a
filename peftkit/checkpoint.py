"""Adapter files in peft's format, and training checkpoints that are either whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftkit.config import ConfigError, suggest
from peftkit.layers import ADAPTER, adapter_layers, is_linear
from peftkit.methods import DoRA, LoRA, attach, attachment, to_recipe

ADAPTER_FILE, CONFIG_FILE, CARD_FILE = "adapter_model.safetensors", "adapter_config.json", "peftkit.json"
PREFIX = "base_model.model."


class CheckpointError(RuntimeError):
    """What was written cannot be read back, or what is read does not belong to this model."""


# ---------------------------------------------------------------------------------------------------------- adapter files


def _by_key(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter by peft's file keys: `base_model.model.<module>.lora_A.weight`, ..."""
    return {
        f"{PREFIX}{name}.{trained.key}": trained.parameter
        for name, layer in adapter_layers(model).items()
        if adapter in layer.specs
        for trained in layer.role_parameters(adapter)
    }


def adapter_state(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Tensor]:
    """The adapter by peft's file keys, on the CPU."""
    return {key: parameter.detach().cpu().contiguous() for key, parameter in _by_key(model, adapter).items()}


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Writes the adapter as peft does (`PeftModel.from_pretrained` reads it), reads it back and compares.

    Raises ValueError where the model has no adapter layers, CheckpointError where the file read back differs.
    """
    folder = Path(folder)
    record = attachment(model)
    state = adapter_state(model)
    if not state:
        raise ValueError("this model has no adapter layers to save (methods without layers, such as neftune, leave nothing behind)")
    swapping = next(method for method in record.methods if isinstance(method, LoRA))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / ADAPTER_FILE, metadata={"format": "pt"})
    swapping.peft_config(sorted(adapter_layers(model)), model).save_pretrained(str(folder))
    card = {"methods": to_recipe(record.methods), "base": getattr(model, "name_or_path", None)}
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
    written = load_file(folder / ADAPTER_FILE)
    wrong = [key for key, tensor in state.items() if key not in written or not torch.equal(written[key], tensor)]
    if wrong or written.keys() != state.keys():
        raise CheckpointError(f"{folder / ADAPTER_FILE} does not hold what was saved: {len(wrong)} tensors differ, such as {wrong[:1]}")
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Attaches the adapter in `folder` (ours or peft's) to `model`, or fills the one that is attached.

    All of it or nothing: raises CheckpointError naming keys that are missing, unexpected or of another shape, and
    ConfigError where the folder is no adapter or uses what peftkit does not have.
    """
    folder = Path(folder)
    config = _read_peft_config(folder)
    try:
        state = load_file(folder / ADAPTER_FILE)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / ADAPTER_FILE} cannot be read ({error})") from error
    fresh = not adapter_layers(model)
    if fresh:
        names = sorted({key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in state})
        linears = {name for name, module in model.named_modules() if is_linear(module)}
        unknown = [name for name in names if name not in linears]
        if unknown:
            raise CheckpointError(
                f"{folder} adapts {len(unknown)} modules that this {type(model).__name__} does not have, such as {unknown[0]!r}"
                f"{suggest(unknown[0], sorted(linears))}; it belongs to {config.get('base_model_name_or_path') or 'another base'}"
            )
        attach(model, _method(config, names))
    if not fresh:
        stored, here = _method(config, []).scale, next(iter(adapter_layers(model).values())).specs[ADAPTER].scale
        if stored != here:
            raise CheckpointError(f"{folder} scales its update by {stored:g}, the attached adapter by {here:g} (alpha, r, rslora); detach it first")
    wanted = _by_key(model, ADAPTER)
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [f"{k}: {tuple(state[k].shape)} in the file, {tuple(wanted[k].shape)} here" for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or unexpected or shapes:
        from peftkit.methods import detach

        if fresh:
            detach(model)
        problems = [f"missing: {', '.join(missing[:3])}"] * bool(missing) + [f"unexpected: {', '.join(unexpected[:3])}"] * bool(unexpected)
        raise CheckpointError(f"{folder} does not fit this model, nothing was loaded ({'; '.join(problems + shapes[:3])})")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(state[key])
    return model


def _read_peft_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG_FILE, ADAPTER_FILE):
        if not (folder / name).exists():
            hint = f"; there is one in {folder / 'adapter'}" if (folder / "adapter" / name).exists() else ""
            raise ConfigError(f"{folder} is no adapter folder: it holds no {name}{hint}")
    config = json.loads((folder / CONFIG_FILE).read_text())
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{folder / CONFIG_FILE}: peft_type {config.get('peft_type')!r} is not LoRA or DoRA, which is what peftkit has")
    # Options that change what the adapter computes and that peftkit does not have: loading would be silently wrong.
    for key, neutral in {"bias": "none", "lora_bias": False, "modules_to_save": None, "rank_pattern": None, "alpha_pattern": None,
                         "layer_replication": None, "trainable_token_indices": None, "target_parameters": None, "use_qalora": False,
                         "use_bdlora": None, "alora_invocation_tokens": None, "kasa_config": None, "arrow_config": None}.items():  # fmt: skip
        if config.get(key) not in (neutral, None, {}, []):
            raise ConfigError(f"{folder / CONFIG_FILE}: {key}: {config[key]!r} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ConfigError(f"{folder / CONFIG_FILE}: init_lora_weights: {start!r} changed the base it was trained on; convert it with peft first")
    return config


def _method(config: dict[str, Any], names: list[str]) -> LoRA:
    kind = DoRA if config.get("use_dora") else LoRA
    return kind(
        r=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout", 0.0), rslora=config.get("use_rslora", False), target_modules=names
    )


# --------------------------------------------------------------------------------------------------- training checkpoints

_STEP = re.compile(r"step-(\d+)")


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep_last: int) -> Path:
    """Writes `folder`/step-<n> atomically: into a folder of another name, to the disk, read back, then renamed.

    tensors: the trained parameters by name; state: whatever torch.save takes. Only the newest `keep_last` are kept.
    A process killed at any moment leaves every earlier checkpoint whole and no half one under a checkpoint's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".writing-*"):  # of a run that was killed while writing
        shutil.rmtree(left)
    writing, final = folder / f".writing-{step:06d}", folder / f"step-{step:06d}"
    writing.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, writing / "trained.safetensors")
    torch.save(state, writing / "state.pt")
    for file in writing.iterdir():
        _sync(file)
    written = load_file(writing / "trained.safetensors")
    if written.keys() != tensors.keys() or not all(torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise CheckpointError(f"{writing} does not hold what was saved; earlier checkpoints are untouched")
    torch.load(writing / "state.pt", weights_only=False, map_location="cpu")
    if final.exists():
        shutil.rmtree(final)
    os.rename(writing, final)
    _sync(folder)
    for old in checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(trained parameters by name, state) of one checkpoint. Raises CheckpointError where it cannot be read."""
    try:
        return load_file(path / "trained.safetensors"), torch.load(path / "state.pt", weights_only=False, map_location="cpu")
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to resume from the one before") from error


def restore_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies a checkpoint's tensors into the model's trained parameters; all names must match."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained.keys() != tensors.keys():
        odd = sorted(trained.keys() ^ tensors.keys())
        raise CheckpointError(f"the checkpoint trains other parameters than this run: {len(odd)} differ, such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
