"""Attention within documents: torch's own answer, fewer products, and everything else left to transformers."""

from __future__ import annotations

import gc
import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
)

import peftkit as pk
from peftkit import attention
from peftkit.attention import NAME, attend_within_documents, causal_documents, document_attention
from peftkit.kernels import attention as kernel

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
CONFIGS = {
    "mistral, a window": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=6),
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "opt": OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32
    ),
    "gpt-2, dropout in attention": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0),
}


def of_config(config) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def mask_of(documents: list[list[tuple[int, int]]], tokens: int) -> torch.Tensor:
    mask = torch.zeros(len(documents), 1, tokens, tokens, dtype=torch.bool)
    for row, spans in enumerate(documents):
        for start, end in spans:
            mask[row, 0, start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return mask


# -------------------------------------------------------------------------------------------------------------- the kernel


@st.composite
def rows_of_documents(draw) -> tuple[list[list[tuple[int, int]]], int]:
    tokens = draw(st.integers(1, 70))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        spans, end = [], draw(st.integers(0, min(3, tokens - 1)))
        while end < tokens and (not spans or draw(st.booleans())):
            start = end + draw(st.sampled_from([0, 0, 0, 2]))
            if start >= tokens:
                break
            end = min(tokens, start + draw(st.integers(1, 40)))
            spans.append((start, end))
        rows.append(spans)
    return rows, tokens


@settings(max_examples=60, deadline=None)
@given(found=rows_of_documents(), groups=st.integers(1, 3), shared=st.integers(1, 3), width=st.integers(1, 9), values=st.integers(1, 9),
       cached=st.sampled_from([64, 500, 2**19]), rounded=st.sampled_from([1, 4, 16]), seed=st.integers(0, 2**31))  # fmt: skip
def test_the_kernel_computes_what_torch_does_with_the_mask(found, groups, shared, width, values, cached, rounded, seed):
    documents, tokens = found
    generator = torch.Generator().manual_seed(seed)
    rows, heads = len(documents), groups * shared
    q, k, v = (
        torch.randn(rows, n, tokens, d, dtype=torch.float64, generator=generator).requires_grad_()
        for n, d in ((heads, width), (groups, width), (groups, values))
    )
    mask = mask_of(documents, tokens)
    padding = ~mask[:, 0].any(1)
    grad = torch.randn(rows, tokens, heads, values, dtype=torch.float64, generator=generator).masked_fill(padding[..., None, None], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CACHED_SCORES", cached)
        patch.setattr(kernel, "ROUNDED", rounded)
        y = kernel.attend(q, k, v, documents, 0.3)
        got = torch.autograd.grad(y, (q, k, v), grad)
    shown = mask | torch.eye(tokens, dtype=torch.bool)  # a query that sees nothing is NaN in torch
    want = F.scaled_dot_product_attention(q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), attn_mask=shown, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(y, want.masked_fill(padding[..., None, None], 0))
    for mine, theirs in zip(got, torch.autograd.grad(want, (q, k, v), grad), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bfloat16_is_as_exact_as_the_fused_kernel():
    """Against fp64: torch's own kernel is the measure, with a quarter on top for another order of sums."""
    documents = [[(0, 130), (130, 200), (200, 513)], [(0, 400)]]
    mask = mask_of(documents, 513)
    padding = ~mask[:, 0].any(1)[..., None, None]
    q, k, v = (torch.randn(2, 4, 513, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    grad = torch.randn(2, 513, 4, 32, generator=torch.Generator().manual_seed(3)).bfloat16().masked_fill(padding, 0)

    def of(function, dtype):
        tensors = [each.to(dtype).requires_grad_() for each in (q, k, v)]
        y = function(*tensors).masked_fill(padding, 0)
        return [each.detach().double() for each in (y, *torch.autograd.grad(y, tensors, grad.to(dtype)))]

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | torch.eye(513, dtype=torch.bool)).transpose(1, 2)

    exact = of(torchs, torch.float64)
    theirs, mine = of(torchs, torch.bfloat16), of(lambda q, k, v: kernel.attend(q, k, v, documents, 32**-0.5), torch.bfloat16)
    for want, fused, own in zip(exact, theirs, mine, strict=True):
        assert (own - want).norm() <= 1.25 * (fused - want).norm()


def test_no_second_derivative_is_given_wrongly():
    q = torch.randn(1, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    y = kernel.attend(q, q, q, [[(0, 5)]], 0.5)
    with pytest.raises(RuntimeError, match=r"no second derivative; set model\.attention: sdpa"):
        torch.autograd.grad(y.sum(), q, create_graph=True)


# ---------------------------------------------------------------------------------------------------------------- the mask


def test_documents_are_read_from_the_mask():
    for documents in ([[(0, 3), (3, 4), (4, 9)]], [[(0, 9)], [(2, 9)], [(0, 5)]], [[(1, 4), (6, 9)], []]):
        assert causal_documents(mask_of(documents, 9)) == documents
    padded = mask_of([[(0, 5)]], 9)
    padded[0, 0, 5:, :5] = True  # transformers' padding sees the row, and nobody sees it
    assert causal_documents(padded) == [[(0, 5)]]


@pytest.mark.parametrize("change", ["both ways", "a window", "a hole", "a look ahead", "the document before"])
def test_other_masks_are_left_alone(change):
    mask = mask_of([[(0, 4), (4, 12)]], 12)
    if change == "both ways":
        mask = mask | mask.transpose(2, 3)
    elif change == "a window":
        mask = mask & ~torch.ones(12, 12, dtype=torch.bool).tril(-3)
    else:
        mask[(0, 0, *{"a hole": (9, 6), "a look ahead": (6, 7), "the document before": (5, 1)}[change])] ^= True
    assert causal_documents(mask) is None


def test_a_mask_is_read_once_and_again_where_it_was_written_to(monkeypatch):
    module, tensor = SimpleNamespace(is_causal=True), torch.randn(1, 2, 8, 4, requires_grad=True)
    mask, seen = mask_of([[(0, 8)]], 8), []
    real = causal_documents
    monkeypatch.setattr(attention, "causal_documents", lambda mask: seen.append(1) or real(mask))
    for _ in range(3):
        document_attention(module, tensor, tensor, tensor, mask)
    assert len(seen) == 1
    mask.copy_(mask_of([[(0, 3), (3, 8)]], 8))
    y, _ = document_attention(module, tensor, tensor, tensor, mask)
    assert len(seen) == 2
    torch.testing.assert_close(y, F.scaled_dot_product_attention(tensor, tensor, tensor, attn_mask=mask).transpose(1, 2))
    kept = len(attention._read)
    del mask
    gc.collect()
    assert len(attention._read) < kept  # nothing holds it


# ------------------------------------------------------------------------------------------------------------------ models


def gradients(model: nn.Module, **inputs) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(0)  # GPT-2 drops out
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def packed_and_padded() -> dict[str, dict[str, torch.Tensor]]:
    ids = torch.randint(2, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in (5, 12, 7)])[None].expand(2, -1)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 15:] = 0
    return {
        "packed": {"input_ids": ids, "labels": ids, "position_ids": positions},
        "padded": {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask},
        "whole": {"input_ids": ids, "labels": ids},
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["packed", "padded", "whole"])
def test_models_train_alike(name, kind):
    model, inputs = of_config(CONFIGS[name]), packed_and_padded()[kind]
    want_loss, want = gradients(model, **inputs)
    assert attend_within_documents(model) and model.config._attn_implementation == NAME
    loss, got = gradients(model, **inputs)
    assert loss == pytest.approx(want_loss, abs=1e-6)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_evaluation_is_transformers_own_to_the_bit():
    model, inputs = tiny_llama().eval(), packed_and_padded()["padded"]
    with torch.no_grad():
        want = model(**inputs).logits
        attend_within_documents(model)
        assert torch.equal(model(**inputs).logits, want)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)[:, :24], inputs["input_ids"])


def test_softcapping_and_encoders_keep_their_attention():
    capped = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8), attn_implementation="eager")
    assert not attend_within_documents(capped) and capped.config._attn_implementation == "eager"
    encoder = BertForMaskedLM(BertConfig(**SMALL)).train()
    encoder.config.hidden_dropout_prob = encoder.config.attention_probs_dropout_prob = 0.0
    inputs = packed_and_padded()["padded"]
    torch.manual_seed(0)
    want = encoder.eval()(**inputs).loss
    attend_within_documents(encoder)
    assert torch.equal(encoder(**inputs).loss, want)  # sees both ways


def test_models_that_ask_for_sdpa_by_name_keep_it():
    """DeepSeek V3.2 merges what its indexer chose into the mask for eager and sdpa only: under another name it would attend to everything."""
    small = {**SMALL, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    config = pytest.importorskip("transformers.models.deepseek_v32").DeepseekV32Config(
        **small, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_topk=4, index_n_heads=2,
        index_head_dim=16,
    )  # fmt: skip
    model, ids = of_config(config).eval(), packed_and_padded()["whole"]["input_ids"]
    want = model(ids).logits
    assert not attend_within_documents(model)
    assert torch.equal(model(ids).logits, want)


def test_attention_to_another_sequence_is_none_of_ours():
    module, tensor = SimpleNamespace(is_causal=False), torch.randn(1, 2, 8, 4, requires_grad=True)
    one = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    one[..., 0] = True  # an encoder that read one token looks like a document of one
    y, _ = document_attention(module, tensor, tensor, tensor, one)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(tensor, tensor, tensor, attn_mask=one).transpose(1, 2))


def test_products_that_the_mask_hides_are_not_computed():
    """Eight documents of 64 tokens: an eighth of the scores, forward and backward, counted."""
    q, k, v = (torch.randn(1, heads, 512, 16, requires_grad=True) for heads in (4, 2, 2))
    documents = [(start, start + 64) for start in range(0, 512, 64)]
    counts = []
    for spans in (documents, [(0, 512)]):
        with FlopCounterMode(display=False) as counter:
            kernel.attend(q, k, v, [spans], 0.25).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] * 4 <= counts[1]  # the whole row skips nearly half of its own square
    assert counts[0] == 7 * 8 * 2 * 4 * 64 * 64 * 16  # two products forward, five backward


def test_only_q_k_and_v_are_kept():
    q, k, v = (torch.randn(1, heads, 128, 16, requires_grad=True) for heads in (4, 2, 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        kernel.attend(q, k, v, [[(0, 128)]], 0.25)
    assert sum(kept) == q.nbytes + k.nbytes + v.nbytes


# ------------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({}, True),
        ({"model": {"attention": "sdpa"}}, False),
        ({"train": {"gradient_checkpointing": True}}, True),
        ({"train": {"gradient_checkpointing": "selective"}}, False),
    ],
    ids=["auto", "sdpa", "checkpointing", "selective"],
)
def test_which_recipes_take_it(options, ours, tmp_path, monkeypatch):
    runner = importlib.import_module("peftkit.run")
    seen, real = [], runner.train

    def watched(*args, **kwargs):
        seen.append(next(each for each in args if hasattr(each, "config")).config._attn_implementation)
        return real(*args, **kwargs)

    monkeypatch.setattr(runner, "train", watched)
    result = pk.run({
        "model": {"name": "builtin:tiny", **options.get("model", {})},
        "methods": ["lora"],
        "data": {"train": "builtin:tool-calls/train", "train_rows": 16, "max_length": 128, "packing": True},
        "train": {"max_steps": 2, "batch_size": 4, **options.get("train", {})},
        "eval": {"before": False},
        "output_dir": str(tmp_path / "run"),
    })  # fmt: skip
    assert seen == [NAME if ours else "sdpa"] and result.train["steps"] == 2
