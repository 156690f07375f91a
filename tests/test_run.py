"""The runner: what lands in the run folder, accumulation, resuming after kill -9, other recipes refused."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_llama
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import peftkit as pk
from peftkit.checkpoint import CheckpointError, checkpoints, load_checkpoint
from peftkit.config import ConfigError
from peftkit.data import DataOrder, Example, collate
from peftkit.loss import TokenLoss
from peftkit.optim import build_optimizer
from peftkit.quant import quantized_modules
from peftkit.run import Scorer, to_batch
from peftkit.save_model import write_verified
from peftkit.train import TrainConfig, TrainingStopped, TrainStats, enable_checkpointing, train
from peftkit.use import find_origin, load_for

run_module = importlib.import_module("peftkit.run")  # the package's `run` is the function


def recipe(folder: Path, **train_options) -> dict:
    return {
        "model": {"name": "builtin:tiny", "quantize": "nf4"},
        "methods": [{"qlora": {"r": 4, "alpha": 8, "dropout": 0.1}}, {"loraplus": {"ratio": 4.0}}, {"neftune": {"alpha": 5.0}}],
        "data": {"train": "builtin:tool-calls/train", "eval": "builtin:tool-calls/test", "max_length": 128, "train_rows": 64, "eval_rows": 8},
        "train": {"learning_rate": 2.0e-3, "max_steps": 6, "batch_size": 4, "log_every": 1, "save_every": 2, "keep_last": 3} | train_options,
        "eval": {"metrics": ["loss", "exact_match"], "retained": ["builtin:copy/test"], "retained_rows": 4},
        "output_dir": str(folder),
    }


def run_in_process(folder: Path, *options: str, **environment: str) -> subprocess.Popen:
    file = folder.parent / f"{folder.name}.json"  # JSON is YAML
    file.write_text(json.dumps(recipe(folder)))
    return subprocess.Popen(
        [sys.executable, "-m", "peftkit", "run", str(file), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | environment, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = run_in_process(folder)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return folder


def test_run_folder(uninterrupted):
    assert {"recipe.yaml", "metrics.jsonl", "result.json", "adapter", "checkpoints", "loss.png"} <= {p.name for p in uninterrupted.iterdir()}
    result = json.loads((uninterrupted / "result.json").read_text())
    assert set(result) == {"before", "after", "train", "adapter", "recipe", "versions", "machine"}
    assert {"loss", "exact_match", "retained_exact_match", "retained"} <= set(result["before"]) and set(result["before"]) == set(result["after"])
    assert set(result["train"]) == {"seconds", "tokens", "supervised_tokens", "tokens_per_second", "peak_memory_bytes", "steps"}
    assert set(result["adapter"]) == {"trainable_parameters", "bytes", "modules"} and result["adapter"]["modules"] == 42
    assert result["train"]["steps"] == 6 and result["train"]["tokens"] > result["train"]["supervised_tokens"] > 0
    assert result["after"]["loss"] < result["before"]["loss"]
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    answers = [json.loads(line) for line in (uninterrupted / "predictions.jsonl").read_text().splitlines()]
    assert sum(a["set"] == "eval" for a in answers) == 8 and sum(a["set"] == "builtin:copy/test" for a in answers) == 4


def test_peft_gives_the_same_logits(uninterrupted):
    from peft import PeftModel

    base, _ = pk.load("builtin:tiny", dtype="float32")
    ids = torch.randint(3, 2000, (2, 12), generator=torch.Generator().manual_seed(0))
    ours, _ = pk.load("builtin:tiny", dtype="float32")
    pk.load_adapter(ours, uninterrupted / "adapter", another_base=True)  # it was trained in 4 bits, of which peft knows nothing
    theirs = PeftModel.from_pretrained(base, uninterrupted / "adapter")
    with torch.no_grad():
        a, b = ours.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_killed_while_training_resumes_to_the_same_bytes(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = run_in_process(folder)
    deadline = time.monotonic() + 200
    while not checkpoints(folder / "checkpoints"):  # killed as soon as one stands, in the middle of a later step
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "result.json").exists()
    resumed = run_in_process(folder, "--resume")
    output, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, output
    assert_same_run(folder, uninterrupted)


KILLER = """
import os, signal, sys, torch
import peftkit.checkpoint as checkpoint
real, seen = torch.save, []
def save(state, path, *rest):  # the second checkpoint is cut off half written
    real(state, path, *rest)
    seen.append(path)
    if len(seen) == 2:
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.torch.save = save
from peftkit.cli import main
main(sys.argv[1:])
"""


def test_killed_while_writing_a_checkpoint_resumes_to_the_same_bytes(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    file = tmp_path / "run.json"
    file.write_text(json.dumps(recipe(folder)))
    killed = subprocess.run([sys.executable, "-c", KILLER, "run", str(file)], capture_output=True, text=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-000002"]
    assert list((folder / "checkpoints").glob(".writing-*")), "the half-written one is there, under another name"
    refused = subprocess.run([sys.executable, "-m", "peftkit", "run", str(file)], capture_output=True, text=True, timeout=240)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    resumed = run_in_process(folder, "--resume")
    output, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, output
    assert_same_run(folder, uninterrupted)


def assert_same_run(folder: Path, whole: Path) -> None:
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == (whole / "adapter/adapter_model.safetensors").read_bytes()
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, whole))
    assert ours["after"] == theirs["after"] and ours["before"] == theirs["before"]
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, whole)]
    assert losses[0] == losses[1]


def test_resuming_another_recipe_is_refused_with_the_difference(uninterrupted):
    other = recipe(uninterrupted, learning_rate=1.0e-3)
    with pytest.raises(ConfigError, match=r"train.learning_rate: 0.002 -> 0.001"):
        pk.run(other, resume=True)


def test_a_run_that_has_ended_is_not_trained_again(uninterrupted, monkeypatch, capsys):
    """A queue that starts `run --resume` once more would lose what was trained, where no checkpoint is left of it."""
    monkeypatch.setattr(run_module, "load", lambda *_, **__: pytest.fail("the model is loaded"))
    again = pk.run(recipe(uninterrupted), resume=True)
    assert again.to_json() == json.loads((uninterrupted / "result.json").read_text())
    assert "has ended: there is nothing to resume" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_result_is_told(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    (folder / "result.json").write_text("{}")
    written = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(written.replace(str(uninterrupted), str(folder)))
    with pytest.raises(ConfigError, match=r"result.json is no result of a run \(TypeError.*remove the folder, or give another output_dir"):
        pk.run(recipe(folder), resume=True)


def test_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume"):
        pk.run(recipe(tmp_path / "none"), resume=True)


# ------------------------------------------------------------------------------------------------------------ the loop


def examples(count: int) -> list[list[Example]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        length = 5 + i % 7
        ids = torch.randint(3, 96, (length,), generator=generator).tolist()
        rows.append([Example(input_ids=ids, trained=[j >= 2 + i % 3 for j in range(length)], where=f"row {i}", prompt_ids=[], answer="")])
    return rows


def one_run(tmp_path: Path, rows, **options):
    model = tiny_llama()
    torch.manual_seed(0)
    pk.attach(model, pk.LoRA(r=4))
    optimizer = build_optimizer(model, 1e-2)
    config = TrainConfig(**({"learning_rate": 1e-2, "max_steps": 3, "batch_size": 8} | options))
    losses: list[float] = []
    train(
        TokenLoss(model), model, optimizer, rows,
        lambda part: {k: v for k, v in collate(part, 0).items() if k != "document_lengths"},
        lambda row: len(row[0].input_ids), lambda row: sum(row[0].trained[1:]),
        config, Accelerator(cpu=True), tmp_path, {}, lambda step, metrics: losses.append(metrics["loss"]),
    )  # fmt: skip
    return model, losses


def test_accumulation_does_not_change_the_loss(tmp_path):
    whole, losses = one_run(tmp_path, examples(20))
    split, split_losses = one_run(tmp_path, examples(20), micro_batch_size=1)
    assert losses == pytest.approx(split_losses, rel=1e-5)
    for (name, a), (_, b) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)
    assert losses[-1] != losses[0]


def test_gradient_checkpointing_does_not_change_the_loss(tmp_path):
    _, losses = one_run(tmp_path, examples(20))
    model = tiny_llama()
    torch.manual_seed(0)
    pk.attach(model, pk.LoRA(r=4))
    enable_checkpointing(model)
    again: list[float] = []
    train(
        TokenLoss(model), model, build_optimizer(model, 1e-2), examples(20),
        lambda part: {k: v for k, v in collate(part, 0).items() if k != "document_lengths"},
        lambda row: len(row[0].input_ids), lambda row: sum(row[0].trained[1:]),
        TrainConfig(learning_rate=1e-2, max_steps=3, batch_size=8), Accelerator(cpu=True), tmp_path, {}, lambda s, m: again.append(m["loss"]),
    )  # fmt: skip
    assert losses == pytest.approx(again, rel=1e-6)


def test_a_non_finite_loss_stops_the_run(tmp_path):
    with pytest.raises(TrainingStopped, match=r"non-finite.*step 1"):
        rows = examples(8)
        model = tiny_llama()
        pk.attach(model, pk.LoRA(r=4))
        with torch.no_grad():
            model.lm_head.weight[5] = float("inf")
        train(
            TokenLoss(model), model, build_optimizer(model, 1e-2), rows,
            lambda part: {k: v for k, v in collate(part, 0).items() if k != "document_lengths"},
            lambda row: len(row[0].input_ids), lambda row: sum(row[0].trained[1:]),
            TrainConfig(max_steps=1, batch_size=8), Accelerator(cpu=True), tmp_path, {}, lambda s, m: None,
        )  # fmt: skip


def test_every_row_is_seen_once_per_epoch_in_an_order_of_the_seed():
    order = DataOrder(rows=10, batch_size=4, seed=3)
    seen = [i for step in range(5) for i in order[step]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert DataOrder(10, 4, 3)[4] == order[4] and DataOrder(10, 4, 4)[0] != order[0]


def test_full_finetuning_saves_a_model(tmp_path):
    made = recipe(tmp_path / "full", full_finetuning=True, max_steps=2, learning_rate=1.0e-4)
    made |= {"methods": [], "model": {"name": "builtin:tiny"}}
    result = pk.run(made)
    assert result.adapter["trainable_parameters"] == 3_049_920
    weights = load_file(tmp_path / "full/model/model.safetensors")
    base, _ = pk.load("builtin:tiny", dtype="float32")
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"].float(), base.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ConfigError, match=r"was finetuned in full and has no adapter; its model is .*full/model, a plain one"):
        find_origin(str(tmp_path / "full"))
    assert quantized_modules(load_for(str(tmp_path / "full"), [], None, "nf4")[1])
    assert load_for(str(tmp_path / "full"), [], "none")[1].dtype == torch.float32  # as the run had it before training
    (tmp_path / "full/model").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="holds no folder model, where a run that trains all parameters saves them"):
        load_for(str(tmp_path / "full"), [], None)  # a path that is not there would be looked up as a hub id


def test_a_full_model_that_is_not_what_was_trained_is_never_left(tmp_path, monkeypatch):
    """The trap: a save that loses something. The folder is there, loads without an error, and computes something else."""
    save = type(pk.load("builtin:tiny")[0]).save_pretrained

    def lossy(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        file = next(Path(folder).glob("*.safetensors"))
        tensors = load_file(file)
        tensors["model.norm.weight"] *= 1.001
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", lossy)
    made = recipe(tmp_path / "full", full_finetuning=True, max_steps=1, learning_rate=1.0e-4)
    with pytest.raises(CheckpointError, match="read back from disk is not the one in memory") as failed:
        pk.run(made | {"methods": [], "model": {"name": "builtin:tiny"}})
    assert not (tmp_path / "full/model").exists() and "unverified-model, and stays until" in failed.value.__notes__[0]
    assert (tmp_path / "full/unverified-model/model.safetensors").exists()  # it cannot be made again
    monkeypatch.undo()
    pk.run(made | {"methods": [], "model": {"name": "builtin:tiny"}}, resume=True)
    assert not list(tmp_path.glob("full/.writing-*")) and (tmp_path / "full/model/model.safetensors").exists()
    assert (tmp_path / "full/unverified-model/model.safetensors").exists()  # nobody but its owner clears it away


def test_a_checkpoint_of_other_rows_is_refused(tmp_path):
    """The trap: rows are added after an interruption, another permutation is drawn, and what was seen is seen again."""
    rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(12)]
    file = tmp_path / "rows.jsonl"
    made = recipe(tmp_path / "run") | {"data": {"train": str(file)}, "eval": {}}

    def written(rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    written(rows)
    pk.run(made)
    (tmp_path / "run/result.json").unlink()
    for changed in ([*rows, rows[0]], [{"prompt": "say much more than before", "completion": "0"}, *rows[1:]]):
        written(changed)
        with pytest.raises(CheckpointError, match=r"training on 12 rows, .* the data has changed"):
            pk.run(made, resume=True)
    written(rows)
    pk.run(made, resume=True)


def test_a_disk_too_small_for_the_run_is_told_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("peftkit.folder.shutil.disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(ConfigError, match=r"output_dir: the run writes .* are free in"):
        pk.run(recipe(tmp_path / "run", max_steps=1))
    assert not (tmp_path / "run").exists()


def test_a_mistyped_run_deletes_nothing(tmp_path):
    """Neither files that are not a run's, nor an earlier run whose recipe is then given with a typo."""
    mine = tmp_path / "project/model/weights.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="holds no run of peftkit"):
        pk.run(recipe(tmp_path / "project"))
    done = tmp_path / "done"
    pk.run(recipe(done, max_steps=1, save_every=None))
    with pytest.raises(ConfigError, match=r"nope\.jsonl"):
        pk.run(recipe(done), overrides=["data.train=nope.jsonl"])
    assert mine.read_text() == "mine" and (done / "result.json").exists() and (done / "adapter").exists()


def test_what_a_run_of_another_recipe_has_trained_is_not_cleared_away(tmp_path):
    """The trap: an override, a forgotten output_dir, and yesterday's adapter is gone."""
    pk.run(recipe(tmp_path / "run", max_steps=1, save_every=None))
    before = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"(?s)a run of another recipe has trained.*train\.max_steps: 1 -> 2"):
        pk.run(recipe(tmp_path / "run", max_steps=2, save_every=None))
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == before
    pk.run(recipe(tmp_path / "run", max_steps=1, save_every=None))  # the same one may run again


# --- after the last step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_a_stop_during_the_last_evaluation_costs_no_training(full, tmp_path, monkeypatch):
    """The trap: all steps are done, the adapter is written, and what comes then is killed: everything was trained again, or cleared away."""
    made = recipe(tmp_path / "run", max_steps=3, **({"full_finetuning": True, "learning_rate": 1e-4} if full else {"save_every": None}))
    made |= {"methods": [], "model": {"name": "builtin:tiny"}} if full else {}
    whole = pk.run(made | {"output_dir": str(tmp_path / "whole")})
    real = Scorer.score

    def killed(self, when, predictions):
        if when == "after":
            raise KeyboardInterrupt
        return real(self, when, predictions)

    monkeypatch.setattr(Scorer, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        pk.run(made)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="holds an unfinished run with checkpoints; go on with --resume"):
        pk.run(made)
    monkeypatch.setattr(Accelerator, "backward", lambda *_, **__: pytest.fail("it trains again"))
    again = pk.run(made, resume=True)
    assert again.after == whole.after and again.train["steps"] == 3
    assert (tmp_path / "run/checkpoints").exists() == full  # kept where they were asked for


def test_a_model_whose_run_did_not_end_is_not_cleared_away(tmp_path):
    """All weights train and no checkpoints are asked for: the model is all there is."""
    made = recipe(tmp_path / "run", full_finetuning=True, max_steps=1, learning_rate=1e-4, save_every=None)
    made |= {"methods": [], "model": {"name": "builtin:tiny"}}
    pk.run(made)
    assert not (tmp_path / "run/checkpoints").exists()
    (tmp_path / "run/result.json").unlink()
    with pytest.raises(ConfigError, match=r"run/model was trained, and the run did not end after that.*peftkit eval"):
        pk.run(made)
    with pytest.raises(ConfigError, match=r"run/model was trained and no checkpoint is left of it: resuming would train it again from the start"):
        pk.run(made, resume=True)
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_a_model_that_was_not_written_whole_is_not_kept(tmp_path, monkeypatch):
    """On a full disk every attempt would leave another piece of it, as if it could be used."""
    model = tiny_llama()

    def full(folder):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"could not be written to .*run/model: No space left on device"):
        write_verified(model, None, tmp_path / "run/model", keep=True)
    assert not list((tmp_path / "run").iterdir())


def test_the_peak_is_that_of_the_process_that_trained(uninterrupted):
    """Who is stopped while the last evaluation runs goes on in a process that only loads and evaluates."""
    state = load_checkpoint(checkpoints(uninterrupted / "checkpoints")[-1])[1]
    stats = TrainStats(**state["stats"])
    assert stats.peak_memory_bytes > 0
    stats.peak_memory_bytes = 2**60
    assert stats.summary()["peak_memory_bytes"] == 2**60


def test_a_disk_that_is_full_at_the_end_is_told(tmp_path, monkeypatch):
    """safetensors has an error of its own for that, which is no OSError."""

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    model, _ = pk.load("builtin:tiny", dtype="float32")
    pk.attach(model, pk.LoRA(r=2))
    monkeypatch.setattr("peftkit.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"the adapter could not be written to .*No space left on device.*MiB are free there: make room"):
        pk.save_adapter(model, tmp_path / "adapter")


def test_padding_is_found_in_the_text_part_of_a_config(tmp_path):
    """Gemma 3's config of text and pictures names no padding token itself."""
    model = tiny_llama()
    outer = SimpleNamespace(get_text_config=lambda *_, **__: SimpleNamespace(pad_token_id=7), is_encoder_decoder=False)
    loss = SimpleNamespace(model=SimpleNamespace(config=outer, device=model.device))
    batch = to_batch([[Example([1, 2, 3], [False, True, True], "row", [1], "x")], [Example([1, 2], [False, True], "row", [1], "x")]], loss)
    assert batch["input_ids"][1, 2] == 7


def test_epochs_are_counted_exactly():
    assert TrainConfig(num_epochs=1.1, batch_size=10).steps(100) == 11 and TrainConfig(num_epochs=0.07, batch_size=10).steps(1000) == 7
    assert TrainConfig(num_epochs=1.0, batch_size=10).steps(101) == 11


def test_what_a_model_freezes_by_design_stays_so(tmp_path, monkeypatch):
    """Marian's table of positions gets no gradient, and several processes would wait for one."""
    real = run_module.load

    def frozen(*arguments, **options):
        model, tokenizer = real(*arguments, **options)
        model.model.norm.weight.requires_grad_(False)
        return model, tokenizer

    monkeypatch.setattr(run_module, "load", frozen)
    made = recipe(tmp_path / "full", full_finetuning=True, max_steps=1, learning_rate=1e-4) | {"methods": [{"neftune": {}}], "model": {"name": "builtin:tiny"}}
    assert pk.run(made).adapter["trainable_parameters"] == 3_049_920 - 192
