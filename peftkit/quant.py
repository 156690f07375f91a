"""Quantised bases: the only file that imports bitsandbytes.

Everything else sees a quantised linear through `dequantize(module, dtype)`. bitsandbytes is imported on first use, so
that models without quantisation never pay for it.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

Quantization = Literal["nf4", "fp4", "int8"]
BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own
# On CPUs bitsandbytes logs at import that an optional package of faster kernels is missing; nothing here uses them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

REPACKED = "packing_format_for_cpu"  # the mark that bitsandbytes leaves on the state of a weight it has repacked


def quantization_config(kind: Quantization, compute_dtype: torch.dtype, skip: list[str] | None = None) -> Any:
    """The transformers config for `kind`: 4 bits always with double quantisation, the head and embeddings left alone.

    skip: names of the modules to leave unquantised, the head among them; by default transformers leaves out the head.

    NF4: Dettmers et al. 2023, arXiv 2305.14314. transformers' own defaults are FP4, fp32 compute and no double quantisation.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skip,
    )


def _is(module: Any, name: str) -> bool:
    # A bitsandbytes module can only exist once bitsandbytes is imported; asking must not import it.
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, getattr(bitsandbytes.nn, name))


def is_4bit(module: Any) -> bool:
    return _is(module, "Linear4bit")


def is_8bit(module: Any) -> bool:
    """Whether the module stores int8 weights (a Linear8bitLt that keeps 16-bit weights does not)."""
    return _is(module, "Linear8bitLt") and not module.state.has_fp16_weights


def is_quantized(module: Any) -> bool:
    return is_4bit(module) or is_8bit(module)


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every quantised linear of the model by its name."""
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


def dequantize(module: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight (out, in) that a quantised linear stands for, as a new tensor in `dtype` (default: its compute dtype).

    Raises RuntimeError where bitsandbytes has repacked the weight for its fused CPU product; `protect` prevents that.
    """
    from bitsandbytes import functional

    if is_4bit(module):
        state = module.weight.quant_state
        if getattr(state, REPACKED, False):
            raise RuntimeError(
                "this 4-bit weight was repacked in place by an evaluation forward of bitsandbytes and cannot be read back exactly; "
                "call peftkit.attach (or peftkit.quant.protect) before the first evaluation, or load the model again"
            )
        weight = functional.dequantize_4bit(module.weight.data, state)
        return weight.to(dtype or module.compute_dtype or weight.dtype)
    codes, scale = module.state.CB, module.state.SCB
    if codes is None:  # before the first forward the codes are still on the parameter
        codes, scale = module.weight.data, module.weight.SCB
    weight = codes.to(torch.float32).mul_(scale.to(torch.float32).unsqueeze(1) / 127)
    return weight.to(dtype or torch.float16)


def protect(model: nn.Module) -> int:
    """Keeps every 4-bit weight of the model readable: evaluation must not repack it. Returns how many are 4-bit.

    On CPUs with AVX512-BF16, bitsandbytes rewrites a 4-bit weight in place at the first forward in eval mode without
    grad. Dequantising then returns garbage, merging corrupts the weights, and training on loses nearly all gradient of
    the lower layers. Each layer carries the flag that allows this; we clear it. A weight that was repacked before we
    saw the model is put back in order, with a warning, because its block scales were rounded to bf16 on the way.
    """
    found: list[Any] = [module for module in model.modules() if is_4bit(module)]
    repacked = 0
    for module in found:
        module.support_avx512bf16_for_cpu = False
        if getattr(module.weight.quant_state, REPACKED, False):
            _unpack(module)
            repacked += 1
    if repacked:
        warnings.warn(
            f"{repacked} of {len(found)} 4-bit weights had been repacked by an evaluation forward before this call; they are in order "
            "again, but their block scales stay rounded to bf16. For the exact weights load the model again and attach before evaluating",
            stacklevel=3,
        )
    return len(found)


def repacks_on_cpu() -> bool:
    """Whether bitsandbytes would rewrite 4-bit weights in evaluation on this CPU, which `protect` prevents."""
    from bitsandbytes import functional

    return bool(functional.has_avx512bf16())


def _unpack(module: Any) -> None:
    """Undoes bitsandbytes' CPU packing: rows in blocks of 32, nibbles of row i and i + 16 pairs in one byte."""
    state, packed = module.weight.quant_state, module.weight.data
    rows, half = packed.shape
    both = packed.reshape(-1, 32)
    nibbles = torch.cat((both & 0xF, both >> 4), dim=1)  # (rows * in / 64, 64)
    codes = nibbles.reshape(rows // 32, half, 32, 2).transpose(1, 2).reshape(-1, 2)  # pairs of neighbours in a row
    storage = (codes[:, 0] << 4 | codes[:, 1]).reshape(state.original_qshape)
    original = getattr(state, "original_storage_type", None)
    module.weight.data = storage if original is None else storage.view(original)
    state.absmax = state.absmax.T.reshape(-1).float()
    state.nested, state.dtype = False, state.original_dtype
    setattr(state, REPACKED, False)


def misread_on_cpu(module: nn.Module) -> bool:
    """Whether bitsandbytes' CPU kernels would read this linear back wrongly once it is in 4 bits.

    Quantising cuts the flat weight into blocks of 64, but the CPU kernels begin a new block in every row: where a row is
    no multiple of 64 long, the scales shift and the weight is off by a quarter instead of a tenth, without a message.
    """
    return isinstance(module, nn.Linear) and module.in_features % BLOCK != 0


# ------------------------------------------------------------------------------------------- stacks of weights (experts)


class Packed(NamedTuple):
    """A stack of weights in 4 bits with double quantisation, all bytes: no cast of a model to another dtype touches them."""

    codes: torch.Tensor
    """(stack, weights / 2), two weights to a byte."""
    scales: torch.Tensor
    """(stack, weights / 64), the 8-bit scale of every block."""
    scales_of_scales: torch.Tensor
    """(stack, 4 bytes for each 256 blocks and 4 more), fp32: the scales' own scales, and the mean taken off them."""


def pack(stack: torch.Tensor, kind: str) -> Packed:
    """stack (n, ...) in 4 bits ("nf4" or "fp4"), every entry by itself.

    The entries are flattened first and padded to whole blocks: no row begins within a block, which is where bitsandbytes' CPU
    kernels misread.
    """
    from bitsandbytes import functional

    packed = []
    for entry in stack:
        blocks = F.pad(entry.detach().reshape(-1), (0, -entry.numel() % BLOCK)).view(-1, BLOCK)
        codes, state = functional.quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=True, quant_type=kind)
        outer = torch.cat([state.state2.absmax, state.offset.reshape(1)]).float()
        packed.append((codes.reshape(-1), state.absmax, outer.view(torch.uint8)))
    return Packed(*(torch.stack(tensors) for tensors in zip(*packed, strict=True)))


def unpack(packed: Packed, entry: int, kind: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """One entry of a packed stack, as a new tensor of this shape and dtype."""
    from bitsandbytes import functional

    outer = packed.scales_of_scales[entry].view(torch.float32)
    scales = functional.dequantize_blockwise(packed.scales[entry], absmax=outer[:-1], code=_scale_codes(outer.device), blocksize=SCALE_BLOCK)
    blocks = torch.Size((scales.numel(), BLOCK))
    state = functional.QuantState(absmax=scales + outer[-1], shape=blocks, blocksize=BLOCK, quant_type=kind, dtype=dtype)
    return functional.dequantize_4bit(packed.codes[entry].view(-1, 1), state).reshape(-1)[: shape.numel()].view(shape)


@functools.cache
def _scale_codes(device: torch.device) -> torch.Tensor:
    """The 256 values that an 8-bit scale can have."""
    from bitsandbytes import functional

    return functional.create_dynamic_map().to(device)


def adamw_8bit(groups: list[dict], **options: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit states; tensors of fewer than 4,096 values keep theirs in 32 bits."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **options)


def paged_adamw_8bit(groups: list[dict], **options: Any) -> torch.optim.Optimizer:
    """bitsandbytes' paged 8-bit AdamW (GPU only): optimizer states that move to host memory when the GPU is short of it."""
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(groups, **options)


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """Has the states of a paged optimizer paged again: reading a checkpoint leaves plain tensors, which stay on the GPU whether or not it is full."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if (read := state.get(name)) is not None and not getattr(read, "is_paged", False):
                state[name] = optimizer.get_state_buffer(parameter, dtype=read.dtype)  # type: ignore[attr-defined]
                state[name].copy_(read)
