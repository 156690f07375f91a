"""Modules trained as a whole and rows of embeddings: exact, tied, merged, saved, exchanged with peft."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import clone, quantized_llama, tiny_llama, wake
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    SiglipConfig,
    SiglipForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import peftkit as pk
from peftkit import quant
from peftkit.checkpoint import ADAPTER_FILE, CONFIG_FILE, CheckpointError
from peftkit.layers import LoRALinear, SavedModule, TrainedTokens, adapter_layers, heads, trainable_parameters
from peftkit.loss import TokenLoss

PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **inputs) -> Tensor:
    return model.eval()(input_ids=ids, **inputs).logits


def attached(model: nn.Module, method: type = pk.LoRA, **options) -> nn.Module:
    torch.manual_seed(0)
    pk.attach(model, method(**{"r": 2, "alpha": 4, "target_modules": ["q_proj"]} | options))
    wake(model)
    return model


def train(model: nn.Module, ids: Tensor, steps: int = 3, labels: Tensor | None = None) -> list[float]:
    optimizer = pk.build_optimizer(model, learning_rate=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids if labels is None else labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def peft_from(folder, base: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on tied embeddings
        return PeftModel.from_pretrained(base, folder).eval()


def peft_on(base: nn.Module, folder, **options) -> nn.Module:
    """A model that peft adapted and saved."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | options))
        wake(model)
        model.save_pretrained(folder)
    return model.eval()


def classifier(kind: str) -> nn.Module:
    torch.manual_seed(0)
    small = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64, num_labels=3)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0)
    if kind == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**small, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    if kind == "deberta":
        return DebertaV2ForSequenceClassification(DebertaV2Config(**small, **quiet))
    bert = {"bert": BertForSequenceClassification, "bert tokens": BertForTokenClassification}
    return bert[kind](BertConfig(**small, **quiet)) if kind in bert else RobertaForSequenceClassification(RobertaConfig(**small, **quiet))


CLASSIFIERS = {"llama": ["score"], "bert": ["classifier"], "bert tokens": ["classifier"], "roberta": ["classifier"], "deberta": ["pooler", "classifier"]}


# ------------------------------------------------------------------------------------------------------- modules_to_save


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["norm", "layers.1.mlp"], ["embed_tokens", "lm_head"]], ids=",".join)
@pytest.mark.parametrize("tie", [False, True], ids=["free", "tied"])
def test_trains_beside_the_frozen_module(tie, names, ids):
    model = tiny_llama(tie_word_embeddings=tie)
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    start = logits(model, ids)
    pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"], modules_to_save=names))
    assert torch.equal(logits(model, ids), start)
    with pk.adapters_disabled(model):
        assert torch.equal(logits(model, ids), start)
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    saved = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, SavedModule)}
    assert saved
    for name, layer in saved.items():
        for trained in layer.role_parameters():
            assert trained.role == "full" and not torch.equal(trained.parameter, before[f"{name}.{trained.key}"]), (name, trained.key)
    adapted = logits(model, ids)
    model.tie_weights()
    assert torch.equal(logits(model, ids), adapted)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    with pk.adapters_disabled(model):
        assert torch.equal(logits(model, ids), start), "the frozen module is what it was"
    other = clone(model)
    pk.detach(other)
    assert {name for name, _ in other.named_parameters(remove_duplicate=False)} == before.keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in other.named_parameters())
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tie
    pk.merge(model)
    torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert not adapter_layers(model) and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"]], ids=",".join)
def test_a_tied_weight_is_trained_once_for_both(names, tmp_path, ids):
    model = tiny_llama(tie_word_embeddings=True)
    summary = pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"], modules_to_save=names))
    assert summary.trainable["full"] == 96 * 64
    assert f"{EMBEDDING if names == ['embed_tokens'] else HEAD} trains as a whole, and with it" in str(summary)
    copies = [model.get_submodule(name).modules_to_save["default"].weight for name in (EMBEDDING, HEAD)]
    assert copies[0] is copies[1]
    assert [p.numel() for p in pk.build_optimizer(model).param_groups[-1]["params"]].count(96 * 64) <= 1
    train(model, ids)
    adapted = logits(model, ids)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, ids), adapted)
    copies = [copied.get_submodule(name).modules_to_save["default"].weight for name in (EMBEDDING, HEAD)]
    assert copies[0] is copies[1]

    pk.save_adapter(model, tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    both = [f"{PREFIX}{EMBEDDING}.weight", f"{PREFIX}{HEAD}.weight"]  # peft reads no file that holds it once
    assert torch.equal(state[both[0]], state[both[1]])
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert config["ensure_weight_tying"]
    torch.testing.assert_close(logits(peft_from(tmp_path / "adapter", tiny_llama(tie_word_embeddings=True)), ids), adapted, rtol=1e-5, atol=1e-5)
    fresh = pk.load_adapter(tiny_llama(tie_word_embeddings=True), tmp_path / "adapter")
    assert torch.equal(logits(fresh, ids), adapted)

    (tmp_path / "adapter" / "peftkit.json").unlink()
    [twice] = [key for key in both if not key.endswith(f"{names[0]}.weight")]
    save_file({key: tensor for key, tensor in state.items() if key != twice}, tmp_path / "adapter" / ADAPTER_FILE, metadata={"format": "pt"})
    assert torch.equal(logits(pk.load_adapter(tiny_llama(tie_word_embeddings=True), tmp_path / "adapter"), ids), adapted), "once is enough for us"
    save_file(state | {both[1]: state[both[1]] + 1}, tmp_path / "adapter" / ADAPTER_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"one here and two in the file: base_model\.model\.lm_head\.weight"):
        pk.load_adapter(tiny_llama(tie_word_embeddings=True), tmp_path / "adapter")

    pk.merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert len([key for key in load_file(tmp_path / "merged" / "model.safetensors") if "embed" in key or "lm_head" in key]) == 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), logits(model, ids))


def test_untied_on_request(tmp_path, ids):
    """As peft does by default: the head keeps the frozen weight."""
    model = attached(tiny_llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"], ensure_weight_tying=False)
    assert type(model.lm_head) is nn.Linear
    pk.save_adapter(model, tmp_path / "adapter")
    assert f"{PREFIX}{HEAD}.weight" not in load_file(tmp_path / "adapter" / ADAPTER_FILE)
    for other in (
        pk.load_adapter(tiny_llama(tie_word_embeddings=True), tmp_path / "adapter"),
        peft_from(tmp_path / "adapter", tiny_llama(tie_word_embeddings=True)),
    ):
        torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=1e-5, atol=1e-5)


def test_a_bias_beside_a_shared_weight_stays(ids):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)).eval()
    start = logits(model, ids)
    pk.attach(model, pk.LoRA(r=2, target_modules=["query"], modules_to_save=["word_embeddings"]))
    assert torch.equal(logits(model, ids), start)
    decoder = model.get_output_embeddings()
    assert isinstance(decoder, SavedModule) and [trained.key for trained in decoder.role_parameters()] == ["weight"]
    wake(model)
    adapted = logits(model, ids)
    pk.merge(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
@pytest.mark.parametrize("names,tie", [(["embed_tokens", "lm_head"], False), (["lm_head"], True), (["layers.0.mlp", "norm"], False)])
def test_exchanged_with_peft(names, tie, ours, tmp_path, ids):
    def base() -> nn.Module:
        return tiny_llama(tie_word_embeddings=tie).eval()

    if ours:
        wanted = logits(attached(model := base(), modules_to_save=names), ids)
        pk.save_adapter(model, tmp_path / "adapter")
        other = peft_from(tmp_path / "adapter", base())
    else:
        wanted = logits(peft_on(base(), tmp_path / "adapter", modules_to_save=names, ensure_weight_tying=tie), ids)
        other = pk.load_adapter(base(), tmp_path / "adapter")
    torch.testing.assert_close(logits(other, ids), wanted, rtol=1e-5, atol=1e-5)


def test_masters_are_fp32_and_the_rest_is_the_base_s(tmp_path, ids):
    """Steps that bf16 would lose: the copy is fp32, computes in bf16, and stands in the file in bf16."""
    model = tiny_llama().bfloat16()
    start = logits(model, ids[:1, :4])
    pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert torch.equal(logits(model, ids[:1, :4]), start) and start.dtype == torch.bfloat16
    master = model.lm_head.modules_to_save["default"].weight
    assert master.dtype == torch.float32
    with torch.no_grad():
        master.add_(1e-6)
    kept = model.lm_head.base_layer.weight
    assert (master != kept).double().mean() > 0.9 and (master.bfloat16() == kept).double().mean() > 0.9
    model(input_ids=ids[:1, :4]).logits.float().sum().backward()
    assert master.grad.dtype == torch.float32 and master.grad.any()
    pk.save_adapter(model, tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / ADAPTER_FILE)[f"{PREFIX}lm_head.weight"].dtype == torch.bfloat16
    pk.merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens", "layers.1.mlp"]}, {"trainable_tokens": [5, 7]}], ids=["whole", "rows"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, options, ids):
    gradients = []
    for recompute in (False, True):
        model = attached(tiny_llama(tie_word_embeddings=True), **options).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, _, p in trainable_parameters(model)})
    for name, gradient in gradients[0].items():
        assert gradient.any() and torch.equal(gradient, gradients[1][name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [pk.LoRA, pk.DoRA])
@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_tokens": [5, 7]}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=str)
def test_on_a_gpu(options, method, ids):
    model = attached(tiny_llama(tie_word_embeddings=True).bfloat16().cuda(), method, **options)
    losses = train(model, ids.cuda(), steps=4)
    assert losses[-1] < losses[0] and {p.device.type for p in model.parameters()} == {"cuda"}
    adapted = logits(model, ids.cuda())
    pk.merge(model)
    torch.testing.assert_close(logits(model, ids.cuda()), adapted, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"trainable_tokens": [5, 7]}], ids=["whole", "rows"])
def test_compiles_to_one_graph(options, dtype):
    model = attached(tiny_llama(tie_word_embeddings=True).to(dtype), **options)
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for layer, x in ((model.model.embed_tokens, torch.tensor([[5, 6, 7]])), (model.lm_head, hidden)):
        torch.compiler.reset()
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"trainable_tokens": [5, 7]}], ids=["whole", "rows"])
def test_copies_and_pickles_are_models_of_their_own(options, tmp_path, ids):
    """What save_pretrained of the copy writes is the copy's, not the first model's."""
    model = attached(tiny_llama(tie_word_embeddings=True), **options)
    torch.save(model, tmp_path / "model.pt")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits(again, ids), logits(model, ids))
        wake(again, seed=8)
        again.save_pretrained(tmp_path / "door")
        fresh = pk.load_adapter(tiny_llama(tie_word_embeddings=True), tmp_path / "door")
        assert torch.equal(logits(fresh, ids), logits(again, ids)) and not torch.equal(logits(fresh, ids), logits(model, ids))


def test_a_vocabulary_is_resized_before_not_after(ids):
    model = attached(tiny_llama(), trainable_tokens=[5])
    with pytest.raises(TypeError, match="Embedding"):
        model.resize_token_embeddings(99)


def test_attributes_are_those_of_the_copy_that_applies():
    model = tiny_llama()
    pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    layer = model.lm_head
    assert layer.weight is layer.modules_to_save["default"].weight and layer.out_features == 96
    with pk.adapters_disabled(model):
        assert layer.weight is layer.base_layer.weight


def test_named_adapters(ids):
    model = attached(tiny_llama(), modules_to_save=["lm_head"])
    base, first = logits(clone_without(model), ids), logits(model, ids)
    torch.manual_seed(1)
    pk.attach(model, pk.LoRA(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"]), adapter="other")
    pk.attach(model, pk.LoRA(r=2, target_modules=["k_proj"]), adapter="third")
    assert torch.equal(logits(model, ids), first)
    pk.set_adapter(model, "other")
    assert torch.equal(logits(model, ids), base)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "lm_head.modules_to_save.other.weight" in trained and not [name for name in trained if "default" in name]
    with pytest.raises(ValueError, match="each train a copy of the same module"):
        pk.set_adapter(model, ["default", "other"])
    assert torch.equal(logits(model, ids), base), "what was chosen before is chosen still"
    pk.set_adapter(model, ["default", "third"])
    assert torch.equal(logits(model, ids), first)
    pk.delete_adapter(model, "default")
    assert torch.equal(logits(model, ids), base) and list(model.lm_head.specs) == ["other"]
    pk.delete_adapter(model, "other")
    assert type(model.lm_head) is nn.Linear


def clone_without(model: nn.Module) -> nn.Module:
    return pk.detach(clone(model))


@pytest.mark.parametrize("options,message", [
    ({"modules_to_save": ["lm_hed"]}, r"'lm_hed' matches no module .*did you mean 'lm_head'"),
    ({"modules_to_save": ["layers"]}, "is a ModuleList"),
    ({"modules_to_save": ["act_fn"]}, "holds no parameters"),
    ({"modules_to_save": ["q_proj"]}, "target_modules and modules_to_save both train model.layers.0.self_attn.q_proj"),
    ({"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "lm_head"]}, "both train lm_head .*shares its weight"),
    ({"modules_to_save": ["embed_tokens"], "trainable_tokens": [3]}, "modules_to_save and trainable_tokens both train model.embed_tokens"),
    ({"trainable_tokens": [3], "target_modules": ["q_proj", "lm_head"]}, "target_modules and trainable_tokens both train lm_head"),
    ({"modules_to_save": ["self_attn"]}, "covers every module"),
    ({"trainable_tokens": [96]}, r"has 96 rows and no token 96; call model\.resize_token_embeddings\(97\)"),
    ({"trainable_tokens": [-1]}, "no token -1"),
    ({"trainable_tokens": [3, 3]}, "stands twice"),
    ({"trainable_tokens": {"embed_token": [3]}}, "matches no module.*embeddings: model.embed_tokens"),
    ({"trainable_tokens": {"input_layernorm": [3]}}, "neither an embedding nor"),
    ({"trainable_tokens": {"embed_tokens": [3], "lm_head": [4]}}, "shares its weight with model.embed_tokens"),
], ids=str)  # fmt: skip
def test_what_cannot_be_done_is_an_error_and_the_model_stays(options, message):
    model = tiny_llama(tie_word_embeddings=True)
    modules, trained = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        pk.attach(model, pk.LoRA(**{"r": 2, "target_modules": ["q_proj"]} | options))
    assert dict(model.named_modules()) == modules and [p.requires_grad for p in model.parameters()] == trained


def test_quantised_modules_and_moving_buffers_are_refused(saved_llama):
    with pytest.raises(ValueError, match="is quantised"):
        pk.attach(quantized_llama(saved_llama), pk.LoRA(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]))
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="keeps num_batches_tracked"):
        pk.attach(model, pk.LoRA(target_modules=["0"], modules_to_save=["1"]))


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_tokens": {"embed_tokens": [5], "lm_head": [5]}}], ids=["whole", "rows"])
def test_beside_a_quantised_base(options, saved_llama, tmp_path, ids):
    model = quantized_llama(saved_llama)
    quant.protect(model)  # it is evaluated before anything is attached
    start = logits(model, ids)
    pk.attach(model, pk.QLoRA(r=2, **options))
    assert torch.equal(logits(model, ids), start)
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    adapted = logits(model, ids)
    pk.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(pk.load_adapter(quantized_llama(saved_llama), tmp_path / "adapter"), ids), adapted)
    pk.merge(model)
    torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"trainable_tokens": [5, 7]}], ids=["whole", "rows"])
def test_the_loss_without_full_logits_goes_through_the_trained_head(options, ids):
    model = attached(tiny_llama(tie_word_embeddings=True), **options).train()
    wanted = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    found, _ = TokenLoss(model)(ids, input_ids=ids)
    torch.testing.assert_close(found, wanted)
    parameters = [p for _, _, p in trainable_parameters(model)]
    for mine, other in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- heads


def test_the_head_is_what_stands_beside_the_body():
    small = dict(vocab_size=96, num_labels=3, pad_token_id=0)
    bert = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    tower = dict(bert, image_size=16, patch_size=8)
    found = {
        "distilbert": DistilBertForSequenceClassification(DistilBertConfig(**small, dim=32, n_heads=4, n_layers=1, hidden_dim=48)),
        "xlnet": XLNetForSequenceClassification(XLNetConfig(**small, d_model=32, n_layer=1, n_head=4, d_inner=48)),
        "bert, questions": BertForQuestionAnswering(BertConfig(vocab_size=96, **bert)),
        "bert, language": BertForMaskedLM(BertConfig(vocab_size=96, **bert)),
        "siglip, no body": SiglipForImageClassification(SiglipConfig(vision_config=tower, num_labels=3)),
    }
    assert {name: heads(model) for name, model in found.items()} == {
        "distilbert": ["pre_classifier", "classifier"],
        "xlnet": ["sequence_summary", "logits_proj"],
        "bert, questions": ["qa_outputs"],
        "bert, language": [],
        "siglip, no body": ["classifier"],
    }


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_fresh_head_trains_unless_told_otherwise(kind, tmp_path, ids):
    model, names = classifier(kind).eval(), CLASSIFIERS[kind]
    assert heads(model) == names
    start = logits(model, ids)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    summary = pk.attach(model, pk.LoRA(r=2))
    assert all(isinstance(model.get_submodule(name), SavedModule) and f"{name} trains as a whole" in str(summary) for name in names)
    assert not [name for name in adapter_layers(model) if any(name.startswith(f"{head}.") for head in names)], "nothing of the head has LoRA too"
    assert torch.equal(logits(model, ids), start)
    labels = torch.randint(0, 3, ids.shape if kind == "bert tokens" else ids.shape[:1], generator=torch.Generator().manual_seed(1))
    losses = train(model, ids, labels=labels)
    assert losses[-1] < losses[0]
    for name in names:
        for trained in model.get_submodule(name).role_parameters():
            assert not torch.equal(trained.parameter, before[f"{name}.{trained.key}"]), trained.key
    adapted = logits(model, ids)
    pk.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "door")
    state, door = (load_file(tmp_path / folder / ADAPTER_FILE) for folder in ("adapter", "door"))
    assert state.keys() == door.keys() and all(torch.equal(state[key], door[key]) for key in state), "transformers' save_pretrained writes the head too"
    for folder in ("adapter", "door"):
        assert torch.equal(logits(pk.load_adapter(classifier(kind), tmp_path / folder), ids), adapted)
        torch.testing.assert_close(logits(peft_from(tmp_path / folder, classifier(kind)), ids), adapted, rtol=1e-5, atol=1e-5)
    pk.merge(model)
    torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert tokens", "deberta"])
def test_theirs_bring_their_head(kind, tmp_path, ids):
    """peft puts `classifier` and `score` into the list, whichever there is, and knows no other heads."""
    task = TaskType.TOKEN_CLS if kind == "bert tokens" else TaskType.SEQ_CLS
    targets = ["q_proj"] if kind == "llama" else ["query_proj"] if kind == "deberta" else ["query"]
    wanted = logits(peft_on(classifier(kind), tmp_path / "theirs", task_type=task, target_modules=targets), ids)
    assert json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text())["modules_to_save"] == ["classifier", "score"]
    model = pk.load_adapter(classifier(kind), tmp_path / "theirs")
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-5, atol=1e-5)
    if kind == "deberta":
        assert "pooler is the head of this DebertaV2ForSequenceClassification and stays as it is" in str(pk.describe(model))


def test_a_head_may_stay_or_get_lora_if_one_says_so(tmp_path, ids):
    model = classifier("llama")
    summary = pk.attach(model, pk.LoRA(r=2, modules_to_save=[]))
    assert type(model.score) is nn.Linear
    assert "score is the head of this LlamaForSequenceClassification and stays as it is; name it in modules_to_save" in str(summary)
    wake(model)
    pk.save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(peft_from(tmp_path / "adapter", classifier("llama")), ids), logits(model, ids), rtol=1e-5, atol=1e-5)

    model = classifier("llama")
    pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj", "score"]))
    assert isinstance(model.score, LoRALinear)


def test_a_language_model_has_no_head_to_save():
    model = tiny_llama()
    assert heads(model) == []
    pk.attach(model, pk.LoRA(r=2))
    assert not any(isinstance(layer, SavedModule) for layer in adapter_layers(model).values())


# ----------------------------------------------------------------------------------------------------- trainable_tokens


@pytest.mark.parametrize("tie", [False, True], ids=["free", "tied"])
def test_only_the_chosen_rows_train(tie, tmp_path, ids):
    tokens = [7, 5, 90]
    model = tiny_llama(tie_word_embeddings=tie)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = logits(model, ids)
    summary = pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"], trainable_tokens=tokens))
    assert torch.equal(logits(model, ids), start)
    assert summary.trainable["tokens"] == 3 * 64 and "3 of 96 rows of model.embed_tokens train" in str(summary)
    assert ("those of lm_head with them" if tie else "lm_head has rows of its own, which stay") in str(summary)
    batch = torch.cat([ids, torch.tensor(tokens).repeat(3, 1)], 1)
    optimizer = pk.build_optimizer(model, learning_rate=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    assert max(state["exp_avg"].numel() for state in optimizer.state.values()) == 3 * 64, "optimizer state for the rows alone"
    adapted = logits(model, batch)
    assert not torch.allclose(adapted, logits(clone_without(model), batch), atol=1e-2)
    model.tie_weights()
    assert torch.equal(logits(model, batch), adapted)
    assert model.get_input_embeddings().weight is model.get_input_embeddings().base_layer.weight
    with pk.adapters_disabled(model):
        assert torch.equal(logits(model, ids), start)
    other = clone_without(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in other.named_parameters())

    pk.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "door")
    state, door = (load_file(tmp_path / folder / ADAPTER_FILE) for folder in ("adapter", "door"))
    key = f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"
    assert [k for k in state if "lora" not in k] == [key] and state[key].shape == (3, 64)
    assert state.keys() == door.keys()
    size = (tmp_path / "adapter" / ADAPTER_FILE).stat().st_size
    assert size < 4 * 96 * 64 / 2, "a fraction of the embedding"
    for folder in ("adapter", "door"):
        assert torch.equal(logits(pk.load_adapter(tiny_llama(tie_word_embeddings=tie), tmp_path / folder), batch), adapted)
        theirs = peft_from(tmp_path / folder, tiny_llama(tie_word_embeddings=tie))
        torch.testing.assert_close(logits(theirs, batch), adapted, rtol=1e-5, atol=1e-5)

    pk.merge(model)
    torch.testing.assert_close(logits(model, batch), adapted, rtol=1e-5, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    kept = torch.tensor([token for token in range(96) if token not in tokens])
    assert torch.equal(model.model.embed_tokens.weight[kept], before["model.embed_tokens.weight"][kept])
    assert not torch.isclose(model.model.embed_tokens.weight[tokens], before["model.embed_tokens.weight"][tokens]).all(1).any()
    if not tie:
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


@pytest.mark.parametrize("tie", [False, True], ids=["free", "tied"])
def test_new_tokens(tie, tmp_path, ids):
    """Tokens that a vocabulary got afterwards; the file holds their rows, not the embedding."""

    def grown() -> nn.Module:
        model = tiny_llama(tie_word_embeddings=tie)
        torch.manual_seed(7)
        model.resize_token_embeddings(100, mean_resizing=False)
        return model

    named = [96, 97, 98, 99] if tie else {"embed_tokens": [96, 97, 98, 99], "lm_head": [96, 97, 98, 99]}
    model = attached(grown(), trainable_tokens=named)
    assert (model.lm_head.base_layer.weight is model.model.embed_tokens.base_layer.weight) == tie and isinstance(model.lm_head, TrainedTokens)
    batch = torch.cat([ids, torch.tensor([[96, 99, 98]] * 3)], 1)
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    adapted = logits(model, batch)
    pk.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(pk.load_adapter(grown(), tmp_path / "adapter"), batch), adapted)
    torch.testing.assert_close(logits(peft_from(tmp_path / "adapter", grown()), batch), adapted, rtol=1e-5, atol=1e-5)
    small = tiny_llama(tie_word_embeddings=tie)
    with pytest.raises(CheckpointError, match="another base"):
        pk.load_adapter(small, tmp_path / "adapter")
    assert not adapter_layers(small)


@pytest.mark.parametrize("options", [
    {"trainable_token_indices": [5, 9]},
    {"trainable_token_indices": {"embed_tokens": [9, 5]}},
    {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tie", [False, True], ids=["free", "tied"])
def test_their_rows_load_in_ours(tie, options, tmp_path, ids):
    batch = torch.cat([ids, torch.tensor([[5, 9]] * 3)], 1)
    wanted = logits(peft_on(tiny_llama(tie_word_embeddings=tie), tmp_path / "theirs", **options), batch)
    model = pk.load_adapter(tiny_llama(tie_word_embeddings=tie), tmp_path / "theirs")
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)


def test_rows_of_other_tokens_do_not_fill_an_attached_adapter(tmp_path):
    pk.save_adapter(attached(tiny_llama(), trainable_tokens=[5, 7]), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"other tokens of model\.embed_tokens"):
        pk.load_adapter(attached(tiny_llama(), trainable_tokens=[5, 8]), tmp_path / "adapter")


def test_a_frozen_embedding_that_peft_wrote_along_must_be_the_model_s(tmp_path):
    """peft writes embeddings that were resized; the head is not in modules_to_save."""
    model = attached(tiny_llama())
    pk.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "peftkit.json").unlink()
    state = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    own = {f"{PREFIX}lm_head.weight": model.lm_head.weight.detach().clone()}
    save_file(state | own, tmp_path / "adapter" / ADAPTER_FILE, metadata={"format": "pt"})
    pk.load_adapter(tiny_llama(), tmp_path / "adapter")
    save_file(state | {key: tensor + 1 for key, tensor in own.items()}, tmp_path / "adapter" / ADAPTER_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"frozen weights that differ from this model's.*lm_head\.weight"):
        pk.load_adapter(tiny_llama(), tmp_path / "adapter")


def test_noise_on_the_frozen_embedding_reaches_the_rows():
    model = tiny_llama()
    pk.attach(model, [pk.NEFTune(alpha=50, seed=1), pk.LoRA(r=2, target_modules=["q_proj"], trainable_tokens=[5, 7])])  # the noise sits inside the layer
    wake(model)
    few = torch.tensor([[5, 7, 5]])
    layer = model.model.embed_tokens
    quiet = layer.eval()(few)
    model.train()(input_ids=few)  # the noise learns the lengths from the model's call
    assert ((layer(few) - quiet).abs() > 1e-3).all(2).all()


def test_rows_in_bf16(ids):
    model = tiny_llama(tie_word_embeddings=True).bfloat16()
    few = torch.tensor([[5, 7, 9]])
    start = logits(model, few)
    attached(model, trainable_tokens=[5, 7])
    rows = model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert rows.dtype == torch.float32
    adapted = logits(model, few)
    assert adapted.dtype == torch.bfloat16 and not torch.equal(adapted, start)
    pk.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model, few), adapted, rtol=5e-2, atol=5e-2)


def test_all_that_share_the_weight_follow(ids):
    """T5: the encoder's and the decoder's embedding and the head are one weight."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    start = logits(model, ids, labels=ids)
    pk.attach(model, pk.LoRA(r=2, target_modules=["q"], trainable_tokens=[5, 7]))
    tokens = [name for name, layer in adapter_layers(model).items() if isinstance(layer, TrainedTokens)]
    assert tokens == ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    assert torch.equal(logits(model, ids, labels=ids), start)
    wake(model)
    adapted = logits(model, ids, labels=ids)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.shared.token_adapter.trainable_tokens_delta["default"].add_(1)
    assert torch.equal(logits(model, ids, labels=ids), adapted) and not torch.equal(logits(copied, ids, labels=ids), adapted)
    pk.merge(model)
    torch.testing.assert_close(logits(model, ids, labels=ids), adapted, rtol=1e-5, atol=1e-5)
    assert len({id(module.weight) for module in (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head)}) == 1


def test_adapters_with_rows_are_switched(ids):
    model = attached(tiny_llama(tie_word_embeddings=True), trainable_tokens=[5, 7])
    base, first = logits(clone_without(model), ids), logits(model, ids)
    pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"], trainable_tokens=[9]), adapter="other")
    assert torch.equal(logits(model, ids), first)
    pk.set_adapter(model, "other")
    assert torch.equal(logits(model, ids), base)
    with pytest.raises(ValueError, match="each train tokens of the same embedding"):
        pk.set_adapter(model, ["default", "other"])
    pk.delete_adapter(model, "default")
    assert torch.equal(logits(model, ids), base)
    assert not [name for name, _ in model.named_parameters() if "default" in name]
    with pytest.raises(ValueError, match="carries an adapter already"):
        pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), adapter="third")


def test_noise_leaves_with_the_module_it_was_put_on(ids):
    """The trap: the copy that trains takes NEFTune's hook along, which nobody takes off any more."""
    model = tiny_llama()
    pk.attach(model, [pk.NEFTune(alpha=5.0), pk.LoRA(r=2, modules_to_save=["embed_tokens"])])
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    pk.merge(model)
    model.train()
    assert torch.equal(model(ids).logits, model(ids).logits)
