"""Tasks of lm-evaluation-harness: a clear error without it; with it, its accuracy is ours."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import wake

import peftkit as pk
from peftkit.config import ConfigError
from peftkit.evaluate import harness, harness_scores

TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
target_delimiter: " "
metric_list: [{metric: acc}]
"""


def test_without_the_harness_the_command_is_named(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "peftkit\[harness\]"'):
        harness_scores(None, None, ["arc_easy"])


def test_its_accuracy_is_that_of_likelihoods_by_hand(tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"Word {i} is", "choices": ["red", "seven", "a home"], "right": i % 3} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    model, tokenizer = pk.load("builtin:tiny", dtype="float32")
    torch.manual_seed(0)
    pk.attach(model, pk.LoRA(r=4, alpha=32))
    wake(model)
    model.eval()
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            prompt, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row["question"], f"{row['question']} {choice}"))
            whole = prompt + whole[len(prompt) :]  # the harness takes the prompt's tokens as they are without a choice
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits.log_softmax(-1)
            scores.append(sum(logs[0, i - 1, whole[i]].item() for i in range(len(prompt), len(whole))))
        right += scores.index(max(scores)) == row["right"]
    found = harness_scores(model, tokenizer, ["colours"], folder=str(tmp_path / "tasks"))
    assert found["colours acc"] == pytest.approx(right / 6)
    with pytest.raises(ConfigError, match="no task 'colour'; did you mean 'colours'"):
        harness_scores(model, tokenizer, ["colour"], folder=str(tmp_path / "tasks"))
