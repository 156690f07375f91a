"""The data stage: every row shape, what is trained of it, what is refused and why, packing without contamination."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peftkit.config import ConfigError
from peftkit.data import DataConfig, Example, collate, colour_row, load_examples, marked_row, render

SPECIAL = ["<pad>", "<s>", "<end>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
END_OUTSIDE = MARKED.replace("{{ m.content + eos_token }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ eos_token }}")
LINES = UNMARKED.replace("{{ m.content + eos_token }}", "{{ '\n' + m.content + eos_token + '\n' }}").replace("{{ '<|assistant|>' }}", "{{ '<|assistant|>\n' }}")
FORGETFUL = "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HEADLESS = UNMARKED.replace("{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}", "")
CHAT = [("user", "hi"), ("assistant", "yo"), ("user", "sum?"), ("assistant", "4 é")]


def tokenizer(template: str | None = None, bos: bool = False, **options: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens; with `bos`, the tokenizer itself puts `<s>` first."""
    names = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<end>"} | options
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=SPECIAL[3:],
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **tokens,
    )


def config(**options) -> DataConfig:
    return DataConfig(**({"train": "unused.json"} | options))


def turns(*pairs: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def write(path: Path, rows: list) -> str:
    """The rows as a JSON array or as JSON lines, by the file's name."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]")
    return str(path)


# What is trained


@pytest.mark.parametrize("template", [MARKED, UNMARKED, END_OUTSIDE, HEADLESS])
def test_every_answer_with_its_end_is_trained_and_nothing_else(template):
    chat = tokenizer(template)
    example = render(turns(*CHAT), chat, config())
    assert marked_row(example, chat) == "<s><|user|>hi<end><|assistant|>[[yo<end>]]<|user|>sum?<end><|assistant|>[[4 é<end>]]"
    assert example.answer == "4 é"
    if template != HEADLESS:
        assert chat.decode(example.prompt_ids) == "<s><|user|>hi<end><|assistant|>yo<end><|user|>sum?<end><|assistant|>"
        assert example.prompt_ids == example.input_ids[: len(example.prompt_ids)]


@pytest.mark.parametrize("template", [MARKED, UNMARKED, END_OUTSIDE])
@pytest.mark.parametrize(
    "loss_on, expected",
    [
        ("last", "<s><|user|>hi<end><|assistant|>yo<end><|user|>sum?<end><|assistant|>[[4 é<end>]]"),
        ("all", "<s>[[<|user|>hi<end><|assistant|>yo<end><|user|>sum?<end><|assistant|>4 é<end>]]"),
    ],
)
def test_loss_on(template, loss_on, expected):
    chat = tokenizer(template)
    assert marked_row(render(turns(*CHAT), chat, config(loss_on=loss_on)), chat) == expected


def test_the_line_break_after_the_end_of_turn_is_not_trained():
    chat = tokenizer(LINES)
    assert marked_row(render(turns(*CHAT[:2]), chat, config()), chat) == "<s><|user|>\nhi<end>\n<|assistant|>\n[[yo<end>]]\n"


def test_a_template_that_rewrites_history_is_refused_where_its_spans_cannot_be_told():
    chat = tokenizer(FORGETFUL)
    with pytest.raises(ConfigError, match=r"turn 1: .* set loss_on: last, or use a template with \{% generation %\} markers"):
        render(turns(*CHAT), chat, config())
    assert marked_row(render(turns(*CHAT), chat, config(loss_on="last")), chat) == "<|user|>hi<|user|>sum?<|assistant|>[[4 é]]"


def test_a_first_turn_of_the_assistant_needs_markers():
    row = turns(("assistant", "yo"), *CHAT[2:])
    assert marked_row(render(row, tokenizer(MARKED), config()), tokenizer(MARKED)).startswith("<s><|assistant|>[[yo<end>]]")
    with pytest.raises(ConfigError, match="the first turn is the assistant's"):
        render(row, tokenizer(UNMARKED), config())


def test_markers_that_miss_an_answer_are_an_error_not_a_smaller_mask():
    missing = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(ConfigError, match="cover 1 of 2 assistant turns"):
        render(turns(*CHAT), tokenizer(missing), config())


def test_system_is_put_before_rows_that_have_none():
    chat = tokenizer(MARKED)
    assert chat.decode(render(turns(*CHAT[:2]), chat, config(system="Be kind.")).prompt_ids).startswith("<s><|system|>Be kind.<end><|user|>")
    own = turns(("system", "Be brief."), *CHAT[:2])
    assert "Be kind" not in chat.decode(render(own, chat, config(system="Be kind.")).input_ids)
    plain = tokenizer()
    assert marked_row(render({"prompt": "a", "completion": "b"}, plain, config(system="Be kind.")), plain) == "Be kind.\n\na\n[[b<end>]]"


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "2+2", "completion": "4"}, "<s>2+2\n[[4<end>]]"),
        ({"question": "2+2", "answer": 4}, "<s>2+2\n[[4<end>]]"),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, "<s>Instruction:\nAdd.\n\nInput:\n2 2\n\nResponse:\n[[4<end>]]"),
        ({"instruction": "Add.", "input": "", "output": "4"}, "<s>Instruction:\nAdd.\n\nResponse:\n[[4<end>]]"),
        ({"text": "once"}, "<s>[[once<end>]]"),
    ],
)
def test_without_a_chat_template_rows_have_a_plain_form(row, expected):
    plain = tokenizer(bos=True)
    assert marked_row(render(row, plain, config()), plain) == expected


def test_with_a_chat_template_prompts_and_instructions_become_turns():
    chat = tokenizer(MARKED, bos=True)
    row = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert marked_row(render(row, chat, config()), chat) == "<s><|user|>Add.\n\n2 2<end><|assistant|>[[4<end>]]"


def test_chats_need_a_chat_template():
    with pytest.raises(ConfigError, match="need a chat template, and this tokenizer has none: use"):
        render(turns(*CHAT), tokenizer(), config())


def test_sharegpt_roles_and_tools():
    with_tools = MARKED.replace("{{ bos_token }}", "{{ bos_token }}{% for t in tools or [] %}{{ t.function.name }};{% endfor %}")
    pairs = [("human", "w?"), ("function_call", "f()"), ("observation", "sun"), ("gpt", "Sunny.")]
    row = {"conversations": [{"from": who, "value": text} for who, text in pairs], "tools": '[{"name": "f"}, {"name": "g"}]', "id": 1}
    rest = "<|user|>w?<end><|assistant|>[[f()<end>]]<|tool|>sun<end><|assistant|>[[Sunny.<end>]]"
    assert marked_row(render(row, tokenizer(MARKED), config()), tokenizer(MARKED)) == "<s>" + rest
    assert marked_row(render(row, tokenizer(with_tools), config()), tokenizer(with_tools)) == "<s>f;g;" + rest
    with pytest.raises(ConfigError, match="'tools' is not JSON"):
        render(row | {"tools": "hammer"}, tokenizer(with_tools), config())


def test_two_bos_become_one_and_the_report_says_so(tmp_path):
    chat = tokenizer(MARKED.replace("{{ bos_token }}", "{{ bos_token + bos_token }}"))
    examples, report = load_examples(config(train=write(tmp_path / "rows.json", [turns(*CHAT)])), chat, "train")
    assert examples[0].input_ids[:2] == chat.convert_tokens_to_ids(["<s>", "<|user|>"])
    assert examples[0].prompt_ids == examples[0].input_ids[: len(examples[0].prompt_ids)]
    assert marked_row(examples[0], chat).endswith("[[4 é<end>]]")
    assert any("BOS stood twice" in note for note in report.notes)


def test_the_end_is_trained_where_pad_is_the_same_token(tmp_path):
    chat = tokenizer(MARKED, pad_token="<end>")
    examples, report = load_examples(config(train=write(tmp_path / "rows.json", [turns(*CHAT)])), chat, "train")
    batch = collate([examples, [Example([5] * 40, [False] + [True] * 39, "long")]], chat.pad_token_id)
    assert batch["labels"][0].tolist().count(chat.eos_token_id) == 2  # one for each answer, none for the padding
    assert any("pad is the same token as eos" in note for note in report.notes)


def test_the_report_says_where_generation_would_not_stop(tmp_path):
    path = write(tmp_path / "rows.json", [turns(*CHAT[:2])])
    endless = tokenizer(UNMARKED.replace(" + eos_token", ""))
    assert any("1 rows end with no special token" in note for note in load_examples(config(train=path), endless, "train")[1].notes)
    other = tokenizer(MARKED.replace("eos_token", "'<|tool|>'"))
    assert any("end with '<|tool|>'" in note and "eos is '<end>'" in note for note in load_examples(config(train=path), other, "train")[1].notes)


def test_colour_row_shows_the_whole_row_with_trained_tokens_apart():
    chat = tokenizer(MARKED)
    text = colour_row(render(turns(*CHAT), chat, config()), chat)
    assert text.plain == "<s><|user|>hi<end><|assistant|>yo<end><|user|>sum?<end><|assistant|>4 é<end>"
    assert [text.plain[span.start : span.end] for span in text.spans if span.style == "bold green"] == ["yo<end>", "4 é<end>"]


# What is read


PAIRS = [{"prompt": f"{i} + 1", "completion": f"00{i + 1}"} for i in range(10)]


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(PAIRS)


def write_parquet(path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(PAIRS).to_parquet(str(path))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_file_format_gives_the_same_examples(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    {"csv": write_csv, "parquet": write_parquet}.get(suffix, lambda p: write(p, PAIRS))(path)
    examples, report = load_examples(config(train=str(path)), tokenizer(), "train")
    assert [example.answer for example in examples] == [f"00{i + 1}" for i in range(10)]  # text stays text
    assert (report.format, report.rows, report.kept) == ("prompt/completion", 10, 10)
    assert examples[0].where == f"{path}{ {'parquet': '[0]', 'csv': ':2'}.get(suffix, ':1') }"


def test_a_json_file_may_hold_json_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    assert load_examples(config(train=str(path)), tokenizer(), "train")[0][3].where == f"{path}:4"


def test_rows_of_a_json_array_are_told_by_the_line_they_begin_on(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c\n", "completion": "[]"}, {"prompt": "e", "completion": " "}]
    path.write_text("\n" + json.dumps(rows, indent=2) + "\n")
    with pytest.raises(ConfigError, match=rf"1 of 3 rows.*\n  {path}:11: the answer is empty"):
        load_examples(config(train=str(path)), tokenizer(), "train")
    assert path.read_text().split("\n")[10] == "  {"
    path.write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=r"rows.json\[2\]: the answer is empty"):
        load_examples(config(train=str(path)), tokenizer(), "train")
    assert len(load_examples(config(train=str(path), train_rows=2), tokenizer(), "train")[0]) == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"text": "a"}\n {"text": "b"}]', "rows.json:2: not JSON \\(Expecting ',' delimiter, column 2"),
        ('[{"text": "a"},\n]', "rows.json:2: not JSON \\(Expecting value"),
        ('[{"text": "a"}', "rows.json:1: not JSON \\(Expecting ',' delimiter"),
        ('[{"text": "a"}]\n\n[]', "rows.json:3: not JSON \\(Extra data"),
        ("[", "rows.json:1: not JSON \\(Expecting value"),
        ('"a"', "expected an array of rows, found text"),
        (" [ ] ", "there are no rows"),
    ],
)
def test_broken_json_arrays_say_where(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_examples(config(train=str(tmp_path / "rows.json")), tokenizer(), "train")


def test_builtin_tasks():
    examples, report = load_examples(config(train="builtin:tool-calls/train", train_rows=5), tokenizer(MARKED), "train")
    assert len(examples) == 5 and report.format == "messages" and examples[4].where == "builtin:tool-calls/train[4]"
    assert json.loads(examples[0].answer)["tool"]


def test_hub_names_split_and_subset_and_says_what_failed(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        if name == "owner/gone":
            raise ConnectionError("Couldn't reach the Hub\nand much more")
        return PAIRS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    both = config(train="owner/name/main:train[:1%]", eval="owner/name")
    assert load_examples(both, tokenizer(), "train")[0][0].where == "owner/name/main:train[:1%][0]"
    load_examples(both, tokenizer(), "eval")
    assert asked == [("owner/name", "main", "train[:1%]"), ("owner/name", None, "test")]
    with pytest.raises(ConfigError, match=r"'owner/gone' is no local file, and reading split 'train' .* ConnectionError: Couldn't reach the Hub$"):
        load_examples(config(train="owner/gone"), tokenizer(), "train")


def test_a_text_file_is_cut_into_blocks_and_its_end_held_out(tmp_path):
    (tmp_path / "book.txt").write_text("".join(chr(97 + i % 26) for i in range(100)))
    book = config(train=str(tmp_path / "book.txt"), max_length=32, holdout=0.2)
    train, report = load_examples(book, tokenizer(bos=True), "train")
    held, _ = load_examples(book, tokenizer(bos=True), "eval")
    assert [len(example.input_ids) for example in train] == [32, 32, 16] and [len(example.input_ids) for example in held] == [20]
    whole = tokenizer()((tmp_path / "book.txt").read_text())["input_ids"]
    assert [token for example in [*train, *held] for token in example.input_ids] == whole
    assert report.supervised_tokens == 80 - 3 and train[1].where.endswith("book.txt tokens 32:64")
    assert len(load_examples(config(train=book.train, max_length=32, train_rows=2), tokenizer(), "train")[0]) == 2


@pytest.mark.parametrize("options", [{"system": "Be kind."}, {"columns": {"text": "body"}}])
def test_options_that_text_cannot_use_are_refused(tmp_path, options):
    (tmp_path / "book.txt").write_text("once upon a time")
    with pytest.raises(ConfigError, match=f"data.{next(iter(options))}|no columns"):
        load_examples(config(train=str(tmp_path / "book.txt"), **options), tokenizer(), "train")


def test_holdout_takes_the_last_rows_and_the_first_n_of_each_part(tmp_path):
    path = write(tmp_path / "rows.json", PAIRS)
    parted = config(train=path, holdout=0.3, train_rows=4, eval_rows=2)
    assert [example.where[-2:] for example in load_examples(parted, tokenizer(), "train")[0]] == [":1", ":2", ":3", ":4"]
    assert [example.where[-2:] for example in load_examples(parted, tokenizer(), "eval")[0]] == [":8", ":9"]
    examples, report = load_examples(config(train=path), tokenizer(), "eval")
    assert examples == [] and report.rows == 0 and "no rows" in report.lines()[0]


def test_fewer_rows_than_asked_for_are_said(tmp_path):
    _, report = load_examples(config(train=write(tmp_path / "rows.json", PAIRS), train_rows=99), tokenizer(), "train")
    assert "data.train_rows asks for 99 rows, there are 10" in report.notes


def test_columns_name_what_a_file_calls_otherwise(tmp_path):
    path = write(tmp_path / "rows.json", [{"text": "noise", "q": "2+2", "a": "4"}])
    plain = tokenizer()
    mapped = config(train=path, columns={"prompt": "q", "completion": "a"})
    assert marked_row(load_examples(mapped, plain, "train")[0][0], plain) == "2+2\n[[4<end>]]"
    with pytest.raises(ConfigError, match=r"reads 'prompt' from 'qq', which no row has; did you mean 'q'\?.*columns found: text, q, a"):
        load_examples(config(train=path, columns={"prompt": "qq", "completion": "a"}), plain, "train")


# What is refused


@pytest.mark.parametrize(
    "spec, message",
    [
        ("rows.jsn", r"no such file: .*rows.jsn; did you mean 'rows.json'\?"),
        ("rows.md", "cannot read .md; supported are .json, .jsonl, .csv, .parquet, .txt"),
        ("gone/rows.json", "there is no folder"),
        ("empty.json", "there are no rows"),
        ("bad.json", "bad.json:3: not JSON"),
        ("object.json", "expected an array of rows, found an object with the keys 'data'"),
        ("words.json", r"no known row format \(columns found: sentence, promt\).*\n  'promt'; did you mean 'prompt'\?"),
    ],
)
def test_sources_that_cannot_be_read_say_why(tmp_path, spec, message):
    write(tmp_path / "rows.json", PAIRS)
    write(tmp_path / "words.json", [{"sentence": "a", "promt": "b"}])
    (tmp_path / "rows.md").write_text("# no rows")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "object.json").write_text('{"data": []}')
    (tmp_path / "bad.json").write_text('[\n{"text": "a"},\n{"text" "b"}\n]')
    with pytest.raises(ConfigError, match=message):
        load_examples(config(train=str(tmp_path / spec)), tokenizer(), "train")


@pytest.mark.parametrize("spec, message", [("builtin:tool-cals/train", "did you mean 'tool-calls'"), ("builtin:times", "builtin:times/train or")])
def test_unknown_builtin_tasks_are_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        load_examples(config(train=spec), tokenizer(MARKED), "train")


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"messages": [}', "not JSON"),
        ("[1]", "expected an object with columns, found a list"),
        ({"mesages": []}, r"no 'messages' \(columns found: mesages; expected: messages; did you mean 'mesages'\?\)"),
        ({"messages": []}, "found an empty one"),
        ({"messages": "hi"}, "must be a list of turns, found text"),
        ({"messages": ["hi"]}, "turn 0 of 'messages' must be an object, found text"),
        ({"messages": [{"role": "user", "text": "hi"}]}, "its keys: role, text"),
        (turns(("usr", "hi")), "unknown role 'usr'; did you mean 'user'"),
        (turns(("user", "hi")), r"no assistant turn to learn from \(roles: user\)"),
        (turns(("user", "hi"), ("assistant", " ")), "the answer is empty"),
        (turns(("user", "x" * 40), ("assistant", "yo")), "all 3 trained tokens lie beyond max_length 24"),
        (turns(("tool", "no"), ("assistant", "yo")), "the chat template refuses the row: no tools here"),
    ],
)
def test_bad_rows_are_errors_by_default_and_listed_when_skipped(tmp_path, row, reason):
    no_tools = "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    refusing = tokenizer(MARKED.replace("{% if m.role == 'assistant' %}", no_tools + "{% if m.role == 'assistant' %}"))
    path = write(tmp_path / "rows.jsonl", [turns(("user", "hi"), ("assistant", "yo")), row])
    cut = {"train": path, "max_length": 24, "truncation": "right"}
    with pytest.raises(ConfigError, match=rf"(?s)1 of 2 rows cannot be used.*on_bad_row: skip.*rows.jsonl:2: .*{reason}"):
        load_examples(config(**cut), refusing, "train")
    examples, report = load_examples(config(**cut, on_bad_row="skip"), refusing, "train")
    assert [example.where for example in examples] == [f"{path}:1"]
    assert [bad.where for bad in report.dropped] == [f"{path}:2"] and any(f"{path}:2" in line for line in report.lines())


def test_the_first_ten_bad_rows_are_listed_and_the_others_counted(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}] * 13 + PAIRS)
    with pytest.raises(ConfigError) as error:
        load_examples(config(train=path), tokenizer(), "train")
    assert f"{path}:10: the answer is empty" in str(error.value) and f"{path}:11:" not in str(error.value)
    assert str(error.value).endswith("... and 3 more")
    with pytest.raises(ConfigError, match="none of the 13 rows is left"):
        load_examples(config(train=path, train_rows=13, on_bad_row="skip"), tokenizer(), "train")


def test_long_rows_are_dropped_or_cut_and_counted(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b" * n} for n in (3, 30, 5)])
    examples, report = load_examples(config(train=path, max_length=16), tokenizer(), "train")
    assert list(report.lengths) == [6, 8] and report.truncated == 0 and report.longest == 8
    assert [(bad.where, bad.reason, bad.too_long) for bad in report.dropped] == [(f"{path}:2", "33 tokens, and max_length is 16", True)]
    examples, report = load_examples(config(train=path, max_length=16, truncation="right"), tokenizer(), "train")
    assert list(report.lengths) == [6, 16, 8] and report.truncated == 1 and not report.dropped
    assert sum(examples[1].trained) == 14 == report.supervised_tokens - 4 - 6
    lost = write(tmp_path / "lost.jsonl", [{"prompt": "a", "completion": "b" * 30}, {"prompt": "a" * 30, "completion": "b"}])
    _, report = load_examples(config(train=lost, max_length=16, truncation="right", on_bad_row="skip"), tokenizer(), "train")
    assert report.truncated == 1 and [bad.where for bad in report.dropped] == [f"{lost}:2"], "what is left out is not counted as cut too"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"columns": {"promt": "q"}}, "'promt' is no standard column; did you mean 'prompt'"),
        ({"eval": "x.json", "holdout": 0.1}, "'holdout' would do nothing"),
        ({"holdout": 1.0}, "less than 1"),
        ({"max_length": 1}, "greater than or equal to 2"),
        ({"loss_on": "user"}, "loss_on"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_two_thousand_short_rows_take_less_than_two_seconds(tmp_path):
    path = write(tmp_path / "rows.json", [turns(("user", f"{i} + 1?"), ("assistant", str(i + 1))) for i in range(2000)])
    chat = tokenizer(MARKED)
    start = time.process_time()  # not the clock on the wall: the machine may be busy with other things
    load_examples(config(train=path), chat, "train")
    assert time.process_time() - start < 2


# The real files, where they are at hand

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real files are not at hand")
@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "chat_sharegpt.json", "glaive_toolcall_en_demo.json", "gsm8k/test.jsonl"])
def test_real_files_have_the_same_spans_with_markers_and_without(name):
    real = config(train=str(DATA / name), max_length=3000, train_rows=100, truncation="drop")
    marked, report = load_examples(real, tokenizer(MARKED), "train")
    unmarked, _ = load_examples(real, tokenizer(UNMARKED), "train")
    assert marked == unmarked and report.kept >= 50
    assert all(example.answer and example.trained[-1] for example in marked)
