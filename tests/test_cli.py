"""The terminal face: exit codes, one clear message for every wrong input, no traceback; speed of the door."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftkit.cli import main

GOOD = """\
model: {name: builtin:tiny}
methods:
  - lora: {r: 2, alpha: 4}
data: {train: builtin:tool-calls/train, eval: builtin:tool-calls/test, train_rows: 16, eval_rows: 4}
train: {learning_rate: 1.0e-3, max_steps: 2, batch_size: 2}
eval: {metrics: [loss]}
output_dir: OUT
"""


@pytest.fixture
def peftkit(capsys):
    """Runs a command in this process: an exception that the command line does not turn into a message fails the test."""

    def call(*arguments: object) -> subprocess.CompletedProcess:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, stopped.value.code or 0, out, err)

    return call


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("OUT", str(tmp_path / "run")))
    return path


def test_help_and_import_need_no_torch(peftkit):
    code = "import sys, peftkit, peftkit.cli; sys.exit(bool({'torch', 'transformers', 'pydantic', 'yaml'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    shown = peftkit("--help")
    assert shown.returncode == 0
    for command in ("run", "check", "eval", "generate", "merge", "bench", "recipes", "methods", "doctor"):
        assert command in shown.stdout


WRONG = [
    ("learning_rate: 1.0e-3", "learning_rat: 1", [":5", "learning_rat", "learning_rate"]),
    ("max_steps: 2,", "max_steps: 2, max_steps: 3,", [":5", "max_steps", "duplicate"]),
    ("learning_rate: 1.0e-3", "learning_rate: 2e-4", [":5", "learning_rate", "2.0e-4"]),
    ("builtin:tool-calls/train", "no_such_file.jsonl", ["no_such_file.jsonl"]),
    ("- lora: {r: 2, alpha: 4}", "- lora: {r: 2, alpha: 4, target_modules: [q_pro]}", ["q_pro", "q_proj"]),
    ("- lora:", "- lorra:", [":3", "lorra", "lora"]),
    ("builtin:tool-calls/train", "builtin:tool-call/train", ["tool-call", "tool-calls"]),
    ("builtin:tiny", "builtin:tinny", ["builtin:tinny", "builtin:tiny"]),
    ("builtin:tiny", "./no/such/model", ["no folder"]),
    ("{r: 2, alpha: 4}", "{r: two, alpha: 4}", [":3", "r", "two"]),
    ("max_steps: 2", "max_steps: yes", [":5", "max_steps", "true"]),
    ("metrics: [loss]", "metrics: [exact_matsch]", [":6", "exact_match"]),
    ("- lora: {r: 2, alpha: 4}", "- neftune: {alpha: 5}", ["methods", "nothing would train"]),
]


@pytest.mark.parametrize("old,new,expected", WRONG, ids=[new[:30] for _, new, _ in WRONG])
def test_wrong_recipes_exit_2_with_one_clear_message(peftkit, tmp_path, old, new, expected):
    assert old in GOOD
    for command in ("run", "check"):
        done = peftkit(command, write(tmp_path, GOOD.replace(old, new, 1)))
        assert done.returncode == 2, done.stderr
        for part in expected:
            assert part in done.stderr, done.stderr


def test_rows_without_the_columns_exit_2(peftkit, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"promt": "a", "completion": "b"}\n')
    done = peftkit("check", write(tmp_path, GOOD.replace("builtin:tool-calls/train", str(rows))))
    assert done.returncode == 2
    assert "rows.jsonl:2" in done.stderr and "prompt" in done.stderr


def test_usage_errors_exit_2(peftkit, tmp_path):
    assert peftkit("run").returncode == 2
    assert peftkit("rnu", "x.yaml").returncode == 2
    missing = peftkit("run", tmp_path / "recipe.yml")
    assert missing.returncode == 2 and "recipe.yml" in missing.stderr
    bad = peftkit("run", write(tmp_path, GOOD), "train.max_steps")
    assert bad.returncode == 2 and "train.max_steps" in bad.stderr
    gone = peftkit("generate", "hello", "--adapter", tmp_path / "nothing")
    assert gone.returncode == 2


def test_check_shows_a_row_with_its_trained_tokens(peftkit, tmp_path):
    done = peftkit("check", write(tmp_path, GOOD))
    assert done.returncode == 0, done.stderr
    assert '[[{"tool"' in done.stdout and "adapts 42 linears" in done.stdout and "3,049,920 parameters" in done.stdout


def test_run_generate_eval_merge(peftkit, tmp_path):
    file = write(tmp_path, GOOD)
    done = peftkit("run", file, "train.max_steps=3", "eval.metrics=[loss, exact_match]")
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout and "exact_match" in done.stdout and "\x1b[" not in done.stdout + done.stderr
    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    assert result["train"]["steps"] == 3 and result["recipe"]["train"]["max_steps"] == 3
    said = peftkit("generate", "Wake me at 7 am on Monday.", "--adapter", run, "--max-new-tokens", "8")
    assert said.returncode == 0 and "base:" in said.stdout and "with adapter:" in said.stdout, said.stderr
    scored = peftkit("eval", run)
    assert scored.returncode == 0 and f"{result['after']['loss']:.4f}" in scored.stdout, scored.stdout + scored.stderr
    merged = peftkit("merge", run, tmp_path / "merged")
    assert merged.returncode == 0 and "top-1 agreement" in merged.stdout, merged.stderr
    again = peftkit("merge", run, tmp_path / "merged")
    assert again.returncode == 2 and "not empty" in again.stderr
    plain = peftkit("generate", "Wake me at 7 am on Monday.", "--model", tmp_path / "merged", "--max-new-tokens", "8")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.split("base:")[1].strip() == said.stdout.split("with adapter:")[1].strip()


def test_a_wrong_recipe_in_a_process_of_its_own(tmp_path):
    file = write(tmp_path, GOOD.replace("learning_rate", "learning_rat"))
    done = subprocess.run([sys.executable, "-m", "peftkit", "run", str(file)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "learning_rat" in done.stderr and "Traceback" not in done.stderr


def test_lists_of_what_is_there(peftkit):
    shown = peftkit("recipes")
    assert shown.returncode == 0 and "quickstart" in shown.stdout
    shown = peftkit("methods")
    assert shown.returncode == 0 and "neftune" in shown.stdout and "target_modules" in shown.stdout
    shown = peftkit("doctor")
    assert shown.returncode == 0 and "bitsandbytes" in shown.stdout


def test_garbage_is_collected_while_a_command_works_and_after_it(monkeypatch):
    """It is switched off for the imports alone; a run of hours must not go without."""
    seen = []
    monkeypatch.setattr(importlib.import_module("peftkit.run"), "run", lambda *_: seen.append(gc.isenabled()))
    monkeypatch.setattr("peftkit.cli.print.print_result", lambda _: None)
    monkeypatch.setattr("peftkit.bench.suite.find_suite", lambda _: seen.append(gc.isenabled()) or sys.exit(3))
    for arguments, code in ((["run", "quickstart"], 0), (["bench", "run", "ci"], 3), (["recipes"], 0)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert (stopped.value.code or 0) == code and gc.isenabled()
    assert seen == [True, True]


def test_a_full_gpu_is_told_with_the_remedy(monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(importlib.import_module("peftkit.run"), "run", full)
    with pytest.raises(SystemExit) as stopped:
        main(["run", "quickstart"])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "Tried to allocate 2.00 GiB" in said and "lower train.micro_batch_size" in said and "Traceback" not in said
