"""Memory: what a recipe stores before it runs, and what a run has used."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human(count: float) -> str:
    """Bytes for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def weight_bytes(model: Any, quantize: str | None, dtype: torch.dtype) -> int:
    """Bytes of the weights of a model (on the meta device) once loaded: linears but the head quantised, in 4 bits experts too, the rest in `dtype`."""
    from peftkit.layers import LoRAExperts, features, is_experts, is_linear, output_head

    per_parameter = {None: dtype.itemsize, "nf4": 4.127 / 8, "fp4": 4.127 / 8, "int8": 1.0}[quantize]
    head = output_head(model)
    linears = [module for module in model.modules() if is_linear(module) and module is not head]
    quantized = sum(features(module)[0] * features(module)[1] for module in linears)
    if quantize in ("nf4", "fp4"):
        quantized += sum(getattr(module, part).numel() for module in model.modules() if is_experts(module) for part in LoRAExperts.parts(module))
    total = sum(parameter.numel() for parameter in model.parameters())
    return int(quantized * per_parameter + (total - quantized) * dtype.itemsize)
