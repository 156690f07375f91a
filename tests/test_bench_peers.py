"""The suites for a real GPU, offline: whole, and their base recipes go the whole way; peft's side of the comparison with it; the page of results."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from peftkit.bench.suite import load_suite, merge
from peftkit.config import read_yaml
from peftkit.recipe import load_recipe
from peftkit.rehearse import rehearse

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package

from benchmarks import results_page, versus_peft  # noqa: E402

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


# --- peft and peftkit ---------------------------------------------------------------------------------------------------------


def losses(side: versus_peft.Side, steps: int) -> list[float]:
    """The loss of the first rows before every step of training on them, dropout off."""
    import importlib

    runner = importlib.import_module("peftkit.run")
    batch = runner.to_batch([[example] for example in list(side.sets["train"])[:8]], side.loss)
    side.model.eval()
    found = []
    for _ in range(steps):
        total, tokens = side.loss(**batch)
        found.append((total / tokens).item())
        (total / tokens).backward()
        side.optimizer.step()
        side.optimizer.zero_grad()
    return found


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa", "dora", "dora, dropout", "qdora"])
def test_both_sides_train_alike_from_the_same_start(method):
    ours, theirs = (versus_peft.build(method, who, 3, None, Path("unused")) for who in ("peftkit", "peft"))
    first, second = dict(ours.model.named_parameters()), dict(theirs.model.named_parameters())
    trained = {name for name, parameter in first.items() if parameter.requires_grad}
    assert trained == {name for name, parameter in second.items() if parameter.requires_grad} and trained
    if method != "pissa":  # whose decompositions are each side's own
        assert all(first[name].equal(second[name]) for name in trained if "lora_A" in name or "lora_B" in name)
    if "dora" in method:
        assert all(first[name].allclose(second[name], rtol=1e-2) for name in trained if "magnitude" in name)
    from peft.tuners.lora import LoraLayer

    assert any(isinstance(module, LoraLayer) for module in theirs.model.modules())
    assert not any(isinstance(module, LoraLayer) for module in ours.model.modules())
    a, b = losses(ours, 4), losses(theirs, 4)
    assert a == pytest.approx(b, rel=0.03) and a[-1] < 0.9 * a[0], "bfloat16 apart, and learning"


def peft_records(ours: list[int], theirs: list[int]) -> list[dict]:
    runs = [
        {"method": "lora", "who": who, "seed": seed, "first_loss": 3.0, "loss": 1.0, "outcomes": outcomes, "peak_bytes": 2**20}
        for who, outcomes in (("peftkit", ours), ("peft", theirs)) for seed in range(3)
    ]  # fmt: skip
    timings = [{"method": "lora", "seconds": {"peft": [0.3, 0.2, 0.4], "peftkit": [0.2, 0.1, 0.1]}, "saved_bytes": {"peft": 200, "peftkit": 100}}]
    return versus_peft.summarise(runs, timings)


def test_summary_tells_other_accuracies_apart_and_like_ones_not():
    [same] = peft_records([1, 0] * 100, [0, 1] * 100)
    assert not same["difference"]["told_apart"] and same["times_faster"] == 2.0 and same["saved_over_peft"] == 0.5
    [other] = peft_records([1, 1, 1, 0] * 50, [1, 0, 0, 0] * 50)
    assert other["difference"]["told_apart"] and other["difference"]["mean"] == 0.5
    assert "told apart" in versus_peft.cells(other)[3] and "cannot" not in versus_peft.cells(other)[3]
    assert len(versus_peft.cells(same)) == len(versus_peft.COLUMNS)


@pytest.mark.parametrize(("arguments", "told"), [(["--only", "lorra"], "no row 'lorra'"), (["--seeds", "0"], "count from 1")])
def test_wrong_arguments_are_told(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        versus_peft.main(arguments)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


# --- the page of results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", results_page.BLOCKS)
def test_what_is_not_measured_is_said_with_the_command(marker, tmp_path):
    text = results_page.block(marker, tmp_path)
    names, command, _ = results_page.BLOCKS[marker]
    assert text.startswith("Not measured yet") and command in text and all(f"{name}.json" in text for name in names)


def test_results_of_peft_are_a_table(tmp_path):
    where = {"machine": {"processor": "a CPU", "threads": 2}, "versions": {"torch": "2.0", "peft": "0.1"}, "commit": "abc", "date": "2026-01-02T03:04:05"}
    found = {"seeds": 3, "rounds": 3, "dtype": "bfloat16", "rows": peft_records([1, 0] * 100, [0, 1] * 100), **where}
    (tmp_path / "versus_peft.json").write_text(json.dumps(found))
    text = results_page.block("versus_peft", tmp_path)
    assert "cannot be told apart" in text.replace("can their accuracies be told apart", "") and "told apart:" not in text.split("|")[0]
    assert "| lora | 50.0% | 50.0% |" in text and "Measured on a CPU, 2 threads; torch 2.0, peft 0.1; commit abc; 2026-01-02." in text
    found["rows"] = peft_records([1, 1, 1, 0] * 50, [1, 0, 0, 0] * 50)
    (tmp_path / "versus_peft.json").write_text(json.dumps(found))
    assert "**Told apart: lora.**" in results_page.block("versus_peft", tmp_path)


def test_any_results_file_becomes_tables(tmp_path):
    found = {
        "machine": {"gpu": "a GPU"}, "versions": {"torch": "2"}, "commit": None,
        "false_alarms": 0.005, "holds": True, "draws": list(range(200)), "sizes": [1, 2],
        "verdicts": {"lora|again": {"told_apart": False, "mean": 0.12345}, "rank 1": {"told_apart": True, "mean": -0.2}},
        "power": [{"points": 5, "seen": 0.93}, {"points": 2, "seen": 0.4, "note": "few"}],
    }  # fmt: skip
    (tmp_path / "coverage.json").write_text(json.dumps(found))
    lines = results_page.block("coverage", tmp_path).splitlines()
    assert lines[0] == "Measured on a GPU; torch 2."
    assert "| false alarms | 0.005 |" in lines and "| holds | yes |" in lines and "| draws | 200 of them |" in lines and "| sizes | 1, 2 |" in lines
    assert "| lora\\|again | no | 0.1235 |" in lines and "| points | seen | note |" in lines and "| 5 | 0.93 |  |" in lines


def test_verdicts_and_killed_suites_are_told(tmp_path):
    where = {"machine": {"processor": "a CPU", "threads": 1}, "versions": {"torch": "2"}, "commit": "a" * 40, "dirty": True, "created": "2026-01-02T03:04:05"}
    lines = [{"what": "a is b", "says": "they cannot be told apart", "holds": True}, {"what": "c is worse", "says": "c|d are alike", "holds": False}]
    (tmp_path / "sanity.json").write_text(json.dumps({"verdicts": lines, "accuracy": {"a": 0.5}, **where}))
    text = results_page.block("sanity", tmp_path)
    assert "\n\n| what must be |" in text and "| a is b | they cannot be told apart | yes |" in text and "| c is worse | c\\|d are alike | **no** |" in text
    assert f"commit {'a' * 12} with changes; 2026-01-02." in text and "1 thread;" in text
    runs = [{"after_seconds": seconds, "killed": seconds < 9, "left": "", "rerun_exit_code": 0, "same": seconds != 4} for seconds in (9.5, 2, 4)]
    (tmp_path / "suite_kills.json").write_text(json.dumps({"suite_seconds": 9, "kills": runs, "same": 2, "killed": 2, **where}))
    text = results_page.block("suite_kills", tmp_path)
    assert "3 suites, 2 of them killed on their way" in text and "after 2 to 10 s of 9" in text
    assert "2 had the results of the one left alone, 1 had not" in text


def test_a_brief_report_keeps_the_table_and_the_origin():
    report = "### Suite s\n\nfirst\n\n| a |\n| --- |\n| 1 |\n\n- lora and dora cannot be told apart\n- another\n- 2026; commit abc.\n"
    assert results_page.brief(report) == "### Suite s\n\nfirst\n\n| a |\n| --- |\n| 1 |\n\n- 2026; commit abc."
    assert results_page.brief("Not measured yet.") == "Not measured yet."
