"""The report of a whole suite: Markdown, the HTML page (looked at in Chromium where there is one), figures."""

from __future__ import annotations

import importlib.util
import json
import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from synthetic_results import HOSTILE, METHODS, TASKS, failed, record, synthetic, write

from peftkit.bench import palette
from peftkit.bench.answers import KEPT, read_answers, shared_examples, wrong_answers
from peftkit.bench.cells import Results, load_results, write_results
from peftkit.bench.charts import Axis, figures, mean_curve, pareto, thin
from peftkit.bench.compare import compare, task_names
from peftkit.bench.overview import comparisons_by_task, in_one_sentence, score
from peftkit.bench.page import html
from peftkit.bench.plots import save_plots
from peftkit.bench.power import plan
from peftkit.bench.records import Record, Searched
from peftkit.bench.report import markdown, notes, table
from peftkit.bench.statistics import difference, pooled_accuracy
from peftkit.bench.svg import Scale, log_ticks, ticks
from peftkit.cli import main

ROOT = Path(__file__).parents[1]
CI = ROOT / "benchmarks" / "results" / "ci.json"


def screenshots():
    """benchmarks/screenshots.py, which is no package."""
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "benchmarks" / "screenshots.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["screenshots"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


def small(hostile: bool = False) -> Results:
    """One task and two methods of the synthetic suite: what is drawn into files takes its time."""
    results = synthetic(hostile=hostile)
    cells = [each for each in results.cells if each.task.startswith("sql") and each.method in ("lora", "dora")]
    return results.model_copy(update={"cells": cells})


def results_of(*cells, **changes) -> Results:
    return Results(**({"suite": "s", "metric": "exact_match", "created": "2026-01-01T00:00:00+00:00", "cells": list(cells)} | changes))


# --- what is compared ---------------------------------------------------------------------------------------------------------


def test_search_and_timing_cells_are_in_no_accuracy():
    results = synthetic()
    assert {each.stage for each in results.cells} == {"search", "final", "timing"}
    by_method = {row.method: row for row in table(results)}
    finals = [each.after["exact_match"] for each in results.cells if each.stage == "final" and each.method == "lora"]
    assert by_method["lora"].done == len(finals) == 9
    assert by_method["lora"].accuracy.mean == pytest.approx(sum(finals) / 9)
    assert by_method["dora"].step_ratio == 1.31
    assert results.methods["diverging"][0].status == "failed"


def test_a_method_without_a_final_cell_keeps_its_row():
    results = results_of(record("lora", "", 0, 0.8, 0.1), record("dora", "", 0, 0.8, 0.1, stage="search"))
    assert [(row.method, row.done) for row in table(results)] == [("lora", 1), ("dora", 0)]
    assert "dora has no finished seed" in markdown(results)


def test_tasks_weigh_the_same_whatever_their_size():
    cells = [record(method, "small", seed, level, 0.1, examples=20) for method, level in (("a", 0.9), ("b", 0.1)) for seed in range(3)]
    cells += [record(method, "large", seed, 0.5, 0.1, examples=200) for method in "ab" for seed in range(3)]
    over_all, (small_one, large) = compare(results_of(*cells))[0], comparisons_by_task(results_of(*cells))
    assert (small_one.task, large.task, over_all.task) == ("small", "large", None)
    assert over_all.difference.mean == pytest.approx((small_one.difference.mean + large.difference.mean) / 2)
    assert [each.outcome for each in (small_one, large, over_all)] == ["worse", "equal", "worse"]
    by_task = [mean for mean in (score([c for c in cells if c.method == "a" and c.task == task], "exact_match").mean for task in ("small", "large"))]
    assert score([c for c in cells if c.method == "a"], "exact_match").mean == pytest.approx(sum(by_task) / 2)


def test_a_method_that_lacks_a_task_is_not_compared_over_all():
    cells = [record(method, task, seed, 0.8, 0.1) for method in "ab" for task in ("x", "y") for seed in range(2) if (method, task) != ("b", "y")]
    found = compare(results_of(*cells, failed("b", "y", 0, "crash", "boom")))[0]
    assert found.outcome == "unknown" and "b has no finished seed on y" in found.words()


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ({"a": 0.5}, "a: "),
        ({"a": 0.5, "b": 0.5}, "b cannot be told apart from a (3 seeds; 6 of 6 cells done)."),
        ({"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.5}, "None of 3 methods can be told apart from a (3 seeds; 12 of 12 cells done)."),
        ({"a": 0.2, "b": 0.9}, " points) is better than a (3 seeds"),
        ({"a": 0.9, "b": 0.2, "c": 0.1}, " points) are worse than a (3 seeds"),
    ],
)
def test_what_is_known_in_a_sentence(levels, said):
    cells = [record(method, "", seed, level, 0.1) for method, level in levels.items() for seed in range(3)]
    assert said in in_one_sentence(results_of(*cells))


def test_nothing_measured_is_said():
    assert in_one_sentence(results_of()) == "Nothing is measured; 0 of 0 cells done."
    only_failed = results_of(failed("a", "", 0, "crash", "boom"), failed("b", "", 0, "crash", "boom"))
    assert "b cannot be compared with a" in in_one_sentence(only_failed) and "2 failed" in in_one_sentence(only_failed)
    for results in (results_of(), only_failed):
        assert "No cell is done." in html(results) and markdown(results)


def test_markdown_says_first_what_is_known():
    lines = markdown(synthetic()).splitlines()
    assert lines[0] == "### Suite synthetic: exact_match"
    assert lines[2].startswith("lora-loraplus (+") and "54 of 56 cells done, 2 failed" in lines[2]
    assert lines[4].startswith("| method | cells | before | accuracy")
    assert any(line.startswith("| method | sql | tool-calls | units |") for line in lines)
    evil = markdown(synthetic(hostile=True))
    assert "<script" not in evil and "&lt;script" in evil


# --- the answers that results.json keeps --------------------------------------------------------------------------------------


def test_answers_are_kept_once_for_a_task_and_cut(tmp_path):
    import json

    lines = [{"set": "eval", "index": i, "correct": i == 0, "prompt": "p" * 300, "prediction": f"no {i}", "answer": f"a{i}"} for i in (2, 0, 1)]
    lines.append({"set": "builtin:copy/test", "index": 0, "correct": False, "prompt": "", "prediction": "other", "answer": ""})
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_answers(path, "eval")
    assert wrong_answers(rows) == {"1": "no 1", "2": "no 2"}
    kept = shared_examples([("t", path), ("t", tmp_path / "not looked at"), ("gone", tmp_path / "missing")], "eval")
    assert list(kept) == ["t"] and [row["answer"] for row in kept["t"]] == ["a0", "a1", "a2"]
    assert len(kept["t"][0]["prompt"]) == KEPT and kept["t"][0]["prompt"].endswith("…")


def test_results_with_answers_are_read_back(tmp_path):
    write_results(tmp_path / "results.json", synthetic())
    assert load_results(tmp_path) == synthetic()
    assert (tmp_path / "results.json").stat().st_size < 3 * 2**20
    write_results(tmp_path / "results.json", load_results(CI))  # made before answers were kept
    assert load_results(tmp_path) == load_results(CI)


# --- figures ------------------------------------------------------------------------------------------------------------------


def test_the_pareto_front_holds_what_nothing_beats():
    points = {"cheap": (1.0, 0.5), "good": (3.0, 0.9), "beaten": (3.0, 0.8), "dear": (4.0, 0.9), "middle": (2.0, 0.7), "twin": (1.0, 0.5)}
    assert pareto(points) == ["cheap", "twin", "middle", "good"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.72, 0.93), (873, 1019), (-1e-6, 1e-6), (0, 120)])
@pytest.mark.parametrize("most", [2, 5, 9])
def test_ticks_are_round_and_within(low, high, most):
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most + 1 and all(low <= tick <= high for tick in found)
    steps = {round((b - a) / (high - low), 9) for a, b in pairwise(found)}
    assert len(steps) <= 1


def test_log_ticks_and_scales():
    assert log_ticks(-3, 0, 5) == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])
    assert log_ticks(-2.1, -1.2, 6) == pytest.approx([1e-2, 2e-2, 5e-2])
    scale = Scale(Axis("x", str, log=True), [1.0, 100.0], 0, 300, 5)
    assert scale(10.0) == pytest.approx(150)
    names = Scale(Axis("", str, categories=("a", "b")), [], 0, 100, 5)
    assert names.text(1.0) == "b" and names(0.5) == pytest.approx(50)


def test_curves_are_thinned_by_means_and_averaged_where_all_have_a_step():
    curve = [(float(i), float(i % 2)) for i in range(1, 161)]
    assert len(thin(curve)) == 80 and {y for _, y in thin(curve)} == {0.5}
    assert mean_curve([[(1, 2.0), (2, 4.0), (3, 1.0)], [(1, 4.0), (2, 0.0)]]) == [(1, 3.0), (2, 2.0)]
    assert mean_curve([[(1, 2.0), (3, 4.0)], [(2, 1.0), (4, 3.0)]]) == [(2, 2.0), (3, 3.0)]  # 3 and 1, 4 and 2: no step in common


def test_every_figure_is_there_and_says_what_it_shows():
    found = {figure.key: figure for figure in figures(synthetic())}
    assert list(found) == ["accuracy", "memory", "step-time", *(f"learning-rates-{task}" for task in TASKS), *(f"loss-{task}" for task in TASKS)]
    assert len(found["accuracy"].charts) == 4 and len(found["loss-sql"].charts) == len(METHODS)
    assert all(chart.told and chart.series for figure in found.values() for chart in figure.charts)
    rates = found["learning-rates-sql"].charts[0].series[0]
    assert {(mark.x, mark.hollow) for mark in rates.marks} == {(1e-3, True), (3e-3, True), (1e-2, True), (3e-3, False)}
    old = {figure.key: figure for figure in figures(older())}
    assert not old["loss"].charts and "no loss curves" in old["loss"].note and "one learning rate" in old["learning-rates"].note


def test_figures_as_files(tmp_path):
    results = small()
    evil = [each.model_copy(update={"method": each.method + HOSTILE + "$x$"}) for each in results.cells]
    written = save_plots(results.model_copy(update={"cells": evil}), tmp_path)
    names = {path.name for path in written}
    assert {"accuracy.svg", "accuracy.png", "memory.svg", "step-time.png", "loss.svg", "learning-rates.png"} <= names
    assert all(path.parent == tmp_path and path.stat().st_size > 1000 for path in written)
    assert "<script" not in (tmp_path / "accuracy.svg").read_text()


def contrast(a: str, b: str) -> float:
    """Contrast of two colours as WCAG counts it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("theme", "colours"), [("light", palette.LIGHT), ("dark", palette.DARK)])
def test_colours_can_be_seen(theme, colours):
    assert len(set(colours)) == len(colours) == 10
    page = palette.PAGE[theme]
    assert min(contrast(colour, page) for colour in (*colours, palette.GREY)) >= 3
    assert contrast(palette.TEXT[theme], page) >= 7 and contrast(palette.MUTED[theme], page) >= 4.5


# --- the page -----------------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Tags, ids and addresses of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "action", "style") or key.startswith("on"):
                self.links.append(f"{key}={value}")
            if key in ("aria-labelledby", "for"):
                self.references += value.split()


@pytest.mark.parametrize("hostile", [False, True])
def test_the_page_is_whole_and_asks_for_nothing(hostile):
    results = synthetic(hostile=hostile)
    text = html(results)
    page = Outline(text)
    assert len(text.encode()) < 3 * 2**20
    assert len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)
    assert page.links and all(link.startswith("href=#") for link in page.links)
    assert page.tags.count("script") == 2 and HOSTILE not in text  # the answers and the page's own
    assert "default-src 'none'" in unescape(text) and "unsafe-inline" not in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text.split("<script>")[0])
    for said in ("Traceback (most recent call last)", "A paper, table 2", "learning_rate: 0.003", "cannot be told apart", "Test", "torch 2.13.0"):
        assert said in text
    assert html(results) == text  # equal results, equal page


def older() -> Results:
    """Results from before curves and answers were kept, and step times measured."""
    found = load_results(CI)
    cells = [each.model_copy(update={"curve": [], "wrong": {}, "learning_rate": None}) for each in found.cells if each.stage == "final"]
    return found.model_copy(update={"cells": cells, "examples": {}})


def test_results_from_before_are_shown_too():
    text = html(older())
    assert "None of 6 methods can be told apart from full" in text and "json-write" in text and "shown by their position" in text


def test_the_page_from_the_command_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write(small(), tmp_path / "results.json")
    for arguments, code in (
        (["--format", "html", "--output", "out/report.html", "--plots", "out/plots"], 0),
        (["--format", "htm"], 2),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["bench", "report", "results.json", *arguments])
        assert (caught.value.code or 0) == code
    assert Path("out/report.html").read_text() == html(load_results("results.json")) and Path("out/plots/memory.svg").exists()
    assert "did you mean 'html'" in " ".join(capfd.readouterr().err.split())


# --- in a browser -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    tool = screenshots()
    if tool.chromium() is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=tool.chromium(), args=list(tool.FLAGS))
        yield started, tool
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(html(synthetic(hostile=True)))
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_chromium(browser, page_file, width, scheme):
    started, tool = browser
    watched = tool.opened(started, page_file, width, scheme)
    page = watched.page
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert watched.overflow() <= 0 and page.title() == "synthetic: exact_match"  # no script in a prompt, name or traceback ran
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    wanted = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}
    assert background == wanted[scheme]
    for theme in ("light", "dark"):
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == wanted[theme]

    def column(index: int) -> list[str]:
        return page.evaluate(f"[...document.querySelectorAll('#method-table tbody tr')].map((row) => row.cells[{index}].dataset.sort)")

    header = page.locator("#method-table thead th").nth(1)
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    measured = [float(value) for value in column(1) if value]
    assert measured == sorted(measured, reverse=True) and len(measured) >= 6 and column(1)[-1] == ""  # not measured: last
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert [float(value) for value in column(1) if value] == sorted(measured) and column(1)[-1] == ""
    name = page.locator("#method-table thead th").first
    name.locator("button").focus()
    page.keyboard.press("Space")
    assert name.get_attribute("aria-sort") == "ascending" and header.get_attribute("aria-sort") == "none"

    page.select_option("#choose-better", "lora")
    page.select_option("#choose-worse", "lora-r1")
    assert re.match(r"lora is right more often than lora-r1 on \d+ of 60 examples", page.inner_text("#example-count"))
    assert HOSTILE in page.inner_text("#example-list") and "wrong answer" in page.inner_text("#example-list")  # shown as text
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == wanted["light"]
    assert not watched.said and not watched.asked
    page.close()


def test_texts_in_figures_are_not_cut(browser, page_file):
    """Every label of a figure lies within its drawing."""
    started, tool = browser
    for width in (1280, 390):
        page = tool.opened(started, page_file, width).page
        cut = page.evaluate(
            """[...document.querySelectorAll('figure svg[role=img]')].filter((svg) => svg.getBoundingClientRect().width).flatMap((svg) => {
                 const box = svg.getBoundingClientRect();
                 return [...svg.querySelectorAll('text')].filter((text) => {
                   const own = text.getBoundingClientRect();
                   return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1;
                 }).map((text) => text.textContent);
               })"""
        )
        assert [text for text in cut if "<script" not in text] == []
        page.close()


def test_the_order_of_tasks_is_that_of_the_suite():
    assert task_names(synthetic()) == list(TASKS)


def test_learning_rates_by_loss_where_search_runs_have_no_other_score():
    results = synthetic()
    cells = [each.model_copy(update={"after": {"loss": 1.0 / each.learning_rate}}) if each.stage == "search" else each for each in results.cells]
    figure = {each.key: each for each in figures(results.model_copy(update={"cells": cells}))}["learning-rates-sql"]
    assert {chart.y.label for chart in figure.charts} == {"loss"}
    assert {(mark.x, round(mark.y, 1)) for mark in figure.charts[0].series[0].marks} == {(1e-3, 1000.0), (3e-3, 333.3), (1e-2, 100.0), (3e-3, 0.2)}


@pytest.mark.parametrize(("rung", "warned"), [(40, True), (60, False)])
def test_rates_chosen_on_much_shorter_runs_are_told(rung, warned):
    """The trap: runs of 40 steps chose a rate at which runs of 120 steps break down, and the method looked worse than it is."""
    searched = Searched(
        task="sql", method="lora", rates=[0.01, 0.02], chosen=0.02, edge="highest", judged_by="held-out rows",
        losses={"0.01": [[rung, 0.7]], "0.02": [[rung, 0.6]]},
    )  # fmt: skip
    results = results_of(record("lora", "sql", 0, 0.3, 0.02, steps=120)).model_copy(update={"search": [searched]})
    told = [line for line in notes(results) if "chosen on runs of" in line]
    assert [("lora on sql" in line, f"runs of {rung} steps, for final runs of 120" in line) for line in told] == [(True, True)] * warned


# --- what a report must not say ---------------------------------------------------------------------------------------------


def by_loss(method: str, loss: float, memory: int, seed: int) -> Record:
    made = record(method, "", seed, 0.5, 0.01)
    return made.model_copy(update={"after": {"loss": loss + 0.01 * seed}, "outcomes": [], "train": made.train | {"peak_memory_bytes": memory}})


def test_where_lower_is_better_the_lower_one_reaches_the_target_and_the_front():
    cells = [by_loss(method, loss, memory, seed) for method, loss, memory in (("good", 1.0, 100), ("bad", 2.0, 200)) for seed in range(3)]
    results = results_of(*cells, metric="loss", target=1.5, higher_better=False)
    assert "Seeds that reached loss 1.5: good 3 of 3, bad 0 of 3." in notes(results)
    told = " ".join(figure.note for figure in figures(results))
    assert "On the Pareto front, from the cheapest: good." in told and "bad" not in told.split("from the cheapest: ")[1].split(".")[0]


def test_a_report_of_searches_alone_says_that_nothing_is_known():
    """What is left where the time given to a suite ended while learning rates were searched."""
    results = results_of(record("lora", "", 100, 0.5, 0.01, stage="search"), record("dora", "", 100, 0.5, 0.01, stage="search"), unfinished=6)
    text = markdown(results)
    assert "dora cannot be compared with lora" in text and "6 not run" in text and html(results)


def test_a_method_that_failed_on_a_task_has_no_mean_over_tasks():
    """The trap: full finetuning fails on the hard task, and its mean over the easy one looks the best."""
    cells = [record("lora", "easy", 0, 0.9, 0.01), record("lora", "hard", 0, 0.2, 0.01), record("full", "easy", 0, 0.9, 0.01)]
    results = results_of(*cells, failed("full", "hard", 0, "out_of_memory", "CUDA out of memory"))
    rows = {row.method: row for row in table(results)}
    assert rows["full"].accuracy is None and rows["lora"].accuracy is not None


def test_the_state_before_training_is_told_by_task():
    cells = [record(method, task, 0, 0.5, 0.01) for method in ("lora", "dora") for task in ("sql", "shell")]
    cells = [each.model_copy(update={"before": {"loss": 1.0 if each.task == "sql" else 2.0}}) for each in cells]
    assert [line for line in notes(results_of(*cells)) if line.startswith("Before")] == [
        "Before training (sql): loss 1.0000.", "Before training (shell): loss 2.0000.",
    ]  # fmt: skip
    cells[-1].before["loss"] = 3.0
    told = [line for line in notes(results_of(*cells)) if line.startswith("Before")]
    assert "Before training (shell: lora): loss 2.0000." in told and "Before training (shell: dora): loss 3.0000." in told


def test_what_would_settle_a_difference_counts_the_other_comparisons():
    apart = difference({s: [1] * (70 + s) + [0] * (30 - s) for s in range(3)}, {s: [1] * (62 + 2 * s) + [0] * (38 - 2 * s) for s in range(3)})
    assert plan(apart, 20).detectable > 1.2 * plan(apart).detectable


@pytest.mark.parametrize("tasks", [1, 4, 8])
def test_an_interval_near_certainty_holds_its_mean(tasks):
    for right in (200, 199):
        found = pooled_accuracy([[[1] * right + [0] * (200 - right)] * 3] * tasks)
        assert found.low <= found.mean <= found.high and (tasks == 1 or found.low > 0.98)


def test_answers_with_line_separators_are_read(tmp_path):
    path = tmp_path / "predictions.jsonl"
    rows = [{"set": "eval", "index": i, "answer": "a\u2028b\u0085c"} for i in range(2)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_answers(path, "eval") == rows
