"""The kernels for bf16 on CPUs: each against fp64, when they serve, how they are compiled, and whole models with and without them."""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import peftkit as pk
from peftkit.kernels import cpu_bf16
from peftkit.kernels.dropout import Dropout
from peftkit.memory import count_saved

try:
    cpu_bf16.load()
    WHY = ""
except cpu_bf16.UnavailableError as error:
    WHY = str(error)
needs_kernels = pytest.mark.skipif(bool(WHY), reason=WHY)

BF16 = torch.bfloat16
EPS = 2.0**-8
SHAPES = dict(m=st.integers(1, 200), k=st.integers(1, 9).map(lambda n: 32 * n), r=st.integers(1, 70), seed=st.integers(0, 2**62), threads=st.integers(1, 3))


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed % 2**62)).to(dtype)


def rounded(factor: Tensor) -> Tensor:
    """What the products see of an fp32 factor."""
    return factor.to(BF16).double()


def near(got: Tensor, want: Tensor, size: Tensor, eps: float = EPS) -> None:
    """Equal up to one rounding of the result and the fp32 sum of terms whose absolute values sum to `size`."""
    assert got.shape == want.shape
    bound = eps * want.abs() + 2.0**-18 * size + 1e-30
    assert ((got.double() - want).abs() <= bound).all(), f"off by {((got.double() - want).abs() / bound).max():.1f} times its rounding"


def mask_of(m: int, k: int, p: float, seed: int) -> tuple[Tensor | None, Tensor]:
    """The bits, and what they say about each number: 1 kept, 0 dropped."""
    if not p:
        return None, torch.ones(m, k, dtype=torch.float64)
    kept = cpu_bf16.dropout_mask(m * k, p, seed)
    return kept, torch.tensor([[byte >> i & 1 for i in range(8)] for byte in kept.tolist()], dtype=torch.float64).view(m, k)


# --------------------------------------------------------------------------------------------------------- each kernel


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(**SHAPES, p=st.sampled_from([0.0, 0.3]))
def test_down(m, k, r, seed, threads, p):
    torch.set_num_threads(threads)
    x, a = random(m, k, seed=seed), random(r, k, seed=seed + 1, dtype=torch.float32)
    kept, whether = mask_of(m, k, p, seed)
    dropped = x.double() * whether
    near(cpu_bf16.down(x, a, 0.7, kept), 0.7 * dropped @ rounded(a).T, dropped.abs() @ rounded(a).abs().T)


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(**SHAPES, scaled=st.booleans())
def test_update(m, k, r, seed, threads, scaled):
    torch.set_num_threads(threads)
    y, b = random(m, k, seed=seed), random(k, r, seed=seed + 1, dtype=torch.float32)
    h = random(m, 3 * r, seed=seed + 2)[:, r : 2 * r]  # as of three layers that share a product
    gain = random(k, seed=seed + 3, dtype=torch.float32) if scaled else None
    update = h.double() @ rounded(b).T
    want, size = y.double() + 0.5 * update, y.double().abs() + h.double().abs() @ rounded(b).abs().T
    if gain is not None:
        want, size = want * gain, size * gain.abs()
    near(cpu_bf16.update_(y, h, b, 0.5, gain), want, size)


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(**SHAPES, dora=st.booleans(), need_h=st.booleans(), need_b=st.booleans(), need_m=st.booleans())
def test_output_backward(m, k, r, seed, threads, dora, need_h, need_b, need_m):
    torch.set_num_threads(threads)
    grad, b = random(m, k, seed=seed), random(k, r, seed=seed + 1, dtype=torch.float32)
    h = random(m, 2 * r, seed=seed + 2)[:, :r]
    y, gain, magnitude = random(m, k, seed=seed + 3), random(k, seed=seed + 4, dtype=torch.float32), random(k, seed=seed + 5, dtype=torch.float32)
    magnitude[::3] = 0
    options = dict(magnitude=magnitude, gain=gain, y=y if need_m else None) if dora else {}
    before = grad.clone()
    scaled, grad_h, grad_b, grad_m = cpu_bf16.output_backward(grad, h, b, 0.5, 0.7, need_h=need_h, need_b=need_b, **options)
    assert torch.equal(grad, before), "the gradient is autograd's, not ours to change"
    want = grad.double()
    if dora:
        near(scaled, want * gain, torch.zeros(()))
        want = scaled.double()  # what is rounded goes on
    else:
        assert torch.equal(scaled, grad)
    assert (grad_h is not None, grad_b is not None, grad_m is not None) == (need_h, need_b, dora and need_m)
    if grad_h is not None:
        near(grad_h, 0.7 * want @ rounded(b), want.abs() @ rounded(b).abs())
    if grad_b is not None:
        near(grad_b, 0.5 * want.T @ h.double(), want.abs().T @ h.double().abs(), eps=2.0**-22)
    if grad_m is not None:
        sums, sizes = (grad.double() * y.double()).sum(0), (grad.double() * y.double()).abs().sum(0)
        near(grad_m, torch.where(magnitude == 0, 0, sums / magnitude), torch.where(magnitude == 0, 0, sizes / magnitude.abs()), eps=2.0**-22)


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(**SHAPES, p=st.sampled_from([0.0, 0.3]), need_x=st.booleans(), need_a=st.booleans())
def test_input_backward(m, k, r, seed, threads, p, need_x, need_a):
    torch.set_num_threads(threads)
    x, a, grad_h = random(m, k, seed=seed), random(r, k, seed=seed + 1, dtype=torch.float32), random(m, r, seed=seed + 2)
    kept, whether = mask_of(m, k, p, seed)
    grad_x = random(m, k, seed=seed + 3)
    before = grad_x.clone()
    grad_a = cpu_bf16.input_backward(x, grad_h, a, kept, grad_x if need_x else None, 0.7, need_a=need_a)
    assert (grad_a is not None) == need_a
    if grad_a is not None:
        dropped = x.double() * whether
        near(grad_a, 0.7 * grad_h.double().T @ dropped, grad_h.double().abs().T @ dropped.abs(), eps=2.0**-22)
    if need_x:
        near(grad_x, before.double() + 0.7 * whether * (grad_h.double() @ rounded(a)), before.double().abs() + grad_h.double().abs() @ rounded(a).abs())
        assert torch.equal(grad_x[whether == 0], before[whether == 0]), "what is dropped gets nothing"
    else:
        assert torch.equal(grad_x, before)


@needs_kernels
@settings(max_examples=25, deadline=None)
@given(**{name: SHAPES[name] for name in ("k", "r", "seed", "threads")}, rows=st.integers(1, 9).map(lambda n: 32 * n), scale=st.sampled_from([0.25, 2.0]))
def test_norm(k, r, seed, threads, rows, scale):
    torch.set_num_threads(threads)
    weight, a, b = random(rows, k, seed=seed), random(r, k, seed=seed + 1, dtype=torch.float32) / k, random(rows, r, seed=seed + 2, dtype=torch.float32)
    weight[::4], b[::8] = 0, 0  # rows without a norm of their own, some of them with none at all
    squares, magnitude = weight.double().square().sum(1).float(), random(rows, seed=seed + 3, dtype=torch.float32)
    exact = (weight.double() + scale * b.double() @ a.double()).norm(dim=1)
    found = cpu_bf16.norm(weight, squares, a, b, scale)
    assert ((found - exact).abs() <= 2e-3 * exact + 1e-3).all()
    gain = cpu_bf16.norm(weight, squares, a, b, scale, magnitude)
    torch.testing.assert_close(gain, torch.where(found == 0, 1, magnitude / found), rtol=1e-6, atol=0)
    assert (gain[::8] == 1).all()


@needs_kernels
def test_what_is_no_number_stays_none_and_spreads_no_further_than_in_torch():
    x, a = random(40, 64, seed=0), random(3, 64, seed=1, dtype=torch.float32)
    x[17, 5], x[18, 6] = torch.nan, torch.inf
    found, want = cpu_bf16.down(x, a, 1.0, None), x @ a.to(BF16).T
    assert torch.equal(found.isnan(), want.isnan()) and torch.equal(found.isinf(), want.isinf())
    kept, whether = mask_of(40, 64, 0.5, seed=3)
    dropped = cpu_bf16.down(x, a, 1.0, kept)
    assert bool(dropped[17].isnan().any()) == bool(whether[17, 5]), "a number that is dropped is 0, whatever it was"


# -------------------------------------------------------------------------------------------------------------- dropout


@needs_kernels
@pytest.mark.parametrize("p", [1e-3, 0.05, 0.5, 0.97])
def test_masks_have_their_rate_and_numbers_are_independent(p):
    count = 2**20
    _, kept = mask_of(1024, 1024, p, seed=11)
    dropped = (1 - kept).view(-1)
    assert abs(dropped.sum() - p * count) < 5 * (p * (1 - p) * count) ** 0.5
    for apart in (1, 2, 16, 31, 32, 64, 512, 1024, 32768):
        together = (dropped[apart:] * dropped[:-apart]).sum()
        assert abs(together - p * p * (count - apart)) < 5 * (p * p * count) ** 0.5 + 5, apart
    for places in (dropped.view(-1, 32).sum(0), dropped.view(1024, 1024).sum(0)):
        spread = (places - places.mean()).square().mean() / (places.mean() * (1 - p))
        assert 0.3 < spread < 2.5, "no place is dropped more often than another"


@needs_kernels
def test_a_mask_depends_on_its_seed_alone():
    first = cpu_bf16.dropout_mask(2**17, 0.2, 5)
    torch.set_num_threads(1)
    assert torch.equal(first, cpu_bf16.dropout_mask(2**17, 0.2, 5)), "not on the threads"
    assert torch.equal(first[:4096], cpu_bf16.dropout_mask(2**15, 0.2, 5)), "nor on what follows"
    assert not torch.equal(first, cpu_bf16.dropout_mask(2**17, 0.2, 6))
    assert cpu_bf16.dropout_mask(2**15, 1e-12, 5).eq(255).all()


@needs_kernels
def test_plain_torch_finds_the_zeros_of_a_mask():
    x = random(64, 64, seed=2)
    kept, whether = mask_of(64, 64, 0.2, seed=9)
    dropout = Dropout.of(x, 0.2, 9, kept=kept)
    assert dropout.by_kernel and dropout.to_keep() is kept
    assert torch.equal(dropout.without_mask()(x), x * whether)


# ------------------------------------------------------------------------------------------------------- fingerprints


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 500), seed=st.integers(0, 2**62), data=st.data())
def test_fingerprints_tell_changes_of_one_and_of_two_numbers(count, seed, data):
    x = random(count, seed=seed, dtype=torch.float32)
    before = cpu_bf16.fingerprint(x)
    assert before == cpu_bf16.fingerprint(x.clone())
    bits = x.view(torch.int32)
    place, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 31))
    bits[place] ^= 1 << bit if bit < 31 else -(2**31)
    assert cpu_bf16.fingerprint(x) != before
    other = data.draw(st.integers(0, count - 1))
    if other != place:
        bits[other] ^= -(2**31)
        assert cpu_bf16.fingerprint(x) != before, "signs of two numbers"
    assert cpu_bf16.fingerprint(torch.cat([x, torch.zeros(1)])) != cpu_bf16.fingerprint(x)


# ------------------------------------------------------------------------------------------------------ whole models


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=64, attention_bias=True, **sizes)).to(BF16)


def adapted(method: pk.Method) -> LlamaForCausalLM:
    model = tiny_llama()
    pk.attach(model, method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                parameter.copy_(random(*parameter.shape, seed=len(name), dtype=torch.float32) * 0.05)
    return model.train()


def trained_once(model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(4)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}


IDS = torch.randint(128, (3, 24), generator=torch.Generator().manual_seed(7))
METHODS = {"lora": pk.LoRA, "dora": pk.DoRA}


@needs_kernels
@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_trains_as_in_plain_torch_and_nearer_to_fp32(method, bias, monkeypatch):
    made = METHODS[method](r=5, alpha=10, bias=bias)
    calls = []
    kernel = cpu_bf16.output_backward
    monkeypatch.setattr(cpu_bf16, "output_backward", lambda *args, **options: calls.append(1) or kernel(*args, **options))
    loss, ours = trained_once(adapted(made), IDS)
    assert len(calls) == 14, "every linear of both layers"
    monkeypatch.setattr(cpu_bf16, "ENABLED", False)
    plain_loss, plain = trained_once(adapted(made), IDS)
    assert len(calls) == 14
    exact_loss, exact = trained_once(adapted(made).float(), IDS)
    assert abs(loss - exact_loss) < 0.01 and abs(plain_loss - exact_loss) < 0.01
    assert ours.keys() == plain.keys() == exact.keys()

    def off(found: dict[str, Tensor]) -> float:
        return sum(((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact) / len(exact)

    assert off(ours) < 1.1 * off(plain) < 0.05


@needs_kernels
@pytest.mark.parametrize("method", METHODS)
def test_dropout_drops_the_same_numbers_in_forward_and_backward(method, monkeypatch):
    """The kernels against the composed formula in fp64 under the very masks that they drew."""
    drawn: list[Tensor] = []
    draw = cpu_bf16.dropout_mask
    monkeypatch.setattr(cpu_bf16, "dropout_mask", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    layer_of = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 96, bias=False)}).to(BF16)
    pk.attach(layer_of, METHODS[method](r=4, alpha=8, dropout=0.4))
    layer = layer_of["up"].train()
    layer.b().data.copy_(random(96, 4, seed=1, dtype=torch.float32) * 0.3)
    x = random(2, 40, 64, seed=2).requires_grad_()
    y = layer(x)
    grad = random(*y.shape, seed=3)
    y.backward(grad)
    (mask,) = drawn
    places = cpu_bf16.zeros_of(mask)
    assert 0.3 < len(places) / x.numel() < 0.5

    wide = [tensor.detach().double().requires_grad_() for tensor in (x, layer.a(), layer.b())]
    weight = layer.base_layer.weight.double()
    dropped = wide[0].view(-1).index_fill(0, places, 0).view(x.shape) / 0.6
    exact = wide[0] @ weight.T + 2 * (dropped @ wide[1].T) @ wide[2].T
    if method == "dora":
        exact = exact * (layer.magnitude().double() / (weight + 2 * wide[2] @ wide[1]).norm(dim=1).detach())
    exact.backward(grad.double())
    for got, want in zip((y, x.grad, layer.a().grad, layer.b().grad), (exact, *(tensor.grad for tensor in wide)), strict=True):
        assert (got.double() - want).norm() < 0.01 * want.norm()


@needs_kernels
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # the one name that all 5.x have
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(method, reentrant):
    made = METHODS[method](r=4, dropout=0.2)
    loss, plain = trained_once(adapted(made), IDS)
    model = adapted(made)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, found = trained_once(model, IDS)
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@needs_kernels
@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_for_backward(method):
    layers = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 96, bias=False)}).to(BF16)
    pk.attach(layers, METHODS[method](r=4, dropout=0.2))
    with count_saved(layers) as kept:
        layers["up"].train()(random(1000, 64, seed=0).requires_grad_())
    x, h, mask, y = 1000 * 64 * 2, 1000 * 4 * 2, 1000 * 64 // 8, 1000 * 96 * 2
    assert sum(kept.values()) == x + h + mask + (y if method == "dora" else 0)


@needs_kernels
@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_no_bit(method):
    """The layers compute in the dtype of the base's product either way."""
    found = []
    for enabled in (False, True):
        model = adapted(METHODS[method](r=4))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer = model.model.layers[0].mlp.up_proj
            x = random(40, 64, seed=0).requires_grad_()
            y = layer(x)
            y.sum().backward()
        found.append([y.detach(), x.grad, layer.a().grad, layer.b().grad])
    assert all(map(torch.equal, *found))


@needs_kernels
def test_a_step_gives_the_same_bits_every_time():
    first, second = (trained_once(adapted(pk.DoRA(r=4, dropout=0.1)), IDS)[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_kernels
def test_evaluation_of_lora_keeps_the_bits_of_plain_torch(monkeypatch):
    model = adapted(pk.LoRA(r=4)).eval()
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
        monkeypatch.setattr(cpu_bf16, "ENABLED", False)
        assert torch.equal(ours, model(input_ids=IDS).logits)


@needs_kernels
def test_a_mask_that_forward_kept_serves_a_backward_in_plain_torch(monkeypatch):
    made = pk.LoRA(r=4, dropout=0.3)
    _, ours = trained_once(adapted(made), IDS)
    model = adapted(made)
    torch.manual_seed(4)
    loss = model(input_ids=IDS, labels=IDS).loss
    monkeypatch.setattr(cpu_bf16, "ENABLED", False)  # as within a mode that watches torch's calls
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - ours[name]).norm() < 0.02 * ours[name].norm()


# ------------------------------------------------------------------------------------------------------ when they serve


@needs_kernels
def test_when_the_kernels_serve(monkeypatch):
    x, a, b, h = random(64, 64, seed=0), torch.zeros(4, 64), torch.zeros(64, 4), torch.zeros(64, 4, dtype=BF16)
    assert cpu_bf16.serves(x, a=[a, a]) and cpu_bf16.serves(x, b=b, h=h, magnitude=torch.zeros(64))
    for other in (x.float(), x.half(), x[:8], x[:, :48], torch.nn.Parameter(x, requires_grad=False), x.to("meta")):
        assert not cpu_bf16.serves(other)
    for factor in (a.to(BF16), a.double(), a.to("meta"), torch.zeros(4, 32)):
        assert not cpu_bf16.serves(x, a=[a, factor])
    for factor in (b.to(BF16), b.to("meta"), torch.zeros(32, 4)):
        assert not cpu_bf16.serves(x, b=factor)
    for product in (h.float(), h[:8], h[:, :2], h.to("meta")):
        assert not cpu_bf16.serves(x, b=b, h=product)
    assert not cpu_bf16.serves(x, b=b, h=h, magnitude=torch.zeros(64, dtype=BF16))
    monkeypatch.setattr(cpu_bf16, "ENABLED", False)
    assert not cpu_bf16.serves(x, a=[a])


@needs_kernels
def test_what_does_not_fit_reaches_no_kernel():
    """C would read and write past the end of what is smaller than it was told."""
    x, a, b, h = random(64, 64, seed=0), torch.zeros(4, 64), torch.zeros(64, 4), torch.zeros(64, 4, dtype=BF16)
    for wrong in (
        lambda: cpu_bf16.down(x, a[:, :32], 1.0, None),
        lambda: cpu_bf16.down(x, a.to(BF16), 1.0, None),
        lambda: cpu_bf16.down(x, a, 1.0, torch.zeros(8, dtype=torch.uint8)),
        lambda: cpu_bf16.update_(x, h, b[:32], 1.0),
        lambda: cpu_bf16.update_(x, h[:32], b, 1.0),
        lambda: cpu_bf16.update_(x.T.contiguous().T, h, b, 1.0),
        lambda: cpu_bf16.output_backward(x, h, b.to("meta"), 1.0, 1.0, need_h=True, need_b=True),
        lambda: cpu_bf16.input_backward(x, h, a, None, x[:32], 1.0, need_a=True),
        lambda: cpu_bf16.norm(x, torch.zeros(64), a, b.to(BF16), 1.0),
    ):
        with pytest.raises(TypeError, match="was given"):
            wrong()


@needs_kernels
@pytest.mark.parametrize("narrow", ["a", "b", "magnitude"])
def test_one_master_in_bf16_computes_as_in_plain_torch(narrow, monkeypatch):
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(cpu_bf16, "ENABLED", enabled)
        layers = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 96)}).to(BF16)
        layers["up"].weight.data.copy_(random(96, 64, seed=5)), layers["up"].bias.data.zero_()
        pk.attach(layers, pk.DoRA(r=4))
        layer = layers["up"].train()
        layer.a().data.copy_(random(4, 64, seed=6)), layer.b().data.copy_(random(96, 4, seed=7))
        parameter = getattr(layer, narrow)()
        parameter.data = parameter.data.to(BF16)
        x = random(40, 64, seed=8).requires_grad_()
        y = layer(x)
        y.backward(random(40, 96, seed=9))
        found.append([y, x.grad, *(tensor.grad for tensor in (layer.a(), layer.b(), layer.magnitude()))])
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype and (ours - plain).norm() < 0.02 * plain.norm()


@needs_kernels
def test_factors_that_do_not_fit_raise_as_in_torch():
    layers = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 96, dtype=BF16)})
    pk.attach(layers, pk.LoRA(r=4))
    layer = layers["up"].train()
    with pytest.raises(RuntimeError, match="shapes"):
        layer(random(40, 128, seed=0))
    layer.lora_A["default"].weight.data = torch.zeros(6, 64)
    with pytest.raises(RuntimeError):
        layer(random(40, 64, seed=0))


@needs_kernels
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", [BF16, torch.float32])
def test_torch_func_differentiates_the_layers(method, base):
    layers = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 64, dtype=base)})
    pk.attach(layers, METHODS[method](r=4))
    layer = layers["up"].train()
    layer.b().data.normal_(0, 0.1)
    named = {name: parameter.detach() for name, parameter in layer.named_parameters() if parameter.requires_grad}
    x = random(40, 64, seed=0, dtype=base)

    def loss(trained: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", BF16):
            return torch.func.functional_call(layer, trained, x).float().square().mean()

    found = torch.func.grad(loss)(named)
    loss(dict(layer.named_parameters())).backward()
    for name, gradient in found.items():
        want = layer.get_parameter(name).grad
        assert (gradient - want).norm() < 0.03 * want.norm(), name


@needs_kernels
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
@pytest.mark.parametrize("method", METHODS)
def test_torch_compile_takes_the_whole_graph_under_autocast(method):
    layers = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 64)})
    pk.attach(layers, METHODS[method](r=4, dropout=0.1))
    layer = layers["up"].train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", BF16):
        compiled(random(40, 64, seed=0, dtype=torch.float32)).sum().backward()
    assert layer.b().grad.any()


@needs_kernels
@pytest.mark.parametrize("change", ["watched", "threads"])
def test_a_recomputation_drops_the_same_numbers_whatever_has_changed(change, monkeypatch):
    """A reentrant checkpoint repeats forward within backward, where somebody may watch by then."""
    from torch.utils.checkpoint import checkpoint
    from torch.utils.flop_counter import FlopCounterMode

    gradients = []
    for changed in (False, True):
        layers = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 64, bias=False)})
        layers["up"].weight.data.copy_(random(64, 64, seed=1))
        layers.to(BF16)
        pk.attach(layers, pk.LoRA(r=4, dropout=0.4))
        layer = layers["up"].train()
        layer.a().data.copy_(random(4, 64, seed=2)), layer.b().data.copy_(random(64, 4, seed=3))
        torch.manual_seed(0)
        y = checkpoint(layer, random(40, 64, seed=4).requires_grad_(), use_reentrant=True)
        if not changed:
            y.sum().backward()
        elif change == "threads":
            torch.set_num_threads(torch.get_num_threads() + 1)
            y.sum().backward()
        else:
            with FlopCounterMode(display=False):
                y.sum().backward()
        gradients.append([layer.a().grad, layer.b().grad])
    for plain, other in zip(*gradients, strict=True):
        assert (plain - other).norm() < 0.02 * plain.norm()


@needs_kernels
def test_whoever_counts_operations_sees_those_of_the_adapters():
    from torch.utils.flop_counter import FlopCounterMode

    layers = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 32, dtype=BF16)})
    pk.attach(layers, pk.LoRA(r=4))
    x = random(40, 64, seed=0).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        layers["up"].train()(x * 1).sum().backward()
    down, up, base = (2 * 40 * a * b for a, b in ((64, 4), (4, 32), (64, 32)))
    assert counter.get_total_flops() == 2 * base + 2 * down + 2 * up, "all but the two that are added in place, which torch does not count"


@needs_kernels
def test_fake_tensors_go_through_plain_torch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = adapted(pk.LoRA(r=4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(input_ids=torch.zeros(2, 32, dtype=torch.long)).logits.shape == (2, 32, 128)


@needs_kernels
@pytest.mark.filterwarnings("ignore")  # a trace is of one shape, as torch.jit warns
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_trace_computes_what_the_layer_does(method, training):
    layers = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 64, dtype=BF16)})
    pk.attach(layers, METHODS[method](r=4))
    layer = layers["up"].train(training)
    layer.b().data.normal_(0, 0.1)
    with torch.no_grad():
        traced = torch.jit.trace(layer, random(40, 64, seed=0), check_trace=False)
        x = random(40, 64, seed=1)
        torch.testing.assert_close(traced(x), layer(x), rtol=0.02, atol=0.02)


# ------------------------------------------------------------------------------------------------------ how they come


def step_again(monkeypatch, caplog, **environment: str) -> str:
    """A training step as a process's first use of the kernels: what the log says of it, and whether they were used."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    library = functools.cache(cpu_bf16.library.__wrapped__)
    monkeypatch.setattr(cpu_bf16, "library", library)
    layers = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 64, dtype=BF16)})
    pk.attach(layers, pk.LoRA(r=4, dropout=0.1))
    x = random(40, 64, seed=0)
    with caplog.at_level(logging.INFO, cpu_bf16.__name__), torch.device("meta"):  # wherever tensors are made by default
        layers["up"].train()(x).sum().backward()
    assert layers["up"].b().grad.any()
    return f"{'used' if library() is not None else 'plain'} {caplog.text}"


@needs_kernels
def test_they_are_compiled_once_for_a_machine(tmp_path, monkeypatch, caplog):
    made = []
    for _ in range(2):
        assert step_again(monkeypatch, caplog, XDG_CACHE_HOME=str(tmp_path)) == "used "
        (library,) = (tmp_path / "peftkit" / "kernels").iterdir()
        made.append(library.stat().st_mtime_ns)
    assert made[0] == made[1]


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


OLD = "#!/bin/sh\n[ $1 = --version ] && echo Free Software Foundation && exit\necho 'x.cpp:1: error: unknown -mavx512bf16' >&2; exit 1"


@needs_kernels
@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("#!/bin/sh\necho clang version 19", "g++' is not g++, there is no g++; install g++"),
        (OLD, "fails: x.cpp:1: error: unknown -mavx512bf16"),
        ("no script", "Exec format"),
    ],
    ids=["clang", "too old", "no program"],
)
def test_without_a_compiler_plain_torch_serves(compiler, told, tmp_path, monkeypatch, caplog):
    named = script(tmp_path / "the g++", compiler).replace(" ", "\\ ")
    found = step_again(monkeypatch, caplog, XDG_CACHE_HOME=str(tmp_path), CXX=named, PATH="/nonexistent")
    assert found.startswith("plain INFO") and "the kernels for bf16 on this CPU are not used (" in found and told in found


@needs_kernels
@pytest.mark.parametrize("named", ["/nonexistent/c++", "g++ -pipe"])
def test_the_compiler_may_be_named_with_options_and_is_found_anyway(named, tmp_path, monkeypatch, caplog):
    assert step_again(monkeypatch, caplog, XDG_CACHE_HOME=str(tmp_path), CXX=named) == "used "


@needs_kernels
@pytest.mark.parametrize("why", ["a file in its place", "others may write to it", "no home"])
def test_a_cache_that_cannot_be_used_costs_a_second_and_a_warning(why, tmp_path, monkeypatch, caplog):
    if why == "a file in its place":
        (tmp_path / "peftkit").write_text("a file, no folder")
    elif why == "others may write to it":
        (tmp_path / "peftkit" / "kernels").mkdir(parents=True)
        (tmp_path / "peftkit" / "kernels").chmod(0o777)
    else:
        monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    found = step_again(monkeypatch, caplog, XDG_CACHE_HOME=str(tmp_path))
    assert found.startswith("used WARNING") and "compiled into a temporary folder" in found


@needs_kernels
def test_nowhere_to_compile_is_plain_torch(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    (tmp_path / "peftkit").write_text("a file, no folder")
    found = step_again(monkeypatch, caplog, XDG_CACHE_HOME=str(tmp_path))
    assert found.startswith("plain") and "FileNotFoundError" in found


@pytest.mark.parametrize("folder", ["/my env/torch/lib", "/x/site-packages/torch.libs"])
def test_torch_s_openmp_is_found_among_others(folder, monkeypatch, tmp_path):
    home = Path(str(tmp_path) + folder)
    home.mkdir(parents=True)
    (home / "libgomp-a3.so.1").touch()
    monkeypatch.setattr(torch, "__file__", str(home.parent / "__init__.py" if home.name == "lib" else home.parent / "torch" / "__init__.py"))
    lines = [
        f"7f-8f r--p 0 08:01 12   {home}/libgomp-a3.so.1",
        "7f-8f r--p 0 08:01 12   /opt/intel/libiomp5.so",
        "7f-8f r--p 0 08:01 12  /opt/sk/libgomp-b.so.1",
    ]
    monkeypatch.setattr("builtins.open", lambda path, **options: __import__("io").StringIO("\n".join(lines) + "\n7f-8f rw-p 0 0:0 0\n"))
    assert cpu_bf16._openmp_of_torch() == f"{home}/libgomp-a3.so.1"


@needs_kernels
def test_a_damaged_file_in_the_cache_is_not_loaded(tmp_path, monkeypatch, caplog):
    assert step_again(monkeypatch, caplog, XDG_CACHE_HOME=str(tmp_path)) == "used "
    (library,) = (tmp_path / "peftkit" / "kernels").iterdir()
    whole = library.read_bytes()
    library.unlink()  # it is mapped here
    library.write_bytes(whole[:1000])
    assert step_again(monkeypatch, caplog, XDG_CACHE_HOME=str(tmp_path)) == "used "
    assert library.read_bytes() == whole


@needs_kernels
def test_kernels_that_compute_wrong_are_refused(monkeypatch):
    library = copy.copy(cpu_bf16.load())
    monkeypatch.setattr(library, "down", lambda *args: None)
    with pytest.raises(RuntimeError, match=r"compute 0\.5"):
        cpu_bf16._try_out(library)


def test_other_cpus_take_plain_torch(monkeypatch, caplog):
    monkeypatch.setattr(cpu_bf16, "_cpu_flags", lambda: {"avx2"})
    with pytest.raises(cpu_bf16.UnavailableError, match="AVX512-BF16"):
        cpu_bf16.load()
    with caplog.at_level(logging.INFO, cpu_bf16.__name__):
        assert cpu_bf16.library.__wrapped__() is None
    assert "plain torch computes the same" in caplog.text


@pytest.mark.parametrize("line", ["/opt/intel/libiomp5.so", "/opt/torch/lib/libgomp.so.1 (deleted)", ""])
def test_another_openmp_is_refused(line, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda path, **options: __import__("io").StringIO(f"7f-8f r--p 0 08:01 12   {line}\n"))
    with pytest.raises(cpu_bf16.UnavailableError, match="torch's OpenMP is not one libgomp"):
        cpu_bf16._openmp_of_torch()
