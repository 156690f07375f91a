"""Dropout in Triton, for GPUs: one pass over x, each zero drawn from the seed where it is used.

Drawn apart, the mask alone would cost half of what x does to write, and as much again to read. `kernels.dropout` chooses;
import this module only through it, for it imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _quarter(x, out, update, to, i, count, u, p, TAKE: tl.constexpr, ADD: tl.constexpr):
    there = i < count
    if TAKE:
        tl.store(out + i, tl.where(u < p, 0.0, tl.load(x + i, mask=there, other=0.0)).to(out.dtype.element_ty), mask=there)
    if ADD:
        value = tl.where(u < p, 0.0, tl.load(update + i, mask=there, other=0.0).to(tl.float32))
        value += tl.load(to + i, mask=there, other=0.0).to(tl.float32)
        tl.store(to + i, value.to(to.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["seed"])
def _drop(x, out, update, to, count, p, seed, TAKE: tl.constexpr, ADD: tl.constexpr, QUARTER: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, QUARTER)
    first, second, third, fourth = tl.rand4x(seed, block * QUARTER + lane)  # Philox draws four numbers at once
    i = block * (4 * QUARTER) + lane
    _quarter(x, out, update, to, i, count, first, p, TAKE, ADD)
    _quarter(x, out, update, to, i + QUARTER, count, second, p, TAKE, ADD)
    _quarter(x, out, update, to, i + 2 * QUARTER, count, third, p, TAKE, ADD)
    _quarter(x, out, update, to, i + 3 * QUARTER, count, fourth, p, TAKE, ADD)


def _launch(x: Tensor, out: Tensor, update: Tensor, to: Tensor, p: float, seed: int, take: bool, add: bool) -> None:
    with torch.cuda.device_of(x):
        _drop[(triton.cdiv(x.numel(), BLOCK),)](x, out, update, to, x.numel(), float(p), seed, TAKE=take, ADD=add, QUARTER=BLOCK // 4, num_warps=8)


def drop(x: Tensor, p: float, seed: int, out: Tensor | None = None) -> Tensor:
    """d(x): x with each element zero with probability p, the same ones for the same seed and number of elements.

    x and `out` are contiguous; `out` may be x itself, and is a new tensor where none is given.
    """
    out = torch.empty_like(x) if out is None else out
    _launch(x, out, x, out, p, seed, take=True, add=False)
    return out


def add_(to: Tensor, update: Tensor, p: float, seed: int) -> Tensor:
    """to <- to + d(update), in place, for contiguous tensors."""
    _launch(update, to, update, to, p, seed, take=False, add=True)
    return to


def drop_and_add_(x: Tensor, to: Tensor, update: Tensor, p: float, seed: int) -> Tensor:
    """d(x), and to <- to + d(update) in place, with the same zeros: one launch, one draw. All are contiguous, of one size."""
    out = torch.empty_like(x)
    _launch(x, out, update, to, p, seed, take=True, add=True)
    return out
