"""Runs a suite: learning rates are searched, then the final cells run, then step times are measured alone; results.json holds it all.

`<folder>/<suite>/<cell>/` is the folder of a cell (runner.py), `<folder>/<suite>/results.json` holds all records together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from peftkit.bench.keys import Code
from peftkit.bench.launch import Launcher
from peftkit.bench.records import Record, Results, Searched, load_results, read_json_file, results_of, write_results
from peftkit.bench.runner import Command, Runner, TimeOver, peftkit_run
from peftkit.bench.search import search
from peftkit.bench.suite import Cell, Suite, cells, final_changes, in_steps, make_cell, merge, timing_cells
from peftkit.config import ConfigError, suggest

__all__ = ["Record", "Results", "Searched", "load_results", "peftkit_run", "read_json_file", "run_suite", "write_results"]

PROBE = 10  # steps of the short run that counts tokens and seconds per step, for a budget of those


def run_suite(
    suite: Suite, folder: str | Path, jobs: int = 1, only: Sequence[str] | None = None, console: Console | None = None,
    command: Command | None = None, launcher: Launcher | None = None, seconds: float | None = None,
) -> list[Record]:  # fmt: skip
    """Runs what is not done yet, `jobs` cells at a time, and writes results.json; returns the records of all cells that have one.

    only: the methods to run; the others keep the records they have. command: makes a cell's command line of its cell.yaml,
    by default `peftkit_run`. seconds: the time for all; what is not done by then is left, and the next run goes on with it.
    KeyboardInterrupt ends the running cells and is raised again; those have no record then and go on the next time.
    Raises ConfigError for an unknown method in `only`.
    """
    console = console or Console(stderr=True)
    for method in only or []:
        if method not in suite.methods:
            known = f"{suggest(method, suite.methods)} (it has: {', '.join(suite.methods)})"
            raise ConfigError(f"suite {suite.name} has no method {method!r}{known}")
    home, code = Path(folder) / suite.name, Code()
    deadline = None if seconds is None else time.monotonic() + seconds
    runner = Runner(suite, home, jobs, only, command or peftkit_run, console, launcher, deadline)
    planned, searched, steps, unfinished = _Plan(suite), [], {}, 0
    try:
        searched = _search(suite, runner, code)
        rates = {(found.task, found.method): found.chosen for found in searched}
        steps = _steps(suite, runner, code, rates, planned)
        planned.final = [cell for cell in cells(suite, rates, steps) if _decided(suite, cell, rates, steps)]
        _run(runner, planned.final, "")
        runner.jobs, planned.timing = 1, timing_cells(suite)  # one at a time, so that nothing else falls on the measured steps
        _run(runner, planned.timing, "step times: ")
    except TimeOver:
        unfinished = max(planned.count() - sum(cell.folder in runner.records for cell in planned.final + planned.timing), 1)
        console.print(f"the time is over; {unfinished} cells are not done, and the same command with more time goes on with them", style="yellow")
    if Code().files != code.files:  # the keys are of the code at the start, so the next run starts the cells anew
        console.print("warning: peftkit's files changed while the suite ran: its cells may be of different code; run it again", style="yellow")
    searches = [record for name, record in sorted(runner.records.items()) if record.stage == "search" and name not in planned.probes]
    kept = [[record for cell in part if (record := runner.kept(cell))] for part in (planned.final, planned.timing)]
    records = [*kept[0], *planned.lost, *searches, *kept[1]]
    write_results(home / "results.json", results_of(suite, records, searched, steps, unfinished))
    return records


class _Plan:
    """The cells that are known so far; final ones are, once the rates are."""

    def __init__(self, suite: Suite):
        self.suite = suite
        self.final: list[Cell] = []
        self.timing: list[Cell] = []
        self.probes: set[str] = set()
        """Folders of the short runs of a budget, which are no results."""
        self.lost: list[Record] = []
        """Of those that failed: they stand for the final cells that cannot be planned without them."""

    def count(self) -> int:
        final = len(self.final) or len(self.suite.task_names) * sum(len(self.suite.seeds_of(method)) for method in self.suite.methods)
        return final + (len(self.timing) or (len(self.suite.methods) if self.suite.timing else 0))


def _decided(suite: Suite, cell: Cell, rates: dict[tuple[str, str], float], steps: dict[tuple[str, str], int]) -> bool:
    """Whether all that a search or a short run has to say of a cell was found out."""
    at, budget = (cell.task, cell.method), suite.budget
    measured = budget is not None and (budget.tokens is not None or budget.seconds is not None)
    return (at in rates or len(suite.rates_of(cell.method)) < 2) and (at in steps or not measured)


def _run(runner: Runner, planned: list[Cell], what: str) -> None:
    """Runs cells that do not depend on each other."""
    if not planned:
        return
    todo = sum(runner.kept(cell) is None and not runner._left_out(cell) for cell in planned)
    runner.console.print(f"suite {runner.suite.name}: {what}{len(planned)} cells, {todo} to run", highlight=False)
    started = len(runner.new)

    def shown(record: Record) -> str | None:
        done = runner.new[started:]
        return f"[{done.index(record) + 1}/{todo}] {record.line(runner.suite.metric)}" if record in done else None

    runner.all([partial(runner.record, cell) for cell in planned], shown)


def _search(suite: Suite, runner: Runner, code: Code) -> list[Searched]:
    """The learning rate of every method that has several, on every task; tasks and methods side by side, the cells of one search in turn."""
    wanted = [(task, method) for task in suite.task_names for method in suite.methods if len(suite.rates_of(method)) > 1]
    if not wanted:
        return []
    most = sum(len(suite.rates_of(method)) * len(suite.search.rungs) * len(suite.search.seeds) for _, method in wanted)
    runner.console.print(f"suite {suite.name}: a learning rate for {len(wanted)} methods on tasks, at most {most} short runs", highlight=False)
    return runner.all([partial(search, suite, task, method, code, runner.record) for task, method in wanted], lambda found: found.words())


def _steps(suite: Suite, runner: Runner, code: Code, rates: dict[tuple[str, str], float], planned: _Plan) -> dict[tuple[str, str], int]:
    """The steps that a budget of tokens or seconds comes to, from a short run of each method on each task; without those whose run failed."""
    budget = suite.budget
    if budget is None or (budget.tokens is None and budget.seconds is None):
        return {}

    def measure(task: str, method: str) -> tuple[tuple[str, str], int] | None:
        quick = {"eval": {"metrics": ["loss"], "retained": [], "before": False, "choices": None, "choice_length": "total", "match": "text"}}
        changes = merge(final_changes(suite, method, rates.get((task, method)), None), in_steps(PROBE))
        cell = make_cell(suite, code, task, method, suite.search.seeds[0], merge(changes, quick), "search")
        record = runner.record(cell)
        planned.probes.add(cell.folder)
        if record.status == "failed":  # as its final cells would
            planned.lost += [record.model_copy(update={"stage": "final", "seed": seed}) for seed in suite.seeds_of(method)]
            return None
        of_step, allowed = (record.train["tokens"], budget.tokens) if budget.tokens else (record.train["seconds"], budget.seconds)
        assert allowed is not None
        return (task, method), max(round(allowed * record.train["steps"] / of_step), 1)

    wanted = [partial(measure, task, method) for task in suite.task_names for method in suite.methods]
    return dict(found for found in runner.all(wanted, lambda found: None) if found is not None)
