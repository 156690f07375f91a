"""Mixture-of-experts layers with low-rank updates as one autograd node, in plain torch.

For every token t and each expert that the router chose for it, with weight w:

    u = x_t W^T + c + s d(x_t) A^T B^T                  W (out, in), A (r, in), B (out, r), c (out,): the expert's own
    y = f(u) V^T + e + s d(f(u)) C^T D^T                V, C, D, e likewise
    out_t = sum over its experts of w y

    x (tokens, hidden)   u (rows, 2 inner), or (rows, inner) without a gate   f: activation   rows = tokens x experts per token

The rows are sorted by expert once; every product then runs over one block of rows per expert, and experts without rows cost
nothing. Kept for backward are x, u, and the r-wide products. f(u) is computed again, and y is not needed: the gradient of w
is <G, y>, which is <G V + ..., f(u)>. No update is ever added to a weight, and no frozen weight is kept: one that is
quantised is dequantised where it is used, an expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit.kernels.dropout import Dropout, draw_seed
from peftkit.kernels.lowrank import refuse_second_derivative

Factors = tuple[Tensor, Tensor] | None  # A (experts, r, in) and B^T (experts, r, out) of a projection that has an update


@dataclass(frozen=True)
class Projection:
    """One of the two linears of every expert: what is frozen of it, and how its update is scaled."""

    weight: Callable[[int], Tensor]
    """W (out, in) of one expert, in the dtype of the arithmetic."""
    outputs: int
    bias: Tensor | None = None
    """(experts, out), in the dtype of the arithmetic."""
    scale: float = 1.0
    dropout: float = 0.0

    def dropped(self, x: Tensor, seed: int) -> Tensor:
        """x (rows, in) with the same elements zeroed for the same seed; what grows in return is the step."""
        return Dropout.of(x, self.dropout, seed)(x)

    @property
    def step(self) -> float:
        return self.scale / (1 - self.dropout)


class Blocks(NamedTuple):
    """Which experts have rows, in rising order, and how many."""

    experts: list[int]
    rows: list[int]


def sort_by_expert(index: Tensor, experts: int) -> tuple[Tensor, Blocks]:
    """(slots, blocks) of index (tokens, experts per token).

    slots (rows,) holds the places in index.flatten() in the order of their experts. Places that name no expert (>= experts,
    as expert parallelism marks those of other devices) are left out.
    """
    flat = index.reshape(-1)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    used = [expert for expert, count in enumerate(counts) if count]
    # Sorted as transformers does, so that rows lie in the same places and products round alike.
    return flat.sort().indices[: sum(counts)], Blocks(used, [counts[expert] for expert in used])


def _cast(a: Tensor | None, b: Tensor | None, part: Projection, dtype: torch.dtype) -> Factors:
    """A (experts, r, in) and s B^T (experts, r, out) for the products.

    B^T mostly is a view of B (out, r * experts). Transposed as one matrix it has rows that lie together, which is how CPUs
    multiply fast, at a third of the cost of ordering it by expert.
    """
    if a is None or b is None:
        return None
    count, r, outputs = b.shape
    rows = b.transpose(0, 1).reshape(r * count, outputs).contiguous() * part.step
    return a.to(dtype), rows.to(dtype).view(r, count, outputs).transpose(0, 1)


def _project(x: Tensor, blocks: Blocks, part: Projection, factors: Factors, seed: int) -> tuple[Tensor, Tensor | None]:
    """(y (rows, out), h (rows, r)) of x (rows, in); h is None where there is no update."""
    y = x.new_empty(x.shape[0], part.outputs)
    xs, ys = x.split(blocks.rows), y.split(blocks.rows)
    for expert, x_e, y_e in zip(blocks.experts, xs, ys, strict=True):
        torch.mm(x_e, part.weight(expert).T, out=y_e)
        if part.bias is not None:
            y_e.add_(part.bias[expert])
    if factors is None:
        return y, None
    a, b = factors
    h = x.new_empty(x.shape[0], a.shape[1])
    for expert, x_e, y_e, h_e in zip(blocks.experts, xs, ys, h.split(blocks.rows), strict=True):
        torch.mm(part.dropped(x_e, seed + expert), a[expert].T, out=h_e)
        y_e.addmm_(h_e, b[expert])
    return y, h


def _project_back(
    grad: Tensor, x: Tensor, h: Tensor | None, blocks: Blocks, part: Projection, factors: Factors, seed: int, share: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x (rows, in), A (experts, r, in) and B^T (experts, r, out) from grad (rows, out).

    share (rows, 1) scales what every row adds to A and B, but not the gradient of x.
    """
    grad_x = x.new_empty(x.shape)
    grads, grad_xs = grad.split(blocks.rows), grad_x.split(blocks.rows)
    for expert, grad_e, grad_x_e in zip(blocks.experts, grads, grad_xs, strict=True):
        torch.mm(grad_e, part.weight(expert), out=grad_x_e)
    if factors is None or h is None:
        return grad_x, None, None
    a, b = factors
    grad_h = torch.empty_like(h)
    grad_hs = grad_h.split(blocks.rows)
    for expert, grad_e, grad_x_e, grad_h_e in zip(blocks.experts, grads, grad_xs, grad_hs, strict=True):
        torch.mm(grad_e, b[expert].T, out=grad_h_e)
        if part.dropout:
            grad_x_e.add_(part.dropped(grad_h_e @ a[expert], seed + expert))
        else:
            grad_x_e.addmm_(grad_h_e, a[expert])
    if share is not None:
        h = h * share
        grad_h.mul_(share)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)  # as they lie; an expert without rows has a gradient of zero
    for expert, grad_e, grad_h_e, x_e, h_e in zip(blocks.experts, grads, grad_hs, x.split(blocks.rows), h.split(blocks.rows), strict=True):
        torch.mm(grad_h_e.T, part.dropped(x_e, seed + expert), out=grad_a[expert])
        torch.mm(h_e.T, grad_e, out=grad_b[expert])
    return grad_x, grad_a, grad_b.mul_(part.step)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, index: Tensor, weights: Tensor, a: Tensor | None, b: Tensor | None, c: Tensor | None, d: Tensor | None,
        experts: int, first: Projection, second: Projection, gate: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        tokens, each = index.shape
        slots, blocks = sort_by_expert(index, experts)
        seed = draw_seed(first.dropout or second.dropout)
        u, h = _project(x[slots // each], blocks, first, _cast(a, b, first, x.dtype), seed)
        y, k = _project(gate(u), blocks, second, _cast(c, d, second, x.dtype), seed + experts)
        ctx.experts, ctx.first, ctx.second, ctx.gate, ctx.blocks, ctx.seed = experts, first, second, gate, blocks, seed
        ctx.save_for_backward(x, weights, slots, u, h, k, a, b, c, d)
        return _summed(y * weights.reshape(-1)[slots, None], slots, tokens, each).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        refuse_second_derivative()
        x, weights, slots, u, h, k, a, b, c, d = ctx.saved_tensors
        first, second, blocks, seed = ctx.first, ctx.second, ctx.blocks, ctx.seed
        tokens, each = weights.shape
        grad_x = grad_weights = grad_a = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            token, share = slots // each, weights.reshape(-1)[slots, None].to(x.dtype)
            grad_y = grad[token]  # (rows, hidden), before the router's weight
            with torch.enable_grad():
                source = u.detach().requires_grad_()
                gated = ctx.gate(source)
            inner = gated.detach()  # (rows, inner)
            grad_inner, grad_c, grad_d = _project_back(grad_y, inner, k, blocks, second, _cast(c, d, second, x.dtype), seed + ctx.experts, share)
            if ctx.needs_input_grad[2]:
                along = (grad_inner * inner).sum(1)
                if second.bias is not None:
                    for part, rows, expert in zip(along.split(blocks.rows), grad_y.split(blocks.rows), blocks.experts, strict=True):
                        part.addmv_(rows, second.bias[expert])
                grad_weights = weights.new_zeros(weights.numel()).index_copy_(0, slots, along.to(weights.dtype)).view(weights.shape)
            if any(ctx.needs_input_grad[i] for i in (0, 3, 4)):
                (grad_u,) = torch.autograd.grad(gated, source, grad_inner.mul_(share))
                del gated, inner, grad_y, grad_inner
                grad_rows, grad_a, grad_b = _project_back(grad_u, x[token], h, blocks, first, _cast(a, b, first, x.dtype), seed)
                grad_x = _summed(grad_rows, slots, tokens, each)
        return grad_x, None, grad_weights, *_as(grad_a, grad_b, a), *_as(grad_c, grad_d, c), None, None, None, None


def _as(grad_a: Tensor | None, grad_b: Tensor | None, master: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of A and B^T in the dtype of their masters."""
    if grad_a is None or grad_b is None or master is None:
        return None, None
    return grad_a.to(master.dtype), grad_b.to(master.dtype)


def _summed(rows: Tensor, slots: Tensor, tokens: int, each: int) -> Tensor:
    """The rows summed by token (tokens, features); adding them in place would depend on their order on a GPU."""
    return rows.new_zeros(tokens * each, rows.shape[1]).index_copy_(0, slots, rows).view(tokens, each, rows.shape[1]).sum(1)


@torch.compiler.disable  # how many rows each expert gets is known only when it runs
def routed_experts(
    x: Tensor, index: Tensor, weights: Tensor, *, experts: int, first: Projection, second: Projection, gate: Callable[[Tensor], Tensor],
    first_factors: Factors = None, second_factors: Factors = None,
) -> Tensor:  # fmt: skip
    """out (tokens, hidden) of x (tokens, hidden) for index and weights (tokens, experts per token); the equations are above.

    gate: the activation f, from (rows, first.outputs) to (rows, inner). Arithmetic is in the dtype of x. Gradients flow to x,
    to weights, and to the factors in their own dtypes.
    """
    a, b = first_factors or (None, None)
    c, d = second_factors or (None, None)
    with torch.autocast(x.device.type, enabled=False):
        return _RoutedExperts.apply(x, index, weights, a, b, c, d, experts, first, second, gate)
