"""Merging gives a plain model that computes what the adapted one computed, and says so where it does not."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import quantized_llama, tiny_gpt2, tiny_llama, wake
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import peftkit as pk
from peftkit import quant
from peftkit.layers import LoRALinear, adapter_layers, dense_weight
from peftkit.merge import MergeCheck, MergeError, compare_logits, merge_verified

METHODS = {"lora": pk.LoRA, "dora": pk.DoRA}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def attached(model: nn.Module, method: str = "lora", **options) -> nn.Module:
    torch.manual_seed(0)
    pk.attach(model, METHODS[method](**{"r": 4, "alpha": 12} | options))
    wake(model)
    return model


def assert_plain(model: nn.Module) -> None:
    """No module, mark or hook of peftkit, peft or bitsandbytes is left."""
    for name, module in model.named_modules():
        assert not type(module).__module__.startswith(("peftkit", "peft", "bitsandbytes")), name
        assert not module._forward_hooks and not module._forward_pre_hooks, name
    assert not {"_peftkit", "peft_config", "_hf_peft_config_loaded", "hf_quantizer", "is_quantized", "is_loaded_in_4bit"} & set(vars(model))
    assert not hasattr(model.config, "quantization_config") and "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["llama", "gpt2", "nf4", "fp4", "int8"])
def test_a_merged_model_is_plain_and_computes_the_same(base, method, saved_llama, tmp_path, ids):
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[base]() if base in ("llama", "gpt2") else quantized_llama(saved_llama, base)
    names, start = dict(model.named_modules()).keys(), logits(unpacked(model), ids)
    attached(model, method)
    adapted, bound = logits(model, ids), 5e-2 if base == "int8" else 1e-5
    assert (adapted - start).abs().max() > 0.05
    assert pk.merge(model) is model
    assert_plain(model)
    assert dict(model.named_modules()).keys() == names
    merged = logits(model, ids)
    torch.testing.assert_close(merged, adapted, rtol=bound, atol=bound)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)

    model.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, ids), merged)
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), generated)


def unpacked(model: nn.Module) -> nn.Module:
    quant.protect(model)
    return model


@pytest.mark.parametrize("base", ["llama", "nf4"])
def test_bf16_bases_merge_within_their_rounding(base, saved_llama, ids):
    model = tiny_llama().bfloat16() if base == "llama" else quantized_llama(saved_llama, "nf4", torch.bfloat16)
    attached(model)
    check = merge_verified(model, ids)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert check.kl < 1e-3 and check.top1_agreement > 0.8


def test_merged_modules_keep_their_kind_and_bias():
    model = attached(tiny_gpt2())
    merged = {name: layer.merged_weight() for name, layer in adapter_layers(model).items()}
    biases = {name: layer.bias.clone() for name, layer in adapter_layers(model).items()}
    pk.merge(model)
    for name, weight in merged.items():
        module = model.get_submodule(name)
        assert type(module) is Conv1D and module.weight.is_contiguous()
        assert torch.equal(module.weight, weight.T) and torch.equal(module.bias, biases[name])


def test_layers_that_were_not_adapted_are_dequantised_too(saved_llama, ids):
    model = attached(quantized_llama(saved_llama), target_modules=["q_proj"])
    wanted = {name: dense_weight(module) for name, module in quant.quantized_modules(model).items() if not name.endswith("base_layer")}
    adapted = logits(model, ids)
    pk.merge(model)
    assert_plain(model)
    assert len(wanted) == 12
    for name, weight in wanted.items():
        assert type(model.get_submodule(name)) is nn.Linear and torch.equal(model.get_submodule(name).weight, weight)
    torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-5, atol=1e-5)


def test_a_merged_model_can_be_adapted_again(saved_llama, ids):
    model = attached(quantized_llama(saved_llama))
    pk.merge(model)
    before = logits(model, ids)
    pk.attach(model, pk.LoRA(r=2))
    assert torch.equal(logits(model, ids), before)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.b().grad.any() for layer in adapter_layers(model).values())


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_stays(training, ids):
    model = attached(tiny_llama()).train(training)
    merge_verified(model, ids)
    assert {module.training for module in model.modules()} == {training}


# ------------------------------------------------------------------------------------------------------------ verified


def test_a_good_merge_is_measured(ids):
    check = merge_verified(attached(tiny_llama(), "dora"), ids)
    assert check.max_difference < 1e-4 and abs(check.kl) < 1e-6 and check.top1_agreement == 1
    assert "KL" in str(check) and "top-1 agreement 100.0%" in str(check)


@pytest.mark.parametrize("harm", ["nothing added", "noise", "not a number"])
def test_a_bad_merge_is_an_error(harm, ids, monkeypatch):
    def wrong(self: LoRALinear, weight: Tensor | None = None) -> Tensor:
        plain = dense_weight(self.base_layer).detach()
        return {"nothing added": plain, "noise": plain + torch.randn_like(plain), "not a number": plain * float("nan")}[harm]

    monkeypatch.setattr(LoRALinear, "merged_weight", wrong)
    model = attached(tiny_llama(), alpha=64)
    with pytest.raises(MergeError, match=r"the merged model is not the trained one \(bound: KL 0\.01\)"):
        merge_verified(model, ids)


def test_the_bound_is_the_callers(ids, monkeypatch):
    monkeypatch.setattr(LoRALinear, "merged_weight", lambda self, weight=None: dense_weight(self.base_layer).detach())
    check = merge_verified(attached(tiny_llama(), alpha=64), ids, max_kl=100)
    assert 0.01 < check.kl < 100 and check.max_difference > 0.1


def test_compare_logits_against_figures_by_hand():
    before = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    after = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    p, q = 0.5, 1 / (1 + torch.e)
    kl = (p * torch.tensor([p / (1 - q), p / q]).log()).sum().item()
    assert compare_logits(before, after) == MergeCheck(1.0, pytest.approx(kl / 2), 1.0)
    assert compare_logits(before, -after).top1_agreement == 0


# ----------------------------------------------------------------------------------------------------------- originals


@pytest.mark.parametrize("method", METHODS)
def test_merging_into_the_original_weights(method, saved_llama, ids):
    plain = tiny_llama()
    model = attached(quantized_llama(saved_llama), method)
    originals = {name: plain.get_submodule(name).weight.detach() for name in adapter_layers(model)}
    deltas = {name: layer.delta().detach() for name, layer in adapter_layers(model).items()}
    magnitudes = {name: layer.magnitude().detach() for name, layer in adapter_layers(model).items()} if method == "dora" else {}
    check = merge_verified(model, ids, originals=originals, max_kl=0)
    assert check.max_difference > 1e-3, "another model than the trained one: reported, not refused"
    for name, original in originals.items():
        wanted = original + deltas[name]
        if magnitudes:
            wanted = wanted * (magnitudes[name] / wanted.norm(dim=1))[:, None]
        torch.testing.assert_close(model.get_submodule(name).weight, wanted, rtol=1e-5, atol=1e-6)
    assert_plain(model)


def test_originals_must_name_every_adapted_module(saved_llama):
    model = attached(quantized_llama(saved_llama))
    name = next(iter(adapter_layers(model)))
    with pytest.raises(ValueError, match="no original weight for 13 adapted modules"):
        pk.merge(model, {name: torch.zeros(64, 64)})
    assert len(adapter_layers(model)) == 14, "nothing was merged"


# ---------------------------------------------------------------------------------------------------------------- ties


def test_ties_stay_ties(tmp_path, ids):
    model = attached(tiny_llama(tie_word_embeddings=True))
    pk.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_an_adapted_tied_head_is_not_lost_on_disk(tmp_path, ids):
    """The head trained away from the embeddings: written as a tie, the merged model would be another one."""
    model = attached(tiny_llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    adapted = logits(model, ids)
    pk.merge(model)
    torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded, ids), adapted, rtol=1e-5, atol=1e-5)


def test_a_quantised_gpt2_merges_into_its_own_kind_of_layers(tmp_path, ids):
    """The trap: transformers quantises Conv1D as linears, whose weights lie the other way round: merged into those, the saved folder cannot be read."""
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model, _ = pk.load(str(tmp_path / "base"), quantize="nf4", dtype="float32")
    pk.attach(model, pk.LoRA(r=2))
    wake(model)
    pk.merge(model.eval())
    assert any(isinstance(module, Conv1D) for module in model.modules())
    model.save_pretrained(tmp_path / "merged")
    again, _ = pk.load(str(tmp_path / "merged"), dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)
