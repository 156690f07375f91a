"""Packing: bins that are full, documents that do not see each other, models that cannot keep them apart refused by name."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from chat_templates import family_tokenizer
from conftest import tiny_gpt2, tiny_llama
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from peftkit.config import ConfigError
from peftkit.data import DataConfig, Example, Examples, Rows, batch_width, check_isolation, collate, load_examples, make_rows, pack
from peftkit.forecast import sizes_of
from peftkit.run import run


def documents(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    return [Example(torch.randint(3, 96, (n,), generator=generator).tolist(), [i % 3 != 0 for i in range(n)], f"row {k}") for k, n in enumerate(lengths)]


def test_pack_fills_bins_and_keeps_the_order_of_the_data():
    examples = documents(5, 10, 3, 7, 6, 2, 9, 1)
    bins = pack(examples, 10)
    assert [[int(example.where[4:]) for example in row] for row in bins] == [[0], [1], [2, 3], [4, 5], [6, 7]]
    many = documents(*torch.randint(1, 40, (300,), generator=torch.Generator().manual_seed(2)).tolist())
    packed = pack(many, 64)
    assert all(sum(len(example.input_ids) for example in row) <= 64 for row in packed)
    assert sorted(example.where for row in packed for example in row) == sorted(example.where for example in many)
    assert len(packed) <= 1.03 * sum(len(example.input_ids) for example in many) / 64 + 1  # hardly any space is left over
    firsts = [int(row[0].where[4:]) for row in packed]
    assert firsts == sorted(firsts) and packed == pack(many, 64)
    with pytest.raises(ValueError, match="row 1 has 10 tokens"):
        pack(examples, 9)


def test_collate():
    first, second, third = documents(4, 3, 5)
    batch = collate([[first, second], [third]], pad_token_id=0, widths=True)
    assert batch["document_lengths"] == [[4, 3], [5]] and "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["input_ids"].tolist() == [[*first.input_ids, *second.input_ids, 0], [*third.input_ids, 0, 0, 0]]
    a, b = first.input_ids, second.input_ids
    assert batch["labels"][0].tolist() == [-100, a[1], a[2], -100, -100, b[1], b[2], -100]
    single = collate([[first], [second]], pad_token_id=0)
    assert single["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    with pytest.raises(ValueError, match="at least one bin"):
        collate([], 0)


def test_the_first_token_of_a_document_is_never_predicted_from_the_one_before():
    always = [Example([7, 8], [True, True], "a"), Example([9, 10], [True, True], "b")]
    assert collate([always], 0)["labels"].tolist() == [[-100, 8, -100, 10]]


def mistral() -> MistralForCausalLM:
    """Attends to the four last tokens only."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return MistralForCausalLM(MistralConfig(**sizes, sliding_window=4, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def gemma2() -> Gemma2ForCausalLM:
    """Caps attention scores and logits; every other layer attends to the four last tokens only."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    caps = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)  # low enough to bite on random weights
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **caps, sliding_window=4, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def document_losses(model: torch.nn.Module, batch: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss of every document, logits of every real token), documents in the order of the batch."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    with torch.no_grad():
        logits = model(**inputs, **options).logits
    losses, real = [], []
    for i, lengths in enumerate(batch["document_lengths"]):
        end = 0
        for length in lengths:
            start, end = end, end + length
            losses.append(torch.nn.functional.cross_entropy(logits[i, start : end - 1], batch["labels"][i, start + 1 : end], reduction="sum"))
            real.append(logits[i, start:end])
    return torch.stack(losses), torch.cat(real)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [tiny_llama, gemma2, mistral, tiny_gpt2])
def test_packed_documents_have_the_loss_they_have_alone(build, attention):
    model = build().eval()
    if build is gemma2 and attention == "sdpa" and not model._supports_sdpa:
        with pytest.raises(ValueError, match="Gemma2ForCausalLM does not support"):  # it caps attention scores: refused by name, before anything is wrong
            type(model)._from_config(model.config, attn_implementation="sdpa")
        return
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    check_isolation(model)
    for most in (16, 15):  # rows of different length, and rows that all end in padding
        bins = pack(documents(7, 2, 5, 9, 3, 4, 11, 6), most)
        alone = [document_losses(model, collate([[example]], 0), use_cache=False) for row in bins for example in row]
        batch = collate(bins, 0, widths=True)
        assert batch["input_ids"].shape[1] == 16
        losses, logits = document_losses(model, batch, use_cache=False)
        torch.testing.assert_close(losses, torch.cat([loss for loss, _ in alone]), atol=1e-5, rtol=0)
        torch.testing.assert_close(logits, torch.cat([logit for _, logit in alone]), atol=1e-5, rtol=0)
    unpacked, _ = document_losses(model, collate([[example] for row in bins for example in row], 0), use_cache=False)
    torch.testing.assert_close(unpacked, losses, atol=1e-5, rtol=0)


def test_the_trap_a_cache_lets_packed_documents_see_each_other():
    """Why collate() asks for use_cache=False. Where this fails, transformers has mended it and the demand can go."""
    model, batch = tiny_llama().eval(), collate(pack(documents(7, 2, 5, 9), 16), 0)
    assert model.config.use_cache  # the default
    _, right = document_losses(model, batch, use_cache=False)
    _, wrong = document_losses(model, batch)
    assert (right - wrong).abs().max() > 1e-3


# Models that cannot keep documents apart

SMALL = dict(vocab_size=96, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LEAKING = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, num_hidden_layers=2)),  # a recurrent state runs through the row
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SMALL, n_layer=2, n_head=4)),  # knows no positions
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)),
}


@pytest.mark.parametrize("name", LEAKING)
@pytest.mark.filterwarnings("ignore:.*falling back")
def test_models_that_let_documents_see_each_other_are_refused_by_name(name):
    torch.manual_seed(0)
    model = LEAKING[name]().train()
    batch = collate(pack(documents(7, 2, 5, 9), 16), 0)
    alone = torch.cat(
        [document_losses(model.eval(), collate([[example]], 0), use_cache=False)[0] for row in pack(documents(7, 2, 5, 9), 16) for example in row]
    )
    packed, _ = document_losses(model, batch, use_cache=False)
    if name != "bloom":  # whose random weights hardly look back
        assert (packed - alone).abs().max() > 1e-3, "the trap is there"
    with pytest.raises(ConfigError, match=rf"(?i){name}ForCausalLM with \w+ attention lets packed documents see each other.*data.packing: false"):
        check_isolation(model.train())
    assert model.training


def test_a_run_stops_before_it_trains_on_documents_that_see_each_other(tmp_path):
    chat = family_tokenizer("base")
    torch.manual_seed(0)
    falcon = FalconForCausalLM(FalconConfig(**SMALL | {"vocab_size": len(chat)}, num_hidden_layers=2, num_attention_heads=4))
    falcon.save_pretrained(tmp_path / "base")
    chat.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2+2", "completion": "4"}\n' * 8)
    recipe = {
        "model": {"name": str(tmp_path / "base")},
        "methods": [{"lora": {"r": 2}}],
        "data": {"train": str(tmp_path / "rows.jsonl"), "packing": True, "max_length": 32},
        "train": {"max_steps": 1, "batch_size": 2},
        "output_dir": str(tmp_path / "out"),
    }
    with pytest.raises(ConfigError, match="FalconForCausalLM with sdpa attention lets packed documents see each other"):
        run(recipe, console=Console(quiet=True))
    assert not (tmp_path / "out").exists()
    recipe["data"]["packing"] = False
    assert run(recipe, console=Console(quiet=True)).train["steps"] == 1


def test_a_model_that_takes_no_positions_is_refused_by_name():
    class Deaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            inner = tiny_llama()
            self.config, self.device, self.get_input_embeddings = inner.config, inner.device, inner.get_input_embeddings

        def forward(self, input_ids, use_cache):
            raise AssertionError("never called")

    with pytest.raises(ConfigError, match=r"Deaf cannot be told where documents begin .*position_ids"):
        check_isolation(Deaf())


# How full the rows get


def test_alpaca_like_rows_leave_at_most_three_percent_of_padding():
    draw = random.Random(0)
    lengths = [min(512, max(12, round(draw.lognormvariate(4.6, 0.8)))) for _ in range(1000)]
    bins = pack([Example([3] * n, [True] * n, "row") for n in lengths], 512)
    assert 1 - sum(lengths) / (512 * len(bins)) <= 0.03


ALPACA = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaca_en_demo.json"


@pytest.mark.skipif(not ALPACA.exists(), reason="the real file is not at hand")
def test_the_real_alpaca_rows_leave_at_most_three_percent_of_padding():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([ALPACA.read_text()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    config = DataConfig(train=str(ALPACA), max_length=512, truncation="right", packing=True)
    examples, report = load_examples(config, tokenizer, "train")
    rows = make_rows(examples, config)
    assert report.rows == 999 and sorted(example.where for row in rows for example in row) == sorted(example.where for example in examples)
    assert 1 - report.tokens / (512 * len(rows)) <= 0.03


def test_rows_are_counted_without_being_built(monkeypatch):
    """What the forecast asks of packed and of single rows: tokens, supervised tokens and documents of each."""
    examples = Examples.of([Example([1] * n, [False] + [True] * (n - 1), f"row {n}") for n in (5, 9, 2, 7)])
    packed = make_rows(examples, DataConfig(train="x", max_length=10, packing=True))
    counted = [(sum(len(e.input_ids) for e in row), sum(sum(e.trained) for e in row), len(row)) for row in packed]
    monkeypatch.setattr(Examples, "__getitem__", None)
    assert listed(packed) == counted and len(counted) < 4
    assert listed(Rows(examples)) == [(5, 4, 1), (9, 8, 1), (2, 1, 1), (7, 6, 1)] and listed(Rows(Examples.of([]))) == []


def listed(rows):
    sizes = sizes_of(rows)
    return list(zip(sizes.tokens.tolist(), sizes.supervised.tolist(), sizes.documents.tolist(), strict=True))


def test_batches_have_few_widths():
    """Every shape costs a kernel and memory of its own: at most eight widths from n to 2n tokens, and little padding for it."""
    rows = {batch_width(tokens, 2, False) for tokens in range(256, 512)}
    assert rows == {256, 288, 320, 352, 384, 416, 448, 480, 512}
    assert all(tokens <= batch_width(tokens, 2, False) <= 1.125 * tokens + 8 for tokens in range(1, 5000))
    assert batch_width(509, 1, False) == 509 and batch_width(509, 1, True) == 512, "one row alone needs neither padding nor a mask"
    batch = collate([[Example([1] * 19, [True] * 19, "a")], [Example([1] * 4, [True] * 4, "b")]], 0, widths=True)
    assert batch["input_ids"].shape == (2, 24) and batch["attention_mask"].sum() == 23 and (batch["labels"] != -100).sum() == 21
