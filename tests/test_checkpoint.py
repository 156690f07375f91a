"""Adapter files go both ways between peftkit and peft; training checkpoints are whole or not there."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import quantized_llama, tiny_gpt2, tiny_llama, wake
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import peftkit as pk
from peftkit import quant
from peftkit.checkpoint import (
    ADAPTER_FILE,
    CARD_FILE,
    CONFIG_FILE,
    CheckpointError,
    adapter_state,
    checkpoints,
    load_checkpoint,
    restore_parameters,
    save_checkpoint,
)
from peftkit.layers import adapter_layers, trainable_parameters
from peftkit.methods import attachment

BASES = ("llama", "gpt2", "nf4")


def make(base: str, folder) -> nn.Module:
    """The same weights at every call."""
    if base == "nf4":
        return quantized_llama(folder)
    return tiny_gpt2() if base == "gpt2" else tiny_llama()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def assert_same(ours: Tensor, theirs: Tensor, dora: bool) -> None:
    if dora:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(ours, theirs)


def attached(model: nn.Module, dora: bool = False, **options) -> nn.Module:
    torch.manual_seed(0)
    pk.attach(model, (pk.DoRA if dora else pk.LoRA)(**{"r": 4, "alpha": 12} | options))
    wake(model)
    return model


def unpacked(model: nn.Module) -> nn.Module:
    """A model whose 4-bit weights evaluation leaves as they are, so that peft computes what was quantised."""
    quant.protect(model)
    return model


# ----------------------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_ours_load_in_peft(base, dora, rslora, saved_llama, tmp_path, ids):
    model = attached(make(base, saved_llama), dora, rslora=rslora)
    ours = logits(model, ids)
    assert pk.save_adapter(model, tmp_path / "adapter") == tmp_path / "adapter"
    plain = unpacked(make(base, saved_llama))
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter", autocast_adapter_dtype=False)
    assert_same(ours, logits(theirs, ids), dora)
    assert not torch.allclose(ours, logits(unpacked(make(base, saved_llama)), ids), atol=1e-2), "the adapter does something"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_theirs_load_in_ours(base, dora, rslora, saved_llama, tmp_path, ids):
    targets = ["c_attn", "c_proj", "c_fc"] if base == "gpt2" else "all-linear"
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=dora, use_rslora=rslora, fan_in_fan_out=base == "gpt2", lora_dropout=0.1)
    torch.manual_seed(0)
    theirs = get_peft_model(unpacked(make(base, saved_llama)), config)
    wake(theirs)
    wanted = logits(theirs, ids)
    theirs.save_pretrained(tmp_path / "adapter")
    model = make(base, saved_llama)
    assert pk.load_adapter(model, tmp_path / "adapter") is model
    assert_same(logits(model, ids), wanted, dora)
    [method] = attachment(model).methods
    assert (method.r, method.alpha, method.dropout, method.rslora) == (4, 12, 0.1, rslora)
    assert len(list(trainable_parameters(model))) == len(load_file(tmp_path / "adapter" / ADAPTER_FILE))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_ours_load_in_ours(base, dora, saved_llama, tmp_path, ids):
    model = attached(make(base, saved_llama), dora)
    pk.save_adapter(model, tmp_path / "adapter")
    fresh = pk.load_adapter(make(base, saved_llama), tmp_path / "adapter")
    assert torch.equal(logits(fresh, ids), logits(model, ids))
    filled = attached(make(base, saved_llama), dora)
    wake(filled, seed=8)
    pk.load_adapter(filled, tmp_path / "adapter")
    assert torch.equal(logits(filled, ids), logits(model, ids)), "an attached adapter is filled"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_transformers_own_door_writes_an_adapter(base, dora, saved_llama, tmp_path, ids):
    model = attached(make(base, saved_llama), dora)
    ours = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    pk.save_adapter(model, tmp_path / "direct")
    written, direct = load_file(tmp_path / "adapter" / ADAPTER_FILE), load_file(tmp_path / "direct" / ADAPTER_FILE)
    assert written.keys() == direct.keys() and all(torch.equal(written[key], direct[key]) for key in direct)
    fresh = pk.load_adapter(make(base, saved_llama), tmp_path / "adapter")
    assert torch.equal(logits(fresh, ids), ours)
    theirs = PeftModel.from_pretrained(unpacked(make(base, saved_llama)), tmp_path / "adapter", autocast_adapter_dtype=False)
    assert_same(ours, logits(theirs, ids), dora)


def test_a_part_of_the_model_is_named_exactly(tmp_path, ids):
    """Targets that no name ending tells apart: peft must adapt the same modules."""
    model = attached(tiny_llama(), target_modules=r".*layers\.0.*q_proj|.*layers\.1.*mlp.*")
    pk.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert_same(logits(model, ids), logits(theirs, ids), dora=False)
    fresh = pk.load_adapter(tiny_llama(), tmp_path / "adapter")
    assert adapter_layers(fresh).keys() == adapter_layers(model).keys()


def test_what_the_folder_holds(saved_llama, tmp_path):
    model, _ = pk.load(str(saved_llama), dtype="float32")
    pk.attach(model, [pk.LoRA(r=4, alpha=12, target_modules=["q_proj"]), pk.LoRAPlus(ratio=4)])
    pk.save_adapter(model, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {ADAPTER_FILE, CONFIG_FILE, CARD_FILE}
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"], config["task_type"]) == (4, 12, ["q_proj"], "CAUSAL_LM")
    card = json.loads((tmp_path / "adapter" / CARD_FILE).read_text())
    assert [next(iter(entry)) for entry in card["methods"]] == ["lora", "loraplus"] and card["base"] == str(saved_llama)


def test_a_bf16_base_keeps_fp32_adapters_in_the_file(tmp_path):
    model = attached(tiny_llama().bfloat16())
    pk.save_adapter(model, tmp_path / "adapter")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / ADAPTER_FILE).values()} == {torch.float32}


def test_saving_overwrites_and_nothing_to_save_is_said(tmp_path, ids):
    model = attached(tiny_llama())
    pk.save_adapter(model, tmp_path / "adapter")
    wake(model, seed=8)
    pk.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(pk.load_adapter(tiny_llama(), tmp_path / "adapter"), ids), logits(model, ids))
    only_noise = tiny_llama()
    pk.attach(only_noise, pk.NEFTune())
    with pytest.raises(ValueError, match="no adapter layers to save"):
        pk.save_adapter(only_noise, tmp_path / "noise")
    assert not (tmp_path / "noise").exists()


def test_a_merged_adapter_matches_the_one_from_the_file(tmp_path, ids):
    model = attached(tiny_llama())
    pk.save_adapter(model, tmp_path / "adapter")
    pk.merge(model)
    model.save_pretrained(tmp_path / "merged")
    loaded = pk.load_adapter(tiny_llama(), tmp_path / "adapter")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded, ids), logits(merged, ids), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- training checkpoints


def tensors(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((3, 2), value), "b": torch.full((4,), value, dtype=torch.float64)}


def test_checkpoint_round_trip(tmp_path):
    state = {"optimizer": {"step": torch.tensor(3.0)}, "rng": torch.get_rng_state(), "stats": {"steps": 7}}
    path = save_checkpoint(tmp_path / "checkpoints", 7, tensors(1.5), state, keep_last=2)
    assert path == tmp_path / "checkpoints" / "step-000007" and checkpoints(tmp_path / "checkpoints") == [path]
    loaded, restored = load_checkpoint(path)
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors(1.5).items())
    assert restored["stats"] == {"steps": 7} and torch.equal(restored["rng"], state["rng"])
    assert checkpoints(tmp_path / "nowhere") == []


def test_only_the_newest_are_kept_in_the_order_of_their_steps(tmp_path):
    for step in (5, 9, 10, 1_000_000, 2_000_000):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep_last=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1000000", "step-2000000"]
    save_checkpoint(tmp_path, 2_000_000, tensors(8), {}, keep_last=2)
    assert load_checkpoint(checkpoints(tmp_path)[-1])[0]["a"][0, 0] == 8, "written again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-2000000"]


def test_what_a_killed_run_left_is_not_a_checkpoint_and_is_cleaned(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(1), {}, keep_last=2)
    half = tmp_path / ".writing-000002"
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]
    save_checkpoint(tmp_path, 2, tensors(2), {}, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_a_write_that_fails_leaves_the_earlier_ones(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(1), {}, keep_last=1)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path, 2, tensors(2), {"cannot": lambda: 0}, keep_last=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]
    assert load_checkpoint(checkpoints(tmp_path)[0])[0]["a"][0, 0] == 1


@pytest.mark.parametrize("file", ["trained.safetensors", "state.pt"])
@pytest.mark.parametrize("harm", ["cut", "noise", "empty", "gone"])
def test_a_corrupt_checkpoint_is_said(file, harm, tmp_path):
    path = save_checkpoint(tmp_path, 1, tensors(1), {"x": torch.zeros(100)}, keep_last=1)
    content = (path / file).read_bytes()
    if harm == "gone":
        (path / file).unlink()
    else:
        (path / file).write_bytes({"cut": content[: len(content) // 2], "noise": b"\x07" * 200, "empty": b""}[harm])
    with pytest.raises(CheckpointError, match=r"step-000001 cannot be read .* remove it to resume from the one before"):
        load_checkpoint(path)


def test_restoring_parameters(ids):
    model = attached(tiny_llama(), dora=True)
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = logits(model, ids)
    wake(model, seed=9)
    assert not torch.equal(logits(model, ids), before)
    restore_parameters(model, state)
    assert torch.equal(logits(model, ids), before)
    other = copy.copy(state)
    gone = sorted(other)[0]
    del other[gone]
    with pytest.raises(CheckpointError, match=f"1 differ, such as {gone}"):
        restore_parameters(model, other)


def test_adapter_state_is_by_peft_s_keys():
    model = attached(tiny_llama(), dora=True, target_modules=["q_proj"])
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    assert {f"{prefix}lora_A.weight", f"{prefix}lora_B.weight", f"{prefix}lora_magnitude_vector"} < adapter_state(model).keys()
    assert len(adapter_state(model)) == 6


def test_an_adapter_of_another_kind_of_model_is_refused_whole(tmp_path):
    """One of a classifier: its head is no module of a language model."""
    model, _ = pk.load("builtin:tiny", dtype="float32")
    pk.attach(model, pk.LoRA(r=2, modules_to_save=["lm_head"]))
    pk.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    state = load_file(tmp_path / "adapter/adapter_model.safetensors")
    save_file({key.replace("lm_head", "score"): tensor for key, tensor in state.items()}, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/peftkit.json").unlink()
    fresh, _ = pk.load("builtin:tiny", dtype="float32")
    with pytest.raises(CheckpointError, match=r"does not fit this LlamaForCausalLM, nothing was loaded: .*score"):
        pk.load_adapter(fresh, tmp_path / "adapter")
    assert not adapter_layers(fresh)
