"""The fused forward and backward of the adapter layers."""

from peftkit.kernels.dora import Gain, dora_gain, dora_norm, gain_of, norm_memory
from peftkit.kernels.lowrank import composed, fingerprint, linear, shared_down

__all__ = ["Gain", "composed", "dora_gain", "dora_norm", "fingerprint", "gain_of", "linear", "norm_memory", "shared_down"]
