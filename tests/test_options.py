"""Options that users of peft rely on: each is consumed, has its effect, and goes both ways through peft's files."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import quantized_llama, tiny_gpt2, tiny_llama, wake
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaModel

import peftkit as pk
from peftkit.checkpoint import ADAPTER_FILE, CONFIG_FILE
from peftkit.config import ConfigError
from peftkit.layers import LoRALinear, TrainedBias, adapter_layers, trainable_parameters
from peftkit.methods import attachment, from_recipe


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def attached(model: nn.Module, method: pk.LoRA) -> nn.Module:
    torch.manual_seed(0)
    pk.attach(model, method)
    return model


def config_of(folder) -> dict:
    return json.loads((folder / CONFIG_FILE).read_text())


def exchanged(make, method: pk.LoRA, folder, ids: Tensor) -> tuple[nn.Module, nn.Module]:
    """Our trained adapter in ours and, through its file, in peft; their outputs are the same and not the base's."""
    model = attached(make(), method)
    wake(model)
    pk.save_adapter(model, folder)
    theirs = PeftModel.from_pretrained(make(), folder, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model, ids), logits(make(), ids), atol=1e-2)
    again = pk.load_adapter(make(), folder)
    assert torch.equal(logits(again, ids), logits(model, ids))
    return model, theirs


def received(make, config: LoraConfig, folder, ids: Tensor) -> nn.Module:
    """peft's trained adapter in ours, through its file: the same outputs."""
    torch.manual_seed(0)
    theirs = get_peft_model(make(), config)
    wake(theirs)
    theirs.save_pretrained(folder)
    model = pk.load_adapter(make(), folder)
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    return model


# ------------------------------------------------------------------------------------------------------------- patterns

PATTERNS = dict(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 6, "down_proj": 3}, alpha_pattern={r"layers.0.self_attn.k_proj": 3, "up_proj|q_proj": 7.5})
CLEAR = dict(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 6}, alpha_pattern={"up_proj|q_proj": 7.5})  # no two match the same module
# name ending -> (rank, alpha) as the patterns above decide, the first that matches
DECIDED = {
    "layers.0.self_attn.q_proj": (2, 7.5), "layers.1.self_attn.q_proj": (2, 7.5), "layers.0.self_attn.k_proj": (4, 3), "layers.1.self_attn.k_proj": (4, 12),
    "layers.0.mlp.up_proj": (4, 7.5), "layers.1.mlp.up_proj": (6, 7.5), "layers.0.mlp.down_proj": (3, 12), "layers.1.mlp.down_proj": (6, 12),
    "layers.0.self_attn.o_proj": (4, 12),
}  # fmt: skip


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_by_pattern(rslora):
    model = attached(tiny_llama(), pk.LoRA(r=4, alpha=12, rslora=rslora, **PATTERNS))
    layers = adapter_layers(model)
    for name, (r, alpha) in DECIDED.items():
        layer = layers[f"model.{name}"]
        assert (layer.a().shape[0], layer.b().shape[1]) == (r, r), name
        assert layer.scale == pytest.approx(alpha / (math.sqrt(r) if rslora else r)), name


def test_patterns_mean_what_they_mean_to_peft():
    options = {"use_rslora": True, **PATTERNS}
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **options)).base_model.model
    for name, layer in adapter_layers(attached(tiny_llama(), pk.LoRA(r=4, alpha=12, rslora=True, **PATTERNS))).items():
        other = theirs.get_submodule(name)
        assert layer.a().shape == other.lora_A["default"].weight.shape and layer.scale == other.scaling["default"], name


@pytest.mark.parametrize("method", [pk.LoRA, pk.DoRA])
def test_patterns_through_the_files(method, tmp_path, ids):
    exchanged(tiny_llama, method(r=4, alpha=12, **PATTERNS), tmp_path / "ours", ids)
    assert config_of(tmp_path / "ours")["alpha_pattern"] == PATTERNS["alpha_pattern"] and config_of(tmp_path / "ours")["r"] == 4
    theirs = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", use_dora=method is pk.DoRA, use_rslora=True, **CLEAR)
    model = received(tiny_llama, theirs, tmp_path / "theirs", ids)
    assert adapter_layers(model)["model.layers.1.mlp.up_proj"].scale == pytest.approx(7.5 / math.sqrt(6))
    pk.save_adapter(model, tmp_path / "again")
    assert {field: config_of(tmp_path / "again")[field] for field in CLEAR} == CLEAR


def test_patterns_that_overlap_are_written_by_whole_names(tmp_path):
    """peft's files sort them, after which another one may be the first that matches."""
    model = attached(tiny_llama(), pk.LoRA(r=4, **PATTERNS))
    pk.save_adapter(model, tmp_path / "ours")
    written = config_of(tmp_path / "ours")["rank_pattern"]
    assert sorted(PATTERNS["rank_pattern"]) != list(PATTERNS["rank_pattern"]), "the case that it is about"
    assert written[r"^model\.layers\.1\.mlp\.down_proj"] == 6 and written[r"^model\.layers\.0\.mlp\.down_proj"] == 3 and len(written) == 6


@pytest.mark.parametrize(
    "options,message",
    [
        ({"rank_pattern": {"q_prj": 2}}, r"rank_pattern: 'q_prj' decides over none of the adapted modules; did you mean 'q_proj'\? \(there are: down_proj, "),
        ({"alpha_pattern": {"proj": 2}}, "alpha_pattern: 'proj' decides over none"),  # the end of a name begins after a dot
        ({"rank_pattern": {".*proj": 2, "q_proj": 3}}, "'q_proj' decides over none"),  # the first takes them all
        ({"rank_pattern": {"q_proj": 2}, "target_modules": ["v_proj"]}, "'q_proj' decides over none"),
    ],
)
def test_a_pattern_without_effect_is_an_error(options, message):
    model = tiny_llama()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        pk.attach(model, pk.LoRA(r=4, **options))
    assert dict(model.named_modules()) == modules


def test_a_pattern_without_effect_in_peft_s_file_is_passed_over(tmp_path, ids):
    received(tiny_llama, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], rank_pattern={"q_proj": 2}), tmp_path / "theirs", ids)
    config = config_of(tmp_path / "theirs")
    config["rank_pattern"] = {"nothing": 7, "q_proj": 2, ".*q_proj": 9}  # peft warns of the first, and the last never decides
    (tmp_path / "theirs" / CONFIG_FILE).write_text(json.dumps(config))
    model = pk.load_adapter(tiny_llama(), tmp_path / "theirs")
    assert attachment(model).methods[0].rank_pattern == {"q_proj": 2}


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj: expected a number above 0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern.q_proj: expected a whole number"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern.q_proj: expected a number above 0"),
        ({"rank_pattern": {"(": 2}}, r"'\(' is no regular expression"),
        ({"layers_pattern": "layers"}, "layers_pattern says where layers_to_transform counts"),
        ({"bias": "some"}, "bias: expected 'none', 'all' or 'lora_only'"),
        ({"init": "pisa"}, "unknown init 'pisa'; did you mean 'pissa'"),
        ({"init": "pissa_niter_<n>"}, "unknown init"),
        ({"init_weights": "somewhere"}, "init_weights is read by init: loftq only, and init is kaiming"),
    ],
)
def test_wrong_options_are_refused_in_a_recipe(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_recipe([{"lora": fields}])


def test_options_stand_in_recipes_under_all_three_names():
    fields = {
        "r": 4,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "layers_to_transform": [0, 1],
        "bias": "lora_only",
        "init": "pissa_niter_4",
    }
    for name in ("lora", "dora", "qlora"):
        [method] = from_recipe([{name: fields}])
        assert {key: getattr(method, key) for key in fields} == fields


# --------------------------------------------------------------------------------------------------------------- layers


def layers_adapted(model: nn.Module) -> set[str]:
    return {name for name, layer in adapter_layers(model).items() if isinstance(layer, LoRALinear)}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*(q_proj|down_proj)"])
@pytest.mark.parametrize("chosen,pattern", [(1, None), ([0], None), ([0, 2], "layers"), (2, ["h", "layers"])])
def test_only_these_layers_are_adapted(chosen, pattern, targets):
    model = tiny_llama(num_hidden_layers=3)
    everywhere = layers_adapted(attached(tiny_llama(num_hidden_layers=3), pk.LoRA(r=2, target_modules=targets)))
    pk.attach(model, pk.LoRA(r=2, target_modules=targets, layers_to_transform=chosen, layers_pattern=pattern))
    wanted = [chosen] if isinstance(chosen, int) else chosen
    assert layers_adapted(model) == {name for name in everywhere if int(name.split(".")[2]) in wanted} != set()


def test_layers_of_a_body_without_a_head_and_of_another_architecture():
    body = LlamaModel(tiny_llama().config)
    pk.attach(body, pk.LoRA(r=2, layers_to_transform=1))
    assert {name.split(".")[1] for name in layers_adapted(body)} == {"1"}, "names such as layers.1.mlp.up_proj, where peft finds none"
    model = tiny_gpt2()
    pk.attach(model, pk.LoRA(r=2, layers_to_transform=0, layers_pattern="h"))
    assert {".".join(name.split(".")[:3]) for name in layers_adapted(model)} == {"transformer.h.0"}


@pytest.mark.parametrize(
    "options,message",
    [
        ({"layers_to_transform": 2}, r"layers_to_transform: no target stands in layer 2 \(there are: 0, 1\)"),
        ({"layers_to_transform": [0, -1]}, "no target stands in layer -1"),
        ({"layers_to_transform": []}, "layers_to_transform is an empty list"),
        ({"layers_to_transform": 0, "layers_pattern": "layer"}, r"no target stands in a list of layers named layer; did you mean 'layers'"),
        ({"layers_to_transform": 0, "target_modules": ["lm_head"]}, r"no target stands in a list of layers \(there are: none\)"),
    ],
)
def test_layers_that_are_not_there(options, message):
    model = tiny_llama()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        pk.attach(model, pk.LoRA(r=2, **options))
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("chosen,pattern", [(1, None), ([1], "layers")])
def test_layers_through_the_files(chosen, pattern, tmp_path, ids):
    options = {"layers_to_transform": chosen, "layers_pattern": pattern}
    model, theirs = exchanged(tiny_llama, pk.LoRA(r=4, alpha=12, **options), tmp_path / "ours", ids)
    config = config_of(tmp_path / "ours")
    assert (config["layers_to_transform"], config["layers_pattern"]) == (chosen, pattern) and set(config["target_modules"]) >= {"q_proj", "down_proj"}
    there = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert there == layers_adapted(model)
    targets = ["q_proj", "up_proj"]
    got = received(tiny_llama, LoraConfig(r=4, lora_alpha=12, target_modules=targets, **options), tmp_path / "theirs", ids)
    assert layers_adapted(got) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}


def test_layers_that_peft_would_count_otherwise_are_written_by_name(tmp_path):
    """Without a layers_pattern peft finds no number in `layers.1.mlp...`."""
    body = LlamaModel(tiny_llama().config)
    pk.attach(body, pk.LoRA(r=2, layers_to_transform=1))
    pk.save_adapter(body, tmp_path / "body")
    theirs = PeftModel.from_pretrained(LlamaModel(tiny_llama().config), tmp_path / "body")
    assert {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")} == layers_adapted(body)


# --------------------------------------------------------------------------------------------------------------- biases

MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def gpt2_with_biases() -> nn.Module:
    model = tiny_gpt2()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


MAKERS["gpt2"] = gpt2_with_biases
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}


def bias_keys(make, targets: list[str], bias: str) -> set[str]:
    """The names of the biases that peft would train."""
    with_bias = {name for name, _ in make().named_parameters() if name.endswith("bias")}
    return {name for name in with_bias if bias == "all" or name.split(".")[-2] in targets}


@pytest.mark.parametrize("method", [pk.LoRA, pk.DoRA])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("kind", MAKERS)
def test_biases_train_in_copies_and_the_base_keeps_its_own(kind, bias, method, ids):
    make, targets = MAKERS[kind], TARGETS[kind]
    model = make()
    originals = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    base = logits(model, ids)
    summary = attached(model, method(r=4, alpha=12, target_modules=targets, bias=bias)) and pk.describe(model)
    assert summary.trainable["bias"] == sum(originals[name][0].numel() for name in bias_keys(make, targets, bias))
    if method is pk.LoRA:
        assert torch.equal(logits(model, ids), base), "step 0 is the base, bit for bit"
    optimizer = pk.build_optimizer(model, learning_rate=1e-2)
    before = {name: parameter.detach().clone() for name, role, parameter in trainable_parameters(model) if role == "bias"}
    for _ in range(2):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items()), "every bias moved"
    with pk.adapters_disabled(model):
        assert torch.equal(logits(model, ids), base)
    trained = logits(model, ids)
    pk.detach(model)
    assert dict(model.named_modules()) == modules
    assert all(parameter is originals[name][0] and torch.equal(parameter, originals[name][1]) for name, parameter in model.named_parameters())
    assert torch.equal(logits(model, ids), base) and not torch.equal(trained, base)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("method", [pk.LoRA, pk.DoRA])
@pytest.mark.parametrize("kind", MAKERS)
def test_bias_gradients_are_peft_s(kind, method, bias, ids):
    make, targets = MAKERS[kind], TARGETS[kind]
    ours = attached(make().double(), method(r=4, alpha=12, target_modules=targets, bias=bias))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, bias=bias, use_dora=method is pk.DoRA, fan_in_fan_out=kind == "gpt2")
    theirs = get_peft_model(make().double(), config, autocast_adapter_dtype=False)
    for name, layer in adapter_layers(ours).items():
        if isinstance(layer, LoRALinear):
            other = theirs.base_model.model.get_submodule(name)
            with torch.no_grad():
                other.lora_A["default"].weight.copy_(layer.a())
                for b in (other.lora_B["default"].weight, layer.b()):
                    b.copy_(torch.sin(torch.arange(b.numel())).view(b.shape))
    for model in (ours, theirs):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    for name, layer in adapter_layers(ours).items():
        grads = {trained.role: trained.parameter.grad for trained in layer.role_parameters()}
        other = theirs.base_model.model.get_submodule(name)
        wanted = other.base_layer.bias.grad if isinstance(layer, LoRALinear) else other.bias.grad
        torch.testing.assert_close(grads["bias"], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("kind", MAKERS)
def test_biases_through_the_files(kind, bias, tmp_path, ids):
    make, targets = MAKERS[kind], TARGETS[kind]
    model, _ = exchanged(make, pk.LoRA(r=4, alpha=12, target_modules=targets, bias=bias), tmp_path / "ours", ids)
    assert config_of(tmp_path / "ours")["bias"] == bias
    written = {key for key in load_file(tmp_path / "ours" / ADAPTER_FILE) if key.endswith("bias")}
    assert {key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in written} == bias_keys(make, targets, bias)
    assert all((".base_layer." in key) == (key.split(".base_layer")[0].split(".")[-1] in targets) for key in written)
    model.save_pretrained(tmp_path / "door")
    direct, door = load_file(tmp_path / "ours" / ADAPTER_FILE), load_file(tmp_path / "door" / ADAPTER_FILE)
    assert door.keys() == direct.keys() and all(torch.equal(door[key], direct[key]) for key in direct)
    received(make, LoraConfig(r=4, lora_alpha=12, target_modules=targets, bias=bias, fan_in_fan_out=kind == "gpt2"), tmp_path / "theirs", ids)


@pytest.mark.parametrize("method", [pk.LoRA, pk.DoRA])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("kind", MAKERS)
def test_biases_are_merged_and_copied(kind, bias, method, ids):
    make = MAKERS[kind]
    model = attached(make(), method(r=4, alpha=12, target_modules=TARGETS[kind], bias=bias))
    wake(model)
    trained = logits(model, ids)
    other = copy.deepcopy(model)
    state = model.state_dict()
    wake(other, seed=8)
    assert not torch.allclose(logits(other, ids), trained, atol=1e-3)
    other.load_state_dict(state)
    assert torch.equal(logits(other, ids), trained)
    pk.merge(other)
    torch.testing.assert_close(logits(other, ids), trained, rtol=1e-5, atol=1e-5)
    assert other.state_dict().keys() == make().state_dict().keys() and not any(isinstance(module, TrainedBias) for module in other.modules())


def test_biases_of_a_half_precision_base_train_in_fp32():
    """0.5 + 1e-4 is 0.5 in bfloat16: trained in place, as peft does, the bias would not move."""
    model = tiny_llama().bfloat16()
    model.model.layers[0].self_attn.q_proj.bias.data.fill_(0.5)
    pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"], bias="lora_only"))
    biases = [parameter for _, role, parameter in trainable_parameters(model) if role == "bias"]
    assert {parameter.dtype for parameter in biases} == {torch.float32}
    with torch.no_grad():
        biases[0].add_(1e-4)
    assert (biases[0] == 0.5001).all()
    layer = adapter_layers(model)["model.layers.0.self_attn.q_proj"]
    assert torch.equal(layer.merged().bias, torch.full((64,), 0.5, dtype=torch.bfloat16))


def test_biases_beside_4_bit_weights(saved_llama, tmp_path, ids):
    model = attached(quantized_llama(saved_llama), pk.QLoRA(r=4, target_modules=["q_proj"], bias="lora_only"))
    wake(model)
    wanted = logits(model, ids)
    pk.save_adapter(model, tmp_path / "adapter")
    loaded = pk.load_adapter(quantized_llama(saved_llama), tmp_path / "adapter")
    assert torch.equal(logits(loaded, ids), wanted)
    pk.merge(loaded)
    torch.testing.assert_close(logits(loaded, ids), wanted, rtol=1e-4, atol=1e-4)


def test_modules_without_a_bias_train_none():
    model = attached(tiny_llama(bias=False), pk.LoRA(r=2, bias="lora_only"))
    assert "bias" not in pk.describe(model).trainable


def test_one_adapter_trains_biases():
    model = attached(tiny_llama(), pk.LoRA(r=2, target_modules=["q_proj"], bias="lora_only"))
    with pytest.raises(ValueError, match="adapter 'default' trains biases already"):
        pk.attach(model, pk.LoRA(r=2, target_modules=["v_proj"], bias="lora_only"), adapter="other")
    with pytest.raises(ValueError, match="stands alone"):
        pk.attach(model, pk.LoRA(r=2, bias="all"), adapter="other")
    pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"]), adapter="other")
    pk.set_adapter(model, "other")
    assert not any(role == "bias" for _, role, _ in trainable_parameters(model))
    everything = attached(tiny_llama(), pk.LoRA(r=2, target_modules=["q_proj"], bias="all"))
    with pytest.raises(ValueError, match="stands alone"):
        pk.attach(everything, pk.LoRA(r=2), adapter="other")


def test_a_resting_adapter_s_biases_rest_with_it(ids):
    model = attached(tiny_llama(), pk.LoRA(r=2, target_modules=["q_proj"], bias="lora_only"))
    wake(model)
    base = logits(tiny_llama(), ids)
    pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"]), adapter="fresh")
    assert not torch.equal(logits(model, ids), base)
    pk.set_adapter(model, "fresh")
    assert torch.equal(logits(model, ids), base)


class Holder(nn.Module):
    """A bias beside another module, which no copy of a bias can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.bias


def test_biases_that_cannot_be_reached_are_said():
    model = nn.Sequential(Holder(), nn.Conv1d(4, 4, 1))
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"bias: 0 \(Holder\) holds a bias beside other modules"):
        pk.attach(model, pk.LoRA(r=2, bias="all"))
    with pytest.raises(ValueError, match="bias: the bias of 1, a Conv1d, cannot be trained"):
        pk.attach(model, pk.LoRA(r=2, target_modules=["1"], bias="lora_only"))
    assert dict(model.named_modules()) == modules


def test_the_magnitude_and_biases_keep_the_rate_of_a():
    model = tiny_llama()
    pk.attach(model, [pk.DoRA(r=2, target_modules=["q_proj"], bias="lora_only"), pk.LoRAPlus(ratio=4)])
    rates = {group["role"]: group["lr"] for group in pk.build_optimizer(model, learning_rate=1e-3).param_groups}
    assert rates == pytest.approx({"A": 1e-3, "B": 4e-3, "magnitude": 1e-3, "bias": 1e-3})
