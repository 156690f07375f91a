"""The kinds of adapter layers: which one stands for which module. A new kind is one file and one line here."""

from __future__ import annotations

from torch import nn

from peftkit.layers.base import AdapterLayer
from peftkit.layers.conv import LoRAConv
from peftkit.layers.embedding import LoRAEmbedding
from peftkit.layers.experts import LoRAExperts
from peftkit.layers.linear import LoRALinear

LAYERS: list[type[AdapterLayer]] = [LoRALinear, LoRAExperts, LoRAEmbedding, LoRAConv]


def layer_class(module: nn.Module) -> type[AdapterLayer] | None:
    """The kind of adapter layer that can stand for this frozen module, None where there is none."""
    return next((kind for kind in LAYERS if kind.stands_for(module)), None)
