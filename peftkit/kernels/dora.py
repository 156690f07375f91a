"""DoRA's arithmetic around the products (Liu et al. 2024, arXiv 2402.09353): in plain torch, or in Triton on a GPU.

    y <- g * (y + s h B^T) + b,  g = m / n,  n = |W + s B A|_row

    y (tokens, out)   h (tokens, r)   A (r, in)   B (out, r)   W (out, in)   m, n, g, b (out,)

Every function chooses by the device of its tensors. Triton is imported at the first use on a GPU and never otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peftkit.kernels.triton_dora import NormMemory

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
        logger.warning("Triton does not run on GPU %d (%s: %s); DoRA takes plain torch there, which is slower", device, type(error).__name__, error)
        return False
    if found != 3:
        raise RuntimeError(f"Triton computes 1 * (1 + 1 * 1 * 1) + 1 = {found} on GPU {device}; set peftkit.kernels.dora.ENABLED = False and report this")
    return True


def compose_(y: Tensor, h: Tensor, b: Tensor, scale: float, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """y <- m / n * (y + s h B^T) + b, in place, for y (tokens, out) in any float dtype; B, m, n and b may be wider."""
    if triton_serves(y, b.shape[1]) and y.stride(1) == 1:
        from peftkit.kernels import triton_dora

        with torch.cuda.device_of(y):
            return triton_dora.compose_(y, h, b, scale, magnitude, norm, bias)
    y.addmm_(h, b.to(y.dtype).T, alpha=scale)
    scale_columns(y, gain_of(magnitude, norm), out=y)
    return y if bias is None else y.add_(bias)


def compose_backward(
    grad: Tensor, y: Tensor | None, magnitude: Tensor, norm: Tensor, bias: Tensor | None, *, need_magnitude: bool, need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(G g, dm, db) of `compose_` from G = dL/dy and its output y, both (tokens, out).

    dm = sum_t G (y - b) / m, since what g multiplied is (y - b) / g: it need not be kept. A row with m = 0 gives no
    signal. db = sum_t G. Gradients that are not needed are None; y is read for dm only.
    """
    if triton_serves(grad, 1):
        from peftkit.kernels import triton_dora

        with torch.cuda.device_of(grad):
            return triton_dora.compose_backward(grad, y, magnitude, norm, bias, need_magnitude=need_magnitude, need_bias=need_bias)
    grad_magnitude = None
    if need_magnitude:
        assert y is not None
        product = grad * y if bias is None else (y - bias).mul_(grad)  # subtracted first: after the sum it would cancel
        grad_magnitude = torch.where(magnitude == 0, 0, product.sum(0, dtype=magnitude.dtype) / magnitude)
    grad_bias = grad.sum(0, dtype=bias.dtype) if need_bias and bias is not None else None
    return scale_columns(grad, gain_of(magnitude, norm)), grad_magnitude, grad_bias


def scale_columns(y: Tensor, gain: Tensor, out: Tensor | None = None) -> Tensor:
    """y * gain for y (tokens, out) and gain (out,) that may be wider than y; `out` may be y itself.

    Multiplying mixed dtypes takes two or three passes over y on a CPU. y + y (g - 1) takes one, and is as exact as long
    as g is near 1, where DoRA keeps it: the rounding of g - 1 is then far below that of y.
    """
    if y.dtype != gain.dtype and not y.is_cuda:
        excess = gain - 1
        if bool((excess.abs() <= 0.125).all()):
            return torch.addcmul(y, y, excess.to(y.dtype), out=out)
    scaled = torch.mul(y, gain) if out is None else out.mul_(gain)
    return scaled.to(y.dtype)


def gain_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / norm (out,); 1 where a row of W + s B A is zero and so is its m."""
    return torch.where(norm == 0, 1, magnitude / norm)


def dora_norm(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float, memory: NormMemory | None = None) -> Tensor:
    """Row norms (out,) of W + s B A in the dtype of `a`, fp32 at least, a new tensor, without building the sum.

    |W + s B A|^2 = |W|^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B> per row. `squares` (out,) holds |W|^2 by row; `weight`
    (out, in) may be of lower precision, since it only enters the correction. The r-wide rest is taken in fp64: it costs
    nothing, and a correction that nearly cancels |W|^2 would lose its digits in fp32.

    With a `memory` from `norm_memory` the norm is taken anew, in fp32, only where a bit of A or B has changed, whatever
    wrote it. The GPU finds that out and acts on it; the host does not wait for it.
    """
    if memory is not None:
        from peftkit.kernels import triton_dora

        with torch.cuda.device_of(weight):
            return triton_dora.dora_norm(weight, squares, a, b, scale, memory)
    with torch.autocast(weight.device.type, enabled=False):
        narrow = a.to(weight.dtype)
        # W A^T (out, r); of a transposed W (GPT-2, embeddings) the way round in which it is stored, which is up to 20 times faster.
        cross = (weight @ narrow.T if weight.stride(1) == 1 else (narrow @ weight.T).T).double()
        wide_a, wide_b = a.double(), b.double()
        correction = (wide_b * (2 * scale * cross + scale**2 * (wide_b @ (wide_a @ wide_a.T)))).sum(1)
        return (squares + correction).clamp_min_(0).sqrt_().to(torch.promote_types(a.dtype, torch.float32))


def norm_memory(weight: Tensor, r: int) -> NormMemory | None:
    """Where `dora_norm` keeps the norm of one layer on a GPU; None where the Triton kernels do not serve.

    It holds for one W, s and dtype of W: take a new one where those change. A and B it watches itself.
    """
    if not triton_serves(weight, r):
        return None
    from peftkit.kernels import triton_dora

    return triton_dora.norm_memory(weight, r)
