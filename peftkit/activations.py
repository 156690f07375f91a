"""Which activations are kept for backward: all, the layers' inputs alone, or attention's output besides."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Checkpointing = bool | Literal["selective"]

ATTENTION = ("scaled_dot_product", "flash_attn", "flash_attention")  # in the names of fused attention's operators, torch's own and flash-attn's


def enable_checkpointing(model: Any, kind: Checkpointing = True) -> None:
    """Has a transformers model compute its activations again in backward (non-reentrant, so that frozen inputs do no harm).

    True keeps a layer's input alone. "selective" keeps fused attention's output too, (rows, tokens, heads x width) a layer: attention is the only part
    whose time grows with the square of the length, so that a little memory saves most of what recomputing costs on long rows.
    """
    if not kind:
        return
    # Renamed in transformers 5.2x; the old name warns there, the new one is missing in 5.17.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    enable(options)


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_attention = any(part in str(operator) for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
