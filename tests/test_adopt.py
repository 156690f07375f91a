"""Adopted peft models against peft itself: the same training, files and methods; and peft's own layers back."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import quantized_llama, tiny_gpt2, tiny_llama, wake
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners import lora
from safetensors.torch import load_file
from test_trainers import arguments, rows, tiny_tokenizer
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

import peftkit as pk
from peftkit import quant
from peftkit.adopt import Adopted

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",  # the data loaders of the trainers
    "ignore:`gradient_checkpointing.*` is deprecated:FutureWarning",  # the one name that all 5.x have; trl uses it too
    "ignore:Could not find a config file in:UserWarning",  # peft 0.18 of a base without a name
)


def peft_model(base: nn.Module | None = None, seed: int = 0, **options) -> PeftModel:
    """A peft model away from its start; the same one for the same arguments."""
    base = tiny_llama() if base is None else base
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**(dict(r=4, lora_alpha=8, target_modules=LLAMA, task_type="CAUSAL_LM") | options)))
    quant.protect(model)
    wake(model)
    return model.eval()


def pair(**options) -> tuple[PeftModel, PeftModel]:
    """(peft's own, the same adopted)."""
    theirs, ours = peft_model(**options), peft_model(**options)
    pk.adopt(ours)
    return theirs, ours


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> list[float]:
    model.train()
    losses = []
    for step in range(steps):
        batch = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and theirs
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= 1e-4 * expected.norm(), name


def of_peft(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


# -------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "nf4"])
def test_twenty_steps_are_those_of_peft_with_an_optimizer_built_before(kind, dora, saved_llama):
    def build() -> tuple[PeftModel, torch.optim.Optimizer]:
        base = {"llama": tiny_llama, "gpt2": tiny_gpt2, "nf4": lambda: quantized_llama(saved_llama)}[kind]()
        options = dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True) if kind == "gpt2" else {}
        model = peft_model(base, use_dora=dora, **options)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)

    theirs, their_optimizer = build()
    ours, optimizer = build()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in ours.named_parameters()}
    report = pk.adopt(ours)
    expected, found = train(theirs, their_optimizer), train(ours, optimizer)
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-5
    assert abs(expected[0] - expected[-1]) > 1e-3, "the steps did something"
    assert len(report.adopted) == (8 if kind == "gpt2" else 14) and not report.left and not report.notes
    for (name, parameter), trained in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert parameter is before[name][0]
        if parameter.requires_grad:
            assert torch.allclose(parameter, trained, atol=2e-4) and not torch.equal(parameter, before[name][1]), name
        else:
            assert torch.equal(parameter, before[name][1]), name


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations(dora, reentrant, ids):
    theirs, ours = pair(use_dora=dora)
    for model in (theirs, ours):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
    assert_same_gradients(gradients(ours, ids), gradients(theirs, ids))


@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_bf16_base_under_masters_of_either_precision(dora, masters, ids):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = LoraConfig(r=4, use_dora=dora, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
        model = get_peft_model(tiny_llama(num_hidden_layers=1).bfloat16(), config, autocast_adapter_dtype=masters == torch.float32)
        wake(model)
        models.append(model)
    theirs, ours = models
    report = pk.adopt(ours)
    assert ours.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.dtype == masters
    assert any("torch.bfloat16" in note for note in report.notes) == (masters == torch.float32)
    expected, found = gradients(theirs, ids), gradients(ours, ids)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == masters
        assert (found[name] - gradient).float().norm() <= 0.05 * gradient.float().norm(), name
    assert torch.allclose(logits(ours, ids), logits(theirs, ids), atol=2e-2)


def test_dropout_is_read_as_it_stands(ids):
    theirs, ours = pair(lora_dropout=0.5)
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    ours.train(), theirs.train()
    assert not torch.equal(logits(ours, ids), logits(ours, ids)), "drops in training"
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    assert torch.allclose(logits(ours, ids), logits(theirs, ids), atol=1e-6)
    for model in (theirs, ours):
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train().p = 0.5
    assert not torch.equal(logits(ours, ids), logits(ours, ids)), "dropout that was left on in evaluation"


def test_a_layer_without_dropout_takes_no_dropped_product_from_the_one_beside_it():
    theirs, ours = pair(lora_dropout=0.5)
    expected, found = (model.train().base_model.model.model.layers[0].self_attn for model in (theirs, ours))
    x, y = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    found.q_proj(x), found.k_proj(x)
    expected.k_proj.lora_dropout.default.p = found.k_proj.lora_dropout.default.p = 0.0
    found.q_proj(y)
    assert torch.allclose(found.k_proj(y), expected.k_proj(y), atol=1e-6)


def test_what_differs_from_peft_is_said():
    report = pk.adopt(peft_model(use_dora=True, lora_dropout=0.1))
    assert len(report.notes) == 1 and "DoRA with dropout" in report.notes[0] and report.notes[0] in str(report)
    assert "14 layers: q_proj x2" in str(report)


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_transformers_trainer(kind, saved_llama, tmp_path, ids):
    from transformers import Trainer, TrainingArguments

    def trained(adopted: bool):
        model = peft_model(quantized_llama(saved_llama, kind) if kind else tiny_llama())
        if adopted:
            pk.adopt(model)
        trainer = Trainer(model, TrainingArguments(**arguments(tmp_path / str(adopted))), train_dataset=rows())
        trainer.train()
        return model.eval(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, losses = trained(True)
    _, expected = trained(False)
    assert len(losses) == 3 and losses == pytest.approx(expected, abs=1e-4) and losses[-1] < losses[0]
    checkpoint = tmp_path / "True" / "checkpoint-3"
    assert not list(checkpoint.glob("model*.safetensors")), "the base is not written"
    base = quantized_llama(saved_llama, kind) if kind else tiny_llama()
    quant.protect(base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, checkpoint), ids), logits(model, ids))


def test_trl_sft_trainer_on_4_bits(saved_llama, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": [" ".join(str((start + k) % 40) for k in range(12)) for start in range(16)]})
    model = peft_model(quantized_llama(saved_llama))
    pk.adopt(model)
    options = arguments(tmp_path) | {"max_length": 32, "bf16": False}
    trainer = trl.SFTTrainer(model, args=trl.SFTConfig(**options), train_dataset=data, processing_class=tiny_tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert all(isinstance(layer, Adopted) for layer in of_peft(model))
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()


# -------------------------------------------------------------------------------------------------- what peft's users do


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_base_that_train(bias, ids):
    for dora in (False, True):
        theirs, ours = pair(bias=bias, use_dora=dora)
        expected = gradients(theirs, ids)
        assert sum("base_layer.bias" in name for name in expected) == 14
        assert_same_gradients(gradients(ours, ids), expected)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}}, {"use_dora": True}])
def test_outputs_in_evaluation(options, ids):
    theirs, ours = pair(**options)
    if options.get("use_dora"):
        assert torch.allclose(logits(ours, ids), logits(theirs, ids), atol=1e-6)
    else:
        assert torch.equal(logits(ours, ids), logits(theirs, ids))
    with rescale_adapter_scale(ours, 0.5), rescale_adapter_scale(theirs, 0.5):
        assert torch.allclose(logits(ours, ids), logits(theirs, ids), atol=1e-6)
    batch = dict(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours.generate(**batch), theirs.generate(**batch))


def test_an_8_bit_base(saved_llama, ids):
    theirs, ours = peft_model(quantized_llama(saved_llama, "int8")), peft_model(quantized_llama(saved_llama, "int8"))
    assert len(pk.adopt(ours).adopted) == 14
    theirs.train(), ours.train()
    assert_same_gradients(gradients(ours, ids), gradients(theirs, ids))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_model_keeps_its_class_names_and_files(dora, tmp_path, ids, capsys):
    theirs, ours = pair(use_dora=dora)
    assert isinstance(ours, PeftModel) and type(ours) is type(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    printed = []
    for model in (theirs, ours):
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""
    expected, found = get_peft_model_state_dict(theirs), get_peft_model_state_dict(ours)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    expected, found = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    assert configs[0] == configs[1]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    assert torch.equal(logits(loaded, ids), logits(theirs, ids))
    pk.adopt(loaded)
    assert torch.equal(logits(loaded, ids), logits(ours, ids))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merging(dora, ids):
    theirs, ours = pair(use_dora=dora)
    before = logits(ours, ids)
    for model in (theirs, ours):
        model.merge_adapter()
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    with pytest.raises(ValueError, match=r"merged into the weights of base_model.*unmerge_adapter"):
        pk.adopt(theirs)
    for model in (theirs, ours):
        model.unmerge_adapter()
    assert torch.allclose(logits(ours, ids), before, atol=1e-5) and not any(layer.merged for layer in of_peft(ours))
    expected, found = theirs.merge_and_unload(), ours.merge_and_unload()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))
    assert not of_peft(found) and type(found) is type(tiny_llama())
    with pytest.raises(ValueError, match=r"holds no layer that peftkit\.adopt put in"):
        pk.release(found)


@pytest.mark.parametrize("event", ["merge", "move"])
def test_a_norm_is_not_kept_over_what_writes_to_the_weight_without_a_trace(event):
    ours = peft_model(use_dora=True)
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["down_proj"]))
    pk.adopt(ours)
    layer = ours.base_model.model.model.layers[0].mlp.down_proj.train()
    x = torch.randn(3, 96)
    with torch.no_grad():
        layer(x)  # the norm is kept from here
        layer.base_layer.weight.data *= 2
        if event == "merge":
            layer.merge(adapter_names=["other"]), layer.unmerge()
        else:
            ours.float()
        assert torch.allclose(layer(x), lora.Linear.forward(layer, x), atol=1e-4)


def test_disabled_adapters_are_the_base(ids):
    _, ours = pair()
    for mode in (ours.train, ours.eval):
        mode()
        with ours.disable_adapter():
            assert torch.equal(logits(ours, ids), logits(tiny_llama(), ids))
        assert not torch.allclose(logits(ours, ids), logits(tiny_llama(), ids), atol=1e-3)
    assert torch.equal(logits(ours.unload(), ids), logits(tiny_llama(), ids))


def test_adapters_added_switched_stacked_and_deleted_after_adoption(tmp_path, ids):
    other = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"])
    peft_model(seed=5).save_pretrained(tmp_path)
    theirs, ours = pair()
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.add_adapter("other", other)
        model.load_adapter(tmp_path, "loaded")
        model.set_adapter("other")
        wake(model, seed=9)
    assert all(isinstance(layer, Adopted) for layer in of_peft(ours)) and list(ours.state_dict()) == list(theirs.state_dict())
    seen = []
    for names in ("other", "loaded", ["default", "other"], ["other", "loaded"], "default"):
        for model in (theirs, ours):
            model.base_model.set_adapter(names)
        for mode in ("eval", "train"):
            expected = logits(getattr(theirs, mode)(), ids)
            assert torch.allclose(logits(getattr(ours, mode)(), ids), expected, atol=1e-6), (names, mode)
        assert_same_gradients(gradients(ours, ids), gradients(theirs, ids))
        assert not any(torch.allclose(expected, earlier, atol=1e-4) for earlier in seen)
        seen.append(expected)
    for model in (theirs, ours):
        model.add_weighted_adapter(["default", "loaded"], [0.3, 0.7], "both", combination_type="linear")
        model.set_adapter("both")
        model.delete_adapter("other")
    assert torch.allclose(logits(ours, ids), logits(theirs, ids), atol=1e-6)


def test_a_product_that_was_taken_and_not_used_is_not_used_under_another_adapter():
    """q, k and v are called apart, with the adapter switched between: no product of the old one may be left over."""
    theirs, ours = pair()
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA))
        model.train()
        model.set_adapter("other")
        wake(model, seed=9)
        model.set_adapter("default")
    x = torch.randn(2, 5, 64)
    expected, found = (model.base_model.model.model.layers[0].self_attn for model in (theirs, ours))
    assert torch.allclose(found.q_proj(x), expected.q_proj(x), atol=1e-5)
    for model in (theirs, ours):
        model.set_adapter("other")
    assert torch.allclose(found.k_proj(x), expected.k_proj(x), atol=1e-5)
    y = torch.randn(2, 5, 64)
    for model in (theirs, ours):
        model.set_adapter("default")
    for name in ("v_proj", "k_proj", "q_proj"):
        assert torch.allclose(getattr(found, name)(y), getattr(expected, name)(y), atol=1e-5)


def test_what_ours_does_not_cover_goes_to_the_forward_of_peft(ids):
    theirs, ours = pair(lora_dropout=0.2)
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.add_adapter("dora", LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
        model.add_adapter("biased", LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"]))
        model.add_adapter("undropped", LoraConfig(r=4, target_modules=["q_proj"]))
        model.base_model.set_adapter(["dora", "biased", "undropped"])
        wake(model)
    for names in ("biased", ["default", "dora"], ["default", "biased"], ["undropped", "default"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(names)
        assert torch.allclose(logits(ours, ids), logits(theirs, ids), atol=1e-6), names
    with torch.no_grad():
        mixed = dict(input_ids=ids, adapter_names=["default", "biased", "__base__"])
        assert torch.allclose(ours(**mixed).logits, theirs(**mixed).logits, atol=1e-6)
    expected, found = (model.train().base_model.model.model.layers[0].self_attn.q_proj for model in (theirs, ours))
    x = torch.randn(2, 5, 64)
    outputs = []
    for layer in (expected, found):  # two rates of dropout are drawn as peft draws them
        torch.manual_seed(3)
        outputs.append(layer(x))
    assert torch.equal(*outputs) and not torch.equal(found(x), found(x))
    for layer in (expected, found):
        layer.eval().set_scale("undropped", 0)
    assert torch.allclose(found(x), expected(x), atol=1e-6), "the first of two scales is zero"
    with pytest.warns(UserWarning, match="2 of peft's layers stay with peft's forward"):
        report = pk.adopt(ours)
    assert {name.split("q_proj ")[1] for name in report.left} == {"(biased)"} and "lora_bias" in next(iter(report.left.values()))


# ----------------------------------------------------------------------------------------------------- copies and release


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_release_gives_the_very_modules_back_with_what_they_learned(dora, ids):
    ours = peft_model(use_dora=dora)
    modules, parameters = of_peft(ours), dict(ours.named_parameters())
    pk.adopt(ours)
    assert not set(map(id, modules)) & set(map(id, of_peft(ours)))
    train(ours, torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2), steps=3)
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    ours.base_model.set_adapter(["other"])
    wake(ours)
    assert pk.release(ours) is ours
    assert list(map(id, of_peft(ours))) == list(map(id, modules))
    assert all(type(module) is lora.Linear and "_engine" not in vars(module) for module in modules)
    assert all(dict(ours.named_parameters())[name] is parameter for name, parameter in parameters.items())
    theirs = peft_model(use_dora=dora)
    theirs.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.load_state_dict(ours.state_dict())
    for names in ("other", "default"):
        for model in (ours.eval(), theirs.eval()):
            model.base_model.set_adapter(names)
        assert torch.equal(logits(ours, ids), logits(theirs, ids))
    with pytest.raises(ValueError, match=r"holds no layer that peftkit\.adopt put in"):
        pk.release(ours)


def test_settings_made_while_adopted_stay_after_release(ids):
    theirs, ours = pair()
    hooked = []
    layer = ours.base_model.model.model.layers[1].self_attn.k_proj
    handle = layer.register_forward_hook(lambda module, x, y: hooked.append(module))
    for model in (theirs, ours):
        model.base_model.disable_adapter_layers()
    pk.release(ours)
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    assert hooked == [ours.base_model.model.model.layers[1].self_attn.k_proj]
    handle.remove()
    logits(ours, ids)
    assert len(hooked) == 1


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_are_whole_and_apart(how, tmp_path, ids):
    theirs, ours = pair(use_dora=True)
    before = logits(ours, ids)
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    else:
        torch.save(ours, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(twin, ids), before)
    assert all(isinstance(layer, Adopted) and layer._engine.layer is layer for layer in of_peft(twin))
    assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in twin.parameters()}
    train(twin, torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2), steps=2)
    train(theirs, torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2), steps=2)
    assert torch.equal(logits(ours.eval(), ids), before)
    expected = logits(theirs.eval(), ids)
    assert torch.allclose(logits(twin.eval(), ids), expected, atol=1e-4) and not torch.allclose(expected, before, atol=1e-3)
    pk.release(twin)
    assert all(type(layer) is lora.Linear for layer in of_peft(twin))
    assert torch.allclose(logits(twin, ids), expected, atol=1e-4)


def test_a_replica_on_another_device_computes_with_its_own_modules():
    """nn.DataParallel copies a layer shallowly and gives the copy tensors of its own."""
    _, ours = pair()
    layer = ours.base_model.model.model.layers[0].mlp.down_proj
    replica = layer._replicate_for_data_parallel()
    replica.lora_B = nn.ModuleDict({"default": nn.Linear(4, 64, bias=False)})
    nn.init.zeros_(replica.lora_B.default.weight)
    x = torch.randn(3, 96)
    assert torch.equal(replica(x), layer.base_layer(x)) and not torch.allclose(layer(x), replica(x), atol=1e-3)


def test_a_base_that_was_replaced_under_the_layer():
    _, ours = pair()
    layer = ours.base_model.model.model.layers[0].mlp.down_proj
    layer.base_layer = nn.Linear(96, 64)
    x = torch.randn(3, 96)
    with torch.no_grad():
        assert torch.equal(layer(x), lora.Linear.forward(layer, x))


def test_compiled_into_one_graph():
    theirs, ours = pair(use_dora=True)
    expected, layer = (model.base_model.model.model.layers[0].mlp.down_proj for model in (theirs, ours))
    x = torch.randn(3, 96, requires_grad=True)
    found = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.allclose(found, expected(x), atol=1e-5)
    (of_found,), (of_expected,) = (torch.autograd.grad(y.square().sum(), x) for y in (found, expected(x)))
    assert torch.allclose(of_found, of_expected, rtol=1e-4, atol=1e-4)


def test_parameters_given_from_outside():
    theirs, ours = pair(use_dora=True)
    expected, layer = (model.base_model.model.model.layers[0].mlp.down_proj for model in (theirs, ours))
    given = {name: torch.randn_like(value) for name, value in layer.state_dict().items() if "lora" in name}
    x = torch.randn(3, 96)
    found, expected = (torch.func.functional_call(module, given, (x,)) for module in (layer, expected))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ what is adopted


def test_a_transformers_model_with_adapters_of_its_own(tmp_path, ids):
    pytest.importorskip("peft", MIN_PEFT_VERSION)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = tiny_llama()
        model.add_adapter(LoraConfig(r=4, target_modules=LLAMA))
        wake(model)
        models.append(model.eval())
    theirs, ours = models
    assert len(pk.adopt(ours).adopted) == 14 and type(ours) is type(theirs)
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    for model, name in zip(models, ("theirs", "ours"), strict=True):
        model.save_pretrained(tmp_path / name)
    expected, found = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    ours.disable_adapters()
    assert torch.equal(logits(ours, ids), logits(tiny_llama(), ids))


def test_adopting_again_takes_in_what_was_added(ids):
    theirs, ours = (peft_model(target_modules=["q_proj"]) for _ in range(2))
    assert len(pk.adopt(ours).adopted) == 2
    engine = of_peft(ours)[0]._engine
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
        model.set_adapter("other")
        wake(model)
    assert sum(isinstance(layer, Adopted) for layer in of_peft(ours)) == 2
    assert len(pk.adopt(ours).adopted) == 4 and of_peft(ours)[0]._engine is engine
    assert engine.shared is of_peft(ours)[1]._engine.shared is not None
    assert_same_gradients(gradients(ours.train(), ids), gradients(theirs.train(), ids))
    pk.release(ours)
    assert [type(layer) for layer in of_peft(ours)] == [lora.Linear] * 4


def test_one_layer_under_two_names_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Identity()

    model = get_peft_model(Twice(), LoraConfig(r=2, target_modules=["first"]))
    inner = model.base_model.model
    inner.second = inner.first
    assert len(pk.adopt(model).adopted) == 2 and inner.first is inner.second and isinstance(inner.first, Adopted)
    pk.release(model)
    assert inner.first is inner.second and type(inner.first) is lora.Linear


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_stays_with_peft_is_said_with_its_reason(ids):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.__class__ = Scaled
    theirs = peft_model(copy.deepcopy(model), target_modules=[*LLAMA, "embed_tokens"])
    ours = peft_model(model, target_modules=[*LLAMA, "embed_tokens"])
    replaced = ours.base_model.model.model.layers[1].mlp.up_proj
    replaced.forward = replaced.forward  # as accelerate's hooks do
    with pytest.warns(UserWarning, match="3 of peft's layers stay"):
        report = pk.adopt(ours)
    reasons = {name.removeprefix("base_model.model.model."): why for name, why in report.left.items()}
    assert reasons.keys() == {"embed_tokens", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"} and len(report.adopted) == 12
    assert "lora.Embedding" in reasons["embed_tokens"] and "Scaled" in reasons["layers.0.mlp.up_proj"]
    assert "another library" in reasons["layers.1.mlp.up_proj"] and "a forward of its own" in reasons["layers.0.mlp.up_proj"]
    assert all(why in str(report) for why in reasons.values())
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    assert_same_gradients(gradients(ours.train(), ids), gradients(theirs.train(), ids))


def test_models_that_cannot_be_adopted():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM holds no adapter layer of peft's; call peft\.get_peft_model first"):
        pk.adopt(tiny_llama())
    ours = tiny_llama()
    pk.attach(ours, pk.LoRA(r=2))
    with pytest.raises(ValueError, match="peftkit's already"):
        pk.adopt(ours)
    other = get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    before = [type(module) for module in other.modules()]
    with pytest.raises(ValueError, match=r"none of peft's layers can be adopted: .*k_proj: a layer of the kind ia3\.Linear"):
        pk.adopt(other)
    assert [type(module) for module in other.modules()] == before


def test_four_bit_weights_are_protected_from_repacking(saved_llama):
    base = quantized_llama(saved_llama)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    for module in model.modules():
        if quant.is_4bit(module):
            module.support_avx512bf16_for_cpu = True
    pk.adopt(model)
    assert not any(module.support_avx512bf16_for_cpu for module in model.modules() if quant.is_4bit(module))


@pytest.mark.parametrize("adopted", [True, False])
def test_adapters_disabled_reaches_peft_s_layers(adopted, ids):
    """A DPO reference that were the policy itself would be told by nobody."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])).eval()
    plain = model(input_ids=ids).logits
    wake(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if adopted:
        pk.adopt(model)
    policy = model(input_ids=ids).logits
    with pk.adapters_disabled(model):
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert torch.equal(model(input_ids=ids).logits, policy) and not torch.allclose(policy, plain)
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_adapters_disabled_on_a_model_without_any():
    with pytest.raises(ValueError, match="has no peftkit adapters"), pk.adapters_disabled(tiny_llama()):
        pytest.fail("nothing there to disable")
