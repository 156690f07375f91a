"""Adapter layers: what stands where a frozen module stood, and the tools to find, swap and restore modules."""

from peftkit.layers.base import (
    ADAPTER,
    AdapterLayer,
    Factor,
    RoleParameter,
    Spec,
    Trained,
    adapter_layers,
    by_file_key,
    file_tensors,
    trainable_parameters,
)
from peftkit.layers.beside import Rows, check_once, find_rows, find_whole, notes, save_modules, train_rows
from peftkit.layers.bias import Bias, TrainedBias, other_biases
from peftkit.layers.conv import LoRAConv
from peftkit.layers.embedding import LoRAEmbedding
from peftkit.layers.experts import LoRAExperts, as_target_parameters, from_file_modules, left_out_experts
from peftkit.layers.find import (
    adapt,
    candidates,
    find_targets,
    heads,
    input_embedding,
    inside,
    left_out_linears,
    output_head,
    sharing_embeddings,
    standing,
    swap,
)
from peftkit.layers.frozen import compute_dtype, dense_weight, features, is_linear, plain_linear, row_squares
from peftkit.layers.frozen_experts import Experts4bit, dequantize_experts, is_experts, quantize_experts
from peftkit.layers.kinds import LAYERS, layer_class
from peftkit.layers.linear import LoRALinear, SharedInput, Start, share_inputs
from peftkit.layers.saved import SavedModule, TrainedTokens

__all__ = [
    "ADAPTER",
    "LAYERS",
    "AdapterLayer",
    "Bias",
    "Experts4bit",
    "Factor",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALinear",
    "RoleParameter",
    "Rows",
    "SavedModule",
    "SharedInput",
    "Spec",
    "Start",
    "Trained",
    "TrainedBias",
    "TrainedTokens",
    "adapt",
    "adapter_layers",
    "as_target_parameters",
    "by_file_key",
    "candidates",
    "check_once",
    "compute_dtype",
    "dense_weight",
    "dequantize_experts",
    "features",
    "file_tensors",
    "find_rows",
    "find_targets",
    "find_whole",
    "from_file_modules",
    "heads",
    "input_embedding",
    "inside",
    "is_experts",
    "is_linear",
    "layer_class",
    "left_out_experts",
    "left_out_linears",
    "notes",
    "other_biases",
    "output_head",
    "plain_linear",
    "quantize_experts",
    "row_squares",
    "save_modules",
    "share_inputs",
    "sharing_embeddings",
    "standing",
    "swap",
    "train_rows",
    "trainable_parameters",
]
