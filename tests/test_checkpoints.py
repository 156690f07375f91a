"""Checkpoints of the loop: the best kept, patience, signals, a full disk, and going on as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from loops import Loop
from safetensors.torch import load_file

import peftkit as pk
from peftkit import cli
from peftkit.checkpoint import CheckpointError, checkpoints, load_checkpoint, save_checkpoint
from peftkit.config import ConfigError
from peftkit.interrupts import ECHO, Interrupted, Interrupts, StoppedAtOnce
from peftkit.recipe import load_recipe
from peftkit.run import resume_line
from peftkit.train import Evaluations, prefetched

ROOT = Path(__file__).parents[1]
METHODS = [pk.LoRA(r=4, dropout=0.2), pk.LoRAPlus(ratio=4), pk.NEFTune(alpha=5)]


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Scripted:
    """An evaluation whose losses are given."""

    def __init__(self, *losses: float):
        self.losses = list(losses)

    def __call__(self) -> float:
        return self.losses.pop(0)


# --------------------------------------------------------------------------------------------------------------- the best


def test_the_run_ends_with_the_parameters_of_the_lowest_loss(tmp_path):
    by_step: dict[int, dict[str, torch.Tensor]] = {}
    loop = Loop(*METHODS, max_steps=8, eval_every=2, save_every=3, keep_last=1)
    loop.run(tmp_path, evaluate=Scripted(3.0, 1.0, 2.0, 1.5), on_step=lambda step: by_step.update({step: loop.trained()}))
    assert loop.evaluations == [(2, 3.0), (4, 1.0), (6, 2.0), (8, 1.5)]
    assert names(tmp_path) == ["step-000004", "step-000006"], "the best, and the newest"
    assert_same(loop.trained(), by_step[4])
    assert any(not torch.equal(by_step[4][name], by_step[8][name]) for name in by_step[4])


@pytest.mark.parametrize("keep_best", [0, 2])
def test_how_many_are_kept(keep_best, tmp_path):
    last: dict[str, torch.Tensor] = {}
    loop = Loop(*METHODS, max_steps=9, eval_every=2, save_every=3, keep_last=1, keep_best=keep_best)
    loop.run(tmp_path, evaluate=Scripted(1.0, 3.0, 2.0, 4.0, 5.0), on_step=lambda step: last.update(loop.trained()))
    assert names(tmp_path) == (["step-000006"] if keep_best == 0 else ["step-000002", "step-000006"])
    assert all(torch.equal(last[name], tensor) for name, tensor in loop.trained().items()) == (keep_best == 0)


def test_patience(tmp_path):
    loop = Loop(*METHODS, max_steps=20, eval_every=1, patience=2)
    stats = loop.run(tmp_path, evaluate=Scripted(3.0, 2.0, 2.5, 1.9, 1.9, 2.0, 0.1))
    assert stats.steps == 6 and names(tmp_path)[0] == "step-000002", "two evaluations in a row without a lower one"
    assert_same(loop.trained(), load_checkpoint(tmp_path / "step-000004")[0])


def test_an_evaluation_that_is_no_number_stops(tmp_path):
    from peftkit.tripwires import TrainingStopped

    with pytest.raises(TrainingStopped, match=r"non-finite loss \(nan\).*the evaluation set"):
        Loop(*METHODS, eval_every=1).run(tmp_path / "stop", evaluate=Scripted(float("nan")))
    loop = Loop(*METHODS, eval_every=1, warn_only=["not_finite"])
    loop.run(tmp_path / "warn", evaluate=Scripted(float("nan"), 2.0, float("nan")))
    assert_same(loop.trained(), load_checkpoint(tmp_path / "warn" / "step-000002")[0])


def test_evaluations_by_hand():
    found = Evaluations(keep=2, patience=2)
    assert [found.add(step, loss) for step, loss in ((1, 5.0), (2, 4.0), (3, 4.5), (4, 4.2))] == [True, True, True, True]
    assert found.best == [(4.0, 2), (4.2, 4)] and found.steps == {2, 4} and found.exhausted
    again = Evaluations(keep=2, patience=2)
    again.load_state_dict(found.state_dict())
    assert again == found


@pytest.mark.parametrize("key", ["eval_every", "patience"])
def test_keys_without_an_evaluation_are_refused(key):
    recipe = {"model": {"name": "builtin:tiny"}, "methods": ["lora"], "data": {"train": "builtin:copy/train"}, "output_dir": "run", "train": {key: 3}}
    with pytest.raises(ConfigError, match="nothing to evaluate on" if key == "eval_every" else "give eval_every"):
        load_recipe(recipe)


# --------------------------------------------------------------------------------------------------- resumed == undisturbed


@pytest.mark.parametrize("stop", [1, 4, 5, 9])
def test_going_on_is_the_same_bit_for_bit(stop, tmp_path):
    """Adapters, optimizer (LoRA+ groups), schedule, order, dropout, noise, best score, patience."""
    options = {"max_steps": 12, "eval_every": 2, "save_every": 1, "keep_last": 1, "patience": 3, "lr_scheduler": "cosine", "warmup_ratio": 0.2}
    losses = [5.0, 3.0, 4.0, 3.5, 3.2, 9.0]  # patience ends at step 10, the best is that of step 4
    whole = Loop(*METHODS, **options)
    stats = whole.run(tmp_path / "whole", evaluate=Scripted(*losses))
    assert stats.steps == 10

    def dies(step: int) -> None:
        if step == stop + 1:
            raise MemoryError

    killed = Loop(*METHODS, **options)
    with pytest.raises(MemoryError):
        killed.run(tmp_path / "run", evaluate=Scripted(*losses), on_step=dies)
    resumed = Loop(*METHODS, **options)
    torch.manual_seed(99)  # the state of another process
    again = resumed.run(tmp_path / "run", resume=True, evaluate=Scripted(*losses[stop // 2 :]))
    assert killed.losses[:stop] + resumed.losses == whole.losses and again.steps == stats.steps
    assert_same(resumed.trained(), whole.trained())
    assert names(tmp_path / "run") == names(tmp_path / "whole")
    ours, theirs = (load_checkpoint(checkpoints(tmp_path / name)[-1])[1] for name in ("run", "whole"))
    for name, state in ours["optimizer"]["state"].items():
        assert_same(state, theirs["optimizer"]["state"][name])
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"] and ours["scheduler"] == theirs["scheduler"]
    assert ours["evaluations"] == theirs["evaluations"] and ours["tripwires"] == theirs["tripwires"]
    assert torch.equal(ours["devices"][0]["torch"], theirs["devices"][0]["torch"])
    assert torch.equal(ours["devices"][0]["handles"]["NEFTune"]["generator"], theirs["devices"][0]["handles"]["NEFTune"]["generator"])


def test_another_number_of_processes_is_refused(tmp_path):
    Loop(save_every=1).run(tmp_path)
    path = checkpoints(tmp_path)[-1]
    state = torch.load(path / "state.pt", weights_only=False)
    torch.save(state | {"devices": state["devices"] * 2}, path / "state.pt")
    with pytest.raises(CheckpointError, match="was written by 2 processes, this run has 1"):
        Loop(save_every=1).run(tmp_path, resume=True)


# --------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("at", [2, 5])
def test_a_signal_ends_the_run_after_its_step(number, code, at, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    try:
        whole = Loop(*METHODS, max_steps=5)
        whole.run(tmp_path / "whole")
        stopped = Loop(*METHODS, max_steps=5)
        with pytest.raises(Interrupted, match=f"{number.name} after step {at}.*step-00000{at}") as ended:
            stopped.run(tmp_path / "run", on_step=lambda step: signal.raise_signal(number) if step == at - 1 else None)
        assert ended.value.exit_code == code and len(stopped.losses) == at
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "as it was before"
        resumed = Loop(*METHODS, max_steps=5)
        resumed.run(tmp_path / "run", resume=True)
        assert_same(resumed.trained(), whole.trained())
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_within_the_last_evaluation_is_not_lost(tmp_path):
    loop = Loop(*METHODS, max_steps=2, eval_every=2)

    def evaluate() -> float:
        signal.raise_signal(signal.SIGTERM)
        return 1.0

    with pytest.raises(Interrupted, match="after step 2"):
        loop.run(tmp_path, evaluate=evaluate)
    assert names(tmp_path) == ["step-000002"]


def test_a_second_signal_ends_at_once_and_other_threads_leave_signals_alone():
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # an echo
        assert interrupts.number == signal.SIGTERM
        interrupts.since -= ECHO + 1
        with pytest.raises(StoppedAtOnce, match=r"SIGTERM twice.*--resume") as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.exit_code == 143
    seen = []

    def elsewhere() -> None:
        with Interrupts() as interrupts:
            seen.append(interrupts.before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [{}]


def recipe(folder: Path, **train) -> dict:
    return {
        "model": {"name": "builtin:tiny", "dtype": "float32"},
        "methods": [{"lora": {"r": 4, "dropout": 0.1}}, "neftune"],
        "data": {"train": "builtin:tool-calls/train", "eval": "builtin:tool-calls/test", "train_rows": 32, "eval_rows": 4},
        "train": {"max_steps": 400, "batch_size": 2, "log_every": 1} | train,
        "output_dir": str(folder),
    }


def test_a_terminated_command_says_how_to_go_on(tmp_path):
    file = tmp_path / "my recipe.json"
    file.write_text(json.dumps(recipe(tmp_path / "run")))
    command = [sys.executable, "-m", "peftkit", "run", str(file), "train.seed=3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 143 and "Traceback" not in output and "\x1b" not in output, output
    assert f"go on with: peftkit run '{file}' train.seed=3 --resume" in output
    step = int(names(tmp_path / "run/checkpoints")[-1].removeprefix("step-"))
    assert f"stopped: SIGTERM after step {step}" in output
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == step


def test_the_line_to_go_on_with():
    assert resume_line("a.yaml", ["train.seed=3"], 1, "cpu") == "peftkit run a.yaml train.seed=3 --resume"
    assert resume_line(Path("a.yaml"), [], 2, "cuda") == "accelerate launch --num_processes 2 -m peftkit run a.yaml --resume"
    assert "resume=True" in resume_line({}, [], 1, "cpu")
    assert resume_line("a.yaml", [], 2, "cpu") == "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m peftkit run a.yaml --resume"


# ------------------------------------------------------------------------------------------- full disks, read-only folders


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_what_was_complete(small_disk):
    first = {"a": torch.randn(50_000)}  # 200 kB, and as much again of state
    save_checkpoint(small_disk, 1, first, {"x": torch.randn(50_000)}, keep_last=5)
    save_checkpoint(small_disk, 2, first, {"x": torch.randn(50_000)}, keep_last=5)
    with pytest.raises(CheckpointError, match=r"step 3 could not be written.*MiB are free.*whole \(step-000001, step-000002\).*--resume"):
        save_checkpoint(small_disk, 3, first, {"x": torch.randn(50_000)}, keep_last=5)
    assert sorted(path.name for path in small_disk.iterdir()) == ["step-000001", "step-000002"], "room is made again"
    for path in checkpoints(small_disk):
        assert torch.equal(load_checkpoint(path)[0]["a"], first["a"])


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as one to a full disk does
from peftkit.cli import main
import peftkit.checkpoint as checkpoint
real, seen = checkpoint._write, []
def write(folder, tensors, state):
    seen.append(folder)
    if len(seen) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    real(folder, tensors, state)
checkpoint._write = write
main(sys.argv[1:])
"""


def test_a_disk_that_fills_up_during_a_run(tmp_path):
    made = recipe(tmp_path / "run", max_steps=4, save_every=1, keep_last=5)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(made))
    failed = subprocess.run([sys.executable, "-c", LIMITED, "run", str(file)], capture_output=True, text=True, timeout=240, cwd=ROOT)
    told = " ".join(failed.stderr.split())
    assert failed.returncode == 1 and "Traceback" not in told, told
    assert "checkpoint of step 3 could not be written" in told and "whole (step-000001, step-000002)" in told and "go on with --resume" in told
    assert names(tmp_path / "run/checkpoints") == ["step-000001", "step-000002"]
    assert not list((tmp_path / "run/checkpoints").glob(".writing-*"))
    resumed = pk.run(made, resume=True)
    whole = pk.run(recipe(tmp_path / "whole", max_steps=4, save_every=1, keep_last=5))
    assert resumed.after == whole.after
    assert_same(*(load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "whole")))


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["peftkit.run"], "load_tokenizer", lambda *_: pytest.fail("the model was touched"))
    (tmp_path / "file").write_text("")
    for place in ("/proc/runs/mine", str(tmp_path / "file" / "run")):
        with pytest.raises(ConfigError, match=r"output_dir: nothing can be written to .*give another output_dir"):
            pk.run(recipe(Path(place)))


def test_any_other_write_that_fails_is_one_message(capsys, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/metrics.jsonl")

    monkeypatch.setattr(sys.modules["peftkit.run"], "run", full)
    (tmp_path / "a.yaml").write_text("x: 1")
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(tmp_path / "a.yaml")])
    assert ended.value.code == 1 and "No space left on device: run/metrics.jsonl" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- kills


def test_three_kills(tmp_path):
    """benchmarks/kills.py kills a hundred times."""
    found = tmp_path / "kills.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/kills.py", "--kills", "3", "--output", str(found)], capture_output=True, text=True, timeout=280, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(found.read_text())["same_bytes"] == 3


def test_batches_are_made_ahead_in_order_and_errors_come_through():
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        if item == 7:
            raise ValueError("row 7")
        return item * item

    ahead = prefetched(range(9), make)
    assert [next(ahead) for _ in range(4)] == [0, 1, 4, 9]
    assert 4 <= len(made) <= 6, "no further ahead than asked"
    with pytest.raises(ValueError, match="row 7"):
        list(ahead)
