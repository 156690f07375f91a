"""peft is the oracle: outputs, all gradients and merged weights equal, and the files are the same, both ways."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import clone, quantized_llama, tiny_gpt2, tiny_llama, wake
from peft import LoraConfig, get_peft_model

import peftkit as pk
from peftkit.layers import adapter_layers, plain_linear
from peftkit.quant import dequantize, is_quantized

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def pair(model, dora: bool, targets, rslora: bool = False, conv1d: bool = False):
    """The same model under peftkit and under peft, with the same adapter weights, away from their start."""
    theirs = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=dora, use_rslora=rslora, fan_in_fan_out=conv1d),
        autocast_adapter_dtype=False,
    )
    ours = model
    pk.attach(ours, (pk.DoRA if dora else pk.LoRA)(r=4, alpha=12, target_modules=targets, rslora=rslora))
    wake(ours)
    reference = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, layer in adapter_layers(ours).items():
            for _, local, _, parameter, *_ in layer.role_parameters():
                reference[f"base_model.model.{name}.{local}"].copy_(parameter)
    return ours, theirs


def in_fp64(model):
    """A copy in fp64, 4-bit weights replaced by what they stand for."""
    exact = clone(model)
    for layer in adapter_layers(exact).values():
        if is_quantized(layer.base_layer):
            layer.base_layer = plain_linear(layer.base_layer, dequantize(layer.base_layer, torch.float32))
    return exact.double()


def step(model, ids: torch.Tensor) -> torch.Tensor:
    """Backward of a scalar that weighs every logit; returns the logits."""
    logits = model(input_ids=ids).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(logits.dtype)
    (logits * weights).sum().backward()
    return logits.detach()


def assert_equal(ours, theirs, ids: torch.Tensor, tolerance: float) -> None:
    """Equal to `tolerance`. Where two roundings drift further apart, ours must be of the size of peft's own against fp64."""
    ours.train(), theirs.train()
    exact = None if ours.dtype == torch.float64 else in_fp64(ours)
    assert relative(step(ours, ids), step(theirs, ids)) <= tolerance
    if exact is not None:
        step(exact, ids)
    reference = dict(theirs.named_parameters())
    compared = 0
    for name, layer in adapter_layers(ours).items():
        for role, local, _, parameter, *_ in layer.role_parameters():
            theirs_grad = reference[f"base_model.model.{name}.{local}"].grad
            near = relative(parameter.grad, theirs_grad) <= tolerance
            if not near and exact is not None:
                truth = exact.get_parameter(f"{name}.{local}").grad
                near = relative(parameter.grad, truth) <= max(2 * tolerance, 3 * relative(theirs_grad, truth))
            assert near, (name, role)
            compared += 1
    assert compared > 0
    merged_theirs = theirs.merge_and_unload()
    names = list(adapter_layers(ours))
    pk.merge(ours)
    for name in names:
        mine, other = ours.get_submodule(name).weight, merged_theirs.get_submodule(name).weight
        if mine.shape == other.shape and other.dtype == mine.dtype:
            assert relative(mine, other) <= tolerance, name
    ours.eval(), merged_theirs.eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_llama_equals_peft(dora, rslora, dtype, tolerance, ids):
    ours, theirs = pair(tiny_llama().to(dtype), dora, TARGETS, rslora)
    assert_equal(ours, theirs, ids, tolerance)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_conv1d_equals_peft(dora, dtype, tolerance, ids):
    ours, theirs = pair(tiny_gpt2().to(dtype), dora, ["c_attn", "c_proj", "c_fc"], conv1d=True)
    assert_equal(ours, theirs, ids, tolerance)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear")  # peft's merge requantises; its rounding is not compared
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dora", [False, True])
def test_four_bit_equals_peft(dora, kind, saved_llama, ids):
    model = quantized_llama(saved_llama, kind)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested, "double quantisation is on"
    ours, theirs = pair(model, dora, TARGETS)
    assert_equal(ours, theirs, ids, 1e-5)
