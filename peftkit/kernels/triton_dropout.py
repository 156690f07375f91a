"""The low-rank product under dropout in Triton, for GPUs: the mask is drawn where it is needed, twice, and never stored.

    h = d(x) A^T                    dropped_product
    dA = H^T d(x)                   dropped_gradient_a
    dx <- dx + d(H A)               add_dropped_product_         H = dL/dh

    x (tokens, in)   A (r, in)   h (tokens, r)   d(x) = x * kept / (1 - p)

Whether an element is kept is a function of (seed, token, column): Philox 4x32-10 (Salmon et al. 2011). The same seed
gives the same mask in all three and on every GPU, but another one than torch's generators. Sums are taken in a fixed
order. Up to MAX_RANK rows of A in all. Imports triton: import this module only where there is a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkit.kernels.triton_dora import operands, padded_rank

MAX_RANK = 128


@triton.jit
def _kept(seed, t, i, threshold):
    """Which of the elements (t, i) stay: a random 32-bit number each, kept from p 2^32 on."""
    number, _, _, _ = tl.philox(seed, i[None, :].to(tl.uint32), t[:, None].to(tl.uint32), 0, 0)
    return number.to(tl.int64) >= threshold


@triton.jit(do_not_specialize=["seed", "threshold"])
def _dropped_product(
    x, a, h, seed, threshold, tokens, inputs, r, stride_x, keep_scale,
    DOT: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, R)
    total = tl.zeros((ROWS, R), tl.float32)
    for start in range(0, inputs, COLUMNS):
        i = start + tl.arange(0, COLUMNS)
        inside = (t[:, None] < tokens) & (i[None, :] < inputs)
        value = tl.load(x + t[:, None].to(tl.int64) * stride_x + i[None, :], mask=inside & _kept(seed, t, i, threshold), other=0.0)
        low_a = tl.load(a + k[None, :].to(tl.int64) * inputs + i[:, None], mask=(k[None, :] < r) & (i[:, None] < inputs), other=0.0)
        total += tl.dot(value.to(DOT), low_a.to(x.dtype.element_ty).to(DOT), input_precision="ieee")
    place = h + t[:, None].to(tl.int64) * r + k[None, :]
    tl.store(place, (total * keep_scale).to(h.dtype.element_ty), mask=(t[:, None] < tokens) & (k[None, :] < r))


@triton.jit(do_not_specialize=["seed", "threshold"])
def _dropped_gradient_a(
    x, grad_h, partial, seed, threshold, tokens, inputs, r, stride_x, stride_h, rows_each, keep_scale,
    DOT: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, R)
    part = tl.program_id(1)
    total = tl.zeros((R, COLUMNS), tl.float32)
    for start in range(0, rows_each, ROWS):
        t = part * rows_each + start + tl.arange(0, ROWS)
        inside = (t[:, None] < tokens) & (i[None, :] < inputs)
        value = tl.load(x + t[:, None].to(tl.int64) * stride_x + i[None, :], mask=inside & _kept(seed, t, i, threshold), other=0.0)
        h = tl.load(grad_h + t[None, :].to(tl.int64) * stride_h + k[:, None], mask=(t[None, :] < tokens) & (k[:, None] < r), other=0.0)
        total += tl.dot(h.to(DOT), value.to(DOT), input_precision="ieee")
    place = partial + (part * r + k[:, None]).to(tl.int64) * inputs + i[None, :]
    tl.store(place, total * keep_scale, mask=(k[:, None] < r) & (i[None, :] < inputs))


@triton.jit(do_not_specialize=["seed", "threshold"])
def _add_dropped_product(
    grad_x, grad_h, a, seed, threshold, tokens, inputs, r, stride_x, stride_h, keep_scale,
    DOT: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, R)
    h = tl.load(grad_h + t[:, None].to(tl.int64) * stride_h + k[None, :], mask=(t[:, None] < tokens) & (k[None, :] < r), other=0.0)
    low_a = tl.load(a + k[:, None].to(tl.int64) * inputs + i[None, :], mask=(k[:, None] < r) & (i[None, :] < inputs), other=0.0)
    product = tl.dot(h.to(DOT), low_a.to(grad_h.dtype.element_ty).to(DOT), input_precision="ieee")
    place = grad_x + t[:, None].to(tl.int64) * stride_x + i[None, :]
    inside = (t[:, None] < tokens) & (i[None, :] < inputs) & _kept(seed, t, i, threshold)
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32) + keep_scale * product
    tl.store(place, value.to(grad_x.dtype.element_ty), mask=inside)


def _threshold(p: float) -> int:
    return round(p * 2**32)


def dropped_product(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """h = d(x) A^T (tokens, r) in the dtype of x; x needs neighbouring columns, A may be wider than x."""
    (tokens, inputs), r = x.shape, a.shape[0]
    h = torch.empty(tokens, r, dtype=x.dtype, device=x.device)
    _dropped_product[(triton.cdiv(tokens, 16),)](
        x, a.contiguous(), h, seed, _threshold(p), tokens, inputs, r, x.stride(0), 1 / (1 - p),
        DOT=operands(x.dtype), R=padded_rank(r), ROWS=16, COLUMNS=64, num_warps=4,
    )  # fmt: skip
    return h


def dropped_gradient_a(x: Tensor, grad_h: Tensor, p: float, seed: int) -> Tensor:
    """dA = H^T d(x) (r, in) in fp32; x and H need neighbouring columns."""
    (tokens, inputs), r, rows, columns = x.shape, grad_h.shape[1], 32, 64
    across = triton.cdiv(inputs, columns)
    parts = max(1, min(triton.cdiv(tokens, rows), triton.cdiv(512, across)))
    rows_each = triton.cdiv(triton.cdiv(tokens, parts), rows) * rows
    partial = torch.empty(parts, r, inputs, dtype=torch.float32, device=x.device)
    _dropped_gradient_a[(across, parts)](
        x, grad_h, partial, seed, _threshold(p), tokens, inputs, r, x.stride(0), grad_h.stride(0), rows_each, 1 / (1 - p),
        DOT=operands(x.dtype), R=padded_rank(r), ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return partial.sum(0)


def add_dropped_product_(grad_x: Tensor, grad_h: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """dx <- dx + d(H A), in place; both need neighbouring columns, A may be wider."""
    (tokens, inputs), r = grad_x.shape, a.shape[0]
    _add_dropped_product[(triton.cdiv(inputs, 128), triton.cdiv(tokens, 32))](
        grad_x, grad_h, a.contiguous(), seed, _threshold(p), tokens, inputs, r, grad_x.stride(0), grad_h.stride(0), 1 / (1 - p),
        DOT=operands(grad_h.dtype), R=padded_rank(r), ROWS=32, COLUMNS=128, num_warps=4,
    )  # fmt: skip
    return grad_x
