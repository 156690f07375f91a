"""Several adapters on one model: attached, chosen, stacked, switched off, deleted, saved and loaded by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from conftest import quantized_llama, tiny_llama, wake
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.checkpoint import ADAPTER_FILE, adapter_state, load_checkpoint, restore_parameters, save_checkpoint
from peftkit.layers import adapter_layers, trainable_parameters
from peftkit.methods import attachment


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def add(model: nn.Module, name: str, method: pk.LoRA, seed: int) -> None:
    """An adapter with weights of its own, awake; which ones are active stays."""
    torch.manual_seed(seed)
    pk.attach(model, method, adapter=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for trained in layer.role_parameters(name):
                trained.parameter.add_(torch.randn(trained.parameter.shape, generator=generator) * 0.05)


SPECS = {
    "default": pk.LoRA(r=4, alpha=12),
    "wide": pk.LoRA(r=3, alpha=3, rslora=True, target_modules=["q_proj", "k_proj", "lm_head"]),
    "lengths": pk.DoRA(r=2, target_modules=["q_proj", "up_proj"]),
}


def three() -> nn.Module:
    """Adapters of other ranks, scales and targets: all stand in q_proj, others in one or two places."""
    model = tiny_llama()
    for seed, (name, method) in enumerate(SPECS.items()):
        add(model, name, method, seed)
    return model


def alone(name: str) -> nn.Module:
    model = tiny_llama()
    add(model, name, SPECS[name], list(SPECS).index(name))
    return model


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------------------------------------------ choosing, stacking


@pytest.mark.parametrize("name", SPECS)
def test_the_chosen_adapter_applies_and_trains_and_no_other(name, ids):
    model, single = three(), alone(name)
    assert pk.active_adapters(model) == ["default"], "those that were attached later rest"
    pk.set_adapter(model, name)
    assert pk.active_adapters(model) == [name]
    assert torch.equal(logits(model, ids), logits(single, ids))
    assert trains(model) == trains(single)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert {n for n, parameter in model.named_parameters() if parameter.grad is not None} == trains(single)


def test_no_adapter_is_the_base(ids):
    model = three()
    pk.set_adapter(model, [])
    assert pk.active_adapters(model) == [] and trains(model) == set()
    assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))
    pk.set_adapter(model, ["wide"])
    assert torch.equal(logits(model, ids), logits(alone("wide"), ids))


@pytest.mark.parametrize("names", [["default", "wide"], ["wide", "default"]])
def test_stacked_adapters_add_their_updates(names, ids):
    model = three()
    deltas: dict[str, Tensor] = {}
    for name in names:
        for at, layer in adapter_layers(alone(name)).items():
            deltas[at] = deltas.get(at, torch.zeros(())) + layer.delta()
    pk.set_adapter(model, names)
    assert set(pk.active_adapters(model)) == set(names)
    reference = tiny_llama()
    with torch.no_grad():
        for at, delta in deltas.items():
            reference.get_submodule(at).weight.add_(delta)
    torch.testing.assert_close(logits(model, ids), logits(reference, ids), rtol=1e-5, atol=1e-6)
    assert trains(model) == trains(alone("default")) | trains(alone("wide"))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for _, _, parameter in trainable_parameters(model))


def test_stacked_as_in_peft(ids):
    """Outputs and gradients of two adapters at once, in fp64."""
    configs = {"default": LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]), "b": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"])}
    theirs = get_peft_model(tiny_llama().double(), configs["default"], autocast_adapter_dtype=False)
    theirs.add_adapter("b", configs["b"], autocast_adapter_dtype=False)
    theirs.base_model.set_adapter(["default", "b"])
    ours = tiny_llama().double()
    for name, config in configs.items():
        pk.attach(ours, pk.LoRA(r=config.r, alpha=config.lora_alpha, target_modules=sorted(config.target_modules)), adapter=name)
    pk.set_adapter(ours, ["default", "b"])
    wake(theirs)
    pairs = []
    for at, layer in adapter_layers(ours).items():
        other = theirs.base_model.model.get_submodule(at)
        for name in layer.specs:
            pairs += [(layer.a(name), other.lora_A[name].weight), (layer.b(name), other.lora_B[name].weight)]
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    for model in (ours, theirs):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-12, atol=1e-12)
    assert len(pairs) == 12
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_stacked_adapters_share_one_dropout(ids):
    model = tiny_llama()
    pk.attach(model, pk.LoRA(r=2, dropout=0.1))
    pk.attach(model, pk.LoRA(r=2, dropout=0.2), adapter="other")
    pk.set_adapter(model, ["default", "other"])
    logits(model, ids)
    with pytest.raises(ValueError, match="stacked adapters train with one dropout"):
        model.train()(input_ids=ids)


def test_dora_is_active_alone_and_a_refusal_changes_nothing(ids):
    model = three()
    before, training = logits(model, ids), trains(model)
    with pytest.raises(ValueError, match="DoRA adapter scales whole rows"):
        pk.set_adapter(model, ["default", "lengths"])
    assert torch.equal(logits(model, ids), before) and trains(model) == training and pk.active_adapters(model) == ["default"]
    apart = tiny_llama()
    add(apart, "rows", pk.DoRA(r=2, target_modules=["q_proj"]), 0)
    add(apart, "columns", pk.LoRA(r=2, target_modules=["v_proj"]), 1)
    pk.set_adapter(apart, ["rows", "columns"])
    assert set(pk.active_adapters(apart)) == {"rows", "columns"}, "where they do not meet they stand side by side"


def test_unknown_names_are_said_with_the_near_ones():
    model = three()
    for verb in (pk.set_adapter, pk.delete_adapter):
        with pytest.raises(ValueError, match=r"unknown adapter 'wild'; did you mean 'wide'\? \(there are: default, wide, lengths\)"):
            verb(model, "wild")
    assert pk.active_adapters(model) == ["default"]


def test_disabled_means_all_of_them(ids):
    model = three()
    base = logits(tiny_llama(), ids)
    for names in ("wide", ["default", "wide"]):
        pk.set_adapter(model, names)
        with pk.adapters_disabled(model):
            assert torch.equal(logits(model, ids), base) and pk.active_adapters(model) == []
        assert not torch.equal(logits(model, ids), base)


# ------------------------------------------------------------------------------------------------------------- attaching


def test_describe_shows_all_and_counts_the_active():
    model = three()
    summary = pk.describe(model)
    assert summary.adapters == {"default": True, "wide": False, "lengths": False} and summary.methods == ["LoRA"]
    assert summary.trainable == pk.describe(alone("default")).trainable and summary.total_parameters == pk.describe(alone("default")).total_parameters
    assert "adapters   default (active), wide, lengths" in str(summary)
    pk.set_adapter(model, ["default", "wide"])
    roles = pk.describe(model).trainable
    single = {name: pk.describe(alone(name)).trainable for name in ("default", "wide")}
    assert roles == {f"{role} of {name}": single[name][role] for name in ("default", "wide") for role in ("A", "B")}


@pytest.mark.parametrize(
    "name,message",
    [
        ("default", "already has adapters, one of them named 'default'"), ("a.b", "must not be empty or hold"), ("", "must not be"), ("a/b", "must not be"),
        ("q_proj", "modules of the model or of torch have that name"), ("layers", "modules of the model"), ("keys", "of torch"),
    ],
)  # fmt: skip
def test_names_that_cannot_be(name, message):
    model = tiny_llama()
    pk.attach(model, pk.LoRA(r=2))
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        pk.attach(model, pk.LoRA(r=2), adapter=name)
    assert dict(model.named_modules()) == modules
    if name != "default":
        with pytest.raises(ValueError, match=message):
            pk.attach(tiny_llama(), pk.LoRA(r=2), adapter=name)


class Late(pk.LoRA):
    """Fails when its layers are in."""

    def attach(self, model: nn.Module, adapter: str = "default") -> None:
        super().attach(model, adapter)
        raise RuntimeError("out of luck")


def test_a_failure_half_way_leaves_the_other_adapters_as_they_were(ids):
    model = three()
    pk.set_adapter(model, "wide")
    modules, parameters, training, before = dict(model.named_modules()), dict(model.named_parameters()), trains(model), logits(model, ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configs = dict(model.peft_config)
    for method in (Late(r=2, bias="lora_only", init="pissa"), pk.LoRA(r=2, target_modules=["q_proj", "nowhere"]), pk.LoRA(r=2, rank_pattern={"x": 1})):
        with pytest.raises((RuntimeError, ValueError)):
            pk.attach(model, [method, pk.LoRAPlus()] if type(method) is pk.LoRA else method, adapter="fourth")
        assert dict(model.named_modules()) == modules and trains(model) == training
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert list(attachment(model).by_adapter) == list(SPECS) and model.peft_config == configs and pk.active_adapters(model) == ["wide"]
    assert torch.equal(logits(model, ids), before)
    fresh = tiny_llama()
    with pytest.raises(RuntimeError, match="out of luck"):
        pk.attach(fresh, Late(r=2))
    assert not adapter_layers(fresh) and all(parameter.requires_grad for parameter in fresh.parameters()) and "_peftkit" not in vars(fresh)


def test_an_adapter_beside_noise_alone_is_active_at_once(ids):
    model = tiny_llama()
    pk.attach(model, pk.NEFTune(), adapter="noise")
    pk.attach(model, pk.LoRA(r=2), adapter="low")
    assert pk.active_adapters(model) == ["low"] and trains(model) == {name for name, _, _ in trainable_parameters(model)} != set()
    with pytest.raises(ValueError, match="NEFTune is on this model already and acts whichever adapter is active"):
        pk.attach(model, [pk.LoRA(r=2), pk.NEFTune()], adapter="third")
    pk.delete_adapter(model, "noise")
    assert not attachment(model).handles and not model.get_input_embeddings()._forward_hooks


def test_attaching_while_disabled_keeps_what_is_active(ids):
    model = alone("default")
    wanted = logits(model, ids)
    with pk.adapters_disabled(model):
        add(model, "wide", SPECS["wide"], 1)
    assert pk.active_adapters(model) == ["default"] and torch.equal(logits(model, ids), wanted)


# -------------------------------------------------------------------------------------------------------------- deleting


@pytest.mark.parametrize("name", SPECS)
def test_a_deleted_adapter_leaves_nothing_behind(name, ids):
    model = three()
    kept = [other for other in SPECS if other != name]
    pk.delete_adapter(model, name)
    assert pk.active_adapters(model) == ([] if name == "default" else ["default"]), "no other takes its place by itself"
    assert not any(f".{name}." in key for key in model.state_dict())
    assert list(model.peft_config) == list(attachment(model).by_adapter) == kept
    for other in kept:
        pk.set_adapter(model, other)
        assert torch.equal(logits(model, ids), logits(alone(other), ids))
    reached = {at for other in kept for at in adapter_layers(alone(other))}
    assert set(adapter_layers(model)) == reached, "modules that no other adapter has are plain again"
    add(model, name, SPECS[name], 5)


def test_without_the_last_adapter_the_model_is_the_base(ids):
    base = tiny_llama()
    base.model.norm.requires_grad_(False)
    training, modules = trains(base), dict(base.named_modules())
    for name, method in SPECS.items():
        pk.attach(base, method, adapter=name)
    for name in SPECS:
        pk.delete_adapter(base, name)
    assert dict(base.named_modules()) == modules and trains(base) == training
    assert "_peftkit" not in vars(base) and "peft_config" not in vars(base)
    assert torch.equal(logits(base, ids), logits(tiny_llama(), ids))
    with pytest.raises(ValueError, match="has no peftkit adapters"):
        pk.set_adapter(base, "default")


def test_detach_takes_all_off(ids):
    model = three()
    modules = dict(tiny_llama().named_modules()).keys()
    pk.detach(model)
    assert dict(model.named_modules()).keys() == modules and torch.equal(logits(model, ids), logits(tiny_llama(), ids))
    assert all(parameter.requires_grad for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------------- merging


def test_merge_folds_the_active_ones_and_says_what_is_gone(ids):
    for names, gone in (("wide", "default and lengths"), (["default", "wide"], "lengths"), ("lengths", "default and wide")):
        model = three()
        pk.set_adapter(model, names)
        wanted = logits(model, ids)
        with pytest.warns(UserWarning, match=f"^{gone} were not active: they are not in the merged model, and no longer on it"):
            pk.merge(model)
        assert not adapter_layers(model)
        torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-5, atol=1e-6)


def test_merging_nothing_is_refused(ids):
    model = three()
    pk.set_adapter(model, [])
    with pytest.raises(ValueError, match=r"no adapter is active, so there is nothing to merge; choose with peftkit\.set_adapter \(there are: default, wide"):
        pk.merge(model)
    pk.set_adapter(model, "wide")
    assert torch.equal(logits(model, ids), logits(alone("wide"), ids))


# ----------------------------------------------------------------------------------------------------------------- files


def test_each_adapter_has_its_own_file(tmp_path, ids):
    model = three()
    with pytest.raises(ValueError, match="unknown adapter 'wider'; did you mean 'wide'"):
        pk.save_adapter(model, tmp_path / "no", adapter="wider")
    pk.save_adapter(model, tmp_path / "active")
    for name in SPECS:
        pk.save_adapter(model, tmp_path / name, adapter=name)
        pk.save_adapter(alone(name), tmp_path / f"{name} alone")
        for file in (ADAPTER_FILE, "adapter_config.json", "peftkit.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / f"{name} alone" / file).read_bytes(), (name, file)
    assert (tmp_path / "active" / ADAPTER_FILE).read_bytes() == (tmp_path / "default" / ADAPTER_FILE).read_bytes()
    model = tiny_llama()
    for name in SPECS:
        assert pk.load_adapter(model, tmp_path / name, adapter=name) is model
    assert list(attachment(model).by_adapter) == list(SPECS) and pk.active_adapters(model) == ["default"]
    for name in SPECS:
        pk.set_adapter(model, name)
        assert torch.equal(logits(model, ids), logits(alone(name), ids))
        pk.set_adapter(model, "default")


def test_which_one_is_meant_must_be_clear(tmp_path):
    model = three()
    for chosen, told in ([], "none is active"), (["default", "wide"], "default and wide are active"):
        pk.set_adapter(model, chosen)
        with pytest.raises(ValueError, match=f"this model has the adapters default, wide, lengths, of which {told}; say which one: adapter="):
            pk.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    single = alone("wide")
    pk.set_adapter(single, [])
    pk.save_adapter(single, tmp_path / "single")


def test_a_resting_adapter_is_filled_from_its_file(tmp_path, ids):
    model = three()
    pk.save_adapter(model, tmp_path / "wide", adapter="wide")
    before = logits(model, ids)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for trained in layer.role_parameters("wide"):
                trained.parameter.zero_()
    pk.load_adapter(model, tmp_path / "wide", adapter="wide")
    assert torch.equal(logits(model, ids), before)
    pk.set_adapter(model, "wide")
    assert torch.equal(logits(model, ids), logits(alone("wide"), ids))


def test_over_a_4_bit_base(saved_llama, tmp_path, ids):
    model = quantized_llama(saved_llama)
    add(model, "one", pk.QLoRA(r=2), 0)
    add(model, "two", pk.DoRA(r=2, target_modules=["q_proj"]), 1)
    first = logits(model, ids)
    pk.set_adapter(model, "two")
    second = logits(model, ids)
    for name in ("one", "two"):
        pk.save_adapter(model, tmp_path / name, adapter=name)
    loaded = quantized_llama(saved_llama)
    for name in ("two", "one"):
        pk.load_adapter(loaded, tmp_path / name, adapter=name)
    assert torch.equal(logits(loaded, ids), second)
    pk.set_adapter(loaded, "one")
    assert torch.equal(logits(loaded, ids), first) and not torch.equal(first, second)


# -------------------------------------------------------------------------------------------------------------- training


def test_the_optimizer_moves_the_active_ones_only(ids):
    model = three()
    pk.set_adapter(model, "wide")
    resting = {name: adapter_state(model, name) for name in SPECS}
    optimizer = pk.build_optimizer(model, learning_rate=1e-2)
    assert {group["adapter"] for group in optimizer.param_groups} == {"wide"}
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name in SPECS:
        now = adapter_state(model, name)
        assert all(torch.equal(now[key], tensor) for key, tensor in resting[name].items()) == (name != "wide")


def test_every_adapter_keeps_its_own_rates():
    """LoRA+ of one adapter says nothing about another, nor twice about itself."""
    model = tiny_llama()
    pk.attach(model, [pk.LoRA(r=2), pk.LoRAPlus(ratio=4)])
    pk.attach(model, [pk.LoRA(r=2), pk.LoRAPlus(ratio=16)], adapter="steep")
    pk.attach(model, pk.LoRA(r=2), adapter="flat")

    def rates() -> dict[tuple[str, str], float]:
        return {(group["adapter"], group["role"]): group["lr"] for group in pk.build_optimizer(model, learning_rate=1.0).param_groups}

    assert rates() == {("default", "A"): 1, ("default", "B"): 4}
    pk.set_adapter(model, ["default", "steep", "flat"])
    assert rates() == {(name, role): {"A": 1, "B": b}[role] for name, b in (("default", 4), ("steep", 16), ("flat", 1)) for role in ("A", "B")}
    assert pk.describe(model).rates == {f"{role} of {name}": lr for (name, role), lr in rates().items()}
    with pytest.raises(ValueError, match="loraplus sets the learning rate of B matrices, and this model trains none"):
        pk.attach(model, pk.LoRAPlus(), adapter="rates alone")
    assert list(attachment(model).by_adapter) == ["default", "steep", "flat"]


def test_a_training_checkpoint_holds_what_trains(tmp_path, ids):
    model = three()
    pk.set_adapter(model, "wide")
    tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    path = save_checkpoint(tmp_path, 1, tensors, {}, keep_last=1)
    wanted = logits(model, ids)
    other = three()
    pk.set_adapter(other, "wide")
    wake(other)
    restore_parameters(other, load_checkpoint(path)[0])
    assert torch.equal(logits(other, ids), wanted)


def test_switching_between_steps_keeps_gradients_right(ids):
    """What is kept from one forward to the next (products, norms) is another adapter's after a switch."""
    model = three()
    for name in ("default", "lengths", "wide", "lengths", "default"):
        pk.set_adapter(model, name)
        single = alone(name)
        for each in (model, single):
            each.zero_grad()
            each.train()(input_ids=ids, labels=ids).loss.backward()
        wanted = {n: parameter.grad for n, parameter in single.named_parameters() if parameter.grad is not None}
        for n, parameter in model.named_parameters():
            if n in wanted:
                torch.testing.assert_close(parameter.grad, wanted[n], rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------- transformers' own doors


def test_transformers_chooses_and_disables(ids):
    model = three()
    for name in SPECS:
        model.set_adapter(name)
        assert model.active_adapters() == [name] == pk.active_adapters(model)
        assert torch.equal(logits(model, ids), logits(alone(name), ids))
    model.set_adapter(["default", "wide"])
    assert model.active_adapters() == ["default", "wide"]
    stacked = logits(model, ids)
    pk.set_adapter(model, ["default", "wide"])
    assert torch.equal(logits(model, ids), stacked)
    model.disable_adapters()
    assert torch.equal(logits(model, ids), logits(tiny_llama(), ids)) and pk.active_adapters(model) == []
    model.enable_adapters()
    assert torch.equal(logits(model, ids), stacked)


def test_transformers_stacks_what_only_some_layers_have(ids):
    model = tiny_llama()
    add(model, "whole", pk.LoRA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_tokens=[5]), 0)
    add(model, "low", pk.LoRA(r=2, target_modules=["v_proj"]), 1)
    add(model, "second", pk.LoRA(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]), 2)
    pk.set_adapter(model, ["whole", "low"])
    wanted = logits(model, ids)
    pk.set_adapter(model, [])
    model.set_adapter(["whole", "low"])
    assert torch.equal(logits(model, ids), wanted)
    with pytest.raises(ValueError, match="adapters whole, second each train a copy of the same module"):
        pk.set_adapter(model, ["whole", "second"])
    assert torch.equal(logits(model, ids), wanted) and pk.active_adapters(model) == ["whole", "low"]


def test_transformers_saves_the_active_one(tmp_path, ids):
    model = three()
    for name in SPECS:
        pk.set_adapter(model, name)
        model.save_pretrained(tmp_path / name)
        loaded = pk.load_adapter(tiny_llama(), tmp_path / name)
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        wanted = adapter_state(model, name)
        written = load_file(tmp_path / name / ADAPTER_FILE)
        assert written.keys() == wanted.keys() and all(torch.equal(written[key], wanted[key]) for key in wanted)


def test_transformers_deletes_and_we_take_note(ids):
    model = three()
    model.delete_adapter("wide")
    assert list(pk.describe(model).adapters) == ["default", "lengths"] == list(model.peft_config)
    assert set(adapter_layers(model)) == set(adapter_layers(alone("default"))), "lm_head is plain again"
    assert torch.equal(logits(model, ids), logits(alone("default"), ids))
    add(model, "wide", SPECS["wide"], 1)
    model.delete_adapter(["default", "wide", "lengths"])
    with pytest.raises(ValueError, match="has no peftkit adapters"):
        pk.describe(model)
    assert not adapter_layers(model) and torch.equal(logits(model, ids), logits(tiny_llama(), ids))
    assert all(parameter.requires_grad for parameter in model.parameters())
    pk.attach(model, pk.LoRA(r=2))


def test_a_copy_has_adapters_of_its_own(ids):
    model = three()
    other = copy.deepcopy(model)
    pk.set_adapter(other, "wide")
    wake(other)
    assert pk.active_adapters(model) == ["default"] and torch.equal(logits(model, ids), logits(alone("default"), ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pk.merge(other)
    pk.set_adapter(model, "wide")
    assert torch.equal(logits(model, ids), logits(alone("wide"), ids))
