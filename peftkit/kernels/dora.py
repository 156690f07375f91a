"""DoRA's arithmetic around the products (Liu et al. 2024, arXiv 2402.09353): in plain torch, in Triton, or in C++.

    y <- g * (y + s h B^T) + b,  g = m / n,  n = |W + s B A|_row

    y (tokens, out)   h (tokens, r)   A (r, in)   B (out, r)   W (out, in)   m, n, g, b (out,)

Every function chooses by its tensors: Triton on a GPU, imported at the first use there and never otherwise, the kernels of
`cpu_bf16` where those serve, plain torch elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from peftkit.kernels import cpu_bf16
from peftkit.kernels.base import add_update_, triton_serves

if TYPE_CHECKING:
    from peftkit.kernels.triton_dora import NormMemory

_CACHED_ROWS = 256


class Gain(NamedTuple):
    """What a CPU scales the columns of y by: g = m / n (out,), or g - 1 in the dtype of y, for plain torch, where that is exact enough."""

    factor: Tensor
    excess: bool


def column_gain(magnitude: Tensor, norm: Tensor, dtype: torch.dtype) -> Gain:
    """g = m / n (out,) for a y in `dtype`: g - 1 in half precision, as long as g is near 1, where DoRA keeps it."""
    exact = gain_of(magnitude, norm)
    if exact.device.type == "cpu" and dtype.itemsize == 2:
        excess = exact - 1
        if bool(excess.abs().max() <= 0.125):
            return Gain(excess.to(dtype), True)
    return Gain(exact, False)


def dora_gain(magnitude: Tensor, weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float) -> Gain:
    """The `column_gain` of m and the `dora_norm` of W + s B A, for a y in the dtype of W (out, in)."""
    if _by_kernel(weight, a, b, magnitude):
        return Gain(cpu_bf16.norm(weight, squares, a, b, scale, magnitude), False)
    return column_gain(magnitude, dora_norm(weight, squares, a, b, scale), weight.dtype)


def _by_kernel(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None = None) -> bool:
    outputs = weight.shape[:1]
    fits = b.dtype == a.dtype and b.shape == (*outputs, a.shape[0]) and outputs[0] % 32 == 0 and weight.is_contiguous()
    fits = fits and (magnitude is None or (magnitude.dtype == a.dtype and magnitude.shape == outputs and magnitude.device == a.device))
    return fits and b.device == a.device and cpu_bf16.serves(weight, a=[a])


def compose_(y: Tensor, h: Tensor, b: Tensor, scale: float, magnitude: Tensor, norm: Tensor | Gain, bias: Tensor | None) -> Tensor:
    """y <- m / n * (y + s h B^T) + b, in place, for y (tokens, out) in any float dtype; h, B, m, n and b may be wider.

    Who has the `column_gain` already may give it in place of the norm.
    """
    if isinstance(norm, Tensor) and triton_serves(y, b.shape[1]) and y.stride(1) == 1:
        from peftkit.kernels import triton_dora

        with torch.cuda.device_of(y):
            return triton_dora.compose_(y, h, b, scale, magnitude, norm, bias)
    gain = _gain(magnitude, norm, y)
    if not gain.excess and y.is_contiguous() and cpu_bf16.serves(y, b=b, h=h, magnitude=gain.factor):
        cpu_bf16.update_(y, h, b, scale, gain.factor)
    else:
        add_update_(y, h, b, scale)
        scale_columns(y, gain, out=y)
    return y if bias is None else y.add_(bias)


def compose_backward(
    grad: Tensor, y: Tensor | None, magnitude: Tensor, norm: Tensor | Gain, bias: Tensor | None, *, need_magnitude: bool, need_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(G g, dm, db) of `compose_` from G = dL/dy and its output y, both (tokens, out).

    dm = sum_t G (y - b) / m, since what g multiplied is (y - b) / g: it need not be kept. A row with m = 0 gives no
    signal. db = sum_t G. Gradients that are not needed are None; y is read for dm only.
    """
    if isinstance(norm, Tensor) and triton_serves(grad, 1):
        from peftkit.kernels import triton_dora

        with torch.cuda.device_of(grad):
            return triton_dora.compose_backward(grad, y, magnitude, norm, bias, need_magnitude=need_magnitude, need_bias=need_bias)
    grad_magnitude = scaled = None
    if need_magnitude:
        assert y is not None
        scaled = grad * y if bias is None else (y - bias).mul_(grad)  # subtracted first: after the sum it would cancel
        grad_magnitude = torch.where(magnitude == 0, 0, sum_of_rows(scaled, magnitude.dtype) / magnitude)
        scaled = scaled if scaled.dtype == grad.dtype else None  # its memory serves again
    grad_bias = sum_of_rows(grad, bias.dtype) if need_bias and bias is not None else None
    return scale_columns(grad, _gain(magnitude, norm, grad), out=scaled), grad_magnitude, grad_bias


def sum_of_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_t x (out,) of x (tokens, out), in `dtype`.

    A CPU that is asked for a sum in fp32 of half precision copies all of x into fp32 first, whose pages cost ten times the
    sum. In its own dtype it adds in fp32 too, and rounds the result, as it does that of any product.
    """
    return x.sum(0, dtype=None if x.device.type == "cpu" and x.dtype.itemsize == 2 else dtype).to(dtype)


def _gain(magnitude: Tensor, norm: Tensor | Gain, y: Tensor) -> Gain:
    return norm if isinstance(norm, Gain) else column_gain(magnitude, norm, y.dtype)


def scale_columns(y: Tensor, gain: Gain, out: Tensor | None = None) -> Tensor:
    """y * g in the dtype of y for y (tokens, out) and g (out,) that may be wider; `out` may be y itself.

    Multiplying half precision by fp32 takes a copy of y in fp32 on a CPU. y + y (g - 1) takes one pass, and is as exact as
    long as g is near 1: the rounding of g - 1 is then far below that of y. Elsewhere the copy is made of some rows at a
    time, which stay in the cache.
    """
    if gain.excess:
        return torch.addcmul(y, y, gain.factor, out=out)
    if y.device.type == "cpu" and y.dtype.itemsize == 2:
        out = torch.empty_like(y) if out is None else out
        for rows, target in zip(y.split(_CACHED_ROWS), out.split(_CACHED_ROWS), strict=True):
            target.copy_(rows * gain.factor)
        return out
    return torch.mul(y, gain.factor).to(y.dtype) if out is None else torch.mul(y, gain.factor, out=out)


def gain_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / norm (out,); 1 where a row of W + s B A is zero and so is its m."""
    return torch.where(norm == 0, 1, magnitude / norm)


def dora_norm(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float, memory: NormMemory | None = None) -> Tensor:
    """Row norms (out,) of W + s B A in the dtype of `a`, fp32 at least, a new tensor, without building the sum.

    |W + s B A|^2 = |W|^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B> per row. `squares` (out,) holds |W|^2 by row; `weight`
    (out, in) may be of lower precision, since it only enters the correction. Beside an fp32 W the r-wide rest is taken in
    fp64: a correction that nearly cancels |W|^2 would lose digits in fp32 that half precision never had.

    With a `memory` from `norm_memory` the norm is taken anew, in fp32, only where a bit of A or B has changed, whatever
    wrote it. The GPU finds that out and acts on it; the host does not wait for it.
    """
    if memory is not None:
        from peftkit.kernels import triton_dora

        with torch.cuda.device_of(weight):
            return triton_dora.dora_norm(weight, squares, a, b, scale, memory)
    with torch.autocast(weight.device.type, enabled=False):
        if _by_kernel(weight, a, b):
            return cpu_bf16.norm(weight, squares, a, b, scale)
        narrow = a.to(weight.dtype)
        wide = torch.float64 if weight.dtype.itemsize > 2 else torch.promote_types(a.dtype, torch.float32)
        # W A^T (out, r); of a transposed W (GPT-2, embeddings) the way round in which it is stored, which is up to 20 times faster.
        cross = (weight @ narrow.T if weight.stride(1) == 1 else (narrow @ weight.T).T).to(wide)
        wide_a, wide_b = a.to(wide), b.to(wide)
        inner = torch.addmm(cross, wide_b, wide_a @ wide_a.T, beta=2 * scale, alpha=scale**2)
        correction = inner.mul_(wide_b).sum(1)
        return (squares + correction).clamp_min_(0).sqrt_().to(torch.promote_types(a.dtype, torch.float32))


def norm_memory(weight: Tensor, r: int) -> NormMemory | None:
    """Where `dora_norm` keeps the norm of one layer on a GPU; None where the Triton kernels do not serve.

    It holds for one W, s and dtype of W: take a new one where those change. A and B it watches itself.
    """
    if not triton_serves(weight, r):
        return None
    from peftkit.kernels import triton_dora

    return triton_dora.norm_memory(weight, r)
