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
def _quarter(x, out, i, count, u, p, ADD: tl.constexpr):
    value = tl.where(u < p, 0.0, tl.load(x + i, mask=i < count, other=0.0).to(tl.float32))
    if ADD:
        value += tl.load(out + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=i < count)


@triton.jit(do_not_specialize=["seed"])
def _drop(x, out, count, p, seed, ADD: tl.constexpr, QUARTER: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, QUARTER)
    first, second, third, fourth = tl.rand4x(seed, block * QUARTER + lane)  # Philox draws four numbers at once
    i = block * (4 * QUARTER) + lane
    _quarter(x, out, i, count, first, p, ADD)
    _quarter(x, out, i + QUARTER, count, second, p, ADD)
    _quarter(x, out, i + 2 * QUARTER, count, third, p, ADD)
    _quarter(x, out, i + 3 * QUARTER, count, fourth, p, ADD)


def drop(x: Tensor, p: float, seed: int, out: Tensor | None = None, add: bool = False) -> Tensor:
    """x with each element zero with probability p, the same ones for the same seed and number of elements; with `add`, added to `out`.

    x and `out` are contiguous; `out` may be x itself, and is a new tensor where none is given.
    """
    out = torch.empty_like(x) if out is None else out
    with torch.cuda.device_of(x):
        _drop[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), float(p), seed, ADD=add, QUARTER=BLOCK // 4, num_warps=8)
    return out
