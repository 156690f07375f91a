"""What an adapter was trained on, beside its base's name: how the base was stored, a hash of its weights, the chat template.

The few values that `adapter_file.identity` takes from the embedding tell one model from another, in any precision. They are the same after a
finetuning that left the embedding alone, such as a merged LoRA; the hash here is not.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from peftkit.layers import adapter_layers, input_embedding

SAMPLES = 128  # values of each weight that go into the hash


def stored_as(model: nn.Module) -> str | None:
    """How the base's linears are stored: nf4, fp4, int8, another library's name for it, or None where they are not quantised."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    told = config if isinstance(config, dict) else config.to_dict()
    if told.get("load_in_4bit"):
        return str(told.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if told.get("load_in_8bit") else str(told.get("quant_method", "quantised"))


def base_record(model: nn.Module) -> dict[str, Any]:
    """For the card: {"quantization", "dtype", "device", "hash"}; the hash is None where weights are not in memory."""
    weights = frozen_weights(model)
    dtype = next((weight.dtype for weight in weights.values() if weight.is_floating_point()), None)
    device = next((weight.device.type for weight in weights.values()), "cpu")
    return {"quantization": stored_as(model), "dtype": str(dtype).removeprefix("torch."), "device": device, "hash": weight_hash(model)}


def frozen_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the model's body by name, adapters or not, without the input embedding and the head, which may be resized or new in each task."""
    body: Any = getattr(model, "base_model", model)
    own = {id(t.parameter) for layer in adapter_layers(model).values() for adapter in layer.specs for t in layer.role_parameters(adapter)}
    embedding = input_embedding(model)
    own |= {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    return {name.replace(".base_layer", ""): parameter for name, parameter in body.named_parameters() if id(parameter) not in own}


@torch.no_grad()
def weight_hash(model: nn.Module) -> str | None:
    """SHA-256 over values spread over every frozen weight of the body, as they are stored; None where some are on no device."""
    found = hashlib.sha256()
    for name, weight in sorted(frozen_weights(model).items()):
        if weight.is_meta:
            return None
        places = torch.linspace(0, weight.numel() - 1, min(SAMPLES, weight.numel()), dtype=torch.float64).long()
        values = weight.detach().reshape(-1)[places.to(weight.device)].cpu().contiguous()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def template_hash(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest() if template else None


def other_weights(model: nn.Module, card: dict[str, Any]) -> bool:
    """Whether the body of this model is stored as the card's base was, without quantisation, and has other weights.

    Loading a checkpoint in one dtype gives the same bits everywhere; quantising does not, from one device and version to another.
    """
    told = card.get("stored")
    if not isinstance(told, dict) or told.get("hash") is None or told.get("quantization") is not None:
        return False
    here = base_record(model)
    return here["hash"] is not None and (here["quantization"], here["dtype"]) == (None, told.get("dtype")) and here["hash"] != told["hash"]


def mismatches(model: nn.Module, card: dict[str, Any], tokenizer: Any = None) -> list[str]:
    """What is not as it was in training and may change what the adapter computes, each with what to do."""
    found = []
    told = card.get("stored")
    if isinstance(told, dict):
        before, here = told.get("quantization"), stored_as(model)
        if before != here:
            words = [f"in {kind}" if kind else "not quantised" for kind in (before, here)]
            remedy = f"quantize={before!r} (--quantize {before})" if before else "no quantisation (--quantize none)"
            found.append(f"its base was {words[0]} in training and is {words[1]} here, which is another model than the trained one; load it with {remedy}")
        elif before is not None and told.get("device") == base_record(model)["device"] and told.get("hash") not in (None, weight_hash(model)):
            found.append(
                f"the {before} weights of the base are not those of the training; if bitsandbytes and the device are the same as then, "
                "the base was changed: load the revision that the adapter's card names"
            )
    if tokenizer is not None and "template" in card and card["template"] != template_hash(tokenizer):
        found.append(
            "the tokenizer's chat template is not the one of the training, so prompts look other than those it learned from; "
            "load the tokenizer of the base and revision that its card names"
        )
    return found
