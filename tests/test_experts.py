"""LoRA on experts stored as 3-D parameters: exact against a dense formula and peft, paid for by routed rows only, in 16 and 4 bits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import clone, wake, zeroed
from torch.utils.checkpoint import checkpoint
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import peftkit as pk
from peftkit import quant
from peftkit.config import ConfigError
from peftkit.forecast import Skeleton
from peftkit.kernels.experts import Projection, routed_experts
from peftkit.layers import Experts4bit, LoRAExperts, Spec, adapter_layers, dequantize_experts, is_experts, quantize_experts
from peftkit.memory import count_saved
from peftkit.recipe import load_recipe

EXPERTS, EACH = 6, 2
PARTS = ("gate_up_proj", "down_proj")


def _model(kind, seed: int = 0):
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts_per_tok=EACH,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**shape, intermediate_size=40, num_local_experts=EXPERTS))
    elif kind == "qwen3_moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, intermediate_size=48, moe_intermediate_size=24, num_experts=EXPERTS))
    elif kind == "qwen2_moe":
        sizes = dict(intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=32, num_experts=EXPERTS)
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape, **sizes))
    else:  # experts stored transposed, with biases, gate and up interleaved
        model = GptOssForCausalLM(GptOssConfig(**shape, intermediate_size=40, num_local_experts=EXPERTS, layer_types=["full_attention"] * 2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(0, 0.2)
    return model.eval()


def _experts(kind="mixtral", dtype=torch.float64):
    return _model(kind).model.layers[0].mlp.experts.to(dtype).requires_grad_(False)


def _layer(kind="mixtral", parts=PARTS, r=3, dtype=torch.float64, dropout=0.0) -> LoRAExperts:
    layer = _experts(kind, dtype)
    for part in parts:
        layer = LoRAExperts(layer, part)
        layer.add("default", Spec(r, 1.5, dropout))
    wake(layer)
    return layer


def _inputs(tokens=11, dtype=torch.float64, seed=4, experts=EXPERTS):
    """x, index and weights; no token goes to the last expert."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts - 1, generator=generator)[:EACH] for _ in range(tokens)]) if tokens else torch.empty(0, EACH, dtype=torch.long)
    x = torch.randn(tokens, 32, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.rand(tokens, EACH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, index, weights


def _dense(layer, x, index, weights, keep=None):
    """The formula with every weight and update built, token by token."""
    experts = layer.experts()
    plain = experts.plain if isinstance(experts, Experts4bit) else experts

    def linear(part, expert, row):
        weight = experts.dense(part)[expert] if isinstance(experts, Experts4bit) else getattr(experts, part)[expert]
        weight = weight.T if plain.is_transposed else weight
        y = weight @ row
        for chained in layer.chain():
            if chained.part == part:
                a, b = (chained.get_submodule(f"lora_{role}").default.weight for role in "AB")
                r = chained.specs["default"].r
                own_a, own_b = a[expert * r : (expert + 1) * r], b.reshape(b.shape[0], r, -1)[:, :, expert]
                y = y + chained.specs["default"].scale * (own_b @ (own_a @ row))
        return y + getattr(plain, f"{part}_bias")[expert] if plain.has_bias else y

    def inner(u):
        if plain.has_bias:
            gate, up = u[::2].clamp(max=plain.limit), u[1::2].clamp(-plain.limit, plain.limit)
            return (up + 1) * gate * torch.sigmoid(gate * plain.alpha)
        gate, up = u.chunk(2)
        return torch.nn.functional.silu(gate) * up

    rows = []
    for token in range(len(x)):
        chosen = zip(index[token].tolist(), weights[token], strict=True)
        rows.append(sum(weight * linear("down_proj", expert, inner(linear("gate_up_proj", expert, x[token]))) for expert, weight in chosen))
    return torch.stack(rows) if rows else x * 0


def _grads(function, layer, x, index, weights):
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y = function(x, index, weights)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)).sum().backward()
    return [y.detach(), x.grad, weights.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


# ---------------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("parts", [PARTS, PARTS[:1], PARTS[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_outputs_and_gradients_are_those_of_the_dense_formula(kind, parts):
    layer = _layer(kind, parts)
    inputs = _inputs()
    ours = _grads(layer, layer, *inputs)
    for mine, wanted in zip(ours, _grads(lambda *args: _dense(layer, *args), layer, *inputs), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
    assert len(ours) == 3 + 2 * len(parts) and all(grad.abs().sum() > 0 for grad in ours)


def test_one_expert_takes_all_tokens_and_an_empty_batch_takes_none():
    layer = _layer()
    x, index, weights = _inputs()
    index = torch.full_like(index, 3)
    for mine, wanted in zip(_grads(layer, layer, x, index, weights), _grads(lambda *args: _dense(layer, *args), layer, x, index, weights), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
    y, grad_x, grad_weights, *grads = _grads(layer, layer, *_inputs(0))
    assert y.shape == grad_x.shape == (0, 32) and grad_weights.shape == (0, EACH)
    assert len(grads) == 4 and all((grad == 0).all() for grad in grads)


def test_places_that_name_no_expert_add_nothing():
    layer = _layer()
    x, index, weights = _inputs()
    y = layer(x, index, weights)
    elsewhere = torch.cat([index, torch.full((len(x), 1), EXPERTS)], 1)
    more = torch.cat([weights, torch.ones(len(x), 1, dtype=weights.dtype)], 1)
    torch.testing.assert_close(layer(x, elsewhere, more), y, rtol=1e-12, atol=1e-12)


def test_experts_without_tokens_have_no_work_and_zero_gradients():
    layer = _layer(parts=PARTS)
    x, index, weights = _inputs()
    used = set(index.flatten().tolist())
    _, _, _, *grads = _grads(layer, layer, x, index, weights)
    for grad, parameter in zip(grads, (p for p in layer.parameters() if p.requires_grad), strict=True):
        by_expert = grad.view(EXPERTS, 3, -1) if parameter.shape[0] == EXPERTS * 3 else grad.view(len(grad), 3, EXPERTS).permute(2, 0, 1)
        assert {e for e in range(EXPERTS) if by_expert[e].abs().sum() > 0} == used and EXPERTS - 1 not in used
    read = []
    experts = layer.experts()

    def reads(part):
        weight = getattr(experts, part)
        return Projection(lambda expert: (read.append(expert), weight[expert])[1], weight.shape[1])

    y = routed_experts(x, index, weights, experts=EXPERTS, first=reads(PARTS[0]), second=reads(PARTS[1]), gate=experts._apply_gate)
    y.sum().backward()
    assert set(read) == used and len(read) == 4 * len(used)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_outputs_right_after_attaching_are_the_bases_bit_for_bit(kind, ids):
    model = _model(kind)
    model.set_experts_implementation("eager")
    eager = model(ids).logits
    model.set_experts_implementation("grouped_mm")  # the default; the order of the rows, and so the rounding, is its own
    before = model(ids).logits
    pk.attach(model, pk.LoRA(r=2))
    assert torch.equal(model(ids).logits, before)
    torch.testing.assert_close(before, eager, rtol=1e-5, atol=1e-6)
    pk.detach(model)
    assert torch.equal(model(ids).logits, before) and not any(isinstance(module, LoRAExperts) for module in model.modules())


def test_narrow_dtypes_round_no_more_than_a_plain_layer_of_the_same_dtype():
    exact, x64 = _layer(), _inputs()
    layer = copy.deepcopy(exact)
    layer.experts().to(torch.bfloat16)
    x, index, weights = x64[0].detach().bfloat16().requires_grad_(), x64[1], x64[2].detach().bfloat16().requires_grad_()
    for parameter in layer.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    ours, wanted = _grads(layer, layer, x, index, weights), _grads(exact, exact, *x64)
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in ours[3:])
    for mine, right in zip(ours, wanted, strict=True):
        assert (mine.double() - right).norm() / right.norm() < 0.02


def test_autocast_decides_the_dtype_of_the_products():
    layer = _layer(dtype=torch.float32)
    x, index, weights = _inputs(dtype=torch.float32)
    exact = layer(x, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, index, weights)
    assert y.dtype == torch.float32 and 1e-4 < (y - exact).norm() / exact.norm() < 0.03
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------------ dropout


def test_dropout_thins_the_input_of_the_update_only():
    layer = _layer(parts=PARTS[:1], dropout=0.4).train()
    x, index, weights = _inputs(tokens=40)
    index = torch.stack([torch.full((40,), 2), torch.full((40,), 4)], 1)
    torch.manual_seed(7)
    y = layer(x, index, weights)
    torch.manual_seed(7)
    seed = int(torch.randint(2**62, ()))
    a, b = layer.factors()
    slots = index.flatten().sort().indices  # the order of the rows
    experts, wanted = layer.experts(), 0
    for place, expert in enumerate((2, 4)):
        tokens = slots[index.flatten()[slots] == expert] // EACH
        dropped = torch.empty_like(x).detach().index_copy_(0, tokens, zeroed(x.detach()[tokens], 0.4, seed + expert))
        assert 0.3 < (dropped == 0).double().mean() < 0.5
        u = x @ experts.gate_up_proj[expert].T + 1.5 / 0.6 * dropped @ a[expert].T @ b[expert]
        wanted = wanted + weights[:, place, None] * (experts._apply_gate(u) @ experts.down_proj[expert].T)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)
    assert torch.equal(layer.eval()(x, index, weights), layer(x, index, weights))


def test_gradients_under_dropout_are_those_of_the_same_mask():
    layer = _layer(r=2, dropout=0.3).train()
    x, index, weights = _inputs(tokens=3)
    factors = [p for p in layer.parameters() if p.requires_grad]

    def again(*_):
        torch.manual_seed(3)
        return layer(x, index, weights)

    assert torch.autograd.gradcheck(again, (x, weights, *factors), fast_mode=True)


def test_second_derivatives_are_refused_rather_than_wrong():
    layer = _layer()
    x, index, weights = _inputs()
    x = x.detach().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x, index, weights).sum(), x, create_graph=True)


def test_stacked_adapters_train_with_one_dropout():
    layer = _layer(parts=PARTS[1:])
    layer.add("other", Spec(2, 1.0, 0.1))
    layer.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one dropout"):
        layer.train()(*_inputs())
    layer.eval()(*_inputs())


# ------------------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_x_the_gates_input_and_the_narrow_products_are_kept(dtype):
    layer = _layer(dtype=torch.float32)
    layer.experts().to(dtype)
    x, index, weights = _inputs(tokens=20, dtype=dtype)
    with count_saved(layer) as kept:
        y = layer(x, index, weights)
    rows, item = 20 * EACH, dtype.itemsize
    assert sum(kept.values()) == item * (20 * 32 + 20 * EACH + rows * 80 + 2 * rows * 3) + 8 * rows  # x, weights, u, h and k, slots
    y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    layer = _layer(dropout=0.3).train()
    inputs = _inputs()

    def run(*args):
        torch.manual_seed(11)
        return layer(*args)

    def run_checkpointed(*args):
        torch.manual_seed(11)
        return checkpoint(layer, *args, use_reentrant=reentrant)

    for mine, wanted in zip(_grads(run_checkpointed, layer, *inputs), _grads(run, layer, *inputs), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # the one name that all 5.x have
def test_whole_models_train_alike_under_checkpointing(ids):
    model = _model("mixtral")
    pk.attach(model, pk.LoRA(r=2))
    wake(model)
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert len(gradients[0]) == 24
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")  # torch.compile asks for it itself
def test_the_layer_can_stand_in_what_is_compiled():
    layer = _layer()
    inputs = _inputs()
    compiled = torch.compile(lambda *args: layer(*args) * 2, backend="eager")
    for mine, wanted in zip(_grads(compiled, layer, *inputs), _grads(lambda *args: layer(*args) * 2, layer, *inputs), strict=True):
        assert torch.equal(mine, wanted)


# ------------------------------------------------------------------------------------------------------- targets and files


@pytest.mark.parametrize(
    "targets,exclude,wanted",
    [
        ("all-linear", None, {f"{i}.{part}" for i in (0, 1) for part in PARTS}),
        (["experts"], None, {f"{i}.{part}" for i in (0, 1) for part in PARTS}),
        (["down_proj", "q_proj"], None, {"0.down_proj", "1.down_proj"}),
        (["1.mlp.experts.gate_up_proj"], None, {"1.gate_up_proj"}),
        (r".*\.0\.mlp\.experts", None, {"0.gate_up_proj", "0.down_proj"}),
        ("all-linear", ["experts.down_proj"], {"0.gate_up_proj", "1.gate_up_proj"}),
        ("all-linear", ["experts"], set()),
    ],
)
def test_targets_name_experts_or_one_of_their_parameters(targets, exclude, wanted):
    model = _model("mixtral")
    pk.attach(model, pk.LoRA(r=2, target_modules=targets, exclude_modules=exclude))
    layers = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LoRAExperts)}
    assert {layer.target(name).replace("model.layers.", "").replace("mlp.experts.", "") for name, layer in layers.items()} == wanted


def test_the_summary_tells_what_experts_stay_as_they_are():
    model = _model("mixtral")
    summary = str(pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj", "down_proj"])))
    assert "2 expert tensors of 122,880 bytes, such as model.layers.0.mlp.experts" in summary and "gate_up_proj: neither adapted nor quantised" in summary
    assert "down_proj x2" in summary
    assert "neither" not in str(pk.attach(_model("mixtral"), pk.LoRA(r=2)))


def test_what_cannot_be_computed_is_refused_by_name():
    with pytest.raises(ValueError, match=r"DoRA has no form for experts .*MixtralExperts\.gate_up_proj.*exclude_modules"):
        pk.attach(_model("mixtral"), pk.DoRA(r=2))
    pk.attach(_model("mixtral"), pk.DoRA(r=2, exclude_modules=["experts"]))
    llama4 = Llama4TextExperts(Llama4TextConfig(hidden_size=16, intermediate_size=16, num_local_experts=2))
    normed, narrow = _experts(), _experts()
    normed.has_post_expert_norm = True
    narrow.gate_up_proj = torch.nn.Parameter(narrow.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    for module, reason in ((llama4, "Llama4TextExperts: .* does not describe"), (normed, "a norm follows"), (narrow, "dtype is torch.float8")):
        assert is_experts(module)
        model = torch.nn.Sequential()
        model.experts, model.proj = module, torch.nn.Linear(4, 4)
        with pytest.raises(ValueError, match=reason):
            pk.attach(model, pk.LoRA(r=2))
        assert model.experts is module
        summary = pk.attach(model, pk.LoRA(r=2, target_modules=["proj"]))
        assert "neither adapted nor quantised" in str(summary)


def test_adapters_of_one_model_adapt_the_same_parameters_of_experts(ids):
    for first, second in ((["down_proj"], ["experts"]), (["experts"], ["gate_up_proj"])):
        model = _model("mixtral")
        pk.attach(model, pk.LoRA(r=2, target_modules=first))
        wake(model)
        before = model(ids).logits
        with pytest.raises(ValueError, match="adapt the same parameters of experts"):
            pk.attach(model, pk.LoRA(r=2, target_modules=second), adapter="other")
        assert torch.equal(model(ids).logits, before) and list(model.peft_config) == ["default"]


def test_stacked_adapters_add_up():
    layer = _layer()
    x, index, weights = _inputs()
    for inner in layer.chain():
        inner.add("other", Spec(2, 0.7))
    wake(layer)
    deltas = {}
    for names in (["default"], ["other"], ["default", "other"]):
        for inner in layer.chain():
            inner.set_adapter(names)
        deltas[len(deltas)] = [inner.merged_weight() - getattr(inner.experts(), inner.part) for inner in layer.chain()]
    for one, two, both in zip(*deltas.values(), strict=True):
        torch.testing.assert_close(both, one + two, rtol=1e-10, atol=1e-12)
    y = layer(x, index, weights)
    merged = layer.merged()
    merged.config._experts_implementation = "eager"  # the other takes no fp64
    torch.testing.assert_close(merged(x, index, weights), y, rtol=1e-10, atol=1e-12)


FILES = {
    "both": (["q_proj", "experts"], ["experts.gate_up_proj", "experts.down_proj"]),
    "gate_up": (["q_proj", "gate_up_proj"], ["gate_up_proj"]),
    "one": (["q_proj", "model.layers.1.mlp.experts.down_proj"], ["model.layers.1.mlp.experts.down_proj"]),
}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # peft looks among modules; it takes the rank all the same
@pytest.mark.parametrize("kind,targets", [("mixtral", "both"), ("mixtral", "gate_up"), ("mixtral", "one"), ("qwen3_moe", "both"), ("gpt_oss", "both")])
def test_files_exchange_with_peft_both_ways(kind, targets, ids, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    ours, theirs = FILES[targets]
    base = _model(kind)
    model = clone(base)
    pk.attach(model, pk.LoRA(r=3, alpha=2, dropout=0.1, target_modules=ours, rank_pattern={"down_proj": 2} if targets == "both" else {}))
    wake(model)
    pk.save_adapter(model, tmp_path / "ours")
    wanted = model(ids).logits
    read = PeftModel.from_pretrained(clone(base), tmp_path / "ours").eval()
    torch.testing.assert_close(read(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - base(ids).logits).abs().max() > 1e-3
    back = clone(base)
    pk.load_adapter(back, tmp_path / "ours")
    assert torch.equal(back(ids).logits, wanted)
    assert {f"base_model.model.{key}" for key in model.get_adapter_state_dict()} == set(_keys(tmp_path / "ours"))

    config = LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj"], target_parameters=theirs, init_lora_weights=False)
    trained = get_peft_model(clone(base), config).eval()
    trained.save_pretrained(tmp_path / "theirs")
    here = clone(base)
    pk.load_adapter(here, tmp_path / "theirs")
    torch.testing.assert_close(here(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-5)
    for model in (here, trained):
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in trained.base_model.model.named_parameters() if p.requires_grad}
    mine = {name: p.grad for name, p in here.named_parameters() if p.requires_grad}
    assert mine.keys() == gradients.keys()
    for name, grad in mine.items():
        torch.testing.assert_close(grad, gradients[name], rtol=1e-3, atol=1e-6, msg=name)
    pk.merge(here)
    merged = trained.merge_and_unload().state_dict()
    assert merged.keys() == here.state_dict().keys()
    for name, weight in here.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6, msg=name)


def test_peft_reads_all_linear_with_shared_experts(ids, tmp_path):
    from peft import PeftModel

    base = _model("qwen2_moe")
    model = clone(base)
    pk.attach(model, pk.LoRA(r=2))
    wake(model)
    pk.save_adapter(model, tmp_path)
    read = PeftModel.from_pretrained(clone(base), tmp_path).eval()
    torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def _keys(folder):
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_a_file_that_adapts_other_parameters_than_its_config_says_is_refused(tmp_path, ids):
    model = _model("mixtral")
    pk.attach(model, pk.LoRA(r=2, target_modules=["experts"]))
    pk.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": ["experts.down_proj"]}))
    base = _model("mixtral")
    before = base(ids).logits
    with pytest.raises((ValueError, RuntimeError), match=r"factors for 2 parameters .* names 1"):
        pk.load_adapter(base, tmp_path)
    assert torch.equal(base(ids).logits, before)


# -------------------------------------------------------------------------------------------------------------------- 4 bits


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 96, 64), (3, 96, 40), (2, 7, 9)])
def test_a_packed_stack_is_read_back_as_bitsandbytes_reads_whole_blocks(shape, kind):
    from bitsandbytes import functional

    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = quant.pack(stack, kind)
    assert all(tensor.dtype == torch.uint8 for tensor in packed)
    for i, entry in enumerate(stack):
        padded = torch.nn.functional.pad(entry.reshape(-1), (0, -entry.numel() % 64)).view(-1, 64)
        codes, state = functional.quantize_4bit(padded, blocksize=64, compress_statistics=True, quant_type=kind)
        wanted = functional.dequantize_4bit(codes, state).reshape(-1)[: entry.numel()].view(entry.shape)
        found = quant.unpack(packed, i, kind, entry.shape, torch.float32)
        assert torch.equal(found, wanted) and (found - entry).norm() / entry.norm() < 0.15
        torch.testing.assert_close(quant.unpack(packed, i, kind, entry.shape, torch.bfloat16), wanted.bfloat16())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_in_4_bits_compute_and_train_as_their_dequantised_copy(kind):
    inputs = _inputs(dtype=torch.float32)
    packed = Experts4bit(_experts(kind, torch.float32))
    plain = packed.dequantized()
    torch.testing.assert_close(packed(*inputs), plain(*inputs), rtol=1e-5, atol=1e-5)
    layers = []
    for base in (packed, plain):
        layer = LoRAExperts(LoRAExperts(base, PARTS[0]), PARTS[1])
        torch.manual_seed(0)
        for inner in layer.chain():
            inner.add("default", Spec(3, 1.5))
        wake(layer)
        layers.append(layer)
    for mine, wanted in zip(*(_grads(layer, layer, *inputs) for layer in layers), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    merged = layers[0].merged()
    assert type(merged) is type(plain) and list(dict(merged.named_parameters())) != []
    torch.testing.assert_close(merged(*inputs), layers[0](*inputs), rtol=1e-4, atol=1e-5)


def test_the_bytes_survive_casts_copies_and_state_dicts():
    packed = Experts4bit(_experts(dtype=torch.float32))
    weight = packed.dense("down_proj")
    again = Experts4bit(_experts(dtype=torch.float32).to(torch.float32))
    for part in PARTS:
        again.get_submodule(part).codes.data.zero_()
    again.load_state_dict(packed.state_dict())
    for module in (copy.deepcopy(packed), packed.half(), packed.to(torch.bfloat16), again):
        assert torch.equal(module.dense("down_proj"), weight)
    assert packed.to("meta").gate_up_proj.codes.device.type == "meta"


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def saved(request, tmp_path):
    torch.manual_seed(0)
    shape = dict(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, head_dim=16)
    if request.param == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**shape, intermediate_size=96, num_local_experts=8))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, intermediate_size=64, moe_intermediate_size=40, num_experts=8))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_qlora_trains_with_all_expert_bytes_in_4_bits(saved, tmp_path, ids):
    model, _ = pk.load(str(saved), quantize="nf4", dtype="float32")
    plain, _ = pk.load(str(saved), dtype="float32")
    experts = model.model.layers[0].mlp.experts
    weights = sum(p.numel() for name, p in plain.named_parameters() if "experts" in name)
    assert isinstance(experts, Experts4bit) and experts.stands_for() == weights and {p.dtype for p in experts.parameters()} == {torch.uint8}
    outside = sum(t.nbytes for name, t in [*model.named_parameters(), *model.named_buffers()] if "experts" not in name)
    assert 0.5 * weights <= model.get_memory_footprint() - outside <= 0.6 * weights
    forecast = load_recipe({"model": {"name": str(saved), "dtype": "float32"}, "methods": ["qlora"], "data": {"train": "none.jsonl"}, "output_dir": "none"})
    assert Skeleton(forecast, plain.config, gpu=False).weights == pytest.approx(model.get_memory_footprint(), rel=0.05)

    model.train()
    before = model(ids).logits
    summary = pk.attach(model, pk.QLoRA(r=4))
    assert torch.equal(model(ids).logits, before) and "expert" not in str(summary).replace("experts x", "")
    assert summary.total_parameters == sum(p.numel() for p in plain.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    wanted = model.eval()(ids).logits
    pk.save_adapter(model, tmp_path / "adapter")
    fresh, _ = pk.load(str(saved), quantize="nf4", dtype="float32")
    pk.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.eval()(ids).logits, wanted)

    pk.merge(model)
    assert not any(isinstance(module, (Experts4bit, LoRAExperts)) for module in model.modules())
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    again, _ = pk.load(str(tmp_path / "merged"), dtype="float32")
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in plain.named_parameters()}


def test_a_model_saved_with_experts_in_4_bits_is_refused(saved, tmp_path):
    model, _ = pk.load(str(saved), quantize="nf4", dtype="float32")
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(ConfigError, match="saved while its experts were in 4 bits"):
        pk.load(str(tmp_path / "packed"), dtype="float32")


def test_merging_dequantises_experts_that_have_no_adapter(saved, ids):
    model, _ = pk.load(str(saved), quantize="nf4", dtype="float32")
    summary = pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"]))
    assert "2 expert tensors" in str(summary) and "gate_up_proj: not adapted" in str(summary)
    wanted = model(ids).logits
    pk.merge(model)
    assert not any(isinstance(module, Experts4bit) for module in model.modules())
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_merging_onto_the_original_weights(saved, ids):
    model, _ = pk.load(str(saved), quantize="nf4", dtype="float32")
    pk.attach(model, pk.LoRA(r=2))
    wake(model)
    plain, _ = pk.load(str(saved), dtype="float32")
    layers = adapter_layers(model)
    deltas = {layer.target(name): layer.merged_weight() - layer.experts().dense(layer.part) for name, layer in layers.items() if isinstance(layer, LoRAExperts)}
    originals = {name: layer.original(plain, name).detach() for name, layer in layers.items()}
    pk.merge(model, originals)
    assert len(deltas) == 2
    for name, delta in deltas.items():
        torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name) + delta, rtol=1e-5, atol=1e-6)


def test_experts_left_in_16_bits_beside_4_bit_linears_are_told(saved):
    plain, _ = pk.load(str(saved), dtype="float32")
    config = quant.quantization_config("nf4", torch.float32)
    model = type(plain).from_pretrained(saved, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"})
    assert "2 expert tensors" in (summary := str(pk.attach(model, pk.QLoRA(r=2)))) and "not quantised, as the linears are" in summary


def test_quantising_leaves_what_is_not_known_and_says_so():
    model = torch.nn.Sequential()
    model.known = _experts(dtype=torch.float32)
    model.other = Llama4TextExperts(Llama4TextConfig(hidden_size=16, intermediate_size=16, num_local_experts=2))
    left = quantize_experts(model, "nf4")
    assert isinstance(model.known, Experts4bit) and list(left) == ["other"] and left["other"].startswith("Llama4TextExperts")
    dequantize_experts(model)
    assert type(model.known).__name__ == "MixtralExperts"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpu_computes_what_the_cpu_does(packed):
    experts = _experts("mixtral", torch.float32)
    base = Experts4bit(experts) if packed else experts
    layer = LoRAExperts(LoRAExperts(base, PARTS[0]), PARTS[1])
    for inner in layer.chain():
        inner.add("default", Spec(3, 1.5))
    wake(layer)
    x, index, weights = _inputs(dtype=torch.float32)
    wanted = _grads(layer, layer, x, index, weights)
    layer.cuda()
    for found, right in zip(_grads(layer, layer, x.cuda(), index.cuda(), weights.cuda()), wanted, strict=True):
        torch.testing.assert_close(found.cpu(), right.cpu(), rtol=1e-3, atol=1e-4)  # the gradients of parameters moved with them
    if packed:  # quantising there gives the bytes that quantising here gives, but for ties
        there = quant.pack(_experts("mixtral", torch.float32).down_proj.cuda(), "nf4")
        here = quant.pack(_experts("mixtral", torch.float32).down_proj, "nf4")
        assert (there.codes.cpu() != here.codes).float().mean() < 1e-3


def test_weights_of_experts_that_are_to_train_under_an_adapter_are_refused():
    layer = _layer()
    x, index, weights = _inputs()
    layer.experts().gate_up_proj.requires_grad_(True)
    with pytest.raises(ValueError, match="name the experts in modules_to_save"):
        layer(x, index, weights)


def test_router_weights_may_lie_any_way_round():
    layer = _layer()
    wake(layer)
    x, index, weights = _inputs()
    plain, turned = weights.detach().clone().requires_grad_(), weights.detach().t().contiguous().t().requires_grad_()
    layer(x, index, plain).sum().backward()
    layer(x, index, turned).sum().backward()
    torch.testing.assert_close(turned.grad, plain.grad)
