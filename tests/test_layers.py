"""The contract of adapter layers, over every layer-swapping method of the registry, every kind of base and dtype."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama, wake, zeroed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import peftkit as pk
from peftkit import quant
from peftkit.kernels import cpu_bf16, dora_norm
from peftkit.layers import AdapterLayer, LoRALinear, Spec, adapter_layers, dense_weight, features, trainable_parameters
from peftkit.memory import count_saved
from peftkit.methods import REGISTRY, LoRA

IN, OUT = 64, 96
SWAPPING = {name: method for name, method in REGISTRY.items() if method.swaps_layers}
BASES = ("linear", "linear without bias", "conv1d", "nf4", "fp4", "int8")
CASES = [
    pytest.param(method, base, dtype, id=f"{method}-{base}-{str(dtype).removeprefix('torch.')}")
    for method in SWAPPING
    for base in BASES
    for dtype in (torch.float32, torch.bfloat16)
    if method != "qlora" or base in ("nf4", "fp4")
]


class Holder(nn.Module):
    """A model of one linear."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def make_base(kind: str, dtype: torch.dtype) -> nn.Module:
    """A frozen linear IN -> OUT of this kind, with a bias that is not zero."""
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=kind != "linear without bias")
    if kind in ("linear", "linear without bias"):
        return plain.to(dtype)
    if kind == "conv1d":
        module = Conv1D(OUT, IN)
        nn.init.normal_(module.bias)
        return module.to(dtype)
    import bitsandbytes

    if kind == "int8":
        module = bitsandbytes.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
        module.load_state_dict(plain.half().state_dict())
    else:
        module = bitsandbytes.nn.Linear4bit(IN, OUT, compute_dtype=dtype, compress_statistics=True, quant_type=kind)
        module.load_state_dict(plain.to(dtype).state_dict())
    module = module.to("cpu")  # this quantises
    module.bias.data = module.bias.data.to(dtype)
    return module.requires_grad_(False)


def adapted(method: str, kind: str, dtype: torch.dtype = torch.float32, **options) -> Holder:
    """A Holder with this method on it, away from its start."""
    model = Holder(make_base(kind, dtype))
    torch.manual_seed(1)
    pk.attach(model, SWAPPING[method](**{"r": 4, "alpha": 8, "target_modules": ["linear"]} | options))
    wake(model)
    return model


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def tolerance(kind: str, dtype: torch.dtype) -> float:
    if kind == "int8":
        return 2e-2  # bitsandbytes rounds the activations of an int8 layer to 8 bits in eval mode
    return 1e-5 if dtype == torch.float32 else 1.5e-2


def formula(layer: LoRALinear, x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor | None, bias: Tensor | None, mask: Tensor | float = 1.0) -> Tensor:
    """The equations of the papers in plain autograd; the dropped x enters the low-rank product only."""
    product = x @ w.T + layer.scale * (x * mask) @ a.T @ b.T
    if m is not None:
        product = product * (m / (w + layer.scale * b @ a).norm(dim=1).detach())
    return product if bias is None else product + bias


def frozen_state(module: nn.Module) -> dict[str, Tensor]:
    """Everything the base stores, copied."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


# ------------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("method,kind,dtype", CASES)
def test_forward_is_that_of_the_merged_weight(method, kind, dtype):
    model = adapted(method, kind, dtype).eval()
    layer, x = model.linear, tokens(3, 5, IN, dtype=dtype)
    with torch.no_grad():
        ours = model(x)
        merged = layer.merged_weight()
        bias = None if layer.bias is None else layer.bias.to(torch.float64)
        wanted = F.linear(x.double(), merged.double(), bias)
        base = layer.base_layer(x)
    assert ours.dtype == dtype and merged.shape == (OUT, IN)
    assert relative(ours, wanted) <= tolerance(kind, dtype)
    assert relative(base, wanted) > 0.1, "the adapter does something"


@pytest.mark.parametrize("method,kind,dtype", CASES)
def test_outputs_right_after_attach_are_the_bases(method, kind, dtype):
    model = Holder(make_base(kind, dtype))
    quant.protect(model)
    for training in (True, False):
        model.train(training)
        x = tokens(70, IN, dtype=dtype)  # more tokens than the fused 4-bit product takes
        with torch.no_grad():
            before = model(x)
        pk.attach(model, SWAPPING[method](r=4, target_modules=["linear"]))
        with torch.no_grad():
            after = model(x)
        pk.detach(model)
        if not SWAPPING[method].dora:
            assert torch.equal(after, before)
        else:
            assert relative(after, before) <= tolerance(kind, dtype)


@pytest.mark.parametrize("method,kind,dtype", CASES)
def test_training_leaves_the_base_bit_for_bit(method, kind, dtype):
    model = adapted(method, kind, dtype, dropout=0.1).train()
    base = model.linear.base_layer
    before, x = frozen_state(base), tokens(9, IN, dtype=dtype)
    start = {name: parameter.detach().clone() for name, _, parameter in trainable_parameters(model)}
    optimizer = pk.build_optimizer(model, learning_rate=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_state(base, before)
    for name, _, parameter in trainable_parameters(model):
        assert not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("method,kind,dtype", CASES)
def test_detach_gives_the_base_back(method, kind, dtype):
    base = make_base(kind, dtype)
    model = Holder(base)
    quant.protect(model)
    x = tokens(9, IN, dtype=dtype)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    modules = dict(model.named_modules())
    with torch.no_grad():
        before = model(x)
    pk.attach(model, SWAPPING[method](r=4, target_modules=["linear"]))
    wake(model)
    with torch.no_grad():
        assert not torch.equal(model(x), before)
    pk.detach(model)
    assert dict(model.named_modules()) == modules, "the very same modules"
    with torch.no_grad():
        assert torch.equal(model(x), before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("method,kind,dtype", CASES)
def test_adapters_disabled_is_the_base(method, kind, dtype):
    model = adapted(method, kind, dtype, dropout=0.3)
    x = tokens(9, IN, dtype=dtype)
    with torch.no_grad(), pk.adapters_disabled(model):
        off = model(x)
    with torch.no_grad():
        assert torch.equal(off, model.linear.base_layer(x))
        assert not torch.equal(model(x), off), "and on again after the block"


def test_adapters_are_enabled_again_after_an_error():
    model = adapted("lora", "linear")
    with pytest.raises(KeyError), pk.adapters_disabled(model):
        raise KeyError
    assert model.linear.enabled


@pytest.mark.parametrize("method,kind,dtype", CASES)
def test_roles_and_dtypes_of_the_masters(method, kind, dtype):
    model = adapted(method, kind, dtype)
    roles = {role: parameter for _, role, parameter in trainable_parameters(model)}
    shapes = {"A": (4, IN), "B": (OUT, 4)} | ({"magnitude": (OUT,)} if SWAPPING[method].dora else {})
    assert {role: tuple(parameter.shape) for role, parameter in roles.items()} == shapes
    assert {parameter.dtype for parameter in roles.values()} == {torch.float32}
    assert features(model.linear.base_layer) == (IN, OUT)


@pytest.mark.parametrize("method", SWAPPING)
def test_peft_names_of_the_parameters(method):
    model = adapted(method, "nf4")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {"linear.lora_A.default.weight", "linear.lora_B.default.weight"}
    assert names == wanted | ({"linear.lora_magnitude_vector.default.weight"} if method == "dora" else set())


def test_an_adapter_layer_without_its_parts_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        AdapterLayer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown adapter 'other'; there is 'default'"):
        adapted("lora", "linear").linear.delete("other")


# -------------------------------------------------------------------------------------------------------------- formula


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_equal_plain_autograd_in_fp64(method, kind, dropout):
    """x, A, B and the magnitude; with dropout the mask that backward draws is the one of forward."""
    model = adapted(method, kind, torch.float64, dropout=dropout).train()
    layer = model.linear
    x = tokens(4, 6, IN, dtype=torch.float64).requires_grad_()
    cotangent = tokens(4, 6, OUT, dtype=torch.float64, seed=8)
    torch.manual_seed(11)
    y = model(x)
    (y * cotangent).sum().backward()

    mask: Tensor | float = 1.0
    if dropout:
        torch.manual_seed(11)
        mask = zeroed(torch.ones(24, IN, dtype=x.dtype), dropout, int(torch.randint(2**62, ()))).view_as(x) / (1 - dropout)
        assert set(mask.unique().tolist()) == {0.0, 1 / (1 - dropout)} and 0.3 < (mask == 0).double().mean() < 0.5
    parts = {trained.role: trained.parameter.detach().clone().requires_grad_() for trained in layer.role_parameters()}
    z = x.detach().clone().requires_grad_()
    w = dense_weight(layer.base_layer).detach()
    bias = None if layer.bias is None else layer.bias.detach()
    wanted = formula(layer, z, w, parts["A"], parts["B"], parts.get("magnitude"), bias, mask)
    (wanted * cotangent).sum().backward()
    assert relative(y, wanted) <= 1e-12
    assert relative(x.grad, z.grad) <= 1e-12
    for role, _, _, parameter, *_ in layer.role_parameters():
        assert relative(parameter.grad, parts[role].grad) <= 1e-12, role


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dora=st.booleans(), inputs=st.integers(1, 19), outputs=st.integers(1, 19), r=st.integers(1, 9), rows=st.integers(0, 7), bias=st.booleans(),
    scale=st.floats(0.01, 4), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_equals_the_formula(dora, inputs, outputs, r, rows, bias, scale, seed):
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(inputs, outputs, bias=bias).double().requires_grad_(False))
    layer.add("default", Spec(r, scale, dora=dora))
    with torch.no_grad():
        for _, _, _, parameter, *_ in layer.role_parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(rows, inputs, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(rows, outputs, dtype=torch.float64)
    parts = {trained.role: trained.parameter.detach().clone().requires_grad_() for trained in layer.role_parameters()}
    z = x.detach().clone().requires_grad_()
    y = layer(x)
    wanted = formula(layer, z, layer.base_layer.weight, parts["A"], parts["B"], parts.get("magnitude"), layer.bias)
    (y * cotangent).sum().backward(), (wanted * cotangent).sum().backward()
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-10)
    for role, _, _, parameter, *_ in layer.role_parameters():
        torch.testing.assert_close(parameter.grad, parts[role].grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(F.linear(x, layer.merged_weight(), layer.bias), y, rtol=1e-10, atol=1e-10)


def test_dora_norm_without_the_sum():
    w, a, b = (tokens(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate([(7, 5), (3, 5), (7, 3)]))
    torch.testing.assert_close(dora_norm(w, w.square().sum(1), a, b, 0.7), (w + 0.7 * b @ a).norm(dim=1), rtol=1e-13, atol=0)


def test_dora_norm_follows_every_change_of_the_factors():
    """A norm kept from one forward to the next would be stale after a write that bumps no version counter."""
    model = adapted("dora", "linear").eval()
    layer, x = model.linear, tokens(5, IN)
    with torch.no_grad():
        first = model(x)
        layer.b().data.mul_(3)  # through .data: `_version` stays as it is
        second = model(x)
        assert relative(second, F.linear(x, layer.merged_weight(), layer.bias)) <= 1e-5
    assert not torch.allclose(first, second)


# ---------------------------------------------------------------------------------------------------------- odd corners


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_zero_rows_under_dora_give_no_nan(kind):
    base = make_base("linear", torch.float32)
    with torch.no_grad():
        base.weight[3:5] = 0
    if kind == "nf4":
        import bitsandbytes

        four = bitsandbytes.nn.Linear4bit(IN, OUT, compute_dtype=torch.float32, quant_type="nf4")
        four.load_state_dict(base.state_dict())
        base = four.to("cpu")
        assert not dense_weight(base)[3:5].any()
    model = Holder(base)
    pk.attach(model, pk.DoRA(r=4, target_modules=["linear"]))
    x = tokens(6, IN).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    for name, _, parameter in trainable_parameters(model):
        assert parameter.grad.isfinite().all(), name
    optimizer = pk.build_optimizer(model, learning_rate=1e-2)
    optimizer.step()
    assert model(x).isfinite().all() and model.linear.merged_weight().isfinite().all()


@pytest.mark.parametrize("method,kind,dtype", CASES)
@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN)], ids=["2d", "3d"])
def test_no_tokens_at_all(method, kind, dtype, shape):
    model = adapted(method, kind, dtype, dropout=0.2).train()
    x = tokens(*shape, dtype=dtype).requires_grad_()
    y = model(x)
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad.shape == shape
    for name, _, parameter in trainable_parameters(model):
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_inputs_of_one_to_four_dimensions(method, kind):
    model = adapted(method, kind).eval()
    x = tokens(24, IN)
    flat = model(x)
    for shape in [(4, 6), (2, 3, 4)]:
        torch.testing.assert_close(model(x.view(*shape, IN)), flat.view(*shape, OUT))
    torch.testing.assert_close(model(x[0]), flat[0])
    turned = x.view(4, 6, IN).transpose(0, 1)  # not contiguous
    torch.testing.assert_close(model(turned), flat.view(4, 6, OUT).transpose(0, 1))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_draws_from_the_global_seed(method):
    model = adapted(method, "linear", dropout=0.5).train()
    x = tokens(6, IN)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model(x))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    model.eval()
    assert torch.equal(model(x), model(x)), "none in eval"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_fp32_masters_take_steps_that_bf16_would_lose(method):
    model = adapted(method, "linear", torch.bfloat16).train()
    parameter = model.linear.magnitude() if method == "dora" else model.linear.a()
    start = parameter.detach().clone()
    model(tokens(6, IN, dtype=torch.bfloat16)).float().sum().backward()
    assert parameter.grad.dtype == torch.float32
    torch.optim.SGD([parameter], lr=1e-6 / parameter.grad.abs().max().item()).step()
    moved = parameter != start
    assert moved.double().mean() > 0.9
    assert (parameter.bfloat16() == start.bfloat16()).double().mean() > 0.9, "bf16 would have stood still"


@pytest.mark.parametrize("kind", ["linear", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_masters_that_a_trainer_made_bf16_cost_no_precision_elsewhere(method, kind):
    """trl's SFTTrainer does so on quantised models; the same values in fp32 must give the same results, merged ones too."""
    rounded, exact = adapted(method, kind).eval(), adapted(method, kind).eval()
    for name, _, parameter in trainable_parameters(rounded):
        parameter.data = parameter.data.to(torch.bfloat16)
        exact.get_parameter(name).data.copy_(parameter)
    x = tokens(9, IN)
    with torch.no_grad():
        assert torch.equal(rounded(x), exact(x))
    assert torch.equal(rounded.linear.merged_weight(), exact.linear.merged_weight())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_autocast_gives_bf16_and_nearly_the_fp32_result(method, kind):
    model = adapted(method, kind).train()
    x = tokens(8, IN).requires_grad_()
    wanted = model(x)
    exact = torch.autograd.grad(wanted.sum(), [p for _, _, p in trainable_parameters(model)])
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert relative(y, wanted) <= 1.5e-2
    if kind != "nf4":  # bitsandbytes' own compute dtype decides there
        assert y.dtype == torch.bfloat16
    ours = torch.autograd.grad(y.float().sum(), [p for _, _, p in trainable_parameters(model)])
    for mine, other in zip(ours, exact, strict=True):
        assert mine.dtype == torch.float32 and relative(mine, other) <= 3e-2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_recomputing_activations_gives_the_same_gradients(method, reentrant):
    """Dropout included: the mask is drawn from a seed that checkpointing restores."""
    gradients = []
    for recompute in (False, True):
        model = adapted(method, "linear", dropout=0.3).train()
        x = tokens(8, IN).requires_grad_()
        torch.manual_seed(2)
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for _, _, p in trainable_parameters(model))])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # the one name that all 5.x have
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradient_checkpointing_of_a_whole_model(method, reentrant, ids):
    gradients = []
    for recompute in (False, True):
        model = tiny_llama()
        torch.manual_seed(4)
        pk.attach(model, SWAPPING[method](r=4))
        wake(model)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, _, p in trainable_parameters(model)})
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        assert gradient.any() and torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_same_layer_called_twice(method):
    model = adapted(method, "linear", torch.float64, dropout=0.2).train()
    x, z = tokens(5, IN, dtype=torch.float64), tokens(3, IN, dtype=torch.float64, seed=9)
    parameters = [p for _, _, p in trainable_parameters(model)]
    torch.manual_seed(3)
    one, two = model(x), model(z)
    together = torch.autograd.grad(one.square().sum() + two.square().sum(), parameters)
    torch.manual_seed(3)
    apart = [torch.autograd.grad(model(v).square().sum(), parameters) for v in (x, z)]
    for both, first, second in zip(together, *apart, strict=True):
        torch.testing.assert_close(both, first + second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_only_x_and_the_narrow_product_are_kept(method, monkeypatch):
    """What the fused node keeps for backward: x, h, and for DoRA the output; never a second x or a weight, and of dropout its seed."""
    monkeypatch.setattr(cpu_bf16, "ENABLED", False)  # its masks are a bit for each number, kept at any rate
    model = adapted(method, "linear", torch.bfloat16, dropout=0.2).train()
    x = tokens(1000, IN, dtype=torch.bfloat16).requires_grad_()
    with count_saved(model) as kept:
        y = model(x)
    wanted = 2 * 1000 * (IN + 4) + (2 * 1000 * OUT if method == "dora" else 0)  # x and h; y
    assert sum(kept.values()) == wanted and y.requires_grad


def test_only_the_swapped_modules_change():
    model = tiny_llama()
    before = dict(model.named_modules())
    pk.attach(model, LoRA(r=2, target_modules=["q_proj"]))
    layers = adapter_layers(model)
    assert list(layers) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    for name, module in before.items():
        assert (model.get_submodule(name) is module) == (name not in layers)
    for name, layer in layers.items():
        assert layer.base_layer is before[name] and layer.training == before[name].training
    copied = copy.deepcopy(model)
    assert adapter_layers(copied).keys() == layers.keys()


# ----------------------------------------------------------------------------------------------------------------- traps


@pytest.mark.parametrize("size", [0.0, 2.0, 20.0, 200.0])
def test_the_magnitude_s_gradient_survives_a_large_bias(size):
    """The trap: biases of hundreds, as keys have, and an output in half precision that holds little else: y - b is then the rounding of b."""
    torch.manual_seed(0)
    base = nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
    base.bias.data.fill_(size)
    layer = LoRALinear(base)
    layer.add("default", Spec(r=4, scale=2.0, dora=True))
    wake(layer)
    x, grad = torch.randn(32, 64).bfloat16(), torch.randn(32, 48).bfloat16()
    layer(x).backward(grad)
    [magnitude] = [parameter for name, parameter in layer.named_parameters() if "magnitude" in name]
    weight = layer.merged_weight(base.weight.double())  # g (W + s B A)
    wanted = (grad.double() * (x.double() @ weight.T)).sum(0) / magnitude.double()
    assert relative(magnitude.grad, wanted) < 2e-2


def test_a_norm_is_not_that_of_another_weight_at_the_same_address():
    """The trap: functional_call puts a weight in that is freed after it, and the next one comes to lie where it lay."""
    layer = LoRALinear(nn.Linear(64, 64, bias=False).requires_grad_(False))
    layer.add("default", Spec(r=4, scale=2.0, dora=True))
    wake(layer)
    x = tokens(3, 64)
    for i in range(1, 9):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) * i
        wanted = x @ layer.merged_weight(weight).T
        with torch.no_grad():
            found = torch.func.functional_call(layer, {"base_layer.weight": weight * 1.0}, (x,))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_offloaded_weights_are_refused():
    """The trap: factors made on the meta device, products with which are whatever lies in memory."""
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: its weights are offloaded"):
        pk.attach(model, pk.LoRA(r=2))
    assert not adapter_layers(model)


class _Product(torch.autograd.Function):
    """A linear of somebody's own, as fused losses have it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


def test_an_autograd_function_that_takes_the_weight_does_not_train_nothing_in_silence():
    [layer] = [module for module in adapted("lora", "linear").modules() if isinstance(module, LoRALinear)]
    x = tokens(3, features(layer.base_layer)[0]).requires_grad_()
    with pytest.raises(RuntimeError, match="an autograd function took the weight of an adapter layer"):
        _Product.apply(x, layer.weight).sum().backward()
    with torch.no_grad():
        assert not layer.weight.requires_grad
    F.linear(x, layer.weight).sum().backward()  # arithmetic that torch sees
    assert all(parameter.grad is not None for parameter in layer.parameters() if parameter.requires_grad)
