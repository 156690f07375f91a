"""The fused forward and backward of the adapter layers."""

from peftkit.kernels.lowrank import composed, dora_norm, fingerprint, gain_of, linear, scale_columns, shared_down

__all__ = ["composed", "dora_norm", "fingerprint", "gain_of", "linear", "scale_columns", "shared_down"]
