"""What an adapter folder holds, in peft's format, read with care: a folder that is wrong in itself is refused before any model is touched."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peftkit.config import ConfigError
from peftkit.layers import AdapterLayer, adapter_layers, input_embedding
from peftkit.methods import DoRA, LoRA
from peftkit.methods.init import from_peft
from peftkit.methods.lora import deciding

ADAPTER_FILE, CONFIG_FILE, CARD_FILE = "adapter_model.safetensors", "adapter_config.json", "peftkit.json"
PREFIX = "base_model.model."


class CheckpointError(RuntimeError):
    """What was written cannot be read back, or what is read does not belong to this model."""


class AdapterFile(NamedTuple):
    """An adapter folder: peft's config, the tensors by key, and what peftkit wrote beside them ({} where it did not)."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, Tensor]
    card: dict[str, Any]

    def method(self, low_rank: list[str], whole: list[str]) -> LoRA:
        """The method of the adapter on the modules `low_rank`, with the modules `whole` trained as a whole. Raises ConfigError."""
        config = self.config
        # A pattern that decides nothing is an error where it is asked for; in a file it is without meaning.
        ranks, alphas = (
            {pattern: value for pattern, value in found.items() if pattern in {deciding(found, name) for name in low_rank}}
            for found in (config.get("rank_pattern") or {}, config.get("alpha_pattern") or {})
        )
        try:
            return (DoRA if config.get("use_dora") else LoRA)(
                r=config["r"],
                alpha=config["lora_alpha"],
                dropout=config.get("lora_dropout") or 0.0,
                rslora=config.get("use_rslora") or False,
                target_modules=low_rank,
                rank_pattern=ranks,
                alpha_pattern=alphas,
                bias=config.get("bias") or "none",
                init=from_peft(config.get("init_lora_weights")),
                modules_to_save=whole,
                trainable_tokens=config.get("trainable_token_indices") or None,
                ensure_weight_tying=bool(config.get("ensure_weight_tying")),
            )
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise ConfigError(f"{self.folder / CONFIG_FILE}: {_PEFT_NAMES.get(key, key)}: {problem['msg']}, got {problem['input']!r}") from error


_PEFT_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "trainable_tokens": "trainable_token_indices"}
# What the adapter computes is told by these keys, or does not depend on them. Any other that is set would be passed by in silence.
_READ = set("""
    peft_type r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform
    layers_pattern target_parameters bias init_lora_weights modules_to_save trainable_token_indices ensure_weight_tying fan_in_fan_out
    task_type auto_mapping base_model_name_or_path revision inference_mode peft_version
    megatron_core qalora_group_size eva_config runtime_config
""".split())  # fmt: skip


def local_folder(adapter: str | Path) -> Path:
    """Where an adapter lies: at a path of this machine, or in the cache of the hub, where `owner/name` is downloaded to. Raises ConfigError.

    What could be a mistyped path, since the folder around it is here, is none of the hub's.
    """
    path = Path(adapter).expanduser()
    if path.exists() or path.parent.is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(adapter)):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(adapter), allow_patterns=[ADAPTER_FILE, CONFIG_FILE, CARD_FILE]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"there is no folder {adapter}, and the adapter of this name cannot be had from the Hugging Face hub: {str(error).splitlines()[0][:200]}\n"
            "  check its spelling, the network, HF_HUB_OFFLINE, and for gated repositories `hf auth login`"
        ) from error


def read_folder(folder: Path) -> AdapterFile:
    """The adapter in `folder`. Raises ConfigError where it is none or uses what peftkit does not have, CheckpointError where it is damaged."""
    if not (folder / ADAPTER_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ConfigError(
            f"{folder} holds its weights as a pickle, adapter_model.bin, which can run code when it is read. Where you trust it, convert it: "
            f"safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), '{ADAPTER_FILE}')"
        )
    for name in (CONFIG_FILE, ADAPTER_FILE):
        if not (folder / name).exists():
            hint = f"; there is one in {folder / 'adapter'}" if (folder / "adapter" / name).exists() else ""
            raise ConfigError(f"{folder} is no adapter folder: it holds no {name}{hint}")
    config = read_json(folder / CONFIG_FILE)
    _check_config(folder / CONFIG_FILE, config)
    card = _read_card(folder / CARD_FILE) if (folder / CARD_FILE).exists() else {}
    state = _read_tensors(folder / ADAPTER_FILE, card)
    if config.get("ensure_weight_tying") and any(".lora_embedding_" in key for key in state) and not config.get("modules_to_save"):
        raise ConfigError(f"{folder / CONFIG_FILE}: ensure_weight_tying shares the factors of an embedding with the head, which is not supported")
    return AdapterFile(folder, config, state, card)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


def _read_card(path: Path) -> dict[str, Any]:
    card = read_json(path)
    weights = card.get("weights")
    if weights is not None:
        try:
            whole = isinstance(weights["name"], str) and len(weights["values"]) == SAMPLES and bool(weights["shape"])
            whole = whole and all(isinstance(size, int) for size in weights["shape"]) and all(isinstance(value, float) for value in weights["values"])
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path}: weights does not describe a weight of the base; the file was changed after it was saved")
    return card


def _check_config(path: Path, config: dict[str, Any]) -> None:
    missing = [key for key in ("peft_type", "r", "lora_alpha") if key not in config]
    if missing:
        raise ConfigError(f"{path} has no {' and no '.join(missing)}: it is no config of a LoRA or DoRA adapter")
    if config["peft_type"] != "LORA":
        raise ConfigError(f"{path}: peft_type {config['peft_type']!r} is not LoRA or DoRA, which is what peftkit has")
    for key in sorted(config.keys() - _READ):
        if config[key]:
            raise ConfigError(f"{path}: {key}: {config[key]!r} is not supported, and without it the adapter would compute something else")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in _object(path, field, config.get(field) or {}):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{path}: {field}: {pattern!r} is no regular expression ({error})") from error
    for field in ("target_modules", "modules_to_save"):
        names = config.get(field)
        listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not (names is None or listed or (field == "target_modules" and isinstance(names, str))):
            raise ConfigError(f"{path}: {field}: {names!r} is no list of names")
    try:
        if isinstance(targets := config.get("target_modules"), str):
            re.compile(targets)
    except re.error as error:
        raise ConfigError(f"{path}: target_modules: {targets!r} is no regular expression ({error})") from error
    try:
        from_peft(config.get("init_lora_weights"))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _object(path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key}: {value!r} is no JSON object")
    return value


def _read_tensors(path: Path, card: dict[str, Any]) -> dict[str, Tensor]:
    if card.get("sha256") not in (None, checksum(path)):
        raise CheckpointError(
            f"{path} is not the file that was saved: its SHA-256 differs from the one in {CARD_FILE}. It was damaged, or another program wrote it; "
            f"in that case remove {CARD_FILE}, which describes the old one"
        )
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            raise CheckpointError(
                f"{path}: {key} is in 8 bits ({str(tensor.dtype).removeprefix('torch.')}), whose scale the file does not hold; nothing was loaded"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            what = "NaN or infinity" if tensor.is_floating_point() else f"{str(tensor.dtype).removeprefix('torch.')} numbers"
            raise CheckpointError(f"{path}: {key} holds {what}, with which the model would answer nothing of sense; nothing was loaded")
    return state


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------- which base

SAMPLES = 64  # values that tell a base from others
_ROUNDING, _TINY = 2**-7, 1e-6  # what loading in another 16-bit type may change of a weight, relatively and at most
_MAY_DIFFER = 0.1  # a vocabulary that was resized begins its new rows anew


def identity(model: nn.Module) -> dict[str, Any]:
    """What tells this base from others: its name and commit, and a few of its frozen weights, which are the same in 4 bits and in 16."""
    config = getattr(model, "config", None)
    found: dict[str, Any] = {"base": getattr(model, "name_or_path", None), "revision": getattr(config, "_commit_hash", None)}
    name, weight = _landmark(model)
    if weight is not None:
        found["weights"] = {"name": name, "shape": list(weight.shape), "values": _sampled(weight, weight.shape)}
    return found


def _landmark(model: nn.Module) -> tuple[str, Tensor | None]:
    """The frozen weight that bases are told apart by: the input embedding's, else the first matrix that is not quantised."""
    embedding = input_embedding(model)
    while isinstance(embedding, AdapterLayer):
        embedding = embedding.base_layer
    own = {id(t.parameter) for layer in adapter_layers(model).values() for adapter in layer.specs for t in layer.role_parameters(adapter)}
    frozen = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.ndim > 1 and not parameter.is_meta and id(parameter) not in own
    }
    embeds = set() if embedding is None else {id(parameter) for parameter in embedding.parameters()}
    marked = [name for name, parameter in frozen.items() if id(parameter) in embeds]
    name = next(iter(marked or frozen), "")
    return name, frozen.get(name)


def _sampled(weight: Tensor, shape: list[int] | torch.Size) -> list[float]:
    """Values spread evenly over a weight of this shape, as bfloat16 has them."""
    places = torch.linspace(0, torch.Size(shape).numel() - 1, SAMPLES, dtype=torch.float64).long()
    return weight.detach().reshape(-1)[places.to(weight.device)].to(torch.bfloat16).tolist()


def differs(model: nn.Module, card: dict[str, Any]) -> str | None:
    """How the base that a card describes is another one than this model's; None where it is the same or the card does not say."""
    told, (name, weight) = card.get("weights"), _landmark(model)
    if not told or weight is None or name != told["name"]:
        return None
    if list(weight.shape[1:]) != told["shape"][1:] or len(weight) < told["shape"][0]:
        return f"{name} is {tuple(weight.shape)} here and was {tuple(told['shape'])}"
    here, there = torch.tensor(_sampled(weight[: told["shape"][0]], told["shape"])), torch.tensor(told["values"])
    different = ((here - there).abs() > _ROUNDING * torch.maximum(here.abs(), there.abs()) + _TINY).float().mean().item()
    return f"{different:.0%} of the values looked at in {name} are other ones" if different > _MAY_DIFFER else None
