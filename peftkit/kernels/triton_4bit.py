"""Products with a 4-bit weight and their low-rank update in one Triton kernel, for GPUs; W never exists as a whole.

    y = x W^T + s h B^T + b             low_rank_product_4bit(x, W4, h, B)
    dx = G W + s H A                    low_rank_product_4bit(G, W4, H, A, transposed=True)

W (out, in) is stored as in bitsandbytes (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): element e of the flat weight is
code[nibble e] * absmax[e // 64], two nibbles to a byte, the first in the high half. Every tile is decoded and rounded to
the dtype of x before it is multiplied, as after a dequantisation of the whole.

Opt-in: for long inputs a dequantisation is a small part of the product and cuBLAS multiplies faster than this kernel;
`benchmarks/gpu/kernels.py` finds where the lines cross. Imports triton: import this module only where there is a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkit.kernels.triton_dora import operands, padded_rank


@dataclass(frozen=True)
class Weight4bit:
    """A 4-bit weight: packed (out * in / 2,) uint8, absmax (out * in / block,) fp32, code (16,) fp32."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    block: int

    @classmethod
    def of(cls, packed: Tensor, state: Any) -> Weight4bit:
        """From the weight of a bitsandbytes linear and its quant_state; doubly quantised block scales are decoded here."""
        absmax = state.absmax
        if state.nested:
            second = state.state2
            absmax = second.code[absmax.long()] * second.absmax.repeat_interleave(second.blocksize)[: absmax.numel()] + state.offset
        return cls(packed.view(-1), absmax.float(), state.code.float(), tuple(state.shape), state.blocksize)


@triton.jit
def _product(
    x, packed, absmax, code, h, low, bias, y, tokens, wide, deep, r, stride_x, stride_h, wide_step, deep_step, low_wide_step, low_rank_step, scale,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, R)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, deep, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(x + t[:, None] * stride_x + k[None, :], mask=(t[:, None] < tokens) & (k[None, :] < deep), other=0.0)
        element = n[None, :].to(tl.int64) * wide_step + k[:, None].to(tl.int64) * deep_step
        inside = (n[None, :] < wide) & (k[:, None] < deep)
        byte = tl.load(packed + element // 2, mask=inside, other=0).to(tl.int32)
        nibble = (byte >> ((1 - element % 2) * 4).to(tl.int32)) & 15
        right = tl.load(code + nibble) * tl.load(absmax + element // BLOCK, mask=inside, other=0.0)
        total += tl.dot(left.to(DOT), right.to(x.dtype.element_ty).to(DOT), input_precision="ieee")
    low_h = tl.load(h + t[:, None] * stride_h + j[None, :], mask=(t[:, None] < tokens) & (j[None, :] < r), other=0.0)
    factor = tl.load(low + n[None, :] * low_wide_step + j[:, None] * low_rank_step, mask=(n[None, :] < wide) & (j[:, None] < r), other=0.0)
    total += scale * tl.dot(low_h.to(DOT), factor.to(x.dtype.element_ty).to(DOT), input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=n < wide, other=0.0).to(tl.float32)[None, :]
    tl.store(y + t[:, None] * wide + n[None, :], total.to(y.dtype.element_ty), mask=(t[:, None] < tokens) & (n[None, :] < wide))


def low_rank_product_4bit(
    x: Tensor, weight: Weight4bit, h: Tensor, factor: Tensor, scale: float, bias: Tensor | None = None, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """x W^T + s h F^T + b (tokens, out) with F = B (out, r); transposed: x W + s h F (tokens, in) with F = A (r, in).

    In the dtype of x: fp32, fp16 or bf16; F may be wider. x and h need neighbouring columns. Ranks as for DoRA's kernels.
    """
    outputs, inputs = weight.shape
    tokens, r = h.shape
    wide, deep = (inputs, outputs) if transposed else (outputs, inputs)
    steps = (1, inputs) if transposed else (inputs, 1)
    factor_steps = (factor.stride(1), factor.stride(0)) if transposed else (factor.stride(0), factor.stride(1))
    y = torch.empty(tokens, wide, dtype=x.dtype, device=x.device)
    rows, columns, depth = (32, 64, 32) if x.dtype == torch.float32 else (64, 128, 64)
    _product[(triton.cdiv(wide, columns), triton.cdiv(tokens, rows))](
        x, weight.packed, weight.absmax, weight.code, h, factor, y if bias is None else bias, y, tokens, wide, deep, r,
        x.stride(0), h.stride(0), *steps, *factor_steps, float(scale),
        BIAS=bias is not None, BLOCK=weight.block, DOT=operands(x.dtype), R=padded_rank(r), ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=8, num_stages=2,
    )  # fmt: skip
    return y
