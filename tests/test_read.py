"""Models that read the weight of an adapter layer, or write into its output, instead of just calling it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt2, wake
from torch import Tensor, nn

import peftkit as pk
from peftkit.layers import LoRALinear, Spec
from peftkit.layers.read import AdaptedWeight

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))


def layer(dora: bool, bias: bool = True) -> LoRALinear:
    """16 -> 24, away from its start."""
    torch.manual_seed(0)
    made = LoRALinear(nn.Linear(16, 24, bias=bias).requires_grad_(False))
    made.add("default", Spec(4, 2.0, dora=dora))
    wake(made)
    return made


def gradients(made: nn.Module, y: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dora", [False, True])
def test_arithmetic_with_the_weight_is_that_of_the_layer(dora):
    made = layer(dora)
    called, read = made(X), F.linear(X, made.weight, made.bias)
    torch.testing.assert_close(read, called, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(made, read), gradients(made, called), rtol=1e-4, atol=1e-5)
    assert len(gradients(made, made(X))) == (3 if dora else 2)
    for other in (made.weight[:, :8], made.weight.T, made.weight.data, torch.cat([made.weight, made.weight]), made.weight.detach() * 2):
        assert not torch.equal(other, other.new_zeros(())) and not other.isnan().any()
    torch.testing.assert_close(X[..., :8] @ made.weight[:, :8].T + X[..., 8:] @ made.weight[:, 8:].T + made.bias, called, rtol=1e-5, atol=1e-5)
    assert torch.equal(made.weight.data * 1, made.merged_weight()) and not (made.weight.data * 1).requires_grad


def test_questions_are_answered_by_the_frozen_weight_without_arithmetic(monkeypatch):
    made = layer(dora=False)
    monkeypatch.setattr(LoRALinear, "delta", lambda self: pytest.fail("the update was built for a question"))
    weight, frozen = made.weight, made.base_layer.weight
    assert isinstance(weight, AdaptedWeight)
    assert (weight.shape, weight.dtype, weight.device, weight.ndim, len(weight)) == (frozen.shape, frozen.dtype, frozen.device, 2, 24)
    assert (weight.size(0), weight.numel(), weight.element_size(), weight.data_ptr()) == (24, frozen.numel(), 4, frozen.data_ptr())
    assert weight.is_floating_point() and torch.is_floating_point(weight) and weight.requires_grad and weight.data.dtype == frozen.dtype


@pytest.mark.parametrize("dora", [False, True])
def test_a_compiled_model_may_read_the_weight(dora):
    made = layer(dora)
    compiled = torch.compile(lambda x: F.linear(x.to(made.weight.dtype), made.weight, made.bias), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), made(X), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(made, compiled(X)), gradients(made, made(X)), rtol=1e-4, atol=1e-5)


def test_a_layer_that_adapts_nothing_shows_the_frozen_weight():
    made = layer(dora=False)
    made.enable_adapters(False)
    assert made.weight is made.base_layer.weight
    made.enable_adapters(True)
    made.set_adapter([])
    assert made.weight is made.base_layer.weight


@pytest.mark.parametrize("write", [lambda w: w.zero_(), lambda w: w.data.zero_(), lambda w: w.__setitem__(0, 1.0), lambda w: nn.init.normal_(w)])
def test_writing_to_what_was_read_is_an_error(write):
    made = layer(dora=False)
    before = made.base_layer.weight.clone()
    with pytest.raises(RuntimeError, match="write to that of its base_layer"):
        write(made.weight)
    assert torch.equal(made.base_layer.weight, before)


def test_a_transposed_weight_is_read_as_it_is_stored():
    model = tiny_gpt2()
    pk.attach(model, pk.LoRA(r=4, target_modules=["c_fc"]))
    wake(model)
    made = model.transformer.h[0].mlp.c_fc
    x = torch.randn(2, 64)
    torch.testing.assert_close(torch.addmm(made.bias, x, made.weight), made(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_trained_bias_is_read_as_trained(bias):
    model = nn.ModuleDict({"linear": nn.Linear(16, 24), "norm": nn.LayerNorm(24)})
    base = copy.deepcopy(model)
    pk.attach(model, pk.LoRA(r=4, bias=bias))
    wake(model)
    trained = ("linear", "norm") if bias == "all" else ("linear",)
    for name in trained:
        assert model[name].bias.requires_grad and not torch.allclose(model[name].bias, base[name].bias)
    torch.testing.assert_close(F.linear(X, model.linear.weight, model.linear.bias), model.linear(X), rtol=1e-5, atol=1e-5)
    with pk.adapters_disabled(model):
        assert all(torch.equal(model[name].bias, base[name].bias) for name in trained)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_encoder_layer_does_not_pass_the_adapters_by(training):
    """In evaluation torch's fused path takes the weights out of linear1 and linear2 and never calls them."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True).train(training)
    base = copy.deepcopy(model)
    summary = pk.attach(model, pk.LoRA(r=4))
    assert summary.modules == {"linear1": 1, "linear2": 1} and any("1 nn.MultiheadAttention, such as self_attn" in line for line in summary.left_out)
    wake(model)
    with torch.no_grad():
        adapted = model(X)
        assert not torch.allclose(adapted, base(X), rtol=1e-3)
        torch.testing.assert_close(pk.merge(model)(X), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 16), (15, 16)])
def test_the_model_may_write_into_the_output(dora, bias, shape):
    made, x = layer(dora, bias), X.reshape(shape)
    out_of_place = gradients(made, made(x) + 1)
    y = made(x)
    y += 1
    torch.testing.assert_close(gradients(made, y), out_of_place, rtol=1e-4, atol=1e-5)
    assert len(out_of_place) == (3 if dora else 2)
