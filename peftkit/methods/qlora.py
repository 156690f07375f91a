"""QLoRA: Dettmers et al. 2023, arXiv 2305.14314."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from peftkit import quant
from peftkit.layers import ADAPTER
from peftkit.methods.base import Handle
from peftkit.methods.lora import LoRA


class QLoRA(LoRA):
    """LoRA on a base stored in 4-bit NF4 with double quantisation; paged 8-bit AdamW where there is a GPU."""

    paged_optimizer: ClassVar[bool] = True

    def quantize(self) -> quant.Quantization | None:
        return "nf4"

    def attach(self, model: nn.Module, adapter: str = ADAPTER) -> Handle | None:
        if not any(quant.is_4bit(module) for module in model.modules()):
            raise ValueError("qlora needs a base in 4 bits and this model has no 4-bit layer; load it with quantize='nf4', or use lora on the base as it is")
        return super().attach(model, adapter)
