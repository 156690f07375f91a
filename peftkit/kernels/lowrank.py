"""LoRA and DoRA as one autograd node around a frozen linear, in plain torch.

LoRA (arXiv 2106.09685):  y = x W^T + b + s d(x) A^T B^T
DoRA (arXiv 2402.09353):  y = g * (x W^T + s d(x) A^T B^T) + b,   g = m / |W + s B A|_row, the norm detached

    x (..., in)   W (out, in)   b (out,)   A (r, in)   B (out, r)   m, g (out,)   d = dropout

Composed from library calls, autograd would keep x twice under dropout, cast it to fp32, and keep every product before
the scaling by g. Here only x and the r-wide h = d(x) A^T are kept, and for DoRA the output, which the next operation
mostly keeps anyway. The frozen weight is not kept: a 4-bit base is dequantised again for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Weight = Callable[[torch.dtype], Tensor]


def dora_norm(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Row norms (out,) of W + s B A in the dtype of `a`, fp32 at least, without building the sum.

    |W + s B A|^2 = |W|^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B> per row. `squares` (out,) holds |W|^2 by row; `weight`
    (out, in) may be of lower precision, since it only enters the correction. The r-wide rest is taken in fp64: it costs
    nothing, and a correction that nearly cancels |W|^2 would lose its digits in fp32.
    """
    with torch.autocast(weight.device.type, enabled=False):
        cross = (weight @ a.to(weight.dtype).T).double()  # (out, r)
        wide_a, wide_b = a.double(), b.double()
        correction = (wide_b * (2 * scale * cross + scale**2 * (wide_b @ (wide_a @ wide_a.T)))).sum(1)
        return (squares + correction).clamp_min_(0).sqrt_().to(torch.promote_types(a.dtype, torch.float32))


def _keep_mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """The dropout factors (0 or 1 / (1 - p)) of `x`, the same for the same seed: backward draws them again."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, bias: Tensor | None,
        frozen: Callable[[Tensor], Tensor], weight: Weight, gain: Tensor | None, scale: float, dropout: float, fuse: bool,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        seed = int(torch.randint(2**62, ())) if dropout else 0
        dropped = flat * _keep_mask(flat, dropout, seed) if dropout else flat
        h = dropped @ low_a.T  # (tokens, r)
        y = frozen(flat)  # (tokens, out); LoRA: with the bias, DoRA: without
        if fuse:
            y.addmm_(h, low_b.T, alpha=scale)
        else:  # rounds where peft rounds
            y.add_((h @ low_b.T).mul_(scale))
        if gain is not None:
            y.mul_(gain)
            if bias is not None:
                y.add_(bias)
        ctx.weight, ctx.scale, ctx.dropout, ctx.seed, ctx.shape = weight, scale, dropout, seed, x.shape
        ctx.save_for_backward(flat, h, a, b, magnitude, bias, gain, y if magnitude is not None else None)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        flat, h, a, b, magnitude, bias, gain, y = ctx.saved_tensors
        need_x, need_a, need_b, need_magnitude, need_bias = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_bias = grad.sum(0).to(bias.dtype) if need_bias else None
        grad_magnitude = None
        if need_magnitude:
            # dm = sum_t G (y - b) / m: what stood before the scaling need not be kept. A row with m = 0 gives no signal.
            product = y.to(magnitude.dtype)
            if bias is not None:  # before the sum: afterwards it would cancel in large part
                product = product - bias.to(magnitude.dtype)
            product = torch.einsum("to,to->o", grad.to(magnitude.dtype), product)
            grad_magnitude = torch.where(magnitude == 0, 0, product / magnitude)
        if gain is not None:
            grad = (grad * gain).to(grad.dtype)
        grad_h = (grad @ b.to(grad.dtype)).mul_(ctx.scale)  # (tokens, r)
        grad_a = grad_b = grad_x = None
        keep = _keep_mask(flat, ctx.dropout, ctx.seed) if ctx.dropout and (need_a or need_x) else None
        if need_a:
            grad_a = (grad_h.T @ (flat if keep is None else flat * keep)).to(a.dtype)
        if need_b:
            grad_b = (grad.T @ h).to(b.dtype).mul_(ctx.scale)
        if need_x:
            grad_x = grad @ ctx.weight(grad.dtype)
            if keep is None:
                grad_x.addmm_(grad_h, a.to(grad.dtype))
            else:
                grad_x.addcmul_(grad_h @ a.to(grad.dtype), keep)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_a, grad_b, grad_magnitude, grad_bias, None, None, None, None, None, None


def lowrank_linear(
    x: Tensor, a: Tensor, b: Tensor, *, frozen: Callable[[Tensor], Tensor], weight: Weight, scale: float, dropout: float = 0.0,
    magnitude: Tensor | None = None, bias: Tensor | None = None, gain: Tensor | None = None, fuse: bool = True,
) -> Tensor:  # fmt: skip
    """y (..., out) of a frozen linear with a low-rank update, and DoRA's scaling where `magnitude` and `gain` are given.

    frozen(x) is the frozen product, a fresh tensor (with the bias for LoRA, without it for DoRA); weight(dtype) gives
    W (out, in) for backward. Gradients flow to x, A, B, m and b in their own dtypes; arithmetic is in the dtype of x.
    Without `fuse` the update is rounded before it is added, as in peft: outputs are then bit-equal to peft's for LoRA.
    """
    return _LowRankLinear.apply(x, a, b, magnitude, bias, frozen, weight, gain, scale, dropout, fuse)
