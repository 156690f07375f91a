"""How A and B start: the base stays bit for bit, step 0 is the base, files are ordinary LoRA, and peft starts at the same."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import quantized_llama, tiny_gpt2, tiny_llama, wake
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import peftkit as pk
from peftkit import quant
from peftkit.checkpoint import ADAPTER_FILE, CONFIG_FILE, adapter_state, checkpoints
from peftkit.config import ConfigError
from peftkit.layers import LoRALinear, adapter_layers, dense_weight
from peftkit.methods import attachment
from peftkit.methods.init import loftq, olora, pissa

TAKEN_OFF = ("pissa", "pissa_niter_4", "olora")
METHODS = {"lora": pk.LoRA, "dora": pk.DoRA}
MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def layers_of(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LoRALinear)}


def attached(model: nn.Module, method: pk.LoRA) -> nn.Module:
    torch.manual_seed(0)
    pk.attach(model, method)
    return model


def aligned(ours: Tensor, theirs: Tensor) -> Tensor:
    """`theirs` (r, ...) with the sign of every row turned to that of `ours`, which a singular vector does not have of its own."""
    sign = torch.sign((ours * theirs).sum(1, keepdim=True))
    return sign * theirs


# ------------------------------------------------------------------------------------------------------------ the starts


def test_gaussian_has_the_standard_deviation_of_peft(ids):
    base = tiny_llama()
    model = attached(tiny_llama(), pk.LoRA(r=5, init="gaussian"))
    a = torch.cat([layer.a().flatten() for layer in layers_of(model).values()])
    assert a.std().item() == pytest.approx(1 / 5, rel=0.05) and a.mean().abs() < 0.02 and a.abs().max() > 0.6
    assert not any(layer.b().any() for layer in layers_of(model).values())
    assert torch.equal(logits(model, ids), logits(base, ids))
    again = attached(tiny_llama(), pk.LoRA(r=5, init="gaussian"))
    assert all(torch.equal(layer.a(), layers_of(again)[name].a()) for name, layer in layers_of(model).items()), "from the seed"


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (6, 6)])
def test_pissa_is_the_best_part_of_its_rank(shape):
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(weight)
    for r in (1, 4, 6):
        a, b = pissa(weight, r, scale=1.7)
        rest = weight - 1.7 * b @ a
        torch.testing.assert_close(torch.linalg.matrix_norm(rest), singular[r:].norm(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-12, atol=0), "both factors take the root"


def test_the_fast_svd_nears_the_exact_one_and_is_the_same_every_time():
    weight = torch.randn(60, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = torch.linalg.svdvals(weight)[8:].norm()
    excess = []
    for iterations in (0, 2, 16):
        torch.manual_seed(iterations)
        a, b = pissa(weight, 8, 1.0, iterations)
        torch.manual_seed(99)
        assert torch.equal(a, pissa(weight, 8, 1.0, iterations)[0]), "not from torch's generator, so that a resumed run starts at the same"
        excess.append((torch.linalg.matrix_norm(weight - b @ a) / best - 1).item())
    assert 0.1 > excess[0] > excess[1] > excess[2] > -1e-12 and excess[2] < 1e-3


def test_olora_starts_at_orthonormal_columns():
    weight = torch.randn(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = olora(weight, 4)
    torch.testing.assert_close(b.T @ b, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(b @ (b.T @ weight), b @ a), "B A is W projected on those columns"
    assert torch.equal(a, a.triu()), "upper triangular"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_the_starts_and_the_outputs_after_training_are_peft_s(base, kind, method, ids):
    """peft takes the start off the base, we off the update: the same A and B give the same outputs."""
    if base == "gpt2" and kind == "olora":
        pytest.skip("peft takes the QR of Conv1D's transposed weight, whose factors then have the wrong shapes")
    make, targets = MAKERS[base], ["c_attn", "c_proj", "c_fc"] if base == "gpt2" else "all-linear"
    ours = attached(make(), METHODS[method](r=4, alpha=12, init=kind))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=kind, use_dora=method == "dora", fan_in_fan_out=base == "gpt2")
    theirs = get_peft_model(make(), config)
    for name, layer in layers_of(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
        torch.testing.assert_close(aligned(layer.a(), a), layer.a().data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(aligned(layer.b().T, b.T), layer.b().T.data, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            layer.a().copy_(a), layer.b().copy_(b)
    wake(ours), wake(theirs)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_training_goes_as_in_peft(kind, ids):
    """10 steps in fp64: the losses are the same but for the fp32 in which peft starts."""
    losses = []
    ours = attached(tiny_llama().double(), pk.LoRA(r=4, alpha=12, init=kind))
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=kind)).double()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        found = []
        for _ in range(10):
            loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[0][-1] < losses[0][0] - 0.05
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# -------------------------------------------------------------------------------------------------------- base and step 0


@pytest.mark.parametrize("init", TAKEN_OFF)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["llama", "gpt2", "nf4", "bf16"])
def test_step_0_is_the_base_and_the_base_stays(base, method, init, saved_llama, ids):
    """For LoRA to the bit; for DoRA to the rounding of m / n, as without a start."""
    model = quantized_llama(saved_llama) if base == "nf4" else tiny_llama().bfloat16() if base == "bf16" else MAKERS[base]()
    quant.protect(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model, ids)
    attached(model, METHODS[method](r=4, alpha=12, init=init))
    for layer in layers_of(model).values():
        assert layer.b().any() and layer.a().any()
    for training in (False, True):
        with torch.no_grad():
            now = model.train(training)(input_ids=ids).logits
        if method == "lora":
            assert torch.equal(now, before)
        else:
            torch.testing.assert_close(now, before, rtol=1e-5, atol=1e-6 if base != "bf16" else 2e-2)
    wake(model)
    assert not torch.allclose(logits(model, ids), before, atol=1e-2)
    with pk.adapters_disabled(model):
        assert torch.equal(logits(model, ids), before)
    pk.detach(model)
    assert torch.equal(logits(model, ids), before)
    assert state.keys() == model.state_dict().keys() and all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_is_learnt_is_not_rounded_away_in_bfloat16(ids):
    """The start is large beside the update: B A - B0 A0 from bfloat16 products would be noise."""
    model = attached(tiny_llama().bfloat16(), pk.LoRA(r=8, alpha=8, init="pissa", target_modules=["q_proj"]))
    layer = next(iter(layers_of(model).values()))
    exact = {"a": layer.a().double(), "b": layer.b().double()}
    with torch.no_grad():
        for parameter in (layer.a(), layer.b()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 1e-3)
    delta = layer.b().double() @ layer.a().double() - exact["b"] @ exact["a"]  # (out, in)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    a, b = (factor.bfloat16() for factor in layer.plain_factors("default"))
    update = ((x @ a.T) @ b.T).double()
    wanted = x.double() @ delta.T
    naive = ((x @ layer.a().bfloat16().T) @ layer.b().bfloat16().T).double() - ((x @ exact["a"].bfloat16().T) @ exact["b"].bfloat16().T).double()
    assert (update - wanted).norm() < 0.02 * wanted.norm() and (naive - wanted).norm() > 0.2 * wanted.norm()


@pytest.mark.parametrize("init", TAKEN_OFF)
@pytest.mark.parametrize("method", METHODS)
def test_only_a_and_b_train(method, init, ids):
    model = attached(tiny_llama(), METHODS[method](r=4, init=init, target_modules=["q_proj"]))
    roles = {"A": 2 * 4 * 64, "B": 2 * 4 * 64} | ({"magnitude": 2 * 64} if method == "dora" else {})
    assert pk.describe(model).trainable == roles
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for layer in layers_of(model).values():
        assert layer.a().grad.any() and layer.b().grad.any(), "A learns from the first step on, since B is not zero"


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", TAKEN_OFF)
@pytest.mark.parametrize("method", METHODS)
def test_the_file_is_an_ordinary_lora_of_twice_the_rank(method, init, rslora, tmp_path, ids):
    options = dict(rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5.0})
    model = attached(tiny_llama(), METHODS[method](r=4, alpha=12, rslora=rslora, init=init, **options))
    wake(model)
    wanted = logits(model, ids)
    pk.save_adapter(model, tmp_path / "adapter")
    state, config = load_file(tmp_path / "adapter" / ADAPTER_FILE), json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert config["r"] == 8 and config["init_lora_weights"] is True and config["use_rslora"] is rslora
    assert config["rank_pattern"] == {"q_proj": 6} and config["lora_alpha"] == pytest.approx(12 * math.sqrt(2) if rslora else 24)
    assert state["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (8, 64)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", autocast_adapter_dtype=False)
    loaded = pk.load_adapter(tiny_llama(), tmp_path / "adapter")
    for other in (theirs, loaded):
        torch.testing.assert_close(logits(other, ids), wanted, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "door")
    door = load_file(tmp_path / "door" / ADAPTER_FILE)
    assert door.keys() == state.keys() and all(torch.equal(door[key], state[key]) for key in state), "transformers' save_pretrained writes the same"
    torch.testing.assert_close(logits(pk.load_adapter(tiny_llama(), tmp_path / "door"), ids), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", TAKEN_OFF)
@pytest.mark.parametrize("method", METHODS)
def test_a_start_is_merged_and_copied(method, init, ids):
    model = attached(tiny_llama(), METHODS[method](r=4, alpha=12, init=init))
    wake(model)
    wanted = logits(model, ids)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), wanted)
    pk.merge(other)
    torch.testing.assert_close(logits(other, ids), wanted, rtol=1e-5, atol=1e-6)
    assert other.state_dict().keys() == tiny_llama().state_dict().keys()


def test_a_start_follows_the_model_to_another_dtype(ids):
    model = attached(tiny_llama(), pk.LoRA(r=4, alpha=12, init="pissa"))
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        with pk.adapters_disabled(model):
            base = logits(model, ids)
        assert torch.equal(logits(model, ids), base), "cast alike, A and A0 still cancel"


def test_a_file_of_a_start_does_not_fill_the_adapter_it_came_from(tmp_path, ids):
    """It has twice the rank; the error says so, and the adapter stays as it is."""
    model = attached(tiny_llama(), pk.LoRA(r=4, init="pissa"))
    wake(model)
    pk.save_adapter(model, tmp_path / "adapter")
    wanted = logits(model, ids)
    with pytest.raises(RuntimeError, match=r"lora_A.weight: \(8, 64\) in the file, \(4, 64\) here"):
        pk.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model, ids), wanted)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new_in_peft"])
def test_files_of_peft_whose_base_was_changed_are_refused(start, tmp_path):
    pk.save_adapter(attached(tiny_llama(), pk.LoRA(r=4)), tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
    with pytest.raises(ConfigError, match=f"init_lora_weights: '{start}' changed the base it was trained on; convert it with peft first"):
        pk.load_adapter(tiny_llama(), tmp_path / "adapter")


@pytest.mark.parametrize("start,ours", [(True, "kaiming"), (False, "kaiming"), ("gaussian", "gaussian"), ("eva", "kaiming"), ("orthogonal", "kaiming")])
def test_starts_of_peft_that_leave_the_base_are_read(start, ours, tmp_path):
    pk.save_adapter(attached(tiny_llama(), pk.LoRA(r=4, init="gaussian")), tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG_FILE
    config = json.loads(path.read_text())
    assert config["init_lora_weights"] == "gaussian"
    path.write_text(json.dumps(config | {"init_lora_weights": start}))
    model = pk.load_adapter(tiny_llama(), tmp_path / "adapter")
    assert attachment(model).methods[0].init == ours


# --------------------------------------------------------------------------------------------------------------- resume


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    def recipe(folder, steps: int) -> dict:
        return {
            "model": {"name": "builtin:tiny", "dtype": "float32"},
            "methods": [{"lora": {"r": 2, "alpha": 4, "init": "pissa_niter_2", "target_modules": ["q_proj", "v_proj"]}}],
            "data": {"train": "builtin:tool-calls/train", "eval": "builtin:tool-calls/test", "max_length": 64, "train_rows": 8, "eval_rows": 2},
            "train": {"learning_rate": 2.0e-3, "max_steps": steps, "batch_size": 2, "save_every": 2, "lr_scheduler": "constant"},
            "eval": {"metrics": ["loss"], "before": False},
            "output_dir": str(folder),
        }

    pk.run(recipe(tmp_path / "whole", 4))
    pk.run(recipe(tmp_path / "parts", 4))
    for path in checkpoints(tmp_path / "parts" / "checkpoints")[1:]:  # as if it had been stopped after two steps
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (tmp_path / "parts" / "result.json").unlink()
    (tmp_path / "parts" / "adapter" / ADAPTER_FILE).unlink()
    torch.manual_seed(12345)
    pk.run(recipe(tmp_path / "parts", 4), resume=True)
    whole, parts = (load_file(tmp_path / name / "adapter" / ADAPTER_FILE) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


# --------------------------------------------------------------------------------------------------------------- LoftQ


def error(model: nn.Module, original: nn.Module) -> dict[str, float]:
    """|W - merged| by module."""
    found = {}
    for name, layer in layers_of(model).items():
        found[name] = (original.get_submodule(name).weight - layer.merged_weight()).norm().item()
    return found


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_loftq_is_the_best_part_of_what_quantising_lost(scale):
    """A and B as peft's decomposition has them, with 1/s folded in."""
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    quantized = (weight * 4).round() / 4
    a, b = loftq(weight, quantized, 5, scale)
    theirs = _low_rank_decomposition(weight - quantized, reduced_rank=5)
    wanted_a, wanted_b = theirs["R"] / math.sqrt(scale), theirs["L"] / math.sqrt(scale)
    torch.testing.assert_close(aligned(a, wanted_a), a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aligned(b.T, wanted_b.T), b.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight - quantized - scale * b @ a, weight - quantized - theirs["L"] @ theirs["R"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [pk.QLoRA, pk.DoRA])
def test_loftq_nears_the_16_bit_model(method, saved_llama, tmp_path, ids):
    original = tiny_llama()
    plain, model = quantized_llama(saved_llama), quantized_llama(saved_llama)
    attached(plain, method(r=16, alpha=48))
    attached(model, method(r=16, alpha=48, init="loftq"))
    lost, left = error(plain, original), error(model, original)
    assert all(left[name] < 0.85 * lost[name] for name in lost)
    for name, layer in layers_of(model).items():
        quantized = dense_weight(layer.base_layer)
        singular = torch.linalg.svdvals(original.get_submodule(name).weight - quantized)
        assert left[name] == pytest.approx(singular[16:].norm().item(), rel=1e-3), "the best that rank 16 can do"
    wanted = logits(original, ids)
    assert (logits(model, ids) - wanted).norm() < 0.9 * (logits(plain, ids) - wanted).norm()
    pk.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert config["r"] == 16 and config["init_lora_weights"] is True, "to peft a LoRA as any other, on the same 4-bit base"
    base = quantized_llama(saved_llama)
    quant.protect(base)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=1e-5, atol=1e-6)
    pk.detach(model)
    assert torch.equal(logits(model, ids), logits(unadapted(saved_llama), ids)), "the 4-bit base stays"


def unadapted(folder) -> nn.Module:
    model = quantized_llama(folder)
    quant.protect(model)
    return model


def test_loftq_reads_shards_given_weights_and_other_spellings(saved_llama, tmp_path):
    wanted = adapter_state(attached(quantized_llama(saved_llama), pk.QLoRA(r=4, init="loftq")))
    model = quantized_llama(saved_llama)
    tiny_llama().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    state = load_file(saved_llama / "model.safetensors")
    (tmp_path / "body").mkdir()
    save_file({key.removeprefix("model."): tensor for key, tensor in state.items()}, tmp_path / "body" / "model.safetensors")
    for place in ("shards", "body"):
        attached(model, pk.QLoRA(r=4, init="loftq", init_weights=str(tmp_path / place)))
        found = adapter_state(model)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        pk.detach(model)


def test_loftq_without_the_right_weights(saved_llama, tmp_path):
    tiny_llama(seed=7).save_pretrained(tmp_path / "other")
    model = quantized_llama(saved_llama)
    modules = dict(model.named_modules())
    (tmp_path / "empty").mkdir()
    state = load_file(saved_llama / "model.safetensors")
    for folder, harm in (("missing", lambda s: s.pop("model.layers.0.self_attn.q_proj.weight")), ("packed", lambda s: s.update(pack(s)))):
        harmed = dict(state)
        harm(harmed)
        (tmp_path / folder).mkdir()
        save_file(harmed, tmp_path / folder / "model.safetensors")
    for place, message in [
        ("other", "other does not hold the weights that model.layers.0.self_attn.q_proj was quantised from"),
        ("empty", "empty holds no model.safetensors"),
        ("missing", "missing holds no model.layers.0.self_attn.q_proj.weight"),
        ("packed", r"is uint8 \(2048, 1\), where W \(64, 64\) before quantisation is needed"),
    ]:
        with pytest.raises(ValueError, match=message):
            pk.attach(model, pk.QLoRA(r=4, init="loftq", init_weights=str(tmp_path / place)))
        assert dict(model.named_modules()) == modules
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(ValueError, match="this model does not say where it was loaded from; give init_weights"):
        pk.attach(model, pk.QLoRA(r=4, init="loftq"))
    with pytest.raises(ValueError, match="loftq makes up for what a base in 4 bits has lost, and no target is in 4 bits"):
        pk.attach(tiny_llama(), pk.LoRA(r=4, init="loftq"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loftq_is_peft_s_but_for_the_scale(saved_llama):
    """peft quantises and decomposes on a GPU only."""
    from peft import replace_lora_weights_loftq

    def base() -> nn.Module:
        options = quant.quantization_config("nf4", torch.float32)
        return LlamaForCausalLM.from_pretrained(saved_llama, dtype=torch.float32, quantization_config=options, device_map={"": "cuda"})

    ours = attached(base(), pk.QLoRA(r=4, alpha=16, init="loftq"))
    theirs = get_peft_model(base(), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    replace_lora_weights_loftq(theirs, model_path=str(saved_llama / "model.safetensors"))
    for name, layer in layers_of(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
        torch.testing.assert_close(4 * layer.b() @ layer.a(), b @ a, rtol=1e-3, atol=1e-5)


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2048, 1, dtype=torch.uint8)}


# --------------------------------------------------------------------------------------------------------- what cannot be


def test_a_start_needs_the_rank_and_a_linear():
    model = tiny_llama()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"init: pissa takes r = 40 directions of the weight of model.layers.0.self_attn.k_proj, which has 32; lower r"):
        pk.attach(model, pk.LoRA(r=40, init="pissa"))
    with pytest.raises(ValueError, match=r"init: olora is for linears, and model\.embed_tokens is a Embedding"):
        pk.attach(model, pk.LoRA(r=4, init="olora", target_modules=["q_proj", "embed_tokens"]))
    assert dict(model.named_modules()) == modules


def test_a_weight_of_nothing_still_learns(ids):
    """A and B both zero would have no gradient, ever."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        model.model.layers[1].self_attn.q_proj.weight[:, 3:] = 0  # rank 3 of 4
    attached(model, pk.LoRA(r=4, init="pissa", target_modules=["q_proj"]))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for layer in layers_of(model).values():
        assert layer.a().any(1).all() and layer.b().grad.any(0).all()


def test_stacked_starts_add_up(ids):
    model = attached(tiny_llama(), pk.LoRA(r=4, alpha=12, init="pissa"))
    pk.attach(model, pk.LoRA(r=2, alpha=2, init="olora"), adapter="other")
    base = logits(tiny_llama(), ids)
    pk.set_adapter(model, ["default", "other"])
    assert torch.equal(logits(model, ids), base)
    wake(model)
    both = {name: layer.merged_weight() for name, layer in layers_of(model).items()}
    for adapter in ("default", "other"):
        pk.set_adapter(model, adapter)
        for name, layer in layers_of(model).items():
            both[name] = both[name] - layer.delta()
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(both[name], layer.base_layer.weight.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_state_dict_holds_the_start_that_is_taken_off(method, ids):
    """Keys and shapes of an adapter that begins elsewhere are the same, and what it computes is not: a strict load must not pass."""
    model = tiny_llama()
    pk.attach(model, pk.LoRA(r=4, init=method))
    wake(model)
    wanted, state = model.eval()(input_ids=ids).logits, model.state_dict()
    again = tiny_llama()
    pk.attach(again, pk.LoRA(r=4, init=method))
    again.load_state_dict(state)
    assert torch.equal(again.eval()(input_ids=ids).logits, wanted)
    other = tiny_llama()
    pk.attach(other, pk.LoRA(r=4))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*starts\.default\.a"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*starts\.default\.a"):
        again.load_state_dict(other.state_dict())
