"""torch.compile for the blocks of a model: one graph serves all blocks that are alike, so that it is compiled once and not once a layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_blocks(model: nn.Module, backend: Any = "inductor") -> int:
    """Has every block of a transformers model run compiled, adapters included, and returns how many; names and parameters stay.

    Blocks are what transformers can checkpoint, and lengths are dynamic, so that rows of other lengths need no other graph. The work is done in the
    first steps. `backend` is torch.compile's. Raises ValueError for a model without such blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks that transformers knows as such")
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return len(blocks)


def uncompiled() -> AbstractContextManager[Any]:
    """Runs what is compiled as it was written: for evaluation, which would need graphs of its own for scoring and for every kind of cache."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
