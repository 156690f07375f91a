"""Several processes, by accelerate with gloo on CPUs: gradients and losses of one process; one of them writes and prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peftkit.checkpoint import checkpoints
from peftkit.result import MetricsLog

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # torchrun


def finished(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=ENVIRONMENT)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """1 process x accumulation 4 == 2 processes x accumulation 2, over rows with unequal numbers of supervised tokens."""
    script = str(ROOT / "tests" / "two_processes.py")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for command in ([sys.executable, script, str(tmp_path / "one"), "2"], [*LAUNCH, script, str(tmp_path / "two"), "2"]):
        done = finished(command)
        assert done.returncode == 0, done.stderr
    one, *two = (torch.load(tmp_path / name) for name in ("one/rank-0.pt", "two/rank-0.pt", "two/rank-1.pt"))
    assert (one["processes"], two[0]["processes"]) == (1, 2) and len(one["gradients"]) == 3
    for rank in two:
        assert rank["gradients"][0].keys() == one["gradients"][0].keys()
        for name, gradient in one["gradients"][0].items():
            torch.testing.assert_close(rank["gradients"][0][name], gradient, rtol=1e-6, atol=1e-6, msg=name)
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5) and rank["losses"] == two[0]["losses"]
        assert all(torch.equal(rank["parameters"][name], tensor) for name, tensor in two[0]["parameters"].items())
    assert max(float(gradient.abs().max()) for gradient in one["gradients"][0].values()) > 1e-2


def recipe(folder: Path, **train) -> dict:
    return {
        "model": {"name": "builtin:tiny", "dtype": "float32"},
        "methods": ["lora"],
        "data": {"train": "builtin:tool-calls/train", "eval": "builtin:tool-calls/test", "train_rows": 32, "eval_rows": 4, "max_length": 128},
        "train": {"learning_rate": 2.0e-3, "max_steps": 4, "batch_size": 4, "log_every": 1, "eval_every": 2} | train,
        "output_dir": str(folder),
    }


def command(file: Path, *options: str, launch: list[str] = LAUNCH) -> list[str]:
    return [*launch, "-m", "peftkit", "run", str(file), *options]


def test_a_recipe_on_two_processes(tmp_path):
    losses, printed = [], []
    for name, launch in (("one", [sys.executable]), ("two", LAUNCH)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(recipe(tmp_path / name)))
        done = finished(command(file, launch=launch))
        assert done.returncode == 0, done.stderr
        lines = MetricsLog.read(tmp_path / name / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4], "one process writes"
        losses.append([line.get("loss", line.get("eval_loss")) for line in lines])
        printed.append(done.stdout + done.stderr)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert printed[0].count("rows kept") == printed[1].count("rows kept") == 2 and printed[1].count("after") == printed[0].count("after")


def test_two_processes_are_stopped_and_go_on(tmp_path):
    (tmp_path / "whole.json").write_text(json.dumps(recipe(tmp_path / "whole", max_steps=30, eval_every=None) | {"methods": [{"lora": {"dropout": 0.2}}]}))
    (tmp_path / "run.json").write_text(json.dumps(recipe(tmp_path / "run", max_steps=30, eval_every=None) | {"methods": [{"lora": {"dropout": 0.2}}]}))
    assert finished(command(tmp_path / "whole.json")).returncode == 0
    process = subprocess.Popen(command(tmp_path / "run.json"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=ENVIRONMENT)
    deadline = time.monotonic() + 200
    log = tmp_path / "run/metrics.jsonl"
    while not log.exists() or not log.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # the launcher hands it on
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0 and output.count("go on with: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m peftkit run") == 1, output
    assert len(checkpoints(tmp_path / "run/checkpoints")) == 1
    alone = finished(command(tmp_path / "run.json", "--resume", launch=[sys.executable]))
    assert alone.returncode == 1 and "was written by 2 processes, this run has 1" in " ".join(alone.stderr.split())
    done = finished(command(tmp_path / "run.json", "--resume"))
    assert done.returncode == 0, done.stderr
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_tripwire_speaks_once(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(
        json.dumps(recipe(tmp_path / "run", learning_rate=1000.0, max_grad_norm=1e9, max_steps=40, lr_scheduler="constant", warmup_ratio=0.0, eval_every=None))
    )
    done = finished(command(file))
    told = " ".join(done.stderr.split())
    assert done.returncode != 0 and told.count("failed:") == 1 and "tripwire" in told, done.stderr


def test_processes_that_were_not_started_are_missed(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(recipe(tmp_path / "run")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    done = finished(command(file, launch=[*launch, "--dynamo_backend", "no"]))
    assert "asked for several processes and started one" in done.stderr and "torchrun --nproc_per_node 2" in done.stderr and done.returncode != 0
    assert not (tmp_path / "run").exists()


def test_parameters_that_are_split_are_refused(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(recipe(tmp_path / "run")))
    split = {"ACCELERATE_USE_FSDP": "true"}  # what `accelerate launch --use_fsdp` sets
    done = subprocess.run(command(file), capture_output=True, text=True, timeout=280, cwd=ROOT, env=ENVIRONMENT | split)
    assert done.returncode != 0 and done.stderr.count("adapters and checkpoints of split models are not written here yet") == 1, done.stderr
