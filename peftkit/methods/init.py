"""How A and B start other than at random and zero: gaussian, PiSSA, OLoRA, LoftQ. The base is never changed.

PiSSA and OLoRA start B A at a part of W that is not zero, and take that part off the base. Here the part is taken off the
update instead, s (B A - B0 A0), so that the base stays bit for bit what it was and step 0 computes what it computes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkit import quant
from peftkit.config import suggest
from peftkit.layers import AdapterLayer, LoRALinear, Start, dense_weight, features

KINDS = ("kaiming", "gaussian", "pissa", "pissa_niter_<n>", "olora", "loftq")
_FAST = re.compile(r"pissa_niter_(\d+)")
_SEED = 0  # of the fast SVD: a resumed run must find the same start
_OTHER_WEIGHTS = 0.3  # |W - Q| / |W| is 0.09 under NF4 and 1.4 between unrelated weights


def check_init(kind: str) -> str:
    """`kind` as it is. Raises ValueError, with the nearest, where there is none of this name."""
    if (kind not in KINDS and not _FAST.fullmatch(kind)) or "<" in kind:
        raise ValueError(f"unknown init {kind!r}{suggest(kind, KINDS)} (there are: {', '.join(KINDS)})")
    return kind


def from_peft(start: object) -> str:
    """The start that peft's init_lora_weights names. Raises ValueError for those that changed the base."""
    if start in (None, True, False, "eva", "orthogonal"):  # once trained, they are all the same
        return "kaiming"
    if start == "gaussian":
        return "gaussian"
    raise ValueError(
        f"init_lora_weights: {start!r} changed the base it was trained on; convert it with peft first (save_pretrained takes "
        "path_initial_model_for_weight_conversion), or train and save it with peftkit"
    )


def takes_off(kind: str) -> bool:
    """Whether the start B0 A0 is not zero and is taken off again."""
    return kind.startswith(("pissa", "olora"))


@torch.no_grad()
def start(model: nn.Module, layers: Mapping[str, AdapterLayer], adapter: str, kind: str, weights: str | None = None) -> None:
    """Gives A and B of a fresh adapter, in the layers by name, the start `kind`.

    weights: for loftq, the folder or hub id of W; by default where the model was loaded from. Raises ValueError where a layer
    or the base does not have what the start needs.
    """
    if kind == "kaiming":
        return
    for name, layer in layers.items():
        if not isinstance(layer, LoRALinear):
            raise ValueError(f"init: {kind} is for linears, and {name} is a {type(layer.base_layer).__name__}; leave it out of the targets, or use kaiming")
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    if kind == "loftq":
        _loftq(model, linears, adapter, weights)
        return
    for name, layer in linears.items():
        a, b, spec = layer.a(adapter), layer.b(adapter), layer.specs[adapter]
        if kind == "gaussian":
            a.copy_(torch.randn(a.shape, dtype=a.dtype) / spec.r)  # drawn on the CPU, as the other start
            continue
        weight = dense_weight(layer.base_layer).to(a.dtype)
        if spec.r > min(weight.shape):
            most = min(weight.shape)
            raise ValueError(f"init: {kind} takes r = {spec.r} directions of the weight of {name}, which has {most}; lower r, there by rank_pattern")
        if kind == "olora":
            start_a, start_b = olora(weight, spec.r)
        else:
            fast = _FAST.fullmatch(kind)
            start_a, start_b = pissa(weight, spec.r, spec.scale, int(fast[1]) if fast else None)
        _put(start_a, start_b, a, b)
        layer.starts[adapter] = Start(a, b)


def _put(start_a: Tensor, start_b: Tensor, a: Tensor, b: Tensor) -> None:
    """Writes a start of at most their rank into A and B. A direction of no weight keeps its random row of A: from zero in both nothing is learnt."""
    r = len(start_a)
    a[:r] = torch.where((start_b != 0).any(0)[:, None], start_a, a[:r])
    b[:, :r] = start_b


def pissa(weight: Tensor, r: int, scale: float, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s B A the best rank-r part of W (out, in)      (PiSSA, Meng et al. 2024, arXiv 2404.02948)

    W = U S V^T,  B = U_r sqrt(S_r / s),  A = sqrt(S_r / s) V_r^T. With `iterations`, by a random projection and so many power
    iterations (Halko et al. 2011, arXiv 0909.4061) instead of the whole SVD.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False) if iterations is None else _fast_svd(weight, r, iterations)
    root = (s[:r] / scale).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def _fast_svd(weight: Tensor, r: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    width = min(r + 8, *weight.shape)
    probe = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(_SEED), dtype=weight.dtype)
    q = torch.linalg.qr(weight @ probe.to(weight.device)).Q  # (out, width)
    for _ in range(iterations):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, vh


def olora(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) = R_r and B (out, r) = Q_r of W = Q R, so that B's columns are orthonormal      (OLoRA, Büyükakyüz 2024, arXiv 2406.01775)"""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def loftq(weight: Tensor, quantized: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with Q + s B A as near to W (out, in) as rank r gets      (LoftQ, Li et al. 2023, arXiv 2310.08659)

    One iteration, on a Q that stays. The paper and peft leave out that the update is scaled: 1/s is in the factors here.
    """
    return pissa(weight - quantized, r, scale)


def _loftq(model: nn.Module, layers: dict[str, LoRALinear], adapter: str, place: str | None) -> None:
    in_4bit = {name: layer for name, layer in layers.items() if quant.is_4bit(layer.base_layer)}
    if not in_4bit:
        raise ValueError("init: loftq makes up for what a base in 4 bits has lost, and no target is in 4 bits; load the model with quantize='nf4'")
    with Originals(model, place) as originals:
        for name, layer in in_4bit.items():
            a, b, spec = layer.a(adapter), layer.b(adapter), layer.specs[adapter]
            quantized = dense_weight(layer.base_layer, a.dtype)
            weight = originals.weight(name, layer.base_layer).to(a)
            if (weight - quantized).norm() > _OTHER_WEIGHTS * weight.norm():
                raise ValueError(f"init: loftq: {originals.place} does not hold the weights that {name} was quantised from; name them by init_weights")
            _put(*loftq(weight, quantized, min(spec.r, *weight.shape), spec.scale), a, b)
            if spec.dora:  # so that the gain is 1
                layer.magnitude(adapter).copy_((quantized + spec.scale * b @ a).norm(dim=1))


class Originals:
    """The weights of a saved model, read one at a time from its safetensors files."""

    def __init__(self, model: nn.Module, place: str | None):
        self.place = place or getattr(model, "name_or_path", None) or ""
        self.prefix = getattr(model, "base_model_prefix", "")
        self.revision = None if place else getattr(getattr(model, "config", None), "_commit_hash", None)
        if not self.place:
            raise ValueError("init: loftq reads the weights before quantisation, and this model does not say where it was loaded from; give init_weights")
        self.files: dict[str, Any] = {}

    def __enter__(self) -> Originals:
        index = self._find("model.safetensors.index.json")
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values())) if index else ["model.safetensors"]
        for name in names:
            file = self._find(name)
            if file is None:
                raise ValueError(f"init: loftq: {self.place} holds no {name}; name the folder or hub id of the weights before quantisation by init_weights")
            opened = safe_open(file, framework="pt")
            self.files |= {key: opened for key in opened.keys()}  # noqa: SIM118  # no dict
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()

    def _find(self, name: str) -> str | None:
        from transformers.utils import cached_file

        return cached_file(
            self.place, name, revision=self.revision,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip

    def weight(self, name: str, module: nn.Module) -> Tensor:
        """W (out, in) of the linear `name`."""
        inputs, outputs = features(module)
        key = next((key for key in _spellings(f"{name}.weight", self.prefix) if key in self.files), None)
        if key is None:
            raise ValueError(f"init: loftq: {self.place} holds no {name}.weight")
        weight = self.files[key].get_tensor(key)
        if getattr(module, "source_cls", None) is Conv1D:  # which stores (in, out)
            weight = weight.T
        if weight.shape != (outputs, inputs) or not weight.is_floating_point():
            raise ValueError(
                f"init: loftq: {key} in {self.place} is {str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)}, where W {(outputs, inputs)} "
                "before quantisation is needed; name its folder or hub id by init_weights"
            )
        return weight


def _spellings(key: str, prefix: str) -> list[str]:
    """A key as it may stand in a file: with or without the prefix of the model's body."""
    return [key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"]
