"""An adapter in the form that a server takes: as it is, written as plain LoRA of one rank, merged, or approximated, each verified."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from peftkit.adapter_file import ADAPTER_FILE, CARD_FILE, CONFIG_FILE, PREFIX, AdapterFile, CheckpointError, checksum, read_folder
from peftkit.average.algebra import truncate
from peftkit.average.files import read, write
from peftkit.checkpoint import load_adapter
from peftkit.config import ConfigError, suggest
from peftkit.fold import check_target, fold
from peftkit.layers import LoRALinear, adapter_layers, dense_weight
from peftkit.merge import compare_logits
from peftkit.methods import detach
from peftkit.model import load_config, locate, reads_with_encoder
from peftkit.save_model import logits_of
from peftkit.servers import SERVERS, VLLM_RANKS, Features, Server, features
from peftkit.use import Origin, find_origin, load_adapted

Form = Literal["adapter", "plain", "merged", "approximation"]
FORMS = ("auto", "adapter", "plain", "merged", "approximation")
_NAMED: dict[Form, str] = {
    "adapter": "the adapter as it is", "plain": "an adapter of plain LoRA with the same update", "merged": "a merged model",
    "approximation": "an adapter of plain LoRA near it",
}  # fmt: skip
_PLAIN: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "init_lora_weights": True, "inference_mode": True}


@dataclass(frozen=True)
class ExportReport:
    """What was written for a server, why in this form, and how it is started."""

    server: Server
    form: Form
    folder: Path
    reasons: list[str]
    measured: list[str]
    commands: str
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"for {self.server.name}: {_NAMED[self.form]}", *(f"  because {reason}" for reason in self.reasons), *self.measured, *self.notes]
        return "\n".join([*lines, f"written: {self.folder}", "serve it by", *(f"  {line}" for line in self.commands.splitlines())])


def servers_for(adapter: str) -> list[tuple[str, str, str]]:
    """(server, what it takes of this adapter, why) for every server."""
    found = features(read_folder(_folder(adapter)))
    rows = []
    for server in SERVERS.values():
        merged, plain = (_told(reasons, found) for reasons in server.reasons(found))
        rows.append((server.name, "a merged model" if merged else "plain LoRA, converted exactly" if plain else "as it is", "; ".join(merged or plain)))
    return rows


def export(
    adapter: str, output: str, server: str, form: str = "auto", rank: int | None = None, model: str | None = None, quantize: str | None = None,
    dtype: str | None = None,
) -> ExportReport:  # fmt: skip
    """Writes an adapter (a run or adapter folder) in a form that a server takes, and says why in this one.

    form: auto takes the adapter as it is where the server does, else plain LoRA with the same update where there is one, else
    the merged model. approximation: the nearest plain LoRA of `rank` (by default twice the adapter's) to a DoRA adapter, its
    error measured. Raises ConfigError where a form is asked for that the server does not take.
    """
    if server not in SERVERS:
        raise ConfigError(f"--for: unknown {server!r}{suggest(server, SERVERS)} (there are: {', '.join(SERVERS)})")
    if form not in FORMS:
        raise ConfigError(f"--form: unknown {form!r}{suggest(form, FORMS)} (there are: {', '.join(FORMS)})")
    if rank is not None and form != "approximation":
        raise ConfigError("--rank is of an approximation; add --form approximation")
    target, place, origin = check_target(output), _folder(adapter), find_origin(adapter, model, quantize)
    file, taken = read_folder(place), SERVERS[server]
    found = features(file)
    merged, plain = (_told(reasons, found) for reasons in taken.reasons(found))
    chosen: Form = form if form != "auto" else "merged" if merged else "plain" if plain else "adapter"  # type: ignore[assignment]
    _check_form(chosen, found, taken, merged, plain)
    origin, base = origin._replace(dtype=dtype or origin.dtype), locate(origin.model)
    if chosen == "merged":
        measured = str(fold(adapter, output, model, quantize, dtype=dtype)).splitlines()
    elif chosen == "approximation":
        rank = rank or 2 * found.rank
        if taken.max_rank is not None and rank > taken.max_rank:
            raise ConfigError(f"--rank: {taken.name} serves ranks up to {taken.max_rank}, not {rank}")
        measured = _approximate(file, origin, target, rank)
    else:
        measured = _plain(file, target) if chosen == "plain" else _copy(file, target)
    serves = taken.serve_model if chosen == "merged" else taken.serve_adapter
    if chosen == "merged" and reads_with_encoder(load_config(base, origin.revision)):
        serves = serves.replace("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    written = 0 if chosen == "merged" else features(read_folder(target)).rank
    on_hub = not Path(base).is_dir()
    places = {"base": base, "folder": target, "name": target.name}
    options = {"revision": f" --revision {origin.revision}" if on_hub and origin.revision else "", "remote": " --remote" if on_hub else ""}
    commands = serves.format(**places, **options, rank=written, vllm_rank=next((r for r in VLLM_RANKS if r >= written), VLLM_RANKS[-1]))
    return ExportReport(taken, chosen, target, merged or plain, measured, commands, _notes(find_origin(adapter, model).quantize, chosen, quantize, dtype))


def _check_form(form: Form, found: Features, server: Server, merged: list[str], plain: list[str]) -> None:
    """Raises ConfigError where an adapter cannot have this form, or the server would not take it."""
    beside = [what for what in ("saved", "tokens", "bias", "embeddings", "frozen", "experts", "convolutions") if getattr(found, what)]
    named = {"saved": f"modules_to_save ({', '.join(found.saved)})", "tokens": "trained tokens", "bias": "trained biases", "frozen": "weights of the base"}
    others = [named.get(what, f"adapted {what}") for what in beside]
    if form == "adapter" and (merged or plain):
        raise ConfigError(f"--form adapter: {server.name} does not take this one: {'; '.join(merged or plain)}")
    if form == "plain" and (found.dora or beside):
        raise ConfigError(f"--form plain: it cannot be written as plain LoRA: it has {', '.join(others + ['magnitudes (DoRA)'] * found.dora)}")
    if form == "approximation" and beside:
        raise ConfigError(f"--form approximation is for DoRA on linears, and this adapter has {', '.join(others)}: it needs merging")
    if form == "approximation" and not found.dora:
        raise ConfigError("--form approximation is for DoRA; this adapter is plain LoRA already: leave --form out")
    if form == "plain" and merged:
        raise ConfigError(f"--form plain: {server.name} would not take it: {'; '.join(merged)}")


def _folder(adapter: str) -> Path:
    return find_origin(adapter, model="any").adapter or Path(adapter)


def _told(reasons: list[str], found: Features) -> list[str]:
    return [reason.format(saved=", ".join(found.saved)) for reason in reasons]


def _notes(trained: str | None, form: Form, quantize: str | None, dtype: str | None) -> list[str]:
    """trained: how the base was stored in training; the others are options."""
    notes = []
    for option, value in {"--dtype": dtype, "--quantize": quantize}.items():
        if value is not None and form in ("adapter", "plain"):
            notes.append(f"note: {option} is of the base, and did nothing: an adapter is written as it is")
    if form != "merged" and trained is not None:
        notes.append(
            f"note: it was trained on a base in {trained}; a server that keeps the base in 16 bits computes another model. "
            "`peftkit merge --onto original` measures how far it is, and --form merged exports the one that was trained"
        )
    return notes


def _copy(file: AdapterFile, target: Path) -> list[str]:
    target.mkdir(parents=True, exist_ok=True)
    for name in (ADAPTER_FILE, CONFIG_FILE, CARD_FILE):
        if (file.folder / name).exists():
            shutil.copyfile(file.folder / name, target / name)
    if checksum(target / ADAPTER_FILE) != checksum(file.folder / ADAPTER_FILE):
        raise CheckpointError(f"{target / ADAPTER_FILE} is not the file that was copied")
    return ["copied, and the same bytes read back"]


def _plain(file: AdapterFile, target: Path) -> list[str]:
    """The same update as LoRA of one rank and scale 1: the scale goes into B, lower ranks are filled up with zeros."""
    updates = {name: (update.a[0].double(), update.scale * update.b[0].double()) for name, update in read(file.folder).updates.items()}
    rank = max(a.shape[-2] for a, _ in updates.values())
    state: dict[str, Tensor] = {}
    worst = 0.0
    for name, (a, b) in updates.items():
        one, other = pad(a, (0, 0, 0, rank - a.shape[-2])).float(), pad(b, (0, rank - b.shape[-1])).float()
        worst = max(worst, _distance(other.double() @ one.double(), b @ a))
        state |= _keys(name, one, other)
    _write(file, target, state, rank)
    return [f"the same update, of rank {rank} in every module: relative error {worst:.1e}, the rounding to fp32"]


@torch.no_grad()
def _approximate(file: AdapterFile, origin: Origin, target: Path, rank: int) -> list[str]:
    """The best plain LoRA of a rank to W' - W, in the Frobenius norm, with what it costs in weights and in logits."""
    model, _ = load_adapted(origin)
    before = logits_of(model)
    state: dict[str, Tensor] = {}
    left, whole, worst = 0.0, 0.0, (0.0, "")
    for name, layer in adapter_layers(model).items():
        if not isinstance(layer, LoRALinear):
            raise ConfigError(f"--form approximation: {name} is no linear; merge it")
        delta = layer.merged_weight().double() - dense_weight(layer.base_layer).double()  # (out, in)
        a, b = truncate(delta.cpu(), min(rank, *delta.shape))
        one, other = pad(a, (0, 0, 0, rank - len(a))).float(), pad(b, (0, rank - b.shape[1])).float()
        off = (other.double() @ one.double() - delta.cpu()).square().sum().item()
        whole, left = whole + delta.square().sum().item(), left + off
        worst = max(worst, ((off / max(delta.square().sum().item(), 1e-300)) ** 0.5, name))
        state |= _keys(name, one, other)
    _write(file, target, state, rank)
    detach(model)
    load_adapter(model, target)
    check = str(compare_logits(before, logits_of(model))).replace("merged against adapted", "approximation against the adapter")
    return [f"rank {rank} misses {(left / whole) ** 0.5:.1%} of the update (Frobenius norm; at worst {worst[0]:.1%} in {worst[1]})", check]


def _keys(name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}.lora_A.weight": a.contiguous(), f"{PREFIX}{name}.lora_B.weight": b.contiguous()}


def _write(file: AdapterFile, target: Path, state: dict[str, Tensor], rank: int) -> None:
    card = {key: value for key, value in file.card.items() if key not in ("methods", "sha256")}
    methods = [{"lora": {"r": rank, "alpha": rank}}]
    if target.exists():
        target.rmdir()  # empty, as check_target saw to
    write(target, state, file.config | _PLAIN | {"r": rank, "lora_alpha": rank}, {"methods": methods, **card})


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm().clamp_min(1e-300)).item()
