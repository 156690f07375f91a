"""The suites for a real GPU, offline: whole, and their base recipes go the whole way; peft's side of the comparison with it; the page of results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from peftkit.bench.suite import Suite, load_suite, merge
from peftkit.config import read_yaml
from peftkit.recipe import load_recipe
from peftkit.rehearse import rehearse

ROOT = Path(__file__).parents[1]
QUALITY = {path.stem: path for path in sorted((ROOT / "benchmarks" / "suites").glob("quality-*.yaml"))}
TESTS = {  # the choices of the tests of commonsense_170k
    "boolq": ["true", "false"], "piqa": ["solution1", "solution2"], "social_i_qa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"], "winogrande": ["option1", "option2"], "ARC-Easy": ["answer1", "answer5"],
    "ARC-Challenge": ["answer1", "answer4"], "openbookqa": ["answer1", "answer2", "answer3", "answer4"],
}  # fmt: skip


def recipes_of(suite: dict) -> list[tuple[str, str, dict]]:
    """(task, method, recipe) of all cells but for the seed and the learning rate."""
    tasks = suite.get("tasks") or {"": {}}
    return [
        (task, method, merge(merge(merge(suite["recipe"], changes), own), {"output_dir": "run"}))
        for task, changes in tasks.items() for method, own in suite["methods"].items()
    ]  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder with a few rows in the place of every file that the suites name, and the sizes of their models."""
    recipes = ROOT / "recipes"
    shutil.copytree(recipes / "configs", tmp_path / "configs")
    base = json.loads((tmp_path / "configs" / "Llama-3.2-3B-Instruct.json").read_text())  # of the same sizes, without a chat template
    (tmp_path / "configs" / "Llama-3.2-3B.json").write_text(json.dumps(base | {"chat_template": False}))
    (tmp_path / "rows").mkdir()
    shutil.copy(recipes / "rows" / "tatsu-lab--alpaca.jsonl", tmp_path / "rows")
    for own, name in (("commonsense_170k.json", "commonsense_170k.json"), ("trainset.csv", "trainset.csv"), ("devset.csv", "testset_w_refs.csv")):
        shutil.copy(recipes / "rows" / own, tmp_path / name)
    for test, choices in TESTS.items():
        rows = [
            {"instruction": f"Which is right, {' or '.join(choices)}? ({i})", "input": "", "output": f"the correct answer is {choice}", "answer": choice}
            for i in range(2) for choice in choices
        ]  # fmt: skip
        write_rows(tmp_path / "dataset" / test / "test.json", rows)
    sums = [{"query": f"What is {i} plus 2?", "response": f"{i} plus 2 is {i + 2}.\n#### {i + 2}", "type": "GSM_Rephrased"} for i in range(12)]
    write_rows(tmp_path / "rows" / "meta-math--MetaMathQA.jsonl", sums)
    write_rows(tmp_path / "gsm8k_test.jsonl", [{key: row[key] for key in ("query", "response")} for row in sums])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_four_suites_are_there():
    assert set(QUALITY) == {"quality-commonsense", "quality-gsm8k", "quality-e2e", "quality-alpaca"}


@pytest.mark.parametrize("name", QUALITY)
def test_quality_suite_is_whole(name):
    suite = read_yaml(QUALITY[name]).data
    assert suite["name"] == name and len(set(suite["seeds"])) >= 3
    for task, method, recipe in recipes_of(suite):
        found = load_recipe(recipe)
        asked = {"rougeL": "rouge"}.get(suite["metric"], suite["metric"])
        assert asked in found.eval.metrics, (task, method)
        rates = suite.get("learning_rates", {})
        assert method in rates or "learning_rate" in recipe["train"], "the rate is a choice or an answer, never the default"
    assert set(suite.get("learning_rates", {})) <= set(suite["methods"])
    for row in suite["published"]:
        assert row["method"] in suite["methods"] and row.get("task", "") in (suite.get("tasks") or {""}), row
        assert row["source"] and (0 < row["value"] < 1 or row["metric"] == "bleu"), "values are in the unit of our metric"


@pytest.mark.skipif("tasks" not in Suite.model_fields, reason="suites do not have tasks yet")
@pytest.mark.parametrize("name", QUALITY)
def test_quality_suite_loads(name, beside):
    suite = load_suite(QUALITY[name])
    assert suite.name == name and len(suite.seeds) == 3 and suite.published


@pytest.mark.parametrize("name", QUALITY)
def test_base_recipe_of_a_quality_suite_goes_the_whole_way(name, beside):
    suite = read_yaml(QUALITY[name]).data
    task, _, recipe = recipes_of(suite)[0]
    report = rehearse(recipe, steps=2)
    assert suite["metric"] in report.result.after and report.result.train["steps"] == 2, task
    assert "with the same scores" in report.did[-1]
