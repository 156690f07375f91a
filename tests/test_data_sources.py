"""Where rows come from beside single files: preference pairs, tool chats, folders, sources mixed by their share of the tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_templates import family_tokenizer

from peftkit.config import ConfigError
from peftkit.data import DataConfig, load_examples, marked_row, render
from peftkit.data.read import read_rows

PLAIN, CHAT = family_tokenizer("base"), family_tokenizer("chatml")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def config(**options) -> DataConfig:
    return DataConfig(**({"train": "unused.json"} | options))


def write(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def said(role: str, text: str) -> dict:
    return {"role": role, "content": text}


# Preference pairs

ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
SHAREGPT = [{"from": "human", "value": "hi"}]
WHOLE = {side: [said("user", "hi"), said("assistant", text)] for side, text in (("chosen", "yo"), ("rejected", "no"))}
PAIRS = {
    "text": {"prompt": "hi", "chosen": "yo", "rejected": "no"},
    "turns": {"prompt": [said("user", "hi")], "chosen": [said("assistant", "yo")], "rejected": [said("assistant", "no")]},
    "prompt repeated": {"prompt": [said("user", "hi")], **WHOLE},
    "prompt within": WHOLE,
    "sharegpt": {"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": "yo"}, "rejected": {"from": "gpt", "value": "no"}},
    "messages": {"messages": [said("user", "hi")], "chosen": said("assistant", "yo"), "rejected": "no"},
}  # fmt: skip


@pytest.mark.parametrize("shape", PAIRS)
def test_preference_pairs_are_rendered_on_both_sides_and_trained_on_the_chosen(shape):
    example = render(PAIRS[shape], CHAT, config())
    assert marked_row(example, CHAT) == f"{ASKED}[[yo<|im_end|>]]\n" and example.answer == "yo"
    assert marked_row(example.rejected, CHAT) == f"{ASKED}[[no<|im_end|>]]\n" and example.rejected.answer == "no"


def test_a_pair_of_texts_needs_no_template():
    example = render(PAIRS["text"], PLAIN, config())
    assert marked_row(example, PLAIN) == "<s>hi\n[[yo</s>]]" and marked_row(example.rejected, PLAIN) == "<s>hi\n[[no</s>]]"


@pytest.mark.parametrize("family", ["chatml", "marked"])
def test_answers_in_the_prompt_of_a_pair_are_not_trained(family):
    chat = family_tokenizer("chatml")
    if family == "marked":
        chat.chat_template = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
            "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
    history = [*SHAREGPT, {"from": "gpt", "value": "yes?"}, {"from": "human", "value": "2+2"}]
    row = {"conversations": history, "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}
    expected = f"{ASKED}yes?<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]\n"
    assert marked_row(render(row, chat, config()), chat) == expected


def test_the_report_says_that_the_preference_objective_comes_later(tmp_path):
    rows = [PAIRS["text"], PAIRS["text"] | {"rejected": "yo"}, PAIRS["text"] | {"rejected": "n" * 99}]
    path = write(tmp_path / "pairs.jsonl", rows)
    examples, report = load_examples(config(train=path, max_length=50), PLAIN, "train")
    assert report.format == "prompt/chosen/rejected" and report.kept == 3 and [example.rejected is None for example in examples] == [False, False, True]
    assert any(note.startswith("3 rows: preference pairs: the chosen answer is trained") and "comes later" in note for note in report.notes)
    assert "1 rows: preference pairs whose two answers are the same" in report.notes
    assert "1 rows: preference pairs whose rejected answer cannot be used (too long)" in report.notes


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "hi", "chosen": "", "rejected": "no"}, "the answer of 'chosen' is empty"),
        ({"prompt": "hi", "chosen": "yo", "rejected": " "}, "the answer of 'rejected' is empty"),
        ({"prompt": "hi", "chosen": "yo", "rejected": None}, "'rejected' must be text, found nothing"),
        ({"chosen": [said("user", "a"), said("assistant", "b")], "rejected": [said("user", "c"), said("assistant", "d")]}, "do not start with the same turns"),
        ({"conversations": SHAREGPT, "chosen": {"from": "human", "value": "a"}, "rejected": "b"}, "no assistant turn of 'chosen'"),
    ],
)
def test_pairs_that_are_none_are_refused(row, reason):
    with pytest.raises(ConfigError, match=reason):
        render(row, CHAT, config())


def test_prompts_and_completions_may_be_turns():
    row = {"prompt": [said("user", "hi"), said("assistant", "yes?"), said("user", "2+2")], "completion": [said("assistant", "4")]}
    assert marked_row(render(row, CHAT, config()), CHAT).endswith("yes?<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]\n")


@pytest.mark.skipif(not DATA.is_dir(), reason="the real files are not at hand")
def test_the_real_preference_pairs():
    examples, report = load_examples(config(train=str(DATA / "dpo_en_demo.json"), max_length=20_000), CHAT, "train")
    assert (report.format, report.kept, report.rows) == ("conversations/chosen/rejected", 300, 300)
    raw = json.loads((DATA / "dpo_en_demo.json").read_text())
    for example, row in zip(examples, raw, strict=True):
        assert example.answer == row["chosen"]["value"].strip() and example.rejected.answer == row["rejected"]["value"].strip()
        assert marked_row(example, CHAT).count("[[<") == 0 and sum(example.trained) == len(row["chosen"]["value"].encode()) + 1


@pytest.mark.skipif(not DATA.is_dir(), reason="the real files are not at hand")
@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3", "mistral"])
def test_the_real_tool_chats_train_every_answer_and_call(family):
    chat = family_tokenizer(family)
    examples, report = load_examples(config(train=str(DATA / "glaive_toolcall_en_demo.json"), max_length=20_000), chat, "train")
    raw = json.loads((DATA / "glaive_toolcall_en_demo.json").read_text())
    assert report.kept == report.rows == len(raw) == 300
    assert not any("leaves out" in note or "does not" in note for note in report.notes), report.notes
    for example, row in zip(examples, raw, strict=True):
        trained = marked_row(example, chat).split("[[", 1)[1]
        turns = [turn for turn in row["conversations"] if turn["from"] in ("gpt", "function_call")]
        ended = sum(on and token == chat.eos_token_id for token, on in zip(example.input_ids, example.trained, strict=True))
        assert ended == len(turns), row
        for turn in turns:
            expected = json.loads(turn["value"])["name"] if turn["from"] == "function_call" else turn["value"].strip()
            assert expected in trained


# Folders


def test_a_folder_is_all_its_files_each_of_its_own_format(tmp_path):
    write(tmp_path / "b" / "one.jsonl", [{"text": "once"}])
    write(tmp_path / "a.jsonl", [{"prompt": "2", "completion": "3"}, {"prompt": "3", "completion": "4"}])
    write(tmp_path / ".hidden" / "c.jsonl", [{"text": "not seen"}])
    examples, report = load_examples(config(train=str(tmp_path)), PLAIN, "train")
    assert [example.where for example in examples] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b/one.jsonl:1"]
    assert report.format == "prompt/completion and text"
    held = load_examples(config(train=str(tmp_path), holdout=0.34), PLAIN, "eval")[0]
    assert [example.where for example in held] == [f"{tmp_path}/b/one.jsonl:1"]
    assert len(load_examples(config(train=str(tmp_path), train_rows=2), PLAIN, "train")[0]) == 2


def test_a_folder_of_texts_is_cut_into_blocks_file_by_file(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 20)
    examples, _ = load_examples(config(train=str(tmp_path), max_length=16), PLAIN, "train")
    assert [len(example.input_ids) for example in examples] == [16, 4, 16, 4] and PLAIN.decode(examples[2].input_ids) == "b" * 16


@pytest.mark.parametrize(
    "names, message",
    [
        (["train.jsonl", "test.jsonl"], r"rows to train on and rows to test on; name one file in it.*test.jsonl, train.jsonl"),
        (["data/train-00000.jsonl", "data/validation-00000.jsonl"], "rows to train on and rows to test on"),
        (["rows.jsonl", "readme.txt"], "a folder of text files and of rows"),
        (["notes.md"], "a folder without a file that can be read"),
    ],
)
def test_folders_that_would_train_on_what_is_not_meant_are_refused(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, [{"text": "once"}])
    with pytest.raises(ConfigError, match=message):
        load_examples(config(train=str(tmp_path)), PLAIN, "train")


# Mixing


def corpora(tmp_path: Path) -> tuple[str, str]:
    return write(tmp_path / "new.jsonl", [{"prompt": f"{i}", "completion": "n" * 90} for i in range(100)]), write(
        tmp_path / "old.jsonl", [{"text": f"{i:03d} " + "o" * (i % 50)} for i in range(400)]
    )


def test_replay_makes_up_its_share_of_the_tokens(tmp_path):
    new, old = corpora(tmp_path)
    alone, _ = load_examples(config(train=new), PLAIN, "train")
    examples, report = load_examples(config(train=new, replay={"source": old, "share": 0.1}), PLAIN, "train")
    assert list(examples[: len(alone)]) == list(alone)
    replayed = examples[len(alone) :]
    assert replayed.lengths.sum() / examples.lengths.sum() == pytest.approx(0.1, abs=0.01)
    numbers = [int(example.where.rpartition(":")[2]) for example in replayed]
    assert numbers == sorted(set(numbers)) and max(numbers) > 300, "drawn from the whole corpus, no row twice"
    assert examples == load_examples(config(train=new, replay={"source": old, "share": 0.1}), PLAIN, "train")[0]
    assert report.tokens == examples.lengths.sum() and report.kept == 100
    assert any("mixed in: " in line for line in report.lines()) and any("of all tokens, 10.0% were asked for" in line for line in report.lines())


def test_several_sources_are_mixed_and_short_ones_repeated_which_is_said(tmp_path):
    new, old = corpora(tmp_path)
    (tmp_path / "book.txt").write_text("b" * 1000)
    mixed = config(train=new, mix=[{"source": old, "share": 0.2}, {"source": str(tmp_path / "book.txt"), "share": 0.4}], max_length=150, system="Be kind.")
    examples, report = load_examples(mixed, PLAIN, "train")
    tokens = {part: sum(len(e.input_ids) for e in examples if part in e.where) for part in ("new.jsonl", "old.jsonl", "book.txt")}
    total = sum(tokens.values())
    assert {part: count / total for part, count in tokens.items()} == pytest.approx({"new.jsonl": 0.4, "old.jsonl": 0.2, "book.txt": 0.4}, abs=0.01)
    assert any("book.txt" in part.source and "7 rows are taken" in part.notes[-2] and "times" in part.notes[-2] for part in report.parts)
    assert len(load_examples(mixed.model_copy(update={"eval": new}), PLAIN, "eval")[0]) == 100, "nothing is mixed into what is evaluated"
    assert len(load_examples(mixed.alone(new, rows=7), PLAIN, "train")[0]) == 7


def test_a_source_mixed_in_has_its_own_columns_and_is_held_to_the_same_rules(tmp_path):
    new, _ = corpora(tmp_path)
    other = write(tmp_path / "other.jsonl", [{"q": "1+1", "a": "2"}] * 50)
    replay = {"source": other, "share": 0.1, "columns": {"prompt": "q", "completion": "a"}}
    examples, _ = load_examples(config(train=new, replay=replay), PLAIN, "train")
    assert marked_row(examples[len(examples) - 1], PLAIN) == "<s>1+1\n[[2</s>]]"
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(ConfigError, match=r"^data.replay: .*bad.jsonl: 1 of 1 rows cannot be used"):
        load_examples(config(train=new, replay={"source": bad, "share": 0.1}), PLAIN, "train")
    parts = [{"source": other, "share": 0.1, "columns": replay["columns"]}, {"source": str(tmp_path / "othr.jsonl"), "share": 0.1}]
    with pytest.raises(ConfigError, match=r"^data.mix.1: no such file: .*othr.jsonl; did you mean 'other.jsonl'"):
        load_examples(config(train=new, mix=parts, replay=replay), PLAIN, "train")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"replay": {"source": "a", "share": 1.0}}, "less than 1"),
        ({"replay": {"source": "a", "share": 0.0}}, "greater than 0"),
        ({"mix": [{"source": "a", "share": 0.5}], "replay": {"source": "b", "share": 0.5}}, "leave nothing to 'train'"),
        ({"replay": {"source": "a", "share": 0.1, "columns": {"promt": "q"}}}, "'promt' is no standard column"),
    ],
)
def test_shares_and_columns_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_parquet_adds_no_arguments_to_a_tool_s_call(tmp_path):
    """The trap: Arrow gives every struct the keys of all rows, and the template writes the other tools' arguments as nulls, which are then trained."""
    import pyarrow as pa
    import pyarrow.parquet

    calls = [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "add", "arguments": {"a": 1}}]
    rows = [{"messages": [{"role": "user", "content": "do"}, {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}]} for call in calls]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = [record.columns["messages"][1] for record in read_rows(tmp_path / "rows.parquet")]
    assert [turn["tool_calls"][0]["function"] for turn in read] == calls and all(turn["content"] is None for turn in read)


def test_a_pair_of_whole_conversations_does_not_write_the_prompt_twice():
    """The trap: the prompt column holds the question alone, and both sides begin with a system turn."""
    sides = {side: [said("system", "be brief"), said("user", "hi"), said("assistant", text)] for side, text in (("chosen", "yo"), ("rejected", "no"))}
    example = render({"prompt": "hi", **sides}, CHAT, config())
    shown = marked_row(example, CHAT)
    assert shown.count("hi") == 1 and "be brief" in shown and shown.endswith("[[yo<|im_end|>]]\n") and example.rejected.answer == "no"
    with pytest.raises(ConfigError, match="'rejected' begins with another prompt than 'prompt'"):
        render({"prompt": "hi", "chosen": "yo", "rejected": sides["rejected"]}, CHAT, config())
