"""The fused forward and backward of the adapter layers."""

from peftkit.kernels.lowrank import dora_norm, lowrank_linear

__all__ = ["dora_norm", "lowrank_linear"]
