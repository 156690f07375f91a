"""The embedded base and its tasks: small, offline, disjoint splits, known but for the unseen families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftkit.builtin.families import FAMILIES
from peftkit.builtin.tasks import TASKS, builtin_rows, is_test, stream
from peftkit.builtin.unseen import UNSEEN
from peftkit.model import BUILTIN, load

TINY = BUILTIN / "tiny"


def test_families():
    assert len(FAMILIES) >= 12 and len(UNSEEN) >= 3 and "tool-calls" in UNSEEN and not FAMILIES.keys() & UNSEEN.keys()


@pytest.mark.parametrize("task", sorted(TASKS))
def test_rows_are_many_different_and_disjoint(task):
    train, test = builtin_rows(task, "train"), builtin_rows(task, "test")
    assert len(train) >= 1000 and len(test) >= 200
    texts = [{json.dumps(row["messages"]) for row in rows} for rows in (train, test)]
    assert len(texts[0]) == len(train) and len(texts[1]) == len(test) and not texts[0] & texts[1]
    assert builtin_rows(task, "test", 5) == test[:5]
    sides = {split: {row.content for _, row in zip(range(500), stream(task, split, 0), strict=False)} for split in ("train", "test")}
    assert not sides["train"] & sides["test"] and all(is_test(content) for content in sides["test"])


def test_no_tool_call_of_the_test_rows_stands_in_training():
    train = {row["messages"][-1]["content"] for row in builtin_rows("tool-calls", "train")}
    test = [row["messages"][-1]["content"] for row in builtin_rows("tool-calls", "test")]
    assert not train & set(test)
    assert len({json.loads(answer)["tool"] for answer in test}) == 10


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'tool-calls'"):
        builtin_rows("tool-call", "train")
    with pytest.raises(ValueError, match="unknown split"):
        builtin_rows("copy", "valid")


def test_model_card_numbers_hold():
    scores = json.loads((TINY / "scores.json").read_text())
    own = [scores["exact_match"][task] for task in FAMILIES]
    assert sum(own) / len(own) == pytest.approx(scores["own_exact_match"], abs=1e-3) and scores["own_exact_match"] >= 0.8
    assert all(scores["exact_match"][task] <= 0.05 for task in UNSEEN)


def test_files_fit_the_wheel():
    files = [path for path in Path(TINY).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {"model.safetensors", "config.json", "tokenizer.json", "scores.json"} <= {path.name for path in files}


def test_the_base_answers_its_own_tasks_and_its_tokenizer_is_lossless():
    from peftkit.evaluate import exact_match

    model, tokenizer = load("builtin:tiny")
    assert model.config.architectures == ["LlamaForCausalLM"] and tokenizer.pad_token != tokenizer.eos_token
    prompts, answers = [], []
    for task in ("copy", "json-read", "passage"):
        for row in builtin_rows(task, "test", 10):
            text = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
            answers.append(row["messages"][-1]["content"])
    found = exact_match(model.eval(), tokenizer, prompts, answers, batch_size=30)
    assert sum(p.correct for p in found) >= 24
    for text in ("Ünïcode → ok? 3.14\n\ttabs", answers[0], '{"a": [1, 2]}'):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
