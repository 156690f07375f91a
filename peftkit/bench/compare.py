"""Which methods differ: every comparison of a report, paired over tasks, seeds and examples, and corrected for there being several.

    for found in compare(results):                       # every method against the first, over all tasks
        print(found.words())
    compare(results, pairs="all", by_task=True)          # each against each, and task by task besides

What one call returns is one family of comparisons: its p values are corrected together (Holm 1979), so that a true difference of
nothing is called one in a report of twenty at most, however many methods and tasks it has. Only final cells are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from peftkit.bench.records import Record, Results
from peftkit.bench.statistics import CONFIDENCE, Difference, difference, holm, measure, pooled_difference, scalar_difference

Pairs = Literal["first", "all"]


@dataclass(frozen=True)
class Comparison:
    """One method against another."""

    method: str
    other: str
    task: str | None
    """None: over all tasks, each counting the same."""
    difference: Difference | None = None
    """`method` minus `other`; None where there is nothing to compare."""
    adjusted_p: float | None = None
    """Corrected for all comparisons of the same call."""
    comparisons: int = 1
    """How many those are."""
    caveat: str = ""
    """Why there is no difference, or what stands against trusting it."""

    @property
    def told_apart(self) -> bool:
        return self.difference is not None and self.difference.seeds > 1 and self.adjusted_p is not None and self.adjusted_p < 1 - CONFIDENCE

    @property
    def better(self) -> bool:
        """Whether `method` is told to be the better one."""
        return self.told_apart and self.difference is not None and self.difference.better

    @property
    def outcome(self) -> Literal["better", "worse", "equal", "unknown"]:
        """Of `method`; equal: the two cannot be told apart."""
        if self.difference is None:
            return "unknown"
        return "equal" if not self.told_apart else "better" if self.better else "worse"

    def words(self) -> str:
        where = f"{self.task}: " if self.task else ""
        if self.difference is None:
            return f"{where}{self.method} cannot be compared with {self.other}: {self.caveat}"
        said = self.difference.words(self.method, self.other, self.adjusted_p, self.comparisons)
        return f"{where}{said}" + (f"; {self.caveat}" if self.caveat else "")


def compare(results: Results, pairs: Pairs = "first", by_task: bool = False, metric: str | None = None) -> list[Comparison]:
    """Comparisons over all tasks, then (`by_task`, where there are several) those of each task, in the order of the results.

    pairs: every other method against the first, or each against each. metric: that of the results by default; one other than it is
    compared by its values per run, as are metrics without outcomes per example.
    """
    final = results.methods
    methods, tasks = list(final), task_names(results)
    couples = [(b, a) for a, b in combinations(methods, 2) if pairs == "all" or a == methods[0]]
    places: list[str | None] = [None, *(tasks if by_task and len(tasks) > 1 else [])]
    found = [_compare(a, b, task, final, tasks, results, metric or results.metric) for task in places for a, b in couples]
    with_p = [comparison for comparison in found if comparison.difference is not None]
    adjusted = dict(zip(map(id, with_p), holm([comparison.difference.p for comparison in with_p if comparison.difference]), strict=True))
    return [replace(each, adjusted_p=adjusted[id(each)], comparisons=len(with_p)) if id(each) in adjusted else each for each in found]


def against(results: Results, method: str, other: str, task: str | None = None) -> Comparison:
    """One comparison by itself, on one task or (None) over all."""
    found = _compare(method, other, task, results.methods, task_names(results), results, results.metric)
    return replace(found, adjusted_p=found.difference.p) if found.difference else found


def task_names(results: Results) -> list[str]:
    """In the order of the results; one, the empty name, where the suite has no tasks."""
    return list(dict.fromkeys(record.task for record in results.cells if record.stage == "final"))


def done_on(records: list[Record], task: str) -> dict[int, Record]:
    """Seed -> record of the cells of a task that are done."""
    return {record.seed: record for record in records if record.task == task and record.status == "done"}


def _compare(
    method: str, other: str, task: str | None, final: dict[str, list[Record]], tasks: list[str], results: Results, metric: str
) -> Comparison:  # fmt: skip
    chosen = tasks if task is None else [task]
    if not chosen:
        return Comparison(method, other, task, caveat="no final cell is done")
    sides = [(done_on(final[method], each), done_on(final[other], each)) for each in chosen]
    for each, (a, b) in zip(chosen, sides, strict=True):
        if not a or not b:
            on = f" on {each}" if each and task is None else ""
            return Comparison(method, other, task, caveat=f"{method if not a else other} has no finished seed{on}")
        for name, records in ((method, a), (other, b)):
            if any(record.after.get(metric) is None for record in records.values()):
                return Comparison(method, other, task, caveat=f"{name} did not measure {metric}")
    whole = metric == results.metric and all(record.outcomes for side in sides for records in side for record in records.values())
    if whole and any(len({record.examples for record in (*a.values(), *b.values())}) > 1 for a, b in sides):
        return Comparison(method, other, task, caveat="they did not answer the same examples")
    failed = [_failed(name, [record for record in final[name] if record.task in chosen]) for name in (method, other)]
    caveat = ", ".join(text for text in failed if text)
    return Comparison(method, other, task, _difference(sides, metric, whole), caveat=caveat)


def _difference(sides: list[tuple[dict[int, Record], dict[int, Record]]], metric: str, whole: bool) -> Difference:
    if not whole:
        return scalar_difference([({s: r.after[metric] for s, r in a.items()}, {s: r.after[metric] for s, r in b.items()}) for a, b in sides], measure(metric))
    outcomes = [({s: r.outcomes for s, r in a.items()}, {s: r.outcomes for s, r in b.items()}) for a, b in sides]
    return difference(*outcomes[0]) if len(outcomes) == 1 else pooled_difference(outcomes)


def _failed(method: str, records: list[Record]) -> str:
    """The mean over the seeds that got through is that of the luckier ones."""
    failed = sum(record.status == "failed" for record in records)
    return f"{failed} of {len(records)} cells of {method} failed and are left out" if failed else ""
