"""Attention in training on a CPU: within documents only, through transformers' own interface for attention.

transformers tells attention what a token may see by a mask, for padding and for packed documents alike. Where the mask says
no more than that a token sees what came before it in its document, as is read from the mask itself, the products it hides are
not computed at all. Everything else, and all that runs under `no_grad`, goes to transformers' `sdpa` as before, to the bit.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftkit.kernels.attention import Documents, attend

NAME = "peftkit_documents"
WHOLE_ROWS = 512
"""Up to so many tokens, a row without a mask is faster here than in the fused kernel, which skips nothing so small."""

_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # mask -> (its version, its documents): all layers are given the same one


def attend_within_documents(model: PreTrainedModel) -> bool:
    """Has the model attend so in training, where it is on a CPU and all of it would use `sdpa`; returns whether it does.

    Models whose code asks for that name are left alone: DeepSeek V3.2 makes a mask of what its indexer chose only under a name that it knows.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if model.device.type != "cpu" or any(part.config._attn_implementation != "sdpa" or not part.is_backend_compatible() or _asks(part) for part in parts):
        return False
    model.set_attn_implementation(NAME)
    return True


def _asks(model: PreTrainedModel) -> bool:
    """Whether the code of a model compares the name of its attention with sdpa's."""
    try:
        code = inspect.getsource(sys.modules[type(model).__module__])
    except OSError:  # made where there is no file, as in a notebook
        return True
    return re.search(r"""_attn_implementation\s*(==|!=|in|not in)[^\n]*["']sdpa["']""", code) is not None


def document_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """(y (rows, tokens, heads, e), None), as transformers asks of attention, of query (rows, heads, tokens, d), key and value (rows, groups, ...)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    documents = _documents(query, attention_mask, options.get("sliding_window")) if causal and _serves(query, key, value, dropout, options) else None
    if documents is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )  # fmt: skip
        return found
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in (query, key, value))
    return attend(query, key, value, documents, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _serves(query: Tensor, key: Tensor, value: Tensor, dropout: float, options: dict[str, Any]) -> bool:
    special = any(options.get(name) is not None for name in ("softcap", "position_bias", "cache")) or bool(options.get("output_attentions"))
    return (
        torch.is_grad_enabled() and query.device.type == "cpu" and not dropout and not special
        and query.shape[0] == key.shape[0] and 0 < query.shape[2] == key.shape[2]
        and query.dtype == key.dtype == value.dtype and query.dtype in (torch.float32, torch.bfloat16, torch.float64)
        and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    )  # fmt: skip


def _documents(query: Tensor, mask: Tensor | None, window: int | None) -> Documents | None:
    """The documents of every row of causal attention, None where the mask means something else."""
    rows, _, tokens, _ = query.shape
    if mask is None:
        if tokens > WHOLE_ROWS:
            return None
    elif mask.dtype != torch.bool or mask.shape != (rows, 1, tokens, tokens):
        return None
    if isinstance(query, FakeTensor):  # without data, so only the memory is asked for: every document takes that of the one before
        return None if window and window < tokens else [[(0, min(tokens, WHOLE_ROWS))], *[[]] * (rows - 1)]
    if mask is None:
        return [[(0, tokens)]] * rows
    version = 0 if mask.is_inference() else mask._version
    known = _read.get(mask)
    if known is None or known[0] != version:
        known = _read[mask] = (version, causal_documents(mask))
    found: Documents | None = known[1]
    return found


def causal_documents(mask: Tensor) -> Documents | None:
    """The documents of a mask (rows, 1, tokens, tokens) by which a token sees itself and what came before it in its document, and no more.

    A token that nobody sees, itself included, is padding, whatever it sees. None where the mask says anything else, such as
    a sliding window that a document outgrows, or attention to what follows.
    """
    found = []
    place = torch.arange(mask.shape[-1])
    for sees in mask[:, 0]:  # (queries, keys)
        first = sees.view(torch.uint8).argmax(1)
        padding = ~sees.any(0)
        expected = (place >= first[:, None]) & (place <= place[:, None])
        begins = (first == place) & ~padding
        goes_on = torch.zeros_like(begins)
        goes_on[1:] = (first[1:] == first[:-1]) & ~padding[:-1]
        if not bool((padding | ((begins | goes_on) & (expected == sees).all(1))).all()):
            return None
        starts = begins.nonzero()[:, 0]
        bounds = torch.cat([(begins | padding).nonzero()[:, 0], place.new_tensor([len(place)])])
        ends = bounds[torch.searchsorted(bounds, starts, right=True)]
        found.append(list(zip(starts.tolist(), ends.tolist(), strict=True)))
    return found
