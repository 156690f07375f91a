"""Methods side by side: accuracy by task and over all tasks, and every method against the first one.

Tasks weigh the same. Runs of different tasks share neither training nor examples, so the errors of their means are independent:
the interval of the mean over T tasks reaches sqrt(sum of squared reaches) / T to each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftkit.bench.records import Record, Results
from peftkit.bench.statistics import Difference, Interval, accuracy, difference, mean_over_seeds

SHARES = ("exact_match", "choice_accuracy")  # metrics that are a share of examples, 0 to 1
LOWER_IS_BETTER = ("loss", "perplexity")
POOLED = ""  # in place of a task: the mean over all


@dataclass(frozen=True)
class Comparison:
    """A method against the first of the suite, on one task or (POOLED) over all."""

    method: str
    reference: str
    task: str
    words: str
    difference: Difference | None
    """None where there is nothing to compare; `words` says why."""

    @property
    def outcome(self) -> str:
        """better, worse, equal (cannot be told apart) or unknown."""
        if self.difference is None:
            return "unknown"
        if not self.difference.told_apart:
            return "equal"
        return "better" if self.difference.mean > 0 else "worse"


def tasks(results: Results) -> list[str]:
    """The tasks of the final cells in the order of the suite; [""] where the suite has one task without a name."""
    return list(dict.fromkeys(record.task for record in results.cells if record.stage == "final"))


def done(records: Sequence[Record], task: str | None = None) -> list[Record]:
    """Those that ended well, of all tasks or one."""
    return [record for record in records if record.status == "done" and task in (None, record.task)]


def score(records: Sequence[Record], metric: str) -> Interval | None:
    """The metric of a method's records, over their tasks; None where no cell is done."""
    by_task = [_one_task(part, metric) for task in dict.fromkeys(r.task for r in records) if (part := done(records, task))]
    return pooled(by_task) if by_task else None


def pooled(intervals: Sequence[Interval]) -> Interval:
    """The mean of independent means; without an interval where one of them has none."""
    mean, count = sum(each.mean for each in intervals) / len(intervals), len(intervals)
    below, above = 0.0, 0.0
    for each in intervals:
        if each.low is None or each.high is None:
            return Interval(mean)
        below, above = below + (each.mean - each.low) ** 2, above + (each.high - each.mean) ** 2
    return Interval(mean, mean - below**0.5 / count, mean + above**0.5 / count)


def comparisons(results: Results) -> list[Comparison]:
    """Every other method against the first, over all tasks."""
    reference, *others = results.methods or [""]
    return [against(results, method, reference) for method in others]


def comparisons_by_task(results: Results) -> list[Comparison]:
    """Every other method against the first, task by task."""
    reference, *others = results.methods or [""]
    return [against(results, method, reference, task) for task in tasks(results) for method in others]


def _one_task(records: Sequence[Record], metric: str) -> Interval:
    """Over seeds and examples where all seeds answered the same ones, else over seeds alone."""
    same = len({record.examples for record in records}) == 1 and all(record.outcomes for record in records)
    if same and metric in SHARES:
        return accuracy([record.outcomes for record in records])
    return mean_over_seeds([record.after[metric] for record in records])


def against(results: Results, method: str, reference: str, task: str = POOLED) -> Comparison:
    """One method against another, over all tasks or on one."""
    over = [task] if task else tasks(results)
    found = []
    for each in over:
        a, b = done(results.methods[method], each), done(results.methods[reference], each)
        where = f" on {each}" if each else ""
        if not a or not b:
            why = f"{method if not a else reference} has no finished seed{where}"
            return Comparison(method, reference, task, f"{method} cannot be compared with {reference}: {why}", None)
        if len({record.examples for record in (*a, *b)}) > 1 or not all(record.outcomes for record in (*a, *b)):
            words = f"{method} cannot be compared with {reference}: they did not answer the same examples{where}"
            return Comparison(method, reference, task, words, None)
        found.append(difference({record.seed: record.outcomes for record in a}, {record.seed: record.outcomes for record in b}))
    if not found:
        return Comparison(method, reference, task, f"{method} cannot be compared with {reference}: no final cell has run", None)
    span = pooled([Interval(each.mean, each.low, each.high) for each in found])
    assert span.low is not None and span.high is not None
    over_all = Difference(span.mean, span.low, span.high, min(each.seeds for each in found)) if len(found) > 1 else found[0]
    where = f" on {task}" if task else f", mean of {len(over)} tasks" if len(over) > 1 else ""
    return Comparison(method, reference, task, over_all.words(method, reference) + where, over_all)


def in_one_sentence(results: Results) -> str:
    """What is known, first of all: which methods differ from the first one and whether all cells ran."""
    found = comparisons(results)
    cells = [record for records in results.methods.values() for record in records]
    state = f"{len(done(cells))} of {len(cells)} cells done" + (f", {len(results.failed)} failed" if results.failed else "")
    seeds = {len(done(records)) // max(len(tasks(results)), 1) for records in results.methods.values()}
    by_outcome = {outcome: [each.method for each in found if each.outcome == outcome] for outcome in ("better", "worse", "equal", "unknown")}
    if not found:
        only = next(iter(results.methods), None)
        interval = score(results.methods[only], results.metric) if only else None
        said = f"{only}: {percent_or_number(results.metric, interval.mean)} {results.metric}" if interval else "Nothing is measured"
        return f"{said}; {state}."
    reference, parts = found[0].reference, []
    for outcome in ("better", "worse"):
        named = [f"{each.method} ({100 * each.difference.mean:+.1f} points)" for each in found if each.outcome == outcome and each.difference]
        if named:
            parts.append(f"{_and(named)} {'is' if len(named) == 1 else 'are'} {outcome} than {reference}")
    if equal := by_outcome["equal"]:
        some = f"{_and(equal) if len(equal) < 4 else f'{len(equal)} methods'} cannot be told apart"
        parts.append(f"{f'None of {len(equal)} methods can be told apart' if len(equal) == len(found) > 2 else some} from {reference}")
    if by_outcome["unknown"]:
        parts.append(f"{_and(by_outcome['unknown'])} cannot be compared with {reference}")
    spread = f"{min(seeds)} to {max(seeds)} seeds" if len(seeds) > 1 else "1 seed" if seeds == {1} else f"{max(seeds)} seeds"
    each_task = " a task" if len(tasks(results)) > 1 else ""
    return f"{'; '.join(parts)} ({spread}{each_task}; {state})."


def percent_or_number(metric: str, value: float) -> str:
    """A value of the metric as people read it."""
    return f"{value:.1%}" if metric in SHARES else f"{value:.4g}"


def _and(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
