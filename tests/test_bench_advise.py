"""Advice from measured records: what is taken, what it says of its evidence, and what it leaves unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_results import record

from peftkit.bench import advise as module
from peftkit.bench.advise import NEAR, UNKNOWN, Evidence, advise, read_results
from peftkit.bench.cells import Record, Results, write_results
from peftkit.cli import main
from peftkit.config import ConfigError

METHODS = {"lora": ([{"lora": {"r": 8}}], 0.8, 30.0), "dora": ([{"dora": {"r": 8}}], 0.8, 60.0), "weak": ([{"lora": {"r": 1}}], 0.2, 20.0)}


def cell(method: str, seed: int, base: str = "builtin:tiny", rate: float = 5e-3, **changes) -> Record:
    methods, accuracy, seconds = METHODS[method]
    made = record("same", "", seed, accuracy, rate, steps=100)  # one name: lora and dora answer alike
    recipe = {"model": {"name": base}, "methods": methods, "train": {"learning_rate": rate, "max_steps": 100, "batch_size": 4, "seed": seed}}
    return made.model_copy(update={"method": method, "recipe": recipe, "train": made.train | {"seconds": seconds}} | changes)


def suite(path: Path, base: str = "builtin:tiny", methods=METHODS, **changes) -> str:
    cells = [cell(method, seed, base, **changes) for method in methods for seed in range(3)]
    write_results(path, Results(suite="s", metric="exact_match", created="2026-01-01T00:00:00+00:00", cells=cells))
    return str(path)


def taken(found) -> dict[str, str]:
    return {setting.name: setting.take for setting in found.settings}


def test_the_cheapest_of_those_that_cannot_be_told_apart(tmp_path):
    file = suite(tmp_path / "r.json")
    found = advise("builtin:tiny", 500, "24GB", [file], max_length=64)
    assert taken(found) == {
        "method": "lora", "quantisation": "none", "batch_size": "4", "micro_batch_size": "4", "gradient_checkpointing": "no", "rank": "8",
        "learning_rate": "0.005", "steps": "125 (one pass)",
    }  # fmt: skip
    evidence = {setting.name: setting.evidence for setting in found.settings}
    assert file in evidence["method"] and "3 cells of lora (n = 60 examples each)" in evidence["method"] and "cheapest" in evidence["method"]
    assert "rank 1: weak is " in evidence["rank"] and "worse than lora" in evidence["rank"]
    assert "the only one tried" in evidence["learning_rate"]
    assert "forecast, not measured" in evidence["micro_batch_size"] and "400 rows" in evidence["steps"]
    assert any(limit.startswith("left out") and "weak is" in limit for limit in found.limits)
    assert found.recipe["train"]["max_steps"] == 125 and found.recipe["methods"] == [{"lora": {"r": 8}}]
    assert found.fits and json.dumps(found.to_json())


def test_a_base_of_another_size_leaves_the_learning_rate_unknown(tmp_path, monkeypatch):
    file = suite(tmp_path / "r.json", methods=["lora"])
    monkeypatch.setattr(module, "_parameters", lambda name, config: 10**6 if config is None else 10**9)
    monkeypatch.setattr(module, "_evidence", lambda path, results: Evidence(path, results, "small", 10**6))
    found = advise("builtin:tiny", 500, "24GB", [file], max_length=64)
    assert taken(found)["learning_rate"] == UNKNOWN and "learning_rate" not in found.recipe["train"]
    assert any("nothing was measured near the 1B parameters" in limit for limit in found.limits)


def test_many_more_rows_than_were_measured_leave_the_steps_unknown(tmp_path):
    found = advise("builtin:tiny", int(400 * NEAR) + 4, "24GB", [suite(tmp_path / "r.json", methods=["lora"])], max_length=64)
    assert taken(found)["steps"] == UNKNOWN and "max_steps" not in found.recipe["train"]


def test_the_results_on_the_nearest_base_count(tmp_path):
    here, elsewhere = suite(tmp_path / "here.json", methods=["dora"]), suite(tmp_path / "far.json", base="nobody/nowhere", methods=["lora"])
    found = advise("builtin:tiny", 500, "24GB", [elsewhere, here], max_length=64)
    assert taken(found)["method"] == "dora"
    found = advise("builtin:tiny", 500, "24GB", [elsewhere], max_length=64)  # a base that is not on this machine
    assert taken(found)["learning_rate"] == UNKNOWN and any("an unknown number of" in limit for limit in found.limits)


def test_a_method_with_failed_cells_is_not_advised(tmp_path):
    cells = [cell(method, seed) for method in ("lora", "dora") for seed in range(3)]
    cells[0] = cells[0].model_copy(update={"status": "failed", "kind": "divergence", "outcomes": [], "after": {}})
    path = tmp_path / "r.json"
    write_results(path, Results(suite="s", metric="exact_match", created="2026-01-01T00:00:00+00:00", cells=cells))
    found = advise("builtin:tiny", 500, "24GB", [str(path)], max_length=64)
    assert taken(found)["method"] == "dora" and any("lora (1 cells failed)" in limit for limit in found.limits)


def test_what_does_not_fit_is_said(tmp_path, monkeypatch, capfd):
    file = suite(tmp_path / "r.json", methods=["lora"])
    with pytest.raises(SystemExit) as caught:
        main(["bench", "advise", "--model", "builtin:tiny", "--rows", "9", "--memory", "1MB", "--max-length", "64", "--results", file])
    told = " ".join(capfd.readouterr().out.split())
    assert caught.value.code == 1 and "none of lora fits into" in told and "lora with checkpointing needs" in told


def test_results_are_found_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--results"):
        read_results([])
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    suite(tmp_path / "benchmarks" / "results" / "mine.json")
    (tmp_path / "benchmarks" / "results" / "memory.json").write_text('{"rows": []}')  # measurements of another kind
    assert [path for path, _ in read_results([])] == ["benchmarks/results/mine.json"]
    (tmp_path / "benchmarks" / "results" / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json"):
        read_results([])
    write_results(tmp_path / "none.json", Results(suite="s", metric="exact_match", created="x", cells=[]))
    with pytest.raises(ConfigError, match="no finished cells"):
        read_results(["none.json"])


@pytest.mark.parametrize(
    ("model", "memory", "said"),
    [("builtin:tiny", "24", "--memory"), ("nobody/nowhere", "24GB", "cannot load the config of 'nobody/nowhere'"), ("builtin:tini", "24GB", "builtin:tini")],
)
def test_wrong_usage_is_told(tmp_path, monkeypatch, model, memory, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=said):
        advise(model, 100, memory, [suite(tmp_path / "r.json", methods=["lora"])])
