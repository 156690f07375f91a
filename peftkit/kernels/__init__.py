"""The fused forward and backward of the adapter layers."""

from peftkit.kernels.lowrank import composed, dora_norm, down, fingerprint, gain_of, scale_columns, up

__all__ = ["composed", "dora_norm", "down", "fingerprint", "gain_of", "scale_columns", "up"]
