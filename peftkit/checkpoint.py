"""Adapter files in peft's format, and training checkpoints that are either whole or not there."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftkit.adapter_file import (
    ADAPTER_FILE,
    CARD_FILE,
    CONFIG_FILE,
    PREFIX,
    AdapterFile,
    CheckpointError,
    checksum,
    differs,
    identity,
    local_folder,
    read_folder,
)
from peftkit.config import suggest
from peftkit.layers import (
    ADAPTER,
    AdapterLayer,
    TrainedTokens,
    adapter_layers,
    by_file_key,
    candidates,
    file_tensors,
    find_rows,
    from_file_modules,
    inside,
    standing,
)
from peftkit.methods import LoRA, attach, attachment, delete_adapter, find_attachment, to_recipe
from peftkit.methods.base import Method
from peftkit.provenance import base_record, mismatches, other_weights, template_hash
from peftkit.versions import versions

__all__ = [
    "ADAPTER_FILE", "CARD_FILE", "CONFIG_FILE", "PREFIX", "CheckpointError", "adapter_state", "checkpoints", "load_adapter", "load_checkpoint",
    "restore_parameters", "save_adapter", "save_checkpoint",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- adapter files


def adapter_state(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Tensor]:
    """The adapter by peft's file keys, on the CPU: `base_model.model.<module>.lora_A.weight`, ..."""
    return {f"{PREFIX}{key}": tensor.cpu() for key, tensor in file_tensors(model, adapter).items()}


def save_adapter(
    model: nn.Module, folder: str | Path, adapter: str | None = None, tokenizer: Any = None, recipe: dict[str, Any] | None = None
) -> Path:  # fmt: skip
    """Writes an adapter as peft does (`PeftModel.from_pretrained` reads it), reads it back and compares.

    adapter: its name; by default the active one. tokenizer, recipe: what it was trained with, for its card (peftkit.json),
    against which `load_adapter` compares. Raises ValueError where the model has no adapter layers, where several
    adapters could be meant, or where the weights are not finite; CheckpointError where the file read back differs.
    """
    folder = Path(folder)
    record = attachment(model)
    adapter = _meant(model, list(record.by_adapter)) if adapter is None else adapter
    if adapter not in record.by_adapter:
        raise ValueError(f"unknown adapter {adapter!r}{suggest(adapter, record.by_adapter)} (there are: {', '.join(record.by_adapter)})")
    state = adapter_state(model, adapter)
    if not state:
        raise ValueError("this model has no adapter layers to save (methods without layers, such as neftune, leave nothing behind)")
    wild = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if wild:
        raise ValueError(f"{len(wild)} tensors of the adapter hold NaN or infinity, such as {wild[0]}: training went astray; nothing was saved")
    swapping = next(method for method in record.by_adapter[adapter] if isinstance(method, LoRA))
    targets = sorted(name for name, layer in adapter_layers(model).items() if adapter in layer.specs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD_FILE).unlink(missing_ok=True)  # it describes the file that is replaced now
    try:
        save_file(state, folder / ADAPTER_FILE, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"the adapter could not be written to {folder} ({_cause(error)}); {_free(folder)}: make room, and save it again") from error
    swapping.peft_config(targets, model, adapter).save_pretrained(str(folder))
    written = load_file(folder / ADAPTER_FILE)
    wrong = [key for key, tensor in state.items() if key not in written or not torch.equal(written[key], tensor)]
    if wrong or written.keys() != state.keys():
        raise CheckpointError(f"{folder / ADAPTER_FILE} does not hold what was saved: {len(wrong)} tensors differ, such as {wrong[:1]}")
    card = {"methods": to_recipe(record.by_adapter[adapter]), **identity(model), "stored": base_record(model), "versions": versions()}
    card |= ({} if tokenizer is None else {"template": template_hash(tokenizer)}) | ({} if recipe is None else {"recipe": recipe})
    card["sha256"] = checksum(folder / ADAPTER_FILE)
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
    return folder


def _meant(model: nn.Module, adapters: list[str]) -> str:
    chosen = sorted({name for layer in adapter_layers(model).values() for name in layer.chosen})
    if len(chosen) != 1 and len(adapters) != 1:
        which = f"{' and '.join(chosen)} are active" if chosen else "none is active"
        raise ValueError(f"this model has the adapters {', '.join(adapters)}, of which {which}; say which one: adapter=...")
    return chosen[0] if len(chosen) == 1 else adapters[0]


def load_adapter(model: nn.Module, folder: str | Path, adapter: str = ADAPTER, another_base: bool = False, tokenizer: Any = None) -> nn.Module:
    """Attaches the adapter in `folder` (ours or peft's; a path or a hub id) to `model` under the name `adapter`, or fills the one of that name.

    A model that has adapters gets it beside them; it rests until `set_adapter` chooses it. another_base: load it although
    the weights of the base are not those it was trained on. tokenizer: the one that will be used with it, to compare its chat
    template with the one of the training. What is not as it was in training, the base's quantisation included, is a warning.

    All of it or nothing: raises CheckpointError where the files are damaged or do not fit, naming keys that are missing,
    unexpected or of another shape, and ConfigError where the folder is no adapter or uses what peftkit does not have.
    """
    file = read_folder(local_folder(folder))
    if not another_base:
        _check_base(model, file)
    differing = [] if another_base else mismatches(model, file.card, tokenizer)
    record = find_attachment(model)
    attached = record.by_adapter.get(adapter) if record is not None else None
    low_rank, whole = _low_rank(model, file), _whole(file.config, file.state)
    if lost := _lost(model, file.config, low_rank, whole):
        raise CheckpointError(
            f"{file.folder} does not fit this model, nothing was loaded (missing: all of {', '.join(lost[:3])}{', ...' * (len(lost) > 3)}, which "
            f"{CONFIG_FILE} names): tensors were taken out of the file, or the adapter belongs to another base"
        )
    method = file.method(low_rank, whole)
    if attached is None:
        try:
            attach(model, method, adapter)
        except ValueError as error:
            raise CheckpointError(f"{file.folder} does not fit this {type(model).__name__}, nothing was loaded: {error}") from error
    try:
        wanted = _wanted(model, file, adapter)
        if not another_base:
            _check_other_weights(model, file)
        if attached is not None:
            _check_same(file, method, attached)
            _check_tokens(model, file, adapter)
    except BaseException:
        if attached is None:
            delete_adapter(model, adapter)
        raise
    with torch.no_grad():
        for key, parameter in wanted.items():
            if key in file.state:
                parameter.copy_(file.state[key])
    for difference in differing:
        warnings.warn(f"{file.folder}: {difference}", stacklevel=2)
    return model


def _check_base(model: nn.Module, file: AdapterFile) -> None:
    """Raises CheckpointError where the adapter was trained on other weights; where only the names differ, warns.

    The name alone is no proof: a base that was moved or mirrored has another one.
    """
    here = getattr(model, "name_or_path", None)
    told = file.card.get("base") or file.config.get("base_model_name_or_path")
    if difference := differs(model, file.card):
        raise CheckpointError(
            f"{file.folder} was trained on another base than this {type(model).__name__}: {difference} ({told or 'unnamed'} there, {here or 'unnamed'} here). "
            "Load it on its own base, or give another_base=True"
        )
    hub = told and here and not Path(told).exists() and not Path(here).exists()
    if hub and "weights" not in file.card and told != here:
        warnings.warn(f"{file.folder} was trained on {told}, and this model is {here}; its shapes fit, which does not make it the same base", stacklevel=3)


def _check_other_weights(model: nn.Module, file: AdapterFile) -> None:
    here, told = getattr(model, "name_or_path", None), file.card.get("base")
    if other_weights(model, file.card):
        raise CheckpointError(
            f"{file.folder} was trained on other weights than those of this {type(model).__name__}: the embedding is the same, and a hash over the "
            f"other weights is not ({told or 'unnamed'}{_revision(file)} there, {here or 'unnamed'} here). The base may have been finetuned or merged "
            "since. Load it as it was, or give another_base=True"
        )


def _revision(file: AdapterFile) -> str:
    return f" at {file.card['revision']}" if file.card.get("revision") else ""


def _low_rank(model: nn.Module, file: AdapterFile) -> list[str]:
    """The modules of the file that have a low-rank update, as `find_targets` calls them."""
    names = sorted({key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in file.state if ".lora_" in key})
    found = from_file_modules(names, file.config.get("target_parameters") or [], model)
    there = candidates(model)
    unknown = [name for name in found if name not in there]
    if unknown:
        raise CheckpointError(
            f"{file.folder} adapts {len(unknown)} modules that this {type(model).__name__} does not have, such as {unknown[0]!r}"
            f"{suggest(unknown[0], sorted(there))}; it belongs to {file.config.get('base_model_name_or_path') or 'another base'}"
        )
    return found


def _lost(model: nn.Module, config: dict[str, Any], low_rank: list[str], whole: list[str]) -> list[str]:
    """Modules of the model that the config names, as peft reads it, and of which the file holds nothing; none where the config also leaves modules out."""
    there = dict(standing(model))

    def ends_with(name: str, entries: Any) -> bool:
        return any(name == entry or name.endswith(f".{entry}") for entry in entries)

    held = {name: {id(parameter) for parameter in module.parameters()} for name, module in there.items()}
    trained = set().union(*(held[name] for name in whole if name in held))
    saved = [name for name in there if ends_with(name, config.get("modules_to_save") or ())]
    lost = [name for name in saved if name not in whole and held[name] and not held[name] & trained]  # tied ones may stand there once
    targets = config.get("target_modules")
    partly = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
    if not targets or targets == "all-linear" or any(config.get(key) is not None and config[key] != [] for key in partly):
        return lost
    for name in candidates(model):
        matches = re.fullmatch(targets, name) if isinstance(targets, str) else ends_with(name, targets)
        if matches and name not in low_rank and not ends_with(name, whole) and not inside(name, whole):
            lost.append(name)
    return lost


def _check_same(file: AdapterFile, method: LoRA, attached: Sequence[Method]) -> None:
    """Raises CheckpointError where the tensors fit the attached adapter and would mean something else in it."""
    here = next((found for found in attached if isinstance(found, LoRA)), None)
    if here is None:
        return
    for name in method.target_modules:
        stored, own = method.spec(name), here.spec(name)
        if not math.isclose(stored.scale, own.scale, rel_tol=1e-6):
            raise CheckpointError(
                f"{file.folder} scales its update of {name} by {stored.scale:g}, the attached adapter by {own.scale:g} (alpha, r, rslora); detach it first"
            )
        if (stored.dora, stored.bias) != (own.dora, own.bias):
            raise CheckpointError(f"{file.folder / CONFIG_FILE} and the attached adapter say different things of use_dora and bias; detach it first")


def _check_tokens(model: nn.Module, file: AdapterFile, adapter: str) -> None:
    chosen = file.config.get("trainable_token_indices")
    for name, rows in find_rows(model, chosen).items() if chosen else ():
        layer = adapter_layers(model).get(name)
        here = layer.specs[adapter].tokens if isinstance(layer, TrainedTokens) and adapter in layer.specs else ()
        if tuple(rows.tokens) != here:
            raise CheckpointError(f"{file.folder} trains other tokens of {name} than the attached adapter; detach it first")


def _wanted(model: nn.Module, file: AdapterFile, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of the adapter by key. Raises CheckpointError where the file holds others."""
    state = file.state
    wanted = {f"{PREFIX}{key}": trained.parameter for key, trained in by_file_key(model, adapter).items()}
    present = {id(wanted[key]) for key in state if key in wanted}  # a weight that modules share may stand there once
    missing = sorted(key for key, parameter in wanted.items() if key not in state and id(parameter) not in present)
    surplus = {key: _frozen(model, key) for key in state if key not in wanted}
    unexpected = sorted(key for key, parameter in surplus.items() if parameter is None)
    other = sorted(key for key, parameter in surplus.items() if parameter is not None and not _same(parameter, state[key]))
    first: dict[int, str] = {}
    untied = [k for k, parameter in wanted.items() if k in state and not _same(state[first.setdefault(id(parameter), k)], state[k])]
    shapes = [f"{k}: {tuple(state[k].shape)} in the file, {tuple(wanted[k].shape)} here" for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or unexpected or other or untied or shapes:
        problems = [f"{what}: {', '.join(keys[:3])}" for what, keys in {
            "missing": missing,
            "unexpected": unexpected,
            "frozen weights that differ from this model's, which must have them first (peft writes them after resize_token_embeddings)": other,
            "weights that are one here and two in the file": untied,
        }.items() if keys]  # fmt: skip
        says = [f"{CONFIG_FILE} says r = {file.config['r']}"] * bool(shapes)
        raise CheckpointError(f"{file.folder} does not fit this model, nothing was loaded ({'; '.join(problems + shapes[:3] + says)})")
    return wanted


def _whole(config: dict[str, Any], state: dict[str, Tensor]) -> list[str]:
    """The modules of the file that were trained as a whole, by name. Like peft's, an entry of modules_to_save is the end of a name."""
    found = set()
    for key in state:
        parts = key.removeprefix(PREFIX).split(".")
        names = [".".join(parts[:i]) for i in range(1, len(parts))]
        found |= {name for name in names if name.endswith(tuple(config.get("modules_to_save") or ()))} if ".lora_" not in key else set()
    return sorted(found)


def _frozen(model: nn.Module, key: str) -> nn.Parameter | None:
    """The frozen weight that a key names: peft writes embeddings along where they were adapted or resized."""
    owner, _, part = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    while isinstance(module, AdapterLayer):
        module = module.base_layer
    return module._parameters.get(part)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().cpu(), other.to(one.dtype))


# --------------------------------------------------------------------------------------------------- training checkpoints

_STEP = re.compile(r"step-(\d+)")


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep_last: int, keep: Collection[int] = ()) -> Path:
    """Writes `folder`/step-<n> atomically: into a folder of another name, to the disk, read back, then renamed.

    tensors: the trained parameters by name; state: whatever torch.save takes. Only the newest `keep_last` are kept, and those of the steps `keep`.
    A process killed at any moment leaves every earlier checkpoint whole and no half one under a checkpoint's name; so does a full disk, which
    is told as CheckpointError.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    writing, final = folder / f".writing-{step:06d}", folder / f"step-{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".writing-*"):  # of a run that was killed while writing
            shutil.rmtree(left)
        writing.mkdir()
        _write(writing, tensors, state)
        if final.exists():
            shutil.rmtree(final)
        os.rename(writing, final)
        _sync(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have errors of their own for a disk that is full
        shutil.rmtree(writing, ignore_errors=True)
        kept = ", ".join(path.name for path in checkpoints(folder)) or "there is none"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} ({_cause(error)}); {_free(folder)}. Earlier checkpoints are whole ({kept}): "
            "make room or the folder writable, then go on with --resume"
        ) from error
    for old in checkpoints(folder)[:-keep_last]:
        if int(old.name.removeprefix("step-")) not in keep:
            shutil.rmtree(old)
    return final


def _write(writing: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    save_file(tensors, writing / "trained.safetensors")
    torch.save(state, writing / "state.pt")
    for file in writing.iterdir():
        _sync(file)
    written = load_file(writing / "trained.safetensors")
    if written.keys() != tensors.keys() or not all(torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise OSError("what was read back is not what was written")
    torch.load(writing / "state.pt", weights_only=False, map_location="cpu")


def _cause(error: Exception) -> str:
    """The system's own words, where an error of torch or safetensors came of them."""
    inner: BaseException | None = error
    while inner is not None and not (isinstance(inner, OSError) and inner.strerror):
        inner = inner.__cause__ or inner.__context__
    return str(inner.strerror) if isinstance(inner, OSError) else str(error).splitlines()[0]


def _free(folder: Path) -> str:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(there).free / 2**20:,.1f} MiB are free there"


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
