"""Encoder-decoder models go the whole way: prompts to the encoder, answers from the decoder; what has no meaning for them is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import wake
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration, UMT5Config, UMT5ForConditionalGeneration

import peftkit as pk
from peftkit import data
from peftkit.chat import Chat
from peftkit.check import check
from peftkit.config import ConfigError
from peftkit.data import DataConfig, collate_pairs, load_examples
from peftkit.evaluate import generate_answers
from peftkit.fold import fold
from peftkit.forecast import Skeleton, Workload, forecast
from peftkit.loss import TokenLoss
from peftkit.memory import count_saved
from peftkit.model import load_tokenizer
from peftkit.recipe import load_recipe
from peftkit.run import run
from peftkit.use import answers, score

WORDS = ["red", "blue", "green", "black", "white"]
ROWS = [{"prompt": f"Say which colour: {WORDS[i % 5]}", "completion": WORDS[i % 5]} for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    found = load_tokenizer("builtin:tiny")
    found.chat_template = None
    return found


def t5(tokenizer, **options) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.1, feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return T5ForConditionalGeneration(T5Config(**(sizes | options)))


def bart(tokenizer) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    ffn = {f"{side}_ffn_dim": 96 for side in ("encoder", "decoder")} | {f"{side}_layers": 2 for side in ("encoder", "decoder")}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    return BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), d_model=64, max_position_embeddings=128, **ffn, **heads, **special))


@pytest.fixture
def recipe(tmp_path, tokenizer) -> dict:
    t5(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model": {"name": str(tmp_path / "base"), "dtype": "float32"}, "methods": [{"lora": {"r": 8, "dropout": 0.1}}],
        "data": {"train": str(tmp_path / "rows.jsonl"), "holdout": 0.2, "max_length": 64}, "eval": {"metrics": ["loss", "exact_match"]},
        "train": {"max_steps": 8, "batch_size": 8, "learning_rate": 0.02, "log_every": 1, "save_every": 4}, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in json.loads(line)]


def test_the_whole_way(recipe, tmp_path, tokenizer):
    """Trains, resumes bitwise, scores the same after reading back, answers, chats, and merges into a plain model."""
    out = tmp_path / "out"
    result = run(recipe)
    course = losses(out)
    assert course[-1] < 0.7 * course[0] and result.after["loss"] < 0.7 * result.before["loss"]
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [each["answer"] for each in predictions] == [row["completion"] for row in ROWS[-8:]]

    again = score(str(out), [], None, pk_console())
    assert again["loss"] == pytest.approx(result.after["loss"], rel=1e-5)
    told = answers("Say which colour: red", str(out), None, None, 4)
    assert set(told) == {"base", "with adapter"} and told["base"] != told["with adapter"]
    written: list[str] = []
    model, _ = pk.load(str(tmp_path / "base"), dtype="float32")
    Chat(model, tokenizer, False, written.append, max_new_tokens=4).line("Say which colour: red")
    assert "".join(written).startswith("base: ") and not any("colour" in text for text in written), "the prompt is not repeated"

    whole = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    (out / "result.json").unlink()
    for path in (out / "checkpoints").iterdir():
        if path.name != "step-000004":
            path.unlink() if path.is_file() else __import__("shutil").rmtree(path)
    assert run(recipe, resume=True).train["steps"] == 8
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == whole, "resumed is uninterrupted, bit for bit"

    report = fold(str(out), str(tmp_path / "merged"))
    assert report.check.kl < 1e-6
    merged, _ = pk.load(str(tmp_path / "merged"), dtype="float32")
    assert type(merged) is T5ForConditionalGeneration
    assert generate_answers(merged.eval(), tokenizer, [tokenizer("Say which colour: red")["input_ids"]], 4, 1) == [told["with adapter"]]


def pk_console():
    from rich.console import Console

    return Console(quiet=True)


@pytest.mark.parametrize("make", [t5, lambda tok: t5(tok, tie_word_embeddings=False), bart], ids=["T5", "FLAN-T5", "BART"])
def test_the_loss_is_the_models_own(make, tokenizer):
    model = make(tokenizer).eval()
    examples = [data.Example([5, 6, 7, *range(9, 9 + n)], [False] * 3 + [True] * n, "row", [5, 6, 7]) for n in (2, 5)]
    batch = collate_pairs(examples, tokenizer.pad_token_id)
    own = model(**batch).logits
    expected = F.cross_entropy(own.flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=-100)
    loss = TokenLoss(model)
    total, tokens = loss(**batch)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5) and tokens == 7
    assert model(**batch).loss.item() * 7 == pytest.approx(total.item(), rel=1e-5)
    by_row, counts = loss.by_row(**batch)
    assert by_row.sum().item() == pytest.approx(expected.item(), rel=1e-5) and counts.tolist() == [2, 5]


def test_padding_changes_neither_loss_nor_answers(tokenizer):
    model = bart(tokenizer).eval()  # has absolute positions, so that a prompt padded on the left would be read otherwise
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11]]
    together = generate_answers(model, tokenizer, prompts, 5, 2)
    assert together == [generate_answers(model, tokenizer, [prompt], 5, 1)[0] for prompt in prompts]
    examples = [data.Example([*prompt, 3, 4], [False] * len(prompt) + [True] * 2, "row", prompt) for prompt in prompts]
    loss = TokenLoss(model)
    alone = [loss(**collate_pairs([example], 0))[0].item() for example in examples]
    assert loss(**collate_pairs(examples, 0))[0].item() == pytest.approx(sum(alone), rel=1e-5)


def rows(folder: Path, tokenizer, found: list[dict], **options):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return load_examples(DataConfig(train=str(folder / "rows.jsonl"), **options), tokenizer, "train", encoder_decoder=True)


def test_the_prompt_is_read_and_all_of_the_answer_is_learned(tmp_path, tokenizer):
    [example], _ = rows(tmp_path, tokenizer, [{"prompt": "Name a colour", "completion": "red"}], system="Be brief.")
    assert tokenizer.decode(example.prompt_ids, skip_special_tokens=True) == "Be brief.\n\nName a colour"
    assert example.input_ids[-1] == tokenizer.eos_token_id and example.trained == [False] * len(example.prompt_ids) + [True] * sum(example.trained)
    batch = collate_pairs([example], 0)
    assert batch["input_ids"][0].tolist() == example.prompt_ids and tokenizer.decode(batch["labels"][0], skip_special_tokens=True) == "red"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour"}, {"role": "assistant", "content": "red"}]
    assert rows(tmp_path, tokenizer, [{"messages": turns}])[0][0].input_ids == example.input_ids, "a chat of one question is a pair"


def test_a_long_prompt_is_cut_and_the_answer_never(tmp_path, tokenizer):
    """Trap: a row that is cut at its right end loses the answer that it is there for."""
    long = {"prompt": "red " * 50, "completion": "blue green"}
    whole = rows(tmp_path, tokenizer, [long])[0][0]
    [cut], report = rows(tmp_path, tokenizer, [long], max_length=20, truncation="right")
    assert report.truncated == 1 and len(cut.input_ids) == 20
    assert cut.input_ids[len(cut.prompt_ids) :] == whole.input_ids[len(whole.prompt_ids) :] and cut.prompt_ids == whole.prompt_ids[: len(cut.prompt_ids)]
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: \d+ tokens of prompt and \d+ of answer, and max_length is 20"):
        rows(tmp_path, tokenizer, [long], max_length=20)
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: the answer has \d+ tokens, which leave no prompt within max_length 4"):
        rows(tmp_path, tokenizer, [long], max_length=4, truncation="right")


SEVERAL = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]}


@pytest.mark.parametrize(
    ("row", "options", "told"),
    [
        (SEVERAL, {}, r"rows.jsonl:1: .*reads one prompt and writes one answer, and the row has 4 turns \(user, assistant, user, assistant\)"),
        ({"text": "a b c"}, {}, r"rows.jsonl:1: plain text has no answer.*give prompt and completion"),
        (ROWS[0], {"packing": True}, r"data.packing: an encoder-decoder model cannot keep packed rows apart: set it to false"),
        (ROWS[0], {"loss_on": "all"}, r"data.loss_on: all has no meaning for an encoder-decoder model"),
    ],
    ids=["several turns", "text", "packing", "loss_on"],
)
def test_what_has_no_meaning_is_refused(row, options, told, tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=told):
        rows(tmp_path, tokenizer, [row], **options)


def test_a_text_file_and_neftune_are_refused(recipe, tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark night. " * 50)
    with pytest.raises(ConfigError, match=r"book.txt: plain text has no answer, and an encoder-decoder model"):
        run(recipe, [f"data.train={tmp_path / 'book.txt'}"])
    recipe["methods"].append({"neftune": {}})
    with pytest.raises(ConfigError, match=r"methods: neftune.*T5ForConditionalGeneration.*leave it out"):
        run(recipe)


def test_check_shows_the_rows_and_the_forecast_follows_both_sides(recipe, tokenizer):
    report = check(recipe)
    assert report.rows[0][1].startswith("Say which colour: red[[red") and report.facts["memory"]["fits"]
    model = t5(tokenizer, dropout_rate=0.0)
    made = load_recipe(recipe, ["methods.0.lora.dropout=0.0"])
    pk.attach(model, made.build_methods())
    loss, batch = TokenLoss(model.train()), {"input_ids": torch.ones(3, 20, dtype=torch.long), "labels": torch.full((3, 7), 5)}
    batch["attention_mask"], loss.gathers = torch.ones_like(batch["input_ids"]), True
    with count_saved(model) as kept:
        total, _ = loss(**batch)
    total.backward()
    found = forecast(Skeleton(made, model.config, gpu=False), Workload(3, 20, 21, answer=7), accumulates=False)
    assert found.activations == pytest.approx(sum(kept.values()), rel=0.05)


def test_an_adapted_head_merges_where_the_config_scales_the_logits():
    """UMT5 scales what its decoder makes if its config says that weights are tied, whether or not they are."""
    torch.manual_seed(0)
    model = UMT5ForConditionalGeneration(UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0))
    pk.attach(model.eval().requires_grad_(False), pk.LoRA(r=2, target_modules=["lm_head"]))
    wake(model)
    ids = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        pk.merge(model)
        torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [t5, bart])
def test_an_embedding_that_lends_its_weight_is_no_target(build, tokenizer):
    """Encoder and decoder call embeddings of their own: an adapter on `shared` would train nothing, and in a saved model the three are one again."""
    with pytest.raises(ValueError, match=r"shared lends its weight to .*encoder\.embed_tokens and .*decoder\.embed_tokens and is called by nobody"):
        pk.attach(build(tokenizer), pk.LoRA(r=2, target_modules=["shared"]))
    model = build(tokenizer)
    pk.attach(model, pk.LoRA(r=2, target_modules=["encoder.embed_tokens"]))
    wake(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"encoder\.embed_tokens cannot be merged: .*shared.* its weight, .*; nothing was merged"):
        pk.merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
