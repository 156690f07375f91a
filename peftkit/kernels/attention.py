"""Causal attention within documents, several of which may lie in one row, on a CPU.

    y_t = sum_u softmax_u(scale <q_t, k_u>) v_u      over the tokens u up to t of its document

    q (rows, heads, tokens, d)   k (rows, groups, tokens, d)   v (rows, groups, tokens, e)   y (rows, tokens, heads, e)

torch's fused attention computes what a mask hides too: nine tenths of rows of 512 tokens in documents of 100. Here each
document is taken by itself, some of its queries at a time, with the keys up to the last of them, so that the scores stay in
the cache. Scores and softmax are in fp32 at least, as in the fused kernels. Kept for backward are q, k and v, not repeated
where heads share them; the scores are taken again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkit.kernels.lowrank import refuse_second_derivative

Documents = Sequence[Sequence[tuple[int, int]]]
"""For every row, the first token of each document and the one after its last."""

CACHED_SCORES = 2**19
"""How many scores are taken at a time, over all heads: 2 MB of them in fp32."""
ROUNDED = 16
"""Lengths are multiples of so many tokens where they can be."""


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """y (rows, tokens, heads, e), the equation above. A token that is in no document gets 0, and no gradient."""
    y: Tensor = _Attend.apply(q, k, v, documents, scale)
    return y


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(q, k, v)
        ctx.documents, ctx.scale = documents, scale
        rows, heads, tokens, _ = q.shape
        y = v.new_zeros(rows, tokens, heads, v.shape[-1])
        later, wide = _later(documents, q), _wide(q)
        with torch.autocast(q.device.type, enabled=False):
            for row, start, first, last, end in _shares(documents, heads, tokens):
                queries = _stacked(q[row, :, first:last], k).to(wide)
                weights = _weights(queries, k[row, :, start:last].to(wide), later, last - first, scale).to(v.dtype)
                found = torch.bmm(weights, v[row, :, start:last]).view(heads, last - first, -1)
                y[row, first:end] = found[:, : end - first].transpose(0, 1)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        refuse_second_derivative("set model.attention: sdpa")
        q, k, v = ctx.saved_tensors
        _, heads, tokens, _ = q.shape
        grad_q, later, wide = torch.zeros_like(q), _later(ctx.documents, q), _wide(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        with torch.autocast(q.device.type, enabled=False):
            for row, start, first, last, end in _shares(ctx.documents, heads, tokens):
                keys, values = k[row, :, start:last], v[row, :, start:last]
                queries = _stacked(q[row, :, first:last], k)
                above = grad[row, first:last].transpose(0, 1)
                if end < last:  # queries of what follows the document: they are computed with, and must not count
                    above = above.clone()
                    above[:, end - first :] = 0
                above = _stacked(above, v)
                weights = _weights(queries.to(wide), keys.to(wide), later, last - first, ctx.scale)
                grad_weights = torch.bmm(above, values.transpose(1, 2)).to(wide)
                grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, wide).mul_(ctx.scale).to(q.dtype)
                grad_q[row, :, first:end] = torch.bmm(grad_scores, keys).view(heads, last - first, -1)[:, : end - first]
                grad_k[row, :, start:last] += torch.bmm(grad_scores.transpose(1, 2), queries)
                grad_v[row, :, start:last] += torch.bmm(weights.to(v.dtype).transpose(1, 2), above)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _shares(documents: Documents, heads: int, tokens: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Every document some of its queries at a time: (row, start of the document, first query, last + 1, end of those that are the document's).

    Lengths are rounded up, into what follows, where the row is long enough: oneDNN compiles a kernel for every shape it meets.
    What follows is later than every query of the document, so none of them sees it.
    """
    for row, spans in enumerate(documents):
        for start, end in spans:
            length = min(-(-(end - start) // ROUNDED) * ROUNDED, tokens - start)
            step = length if heads * length**2 <= CACHED_SCORES else max(CACHED_SCORES // (heads * length) // ROUNDED * ROUNDED, ROUNDED)
            for first in range(start, end, step):
                last = min(first + step, start + length)
                yield row, start, first, last, min(last, end)


def _later(documents: Documents, q: Tensor) -> Tensor:
    """-inf above the diagonal, for as many queries as are ever taken at a time: what each must not see of the others."""
    longest = max((end - start for spans in documents for start, end in spans), default=0) + ROUNDED
    most = min(longest, max(math.isqrt(CACHED_SCORES // q.shape[1]), ROUNDED))
    return torch.full((most, most), float("-inf"), dtype=_wide(q)).triu_(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _stacked(x: Tensor, k: Tensor) -> Tensor:
    """x (heads, queries, d) as (groups, heads / groups * queries, d): what shares its keys stands below each other."""
    return x.reshape(k.shape[1], -1, x.shape[-1])


def _weights(queries: Tensor, keys: Tensor, later: Tensor, count: int, scale: float) -> Tensor:
    """Softmax (groups, heads / groups * count, keys) of the scores of `count` queries of each head, which are the last ones of the keys."""
    scores = torch.bmm(queries * scale, keys.transpose(1, 2))
    scores.view(-1, count, keys.shape[1])[..., -count:].add_(later[:count, :count])
    return scores.softmax(-1)
