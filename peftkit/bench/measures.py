"""What a method is besides accurate, from its records: how soon it gets to a loss, what it forgets, how much its learning rate matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peftkit.bench.compare import done_on, task_names
from peftkit.bench.records import Record, Results
from peftkit.bench.statistics import Interval, Measure, mean_over_seeds, mean_over_tasks, measure

WINDOW = 5  # logged steps that a smoothed training loss is the mean of
FACTOR = 3.0  # how far off the best learning rate sensitivity looks
NEAR = 1.25  # rates within this factor count as the same


# --- to a target loss ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """The first logged step of one run at which its loss was at or below a target, and the seconds of training until then."""

    seed: int
    step: int | None
    """None: not by the end, or not at all, as the run failed."""
    seconds: float | None
    last_step: int
    """The last that was logged."""
    failed: bool = False


@dataclass(frozen=True)
class ToTarget:
    """The runs of one method on one task."""

    method: str
    task: str
    target_loss: float
    loss: str
    """Which one was read: evaluation loss, or training loss as a mean of WINDOW logged steps."""
    runs: list[Reached]

    @property
    def steps(self) -> Interval | None:
        """Mean over seeds with its interval; None where a run did not get there, as the others alone would look too fast."""
        steps = [run.step for run in self.runs if run.step is not None]
        return mean_over_seeds(steps) if steps and len(steps) == len(self.runs) else None

    @property
    def seconds(self) -> Interval | None:
        seconds = [run.seconds for run in self.runs if run.seconds is not None]
        return mean_over_seeds(seconds) if seconds and len(seconds) == len(self.runs) else None

    def words(self) -> str:
        name = f"{self.method} on {self.task}" if self.task else self.method
        if not self.runs:
            return f"{name}: no run logged its {self.loss}"
        reached = [run for run in self.runs if run.step is not None]
        start = f"{name}: {len(reached)} of {len(self.runs)} seeds reached {self.loss} {self.target_loss:g}"
        censored = [run for run in self.runs if run.step is None and not run.failed]
        late = f"; {len(censored)} had not by step {max(run.last_step for run in censored)}" if censored else ""
        failed = sum(run.failed for run in self.runs)
        late += f"; {failed} failed" if failed else ""
        if not reached:
            return start + late
        steps, seconds = self.steps, self.seconds
        if steps is None or seconds is None:
            return f"{start}, at step {', '.join(str(run.step) for run in reached)}{late}"
        return f"{start}, after {_span(steps, 0)} steps and {_span(seconds, 1)} s"


def to_target(results: Results, target_loss: float) -> list[ToTarget]:
    """For every method and task, when its final runs reached a loss. Evaluation loss is read where all runs of the task have one."""
    found = []
    for task in task_names(results):
        runs = {method: done_on(records, task) for method, records in results.methods.items()}
        evaluated = all(record.evaluations for records in runs.values() for record in records.values())
        loss = "evaluation loss" if evaluated else f"training loss (mean of {WINDOW} logged steps)"
        for method, records in runs.items():
            reached = [_reached(record, target_loss, evaluated) for record in records.values() if record.evaluations or record.curve]
            failed = [record for record in results.methods[method] if record.task == task and record.status == "failed"]
            reached += [Reached(record.seed, None, None, 0, failed=True) for record in failed]
            found.append(ToTarget(method, task, target_loss, loss, reached))
    return found


def _reached(record: Record, target: float, evaluated: bool) -> Reached:
    points = record.evaluations if evaluated else smoothed(record.curve)
    step, seconds = next(((int(step), seconds) for step, loss, seconds in points if loss <= target), (None, None))
    last = int(points[-1][0]) if points else 0
    return Reached(record.seed, step, seconds, last)


def smoothed(curve: Sequence[Sequence[float]]) -> list[tuple[float, float, float]]:
    """[(step, mean loss of the last WINDOW logged steps, seconds)]; it begins where there are as many."""
    losses = [loss for _, loss, _ in curve]
    return [(step, float(np.mean(losses[i + 1 - WINDOW : i + 1])), seconds) for i, (step, _, seconds) in enumerate(curve) if i + 1 >= WINDOW]


# --- forgetting ---------------------------------------------------------------------------------------------------------------


def forgetting(results: Results, task: str | None = None) -> dict[str, Interval | None]:
    """Exact match lost on the retained sets (before - after, a fraction; below 0 where it rose) by method, as mean over tasks.

    None where a task has no finished run or one that did not measure it. task: that one alone.
    """
    chosen = task_names(results) if task is None else [task]
    found: dict[str, Interval | None] = {}
    for method, records in results.methods.items():
        lost = [[_lost(record) for record in done_on(records, each).values()] for each in chosen]
        whole = [[value for value in values if value is not None] for values in lost]
        measured = whole and all(values and len(kept) == len(values) for values, kept in zip(lost, whole, strict=True))
        found[method] = mean_over_tasks(whole) if measured else None
    return found


def _lost(record: Record) -> float | None:
    before, after = (side.get("retained_exact_match") for side in (record.before, record.after))
    return None if before is None or after is None else float(before) - float(after)


# --- learning rate ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """What the metric loses where the learning rate is off by FACTOR."""

    method: str
    task: str
    best_rate: float
    best: float
    """Mean of the metric at it."""
    lower: float | None
    """Lost at a third of it (or gained, below 0); None where no rate so low was tried."""
    higher: float | None
    """Lost at three times it; infinite where such runs diverged."""
    steps: int | None
    """Of the runs that were compared: of a search with several lengths, the shortest, which has all rates."""
    metric: str
    at_edge: bool
    """Whether the best rate is the lowest or the highest that was tried: the true best may lie beyond."""

    def words(self) -> str:
        m, name = measure(self.metric), f"{self.method} on {self.task}" if self.task else self.method
        sides = [(f"a third of its best learning rate {self.best_rate:g}", self.lower), ("three times it", self.higher)]
        said = [f"at {where} {_loss_words(value, m)}" for where, value in sides]
        edge = "; the best rate is at the edge of what was tried" if self.at_edge else ""
        return f"{name}: {', '.join(said)}" + (f" (runs of {self.steps} steps)" if self.steps else "") + edge


def sensitivity(results: Results) -> list[Sensitivity]:
    """Of every method and task whose learning rate was searched. Rates between two that were tried are read off the line between them."""
    groups: dict[tuple[str, str], dict[int, list[Record]]] = {}
    for record in results.cells:
        if record.stage == "search" and record.learning_rate:
            by_steps = groups.setdefault((record.method, record.task), {})
            by_steps.setdefault(int(record.recipe.get("train", {}).get("max_steps") or 0), []).append(record)
    found = []
    for (method, task), by_steps in groups.items():
        done = [record for records in by_steps.values() for record in records if record.status == "done"]
        metric = results.metric if all(results.metric in record.after for record in done) else "loss"  # a search may measure no more
        found.append(_sensitivity(method, task, by_steps, metric))
    return [each for each in found if each is not None]


def _sensitivity(method: str, task: str, by_steps: dict[int, list[Record]], metric: str) -> Sensitivity | None:
    steps, records = max(by_steps.items(), key=lambda item: (len({r.learning_rate for r in item[1]}), -item[0]))
    sign = -1.0 if measure(metric).lower_is_better else 1.0
    values: dict[float, list[float]] = {}
    for record in records:
        value = record.after.get(metric) if record.status == "done" else None
        if value is not None or record.kind == "divergence":
            values.setdefault(float(record.learning_rate or 0), []).append(-np.inf if value is None else sign * value)
    rates = sorted(values)
    means = [float(np.mean(values[rate])) for rate in rates]
    if len(rates) < 2 or not np.isfinite(max(means)):
        return None
    best = int(np.argmax(means))
    lower, higher = (None if value is None else means[best] - value for value in (_at(rates[best] * by, rates, means) for by in (1 / FACTOR, FACTOR)))
    return Sensitivity(method, task, rates[best], sign * means[best], lower, higher, steps or None, metric, best in (0, len(rates) - 1))


def _at(rate: float, rates: list[float], means: list[float]) -> float | None:
    """The metric at a learning rate, linear in its logarithm between two that were tried; None outside of them."""
    for tried, mean in zip(rates, means, strict=True):
        if 1 / NEAR <= rate / tried <= NEAR:
            return mean
    if not rates[0] < rate < rates[-1]:
        return None
    above = next(i for i, tried in enumerate(rates) if tried > rate)
    share = np.log(rate / rates[above - 1]) / np.log(rates[above] / rates[above - 1])
    if not np.isfinite(means[above]) or not np.isfinite(means[above - 1]):
        return -np.inf
    return float((1 - share) * means[above - 1] + share * means[above])


def _loss_words(lost: float | None, m: Measure) -> str:
    if lost is None:
        return "nothing was measured"
    if np.isinf(lost):
        return "it diverged"
    if m.lower_is_better:
        return f"its {m.unit.removeprefix('of ')} is {m.number(abs(lost), sign=False)} {'higher' if lost >= 0 else 'lower'}"
    return f"it {'loses' if lost >= 0 else 'gains'} {m.number(abs(lost), sign=False)} {m.unit}"


def _span(interval: Interval, digits: int) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:,.{digits}f}"
    return f"{interval.mean:,.{digits}f} ({max(interval.low, 0):,.{digits}f} to {interval.high:,.{digits}f})"
