"""Adapter layers: what stands where a frozen module stood, and the tools to find, swap and restore modules."""

from peftkit.layers.base import (
    ADAPTER,
    AdapterLayer,
    Factor,
    RoleParameter,
    Spec,
    Trained,
    adapter_layers,
    trainable_parameters,
)
from peftkit.layers.find import find_targets, output_head, swap, unadapted_3d
from peftkit.layers.frozen import compute_dtype, dense_weight, features, is_linear, plain_linear, row_squares
from peftkit.layers.kinds import LAYERS, layer_class
from peftkit.layers.linear import LoRALinear, share_inputs

__all__ = [
    "ADAPTER",
    "LAYERS",
    "AdapterLayer",
    "Factor",
    "LoRALinear",
    "RoleParameter",
    "Spec",
    "Trained",
    "adapter_layers",
    "compute_dtype",
    "dense_weight",
    "features",
    "find_targets",
    "is_linear",
    "layer_class",
    "output_head",
    "plain_linear",
    "row_squares",
    "share_inputs",
    "swap",
    "trainable_parameters",
    "unadapted_3d",
]
