"""check: what it tells and in which form, and that it needs neither weights nor much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from transformers import ViTConfig

import peftkit as pk
from peftkit.check import check, histogram
from peftkit.cli import main
from peftkit.config import ConfigError
from peftkit.folder import must_have_room
from peftkit.model import load_tokenizer
from peftkit.rehearse import rehearse
from peftkit.train import TrainConfig

DOCS = Path(__file__).parents[1] / "docs" / "check.md"


def recipe(tmp_path: Path, **sections) -> dict:
    found = {
        "model": {"name": "builtin:tiny"}, "methods": [{"lora": {"r": 2}}],
        "data": {"train": "builtin:copy/train", "eval": "builtin:copy/test", "train_rows": 16, "eval_rows": 4},
        "train": {"batch_size": 4, "max_steps": 2, "learning_rate": 1.0e-3}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    return found | {key: found.get(key, {}) | value for key, value in sections.items()}


def text(report) -> str:
    return "\n".join(line for lines in report.sections.values() for line in lines)


def test_json_is_one_object_with_the_documented_keys(tmp_path, capsys):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(tmp_path)))
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(file), "--json", "--gpu", "8GB"])
    assert not stopped.value.code
    found = json.loads(capsys.readouterr().out)
    documented = DOCS.read_text().split("## `--json`")[1]
    assert {line.split("`")[1] for line in documented.splitlines() if line.startswith("| `")} == set(found)
    for part in ("model", "memory", "data"):
        assert all(f"`{key}`" in documented for key in found[part]), part
    assert found["memory"]["fits"] and found["memory"]["largest_micro_batch"] == 4 and found["memory"]["available"] == 8 * 10**9
    assert found["model"]["adapted"]["lora"]["q_proj"] == 6 and "[[" in found["rows"][0]


def test_what_does_not_fit_is_said_with_the_micro_batch_that_does(tmp_path):
    fits = check(recipe(tmp_path), gpu="8GB")
    need, reserve = fits.facts["memory"]["total"], fits.facts["memory"]["reserve"]
    tight = check(recipe(tmp_path), gpu=f"{(need + reserve - 10**5) / 10**6}MB")
    assert not tight.facts["memory"]["fits"] and 0 < tight.facts["memory"]["largest_micro_batch"] < 4 and "DOES NOT FIT" in text(tight)
    hopeless = check(recipe(tmp_path), gpu="700MB")
    assert hopeless.facts["memory"]["largest_micro_batch"] == 0 and "not even one row" in text(hopeless)
    with pytest.raises(ConfigError, match="--gpu"):
        check(recipe(tmp_path), gpu="big")


def test_auto_is_told_as_a_number(tmp_path):
    found = check(recipe(tmp_path, train={"micro_batch_size": "auto"}))
    assert found.facts["memory"]["micro_batch_size"] == 4


def test_time_per_step_only_where_a_run_measured_it(tmp_path):
    assert "time" not in check(recipe(tmp_path)).sections
    pk.run(recipe(tmp_path, eval={"metrics": []}))
    found = check(recipe(tmp_path))
    assert found.facts["seconds_per_step"] > 0 and "s per step" in text(found)
    assert "seconds_per_step" not in check(recipe(tmp_path, train={"batch_size": 2})).facts, "of another batch nothing is known"
    (tmp_path / "run" / "result.json").write_text("{}")
    assert "no result of a run" in text(check(recipe(tmp_path)))


CONFLICTS = [
    ({"data": {"train_rows": 2}}, "train.batch_size"),
    ({"train": {"micro_batch_size": 9}}, "train.micro_batch_size"),
    ({"train": {"gradient_checkpointing": True}}, "train.gradient_checkpointing"),
]


@pytest.mark.parametrize("change,named", CONFLICTS, ids=[named for _, named in CONFLICTS])
def test_conflicts_are_named(tmp_path, change, named):
    assert not check(recipe(tmp_path)).facts["conflicts"]
    assert [line.split(":")[0] for line in check(recipe(tmp_path, **change)).facts["conflicts"]] == [named]


def test_rows_longer_than_the_model_was_made_for(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a " * 2000, "completion": "b"}) + "\n")
    found = check(recipe(tmp_path, data={"train": str(rows), "eval": None, "train_rows": None, "eval_rows": None, "max_length": 8000}, train={"batch_size": 1}))
    assert any("the model was made for 1024" in line for line in found.facts["conflicts"])


def test_histogram_counts_every_row():
    lines = histogram([1, 2, 3, 40, 40, 80])
    assert sum(int(line.split()[-1]) for line in lines) == 6 and len(lines) == 8 and "1 to 10 tokens" in lines[0] and lines[0].count("#") == 40
    assert histogram([5, 5]) == [] and sum(int(line.split()[-1]) for line in histogram([1, 2])) == 2


def test_no_weights_are_loaded(tmp_path):
    """The folder's weights are cut to nothing: who reads them fails."""
    base, tokenizer = pk.load("builtin:tiny", dtype="float32")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    assert load_file(weights)
    weights.write_bytes(b"")
    assert check(recipe(tmp_path, model={"name": str(tmp_path / "base")})).facts["memory"]["weights"] > 10**6


def test_check_imports_neither_peft_nor_bitsandbytes(tmp_path):
    """What takes seconds to import and is not needed."""
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(tmp_path, model={"quantize": "nf4"})))
    unwanted = {"peft", "bitsandbytes", "datasets", "matplotlib"}
    code = f"import sys; from peftkit.check import check; check({str(file)!r}); print(sorted({unwanted} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("said", ["nobody/nothing is not a valid model identifier", "Unrecognized model in nobody/nothing"])
def test_what_the_hub_does_not_have_is_an_error_and_what_cannot_be_reached_is_not(said, tmp_path, monkeypatch):
    """A name that is misspelt, a licence not accepted, a type that transformers does not know: `run` would stop there."""

    def refuse(name, *_):
        try:
            raise ValueError(said)
        except ValueError as error:
            raise ConfigError(f"model: cannot load the config of {name!r}: {said}") from error

    monkeypatch.setattr("peftkit.check.load_config", refuse)
    with pytest.raises(ConfigError, match=said):
        check(recipe(tmp_path, model={"name": "nobody/nothing"}))
    monkeypatch.undo()
    assert "the hub was not reached" in text(check(recipe(tmp_path, model={"name": "nobody/nothing"})))  # tests run without the hub


def test_what_the_run_would_have_no_room_for_is_refused(tmp_path, monkeypatch):
    """The trap: hours of training whose checkpoint the disk cannot hold."""
    usage = SimpleNamespace(total=10**9, used=10**9 - 2**20, free=2**20)
    monkeypatch.setattr("peftkit.folder.shutil.disk_usage", lambda path: usage)
    settings = recipe(tmp_path, train={"save_every": 1, "max_steps": 5}) | {"methods": [{"lora": {"r": 32}}]}
    with pytest.raises(ConfigError, match=r"output_dir: the run writes .* \(what it trains, and 3 checkpoints at most\) and 1.0 MiB are free .*make room"):
        check(settings)
    usage.free = 10**9
    assert check(settings).facts["data"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("train", "checkpoints"),
    [
        ({}, 1), ({"save_every": 1}, 3), ({"save_every": 100}, 1), ({"save_every": 1, "keep_last": 50}, 5), ({"eval_every": 1, "keep_best": 0}, 1),
        ({"eval_every": 1, "keep_best": 1}, 4), ({"save_every": 3}, 2), ({"eval_every": 4}, 2),
    ],
)  # fmt: skip
def test_room_is_for_the_checkpoints_that_will_be_there(train, checkpoints, tmp_path, monkeypatch):
    """Five steps: one that saves every hundred writes none but where it is stopped, and an earlier run in the folder gives its room up."""
    old = tmp_path / "checkpoints/old.bin"
    old.parent.mkdir()
    old.write_bytes(bytes(500))
    free = 100 + checkpoints * 1000 - 500
    monkeypatch.setattr("peftkit.folder.shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    must_have_room(tmp_path, TrainConfig(**train), 5, 100, 1000)
    with pytest.raises(ConfigError, match=f"{checkpoints} checkpoints at most"):
        must_have_room(tmp_path, TrainConfig(**train), 5, 101, 1000)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("peftkit.folder.tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"output_dir: nothing can be written to .* \(Permission denied\)"):
        check(recipe(tmp_path))


def test_rows_without_choices_are_refused(tmp_path):
    """The trap: check passes, and run stops at the evaluation set."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": "yes", "choices": ["no", "maybe"]}) + "\n" for i in range(3)))
    settings = recipe(tmp_path, data={"train": str(rows), "eval": str(rows), "train_rows": None, "eval_rows": None}, eval={"metrics": ["choice_accuracy"]})
    with pytest.raises(ConfigError, match=r"3 of 3 rows cannot be used for choice_accuracy(.|\n)*rows.jsonl:1: its answer 'yes' is none of its choices"):
        check(settings)
    rows.write_text(rows.read_text().replace("maybe", "yes"))
    assert any("3 of 3 rows with choices" in line for line in check(settings).sections["data"])


def test_a_gpu_elsewhere_may_have_what_this_machine_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    paged = recipe(tmp_path, train={"max_steps": 2, "optimizer": "paged_adamw_8bit"})
    with pytest.raises(ConfigError, match="paged_adamw_8bit needs a GPU"):
        check(paged)
    assert "peak" in text(check(paged, gpu="24GB"))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_what_is_no_language_model_of_text_is_said(quantize, tmp_path):
    """A vision or speech model: the folder is whole, and downloading it again would not help."""
    ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64).save_pretrained(tmp_path / "vit")
    load_tokenizer("builtin:tiny").save_pretrained(tmp_path / "vit")
    for what in (check, pk.run, rehearse):
        with pytest.raises(ConfigError, match=r"is no language model of text: .*ViTConfig") as wrong:
            what(recipe(tmp_path, model={"name": str(tmp_path / "vit"), "quantize": quantize}))
        assert "not whole" not in str(wrong.value)
