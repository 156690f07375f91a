"""DoRA in Triton, for GPUs: one pass over y and over G where library calls take three or more, and no wait for the device.

    compose_            y <- g * (y + s h B^T) + b,  g = m / n
    compose_backward    G g,  dm = sum_t G (y - b) / m,  db = sum_t G
    dora_norm           n = |W + s B A|_row

Arithmetic is in fp32 in registers whatever the dtype of y. Sums over tokens are taken in a fixed order, without atomics:
the same inputs give the same bits. `kernels.dora` holds the same functions in plain torch and chooses; import this
module only through it, for it imports triton. Ranks up to MAX_RANK.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RANK = 64  # beyond it tiles outgrow the shared memory of smaller GPUs


def operands(dtype: torch.dtype) -> tl.dtype:
    """What tl.dot multiplies for tensors of `dtype`: the same, but fp32 for bf16 in the interpreter, which cannot multiply bf16."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def padded_rank(r: int) -> int:
    """r as tl.dot takes it: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(r))


# -------------------------------------------------------------------------------------------------------------- compose


@triton.jit
def _gain(magnitude, norm, o, outputs):
    """g = m / n; 1 where n = 0."""
    m = tl.load(magnitude + o, mask=o < outputs, other=0.0).to(tl.float32)
    n = tl.load(norm + o, mask=o < outputs, other=0.0).to(tl.float32)
    return tl.where(n == 0, 1.0, m / tl.where(n == 0, 1.0, n))


@triton.jit
def _compose(
    y, h, b, magnitude, norm, bias, tokens, outputs, r, stride_y, stride_h, scale,
    BIAS: tl.constexpr, DOT: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, R)
    low_h = tl.load(h + t[:, None] * stride_h + k[None, :], mask=(t[:, None] < tokens) & (k[None, :] < r), other=0.0)
    low_b = tl.load(b + o[None, :] * r + k[:, None], mask=(o[None, :] < outputs) & (k[:, None] < r), other=0.0)
    update = tl.dot(low_h.to(DOT), low_b.to(h.dtype.element_ty).to(DOT), input_precision="ieee")
    place = y + t[:, None] * stride_y + o[None, :]
    inside = (t[:, None] < tokens) & (o[None, :] < outputs)
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32) + scale * update
    value *= _gain(magnitude, norm, o, outputs)[None, :]
    if BIAS:
        value += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(place, value.to(y.dtype.element_ty), mask=inside)


def compose_(y: Tensor, h: Tensor, b: Tensor, scale: float, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """As kernels.dora.compose_. y and h need neighbouring columns, not neighbouring rows."""
    tokens, outputs = y.shape
    r, rows, columns = b.shape[1], 64, 128
    _compose[(triton.cdiv(outputs, columns), triton.cdiv(tokens, rows))](
        y, h, b.contiguous(), magnitude, norm, norm if bias is None else bias, tokens, outputs, r, y.stride(0), h.stride(0), float(scale),
        BIAS=bias is not None, DOT=operands(h.dtype), R=padded_rank(r), ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return y


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _compose_backward(
    grad, y, magnitude, norm, bias, scaled, partial, tokens, outputs, rows_each,
    BIAS: tl.constexpr, MAGNITUDE: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part, parts = tl.program_id(1), tl.num_programs(1)
    g = _gain(magnitude, norm, o, outputs)[None, :]
    shift = tl.zeros((1, COLUMNS), tl.float32)
    if BIAS:
        shift = tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    with_y = tl.zeros((COLUMNS,), tl.float32)
    alone = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, rows_each, ROWS):
        t = part.to(tl.int64) * rows_each + start + tl.arange(0, ROWS)
        inside = (t[:, None] < tokens) & (o[None, :] < outputs)
        place = t[:, None] * outputs + o[None, :]
        value = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(scaled + place, (value * g).to(scaled.dtype.element_ty), mask=inside)
        if MAGNITUDE:
            with_y += tl.sum(value * (tl.load(y + place, mask=inside, other=0.0).to(tl.float32) - shift), 0)
        if SUM:
            alone += tl.sum(value, 0)
    if MAGNITUDE:
        tl.store(partial + part * outputs + o, with_y, mask=o < outputs)
    if SUM:
        tl.store(partial + (parts + part) * outputs + o, alone, mask=o < outputs)


@triton.jit
def _finish(
    partial, magnitude, grad_magnitude, grad_bias, outputs, parts,
    MAGNITUDE: tl.constexpr, SUM: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    with_y = tl.zeros((COLUMNS,), tl.float32)
    alone = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part[:, None] < parts) & (o[None, :] < outputs)
        place = partial + part[:, None] * outputs + o[None, :]
        if MAGNITUDE:
            with_y += tl.sum(tl.load(place, mask=inside, other=0.0), 0)
        if SUM:
            alone += tl.sum(tl.load(place + parts * outputs, mask=inside, other=0.0), 0)
    if MAGNITUDE:
        m = tl.load(magnitude + o, mask=o < outputs, other=0.0).to(tl.float32)
        slope = tl.where(m == 0, 0.0, with_y / tl.where(m == 0, 1.0, m))
        tl.store(grad_magnitude + o, slope.to(grad_magnitude.dtype.element_ty), mask=o < outputs)
    if SUM:
        tl.store(grad_bias + o, alone.to(grad_bias.dtype.element_ty), mask=o < outputs)


def compose_backward(
    grad: Tensor, y: Tensor | None, magnitude: Tensor, norm: Tensor, bias: Tensor | None, *, need_magnitude: bool, need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """As kernels.dora.compose_backward."""
    grad = grad.contiguous()
    tokens, outputs = grad.shape
    rows, columns = 32, 128
    across = triton.cdiv(outputs, columns)
    # About a thousand programs fill the largest GPU. Every shape has one fixed split, so every run has the same sums.
    parts = max(1, min(triton.cdiv(tokens, rows), triton.cdiv(1024, across)))
    rows_each = triton.cdiv(triton.cdiv(tokens, parts), rows) * rows
    scaled = torch.empty_like(grad)
    partial = torch.empty((2, parts, outputs) if need_magnitude or need_bias else (0,), dtype=torch.float32, device=grad.device)
    grad_magnitude = torch.empty_like(magnitude) if need_magnitude else None
    grad_bias = torch.empty_like(bias) if need_bias and bias is not None else None
    _compose_backward[(across, parts)](
        grad, grad if y is None else y.contiguous(), magnitude, norm, norm if bias is None else bias, scaled, partial, tokens, outputs, rows_each,
        BIAS=bias is not None, MAGNITUDE=need_magnitude, SUM=need_bias, ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    if need_magnitude or need_bias:
        _finish[(triton.cdiv(outputs, 32),)](
            partial, magnitude, grad if grad_magnitude is None else grad_magnitude, grad if grad_bias is None else grad_bias, outputs, parts,
            MAGNITUDE=need_magnitude, SUM=need_bias, PARTS=32, COLUMNS=32,
        )  # fmt: skip
    return scaled, grad_magnitude, grad_bias


# ----------------------------------------------------------------------------------------------------------------- norm


@triton.jit
def _hashed(values, places, inside):
    """The sum modulo 2^64 of a bijective mix (splitmix64) of each value's bits and place: one changed element always shows."""
    z = values.to(tl.uint32, bitcast=True).to(tl.uint64) + places.to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return tl.sum(tl.sum(tl.where(inside, z.to(tl.int64, bitcast=True), 0), 1), 0)


@triton.jit
def _survey(a, b, hashes, grams, inputs, outputs, r, R: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Of one block of A's columns and one of B's rows: the hash, and the block's part of A A^T."""
    block = tl.program_id(0)
    k = tl.arange(0, R)
    found = tl.zeros((), tl.int64)
    gram = tl.zeros((R, R), tl.float32)
    for start in range(block * BLOCK, (block + 1) * BLOCK, STEP):
        i = start + tl.arange(0, STEP)
        inside = (k[:, None] < r) & (i[None, :] < inputs)
        place = k[:, None].to(tl.int64) * inputs + i[None, :]
        low_a = tl.load(a + place, mask=inside, other=0.0)
        found += _hashed(low_a, place, inside)
        gram += tl.dot(low_a, tl.trans(low_a), input_precision="ieee")
        inside = (i[:, None] < outputs) & (k[None, :] < r)
        place = i[:, None].to(tl.int64) * r + k[None, :]
        low_b = tl.load(b + place, mask=inside, other=0.0)
        found += _hashed(low_b, place + 1099511627776, inside)  # 2^40: no place of A
    tl.store(grams + (block * R + k[:, None]) * R + k[None, :], gram)
    tl.store(hashes + block, found)


@triton.jit
def _norm(
    weight, squares, a, b, hashes, grams, seen, kept, norm, inputs, outputs, r, blocks, stride_out, stride_in, scale,
    DOT: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Every program keeps the fingerprint of its own rows' norm, so none can see it renewed before it has looked itself."""
    row_block = tl.program_id(0)
    o = row_block * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, R)
    each = tl.arange(0, BLOCKS)
    found = tl.sum(tl.load(hashes + each, mask=each < blocks, other=0), 0)
    n = tl.load(kept + o, mask=o < outputs, other=0.0)
    if tl.load(seen + row_block) != found:
        cross = tl.zeros((ROWS, R), tl.float32)  # W A^T
        for start in range(0, inputs, COLUMNS):
            i = start + tl.arange(0, COLUMNS)
            w = tl.load(
                weight + o[:, None].to(tl.int64) * stride_out + i[None, :].to(tl.int64) * stride_in,
                mask=(o[:, None] < outputs) & (i[None, :] < inputs), other=0.0,
            )  # fmt: skip
            low_a = tl.load(a + k[None, :].to(tl.int64) * inputs + i[:, None], mask=(k[None, :] < r) & (i[:, None] < inputs), other=0.0)
            cross += tl.dot(w.to(DOT), low_a.to(weight.dtype.element_ty).to(DOT), input_precision="ieee")
        gram = tl.zeros((R, R), tl.float32)  # A A^T
        for block in range(0, tl.cdiv(inputs, BLOCK)):
            gram += tl.load(grams + (block * R + k[:, None]) * R + k[None, :])
        low_b = tl.load(b + o[:, None].to(tl.int64) * r + k[None, :], mask=(o[:, None] < outputs) & (k[None, :] < r), other=0.0)
        inner = 2 * scale * cross + scale * scale * tl.dot(low_b, gram, input_precision="ieee")
        total = tl.load(squares + o, mask=o < outputs, other=0.0).to(tl.float32) + tl.sum(low_b * inner, 1)
        n = tl.sqrt(tl.where(total < 0, 0.0, total))  # the maximum with 0 of a NaN is 0 on a GPU
        tl.store(kept + o, n, mask=o < outputs)
        tl.store(seen + row_block, found)
    tl.store(norm + o, n, mask=o < outputs)


_ROWS, _BLOCK = 32, 128  # rows of W per program; columns of A and rows of B per program of the survey


@dataclass
class NormMemory:
    """The last row norms (out,) of one layer, and for each block of rows the fingerprint of the A and B they stand for.

    It lives and is judged on the device: the host never learns whether the norm was taken anew. It knows nothing of W, s
    and the dtype of W: whoever holds it takes a new one where those change.
    """

    norm: Tensor
    seen: Tensor


def norm_memory(weight: Tensor, r: int) -> NormMemory:
    """As kernels.dora.norm_memory."""
    outputs, device = weight.shape[0], weight.device
    # No norm is NaN: should a fingerprint ever be 0 by chance, it would show.
    return NormMemory(torch.full((outputs,), float("nan"), device=device), torch.zeros(triton.cdiv(outputs, _ROWS), dtype=torch.int64, device=device))


def dora_norm(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float, memory: NormMemory) -> Tensor:
    """As kernels.dora.dora_norm, in fp32 throughout: a new tensor, for which W is read only where a bit of A or B has changed."""
    outputs, inputs = weight.shape
    r, device = a.shape[0], weight.device
    rank, blocks = padded_rank(r), triton.cdiv(max(inputs, outputs), _BLOCK)
    wide_a, wide_b = a.float().contiguous(), b.float().contiguous()
    hashes = torch.empty(blocks, dtype=torch.int64, device=device)
    grams = torch.empty(blocks, rank, rank, dtype=torch.float32, device=device)
    norm = torch.empty(outputs, dtype=torch.float32, device=device)
    _survey[(blocks,)](wide_a, wide_b, hashes, grams, inputs, outputs, r, R=rank, BLOCK=_BLOCK, STEP=32, num_warps=4)
    _norm[(triton.cdiv(outputs, _ROWS),)](
        weight, squares, wide_a, wide_b, hashes, grams, memory.seen, memory.norm, norm,
        inputs, outputs, r, blocks, weight.stride(0), weight.stride(1), float(scale),
        DOT=operands(weight.dtype), R=rank, BLOCKS=triton.next_power_of_2(blocks), BLOCK=_BLOCK, ROWS=_ROWS,
        COLUMNS=32 if weight.dtype == torch.float32 else 64, num_warps=4,
    )  # fmt: skip
    return norm
