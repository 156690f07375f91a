"""LoRA and DoRA around a frozen linear as autograd nodes of their own, in plain torch or the kernels of `cpu_bf16`.

LoRA (arXiv 2106.09685):  y = x W^T + b + s h B^T,          h = d(x) A^T
DoRA (arXiv 2402.09353):  y = g * (x W^T + s h B^T) + b,    g = m / |W + s B A|_row, the norm a constant

    x (..., in)   W (out, in)   b (out,)   A (r, in)   h (tokens, r)   B (out, r)   m, g (out,)   d = dropout

One node makes y, its own h included. Layers that are given the same x share one product for h instead, made by the node
`shared_down`. Composed from library calls, autograd would keep x twice under dropout, cast it to fp32, and keep every
product before the scaling by g. Here only x and h are kept, and for DoRA the output, which the next operation mostly keeps
anyway. The frozen weight is not kept: a 4-bit base is dequantised again for backward. All arithmetic is in the dtype of x;
A, B and m may be wider.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.kernels import cpu_bf16
from peftkit.kernels.base import add_update_
from peftkit.kernels.dora import Gain, compose_, compose_backward, gain_of, sum_of_rows
from peftkit.kernels.dropout import Dropout, draw_seed

Weight = Callable[[torch.dtype], Tensor]


# -------------------------------------------------------------------------------------------------- the low-rank product


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A_1, A_2, ... below each other (sum of r, in)."""
    return (factors[0] if len(factors) == 1 else torch.cat(list(factors))).to(dtype)


def _product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale x y in one call."""
    return x @ y if scale == 1 else torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scale)


def _multiply(flat: Tensor, factors: Sequence[Tensor], p: float, seed: int, training: bool) -> tuple[Tensor, Tensor | None]:
    """d(x) A^T (tokens, sum of r) for x (tokens, in), and what of d backward should be given.

    Evaluation sums in torch's order, so that its outputs are peft's to the bit.
    """
    dropout = Dropout.of(flat, p, seed)
    if training and dropout.by_kernel and cpu_bf16.serves(flat, a=factors):
        return cpu_bf16.down(flat, _stacked(factors, torch.float32), 1 / (1 - p), dropout.mask), dropout.to_keep()
    return _product(dropout(flat), _stacked(factors, flat.dtype).T, 1 / (1 - p)), dropout.to_keep()


def _input_gradients(
    factors: Sequence[Tensor], grad_h: Tensor, x: Tensor, grad_x: Tensor | None, dropout: Dropout, scale: float, need_a: bool
) -> tuple[Tensor | None, ...]:
    """dA = scale dh^T d(x) (r, in) of every A, if needed, from dh (tokens, sum of r) and x (tokens, in).

    scale d(dh A) is added to the contiguous dx (tokens, in), if there is one.
    """
    if dropout.by_kernel and cpu_bf16.serves(x, a=factors, h=grad_h):
        together = cpu_bf16.input_backward(x, grad_h, _stacked(factors, torch.float32), dropout.mask, grad_x, scale, need_a=need_a)
    else:
        together = _plain_input_gradients(factors, grad_h, x, grad_x, dropout.without_mask(), scale, need_a)
    return (None,) * len(factors) if together is None else together.split_with_sizes([a.shape[0] for a in factors])


def _plain_input_gradients(
    factors: Sequence[Tensor], grad_h: Tensor, x: Tensor, grad_x: Tensor | None, dropout: Dropout, scale: float, need_a: bool
) -> Tensor | None:
    dropped = None
    if grad_x is not None:
        low_a = _stacked(factors, x.dtype)
        if not dropout.p:
            grad_x.addmm_(grad_h, low_a, alpha=scale)
        elif dropout.places is not None:  # what is dropped gets its gradient back
            before = grad_x.take(dropout.places)
            grad_x.addmm_(grad_h, low_a, alpha=scale)
            grad_x.view(-1).index_copy_(0, dropout.places, before)  # `put_` is no deterministic algorithm to torch
        elif need_a:
            dropped = dropout.of_both(x, grad_x, _product(grad_h, low_a, scale))
        else:
            dropout.add_to_(grad_x, _product(grad_h, low_a, scale))
    if not need_a:
        return None
    # The product is taken with the wide side transposed, then turned: as written, CPUs take up to 1.6 times as long.
    product = _product((dropout(x) if dropped is None else dropped).T, grad_h, scale)
    return product.T.to(factors[0].dtype, copy=True, memory_format=torch.contiguous_format)


def refuse_second_derivative(instead: str = "compute it on the merged model, or through torch.func") -> None:
    """Called in backward: autograd's own guard, `once_differentiable`, passes where the gradient that arrives is a constant, and the derivative would be 0."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"the fused layers have no second derivative; {instead}")


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Has a node's backward multiply in the dtypes of its forward, where `backward()` is called within autocast. The node's `ctx.device` says where."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_autocast_enabled(ctx.device):
            return backward(ctx, *grads)
        with torch.autocast(ctx.device, enabled=False):
            return backward(ctx, *grads)

    return wrapped


class _SharedDown(torch.autograd.Function):
    """(x, h_1, h_2, ...) for A_1, A_2, ...: x goes through, so that backward can add to its gradient in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float, seed: int, after: Callable[[], None], *factors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.dropout, ctx.seed, ctx.after, ctx.device = dropout, seed, after, x.device.type
        ctx.set_materialize_grads(False)
        h, kept = _multiply(x.reshape(-1, x.shape[-1]), factors, dropout, seed, training=True)
        ctx.save_for_backward(x, kept, *factors)
        return x.view_as(x), *h.split_with_sizes([a.shape[0] for a in factors], 1)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad_x: Tensor | None, *grads: Tensor | None):  # type: ignore[override]
        refuse_second_derivative()
        ctx.after()
        x, kept, *factors = ctx.saved_tensors
        used = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        grad_a: list[Tensor | None] = [None] * len(factors)
        if not used:
            return grad_x, None, None, None, *grad_a
        grad_h = torch.cat([grad for _, grad in used], 1) if len(used) > 1 else used[0][1]  # (tokens, sum of r)
        drop = Dropout.of(x, ctx.dropout, ctx.seed, kept)
        if ctx.needs_input_grad[0] and grad_x is None:
            grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        # Nothing but `linear` sees the x that went through, so its gradient is ours to change.
        flat_grad = grad_x.view(-1, x.shape[-1]) if grad_x is not None and ctx.needs_input_grad[0] else None
        need_a = any(ctx.needs_input_grad[4:])
        gradients = _input_gradients([factors[i] for i, _ in used], grad_h, x.reshape(-1, x.shape[-1]), flat_grad, drop, 1 / (1 - drop.p), need_a)
        for (i, _), gradient in zip(used, gradients, strict=True):
            grad_a[i] = gradient
        return grad_x, None, None, None, *grad_a


def shared_down(x: Tensor, factors: Sequence[Tensor], dropout: float, after: Callable[[], None]) -> tuple[Tensor, Sequence[Tensor]]:
    """x (..., in) as `linear` is to take it, and h = d(x) A^T (tokens, r) for every A (r, in) in `factors`, in one product.

    Under dropout they share one mask, drawn from torch's generator. `after` is called when backward comes by.
    """
    through, *products = _SharedDown.apply(x, dropout, draw_seed(dropout), after, *factors)
    return through if x.requires_grad else x, products


# ------------------------------------------------------------------------------------------------------------ the layer


class Around(NamedTuple):
    """What the node of a layer is built around, tensors that ask for gradients aside."""

    frozen: Callable[[Tensor], Tensor]
    weight: Weight
    norm: Callable[[], Tensor | Gain] | None
    scale: float
    dropout: float
    seed: int
    training: bool


FEW = 16
"""Up to so many tokens, as in generation, evaluation without gradients multiplies with A and B as they are: casting both would cost more than the products."""


def _output(
    x: Tensor, h: Tensor | None, a: Tensor | None, b: Tensor, magnitude: Tensor | None, bias: Tensor | None, around: Around, few: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | Gain | None]:
    """(y (..., out), h (tokens, r), what of the dropout to keep, the norm or gain); for LoRA the frozen product holds the bias already."""
    kept = norm = None
    flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
    if h is None:
        assert a is not None
        few = few and len(flat) <= FEW and flat.dtype.itemsize == 2 and a.dtype == torch.float32
        h, kept = _multiply(flat.float() if few else flat, [a], around.dropout, around.seed, around.training)
    y = around.frozen(flat.detach())  # (tokens, out); what follows modules, as FlopCounterMode does, would look for the gradient of x in vain
    if magnitude is not None and around.norm is not None:
        norm = around.norm()  # after the product with W, which leaves W in the cache
        compose_(y, h, b, around.scale, magnitude, norm, bias)
    elif around.training and y.is_contiguous() and cpu_bf16.serves(y, b=b, h=h):
        cpu_bf16.update_(y, h, b, around.scale)
    elif around.training or h.dtype != y.dtype:
        add_update_(y, h, b, around.scale)
    else:  # rounds where peft rounds
        y.add_((h @ b.to(y.dtype).T).mul_(around.scale))
    if x.ndim != 2 or y._is_view():
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])  # no view to autograd: the model may write into what it is given
    return y, h, kept, norm


def _output_gradients(
    grad: Tensor, y: Tensor | None, h: Tensor, b: Tensor, scale: float, scale_h: float, magnitude: Tensor | None, norm: Tensor | Gain | None,
    bias: Tensor | None, *, need_h: bool, need_b: bool, need_magnitude: bool, need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(G', dh, dB, dm, db) from G = dL/dy (tokens, out), each if needed: dh = scale_h G' B, dB = scale G'^T h, and G' = G g for DoRA, else G."""
    gain = norm.factor if isinstance(norm, Gain) and not norm.excess else None
    takes = magnitude is None or (gain is not None and bias is None)
    by_kernel = takes and cpu_bf16.serves(grad, b=b, h=h, magnitude=magnitude)
    grad_h = grad_b = grad_magnitude = grad_bias = None
    if magnitude is None and need_bias and bias is not None:
        grad_bias = sum_of_rows(grad, bias.dtype)
    if by_kernel:
        of_y = y if need_magnitude else None
        of_kernel = cpu_bf16.output_backward(grad, h, b, scale, scale_h, need_h=need_h, need_b=need_b, y=of_y, magnitude=magnitude, gain=gain)
        return *of_kernel, grad_bias
    if magnitude is not None:
        assert norm is not None
        grad, grad_magnitude, grad_bias = compose_backward(grad, y, magnitude, norm, bias, need_magnitude=need_magnitude, need_bias=need_bias)
    if need_b:
        grad_b = (grad.T @ h).to(b.dtype).mul_(scale)  # (out, r); scaled where fp16 can neither overflow nor vanish
    if need_h:
        grad_h = _product(grad, b.to(grad.dtype), scale_h)  # (tokens, r)
    return grad, grad_h, grad_b, grad_magnitude, grad_bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, h: Tensor | None, a: Tensor | None, b: Tensor, magnitude: Tensor | None, bias: Tensor | None, around: Around
    ) -> Tensor:
        own = h is None
        # In half precision y - b for the gradient of m would keep no more than the rounding of a large b: what it needs is kept before b is added.
        ctx.apart = magnitude is not None and bias is not None and x.dtype.itemsize == 2 and ctx.needs_input_grad[4]
        y, h, kept, norm = _output(x, h, a, b, magnitude, None if ctx.apart else bias, around)
        before = y
        if ctx.apart and bias is not None:
            y = y + bias.to(y.dtype)
        # The norm is the layer's own, kept from step to step and never written to: no activation.
        ctx.around, ctx.norm, ctx.shape, ctx.device = around, norm, x.shape, x.device.type
        if magnitude is None:
            ctx.save_for_backward(x if own else None, kept, h, a, b, None, bias, None)
        elif ctx.apart:
            ctx.save_for_backward(x if own else None, kept, h, a, b, magnitude, bias, before)
        else:  # `counter` shares y's count of the writes into it, and nothing else
            ctx.counter = y.detach()
            ctx.counter.data = y.new_empty(0)
            ctx.written = y._version
            ctx.save_for_backward(x, kept, h, a, b, magnitude, bias, y.data)
        return y

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        refuse_second_derivative()
        x, kept, h, a, b, magnitude, bias, y = ctx.saved_tensors
        _, weight, _, scale, dropout, seed, _ = ctx.around
        need_x, need_h, need_a, need_b, need_magnitude, need_bias, _ = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_x: Any = None
        grad_a = of_bias = None
        if magnitude is not None:
            if ctx.apart:
                of_bias, bias = sum_of_rows(grad, bias.dtype) if need_bias else None, None
            elif need_magnitude and ctx.counter._version != ctx.written:  # as Falcon does, which adds the attention's output to the MLP's in place: y is lost
                y = compose_(x.reshape(-1, x.shape[-1]) @ weight(x.dtype).T, h, b, scale, magnitude, ctx.norm, bias)
            y = y.reshape(grad.shape)
        grad, grad_h, grad_b, grad_magnitude, grad_bias = _output_gradients(
            grad, y, h, b, scale, scale / (1 - dropout), magnitude, ctx.norm, bias, need_h=need_h or need_a or (need_x and a is not None), need_b=need_b,
            need_magnitude=need_magnitude, need_bias=need_bias and bias is not None,
        )  # fmt: skip
        if need_x:
            grad_x = grad @ weight(grad.dtype)  # (tokens, in)
        if a is not None and grad_h is not None and (need_a or need_x):
            flat = x.reshape(-1, x.shape[-1])
            drop = Dropout.of(flat, dropout, seed, kept)
            (grad_a,) = _input_gradients([a], grad_h, flat, grad_x, drop, 1, need_a)  # dh holds the 1 / (1 - p) of the dropout
        if need_x and len(ctx.shape) != 2:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_h if need_h else None, grad_a, grad_b, grad_magnitude, of_bias if ctx.apart else grad_bias, None


def linear(
    x: Tensor, b: Tensor, *, frozen: Callable[[Tensor], Tensor], weight: Weight, scale: float, a: Tensor | None = None, h: Tensor | None = None,
    dropout: float = 0.0, magnitude: Tensor | None = None, bias: Tensor | None = None, norm: Callable[[], Tensor | Gain] | None = None, training: bool = True,
) -> Tensor:  # fmt: skip
    """y (..., out) of a frozen linear with a low-rank update, and DoRA's scaling where `magnitude` is given and `norm`, which gives that of W + s B A.

    Either `a`, or `h` with the x that came with it from `shared_down` (dropout is then in h already). frozen(x) is the
    frozen product, a fresh tensor (with the bias for LoRA, without it for DoRA); weight(dtype) gives W (out, in) for
    backward; norm() may give the `column_gain` at once. Gradients flow to x, h, A, B, m and b in their own dtypes. Outside
    `training` LoRA's update is rounded before it is added, as in peft, to whose outputs it is then bit-equal; that of a few
    tokens in half precision, without gradients, is fp32 until it is added.
    """
    around = Around(frozen, weight, norm, scale, dropout, draw_seed(dropout), training)
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        # In training this may be a forward that a checkpoint repeats with gradients: the same products then.
        return _output(x, h, a, b, magnitude, bias, around, few=not training and not torch.is_autocast_enabled(x.device.type))[0]
    return _Linear.apply(x, h, a, b, magnitude, bias, around)


# ------------------------------------------------------------------------------------------------------------- composed


def composed(
    x: Tensor, a: Tensor, b: Tensor, *, frozen: Callable[[Tensor], Tensor], scale: float, dropout: float = 0.0,
    magnitude: Tensor | None = None, bias: Tensor | None = None, norm: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same y from library calls, for torch.compile, function transforms, and a base weight that trains itself.

    frozen(x) as for `linear`. Slower and heavier by itself; every derivative is autograd's.
    """
    h = F.dropout(x, dropout) @ a.to(x.dtype).T
    y = frozen(x) + (h @ b.to(x.dtype).T) * scale
    if magnitude is not None and norm is not None:
        y = (y * gain_of(magnitude, norm)).to(x.dtype)
        y = y if bias is None else y + bias
    return y


# --------------------------------------------------------------------------------------------------------- fingerprints


def fingerprint(*tensors: Tensor) -> tuple[float, ...]:
    """Numbers for the exact bits of each tensor, whatever wrote them. They read every element: for r-wide factors only.

    The bits are multiplied by odd constants, one for each 8 bytes, and summed modulo 2^64: a change of one element always
    shows, a change of several is missed with probability 2^-63 at most, unless all it flips is the highest bit of words, an
    even number of them: the constants do not tell those apart. They are signs, and a product with random numbers does.
    """
    found: list[float] = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if flat.device.type == "cpu" and cpu_bf16.memory_is_ours(flat):
            found.append(cpu_bf16.fingerprint(flat))
            continue
        count, size = flat.numel(), flat.element_size()
        if flat.storage_offset() * size % 8:
            flat = flat.clone()
        if count * size % 8 or size < 4:
            words = flat.view(torch.int16 if size == 2 else torch.int32).to(torch.int64)  # wide enough for every bit
            found.append(torch.dot(words, _odd_numbers(count)).item())
        else:
            words = flat.view(torch.int64)
            found += (torch.dot(words, _odd_numbers(words.numel())).item(), torch.dot(flat, _random_numbers(count, flat.dtype)).item())
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _odd_numbers(count: int) -> Tensor:
    return torch.randint(2**62, (count,), generator=torch.Generator("cpu").manual_seed(count), device="cpu").mul_(2).add_(1)


@functools.lru_cache(maxsize=64)
def _random_numbers(count: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(count, generator=torch.Generator("cpu").manual_seed(count), dtype=dtype, device="cpu").add_(0.5)


def forget_constants() -> None:
    """Has the constants of `fingerprint` made anew: those that were made of tensors without data would be of no use to others."""
    _odd_numbers.cache_clear()
    _random_numbers.cache_clear()
