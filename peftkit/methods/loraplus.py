"""LoRA+: Hayou et al. 2024, arXiv 2402.12354."""

from __future__ import annotations

from pydantic import Field

from peftkit.methods.base import Group, Method


class LoRAPlus(Method):
    """A higher learning rate for B, the zero-initialised matrix next to the output; works with any of the LoRA methods.

    Everything else (A, DoRA's magnitude) keeps the base rate, and every group its weight decay. The paper advises a base
    rate about half of plain LoRA's.
    """

    ratio: float = Field(16.0, gt=0)
    """Learning rate of B over that of A; the paper advises 2^4."""

    def param_groups(self, groups: list[Group]) -> list[Group]:
        if not any(group["role"] == "B" for group in groups):
            raise ValueError("loraplus sets the learning rate of B matrices, and this model trains none; add lora, dora or qlora")
        return [group | {"lr": group["lr"] * self.ratio} if group["role"] == "B" else group for group in groups]
