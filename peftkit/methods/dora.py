"""DoRA: Liu et al. 2024, arXiv 2402.09353. On a 4-bit base this is QDoRA."""

from __future__ import annotations

from typing import ClassVar

from peftkit.methods.lora import LoRA


class DoRA(LoRA):
    """LoRA for the direction of every weight row, with its length trained as a magnitude of its own."""

    dora: ClassVar[bool] = True
