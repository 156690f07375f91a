"""Merging adapters into their base: a plain Hugging Face model again, checked against the model that was trained."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import quant
from peftkit.layers import LoRAEmbedding, adapter_layers, dense_weight, dequantize_experts, input_embedding, output_head, plain_linear, sharing_embeddings, swap
from peftkit.methods.on_model import attachment, forget


class MergeError(RuntimeError):
    """The merged model does not compute what the adapted one computed."""


@dataclass(frozen=True)
class MergeCheck:
    """How far the merged model's logits are from the adapted model's, on the same tokens."""

    max_difference: float
    """Largest absolute difference of a logit."""
    kl: float
    """Mean KL divergence of the next-token distributions, nats."""
    top1_agreement: float
    """Share of positions with the same most likely token."""

    def __str__(self) -> str:
        return f"merged against adapted: max logit difference {self.max_difference:.3g}, KL {self.kl:.3g} nats, top-1 agreement {self.top1_agreement:.1%}"


@torch.no_grad()
def merge(model: nn.Module, originals: dict[str, Tensor] | None = None) -> nn.Module:
    """Folds the active adapters into the weights, in place: a plain model without peftkit or quantised layers.

    Adapters that are not active are gone with it, which a warning says.

    A quantised base is dequantised in its compute dtype: that is the model that was trained. `originals` (module name ->
    weight (out, in)) merges into these weights instead, e.g. the 16-bit ones; it must name every adapted module.
    """
    record, layers = attachment(model), adapter_layers(model)
    if layers and not any(layer.enabled for layer in layers.values()):
        raise ValueError("the adapters are disabled, so the model computes its base; enable them before merging, or peftkit.detach")
    chosen = {name for layer in layers.values() for name in layer.chosen}
    resting = [name for name, methods in record.by_adapter.items() if name not in chosen and any(method.swaps_layers for method in methods)]
    if resting and not chosen:
        raise ValueError(f"no adapter is active, so there is nothing to merge; choose with peftkit.set_adapter (there are: {', '.join(resting)})")
    missing = sorted(set(layers) - set(originals or layers))
    if missing:
        raise ValueError(f"no original weight for {len(missing)} adapted modules, such as {missing[0]}")
    for name, layer in layers.items():
        if reason := layer.unmergeable():
            raise ValueError(f"{name} cannot be merged: {reason}; nothing was merged")
        if isinstance(layer, LoRAEmbedding) and (others := sharing_embeddings(model, layer.base_layer)):
            raise ValueError(
                f"{name} cannot be merged: {' and '.join(others)} shares its weight, and transformers would make them one again when the merged model is "
                "read; nothing was merged"
            )
    if resting:
        warnings.warn(f"{' and '.join(resting)} were not active: they are not in the merged model, and no longer on it", stacklevel=2)
    # An 8-bit layer names no compute dtype: its weight becomes what the model keeps the rest in.
    kept = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point() and not parameter.requires_grad), None)
    for name, layer in reversed(layers.items()):  # what wraps another layer, after it
        weight: Tensor | None
        if originals is not None:
            weight = originals[name].to(next(layer.parameters()).device)
        else:
            weight = dense_weight(layer.base_layer, kept) if quant.is_8bit(layer.base_layer) else None
        swap(model, name, layer.merged(weight))
    for name, module in quant.quantized_modules(model).items():
        swap(model, name, plain_linear(module, dense_weight(module, kept if quant.is_8bit(module) else None)))
    dequantize_experts(model)
    forget(model)
    _forget_quantization(model)
    _untie(model)
    return model


def _forget_quantization(model: nn.Module) -> None:
    """Takes transformers' marks of a quantised model away, so that it saves and moves like a plain one."""
    config = getattr(model, "config", None)
    marks = ["is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer"]
    if config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
        if len(set(getattr(model, "hf_device_map", {}).values())) < 2:  # over several devices its hooks stay, and who trains it must know
            marks.append("hf_device_map")
    for mark in marks:
        if mark in vars(model):
            delattr(model, mark)


def _untie(model: nn.Module) -> None:
    """Where a head and an embedding were one weight and are two now, says so in the config: `tie_weights` would make them one again."""
    config: Any = getattr(model, "config", None)
    head: Any = output_head(model)
    embedding: Any = input_embedding(model)
    if config is None or head is None or embedding is None or head.weight is embedding.weight:
        return
    for each in (config, config.get_text_config()) if not getattr(config, "is_encoder_decoder", False) else ():  # UMT5 scales its logits by what it says
        if getattr(each, "tie_word_embeddings", False):
            each.tie_word_embeddings = False
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for key, other in list(tied.items()):
        if model.get_parameter(key) is not model.get_parameter(other):
            del tied[key]


def compare_logits(before: Tensor, after: Tensor) -> MergeCheck:
    """The check from logits (rows, tokens, vocabulary) of the adapted and of the merged model."""
    before, after = before.float(), after.float()
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return MergeCheck(
        max_difference=(before - after).abs().max().item(),
        kl=(p.exp() * (p - q)).sum(-1).mean().item(),
        top1_agreement=(before.argmax(-1) == after.argmax(-1)).float().mean().item(),
    )


def logits_on(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The model's logits on tokens (rows, tokens), which an encoder-decoder model reads and writes."""
    config = getattr(model, "config", None)
    written = {"decoder_input_ids": input_ids} if getattr(config, "is_encoder_decoder", False) else {}
    logits: Tensor = model(input_ids=input_ids, **written).logits
    return logits


@torch.no_grad()
def merge_verified(model: nn.Module, input_ids: Tensor, max_kl: float = 1e-2, originals: dict[str, Tensor] | None = None) -> MergeCheck:
    """`merge`, then a comparison of the logits on `input_ids` (rows, tokens) before and after.

    Raises MergeError where the mean KL divergence is above `max_kl` nats. Merging into `originals` makes another model
    than the trained one, so there the check only reports.
    """
    was_training = model.training
    model.eval()
    before = logits_on(model, input_ids)
    merge(model, originals)
    check = compare_logits(before, logits_on(model, input_ids))
    model.train(was_training)
    if originals is None and not check.kl <= max_kl:
        raise MergeError(f"the merged model is not the trained one (bound: KL {max_kl:g}); {check}")
    return check
