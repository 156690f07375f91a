"""Methods on a model: attaching, refusing, composing, noise, learning rates, recipes."""

from __future__ import annotations

import math
import re

import pytest
import torch
import transformers
from conftest import quantized_llama, tiny_gpt2, tiny_llama, wake
from torch import Tensor, nn

import peftkit as pk
from peftkit.config import ConfigError
from peftkit.layers import adapter_layers, trainable_parameters
from peftkit.loss import TokenLoss
from peftkit.methods import REGISTRY, Method, attachment, from_recipe, method_name, to_recipe

ENDINGS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_untouched(model: nn.Module, modules: dict[str, nn.Module], trained: set[str]) -> None:
    """The model is as it was: its modules, what trains, no marks and no hooks."""
    assert dict(model.named_modules()) == modules
    assert trains(model) == trained
    assert not {"_peftkit", "peft_config", "_hf_peft_config_loaded"} & set(vars(model))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


# --------------------------------------------------------------------------------------------------------------- attach


def test_summary_says_what_was_adapted_and_what_was_left_out():
    model = tiny_llama()
    summary = pk.attach(model, [pk.LoRA(r=2), pk.LoRAPlus()])
    layers = adapter_layers(model)
    trained = sum(parameter.numel() for _, _, parameter in trainable_parameters(model))
    assert summary.modules == dict.fromkeys(sorted(ENDINGS, key=list(summary.modules).index), 2)
    assert set(summary.modules) == ENDINGS and len(layers) == 14
    assert summary.trainable_parameters == trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert summary.total_parameters == sum(parameter.numel() for parameter in tiny_llama().parameters())
    text = str(summary)
    assert "LoRA, LoRAPlus" in text and "14 linears" in text and "q_proj x2" in text and f"{trained:,} of {summary.total_parameters:,}" in text
    assert "left out   lm_head (output head" in text
    assert str(pk.describe(model)) == text
    assert not isinstance(model.lm_head, type(next(iter(layers.values()))))


def test_summary_of_a_quantised_model_counts_what_the_bits_stand_for(saved_llama):
    summary = pk.attach(quantized_llama(saved_llama), pk.QLoRA(r=2))
    assert summary.quantized == 14 and "(14 of the model's linears quantised)" in str(summary)
    assert summary.total_parameters == sum(parameter.numel() for parameter in tiny_llama().parameters())


def test_summary_names_expert_tensors_that_stay_as_they_are():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        num_experts_per_tok=1,
    )  # fmt: skip
    summary = pk.attach(MixtralForCausalLM(config), pk.LoRA(r=2, target_modules=["q_proj"]))
    assert "2 expert tensors" in str(summary) and "neither adapted nor quantised" in str(summary)


def test_the_head_can_be_adapted_by_name():
    model = tiny_llama()
    summary = pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj", "lm_head"]))
    assert set(summary.modules) == {"q_proj", "lm_head"} and not summary.left_out


@pytest.mark.parametrize(
    "targets,exclude,wanted",
    [
        (["q_proj"], None, {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
        (["1.self_attn.q_proj"], None, {"model.layers.1.self_attn.q_proj"}),
        ("q_proj", None, {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
        (r".*layers\.0\..*(k|v)_proj", None, {f"model.layers.0.self_attn.{p}_proj" for p in "kv"}),
        (["q_proj", "k_proj"], ["k_proj"], {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
        ("all-linear", r".*layers\.0\..*|.*mlp.*|.*[kvo]_proj|lm_head", {"model.layers.1.self_attn.q_proj"}),
    ],
)
def test_targets(targets, exclude, wanted):
    model = tiny_llama()
    pk.attach(model, pk.LoRA(r=2, target_modules=targets, exclude_modules=exclude))
    assert set(adapter_layers(model)) == wanted


def test_an_ending_is_a_whole_name_part():
    with pytest.raises(ValueError, match="'proj' matches no layer that can be adapted"):
        pk.attach(tiny_llama(), pk.LoRA(target_modules=["proj"]))


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"target_modules": ["q_proj", "q_prj"]},
            r"'q_prj' matches no layer that can be adapted; did you mean 'q_proj'\? \(there are: .*down_proj",
        ),
        ({"target_modules": "qproj"}, r"'qproj' matches no layer that can be adapted; did you mean 'q_proj'"),
        (
            {"exclude_modules": ["mlp.gate_prj"]},
            r"exclude_modules: target 'mlp.gate_prj' matches no layer that can be adapted; did you mean 'gate_proj'",
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "together leave no module"),
        ({"target_modules": []}, "leave no module"),
    ],
)
def test_targets_that_match_nothing_are_refused_and_nothing_changes(options, message):
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    modules, trained = dict(model.named_modules()), trains(model)
    with pytest.raises(ValueError, match=message):
        pk.attach(model, [pk.NEFTune(), pk.LoRA(**options)])
    assert_untouched(model, modules, trained)


def test_a_failure_half_way_leaves_the_model_as_it_was():
    """The layers are already in when the noise finds no embedding."""

    class NoEmbedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    model = NoEmbedding()
    modules, trained = dict(model.named_modules()), trains(model)
    with pytest.raises(ValueError, match="neftune needs the model's input embeddings"):
        pk.attach(model, [pk.LoRA(r=2), pk.NEFTune()])
    assert_untouched(model, modules, trained)
    pk.attach(model, pk.LoRA(r=2))
    assert len(adapter_layers(model)) == 2


def test_methods_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="LoRA and DoRA would both replace the linear layers"):
        pk.attach(tiny_llama(), [pk.LoRA(), pk.DoRA()])
    with pytest.raises(ConfigError, match="NEFTune stands twice"):
        pk.attach(tiny_llama(), [pk.NEFTune(alpha=5), pk.NEFTune(alpha=10)])
    with pytest.raises(ConfigError, match="expected methods such as"):
        pk.attach(tiny_llama(), ["lora"])


def test_attaching_twice_is_refused():
    model = tiny_llama()
    pk.attach(model, pk.LoRA(r=2))
    before = trains(model)
    with pytest.raises(ValueError, match="already has adapters"):
        pk.attach(model, pk.DoRA(r=2))
    assert trains(model) == before


def test_a_model_under_peft_is_refused():
    from peft import LoraConfig

    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="already has peft adapters"):
        pk.attach(model, pk.LoRA(r=2))


def test_verbs_without_adapters_say_so():
    for verb in (pk.describe, pk.detach, pk.merge):
        with pytest.raises(ValueError, match=r"has no peftkit adapters; call peftkit\.attach first"):
            verb(tiny_llama())


def test_qlora_wants_a_base_in_four_bits(saved_llama):
    model = tiny_llama()
    modules, trained = dict(model.named_modules()), trains(model)
    with pytest.raises(ValueError, match="qlora needs a base in 4 bits"):
        pk.attach(model, pk.QLoRA())
    assert_untouched(model, modules, trained)
    pk.attach(quantized_llama(saved_llama), pk.QLoRA(r=2))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_base_is_frozen_and_the_class_stays(make):
    model = make()
    before = type(model)
    pk.attach(model, pk.LoRA(r=2))
    assert type(model) is before
    assert trains(model) == {name for name, _, _ in trainable_parameters(model)}
    assert all(".lora_A." in name or ".lora_B." in name for name in trains(model))


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert pk.LoRA(r=16, alpha=32).scale == 2
    assert pk.LoRA(r=16, alpha=32, rslora=True).scale == 8


def test_a_seed_gives_the_same_start():
    starts = []
    for seed in (0, 0, 1):
        model = tiny_llama()
        torch.manual_seed(seed)
        pk.attach(model, pk.LoRA(r=4, target_modules=["down_proj"]))
        starts.append(next(iter(adapter_layers(model).values())))
    assert torch.equal(starts[0].a(), starts[1].a()) and not torch.equal(starts[0].a(), starts[2].a())
    assert not starts[0].b().any() and starts[0].a().abs().max() <= 1 / math.sqrt(96) and starts[0].a().std() > 0.5 / math.sqrt(96)


# --------------------------------------------------------------------------------------------------------------- LoRA+


def test_loraplus_raises_the_rate_of_b_alone():
    model = tiny_llama()
    pk.attach(model, [pk.DoRA(r=2), pk.LoRAPlus(ratio=10)])
    optimizer = pk.build_optimizer(model, learning_rate=1e-3, weight_decay=0.05)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert {role: group["lr"] for role, group in groups.items()} == pytest.approx({"A": 1e-3, "B": 1e-2, "magnitude": 1e-3})
    assert {group["weight_decay"] for group in groups.values()} == {0.05}
    roles = {id(parameter): role for _, role, parameter in trainable_parameters(model)}
    for role, group in groups.items():
        assert {roles[id(parameter)] for parameter in group["params"]} == {role}
    assert sum(len(group["params"]) for group in groups.values()) == len(roles)


def test_loraplus_without_b_matrices_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="loraplus sets the learning rate of B matrices, and this model trains none"):
        pk.attach(model, [pk.LoRAPlus()])
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is as it was"


# ------------------------------------------------------------------------------------------------------------- NEFTune


class Listener:
    """The noise that each forward adds to the embeddings."""

    def __init__(self, model: nn.Module):
        self.noise: list[Tensor] = []
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, output: self.noise.append((output - module.weight[args[0]]).detach()))


def noisy(**options) -> tuple[nn.Module, Listener]:
    model = tiny_llama(max_position_embeddings=512)
    pk.attach(model, [pk.LoRA(r=2, target_modules=["q_proj"]), pk.NEFTune(**options)])
    return model.train(), Listener(model)


def test_noise_has_the_papers_norm_whatever_the_padding():
    """alpha / sqrt(L d) U(-1, 1) over L d entries has norm alpha / sqrt(3): 2.89 for alpha 5."""
    model, heard = noisy(alpha=5)
    row = torch.randint(3, 96, (1, 64))
    mask = torch.ones(1, 64, dtype=torch.long)
    for pad in (0, 448):
        model(input_ids=nn.functional.pad(row, (0, pad)), attention_mask=nn.functional.pad(mask, (0, pad)))
        assert heard.noise[-1].norm().item() == pytest.approx(5 / math.sqrt(3), rel=0.03)
        assert heard.noise[-1].abs().max() <= 5 / math.sqrt(64 * 64) + 1e-6
        assert not heard.noise[-1][:, 64:].any()
    assert 5 / math.sqrt(3) == pytest.approx(2.89, abs=0.01)


def test_every_sample_has_its_own_length():
    model, heard = noisy(alpha=5)
    lengths = [7, 40, 64]
    mask = (torch.arange(64) < torch.tensor(lengths)[:, None]).long()
    mask[0] = mask[0].flip(0)  # padded on the left
    model(input_ids=torch.randint(3, 96, (3, 64)), attention_mask=mask)
    for noise, length, real in zip(heard.noise[-1], lengths, mask.bool(), strict=True):
        assert noise.norm().item() == pytest.approx(5 / math.sqrt(3), rel=0.1), length
        assert not noise[~real].any() and noise[real].any(1).all()


def test_the_mask_is_seen_however_it_is_given():
    """As a keyword, by position, and by a loss that calls the body of the model alone."""
    ids, mask = torch.randint(3, 96, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, 5:] = 0
    model, heard = noisy()
    model(ids, mask)
    TokenLoss(model)(labels=ids.masked_fill(mask == 0, -100), input_ids=ids, attention_mask=mask)
    model(input_ids=ids, attention_mask=mask)
    assert len(heard.noise) == 5  # the loss tries one row first, twice, in eval mode
    for noise in (heard.noise[0], heard.noise[-2], heard.noise[-1]):
        assert not noise[1, 5:].any()
        assert noise[1, :5].norm().item() == pytest.approx(5 / math.sqrt(3), rel=0.1)
    assert not heard.noise[1].any() and not heard.noise[2].any()


def test_packed_documents_have_their_own_length_each():
    model, heard = noisy(alpha=5)
    lengths = [[10, 30, 24], [64]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    model(input_ids=torch.randint(3, 96, (2, 64)), position_ids=positions, use_cache=False)
    for row, noise in zip(lengths, heard.noise[-1], strict=True):
        for length, part in zip(row, noise.split(row), strict=True):
            assert part.norm().item() == pytest.approx(5 / math.sqrt(3), rel=0.08), length


def test_packed_and_padded_rows_have_no_noise_on_padding():
    model, heard = noisy(alpha=5)
    positions = torch.cat([torch.arange(10), torch.arange(20), torch.arange(6)])[None]
    mask = (torch.arange(36) < 30).long()[None]
    model(input_ids=torch.randint(3, 96, (1, 36)), position_ids=positions, attention_mask=mask, use_cache=False)
    first, second, padding = heard.noise[-1][0].split([10, 20, 6])
    assert not padding.any()
    for part in (first, second):
        assert part.norm().item() == pytest.approx(5 / math.sqrt(3), rel=0.08)


def test_padded_length_is_the_formula_of_transformers():
    """There: mag = alpha / sqrt(tokens * width), noise everywhere, padding included."""
    model, heard = noisy(alpha=5, length="padded", seed=4)
    mask = (torch.arange(512) < 64).long()[None]
    model(input_ids=torch.randint(3, 96, (1, 512)), attention_mask=mask)
    drawn = torch.rand((1, 512, 64), generator=torch.Generator().manual_seed(4)).mul_(2).sub_(1)
    torch.testing.assert_close(heard.noise[-1], drawn * (5 / math.sqrt(512 * 64)), rtol=0, atol=1e-6)
    assert heard.noise[-1][:, :64].norm().item() == pytest.approx(1.02, abs=0.02), "what the real tokens get there"


def test_without_mask_or_documents_every_token_is_real():
    model, heard = noisy()
    model(input_ids=torch.randint(3, 96, (2, 64)))
    assert heard.noise[-1][0].norm().item() == pytest.approx(5 / math.sqrt(3), rel=0.05)


def test_no_noise_outside_training(ids):
    model, heard = noisy(alpha=15)
    plain = tiny_llama(max_position_embeddings=512).eval()
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    model.train()
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, plain.generate(ids, max_new_tokens=4, do_sample=False)), "not even in train mode"
    assert len(heard.noise) > 4 and not torch.cat([noise.flatten() for noise in heard.noise]).any()
    model(input_ids=ids)
    assert heard.noise[-1].any()


def test_detach_and_merge_take_the_hooks_off(ids):
    for verb in (pk.detach, pk.merge):
        model, _ = noisy()
        verb(model)
        fresh = tiny_llama(max_position_embeddings=512)
        assert torch.equal(model(input_ids=ids).logits, fresh(input_ids=ids).logits), "in train mode"
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_noise_alone_and_its_gradient_is_the_embeddings(ids):
    model = tiny_llama()
    summary = pk.attach(model, pk.NEFTune())
    assert summary.trainable_parameters == 0 and "none" in str(summary)
    model.model.embed_tokens.requires_grad_(True)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.any()


def test_the_noise_goes_on_where_a_saved_state_stopped(ids):
    model, heard = noisy(seed=9)
    handle = attachment(model).handles["NEFTune"]
    model(input_ids=ids)
    state = handle.state_dict()
    model(input_ids=ids)
    torch.rand(100)  # the generator is the noise's own
    handle.load_state_dict(state)
    model(input_ids=ids)
    first, second, again = heard.noise
    assert torch.equal(second, again) and not torch.equal(first, second)
    _, other = noisy(seed=9)
    assert other.noise == []


def test_noise_leaves_the_global_generator_alone(ids):
    model, _ = noisy()
    torch.manual_seed(0)
    model(input_ids=ids)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after)


# ------------------------------------------------------------------------------------------------------------- recipes


def test_recipe_round_trip():
    entries = [{"dora": {"r": 4, "alpha": 8, "target_modules": ["q_proj"], "rslora": True}}, {"loraplus": {"ratio": 8}}, "neftune"]
    methods = from_recipe(entries)
    assert methods == [pk.DoRA(r=4, alpha=8, target_modules=["q_proj"], rslora=True), pk.LoRAPlus(ratio=8), pk.NEFTune()]
    assert from_recipe(to_recipe(methods)) == methods


@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_stands_in_a_recipe(name):
    [method] = from_recipe([name])
    assert type(method) is REGISTRY[name] and method_name(method) == name
    assert to_recipe([method]) == [{name: method.model_dump()}]
    assert from_recipe([{name: method.model_dump()}]) == [method]
    assert issubclass(REGISTRY[name], Method) and REGISTRY[name].__doc__


@pytest.mark.parametrize(
    "entries,message",
    [
        ([{"lorra": {"r": 4}}], "unknown method 'lorra'; did you mean 'lora'"),
        ([{"lora": {"rnk": 4, "aplha": 3}}], "aplha"),
        ([{"lora": {"aplha": 3}}], "did you mean 'alpha'"),
        ([{"lora": {"r": 0}}], "r"),
        ([{"lora": {"r": "8"}}], "r"),
        ([{"lora": {"dropout": 1.0}}], "dropout"),
        ([{"neftune": {"length": "reel"}}], "length"),
        ([{"lora": {}, "dora": {}}], "expected one method"),
        ({"lora": {}}, "expected a list"),
        ([{"lora": {}}, {"dora": {}}], "would both replace"),
    ],
)
def test_wrong_recipes_are_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        from_recipe(entries)


def test_methods_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        pk.LoRA().r = 3


def test_wishes_for_the_base():
    assert {name: method().quantize() for name, method in REGISTRY.items()} == {
        "lora": None,
        "dora": None,
        "qlora": "nf4",
        "loraplus": None,
        "neftune": None,
    }


@pytest.mark.parametrize("name", [name for name, method in REGISTRY.items() if method.swaps_layers])
def test_every_layer_method_trains_and_detaches_on_a_model(name, saved_llama, ids):
    model = quantized_llama(saved_llama) if name == "qlora" else tiny_llama()
    pk.attach(model, REGISTRY[name](r=2))
    pk.detach(model)  # once without use, so that the 4-bit base is protected before its first evaluation
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    modules = dict(model.named_modules())
    pk.attach(model, REGISTRY[name](r=2))
    optimizer = pk.build_optimizer(model, learning_rate=1e-2)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wake(model)
    pk.detach(model)
    model.eval()
    assert dict(model.named_modules()) == modules
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


# --------------------------------------------------------------------------------------- as a Hugging Face user uses them


def test_an_optimizer_of_what_stands_around_an_adapted_model_has_its_adapters():
    """The trap: a value head beside, a vision tower around, two devices: the adapters were left out, and never moved."""
    model = tiny_llama()
    pk.attach(model, [pk.LoRA(r=2), pk.LoRAPlus(ratio=4)])
    alone = pk.build_optimizer(model, learning_rate=1e-3)

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.value = model, nn.Linear(64, 1)

    found = pk.build_optimizer(Around(), learning_rate=1e-3)
    sizes = {(group["adapter"], group["role"]): (group["lr"], len(group["params"])) for group in found.param_groups}
    assert sizes == {(group["adapter"], group["role"]): (group["lr"], len(group["params"])) for group in alone.param_groups} | {(None, "full"): (1e-3, 2)}
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        groups = pk.build_optimizer(wrapped, learning_rate=1e-3).param_groups
        assert [(g["lr"], len(g["params"])) for g in groups] == [(g["lr"], len(g["params"])) for g in alone.param_groups]
        with pytest.raises(ValueError, match="attach to the model itself"):
            pk.attach(wrapped, pk.LoRA(), adapter="more")


def test_noise_follows_an_embedding_that_is_resized(ids):
    model, _ = noisy()
    model.resize_token_embeddings(128)
    heard = Listener(model)
    model.train()(input_ids=ids)
    model(input_ids=ids)
    assert heard.noise[-1].any(), "transformers made a new embedding"
    pk.detach(model)
    heard.noise.clear()
    model.train()(input_ids=ids)
    assert not heard.noise[-1].any()


def test_the_base_in_train_mode_has_no_noise(ids):
    """A DPO reference, computed with gradients on: what is meant is the frozen base."""
    model, heard = noisy()
    with pk.adapters_disabled(model):
        reference = model(input_ids=ids).logits
    assert not heard.noise[-1].any()
    assert torch.equal(reference, tiny_llama(max_position_embeddings=512).train()(input_ids=ids).logits)
    model(input_ids=ids)
    assert heard.noise[-1].any()


def test_an_embedding_called_by_itself_is_told_nothing_of_the_batch_before():
    model, heard = noisy()
    ids = torch.randint(3, 96, (1, 8))
    model(input_ids=ids, attention_mask=torch.tensor([[1] * 4 + [0] * 4]))
    assert not heard.noise[-1][:, 4:].any()
    model.get_input_embeddings()(ids)
    assert heard.noise[-1][:, 4:].any(), "its rows have no padding that anybody told of"
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(torch.tensor([5, 7])), embedding.weight[[5, 7]])


def test_a_head_that_is_read_instead_of_called_has_its_trained_rows(ids):
    """trl's losses take lm_head.weight: rows that train there would get no gradient, and the loss be another model's."""
    for tie in (True, False):
        model = tiny_llama(tie_word_embeddings=tie)
        pk.attach(model, pk.LoRA(r=2, trainable_tokens=[5, 9] if tie else {"embed_tokens": [5, 9], "lm_head": [5, 9]}))
        wake(model)
        hidden = model.model(input_ids=ids).last_hidden_state
        read = nn.functional.linear(hidden, model.lm_head.weight)
        torch.testing.assert_close(read, model(input_ids=ids).logits)
        read.sum().backward()
        rows = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name and (tie or "lm_head" in name))
        assert rows.grad.any()
        with pk.adapters_disabled(model):
            assert model.lm_head.weight is model.lm_head.base_layer.weight


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_merged_head_is_not_tied_again(target, ids):
    """The config said that they were one weight: whoever believed it lost the update."""
    model = tiny_llama(tie_word_embeddings=True)
    pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj", target]))
    wake(model)
    wanted = model.eval()(input_ids=ids).logits
    pk.merge(model)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    model.resize_token_embeddings(96)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    tied = tiny_llama(tie_word_embeddings=True)
    pk.attach(tied, pk.LoRA(r=2))
    assert pk.merge(tied).config.tie_word_embeddings and tied.lm_head.weight is tied.model.embed_tokens.weight


def test_saving_and_merging_what_is_switched_off(tmp_path, ids):
    model = tiny_llama()
    pk.attach(model, pk.LoRA(r=2))
    model.disable_adapters()
    model.save_pretrained(tmp_path / "adapter")
    assert pk.load_adapter(tiny_llama(), tmp_path / "adapter") is not None
    with pytest.raises(ValueError, match="the adapters are disabled, so the model computes its base"):
        pk.merge(model)
    pk.set_adapter(model, [])
    with pytest.raises(ValueError, match=r"no adapter is active, so there is none to save; choose one with peftkit.set_adapter"):
        model.save_pretrained(tmp_path / "other")


@pytest.mark.parametrize("computed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm], ids=["weight norm", "spectral norm"])
def test_linears_that_compute_their_weight_are_left_out_and_told(computed):
    model = nn.Sequential(computed(nn.Linear(8, 8)), nn.Linear(8, 8))
    summary = str(pk.attach(model, pk.LoRA(r=2)))
    assert "1 linears: 1 x1" in summary and "1 linears, such as 0, whose weight is computed in each call" in summary
    with pytest.raises(ValueError, match="target '0' matches no layer that can be adapted"):
        pk.attach(nn.Sequential(computed(nn.Linear(8, 8)), nn.Linear(8, 8)), pk.LoRA(r=2, target_modules=["0"]))


def _of(name: str, **sizes):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    common = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, pad_token_id=0)
    return kind(kind.config_class(**common | sizes))


def _gemma3n():
    kinds = ["sliding_attention", "full_attention"] * 2
    return _of(
        "Gemma3nForCausalLM", head_dim=8, num_hidden_layers=4, intermediate_size=[48] * 4, layer_types=kinds, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip


LEFT_OUT = {
    "Gemma 3n": (_gemma3n, "8 linears, such as model.layers.0.altup.prediction_coefs, whose weight the model itself writes to"),
    "Phi-3.5-MoE": (lambda: _of("PhimoeForCausalLM", num_local_experts=4, num_experts_per_tok=2), "2 linears, such as model.layers.0.mlp.router, which route"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_linears_that_are_none_to_an_adapter_are_left_out_of_all_linear(name):
    build, told = LEFT_OUT[name]
    model, ids = build(), torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    assert told in str(pk.attach(model, pk.LoRA(r=2)))
    optimizer = pk.build_optimizer(model.train(), learning_rate=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_what_attach_cannot_take_is_named():
    for wrong, told in ((pk.LoRA, "got <class 'peftkit.methods.lora.LoRA'>"), ("lora", "got 'lora'"), ([pk.LoRA(r=2), 3], "got 3")):
        with pytest.raises(ConfigError, match=re.escape(told)):
            pk.attach(tiny_llama(), wrong)
    with pytest.raises(ValueError, match="trainable_tokens names no token"):
        pk.attach(tiny_llama(), pk.LoRA(r=2, trainable_tokens=[]))
