"""The fused forward and backward of the adapter layers."""

from peftkit.kernels.dora import dora_norm, gain_of, norm_memory, scale_columns
from peftkit.kernels.lowrank import composed, fingerprint, linear, shared_down

__all__ = ["composed", "dora_norm", "fingerprint", "gain_of", "linear", "norm_memory", "scale_columns", "shared_down"]
