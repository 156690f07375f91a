"""What the harness concludes from records: comparisons, power, steps to a loss, forgetting, sensitivity, the gate; all from made records."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from peftkit.bench import ci
from peftkit.bench.baseline import Baseline, BaselineTiming, accept, baseline_json, load_baseline
from peftkit.bench.cells import Record, Results, write_results
from peftkit.bench.compare import compare
from peftkit.bench.gate import Margins, Verdict, gate, slower
from peftkit.bench.measures import forgetting, sensitivity, smoothed, to_target
from peftkit.bench.power import plan, settled
from peftkit.bench.statistics import Difference, Spread, accuracy, difference, holm, measure, pooled_accuracy, pooled_difference, scalar_difference
from peftkit.cli import main
from peftkit.config import ConfigError, Source, validate


def record(method: str, seed: int, outcomes=(), task: str = "", **changes) -> Record:
    outcomes = [int(outcome) for outcome in outcomes]
    values = {
        "method": method, "seed": seed, "key": "k", "status": "done", "wall_seconds": 1.0, "log": "log.txt", "task": task, "outcomes": outcomes,
        "examples": f"x{task}", "after": {"exact_match": sum(outcomes) / max(len(outcomes), 1)}, "before": {"exact_match": 0.0},
    }  # fmt: skip
    return Record(**(values | changes))


def results_of(*records: Record, **changes) -> Results:
    return Results(**({"suite": "s", "metric": "exact_match", "created": "2026-01-01T00:00:00+00:00", "cells": list(records)} | changes))


def answers(rng, share: float, seeds: int = 3, examples: int = 200, spread: float = 0.02) -> dict[int, list[int]]:
    """Seed -> outcomes, a seed's true accuracy scattering by `spread`."""
    return {s: [int(x) for x in rng.random(examples) < np.clip(share + spread * rng.standard_normal(), 0, 1)] for s in range(seeds)}


def runs(rng, means: dict[str, float], tasks=("",), **how) -> list[Record]:
    return [record(m, s, o, task) for task in tasks for m, mean in means.items() for s, o in answers(rng, mean, **how).items()]


# --- p values -----------------------------------------------------------------------------------------------------------------


def test_the_p_value_never_contradicts_the_interval():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.03, 0.06, 0.09, 0.12):
        a, b = answers(rng, 0.7 + shift), answers(rng, 0.7)
        for confidence in (0.8, 0.95, 0.99):
            found = difference(a, b, confidence)
            assert (found.p < 1 - confidence) == (found.low > 0 or found.high < 0), (shift, confidence, found)
        assert difference(b, a).p == pytest.approx(difference(a, b).p, abs=0.03)  # the draws are others


def test_p_values_of_equal_methods_are_even_or_larger():
    rng = np.random.default_rng(1)
    p = np.array([difference(answers(rng, 0.8), answers(rng, 0.8)).p for _ in range(100)])
    assert (p < 0.05).mean() <= 0.11 and (p < 0.5).mean() <= 0.6


def test_holm_is_the_textbook_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_among_many_equal_methods_one_is_seldom_told_apart():
    """The trap: uncorrected, some of 21 pairs of 7 equal methods leave out 0 in most reports."""
    rng = np.random.default_rng(2)
    naive = corrected = 0
    for _ in range(10):
        found = compare(results_of(*runs(rng, {f"m{i}": 0.8 for i in range(7)}, spread=0.04)), pairs="all")
        assert len(found) == 21 and all(each.comparisons == 21 for each in found)
        naive += any(each.difference.told_apart for each in found)
        corrected += any(each.told_apart for each in found)
    assert naive >= 3 and corrected <= 1


# --- comparisons --------------------------------------------------------------------------------------------------------------


def test_tasks_weigh_the_same_whatever_their_size():
    small, large = {s: [1] * 50 for s in range(3)}, {s: [0, 1] * 500 for s in range(3)}
    zeros = {s: [0] * 50 for s in range(3)}
    assert pooled_difference([(small, zeros), (large, large)]).mean == 0.5
    assert pooled_accuracy([list(small.values()), list(large.values())]).mean == 0.75
    rng = np.random.default_rng(3)
    tasks = [(answers(rng, 0.8), answers(rng, 0.7)) for _ in range(4)]
    pooled, alone = pooled_difference(tasks), [difference(a, b) for a, b in tasks]
    assert pooled.mean == pytest.approx(np.mean([each.mean for each in alone]))
    assert pooled.high - pooled.low < 0.7 * np.mean([each.high - each.low for each in alone])  # half, but for chance
    assert pooled.p < min(each.p for each in alone) + 0.01


def test_comparisons_over_tasks_and_by_task_are_one_family():
    rng = np.random.default_rng(4)
    records = runs(rng, {"lora": 0.8, "dora": 0.8, "weak": 0.5}, tasks=("sql", "shell"))
    found = compare(results_of(*records), by_task=True)
    assert [(c.method, c.other, c.task) for c in found] == [(m, "lora", t) for t in (None, "sql", "shell") for m in ("dora", "weak")]
    assert [c.told_apart for c in found] == [False, True] * 3 and found[0].comparisons == 6
    assert "cannot be told apart" in found[0].words() and "as one of 6 comparisons" in found[0].words()
    assert found[3].words().startswith("sql: weak is ") and "points worse than lora" in found[3].words() and not found[3].better
    only = compare(results_of(*records, *(record("lora", 9, [0] * 200, t, stage="search") for t in ("sql", "shell"))))
    assert only[0].difference == found[0].difference  # cells of the search are not read


def test_what_cannot_be_compared_says_why():
    lost = record("dora", 1, task="sql", status="failed", kind="divergence", after={}, outcomes=[])
    full = [record(m, s, [1, 0] * 50, t) for m in ("lora", "dora") for s in range(3) for t in ("sql", "shell")]
    some = [r for r in full if (r.method, r.seed, r.task) != ("dora", 1, "sql")] + [lost]
    assert "1 of 6 cells of dora failed and are left out" in compare(results_of(*some))[0].words()
    none = [r for r in full if (r.method, r.task) != ("dora", "sql")] + [lost]
    assert compare(results_of(*none))[0].words() == "dora cannot be compared with lora: dora has no finished seed on sql"
    other = [r.model_copy(update={"examples": "y"}) if r.method == "dora" else r for r in full]
    assert "they did not answer the same examples" in compare(results_of(*other))[0].words()
    assert "did not measure bleu" in compare(results_of(*full), metric="bleu")[0].words()
    assert compare(results_of()) == []


def test_one_seed_tells_nothing_apart():
    found = compare(results_of(record("lora", 0, [1] * 200), record("dora", 0, [0] * 200)))[0]
    assert not found.told_apart and "cannot be told apart by one seed" in found.words()
    assert "run at least three" in plan(found.difference).words()


def test_a_loss_is_better_when_lower():
    cells = [record(m, s, after={"loss": base + 0.01 * s}) for m, base in (("lora", 0.5), ("dora", 0.3)) for s in range(3)]
    cells[0] = cells[0].model_copy(update={"after": {"loss": 0.502}})
    (found,) = compare(results_of(*cells, metric="loss"))
    assert found.told_apart and found.better and "dora is 0.2007 of loss better than lora" in found.words()
    one = scalar_difference([({0: 1.0}, {0: 2.0})], measure("loss"))
    assert one.p == 1 and not one.told_apart and "inf" not in one.words("a", "b")
    with pytest.raises(ValueError, match="no pairs"):
        scalar_difference([({}, {0: 2.0})], measure("loss"))


# --- power --------------------------------------------------------------------------------------------------------------------


def told(rng, size: float, seeds: int, examples: int, spread: float, of_example: float) -> bool:
    ease = np.clip(0.75 + of_example * rng.standard_normal(examples), 0.05, 0.95)
    sides = [{s: (rng.random(examples) < ease + shift + spread * rng.standard_normal()).astype(int).tolist() for s in range(seeds)} for shift in (size, 0.0)]
    return difference(*sides).told_apart


def test_the_seeds_that_power_asks_for_are_enough_and_not_many_too_many():
    rng = np.random.default_rng(5)
    seeds, examples, spread = 8, 200, 0.03
    of_answer = 2 * 0.75 * 0.25
    of_seed = 2 * spread**2 + of_answer / examples
    size = settled([Spread(of_seed, of_answer, 0.0, 3, examples)], seeds)
    assert 0.68 <= np.mean([told(rng, size, seeds, examples, spread, 0.0) for _ in range(60)]) <= 0.97


def test_power_is_said_in_words():
    rng = np.random.default_rng(6)
    open_ = plan(difference(answers(rng, 0.76, spread=0.03), answers(rng, 0.73, spread=0.03)))
    assert open_.seeds > 3 and f"would take {open_.seeds} seeds" in open_.words() and "3 seeds and 200 examples settle" in open_.words()
    clear = plan(difference(answers(rng, 0.9), answers(rng, 0.5)))
    assert clear.seeds <= 3 and "within their reach" in clear.words()
    spreads = (Spread(1e-5, 1e-3, 0.05, 3, 100),)  # the methods differ example by example, and there are a hundred
    limited = plan(Difference(0.02, -0.03, 0.07, 3, 0.4, spreads=spreads))
    assert limited.seeds is None and limited.examples > 900 and "no number of seeds" in limited.words()
    assert settled([Spread(1e-5 + 1e-3 * (1 / limited.examples - 1 / 100), 1e-3, 0.05, 3, limited.examples)], limited.seeds_then) <= 0.02
    assert "more than 200 seeds" in plan(Difference(1e-4, -0.1, 0.1, 3, 0.9, spreads=(Spread(0.01, 0.1, 0.0, 3, 200),))).words()
    assert plan(scalar_difference([({0: 1.0, 1: 1.3, 2: 0.8}, {0: 1.1, 1: 1.0, 2: 1.0})], measure("loss"))).seeds is None


# --- steps, forgetting, learning rate -----------------------------------------------------------------------------------------


def test_steps_to_a_loss_are_of_the_smoothed_curve_and_censored_runs_are_said():
    fall = [[10 * i, 2.0 - 0.1 * i, 0.5 * i] for i in range(1, 16)]
    spiked = [point if i != 2 else [point[0], 0.0, point[2]] for i, point in enumerate(fall)]  # one lucky batch is not yet there
    slow = [[10 * i, 2.0 - 0.01 * i, 0.5 * i] for i in range(1, 16)]
    found = to_target(
        results_of(record("lora", 0, curve=fall), record("lora", 1, curve=spiked), record("dora", 0, curve=fall), record("dora", 1, curve=slow)), 1.0
    )
    lora, dora = found
    assert [run.step for run in lora.runs] == [120, 120] and lora.runs[0].seconds == 6.0 and lora.steps.mean == 120
    assert [run.step for run in dora.runs] == [120, None] and dora.steps is None
    assert "1 of 2 seeds reached" in dora.words() and "at step 120; 1 had not by step 150" in dora.words()
    assert smoothed(fall[:4]) == [] and smoothed(fall)[0][0] == 50

    evaluated = to_target(results_of(record("lora", 0, curve=fall, evaluations=[[50, 1.2, 3.0], [100, 0.9, 6.0]])), 1.0)[0]
    assert evaluated.runs[0].step == 100 and evaluated.loss == "evaluation loss"
    assert "no run logged" in to_target(results_of(record("lora", 0)), 1.0)[0].words()


def test_forgetting_is_pooled_over_tasks():
    def kept(task, seed, after):
        return record("lora", seed, task=task, before={"retained_exact_match": 0.9}, after={"exact_match": 1.0, "retained_exact_match": after})

    cells = [kept("sql", 0, 0.8), kept("sql", 1, 0.7), kept("shell", 0, 0.5), kept("shell", 1, 0.5)]
    found = forgetting(results_of(*cells))["lora"]
    assert found.mean == pytest.approx(0.275) and found.low < 0.275 < found.high
    assert forgetting(results_of(*cells), "shell")["lora"].mean == pytest.approx(0.4)
    assert forgetting(results_of(*cells, record("lora", 2, [1])))["lora"] is None


def test_sensitivity_compares_runs_of_the_same_length():
    def tried(rate, score, steps=40, **changes):
        fields = {"stage": "search", "learning_rate": rate, "recipe": {"train": {"max_steps": steps}}, "after": {"exact_match": score}}
        return record("lora", 100, **(fields | changes))

    shorter = [tried(1e-3, 0.5), tried(3e-3, 0.6), tried(9e-3, 0.3)]
    found = sensitivity(results_of(*shorter, tried(1e-3, 0.9, 120)))[0]  # a longer run of the worse rate
    assert (found.best_rate, found.steps, found.at_edge) == (3e-3, 40, False)
    assert found.lower == pytest.approx(0.1) and found.higher == pytest.approx(0.3)
    between = sensitivity(results_of(tried(1e-3, 0.4), tried(2e-3, 0.6), tried(1e-2, 0.2)))[0]
    assert between.lower is None and between.higher == pytest.approx(0.4 * np.log(3) / np.log(5)) and "nothing was measured" in between.words()
    lost = tried(9e-3, 0, status="failed", kind="divergence", after={})
    edge = sensitivity(results_of(tried(1e-3, 0.5), tried(3e-3, 0.6), lost))[0]
    assert np.isinf(edge.higher) and "it diverged" in edge.words() and not edge.at_edge
    only_loss = [tried(rate, 0, after={"loss": loss}) for rate, loss in ((1e-3, 0.5), (3e-3, 0.4), (9e-3, 0.9))]
    (by_loss,) = sensitivity(results_of(*only_loss))
    assert by_loss.best_rate == 3e-3 and by_loss.higher == pytest.approx(0.5) and "its loss is 0.5000 higher" in by_loss.words()
    assert sensitivity(results_of(record("lora", 0, [1]))) == []


def test_certainty_is_not_claimed_over_tasks():
    assert pooled_accuracy([np.ones((3, 100)), np.ones((3, 100))]).low < 0.995
    assert accuracy(np.ones((3, 100))).low < pooled_accuracy([np.ones((3, 100))] * 4).low


# --- gate ---------------------------------------------------------------------------------------------------------------------


def suite_runs(rng, methods=("lora", "dora"), share=0.8, tasks=("",), slow=1.0, memory=2**30, **how) -> Results:
    """Results of final and timing cells; rounds scatter by 2%."""
    cells = [r.model_copy(update={"train": {"peak_memory_bytes": memory}}) for r in runs(rng, {m: share for m in methods}, tasks, **how)]
    for method in methods:
        rounds = (1.1 * slow * np.exp(0.02 * rng.standard_normal(15))).tolist()
        cells.append(record(method, 0, stage="timing", after={}, timing={"rounds": rounds, "over_base": float(np.median(rounds)), "saved_bytes": 10**8}))
    return results_of(*cells, machine={"cores": 2})


def failing(verdicts) -> set[tuple[str, str]]:
    return {(v.name, v.check) for v in verdicts if not v.passed}


def test_equal_code_passes_and_planted_faults_fail():
    """The traps: an adapter's scale halved in its forward, an adapter 10% slower, one that keeps more."""
    rng = np.random.default_rng(7)
    baseline = accept(suite_runs(rng))
    verdicts = gate(suite_runs(rng), baseline)
    assert failing(verdicts) == set() and {v.check for v in verdicts} == {"accuracy", "step time", "peak memory", "saved bytes"}
    assert ("lora", "accuracy") in failing(gate(suite_runs(rng, share=0.4), baseline))
    assert failing(gate(suite_runs(rng, slow=1.1), baseline)) == {("lora", "step time"), ("dora", "step time")}
    assert failing(gate(suite_runs(rng, slow=1.1), baseline, Margins(time=0.2))) == set()
    assert failing(gate(suite_runs(rng, memory=1.15 * 2**30), baseline)) == {("lora", "peak memory"), ("dora", "peak memory")}
    heavier = suite_runs(rng)
    heavier.cells[-1].timing["saved_bytes"] = 1.2e8
    assert failing(gate(heavier, baseline)) == {("dora", "saved bytes")}
    assert failing(gate(suite_runs(rng, share=0.95, slow=0.8, memory=2**29), baseline)) == set()  # better is no regression


def test_a_drop_that_no_method_shows_alone_is_seen_in_all_together():
    rng = np.random.default_rng(8)
    methods = tuple(f"m{i}" for i in range(7))
    baseline = accept(suite_runs(rng, methods))
    seen = [gate(suite_runs(rng, methods, share=0.74), baseline) for _ in range(10)]
    together = sum(("all methods", "accuracy") in failing(verdicts) for verdicts in seen)
    alone = sum(("m0", "accuracy") in failing(verdicts) for verdicts in seen)
    assert together >= 9 and alone <= 5


def test_slower_code_fails_and_equal_code_passes_reliably():
    rng = np.random.default_rng(9)

    def rounds(factor: float) -> np.ndarray:
        return factor * np.exp(0.01 * rng.standard_normal() + 0.03 * rng.standard_normal(15))

    def alarms(factor: float) -> int:
        return sum(slower(rounds(factor), BaselineTiming(over_base=1.0, rounds=rounds(1.0).tolist())) for _ in range(200))

    assert alarms(1.0) <= 2 and alarms(1.1) >= 180
    by_hand = BaselineTiming(over_base=1.0)  # nothing known but the ratio
    assert slower(rounds(1.1), by_hand) and not slower(rounds(1.0), by_hand)


def test_what_was_not_measured_does_not_pass():
    rng = np.random.default_rng(10)
    whole = suite_runs(rng)
    baseline = accept(whole)

    def words(keep, change=lambda record: {}) -> dict[tuple[str, str], str]:
        cells = [r.model_copy(update=change(r)) for r in whole.cells if keep(r)]
        return {(v.name, v.check): v.words for v in gate(results_of(*cells), baseline) if not v.passed}

    assert words(lambda r: r.stage != "timing")["lora", "step time"] == "no step times were measured"
    assert words(lambda r: r.method == "lora")["dora", "accuracy"] == "no results: the method was not run"
    assert words(lambda r: r.method == "lora")["dora", "peak memory"] == "was not measured"
    few = words(lambda r: True, lambda r: {"timing": {"rounds": [1.0] * 3}} if r.stage == "timing" else {})
    assert "3 rounds" in few["lora", "step time"]
    lost = words(lambda r: True, lambda r: {"status": "failed", "kind": "crash", "timing": {}} if r.stage == "timing" else {})
    assert lost["lora", "step time"] == "its timing cell failed (crash)"
    assert "other test examples" in words(lambda r: True, lambda r: {"examples": "y"})["lora", "accuracy"]
    assert words(lambda r: True, lambda r: {"after": {"loss": 1.0}} if r.stage == "final" else {})["lora", "accuracy"] == "exact_match was not measured"
    with pytest.raises(ConfigError, match="nothing is expected"):
        validate(Baseline, Source({"methods": {}}, "baseline.json"))


def test_tasks_and_losses_are_judged_too(tmp_path):
    rng = np.random.default_rng(11)
    results = suite_runs(rng, tasks=("sql", "shell"))
    path = tmp_path / "baseline.json"
    path.write_text(baseline_json(accept(results)))
    baseline = load_baseline(path)
    assert list(baseline.tasks) == ["sql", "shell"] and baseline.methods == {} and baseline.timing["lora"].rounds
    assert failing(gate(results, baseline)) == set()
    worse = [r.model_copy(update={"after": {"exact_match": 0.4}}) if (r.task, r.method) == ("sql", "lora") else r for r in results.cells]
    assert ("lora on sql", "accuracy") in failing(gate(results_of(*worse), baseline))
    assert ("lora on shell", "accuracy") not in failing(gate(results_of(*worse), baseline))

    def losses(base: float) -> Results:
        return results_of(*(record("lora", s, after={"loss": base + 0.002 * s}) for s in range(3)), metric="loss")

    assert failing(gate(losses(0.5), accept(losses(0.5)))) == set() and failing(gate(losses(0.3), accept(losses(0.5)))) == set()
    assert failing(gate(losses(0.6), accept(losses(0.5)))) == {("lora", "loss")}


def test_another_machine_is_said():
    rng = np.random.default_rng(12)
    baseline = accept(suite_runs(rng)).model_copy(update={"machine": {"cores": 64}})
    assert all("another machine" in v.words for v in gate(suite_runs(rng), baseline) if v.check != "accuracy")


# --- what CI reads ------------------------------------------------------------------------------------------------------------


def test_junit_is_well_formed_whatever_the_words():
    verdicts = [Verdict("lo<ra>", True, 0.8, 0.8, 0.7, "fine"), Verdict("dora", False, None, 1.1, 1.2, 'a & "b"\x00 <c>\n]]>', "step time", "sql")]
    root = ElementTree.fromstring(ci.junit("s&", verdicts))
    assert root.tag == "testsuites" and [child.tag for child in root] == ["testsuite"]
    for element in (root, root[0]):
        assert (element.get("tests"), element.get("failures"), element.get("errors")) == ("2", "1", "0")
    good, bad = root[0]
    assert good.get("classname") == "s&.lo<ra>" and good.get("name") == "accuracy" and len(good) == 0
    assert bad.get("name") == "step time on sql" and bad[0].tag == "failure" and bad[0].get("type") and "<c>" in bad[0].get("message")
    assert set(good.keys()) == {"classname", "name", "time"}  # attributes that the schema of JUnit knows


def test_summary_and_annotations_name_what_failed():
    verdicts = [Verdict("lora", True, 0.8, 0.8, 0.7, "fine"), Verdict("a|b", False, 0.2, 0.8, 0.7, "100% lost\n::error::x")]
    text = ci.summary("s", verdicts)
    assert text.startswith("### Gate of suite s: 1 of 2 checks FAIL: a\\|b (accuracy).") and text.index("FAIL | 100%") < text.index("pass | fine")
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert ci.github_annotations("s", verdicts) == ["::error title=s%3A a|b%2C accuracy::100%25 lost%0A::error::x"]
    assert "all 1 checks pass" in ci.headline("s", verdicts[:1])


def test_the_gate_command_leaves_what_ci_reads(tmp_path, monkeypatch, capfd):
    rng = np.random.default_rng(13)
    monkeypatch.chdir(tmp_path)
    write_results(Path("good.json"), suite_runs(rng))
    write_results(Path("slow.json"), suite_runs(rng, slow=1.1))

    def code(*arguments: str) -> int:
        with pytest.raises(SystemExit) as caught:
            main(["bench", *arguments])
        return caught.value.code or 0

    assert code("accept", "good.json", "--output", "baseline.json") == 0
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    Path("summary.md").write_text("of another step\n")
    assert code("gate", "good.json", "--baseline", "baseline.json", "--junit", "out/gate.xml") == 0
    assert "::error" not in capfd.readouterr().out
    assert code("gate", "slow.json", "--baseline", "baseline.json", "--junit", "out/gate.xml") == 1
    shown = capfd.readouterr().out
    assert "::error title=s%3A lora%2C step time::" in shown and "checks FAIL: lora (step time), dora (step time)." in shown
    assert ElementTree.parse("out/gate.xml").getroot().get("failures") == "2"
    text = Path("summary.md").read_text()
    assert text.startswith("of another step\n") and "all 9 checks pass" in text and "2 of 9 checks FAIL" in text
    assert code("gate", "slow.json", "--baseline", "baseline.json", "--time-margin", "0.2") == 0


def test_bleu_is_judged_in_its_own_points():
    """The trap: a margin of two points of a share is two hundredths of a point of BLEU, whose hundred is a hundred."""

    def runs_of(mean):
        return [record("lora", s, [1, 0]).model_copy(update={"after": {"bleu": mean + 0.01 * s}, "outcomes": [], "examples": ""}) for s in range(3)]

    known = accept(results_of(*runs_of(30.0), metric="bleu"))
    verdict = gate(results_of(*runs_of(29.9), metric="bleu"), known)[0]
    assert verdict.passed and verdict.check == "bleu" and verdict.numbers()[:2] == ["29.9", "30.0"]
    assert not gate(results_of(*runs_of(24.0), metric="bleu"), known)[0].passed
