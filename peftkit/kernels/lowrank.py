"""LoRA and DoRA beside a frozen linear as two autograd nodes, in plain torch.

LoRA (arXiv 2106.09685):  y = x W^T + b + s h B^T,          h = d(x) A^T
DoRA (arXiv 2402.09353):  y = g * (x W^T + s h B^T) + b,    g = m / |W + s B A|_row, the norm a constant

    x (..., in)   W (out, in)   b (out,)   A (r, in)   h (tokens, r)   B (out, r)   m, g (out,)   d = dropout

`down` makes h; layers that are given the same x share one product. `up` makes y. Composed from library calls, autograd
would keep x twice under dropout, cast it to fp32, and keep every product before the scaling by g. Here only x and h are
kept, and for DoRA the output, which the next operation mostly keeps anyway. The frozen weight is not kept: a 4-bit base
is dequantised again for backward. All arithmetic is in the dtype of x; A, B and m may be wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weight = Callable[[torch.dtype], Tensor]


# -------------------------------------------------------------------------------------------------------------- dropout


def zero_at_random_(x: Tensor, p: float, seed: int) -> Tensor:
    """Zeroes every element of the contiguous `x` with probability p, in place; the same ones for the same seed and shape.

    On a CPU the gaps between zeroed elements are drawn (they are geometric), p * n random numbers instead of n.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    if x.is_cuda:
        return x.mul_(torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator))
    end, total = 0, x.numel()
    places = x.view(-1)
    while end < total:
        expected = (total - end) * p
        u = torch.rand(int(expected + 4 * math.sqrt(expected)) + 8, generator=generator, dtype=torch.float64 if p < 1e-4 else torch.float32)
        gaps = u.neg_().log1p_().mul_(1 / math.log1p(-p)).to(torch.int64).add_(1)  # each at least 1
        position = gaps.cumsum_(0).add_(end - 1)
        places.index_fill_(0, position[: int(torch.searchsorted(position, total))], 0)
        end = int(position[-1]) + 1
    return x


# ----------------------------------------------------------------------------------------------------------------- down


class _Down(torch.autograd.Function):
    """(x, h_1, h_2, ...) for A_1, A_2, ...: x goes through, so that backward can add to its gradient in place."""

    @staticmethod
    def forward(x: Tensor, dropout: float, seed: int, *factors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        flat = _dropped(x.reshape(-1, x.shape[-1]), dropout, seed)  # (tokens, in)
        h = flat @ _stacked(factors, x.dtype).T  # (tokens, sum of r)
        if dropout:
            h.mul_(1 / (1 - dropout))
        return x.view_as(x), *h.split([a.shape[0] for a in factors], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, ctx.dropout, ctx.seed, *factors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *factors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, *grads: Tensor | None):  # type: ignore[override]
        x, *factors = ctx.saved_tensors
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if not used:
            return grad_x, None, None, *([None] * len(factors))
        present = [grad for grad in grads if grad is not None]
        grad_h = torch.cat(present, 1) if len(present) > 1 else present[0]  # (tokens, sum of r)
        if ctx.dropout:
            grad_h = grad_h * (1 / (1 - ctx.dropout))
        grad_a: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[3:]):
            flat = _dropped(x.reshape(-1, x.shape[-1]), ctx.dropout, ctx.seed)
            parts = (grad_h.T @ flat).split([factors[i].shape[0] for i in used])
            for i, part in zip(used, parts, strict=True):
                grad_a[i] = part.to(factors[i].dtype)
        if ctx.needs_input_grad[0]:
            low = _stacked([factors[i] for i in used], x.dtype)
            # Nothing but `up` sees the x that went through, so its gradient is ours to change.
            total = torch.zeros_like(x) if grad_x is None else grad_x
            flat = total.view(-1, x.shape[-1])
            if ctx.dropout:
                flat.add_(zero_at_random_(grad_h @ low, ctx.dropout, ctx.seed))
            else:
                flat.addmm_(grad_h, low)
            grad_x = total
        return grad_x, None, None, *grad_a


def _dropped(flat: Tensor, dropout: float, seed: int) -> Tensor:
    return zero_at_random_(flat.clone(memory_format=torch.contiguous_format), dropout, seed) if dropout else flat


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A_1, A_2, ... below each other (sum of r, in)."""
    return factors[0].to(dtype) if len(factors) == 1 else torch.cat([a.to(dtype) for a in factors])


def down(x: Tensor, factors: Sequence[Tensor], dropout: float = 0.0) -> tuple[Tensor, Sequence[Tensor]]:
    """x (..., in) as `up` is to take it, and h = d(x) A^T (tokens, r) for every A (r, in) in `factors`.

    One product serves all factors; under dropout they share one mask, drawn from torch's generator.
    """
    seed = int(torch.randint(2**62, ())) if dropout else 0
    through, *products = _Down.apply(x, dropout, seed, *factors)
    return through if x.requires_grad else x, products


# ------------------------------------------------------------------------------------------------------------------- up


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, h: Tensor, b: Tensor, magnitude: Tensor | None, bias: Tensor | None,
        frozen: Callable[[Tensor], Tensor], weight: Weight, gain: Tensor | None, scale: float, fuse: bool,
    ) -> Tensor:  # fmt: skip
        y = frozen(x.reshape(-1, x.shape[-1]))  # (tokens, out); LoRA: with the bias, DoRA: without
        low_b = b.to(x.dtype)
        if fuse:
            y.addmm_(h, low_b.T, alpha=scale)
        else:  # rounds where peft rounds
            y.add_((h @ low_b.T).mul_(scale))
        if gain is not None:
            scale_columns(y, gain, out=y)
            if bias is not None:
                y.add_(bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, h, b, magnitude, bias, _, ctx.weight, gain, ctx.scale, _ = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(h, b, magnitude, bias, gain, None if magnitude is None else output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        h, b, magnitude, bias, gain, y = ctx.saved_tensors
        need_x, need_h, need_b, need_magnitude, need_bias = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_bias = grad.sum(0, dtype=bias.dtype) if need_bias else None
        grad_magnitude = None
        if need_magnitude:
            # dm = sum_t G (y - b) / m: what stood before the scaling need not be kept. A row with m = 0 gives no signal.
            product = y.reshape(grad.shape)
            product = grad * product if bias is None else (product - bias).mul_(grad)  # subtracted first: after the sum it would cancel
            grad_magnitude = torch.where(magnitude == 0, 0, product.sum(0, dtype=magnitude.dtype) / magnitude)
        if gain is not None:
            grad = scale_columns(grad, gain)
        grad_x = grad_h = grad_b = None
        if need_h:
            grad_h = (grad @ b.to(grad.dtype)).mul_(ctx.scale)  # (tokens, r)
        if need_b:
            # The product the other way round is slower on CPUs, up to 1.6 times for wide outputs.
            grad_b = (h.T @ grad).T.to(b.dtype, memory_format=torch.contiguous_format).mul_(ctx.scale)  # (out, r)
        if need_x:
            grad_x = (grad @ ctx.weight(grad.dtype)).view(ctx.shape)
        return grad_x, grad_h, grad_b, grad_magnitude, grad_bias, None, None, None, None, None


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


def up(
    x: Tensor, h: Tensor, b: Tensor, *, frozen: Callable[[Tensor], Tensor], weight: Weight, scale: float,
    magnitude: Tensor | None = None, bias: Tensor | None = None, gain: Tensor | None = None, fuse: bool = True,
) -> Tensor:  # fmt: skip
    """y (..., out) of a frozen linear with the update s h B^T, and DoRA's scaling where `magnitude` and `gain` are given.

    x and h come from `down`. frozen(x) is the frozen product, a fresh tensor (with the bias for LoRA, without it for
    DoRA); weight(dtype) gives W (out, in) for backward. Gradients flow to x, h, B, m and b in their own dtypes.
    Without `fuse` the update is rounded before it is added, as in peft: outputs are then bit-equal to peft's for LoRA.
    """
    return _Up.apply(x, h, b, magnitude, bias, frozen, weight, gain, scale, fuse)


# ------------------------------------------------------------------------------------------------------------- composed


def composed(
    x: Tensor, a: Tensor, b: Tensor, *, frozen: Callable[[Tensor], Tensor], scale: float, dropout: float = 0.0,
    magnitude: Tensor | None = None, bias: Tensor | None = None, norm: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same y from library calls, for torch.compile, function transforms, and a base weight that trains itself.

    frozen(x) as for `up`. Slower and heavier by itself; every derivative is autograd's.
    """
    h = F.dropout(x, dropout) @ a.to(x.dtype).T
    y = frozen(x) + (h @ b.to(x.dtype).T) * scale
    if magnitude is not None and norm is not None:
        y = (y * gain_of(magnitude, norm)).to(x.dtype)
        y = y if bias is None else y + bias
    return y


# ----------------------------------------------------------------------------------------------------------- DoRA's norm


def gain_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / norm (out,); 1 where a row of W + s B A is zero and so is its m."""
    return torch.where(norm == 0, torch.ones_like(norm), magnitude / norm)


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


def fingerprint(*tensors: Tensor) -> tuple[int, ...]:
    """A number for the exact bits of each tensor, whatever wrote them. It reads every element: for r-wide factors only.

    Each 8 bytes are multiplied by an odd constant of their own and summed modulo 2^64: a change of one element always
    shows, a change of several is missed with probability 2^-32 at most.
    """
    found = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
        words = bits[: bits.numel() // 8 * 8].view(torch.int64)
        rest = bits[words.numel() * 8 :].tolist()
        found.append(hash((int((words * _odd_numbers(words.numel())).sum()), tensor.shape, *rest)))
    return tuple(found)


_ODD: dict[int, Tensor] = {}


def _odd_numbers(count: int) -> Tensor:
    if count not in _ODD:
        _ODD[count] = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(count)).mul_(2).add_(1)
    return _ODD[count]
