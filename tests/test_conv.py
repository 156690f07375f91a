"""LoRA and DoRA on convolutions: equal to the formula, to peft and to the merged module."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import wake
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import peftkit as pk
from peftkit.checkpoint import ADAPTER_FILE
from peftkit.layers import LoRAConv, Spec, adapter_layers, layer_class, trainable_parameters

METHODS = {"lora": pk.LoRA, "dora": pk.DoRA}
# Options of the convolution; the number of dimensions is that of the kernel.
SHAPES = {
    "1d": dict(kernel_size=(3,)),
    "1d, stride and padding": dict(kernel_size=(4,), stride=2, padding=3, bias=False),
    "1d, dilation, same": dict(kernel_size=(3,), dilation=2, padding="same"),
    "2d": dict(kernel_size=(3, 2), padding=1),
    "2d, stride": dict(kernel_size=(2, 2), stride=(2, 1), bias=False),
    "2d, dilation": dict(kernel_size=(3, 3), dilation=2, padding=(2, 1)),
    "2d, 1x1": dict(kernel_size=(1, 1)),
    "2d, circular": dict(kernel_size=(3, 3), padding=1, padding_mode="circular"),
    "3d": dict(kernel_size=(2, 1, 2), stride=(1, 1, 2)),
}
GROUPED = {"1d, groups": dict(kernel_size=(3,), groups=2, padding=1), "2d, groups": dict(kernel_size=(3, 3), groups=2, stride=2)}
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
IN, OUT, R = 4, 6, 4


class Tower(nn.Module):
    """A convolution and a linear, so that the convolution is not the whole model."""

    def __init__(self, options: dict, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.conv = KINDS[len(options["kernel_size"])](IN, OUT, **options)
        self.head = nn.Linear(OUT, 3)
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(2).mean(-1))


def image(options: dict, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, IN, *(7, 8, 5)[: len(options["kernel_size"])], generator=torch.Generator().manual_seed(2)).to(dtype)


def layer_on(options: dict, dora: bool = False, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> LoRAConv:
    layer = LoRAConv(Tower(options, dtype).conv)
    torch.manual_seed(3)
    layer.add("default", Spec(R, 0.7, dropout, dora=dora))
    return layer


def plain(base: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a fresh convolution with these options computes."""
    other = copy.deepcopy(base)
    other.weight, other.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    return other(x)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_computes_what_the_merged_convolution_does(shape, dora):
    layer, x = layer_on(SHAPES[shape], dora), image(SHAPES[shape])
    base = layer.base_layer
    untouched, start = base.weight.clone(), base(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), start, rtol=1e-12, atol=1e-12)
        assert dora or torch.equal(layer(x), start)
        wake(layer)
        y = layer(x)
        assert not torch.allclose(y, start, atol=0.02)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        whole = untouched + 0.7 * torch.einsum("or,r...->o...", b.flatten(1), a)
        if dora:
            magnitude = layer.lora_magnitude_vector["default"].weight
            whole = whole * (magnitude.flatten() / whole.flatten(1).norm(dim=1)).view(-1, *(1,) * (whole.ndim - 1))
        torch.testing.assert_close(layer.merged_weight(), whole, rtol=1e-12, atol=1e-12)
        assert torch.equal(base.weight, untouched)
        merged = layer.merged()
        assert merged is base
        torch.testing.assert_close(merged(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("shape", ["1d, stride and padding", "2d", "2d, circular"])
def test_gradients_are_those_through_the_whole_weight(shape, dora):
    layer, x = layer_on(SHAPES[shape], dora), image(SHAPES[shape]).requires_grad_()
    wake(layer)
    base = layer.base_layer
    parts = {trained.key: trained.parameter.detach().clone().requires_grad_() for trained in layer.role_parameters()}
    whole = base.weight + 0.7 * torch.einsum("or,r...->o...", parts["lora_B.weight"].flatten(1), parts["lora_A.weight"])
    if dora:
        norm = whole.flatten(1).norm(dim=1).detach()
        whole = whole * (parts["lora_magnitude_vector"].flatten() / norm).view(-1, *(1,) * (whole.ndim - 1))
    z = x.detach().clone().requires_grad_()
    function = F.conv1d if whole.ndim == 3 else F.conv2d
    padded, padding = (F.pad(z, (1, 1, 1, 1), mode="circular"), 0) if base.padding_mode == "circular" else (z, base.padding)
    wanted = function(padded, whole, base.bias, base.stride, padding, base.dilation)
    cotangent = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(4))
    y = layer(x)
    (y * cotangent).sum().backward(), (wanted * cotangent).sum().backward()
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-10)
    for trained in layer.role_parameters():
        torch.testing.assert_close(trained.parameter.grad, parts[trained.key].grad, rtol=1e-10, atol=1e-10)
    assert base.weight.grad is None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.integers(3, 9), kernel=st.integers(1, 3), stride=st.integers(1, 3), padding=st.integers(0, 2), dilation=st.integers(1, 2), r=st.integers(1, 5),
    batch=st.integers(0, 3), dora=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_computes_what_the_merged_convolution_does(size, kernel, stride, padding, dilation, r, batch, dora, seed):
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    torch.manual_seed(seed)
    layer = LoRAConv(nn.Conv1d(IN, OUT, kernel, stride, padding, dilation).double().requires_grad_(False))
    layer.add("default", Spec(r, 0.5, dora=dora))
    wake(layer)
    x = torch.randn(batch, IN, size, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(plain(layer.base_layer, x, layer.merged_weight(), layer.base_layer.bias), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", GROUPED)
def test_groups(shape, tmp_path):
    """As peft has it: A over all channels, B by group. That is no update of the base's weight."""
    layer, x = layer_on(GROUPED[shape]), image(GROUPED[shape])
    start = layer.base_layer(x)
    assert torch.equal(layer(x), start) and tuple(layer.lora_B["default"].weight.shape[:2]) == (OUT, R // 2)
    wake(layer)
    function, base = (F.conv1d if x.ndim == 3 else F.conv2d), layer.base_layer
    h = function(x, layer.lora_A["default"].weight, None, base.stride, base.padding)
    torch.testing.assert_close(layer(x), start + 0.7 * function(h, layer.lora_B["default"].weight, groups=2), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="reads across them"):
        layer.merged_weight()

    model = Tower(GROUPED[shape])
    summary = pk.attach(model, pk.LoRA(r=R, target_modules=["conv", "head"]))
    assert "conv cannot be merged: with groups its update reads across them" in str(summary)
    with pytest.raises(ValueError, match=r"conv cannot be merged.*nothing was merged"):
        pk.merge(model)
    assert len(adapter_layers(model)) == 2


@pytest.mark.parametrize("method,r,message", [("lora", 3, "multiple of them, not 3"), ("dora", 4, "DoRA has no form")])
def test_groups_that_do_not_fit_are_refused(method, r, message):
    model = Tower(GROUPED["2d, groups"])
    with pytest.raises(ValueError, match=message):
        pk.attach(model, METHODS[method](r=r, target_modules=["conv"]))
    assert not adapter_layers(model)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_bf16(dora):
    options = SHAPES["2d"]
    layer, x = layer_on(options, dora, torch.bfloat16), image(options, torch.bfloat16)
    wake(layer)
    y = layer(x)
    assert y.dtype == torch.bfloat16 and all(p.parameter.dtype == torch.float32 for p in layer.role_parameters())
    wanted = plain(layer.base_layer, x, layer.merged_weight(), layer.base_layer.bias)
    torch.testing.assert_close(y, wanted, rtol=3e-2, atol=3e-2)
    y.float().square().mean().backward()
    assert all(p.parameter.grad.dtype == torch.float32 and p.parameter.grad.any() for p in layer.role_parameters())
    exact = layer_on(options, dora, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert exact(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_enters_the_update_only_and_in_training_only(dora):
    options = SHAPES["2d"]
    layer, x = layer_on(options, dora, dropout=0.5), image(options)
    wake(layer)
    layer.train()
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(x), 0.5)
    assert not torch.equal(layer(x), first)
    layer.eval()
    quiet, base = layer(x), layer.base_layer
    assert torch.equal(layer(x), quiet) and not torch.allclose(first, quiet)
    if not dora:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(first, base(x) + 0.7 * F.conv2d(F.conv2d(x * mask, a, padding=1), b), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["1d", "1d, stride and padding", "2d", "2d, stride", "2d, 1x1", "3d"])
def test_equal_to_peft_with_all_gradients(shape, method):
    ours, x = Tower(SHAPES[shape]), image(SHAPES[shape])
    torch.manual_seed(0)
    pk.attach(ours, METHODS[method](r=R, alpha=6, target_modules=["conv", "head"]))
    wake(ours)
    config = LoraConfig(r=R, lora_alpha=6, target_modules=["conv", "head"], use_dora=method == "dora")
    theirs = get_peft_model(Tower(SHAPES[shape]), config, autocast_adapter_dtype=False).double()
    named = dict(theirs.named_parameters())
    pairs = [(mine, named[f"base_model.model.{name}"]) for name, _, mine in trainable_parameters(ours)]
    assert len(pairs) == (6 if method == "dora" else 4)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    y, wanted = ours(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    y.square().sum().backward(), wanted.square().sum().backward()
    for mine, other in pairs:
        assert mine.grad.any()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-11)
    theirs.merge_adapter()
    torch.testing.assert_close(ours.conv.merged_weight(), theirs.base_model.model.conv.base_layer.weight, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize(
    "shape,method", [(s, m) for s in ("1d, stride and padding", "2d", "3d") for m in METHODS] + [("1d, groups", "lora"), ("2d, groups", "lora")]
)
def test_files_go_both_ways(shape, method, tmp_path):
    options = (SHAPES | GROUPED)[shape]

    def fresh() -> Tower:
        return Tower(options, torch.float32)

    x = image(options, torch.float32)
    model = fresh()
    pk.attach(model, METHODS[method](r=R, alpha=6, target_modules=["conv"]))
    wake(model)
    pk.save_adapter(model, tmp_path / "ours")
    state = load_file(tmp_path / "ours" / ADAPTER_FILE)
    assert {"base_model.model.conv.lora_A.weight", "base_model.model.conv.lora_B.weight"} <= state.keys()
    theirs = PeftModel.from_pretrained(fresh(), tmp_path / "ours")
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-6)
    wake(theirs.requires_grad_(False).base_model.model.conv.lora_B.requires_grad_(True), seed=8)
    theirs.save_pretrained(tmp_path / "theirs")
    again = pk.load_adapter(fresh(), tmp_path / "theirs")
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(again(x), model(x), atol=1e-3)


def test_a_name_that_is_also_the_end_of_others_reaches_peft_alone(tmp_path):
    """peft takes a full name for the end of a name: `conv` would adapt `inner.conv` too."""
    options = SHAPES["2d"]

    class Outer(Tower):
        def __init__(self) -> None:
            super().__init__(options, torch.float32)
            self.inner = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1)})

    model = Outer()
    pk.attach(model, pk.LoRA(r=2, target_modules="conv", exclude_modules="inner.conv"))
    assert list(adapter_layers(model)) == ["conv"]
    wake(model)
    pk.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(Outer(), tmp_path / "adapter")
    assert [name for name, _ in theirs.named_modules() if name.endswith("lora_A")] == ["base_model.model.conv.lora_A"]
    x = image(options, torch.float32)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- names


def test_adapters_are_switched_stacked_disabled_and_deleted():
    options = SHAPES["2d"]
    layer, x = layer_on(options), image(options)
    wake(layer)
    base, first = layer.base_layer(x), layer(x)
    layer.add("other", Spec(2, 1.0))
    with torch.no_grad():
        layer.lora_B["other"].weight.normal_()
    layer.set_adapter("other")
    second = layer(x)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x) - base, (first - base) + (second - base))
    torch.testing.assert_close(plain(layer.base_layer, x, layer.merged_weight(), layer.base_layer.bias), layer(x))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    layer.delete("default")
    assert torch.equal(layer(x), second) and not [name for name, _ in layer.named_parameters() if "default" in name]


def test_trains_and_leaves_the_base_as_it_was():
    options = SHAPES["2d"]
    model, x = Tower(options, torch.float32), image(options, torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    start = model(x)
    summary = pk.attach(model, [pk.DoRA(r=2, target_modules=["conv", "head"]), pk.LoRAPlus(ratio=4)])
    assert summary.trainable == {"A": 2 * IN * 6 + 2 * OUT, "B": 2 * OUT + 2 * 3, "magnitude": OUT + 3} and summary.rates["B"] == 4
    optimizer = pk.build_optimizer(model, learning_rate=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert model(x).square().sum() < start.square().sum()
    assert model.conv.lora_B["default"].weight.all()
    pk.detach(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()) and torch.equal(model(x), start)


def test_convolutions_that_make_their_weight_are_left_alone():
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean())

    assert layer_class(nn.Conv1d(2, 2, 1)) is LoRAConv
    for odd in (Standardised(2, 2, 1), weight_norm(nn.Conv1d(2, 2, 1)), nn.ConvTranspose1d(2, 2, 1)):
        assert layer_class(odd) is None
        with pytest.raises(ValueError, match="matches no layer that can be adapted"):
            pk.attach(nn.Sequential(odd, nn.Linear(2, 2)), pk.LoRA(target_modules=["0"]))


def test_running_statistics_that_no_file_holds_are_told():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    assert "1 modules, such as 1, change their running statistics in training mode" in str(pk.attach(model, pk.LoRA(r=2, target_modules=["0"])))
