"""What the kernels of all methods share: the update of y, and whether Triton serves."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_TRITON_RANK = 64
ENABLED = True
"""Whether GPUs use Triton at all; False takes plain torch everywhere."""


def triton_serves(x: Tensor, r: int) -> bool:
    """Whether the Triton kernels take tensors like `x` with updates of rank r; otherwise plain torch does."""
    return ENABLED and x.is_cuda and r <= MAX_TRITON_RANK and x.dtype in (torch.float32, torch.float16, torch.bfloat16) and _triton_runs(x.device.index)


@functools.cache
def _triton_runs(device: int) -> bool:
    """Tried out once for each GPU: Triton needs more than its package, a C compiler among it."""
    # Before compute capability 8.0 there are no bf16 products, and Triton's support is ending.
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    one = torch.ones(1, 1, device=f"cuda:{device}")
    try:
        from peftkit.kernels import triton_dora

        with torch.cuda.device(device):
            found = triton_dora.compose_(one.clone(), one, one, 1.0, one[0], one[0], one[0]).item()
    except Exception as error:  # whatever a compiler can meet; plain torch computes the same
        logger.warning("Triton does not run on GPU %d (%s: %s); DoRA and dropout take plain torch there, which is slower", device, type(error).__name__, error)
        return False
    if found != 3:
        raise RuntimeError(f"Triton computes 1 * (1 + 1 * 1 * 1) + 1 = {found} on GPU {device}; set peftkit.kernels.base.ENABLED = False and report this")
    return True


def add_update_(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """y <- y + s h B^T in the dtype of h (tokens, r), in place, for y (tokens, out); B may be wider."""
    if h.dtype == y.dtype:
        return y.addmm_(h, b.to(y.dtype).T, alpha=scale)
    return y.add_(h @ b.to(h.dtype).T, alpha=scale)
