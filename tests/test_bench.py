"""The benchmark harness, with a stand-in for `peftkit run` that needs no model."""

from __future__ import annotations

import _thread
import io
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from synthetic_results import SUITE

import peftkit.bench.cells as cells_module
import peftkit.bench.keys as keys_module
import peftkit.bench.suite as suite_module
from peftkit.bench.baseline import Baseline, BaselineMethod, accept, baseline_json, load_baseline
from peftkit.bench.cells import Record, Results, load_results, run_suite
from peftkit.bench.gate import gate
from peftkit.bench.measures import to_target
from peftkit.bench.power import plan
from peftkit.bench.records import _kind
from peftkit.bench.report import markdown, notes, table, terminal
from peftkit.bench.statistics import accuracy, difference, mean_over_seeds
from peftkit.bench.suite import Suite, cells, load_suite
from peftkit.cli import main
from peftkit.config import ConfigError
from peftkit.train import TrainingStopped
from peftkit.tripwires import Tripwires

ROOT = Path(__file__).parents[1]

# What stands in for `peftkit run`: reads cell.yaml, behaves as its key "fake" says, writes what a run writes.
STAND_IN = """
import json, os, random, signal, sys, time
from pathlib import Path
import yaml
recipe = yaml.safe_load(Path(sys.argv[1]).read_text())
fake, seed = recipe["fake"], recipe["train"]["seed"]
print("loading the model", flush=True)
fails = fake.get("fails") if seed in fake.get("only", [seed]) else None
if fails == "crash": raise RuntimeError("boom in step 3")
if fails == "once" and not Path(fake["marker"]).exists():
    Path(fake["marker"]).touch()
    raise RuntimeError("boom the first time")
if fails == "memory": raise MemoryError
if fails == "cuda": raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
if fails == "killed": os.kill(os.getpid(), signal.SIGKILL)
if fails == "divergence": raise RuntimeError("non-finite loss (nan) at step 7\\n(tripwire not_finite; `train.warn_only: [not_finite]` goes on all the same)")
if fails == "stopped": sys.exit(143)
if fails == "silent": sys.exit(0)
if fails == "hang":
    Path(fake["marker"]).write_text(str(os.getpid()))
    time.sleep(120)
if fails == "meet":
    mine, other = (Path(fake["marker"] + str(s)) for s in (seed, 1 - seed))
    mine.touch()
    deadline = time.monotonic() + 120
    while not other.exists():
        assert time.monotonic() < deadline, "the other cell never ran"
        time.sleep(0.02)
right = [random.Random(f"{seed}/{i}").random() < fake["accuracy"] for i in range(50)]
share = sum(right) / 50
folder = Path(recipe["output_dir"])
folder.mkdir(parents=True)
lines = [{"set": "eval", "index": i, "correct": c, "prediction": "p", "answer": f"a{i}"} for i, c in enumerate(right)]
lines += [{"set": "builtin:copy/test", "index": 0, "correct": True, "prediction": "p", "answer": "a"}]
(folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in reversed(lines)))
if fails == "disagree": share += 0.1
kept = 0.8 - 0.01 * seed
(folder / "result.json").write_text(json.dumps({
    "before": {"loss": 3.0, "exact_match": 0.02, "retained_exact_match": 0.9},
    "after": {"loss": 0.1, "exact_match": share, "retained_exact_match": kept},
    "train": {"seconds": 1.0, "tokens": 1000, "tokens_per_second": 1000.0 + seed, "peak_memory_bytes": 2**30, "steps": 10},
    "adapter": {"trainable_parameters": 1234, "bytes": 4096, "modules": 3},
    "recipe": recipe, "versions": {"torch": "2"}, "machine": {"cores": 2, "threads": os.environ.get("OMP_NUM_THREADS")},
}))
"""


@pytest.fixture
def command(tmp_path):
    """The command of a cell; `command.started` lists the cells that it was asked for."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def make(cell: Path) -> list[str]:
        make.started.append(cell.parent.name.rsplit("-", 1)[0])
        return [sys.executable, str(script), str(cell)]

    make.started = []
    return make


def fake_suite(seeds=(0, 1), **methods) -> Suite:
    methods = methods or {"lora": {}, "dora": {"fake": {"accuracy": 0.5}}}
    return Suite(name="fake", recipe={"fake": {"accuracy": 0.9}, "train": {"max_steps": 10}}, methods=methods, seeds=list(seeds))


def quiet() -> Console:
    return Console(file=io.StringIO())


def record(method: str, seed: int, outcomes, examples: str = "x", **changes) -> Record:
    values = {
        "method": method, "seed": seed, "key": "k", "status": "done", "wall_seconds": 1.0, "log": "log.txt",
        "outcomes": [int(o) for o in outcomes], "examples": examples, "after": {"exact_match": sum(outcomes) / max(len(outcomes), 1)},
        "before": {"exact_match": 0.0},
    }  # fmt: skip
    return Record(**(values | changes))


def failed(method: str, seed: int, kind: str = "crash") -> Record:
    text = "Traceback (most recent call last):\n  ...\nRuntimeError: boom | <b>"
    return record(method, seed, [], status="failed", after={}, before={}, kind=kind, exit_code=1, traceback=text)


def results_of(*records: Record, **changes) -> Results:
    return Results(**({"suite": "s", "metric": "exact_match", "created": "2026-01-01T00:00:00+00:00", "cells": list(records)} | changes))


def simulate(rng, methods: dict[str, float], seeds: int = 3, examples: int = 200, spread: float = 0.02) -> Results:
    """Results in which a seed's true accuracy scatters by `spread` around its method's."""
    made = []
    for method, mean in methods.items():
        for seed in range(seeds):
            p = np.clip(mean + spread * rng.standard_normal(), 0, 1)
            made.append(record(method, seed, rng.random(examples) < p))
    return results_of(*made)


# --- suites -------------------------------------------------------------------------------------------------------------------


def test_a_suite_unfolds_into_methods_times_seeds():
    suite = Suite(
        name="s",
        recipe={"methods": [{"lora": {"r": 8}}], "train": {"learning_rate": 0.1, "seed": 9, "save_every": 7}, "output_dir": "elsewhere"},
        methods={"lora": {}, "full": {"methods": [], "train": {"full_finetuning": True}}},
        seeds=[3, 4],
    )
    found = cells(suite)
    assert [(cell.method, cell.seed) for cell in found] == [("lora", 3), ("lora", 4), ("full", 3), ("full", 4)]
    assert found[0].recipe == {"methods": [{"lora": {"r": 8}}], "train": {"learning_rate": 0.1, "seed": 3, "save_every": 7}}
    assert found[3].recipe == {"methods": [], "train": {"learning_rate": 0.1, "full_finetuning": True, "seed": 4, "save_every": 7}}
    assert suite.recipe["train"]["seed"] == 9  # the suite itself is left as it was
    assert len({cell.key for cell in found}) == 4
    assert found[3].folder == f"full-seed4-{found[3].key}"


def test_the_key_follows_what_decides_the_outcome(tmp_path, monkeypatch):
    def key(**recipe) -> str:
        return cells(Suite(name="s", recipe=recipe, methods={"m": {}}, seeds=[0]))[0].key

    start = key(train={"learning_rate": 0.1})
    assert key(train={"learning_rate": 0.1}) == start
    assert key(train={"learning_rate": 0.1}, output_dir="elsewhere") == start
    assert key(train={"learning_rate": 0.2}) != start

    file = tmp_path / "rows.jsonl"
    file.write_text("1")
    with_file = key(data={"train": str(file)})
    file.write_text("2")
    assert key(data={"train": str(file)}) != with_file

    package = tmp_path / "package"
    for name in ("methods/lora.py", "bench/report.py", "cli/bench.py"):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text("a = 1")
    monkeypatch.setattr(keys_module, "PACKAGE", package)
    start = key()
    (package / "bench/report.py").write_text("a = 2")
    (package / "cli/bench.py").write_text("a = 2")
    assert key() == start
    (package / "methods/lora.py").write_text("a = 2")
    changed = key()
    assert changed != start
    monkeypatch.setattr(keys_module, "version", lambda package: "0.0.1")
    assert key() != changed


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("  lora: {}", "  lora: {train: {learning_rat: 0.1}}", ["suite.yaml:9", "methods.lora", "learning_rat"]),
        ("  lora: {}", "  lora: {train: {seed: 1}}", ["suite.yaml:9", "methods.lora.train.seed", "seeds"]),
        ("  lora: {}", "  lora: {output_dir: x}", ["suite.yaml:9", "output_dir"]),
        ("[0, 1]", "[1, 1]", ["suite.yaml:11", "seeds", "twice"]),
        ("[0, 1]", "[]", ["suite.yaml:11", "seeds"]),
        ("[exact_match]", "[loss]", ["suite.yaml:9", "eval.metrics"]),
        ("name: mine", "name: my/suite", ["suite.yaml:1", "name"]),
        ("seeds:", "seed:", ["seed", "seeds"]),
    ],
)
def test_a_wrong_suite_is_told_with_its_place(tmp_path, old, new, parts):
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_suite(path)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_suite_names_a_recipe_file_beside_it(tmp_path):
    recipe, rest = SUITE.split("recipe:\n")[1].split("methods:\n  lora")
    (tmp_path / "base.yaml").write_text("\n".join(line[2:] for line in recipe.splitlines()) + "\noutput_dir: runs/x\n")
    (tmp_path / "suite.yaml").write_text("name: mine\nrecipe: base.yaml\nmethods:\n  lora" + rest)
    inline = tmp_path / "inline.yaml"
    inline.write_text(SUITE)
    assert cells(load_suite(tmp_path / "suite.yaml")) == cells(load_suite(inline))


def test_the_ci_suite_is_valid():
    suite = load_suite(ROOT / "benchmarks/suites/ci.yaml")
    assert list(suite.methods) == ["full", "lora", "dora", "qlora", "lora-loraplus", "lora-neftune", "qdora"]
    assert len(cells(suite)) == 21


# --- cells --------------------------------------------------------------------------------------------------------------------


def test_every_cell_runs_once_and_leaves_a_record(tmp_path, command):
    console = quiet()
    records = run_suite(fake_suite(), tmp_path / "runs", console=console, command=command)
    assert [(r.method, r.seed, r.status) for r in records] == [(m, s, "done") for m in ("lora", "dora") for s in (0, 1)]
    first = records[0]
    assert sum(first.outcomes) / 50 == first.after["exact_match"] and len(first.outcomes) == 50
    assert first.train["tokens_per_second"] == 1000 and first.adapter["trainable_parameters"] == 1234 and first.wall_seconds > 0
    assert "loading the model" in Path(first.log).read_text()
    assert "\x1b" not in console.file.getvalue()
    assert "lora seed 0: exact_match" in console.file.getvalue() and "[4/4]" in console.file.getvalue()

    results = load_results(tmp_path / "runs" / "fake")
    assert results.cells == records and results.machine == {"cores": 2, "threads": os.environ.get("OMP_NUM_THREADS")}
    assert load_results(tmp_path / "runs/fake/results.json") == results
    # one line per cell, so that a committed file can be read and compared
    assert len((tmp_path / "runs/fake/results.json").read_text().splitlines()) < 36

    again = run_suite(fake_suite(), tmp_path / "runs", console=quiet(), command=command)
    assert again == records and len(command.started) == 4  # nothing ran a second time

    changed = fake_suite(lora={}, dora={"fake": {"accuracy": 0.4}})
    run_suite(changed, tmp_path / "runs", console=quiet(), command=command)
    assert command.started[4:] == ["dora-seed0", "dora-seed1"]


@pytest.mark.parametrize(
    ("fails", "kind", "code", "said"),
    [
        ("crash", "crash", 1, "RuntimeError: boom in step 3"),
        ("memory", "out_of_memory", 1, "MemoryError"),
        ("cuda", "out_of_memory", 1, "CUDA out of memory"),
        ("killed", "out_of_memory", -9, "loading the model"),
        ("divergence", "divergence", 1, "non-finite loss"),
        ("stopped", "stopped", 143, "loading the model"),
        ("silent", "crash", 0, "result.json"),
        ("disagree", "crash", 0, "predictions.jsonl"),
    ],
)
def test_a_failure_is_recorded_by_kind_and_the_others_finish(tmp_path, command, fails, kind, code, said):
    console = quiet()
    suite = fake_suite(seeds=[0], bad={"fake": {"fails": fails}}, good={})
    bad, good = run_suite(suite, tmp_path, console=console, command=command)
    assert (bad.status, bad.kind, bad.exit_code) == ("failed", kind, code)
    assert said in bad.traceback and not bad.outcomes and not bad.after
    assert good.status == "done"
    assert "bad seed 0: FAILED" in console.file.getvalue() and bad.log in console.file.getvalue()
    assert load_results(tmp_path / "fake").failed == [bad]


def test_what_the_tripwires_say_of_a_divergence_is_one():
    """By the real messages: a loss that climbs under clipped gradients is no crash, and one that only warned is not why a run ended."""

    def said(*losses: float) -> str:
        wires = Tripwires(torch.nn.Linear(2, 2), {}, [], lambda text: None)
        with pytest.raises(TrainingStopped) as stopped:
            for step, loss in enumerate(losses):
                wires.rising(loss, step)
                wires.finite(loss, 1.0, step, list)
        return str(stopped.value)

    assert _kind(1, said(math.nan)) == _kind(1, said(*[1.0] * 5, *[9.0] * 10)) == "divergence"
    warned: list[str] = []
    Tripwires(torch.nn.Linear(2, 2), {}, ["not_finite"], warned.append).finite(math.nan, 1.0, 3, list)
    assert "non-finite loss" in warned[0] and _kind(1, f"{warned[0]}\nKeyError: 'x'") == "crash"


def test_a_traceback_is_kept_from_its_first_line_on(tmp_path, command):
    (bad,) = run_suite(fake_suite(seeds=[0], bad={"fake": {"fails": "crash"}}), tmp_path, console=quiet(), command=command)
    assert bad.traceback.startswith("Traceback (most recent call last):")


def test_a_failed_cell_is_tried_again(tmp_path, command):
    suite = fake_suite(seeds=[0], shaky={"fake": {"fails": "once", "marker": str(tmp_path / "marker")}}, good={})
    assert [r.status for r in run_suite(suite, tmp_path, console=quiet(), command=command)] == ["failed", "done"]
    assert [r.status for r in run_suite(suite, tmp_path, console=quiet(), command=command)] == ["done", "done"]
    assert command.started == ["shaky-seed0", "good-seed0", "shaky-seed0"]


def test_only_runs_the_named_methods_and_keeps_the_other_records(tmp_path, command):
    run_suite(fake_suite(), tmp_path, only=["dora"], console=quiet(), command=command)
    assert command.started == ["dora-seed0", "dora-seed1"]
    records = run_suite(fake_suite(), tmp_path, only=["lora"], console=quiet(), command=command)
    assert len(records) == 4 and command.started[2:] == ["lora-seed0", "lora-seed1"]
    with pytest.raises(ConfigError, match="did you mean 'dora'"):
        run_suite(fake_suite(), tmp_path, only=["dra"], console=quiet(), command=command)


def test_code_that_changes_during_a_suite_is_told(tmp_path, command, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(keys_module, "PACKAGE", package)

    def editing(cell: Path) -> list[str]:
        (package / "lora.py").write_text("scale = 2")
        return command(cell)

    first, second = quiet(), quiet()
    run_suite(fake_suite(), tmp_path, console=first, command=editing)
    assert "changed while the suite ran" in first.file.getvalue()
    run_suite(fake_suite(), tmp_path, console=second, command=command)
    assert "4 to run" in second.file.getvalue() and "changed" not in second.file.getvalue()


def test_jobs_run_at_the_same_time_and_share_the_cores(tmp_path, command, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    suite = fake_suite(seeds=[0, 1], both={"fake": {"fails": "meet", "marker": str(tmp_path / "here")}})
    records = run_suite(suite, tmp_path, jobs=2, console=quiet(), command=command)  # each cell waits for the other
    assert [r.status for r in records] == ["done", "done"]
    assert records[0].machine["threads"] == str(max(os.cpu_count() // 2, 1))


def test_an_interrupt_ends_the_running_cell(tmp_path, command):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    marker = tmp_path / "pid"

    def interrupt() -> None:
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.02)
        _thread.interrupt_main()

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    suite = fake_suite(seeds=[0, 1], hangs={"fake": {"fails": "hang", "marker": str(marker)}})
    try:
        with pytest.raises(KeyboardInterrupt):
            run_suite(suite, tmp_path, console=quiet(), command=command)
    finally:
        signal.signal(signal.SIGINT, before)
    watcher.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)
    assert command.started == ["hangs-seed0"]
    assert not list(tmp_path.rglob("record.json"))


# --- statistics ---------------------------------------------------------------------------------------------------------------


def test_mean_over_seeds_is_the_t_interval():
    interval = mean_over_seeds([1.0, 2.0, 3.0])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.0, 2 - 2.48414, 2 + 2.48414), rel=1e-5)
    assert mean_over_seeds([5.0]).low is None
    with pytest.raises(ValueError, match="no values"):
        mean_over_seeds([])


@pytest.mark.parametrize(("seeds", "of_seed", "of_example"), [(3, 0.0, 0.0), (3, 0.25, 1.0), (5, 0.3, 2.0), (1, 0.0, 1.0)])
def test_accuracy_intervals_cover_the_truth(seeds, of_seed, of_example):
    """Answers are right with probability logistic(1.5 + seed effect + example effect); the truth is its mean over both."""
    rng = np.random.default_rng(0)

    def chance(shape):
        return 1 / (1 + np.exp(-1.5 - shape))

    truth = chance(np.hypot(of_seed, of_example) * rng.standard_normal(200_000)).mean()
    hits, n = 0, 100
    for _ in range(n):
        effects = of_seed * rng.standard_normal((seeds, 1)) + of_example * rng.standard_normal((1, 200))
        interval = accuracy(rng.random((seeds, 200)) < chance(effects))
        hits += interval.low <= truth <= interval.high
    assert hits >= 0.89 * n  # 95% is promised; 100 draws of it fall below 89 about once in 200 times


def test_an_interval_is_no_wider_than_it_must_be():
    """Independent answers of one seed: about 1.96 sqrt(p (1 - p) / n) to either side; ten seeds know more."""
    rng = np.random.default_rng(0)
    outcomes = rng.random((10, 400)) < 0.8
    one, ten = accuracy(outcomes[:1]), accuracy(outcomes)
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * (0.16 / 400) ** 0.5, rel=0.12)
    assert ten.high - ten.low < 0.7 * (one.high - one.low)


def test_certainty_is_not_claimed():
    interval = accuracy(np.ones((3, 200)))
    assert interval.mean == 1 and interval.high == 1 and 0.97 < interval.low < 0.995
    assert 0.005 < accuracy(np.zeros((3, 200))).high < 0.03


def test_a_difference_is_paired():
    rng = np.random.default_rng(1)
    hard = rng.random(200) < 0.5  # the same half of the examples is hard for both
    a = {s: (~hard & (rng.random(200) < 0.98)).astype(int) for s in range(3)}
    b = {s: (~hard & (rng.random(200) < 0.86)).astype(int) for s in range(3)}
    found = difference(a, b)
    assert found.told_apart and found.low < 0.06 < found.high and found.seeds == 3
    alone = accuracy(list(a.values()))
    assert found.high - found.low < alone.high - alone.low  # although each of the two is known less well
    assert "better than b" in found.words("a", "b") and "worse than a" in difference(b, a).words("b", "a")


def test_equal_methods_cannot_be_told_apart():
    rng = np.random.default_rng(2)
    a = {s: (rng.random(200) < 0.8).astype(int) for s in range(3)}
    same = difference(a, a)
    assert same.mean == 0 and -0.03 < same.low < 0 < same.high < 0.03 and "cannot be told apart" in same.words("a", "b")
    told = 0
    for _ in range(60):  # the same method under other seeds
        difficulty = np.clip(rng.normal(0.8, 0.2, 200), 0, 1)
        x, y = ({s: (rng.random(200) < difficulty + 0.03 * rng.standard_normal()).astype(int) for s in range(3)} for _ in range(2))
        told += difference(x, y).told_apart
    assert told <= 8  # 5% is 3


def test_only_like_is_paired_with_like():
    assert difference({0: [1, 1], 1: [0, 0]}, {1: [0, 0], 2: [1, 1]}).mean == 0  # over seed 1 alone
    assert difference({0: [1, 1], 1: [1, 1]}, {7: [0, 0], 8: [0, 0]}).mean == 1  # no seed in common: in order
    with pytest.raises(ValueError, match="examples"):
        difference({0: [1, 1]}, {0: [1]})
    with pytest.raises(ValueError, match="matrix"):
        accuracy([1, 0, 1])


# --- report -------------------------------------------------------------------------------------------------------------------


def test_the_table_says_what_was_measured():
    extra = {"adapter": {"trainable_parameters": 7, "bytes": 2048}, "train": {"tokens_per_second": 500.0, "peak_memory_bytes": 2**20}}
    kept = {"exact_match": 0.0, "retained_exact_match": 0.9}
    rows = table(
        results_of(
            record("lora", 0, [1, 1, 1, 0], before=kept, after={"exact_match": 0.75, "retained_exact_match": 0.8}, **extra),
            record("lora", 1, [1, 1, 1, 1], before=kept, after={"exact_match": 1.0, "retained_exact_match": 0.6}, **extra),
            failed("lora", 2),
            failed("dora", 0),
            target=0.9,
        )
    )
    lora, dora = rows
    assert (lora.method, lora.done, len(lora.failed), lora.at_target, lora.before) == ("lora", 2, 1, 1, 0.0)
    assert lora.accuracy.mean == 0.875 and lora.forgetting.mean == pytest.approx(0.2)
    assert lora.tokens_per_second.mean == 500 and lora.peak_memory_bytes.mean == 2**20
    assert (lora.trainable_parameters, lora.adapter_bytes) == (7, 2048)
    assert (dora.done, len(dora.failed), dora.accuracy, dora.forgetting) == (0, 1, None, None)
    assert lora.texts()[1] == "2 done, 1 FAILED"


def test_markdown_holds_failures_differences_and_origin():
    good = [1] * 95 + [0] * 5
    bad = [1] * 20 + [0] * 80
    results = results_of(
        *(record("full", s, good) for s in range(3)), *(record("lora", s, good) for s in range(3)),
        *(record("weak", s, bad) for s in range(2)),
        failed("weak", 2), failed("dora", 0, "out_of_memory"),
        commit="abcdef0123456789", dirty=True, versions={"torch": "2.13"}, machine={"cores": 2},
    )  # fmt: skip
    text = markdown(results)
    assert "| weak | 2 done, 1 FAILED |" in text and "| dora | 0 done, 1 FAILED |" in text
    assert "dora seed 0: FAILED (out of memory, exit code 1): RuntimeError: boom \\| &lt;b> (log: log.txt; it is not run again" in text
    assert "lora and full cannot be told apart" in text and "weak is 75.0 points worse than full" in text
    assert "dora cannot be compared with full: dora has no finished seed" in text
    assert "commit abcdef012345 with changes; machine: cores 2; versions: torch 2.13." in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1  # every row has every column
    console = quiet()
    terminal(results, console)
    assert "weak seed 2: FAILED" in console.file.getvalue()


def test_other_examples_are_not_compared():
    results = results_of(record("a", 0, [1, 0], examples="x"), record("b", 0, [1, 0], examples="y"))
    assert "b cannot be compared with a: they did not answer the same examples" in notes(results)


def test_the_base_is_told_by_method_where_it_differs():
    lines = notes(results_of(record("lora", 0, [1]), record("qlora", 0, [1], before={"exact_match": 0.01})))
    assert "Before training (lora): exact_match 0.0000." in lines and "Before training (qlora): exact_match 0.0100." in lines
    assert "Before training: exact_match 0.0000." in notes(results_of(record("lora", 0, [1]), record("dora", 0, [1])))


@pytest.mark.parametrize("content", ["{", '{"suite": "s"}', '{"cells": [{"method": NaN}]}'])
def test_results_that_are_not_whole_are_refused(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigError, match=r"results\.json"):
        load_results(tmp_path)


# --- gate ---------------------------------------------------------------------------------------------------------------------


def raised(baseline: Baseline, points: float) -> Baseline:
    methods = {name: method.model_copy(update={"accuracy": method.accuracy + points / 100}) for name, method in baseline.methods.items()}
    return baseline.model_copy(update={"methods": methods})


def test_the_gate_rarely_cries_wolf():
    rng = np.random.default_rng(3)
    means = {"lora": 0.93, "dora": 0.8, "weak": 0.3}
    alarms = 0
    for i in range(100):
        spread = (0.0, 0.01, 0.02, 0.03)[i % 4]  # in 200 examples chance adds as much again
        baseline, results = accept(simulate(rng, means, spread=spread)), simulate(rng, means, spread=spread)
        alarms += sum(not verdict.passed for verdict in gate(results, baseline))
    assert alarms <= 3  # of 300 verdicts: at most 1%


@pytest.mark.parametrize("counts", [(180, 180, 180), (174, 180, 186), (170, 180, 190), (20, 26, 32), (60, 66, 80), (199, 200, 200)])
def test_twenty_points_are_always_seen_where_seeds_agree_within_ten(counts):
    results = results_of(*(record("m", seed, [1] * right + [0] * (200 - right)) for seed, right in enumerate(counts)))
    (verdict,) = gate(results, raised(accept(results), 20))
    assert not verdict.passed and "below the baseline: -20.0 points" in verdict.words
    alone = Baseline(methods={"m": BaselineMethod(accuracy=sum(counts) / 600 + 0.2)})  # nothing known but the mean
    assert not gate(results, alone)[0].passed


def test_a_baseline_of_means_alone_is_enough():
    rng = np.random.default_rng(4)
    results = simulate(rng, {"lora": 0.9}, spread=0.03)
    mean = accept(results).methods["lora"].accuracy

    def passed(**fields) -> bool:
        return gate(results, Baseline(methods={"lora": BaselineMethod(**fields)}))[0].passed

    assert passed(accuracy=mean) and passed(accuracy=mean, seeds=3) and passed(accuracy=0.5)
    assert not passed(accuracy=mean + 0.2) and not passed(accuracy=mean + 0.2, seeds=3)


def test_a_drop_must_be_beyond_the_margin_and_beyond_noise():
    results = results_of(*(record("lora", seed, [1] * 90 + [0] * 10) for seed in range(3)))
    noise = 0.9 - gate(results, accept(results), margin=0.0)[0].limit
    assert 0.02 < noise < 0.2
    assert [0.9 - gate(results, accept(results), margin)[0].limit for margin in (noise / 2, 2 * noise)] == pytest.approx([noise, 2 * noise])


def test_missing_and_failed_methods_do_not_pass():
    rng = np.random.default_rng(5)
    good = simulate(rng, {"lora": 0.9, "dora": 0.9, "new": 0.9})
    baseline = accept(simulate(rng, {"lora": 0.9, "dora": 0.9, "gone": 0.9, "broken": 0.9}))
    cells_ = [r for r in good.cells if not (r.method == "dora" and r.seed == 1)]
    results = results_of(*cells_, failed("dora", 1, "divergence"), failed("broken", 0, "out_of_memory"))
    verdicts = {verdict.method: verdict for verdict in gate(results, baseline)}
    assert {method for method, verdict in verdicts.items() if verdict.passed} == {"lora", "new", "all methods"}
    assert "1 of 3 seeds failed (divergence)" in verdicts["dora"].words
    assert "not run" in verdicts["gone"].words and "out of memory" in verdicts["broken"].words and "new" in verdicts["new"].words
    with pytest.raises(ConfigError, match="dora seed 1, broken seed 0"):
        accept(results)
    with pytest.raises(ConfigError, match="cannot be compared"):
        gate(results, baseline.model_copy(update={"suite": "other"}))


def test_baseline_files(tmp_path):
    results = simulate(np.random.default_rng(6), {"lora": 0.9, "dora": 0.7})
    path = tmp_path / "baseline.json"
    path.write_text(baseline_json(accept(results)))
    data = json.loads(path.read_text())
    assert set(data["methods"]["lora"]) == {"accuracy", "low", "high", "seed_accuracies", "seeds", "examples", "examples_hash"}
    assert data["suite"] == "s" and data["methods"]["lora"]["examples"] == 200
    assert data["methods"]["lora"]["low"] < data["methods"]["lora"]["accuracy"] < data["methods"]["lora"]["high"]
    assert all(verdict.passed for verdict in gate(results, load_baseline(path)))

    data["methods"]["lora"]["accuracy"] += 0.2  # as a person edits it
    path.write_text(json.dumps(data))
    assert [verdict.passed for verdict in gate(results, load_baseline(path))][:2] == [False, True]

    cells_module.write_results(tmp_path / "results.json", results)  # an earlier results file is a baseline too
    assert load_baseline(tmp_path / "results.json") == accept(results)

    path.write_text('{"methods": {"lora": {"acuracy": 0.9}}}')
    with pytest.raises(ConfigError, match="acuracy"):
        load_baseline(path)


# --- command line -------------------------------------------------------------------------------------------------------------


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code or 0


def test_the_commands_from_run_to_gate(tmp_path, command, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells_module, "peftkit_run", command)
    monkeypatch.setattr(suite_module, "_check", lambda suite, source: None)  # its recipe is not one of peftkit
    suite = tmp_path / "fake.yaml"
    suite.write_text("name: fake\nrecipe: {fake: {accuracy: 0.9}}\nmethods: {lora: {}, bad: {fake: {fails: crash, only: [1]}}}\nseeds: [0, 1]\n")

    assert exit_code("bench", "run", suite, "--output", "kept/ci.json") == 1
    shown = capfd.readouterr()
    assert "bad seed 1: FAILED (crash, exit code 1), log: runs/bench/fake/bad-seed1-" in shown.err and "lora" in shown.out
    assert load_results("kept/ci.json") == load_results("runs/bench/fake")
    assert exit_code("bench", "run", suite, "--only", "lora") == 1  # the failure of the other method still stands
    assert exit_code("bench", "report", "kept/ci.json", "--format", "markdown", "--output", "out/report.md") == 0
    assert Path("out/report.md").read_text() == markdown(load_results("kept/ci.json"))
    assert exit_code("bench", "accept", "runs/bench/fake", "--output", "baseline.json") == 2  # with a failed cell

    suite.write_text(suite.read_text().replace("fails: crash", "fails: meek"))
    assert exit_code("bench", "run", suite) == 0
    assert exit_code("bench", "accept", "runs/bench/fake", "--output", "baseline.json") == 0
    assert exit_code("bench", "gate", "--baseline", "baseline.json") == 0
    data = json.loads(Path("baseline.json").read_text())
    data["methods"]["lora"]["accuracy"] += 0.2
    Path("baseline.json").write_text(json.dumps(data))
    capfd.readouterr()
    assert exit_code("bench", "gate", "runs/bench/fake/results.json", "--baseline", "baseline.json") == 1
    assert "FAIL" in capfd.readouterr().out


def test_wrong_usage_of_the_commands(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("simple.json").write_text('{"methods": {"lora": {"accuracy": 0.9}}}')
    for arguments, said in (
        (("gate", "--baseline", "nothing.json"), "nothing.json: no such file"),
        (("gate", "--baseline", "simple.json"), "names no suite"),
        (("gate", "nowhere", "--baseline", "simple.json"), "nowhere: no such file"),
        (("report", "nothing.json"), "nothing.json: no such file"),
        (("report", "simple.json", "--format", "markdwn"), "did you mean 'markdown'"),
        (("run", "nothing.yaml"), "nothing.yaml: no such file"),
    ):
        assert exit_code("bench", *arguments) == 2
        assert said in " ".join(capfd.readouterr().err.split())


def test_sources_mixed_in_and_folders_are_inputs_of_a_cell(tmp_path):
    (tmp_path / "old.jsonl").write_text("{}")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("{}")
    recipe = {"data": {"train": str(tmp_path / "rows"), "replay": {"source": str(tmp_path / "old.jsonl"), "share": 0.1}}}
    before = keys_module.inputs(recipe)
    assert len(before) == 2
    for path in ("old.jsonl", "rows/a.jsonl"):
        (tmp_path / path).write_text("[]")
        changed = keys_module.inputs(recipe)
        assert changed != before
        before = changed
    (tmp_path / "rows" / "b.jsonl").write_text("{}")
    assert len(keys_module.inputs(recipe)) == 3


# --- what a report must not leave unsaid --------------------------------------------------------------------------------------


def test_both_always_wrong_is_no_certainty():
    """All differences are zero, so their spread is; that 200 examples showed none does not make the interval a point."""
    none = {seed: [0] * 200 for seed in range(3)}
    found = difference(none, none)
    assert found.mean == 0 and -0.05 < found.low < 0 < found.high < 0.05 and found.p == 1
    assert "every example had the same outcome under both" in plan(found).words()
    always = difference({seed: [1] * 200 for seed in range(3)}, none)
    assert always.mean == always.high == 1 and 0.9 < always.low < 1 and always.p < 0.001


def test_runs_that_failed_did_not_reach_the_target_loss():
    """The seeds that got through are the luckier ones: their mean alone would look too fast."""
    curve = [[step, 1 / step, float(step)] for step in range(1, 20)]
    cells = [record("lora", seed, [1], curve=curve) for seed in range(2)]
    cells += [record("loraplus", 0, [1], curve=curve), failed("loraplus", 1, "divergence")]
    lora, plus = to_target(results_of(*cells), 0.2)
    assert lora.steps is not None and plus.steps is None and plus.seconds is None
    assert plus.words().endswith("; 1 failed") and "1 of 2 seeds reached" in plus.words()


def test_the_reference_stays_the_first_method_of_the_suite():
    cells = [record("dora", seed, [1, 0, 1, 1]) for seed in range(2)]
    results = results_of(*cells, order=["lora", "dora"])
    assert list(results.methods) == ["lora", "dora"] and results.methods["lora"] == []
    assert "dora cannot be compared with lora: lora has no finished seed" in notes(results)
    assert "lora" in markdown(results)


def test_published_numbers_stand_in_every_report():
    published = [{"method": "lora", "task": "", "metric": "alpaca_eval", "value": 0.2671, "source": "a paper"}]
    results = results_of(record("lora", 0, [1, 0]), published=published)
    assert "Published for lora: alpaca_eval 0.2671 (a paper)." in notes(results)
    suite = Suite(name="s", recipe={}, methods={"lora": {}}, seeds=[0], published=[published[0] | {"method": "lara"}])
    assert [text for _, text in suite_module._inconsistent(suite)] == ["no method of this suite: 'lara'; did you mean 'lora'? (it has: lora)"]


def test_cells_of_several_machines_are_said():
    cells = [record("lora", 0, [1, 0], machine={"gpu": "A100"}), record("lora", 1, [1, 0], machine={"gpu": "H100"})]
    assert any("2 kinds of machines" in line and "1 cells of lora on gpu H100" in line for line in notes(results_of(*cells)))
    alike = [cells[0], record("lora", 1, [1, 0], machine={"gpu": "A100", "threads": 2})]
    assert not any("kinds of machines" in line for line in notes(results_of(*alike)))


def test_losses_are_not_called_accuracy():
    cells = [record("lora", seed, [], after={"loss": 0.5 + seed}, before={"loss": 3.0}) for seed in range(2)]
    text = markdown(results_of(*cells, metric="loss", higher_better=False))
    assert "| loss (95% interval) |" in text and "accuracy" not in text


def test_the_gate_fails_where_cells_were_not_run():
    results = simulate(np.random.default_rng(0), {"lora": 0.8})
    baseline = accept(results)
    assert all(verdict.passed for verdict in gate(results, baseline))
    cut = gate(results.model_copy(update={"unfinished": 2}), baseline)
    assert [verdict.words for verdict in cut if not verdict.passed] == ["2 cells were not run, as the time was over: run the suite to its end"]
    fewer = gate(results.model_copy(update={"cells": results.cells[:2]}), baseline)
    assert "(2 seeds, the baseline 3)" in fewer[0].words
