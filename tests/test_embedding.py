"""LoRA and DoRA on embeddings: equal to the formula, to peft and to the merged module; ties, files, names."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import clone, quantized_llama, tiny_llama, wake
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, OPTConfig, OPTForCausalLM
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

import peftkit as pk
from peftkit import quant
from peftkit.checkpoint import ADAPTER_FILE, CheckpointError
from peftkit.config import ConfigError
from peftkit.layers import LoRAEmbedding, Spec, adapter_layers, trainable_parameters

ROWS, WIDTH, R = 20, 6, 3
METHODS = {"lora": pk.LoRA, "dora": pk.DoRA}
TARGETS = ["q_proj", "embed_tokens"]


def tiny_gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, sliding_window=4, query_pre_attn_scalar=8, pad_token_id=0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


class Normed(nn.Embedding):
    """An embedding with arithmetic of its own: rows are normalised."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(super().forward(ids), dim=-1)


def make(kind: str, dtype: torch.dtype = torch.float64) -> nn.Embedding:
    torch.manual_seed(1)
    if kind == "scaled":
        return BartScaledWordEmbedding(ROWS, WIDTH, padding_idx=1, embed_scale=2.5).to(dtype)
    return (Normed if kind == "normed" else nn.Embedding)(ROWS, WIDTH, padding_idx=1).to(dtype)


def layer_on(base: nn.Embedding, dora: bool = False) -> LoRAEmbedding:
    torch.manual_seed(2)
    layer = LoRAEmbedding(base.requires_grad_(False))
    layer.add("default", Spec(R, 0.7, dora=dora))
    return layer


def awake(layer: LoRAEmbedding) -> LoRAEmbedding:
    wake(layer)
    return layer


def numbers(*shape: int, high: int = ROWS) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def attached(model: nn.Module, method: str = "lora", **options) -> nn.Module:
    torch.manual_seed(0)
    pk.attach(model, METHODS[method](**{"r": R, "alpha": 6, "target_modules": TARGETS} | options))
    wake(model)
    return model


# --------------------------------------------------------------------------------------------------------------- layer


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["plain", "scaled", "normed"])
def test_outputs_and_gradients_are_the_formula_s(kind, dora):
    layer = awake(layer_on(make(kind), dora))
    base, ids = layer.base_layer, numbers(4, 5)
    parts = {trained.key: trained.parameter.detach().clone().requires_grad_() for trained in layer.role_parameters()}
    a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
    whole = base.weight + 0.7 * (b @ a).T  # (V, d)
    if dora:
        whole = whole * parts["lora_magnitude_vector"] / whole.norm(dim=0).detach()
    rows = whole[ids]
    wanted = {"plain": rows, "scaled": rows * 2.5, "normed": F.normalize(rows, dim=-1)}[kind]
    y = layer(ids)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(4))
    (y * cotangent).sum().backward()
    (wanted * cotangent * (ids != 1)[..., None]).sum().backward()  # the padding row of a trained embedding has no gradient
    torch.testing.assert_close(layer.lora_embedding_A["default"].grad, a.grad, rtol=1e-10, atol=1e-12)
    if not (ids == 1).any():
        torch.testing.assert_close(layer.lora_embedding_B["default"].grad, b.grad, rtol=1e-10, atol=1e-12)
    assert base.weight.grad is None


def test_the_padding_row_stays():
    layer = awake(layer_on(make("plain")))
    layer(torch.tensor([[1, 1, 2]])).square().sum().backward()
    gradient = layer.lora_embedding_A["default"].grad
    assert not gradient[:, 1].any() and gradient[:, 2].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["plain", "scaled", "normed"])
def test_starts_as_the_base_and_computes_what_the_merged_module_does(kind, dora, dtype):
    base = make(kind, dtype)
    untouched, ids = base.weight.detach().clone(), numbers(3, 7)
    layer = layer_on(base, dora)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    with torch.no_grad():
        start = layer(ids)
        assert torch.equal(start, base(ids)) if not dora else torch.allclose(start, base(ids), rtol=tolerance, atol=tolerance)
        y = awake(layer)(ids)
        assert y.dtype == dtype and not torch.allclose(y, start, atol=0.05)
        assert torch.equal(base.weight, untouched)
        weight = layer.merged_weight()
        merged = layer.merged()
        assert merged is base and torch.equal(base.weight, weight)
        torch.testing.assert_close(merged(ids), y, rtol=tolerance, atol=tolerance)
    assert {p.dtype for p in layer.lora_embedding_A.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("model", ["llama", "gemma"])
def test_equal_to_peft_with_all_gradients(model, dora, ids):
    make_model = {"llama": tiny_llama, "gemma": tiny_gemma}[model]
    ours = attached(make_model().double(), "dora" if dora else "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on tied embeddings
        config = LoraConfig(r=R, lora_alpha=6, target_modules=TARGETS, use_dora=dora)
        theirs = get_peft_model(make_model().double(), config, autocast_adapter_dtype=False).double()
    named = dict(theirs.named_parameters())
    pairs = [(trained, named[f"base_model.model.{name}"]) for name, _, trained in trainable_parameters(ours)]
    assert len(pairs) == (9 if dora else 6)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    ours_y, theirs_y = (m.train()(input_ids=ids, labels=ids) for m in (ours, theirs))
    torch.testing.assert_close(ours_y.logits, theirs_y.logits, rtol=1e-10, atol=1e-10)
    ours_y.loss.backward(), theirs_y.loss.backward()
    for mine, other in pairs:
        assert mine.grad.any()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_hooks_on_the_frozen_embedding_still_act(ids):
    model = tiny_llama()
    pk.attach(model, [pk.NEFTune(alpha=50, seed=1), pk.LoRA(r=2, target_modules=TARGETS)])  # the noise sits on the embedding that is wrapped later
    wake(model)
    quiet = logits(model, ids)
    assert not torch.allclose(model.train()(input_ids=ids).logits, quiet, atol=0.1)
    assert torch.equal(logits(model, ids), quiet)


def test_ids_may_come_by_name():
    layer, ids = awake(layer_on(make("plain"))), numbers(2, 3)
    assert torch.equal(layer(input=ids), layer(ids))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["plain", "scaled", "normed"])
def test_compiles_to_one_graph(kind, dora):
    layer, ids = awake(layer_on(make(kind), dora)), numbers(3, 4)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(ids), layer(ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_a_second_use_give_the_same_gradients(reentrant):
    gradients = []
    for recompute in (False, True):
        layer, scale = awake(layer_on(make("plain"), dora=True)), torch.ones((), dtype=torch.float64, requires_grad=True)

        def use(scale: Tensor, layer: LoRAEmbedding = layer) -> Tensor:
            return scale * (layer(numbers(3, 4)).square().sum() + layer(numbers(5)).sum())

        y = torch.utils.checkpoint.checkpoint(use, scale, use_reentrant=reentrant) if recompute else use(scale)
        y.backward()
        gradients.append([trained.parameter.grad for trained in layer.role_parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain.any() and torch.equal(plain, again)


def test_no_tokens_at_all():
    layer = awake(layer_on(make("plain"), dora=True))
    y = layer(torch.zeros(0, 4, dtype=torch.long))
    assert y.shape == (0, 4, WIDTH)
    y.sum().backward()
    assert not layer.lora_embedding_A["default"].grad.any()


# --------------------------------------------------------------------------------------------------------------- names


def test_adapters_are_switched_stacked_disabled_and_deleted():
    layer, ids = awake(layer_on(make("plain"))), numbers(4)
    base = layer.base_layer(ids)
    layer.add("other", Spec(2, 1.0))
    assert layer.active == ["default"]
    with torch.no_grad():
        layer.lora_embedding_A["other"].normal_()
    first = layer(ids)
    layer.set_adapter("other")
    second = layer(ids)
    assert layer.lora_embedding_A["other"].requires_grad and not layer.lora_embedding_A["default"].requires_grad
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(ids) - base, (first - base) + (second - base))
    torch.testing.assert_close(F.embedding(ids, layer.merged_weight()), layer(ids))
    layer.enable_adapters(False)
    assert torch.equal(layer(ids), base)
    layer.enable_adapters(True)
    layer.delete("default")
    assert layer.active == ["other"] and torch.equal(layer(ids), second)
    assert not [name for name, _ in layer.named_parameters() if "default" in name]


def test_dora_is_not_stacked():
    layer = layer_on(make("plain"), dora=True)
    layer.add("other", Spec(2, 1.0))
    with pytest.raises(ValueError, match="cannot be stacked"):
        layer.set_adapter(["default", "other"])


@pytest.mark.parametrize("harm", ["max_norm", "4 bits"])
def test_what_cannot_be_adapted_is_refused(harm):
    import bitsandbytes

    base = nn.Embedding(ROWS, 64, max_norm=1.0) if harm == "max_norm" else bitsandbytes.nn.EmbeddingNF4(ROWS, 64).to("cpu")
    model = nn.Module()
    model.embed_tokens = base
    with pytest.raises(ValueError, match="max_norm" if harm == "max_norm" else "quantised embedding"):
        pk.attach(model, pk.LoRA(target_modules=["embed_tokens"]))
    assert model.embed_tokens is base


def test_all_linear_leaves_embeddings_out():
    model = tiny_llama()
    pk.attach(model, pk.LoRA(r=2))
    assert not any(isinstance(layer, LoRAEmbedding) for layer in adapter_layers(model).values())


def test_roles_and_learning_rates():
    """LoRA+ raises the rate of B, the zero matrix next to the output. In an embedding that is no matrix's part."""
    model = tiny_llama()
    summary = pk.attach(model, [pk.DoRA(r=2, target_modules=TARGETS), pk.LoRAPlus(ratio=16)])
    assert summary.trainable == {"A": 2 * 2 * 64, "B": 2 * 2 * 64, "embedding": 2 * (96 + 64), "magnitude": 3 * 64}
    assert summary.rates == {"A": 1, "B": 16, "embedding": 1, "magnitude": 1}
    assert "3 modules" in str(summary)
    optimizer = pk.build_optimizer(model, learning_rate=1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    layer = model.get_input_embeddings()
    assert rates[id(layer.lora_embedding_A["default"])] == rates[id(layer.lora_embedding_B["default"])] == 1e-3
    assert rates[id(model.model.layers[0].self_attn.q_proj.b())] == pytest.approx(1.6e-2)
    with pytest.raises(ValueError, match="trains none"):
        pk.attach(tiny_llama(), [pk.LoRA(r=2, target_modules=["embed_tokens"]), pk.LoRAPlus()])


# --------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["llama", "gemma", "opt", "nf4"])
def test_trained_then_detached_or_merged(base, method, saved_llama, ids):
    def fresh() -> nn.Module:
        if base == "nf4":
            model = quantized_llama(saved_llama)
            quant.protect(model)  # it is evaluated before anything is attached
            return model
        torch.manual_seed(0)
        opt = dict(vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32)
        return {"llama": tiny_llama, "gemma": tiny_gemma, "opt": lambda: OPTForCausalLM(OPTConfig(**opt, dropout=0.0))}[base]()

    targets = ["q_proj", "embed_tokens"] + ["embed_positions"] * (base == "opt")
    model = fresh()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = logits(model, ids)
    pk.attach(model, METHODS[method](r=2, target_modules=targets))
    layer = model.get_input_embeddings()
    assert isinstance(layer, LoRAEmbedding) and layer.weight is layer.base_layer.weight and layer.embedding_dim == layer.base_layer.embedding_dim
    torch.testing.assert_close(logits(model, ids), start, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(factors["default"].any() for factors in (layer.lora_embedding_A, layer.lora_embedding_B))
    adapted = logits(model, ids)
    model.tie_weights()
    assert torch.equal(logits(model, ids), adapted), "tie_weights writes past the layer"
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    with pk.adapters_disabled(model):
        assert torch.equal(logits(model, ids), start)
    other = clone(model)
    pk.detach(other)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, before[name]), name
    pk.merge(model)
    torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    assert not adapter_layers(model)


def test_a_tied_head_keeps_the_old_weight_and_the_summary_says_so(tmp_path, ids):
    model = tiny_llama(tie_word_embeddings=True)
    old = model.lm_head.weight.detach().clone()
    summary = pk.attach(model, pk.LoRA(r=2, target_modules=TARGETS))
    assert "model.embed_tokens is adapted; lm_head shares its weight and keeps it as it is, after merging too" in str(summary)
    wake(model)
    adapted = logits(model, ids)
    pk.merge(model)
    assert torch.equal(model.lm_head.weight, old) and not torch.equal(model.model.embed_tokens.weight, old)
    torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded, ids), adapted, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tie", [False, True])
def test_ours_load_in_peft_and_in_ours(method, tie, tmp_path, ids):
    model = attached(tiny_llama(tie_word_embeddings=tie), method)
    ours = logits(model, ids)
    pk.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "door")
    state, door = (load_file(tmp_path / folder / ADAPTER_FILE) for folder in ("adapter", "door"))
    prefix = "base_model.model.model.embed_tokens."
    wanted = {"lora_embedding_A": (R, 96), "lora_embedding_B": (64, R)} | ({"lora_magnitude_vector": (64,)} if method == "dora" else {})
    assert {key.removeprefix(prefix): tuple(t.shape) for key, t in state.items() if "embed" in key} == wanted
    assert state.keys() == door.keys() and all(torch.equal(state[key], door[key]) for key in state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on tied embeddings
        theirs = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=tie), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, ids), ours, rtol=1e-5, atol=1e-5)
    fresh = pk.load_adapter(tiny_llama(tie_word_embeddings=tie), tmp_path / "adapter")
    assert torch.equal(logits(fresh, ids), ours)


@pytest.fixture
def theirs(tmp_path, ids):
    """A folder that peft wrote, with the embedding itself in it as peft does, and peft's logits."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=R, lora_alpha=6, target_modules=TARGETS, use_dora=True))
    wake(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "theirs")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / "theirs" / ADAPTER_FILE)
    return tmp_path / "theirs", logits(model, ids)


def test_theirs_load_in_ours(theirs, ids):
    folder, wanted = theirs
    model = pk.load_adapter(tiny_llama(), folder)
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-5, atol=1e-5)
    assert model.get_input_embeddings().specs["default"].dora


def test_an_embedding_in_the_file_that_is_not_the_model_s_is_an_error(theirs):
    folder, _ = theirs
    state = load_file(folder / ADAPTER_FILE)
    state["base_model.model.model.embed_tokens.base_layer.weight"] += 1e-3
    save_file(state, folder / ADAPTER_FILE, metadata={"format": "pt"})
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"embed_tokens\.base_layer\.weight"):
        pk.load_adapter(model, folder)
    assert not adapter_layers(model) and all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_peft_s_shared_factors_of_a_tied_head_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=TARGETS, ensure_weight_tying=True))
        model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="ensure_weight_tying"):
        pk.load_adapter(tiny_llama(tie_word_embeddings=True), tmp_path / "theirs")


def test_theirs_on_the_head_load_in_ours(tmp_path, ids):
    """peft writes the weight of an adapted head along, as it does that of an embedding."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=R, lora_alpha=6, target_modules=["lm_head", "q_proj"]))
    wake(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / ADAPTER_FILE)
    ours = pk.load_adapter(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
