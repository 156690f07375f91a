"""Suites with tasks, learning rates, budgets and step times; and the runner: keys per method, resuming, jobs, the user's own recipe."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from synthetic_results import SUITE

import peftkit.bench.keys as keys_module
import peftkit.bench.runner as runner_module
from peftkit.bench.cells import load_results, run_suite
from peftkit.bench.keys import OWN, Code
from peftkit.bench.launch import Submitit
from peftkit.bench.own import Plan, own_suite, plan, seconds_of
from peftkit.bench.records import Record
from peftkit.bench.search import best, held_out
from peftkit.bench.suite import SAVE_EVERY, Suite, cells, find_suite, load_suite, merge, timing_cells
from peftkit.cli import main
from peftkit.config import ConfigError, read_yaml

ROOT = Path(__file__).parents[1]

# What stands in for `peftkit run`: learns best at the rate "fake.best", writes what a run writes, and can hang between two steps as a killed run does.
STAND_IN = """
import json, math, os, signal, sys, time
from pathlib import Path
import yaml
cell, resume = Path(sys.argv[1]), "--resume" in sys.argv
recipe = yaml.safe_load(cell.read_text())
fake, train, folder = recipe["fake"], recipe["train"], Path(recipe["output_dir"])
rate, steps = train.get("learning_rate", 0.01), train.get("max_steps", 10)
with open(fake["log"], "a") as log: log.write(f"{cell.parent.name.rsplit('-', 1)[0]} {steps}{' resumed' if resume else ''}\\n")
if rate >= fake.get("diverges", 9):
    raise RuntimeError("non-finite loss (nan) at step 2\\n(tripwire not_finite; `train.warn_only: [not_finite]` goes on all the same)")
if fake.get("full_at") == steps: raise MemoryError
if fake.get("full_finetuning_fails") and train.get("full_finetuning"): raise MemoryError
if not resume: folder.mkdir(parents=True)
(folder / "recipe.yaml").write_text("{}")
state = folder / "checkpoints" / "step"
state.parent.mkdir(exist_ok=True)
done = int(state.read_text()) if state.exists() else 0
with (folder / "metrics.jsonl").open("a", buffering=1) as metrics:
    for step in range(done + 1, steps + 1):
        if step == fake.get("hang") and not resume:
            Path(fake["marker"]).write_text(str(os.getpid()))
            time.sleep(100)
        if step == fake.get("stops") and not resume: sys.exit(143)
        print(json.dumps({"step": step, "loss": math.nan if step == fake.get("nan_at") else 1 / step, "seconds": step / 2.0}), file=metrics)
        if step % 2 == 0: print(json.dumps({"step": step, "eval_loss": 2 / step}), file=metrics)
        state.write_text(str(step))
loss = abs(math.log10(rate / fake.get("best", 0.01))) + 1 / steps
right = [i % 5 != 0 for i in range(20)]
sets = {"eval": right, "choices": [not r for r in right]}
lines = [{"set": name, "index": i, "correct": c, "prediction": "p", "answer": f"a{i}"} for name, answers in sets.items() for i, c in enumerate(answers)]
(folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(folder / "result.json").write_text(json.dumps({
    "before": {"exact_match": 0.0}, "after": {"loss": loss, "exact_match": 0.8, "choice_accuracy": 0.2, "rouge1": 0.5},
    "train": {"seconds": steps / 2.0, "tokens": 30 * steps, "tokens_per_second": 60.0, "peak_memory_bytes": 10**9, "steps": steps},
    "adapter": {"trainable_parameters": 1}, "recipe": recipe, "versions": {}, "machine": {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")},
}))
"""


class StandIn:
    """Makes the command of a cell; `started` lists the cells whose process came to run."""

    def __init__(self, folder: Path):
        self.script, self.log = folder / "stand_in.py", folder / "started.txt"
        self.script.write_text(STAND_IN)
        self.log.touch()

    def __call__(self, cell: Path) -> list[str]:
        return [sys.executable, str(self.script), str(cell)]

    @property
    def started(self) -> list[str]:
        return self.log.read_text().splitlines()

    def suite(self, **changes) -> Suite:
        recipe = {"fake": {"log": str(self.log)}, "train": {"max_steps": 10}} | changes.pop("recipe", {})
        return Suite(**({"name": "fake", "recipe": recipe, "methods": {"lora": {}, "dora": {"fake": {"best": 0.03}}}, "seeds": [0]} | changes))

    def run(self, suite: Suite, folder: Path, **options) -> list[Record]:
        options.setdefault("console", Console(file=io.StringIO(), width=500))
        return run_suite(suite, folder, command=self, **options)


@pytest.fixture
def stand_in(tmp_path):
    return StandIn(tmp_path)


# --- suites -------------------------------------------------------------------------------------------------------------------


def test_tasks_multiply_the_cells_and_come_before_the_method():
    suite = Suite(
        name="s", recipe={"data": {"train": "a"}, "train": {"max_steps": 5}}, tasks={"easy": {}, "hard": {"data": {"train": "b"}, "train": {"max_steps": 7}}},
        methods={"lora": {}, "short": {"train": {"max_steps": 3}}}, seeds=[1, 2], other_seeds={"short": [9]},
    )  # fmt: skip
    found = cells(suite)
    assert [(c.task, c.method, c.seed) for c in found] == [
        ("easy", "lora", 1), ("easy", "lora", 2), ("easy", "short", 9), ("hard", "lora", 1), ("hard", "lora", 2), ("hard", "short", 9),
    ]  # fmt: skip
    assert [(c.recipe["data"]["train"], c.recipe["train"]["max_steps"]) for c in found[2:4]] == [("a", 3), ("b", 7)]
    assert found[3].folder.startswith("hard-lora-seed1-")


def test_a_budget_of_steps_is_the_same_for_all():
    suite = Suite(name="s", recipe={"train": {"num_epochs": 2.0}}, methods={"a": {}, "b": {"train": {"max_steps": 3}}}, seeds=[0], budget={"steps": 20})
    assert [(c.recipe["train"]["max_steps"], c.recipe["train"]["num_epochs"]) for c in cells(suite)] == [(20, None)] * 2


def test_a_cell_saves_on_the_way_unless_its_recipe_says_otherwise():
    def train(**given) -> dict:
        return cells(Suite(name="s", recipe={"train": {"max_steps": 40} | given}, methods={"m": {}}, seeds=[0]))[0].recipe["train"]

    assert train()["save_every"] == 10
    assert train(save_every=None)["save_every"] is None and train(save_every=7)["save_every"] == 7
    assert "save_every" not in train(eval_every=5)  # which saves the best
    assert train(max_steps=None, num_epochs=3)["save_every"] == SAVE_EVERY  # how many steps that is shows later


@pytest.mark.parametrize(
    ("added", "parts"),
    [
        ("learning_rates: {lore: [0.1]}", ["suite.yaml:12", "learning_rates.lore", "did you mean 'lora'"]),
        ("learning_rates: [0.1, -1.0]", ["suite.yaml:12", "learning_rates"]),
        ("learning_rates: [0.1, 0.2]\nsearch: {rungs: [10, 200]}", ["suite.yaml:13", "search.rungs", "200 steps"]),
        ("learning_rates: [0.1, 0.2]\nsearch: {seeds: [1], rungs: [10]}", ["suite.yaml:13", "search.seeds", "final"]),
        ("search: {rungs: [20, 10]}", ["suite.yaml:12", "more steps"]),
        ("other_seeds: {dra: [3]}", ["suite.yaml:12", "other_seeds.dra"]),
        ("tasks: {a: {train: {seed: 1}}}", ["suite.yaml:12", "tasks.a.train.seed", "seeds"]),
        ("tasks: {a: {data: {trian: x}}}", ["a", "trian"]),
        ("tasks: {a/b: {}}", ["suite.yaml:12", "tasks"]),
        ("budget: {steps: 1, tokens: 2}", ["suite.yaml:12", "budget", "one of"]),
        ("budget: {memory: much}", ["suite.yaml:12", "budget", "24GB"]),
        ("timing: true", ["suite.yaml:12", "timing"]),
        ("timing: {rounds: 1}", ["suite.yaml:12", "timing.rounds"]),
        ("metric: accuracy", ["suite.yaml:12", "metric"]),
        ("other_seeds: {lora: [5, 5]}", ["suite.yaml:12", "other_seeds", "each once"]),
        ("other_seeds: {lora: []}", ["suite.yaml:12", "other_seeds", "at least one seed"]),
        ("metric: rouge1", ["metric", "rouge"]),
        ("published: [{method: lora, value: 1.0}]", ["suite.yaml:12", "published.0"]),
    ],
)
def test_a_wrong_key_is_told_with_its_place(tmp_path, added, parts):
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE + added + "\n")
    with pytest.raises(ConfigError) as caught:
        load_suite(path)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_rate_given_twice_is_refused(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace("  lora: {}", "  lora: {train: {learning_rate: 0.1}}") + "learning_rates: [0.2]\n")
    with pytest.raises(ConfigError, match=r"suite.yaml:9: methods.lora.train.learning_rate: learning_rates gives this method"):
        load_suite(path)


@pytest.mark.parametrize("name", ["ci", "builtin", "sanity"])
def test_the_suites_are_valid(name):
    suite = load_suite(ROOT / f"benchmarks/suites/{name}.yaml")
    assert suite.name == name and len({cell.folder for cell in cells(suite)}) == len(cells(suite))


def test_the_builtin_suite_has_every_unseen_family_and_method():
    suite = load_suite(ROOT / "benchmarks/suites/builtin.yaml")
    assert list(suite.tasks) == ["tool-calls", "sql", "shell"] and next(iter(suite.methods)) == "lora"
    assert all(3 <= len(suite.rates_of(method)) <= 5 for method in suite.methods)
    assert len(suite.methods) == 10 and len(suite.seeds) == 3 and suite.timing


def test_a_suite_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no suite in .*benchmarks/suites"):
        find_suite("ci")
    Path("benchmarks/suites").mkdir(parents=True)
    Path("benchmarks/suites/ci.yaml").write_text(SUITE)
    assert find_suite("ci") == Path("benchmarks/suites/ci.yaml")
    assert find_suite("other.yaml") == Path("other.yaml")
    with pytest.raises(ConfigError, match=r"no suite is called 'cii'; did you mean 'ci'\? \(there are: ci\)"):
        find_suite("cii")


# --- keys ---------------------------------------------------------------------------------------------------------------------


def test_code_of_one_method_counts_for_its_cells_alone(tmp_path, monkeypatch):
    package = tmp_path / "package"
    for name in (*OWN, "methods/lora.py", "bench/steps.py", "bench/report.py", "export.py", "train.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("a = 1")
    monkeypatch.setattr(keys_module, "PACKAGE", package)
    rows = {"lora": ["lora"], "dora": [{"dora": {}}], "qlora": ["qlora"], "plus": [{"lora": {}}, "loraplus"], "noise": ["dora", {"neftune": {}}], "full": []}
    suite = Suite(name="s", recipe={}, methods={name: {"methods": listed} for name, listed in rows.items()}, seeds=[0], timing={"rounds": 2})

    def touched(file: str) -> tuple[set[str], set[str]]:
        before = {cell.method: cell.key for cell in cells(suite)}, {cell.method: cell.key for cell in timing_cells(suite)}
        (package / file).write_text((package / file).read_text() + "\n")
        after = {cell.method: cell.key for cell in cells(suite)}, {cell.method: cell.key for cell in timing_cells(suite)}
        return tuple({name for name in old if old[name] != new[name]} for old, new in zip(before, after, strict=True))

    assert touched("methods/dora.py") == touched("kernels/dora.py") == ({"dora", "noise"},) * 2
    assert touched("methods/loraplus.py") == ({"plus"},) * 2
    assert touched("methods/neftune.py") == ({"noise"},) * 2
    assert touched("methods/qlora.py") == ({"qlora"},) * 2
    assert touched("methods/lora.py") == (set(rows),) * 2
    assert touched("bench/steps.py") == (set(), set(rows))
    assert touched("bench/report.py") == touched("export.py") == (set(), set())
    assert touched("train.py") == (set(rows),) * 2


def test_touching_the_code_of_a_method_reruns_its_cells_alone(tmp_path, stand_in, monkeypatch):
    package = tmp_path / "package"
    (package / "methods").mkdir(parents=True)
    for name in ("dora", "lora"):
        (package / "methods" / f"{name}.py").write_text("a = 1")
    monkeypatch.setattr(keys_module, "PACKAGE", package)
    suite = stand_in.suite(methods={"lora": {"methods": ["lora"]}, "dora": {"methods": ["dora"]}})
    stand_in.run(suite, tmp_path)
    (package / "methods/dora.py").write_text("a = 2")
    stand_in.run(suite, tmp_path)
    assert stand_in.started == ["lora-seed0 10", "dora-seed0 10", "dora-seed0 10"]


RUN_ALL = """
import sys, json
from pathlib import Path
import torch, peftkit
from peftkit.methods import REGISTRY, from_recipe
from peftkit.optim import build_optimizer
root = Path(peftkit.__file__).parent
used = {}
for entries in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    seen = used.setdefault(json.dumps(entries), set())
    model, _ = peftkit.load("builtin:tiny", quantize="nf4" if "qlora" in entries else None, dtype="float32")
    def profile(frame, event, arg):
        if event == "call" and not frame.f_code.co_name.startswith("<") and frame.f_code.co_filename.startswith(str(root)):
            seen.add(str(Path(frame.f_code.co_filename).relative_to(root)))
    sys.setprofile(profile)
    torch.autograd.set_detect_anomaly(False)
    peftkit.attach(model, from_recipe(entries))
    optimizer = build_optimizer(model.train(), 1e-3)
    ids = torch.arange(12).view(2, 6)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()(input_ids=ids)
    peftkit.merge(model)
    sys.setprofile(None)
print(json.dumps({key: sorted(value) for key, value in used.items()}))
"""


def test_no_method_runs_a_file_that_is_held_to_be_anothers():
    """Every method attached, trained and merged with every call looked at: a file of OWN runs for its method and for no other."""
    every = [["lora"], ["dora"], ["qlora"], ["lora", "loraplus"], ["lora", "neftune"]]
    done = subprocess.run([sys.executable, "-c", RUN_ALL, json.dumps(every)], capture_output=True, text=True, check=True, env=os.environ)
    used = {tuple(json.loads(key)): set(files) for key, files in json.loads(done.stdout).items()}
    assert len(used) == len(every)
    for methods, files in used.items():
        strange = {file for file in files if file in OWN and OWN[file] not in methods}
        assert not strange, f"{methods} runs {strange}"
    assert "kernels/dora.py" in used[("dora",)] and "methods/neftune.py" in used[("lora", "neftune")]
    assert "methods/loraplus.py" in used[("lora", "loraplus")] and "methods/qlora.py" in used[("qlora",)]
    assert all((keys_module.PACKAGE / file).exists() for file in OWN)


# --- killed, failed, resumed --------------------------------------------------------------------------------------------------


def runs_until(marker: Path, process: subprocess.Popen) -> int:
    deadline = time.monotonic() + 100
    while not (marker.exists() and marker.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the cell never came to its step"
        time.sleep(0.02)
    return int(marker.read_text())


def harness(suite: Suite, folder: Path, stand_in: StandIn) -> subprocess.Popen:
    """run_suite in a process of its own."""
    code = (
        "import sys, json; from peftkit.bench.suite import Suite; from peftkit.bench.cells import run_suite\n"
        "run_suite(Suite(**json.loads(sys.argv[1])), sys.argv[2], command=lambda cell: [sys.executable, sys.argv[3], str(cell)])"
    )
    arguments = [sys.executable, "-c", code, suite.model_dump_json(), str(folder), str(stand_in.script)]
    return subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def without_times(path: Path) -> dict:
    content = json.loads(path.read_text())
    del content["created"]
    for record in content["cells"]:
        del record["wall_seconds"]
    return content


def test_a_killed_suite_goes_on_to_the_results_of_one_left_alone(tmp_path, stand_in):
    marker, folder = tmp_path / "marker", tmp_path / "runs"
    suite = stand_in.suite(recipe={"fake": {"log": str(stand_in.log), "hang": 6, "marker": str(marker)}})
    process = harness(suite, folder, stand_in)
    runs_until(marker, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    marker.unlink()
    second = harness(suite, folder, stand_in)  # lora goes on and ends, dora hangs
    runs_until(marker, second)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    stand_in.run(suite, folder)
    assert stand_in.started == ["lora-seed0 10", "lora-seed0 10 resumed", "dora-seed0 10", "dora-seed0 10 resumed"]
    killed = without_times(folder / "fake/results.json")
    assert [len(record["curve"]) for record in killed["cells"]] == [10, 10]

    alone = stand_in.suite(recipe={"fake": {"log": str(stand_in.log)}})
    stand_in.run(alone, tmp_path / "alone")
    left = without_times(tmp_path / "alone/fake/results.json")
    for record in (*killed["cells"], *left["cells"]):
        for name in ("key", "log", "recipe"):  # of the one that hangs they differ
            del record[name]
    assert killed == left


def test_a_cell_that_outlives_its_harness_is_waited_for(tmp_path, stand_in):
    marker, folder = tmp_path / "marker", tmp_path / "runs"
    suite = stand_in.suite(methods={"lora": {}}, recipe={"fake": {"log": str(stand_in.log), "hang": 6, "marker": str(marker)}})
    process = harness(suite, folder, stand_in)
    cell = runs_until(marker, process)
    process.kill()  # the harness alone
    process.wait()
    second = harness(suite, folder, stand_in)
    time.sleep(1.5)
    assert second.poll() is None and len(stand_in.started) == 1  # no second process in the same folder
    os.kill(cell, signal.SIGKILL)
    assert second.wait(timeout=100) == 0
    assert stand_in.started == ["lora-seed0 10", "lora-seed0 10 resumed"]


def test_divergence_and_memory_are_results_and_are_not_run_again(tmp_path, stand_in):
    suite = stand_in.suite(methods={"wild": {"fake": {"diverges": 0.0}}, "large": {"fake": {"full_at": 10}}})
    kinds = [record.kind for record in stand_in.run(suite, tmp_path)]
    assert kinds == ["divergence", "out_of_memory"]
    stand_in.run(suite, tmp_path)
    assert len(stand_in.started) == 2
    assert len(load_results(tmp_path / "fake").failed) == 2


def test_a_budget_of_memory_is_held(tmp_path, stand_in):
    (record,) = stand_in.run(stand_in.suite(methods={"m": {}}, budget={"memory": "900MB"}), tmp_path)
    assert (record.status, record.kind) == ("failed", "out_of_memory") and "1.00 GB" in record.traceback
    (record,) = stand_in.run(stand_in.suite(methods={"m": {}}, budget={"memory": "1.1GB"}, name="more"), tmp_path)
    assert record.status == "done"


@pytest.mark.parametrize(("budget", "steps"), [({"tokens": 1200}, 40), ({"seconds": 30}, 60)])
def test_a_budget_of_tokens_or_seconds_becomes_steps(tmp_path, stand_in, budget, steps):
    records = stand_in.run(stand_in.suite(methods={"m": {}}, budget=budget), tmp_path)
    results = load_results(tmp_path / "fake")
    assert [r.train["steps"] for r in records] == [steps] and results.budget["train_steps"] == {"/m": steps}
    assert [r.stage for r in results.cells] == ["final"]  # the short run is no result
    stand_in.run(stand_in.suite(methods={"m": {}}, budget=budget), tmp_path)
    assert len(stand_in.started) == 2


def test_a_method_that_fails_before_its_cells_is_recorded_and_the_others_go_on(tmp_path, stand_in):
    methods = {"broken": {"fake": {"diverges": "no number"}}, "good": {}}
    for name, changes in {"budget": {"budget": {"tokens": 1200}}, "search": {"learning_rates": [0.01, 0.1], "search": {"rungs": [2]}}}.items():
        stand_in.run(stand_in.suite(name=name, methods=methods, **changes), tmp_path)
        results = load_results(tmp_path / name)
        assert {record.method for record in results.failed} == {"broken"} and all(record.kind == "crash" for record in results.failed)
        assert [record.status for record in results.methods["good"]] == ["done"]
        assert list(results.methods) == ["broken", "good"]  # the reference stays the reference
    suite = stand_in.suite(name="seeds", methods=methods, budget={"tokens": 1200}, seeds=[0, 1, 2])
    stand_in.run(suite, tmp_path)
    assert [record.seed for record in load_results(tmp_path / "seeds").methods["broken"]] == [0, 1, 2]


def test_a_cell_that_was_told_to_stop_goes_on_from_what_it_saved(tmp_path, stand_in):
    """SIGTERM: the run saves a checkpoint and exits with 143; that is no crash, which would start anew."""
    suite = stand_in.suite(methods={"m": {"fake": {"stops": 4}}})
    (record,) = stand_in.run(suite, tmp_path)
    assert (record.status, record.kind, record.exit_code) == ("failed", "stopped", 143)
    (record,) = stand_in.run(suite, tmp_path)
    assert record.status == "done" and stand_in.started == ["m-seed0 10", "m-seed0 10 resumed"]
    assert [step for step, *_ in record.curve] == list(range(1, 11))


def test_a_step_that_was_not_taken_is_in_no_curve(tmp_path, stand_in):
    (record,) = stand_in.run(stand_in.suite(methods={"m": {"fake": {"nan_at": 4}}}), tmp_path)
    assert record.status == "done" and [step for step, *_ in record.curve] == [1, 2, 3, 5, 6, 7, 8, 9, 10]


# --- the search for learning rates --------------------------------------------------------------------------------------------


def searched(stand_in, **changes) -> Suite:
    return stand_in.suite(**({"learning_rates": [0.001, 0.003, 0.01, 0.03, 0.1], "search": {"rungs": [2, 6]}} | changes))


def test_each_method_trains_at_the_rate_that_suits_it(tmp_path, stand_in):
    console = Console(file=io.StringIO(), width=500)
    records = stand_in.run(searched(stand_in), tmp_path, console=console)
    finals = {record.method: record for record in records if record.stage == "final"}
    assert {name: record.learning_rate for name, record in finals.items()} == {"lora": 0.01, "dora": 0.03}
    results = load_results(tmp_path / "fake")
    lora, dora = results.search
    assert (lora.chosen, lora.edge, dora.chosen, dora.edge) == (0.01, None, 0.03, None)
    assert lora.losses["0.01"] == [[2, 0.5], [6, pytest.approx(1 / 6)]] and len(lora.losses["0.1"]) == 1  # given up after the first rung
    assert "lora: learning rate 0.01 of" in console.file.getvalue()
    assert {record.seed for record in results.cells if record.stage == "search"} == {100}
    assert list(results.methods) == ["lora", "dora"] and all(len(kept) == 1 for kept in results.methods.values())

    count = len(stand_in.started)
    assert stand_in.run(searched(stand_in), tmp_path) == records and len(stand_in.started) == count
    one = load_results(tmp_path / "fake")
    again = StandIn(tmp_path / "again") if (tmp_path / "again").mkdir() is None else None
    again.run(searched(again), tmp_path / "other", jobs=2)
    assert load_results(tmp_path / "other/fake").search == one.search  # whatever the jobs


def test_a_rate_at_the_edge_of_the_grid_is_told(tmp_path, stand_in):
    console = Console(file=io.StringIO(), width=500)
    stand_in.run(searched(stand_in, methods={"m": {"fake": {"best": 1.0}}}), tmp_path, console=console)
    (found,) = load_results(tmp_path / "fake").search
    assert (found.chosen, found.edge) == (0.1, "highest") and "a better one may lie beyond" in console.file.getvalue()


def test_rates_that_diverge_lose_and_are_no_failure_of_the_suite(tmp_path, stand_in):
    records = stand_in.run(searched(stand_in, methods={"m": {"fake": {"best": 0.1, "diverges": 0.03}}}), tmp_path)
    results = load_results(tmp_path / "fake")
    assert results.search[0].chosen == 0.01 and not results.failed and results.search[0].losses["0.1"] == [[2, None]]
    assert sum(record.kind == "divergence" for record in records) == 2


def test_a_search_is_not_judged_by_the_evaluation_set(tmp_path):
    recipe = {"data": {"train": "a", "eval": "b"}, "eval": {"metrics": ["exact_match"], "retained": ["c"], "match": "number"}}
    changes, words = held_out(recipe, 0.05)
    changed = merge(recipe, changes)
    assert changed["data"] == {"train": "a", "eval": None, "holdout": 0.05} and changed["eval"]["metrics"] == ["loss"] and not changed["eval"]["retained"]
    assert words == "the last 5% of the training rows, held out"
    assert "judged by too" in held_out({"data": {"train": "a", "holdout": 0.1}}, 0.05)[1]


def test_the_best_rate_is_of_those_that_got_furthest():
    assert best({0.1: [[2, 0.1]], 0.2: [[2, 0.5], [4, 0.4]], 0.3: [[2, None]]}, [0.1, 0.2, 0.3]) == 0.2
    assert best({0.1: [[2, None]], 0.2: [[2, None]]}, [0.1, 0.2]) == 0.1


# --- step times ---------------------------------------------------------------------------------------------------------------

TINY = {
    "model": {"name": "builtin:tiny", "dtype": "float32"},
    "data": {"train": "builtin:tool-calls/train", "eval": "builtin:tool-calls/test", "train_rows": 20, "eval_rows": 4},
    "train": {"max_steps": 4, "batch_size": 2},
    "eval": {"metrics": ["exact_match"]},
}


def test_step_times_are_over_the_frozen_base():
    from peftkit.bench.steps import measure
    from peftkit.recipe import load_recipe

    found = {}
    for name, changes in {
        "lora": {"methods": ["lora"]},
        "full": {"train": {"full_finetuning": True}},
        "qdora": {"model": {"quantize": "nf4"}, "methods": ["dora"]},
    }.items():
        recipe = load_recipe(merge(TINY, changes) | {"output_dir": "unused"})
        found[name] = measure(recipe, 3, Console(file=io.StringIO()))
    for timing in found.values():
        assert set(timing) == {"rounds", "over_base", "seconds", "base_seconds", "saved_bytes", "base_saved_bytes"}
        assert len(timing["rounds"]) == 3 and timing["over_base"] == sorted(timing["rounds"])[1] and timing["seconds"] > 0
    assert found["lora"]["saved_bytes"] > found["lora"]["base_saved_bytes"]
    assert found["full"]["saved_bytes"] > found["full"]["base_saved_bytes"]  # inputs of every product are kept for its weight's gradient


def test_both_sides_of_a_timing_have_the_same_weights_and_only_one_is_changed():
    import peftkit
    from peftkit.bench.steps import sharing
    from peftkit.methods import find_attachment

    base, _ = peftkit.load("builtin:tiny", dtype="float32")
    copied = sharing(base.requires_grad_(False))
    peftkit.attach(copied, peftkit.LoRA(r=2))
    assert find_attachment(base) is None and find_attachment(copied) is not None
    theirs = {parameter.data_ptr() for parameter in base.parameters()}
    assert theirs <= {parameter.data_ptr() for parameter in copied.parameters()}


def test_a_suite_ends_with_one_timing_cell_per_method(tmp_path, monkeypatch):
    suite = Suite(name="t", recipe=TINY, methods={"lora": {"methods": ["lora"]}}, seeds=[0], timing={"rounds": 2})
    console = Console(file=io.StringIO(), width=500)
    records = run_suite(suite, tmp_path, jobs=2, console=console)
    assert [(r.stage, r.status) for r in records] == [("final", "done"), ("timing", "done")], [r.traceback for r in records]
    results = load_results(tmp_path / "t")
    assert len(results.timings["lora"].timing["rounds"]) == 2 and "of the frozen base's step" in console.file.getvalue()
    assert [len(kept) for kept in results.methods.values()] == [1]
    assert records[0].learning_rate == 2e-4 and records[0].curve[0][0] == 1
    assert not (tmp_path / "t" / cells(suite)[0].folder / "run/checkpoints").exists()
    assert run_suite(suite, tmp_path, console=console) == records


# --- metrics ------------------------------------------------------------------------------------------------------------------


def test_other_metrics_are_compared_too(tmp_path, stand_in):
    for metric, outcomes, better in (("choice_accuracy", 20, True), ("loss", 0, False), ("rouge1", 0, True)):
        (record,) = stand_in.run(stand_in.suite(name=metric, metric=metric, methods={"m": {}}), tmp_path)
        results = load_results(tmp_path / metric)
        assert (record.status, len(record.outcomes), results.higher_better) == ("done", outcomes, better)


def test_evaluations_on_the_way_have_the_seconds_of_training(tmp_path, stand_in):
    (record,) = stand_in.run(stand_in.suite(methods={"m": {}}), tmp_path)
    assert record.curve[:2] == [[1, 1.0, 0.5], [2, 0.5, 1.0]] and record.evaluations[:2] == [[2, 1.0, 1.0], [4, 0.5, 2.0]]


# --- where cells run ----------------------------------------------------------------------------------------------------------


def test_each_cell_has_a_gpu_of_its_own(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    records = stand_in.run(stand_in.suite(seeds=[0, 1, 2]), tmp_path, jobs=2)
    assert {record.machine["gpu"] for record in records} == {"4", "7"}
    with pytest.raises(ConfigError, match="--jobs 3: each cell gets a GPU of its own, and there are 2"):
        stand_in.run(stand_in.suite(), tmp_path, jobs=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runner_module.gpus() == []


def test_time_that_is_over_leaves_the_rest_for_later(tmp_path, stand_in):
    marker, console = tmp_path / "marker", Console(file=io.StringIO(), width=500)
    suite = stand_in.suite(methods={"lora": {}, "dora": {"fake": {"hang": 6, "marker": str(marker)}}})
    records = stand_in.run(suite, tmp_path, seconds=4.0, console=console)
    assert [record.method for record in records] == ["lora"] and load_results(tmp_path / "fake").unfinished == 1
    assert "the time is over; 1 cells are not done" in console.file.getvalue()
    assert [record.method for record in stand_in.run(suite, tmp_path)] == ["lora", "dora"] and load_results(tmp_path / "fake").unfinished == 0
    assert stand_in.started[-1] == "dora-seed0 10 resumed"


def test_cells_run_as_jobs_of_submitit(tmp_path, stand_in):
    pytest.importorskip("submitit")
    launcher = Submitit(tmp_path / "jobs", {"timeout_min": 5}, cluster="local")
    records = stand_in.run(stand_in.suite(methods={"good": {}, "bad": {"fake": {"diverges": 0.0}}}), tmp_path, launcher=launcher)
    assert [(r.method, r.status, r.kind) for r in records] == [("good", "done", None), ("bad", "failed", "divergence")]


def test_a_launcher_that_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("peftkit.bench.launch.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape('pip install "peftkit[slurm]"')):
        Submitit(tmp_path, {})


# --- the user's own recipe ----------------------------------------------------------------------------------------------------

OWN_RECIPE = """model: {name: builtin:tiny}
methods: [{lora: {r: 4, alpha: 8, target_modules: [q_proj]}}, {neftune: {alpha: 5}}]
data: {train: builtin:copy/train, eval: builtin:copy/test, train_rows: 40, eval_rows: 4}
train: {learning_rate: 1.0e-3, max_steps: 4, batch_size: 2}
eval: {metrics: [loss, exact_match]}
output_dir: runs/x
"""


def test_methods_take_the_place_of_the_recipes_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(OWN_RECIPE)
    suite = own_suite(str(path), ["lora", "dora", "loraplus", "dora+neftune", "qdora", "full"], 2, None, False)
    kept = {"r": 4, "alpha": 8, "target_modules": ["q_proj"]}
    assert suite.recipe_of("", "lora")["methods"] == [{"lora": kept}] and suite.recipe_of("", "dora")["methods"] == [{"dora": kept}]
    assert suite.recipe_of("", "loraplus")["methods"] == [{"lora": kept}, {"loraplus": {}}]
    assert suite.recipe_of("", "dora+neftune")["methods"] == [{"dora": kept}, {"neftune": {}}]
    assert suite.recipe_of("", "qdora")["model"]["quantize"] == "nf4"
    assert suite.recipe_of("", "full")["methods"] == [] and suite.recipe_of("", "full")["train"]["learning_rate"] == pytest.approx(1e-4)
    assert (suite.name, suite.metric, suite.seeds) == ("mine-methods", "exact_match", [0, 1])
    swept = own_suite(str(path), ["lora", "full"], 1, None, True)
    assert swept.rates_of("lora") == pytest.approx([1e-3 / 3, 1e-3, 3e-3]) and swept.rates_of("full")[1] == pytest.approx(1e-4)
    path.write_text(OWN_RECIPE.replace("[loss, exact_match]", "[loss]"))
    assert own_suite(str(path), ["lora"], 1, [0.1], False).metric == "loss"
    path.write_text(OWN_RECIPE.replace("max_steps: 4", "max_steps: 4, full_finetuning: true").replace("methods: [{lora", "methods: [] # [{lora"))
    trained = own_suite(str(path), ["full", "lora"], 1, None, False)  # the recipe's rate is full finetuning's
    assert trained.recipe_of("", "full")["train"]["learning_rate"] == 1e-3 and trained.recipe_of("", "lora")["train"]["learning_rate"] == pytest.approx(1e-2)
    with pytest.raises(ConfigError, match="unknown method 'dra'; did you mean 'dora'"):
        own_suite(str(path), ["dra"], 1, None, False)


@pytest.mark.parametrize(("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45)])
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "2 hours", "h", "-1h"])
def test_what_is_no_time(text):
    with pytest.raises(ConfigError, match="write a time such as 2h"):
        seconds_of(text)


def first(wall: float, steps: int, training: float) -> Record:
    return Record(method="m", seed=0, key="k", status="done", wall_seconds=wall, log="", train={"steps": steps, "seconds": training})


def test_a_plan_takes_what_fits():
    record = first(30.0, 100, 20.0)
    plans = [plan(record, 4, budget - 30, 1, None, None) for budget in (10_000, 900, 400, 60)]
    assert [(each.rates, each.seeds) for each in plans] == [(3, 3), (1, 3), (1, 1), (1, 1)]
    assert all(each.seconds <= budget - 30 for each, budget in zip(plans[:3], (10_000, 900, 400), strict=True))
    assert plans[0].cells == 12 + 8 + 12 and plans[0].rungs == (25, 50)
    assert plan(record, 4, 10_000, 2, None, None).seconds < plans[0].seconds
    assert plan(record, 4, 60, 1, 5, 3).seeds == 5
    assert "more than there is time for" in plans[3].words(60) and "more than" not in plans[0].words(10_000)
    assert Plan(1, 1, 4, 100, ()).words(600) == "plan: the learning rate as it is; 1 seed; 4 runs, about 2m of the 10m"


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code or 0


def test_a_recipe_and_a_time_are_enough(tmp_path, stand_in, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peftkit.bench.cells.peftkit_run", stand_in)
    monkeypatch.setattr("peftkit.bench.suite._check", lambda suite, source: None)
    monkeypatch.setattr("peftkit.bench.suite.timing_cells", lambda suite: [])
    monkeypatch.setattr("peftkit.bench.cells.timing_cells", lambda suite: [])
    Path("mine.yaml").write_text(OWN_RECIPE + f"fake: {{log: {stand_in.log}, best: 0.001}}\n")
    assert exit_code("bench", "run", "--recipe", "mine.yaml", "--methods", "lora,dora", "--budget", "1h") == 0
    shown = capfd.readouterr()
    assert "plan: 3 learning rates each, chosen after 1 and 2 steps; 3 seeds;" in shown.err and "of the 1h00m" in shown.err
    results = load_results("runs/bench/mine-methods")
    assert {name: len(records) for name, records in results.methods.items()} == {"lora": 3, "dora": 3} and len(results.search) == 2
    count = len(stand_in.started)
    assert exit_code("bench", "run", "--recipe", "mine.yaml", "--methods", "lora,dora", "--budget", "1h") == 0  # the same plan, from the same records
    assert len(stand_in.started) == count
    assert yaml.safe_load(Path("runs/bench/mine-methods/suite.yaml").read_text())["search"]["rungs"] == [1, 2]
    assert exit_code("bench", "run", "runs/bench/mine-methods/suite.yaml") == 0 and len(stand_in.started) == count


def test_several_rates_without_a_time_are_tried_for_parts_of_the_recipes_own_steps(tmp_path, stand_in, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peftkit.bench.cells.peftkit_run", stand_in)
    monkeypatch.setattr("peftkit.bench.suite._check", lambda suite, source: None)
    monkeypatch.setattr("peftkit.bench.cells.timing_cells", lambda suite: [])
    Path("mine.yaml").write_text(OWN_RECIPE + f"fake: {{log: {stand_in.log}, best: 0.001}}\n")
    assert exit_code("bench", "run", "--recipe", "mine.yaml", "--methods", "lora,dora", "--learning-rates", "1e-3,1e-2", "--seeds", "1") == 0
    assert {steps for *_, steps in (line.split() for line in stand_in.started)} == {"1", "2", "4"}


def test_a_time_is_reckoned_from_the_first_method_that_gets_through(tmp_path, stand_in, monkeypatch, capfd):
    """Without optuna the command stops before it trains; a method that does not fit is a row of the report, not the end of the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peftkit.bench.cells.peftkit_run", stand_in)
    monkeypatch.setattr("peftkit.bench.suite._check", lambda suite, source: None)
    monkeypatch.setattr("peftkit.bench.cells.timing_cells", lambda suite: [])
    arguments = ("bench", "run", "--recipe", "mine.yaml", "--methods", "full,lora", "--budget", "1h")
    Path("mine.yaml").write_text(OWN_RECIPE + f"fake: {{log: {stand_in.log}, best: 0.001, full_finetuning_fails: true}}\n")
    with monkeypatch.context() as without:
        without.setattr("peftkit.bench.search.find_spec", lambda name: None)
        assert exit_code(*arguments) == 2 and "optuna, which is not installed" in capfd.readouterr().err and not stand_in.started
    assert exit_code(*arguments) == 1
    results = load_results("runs/bench/mine-methods")
    assert {name: {record.status for record in records} for name, records in results.methods.items()} == {"full": {"failed"}, "lora": {"done"}}
    assert "plan: 3 learning rates each" in capfd.readouterr().err


def test_wrong_usage_of_bench_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(OWN_RECIPE)
    for arguments, said in (
        ((), "give a suite, or --recipe"),
        (("s.yaml", "--recipe", "mine.yaml"), "not both"),
        (("s.yaml", "--budget", "2h"), "--budget: for --recipe"),
        (("nothing",), "no suite is called 'nothing'"),
        (("--recipe", "mine.yaml"), "--recipe needs --methods"),
        (("--recipe", "mine.yaml", "--methods", "lora", "--budget", "soon"), "write a time such as 2h"),
        (("--recipe", "mine.yaml", "--methods", "lora", "--learning-rates", "high"), "write numbers"),
        (("--recipe", "mine.yaml", "--methods", "lra"), "did you mean 'lora'"),
        (("--recipe", "none.yaml", "--methods", "lora"), "none.yaml: no such file"),
        (("s.yaml", "--launcher", "slrm"), "--launcher slrm: unknown"),
        (("s.yaml", "--launcher-option", "a=1"), "for --launcher submitit"),
    ):
        assert exit_code("bench", "run", *arguments) == 2
        assert said in " ".join(capfd.readouterr().err.split())


def test_reading_a_suites_cells_takes_no_torch():
    code = "import sys; import peftkit.bench.cells, peftkit.bench.own; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_the_kept_suite_file_is_read_back(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(OWN_RECIPE)
    assert "output_dir" not in own_suite(str(path), ["lora"], 1, None, False).recipe and read_yaml(path).data["output_dir"] == "runs/x"
    assert Code().files.keys() >= OWN.keys()


def test_energy_is_told_where_the_gpu_counts_it(monkeypatch):
    from types import ModuleType, SimpleNamespace

    import torch

    from peftkit.energy import energy_joules

    if not torch.cuda.is_available():
        assert energy_joules() is None
    told = ModuleType("pynvml")
    told.__spec__ = SimpleNamespace(name="pynvml")
    told.NVMLError, told.nvmlInit = RuntimeError, lambda: None
    told.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-1-2": "card"}[uuid]
    told.nvmlDeviceGetTotalEnergyConsumption = lambda handle: {"card": 2500}[handle]
    monkeypatch.setitem(sys.modules, "pynvml", told)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    assert energy_joules() == 2.5

    def without_counter(handle):
        raise RuntimeError("not supported")

    told.nvmlDeviceGetTotalEnergyConsumption = without_counter
    assert energy_joules() is None


def test_another_metric_or_memory_budget_is_other_cells(stand_in, tmp_path):
    """The trap: records keep the answers judged by exact match, and a report of the loss is made of them."""
    keys = {}
    for name, changes in {
        "exact_match": {}, "loss": {"metric": "loss"}, "choices": {"metric": "choice_accuracy"}, "2GB": {"budget": {"memory": "2GB"}},
        "8GB": {"budget": {"memory": "8GB"}}, "again": {},
    }.items():  # fmt: skip
        keys[name] = [cell.key for cell in cells(stand_in.suite(**changes))]
    assert keys.pop("again") == keys["exact_match"] and len({tuple(each) for each in keys.values()}) == 5


def test_data_in_the_home_folder_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("{}")
    before = keys_module.inputs({"data": {"train": "~/rows.jsonl"}})
    (tmp_path / "rows.jsonl").write_text("{ }")
    assert before and keys_module.inputs({"data": {"train": "~/rows.jsonl"}}) != before


def test_a_method_whose_short_run_fails_is_told_as_failed(stand_in, tmp_path):
    """A budget of tokens asks how many steps they are: a method that cannot take one has no final cells, which is no silence."""
    suite = stand_in.suite(budget={"tokens": 600}, methods={"lora": {}, "dora": {"fake": {"diverges": 0.0}}})
    stand_in.run(suite, tmp_path / "runs")
    found = load_results(tmp_path / "runs/fake/results.json")
    assert [record.method for record in found.failed] == ["dora"] and found.methods["dora"][0].status == "failed"
