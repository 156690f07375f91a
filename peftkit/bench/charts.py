"""What the report's figures show, as data: `svg.py` draws it into the page, `plots.py` into files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from peftkit.bench.compare import task_names
from peftkit.bench.overview import SHARES, done, percent_or_number, score
from peftkit.bench.records import Record, Results
from peftkit.bench.statistics import Interval

POINTS = 80  # of a loss curve: finer than a figure of a few hundred pixels can show
Span = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """One axis; `categories` makes it a list of names, at 0, 1, 2, ... from the top or the left."""

    label: str
    text: Callable[[float], str]
    log: bool = False
    categories: tuple[str, ...] = ()
    range: Span | None = None
    """What it shows at least; None for what the data needs."""


@dataclass(frozen=True)
class Mark:
    """A point with its whisker along x or y, and the text that a pointer over it is shown."""

    x: float
    y: float
    text: str
    x_span: Span | None = None
    y_span: Span | None = None
    hollow: bool = False
    ringed: bool = False


@dataclass(frozen=True)
class Line:
    """A line through points; bold, faint or dashed."""

    points: Sequence[Span]
    weight: str = "bold"


@dataclass(frozen=True)
class Series:
    """What belongs to one method: the same colour and the same shape in every figure. style -1 is the grey of what is there for comparison."""

    name: str
    style: int
    marks: Sequence[Mark] = ()
    lines: Sequence[Line] = ()


@dataclass(frozen=True)
class Chart:
    """One pair of axes. `told` says in a sentence what it shows, for those who do not see it."""

    title: str
    told: str
    x: Axis
    y: Axis
    series: Sequence[Series]


@dataclass(frozen=True)
class Figure:
    """Charts that stand together; `small` ones side by side. With no charts, `note` says what was not measured."""

    key: str
    title: str
    note: str
    charts: Sequence[Chart] = field(default_factory=tuple)
    small: bool = False
    folded: bool = False
    """Whether the page shows its title alone until it is asked for: the same for a second task."""


def figures(results: Results) -> list[Figure]:
    """All figures of a report, in its order."""
    several = len(task_names(results)) > 1
    found = [_accuracies(results), _against(results, "memory", "peak memory (MiB)", _peak)]
    ratio = [record for record in results.cells if record.stage == "timing" and record.status == "done"]
    found.append(_against(results, "step-time", "step time, x frozen base" if ratio else "seconds per step", _ratio(ratio) if ratio else _step_seconds))
    for of_task in (_learning_rates, _losses):
        for i, task in enumerate(task_names(results)):
            figure = of_task(results, task, f"-{task}" if several else "")
            found.append(replace(figure, folded=i > 0))
    return found


def style_of(results: Results) -> dict[str, int]:
    """method -> number of its colour and shape."""
    return {method: i for i, method in enumerate(results.methods)}


# --- accuracy -----------------------------------------------------------------------------------------------------------------


def _accuracies(results: Results) -> Figure:
    """A dot and a whisker for each method, over all tasks and for each."""
    names = task_names(results)
    charts = [_dots(results, None, f"mean of {len(names)} tasks" if len(names) > 1 else "")]
    charts += [_dots(results, task, task) for task in names] if len(names) > 1 else []
    charts = [chart for chart in charts if chart.series]
    dashed = next(iter(results.methods), "")
    note = f"Mean over seeds; whiskers: 95% interval over seeds and examples. Dashed: {dashed}, the reference." if charts else "No cell is done."
    return Figure("accuracy", f"{_named(results.metric)} with 95% intervals", note, charts, small=len(charts) > 1)


def _dots(results: Results, task: str | None, title: str) -> Chart:
    methods, series, said = tuple(results.methods), [], []
    reference = None
    for i, (method, records) in enumerate(results.methods.items()):
        found = score(records, results.metric, task_names(results) if task is None else [task])
        if found is None:
            continue
        text = with_interval(found, lambda value: percent_or_number(results.metric, value))
        series.append(Series(method, i, [Mark(found.mean, i, f"{method}: {text}", x_span=_span(found))]))
        said.append(f"{method} {text}")
        reference = found.mean if i == 0 else reference
    if reference is not None:
        series.insert(0, Series("reference", -1, lines=[Line([(reference, -0.6), (reference, len(methods) - 0.4)], "dashed")]))
    x, y = _metric_axis(results.metric), Axis("", str, categories=methods)
    return Chart(title, "; ".join(said), x, y, series)


# --- accuracy against cost ----------------------------------------------------------------------------------------------------


def _against(results: Results, key: str, label: str, cost: Callable[[str, Sequence[Record]], float | None]) -> Figure:
    """Accuracy against a cost, the Pareto front ringed and joined."""
    points: dict[str, tuple[float, Interval]] = {}
    for method, records in results.methods.items():
        value, found = cost(method, done(records)), score(records, results.metric, task_names(results))
        if value is not None and found is not None:
            points[method] = value, found
    title = f"{_named(results.metric)} against {label.partition(' (')[0]}"
    if not points:
        return Figure(key, title, "Not measured.")
    sign = 1 if results.higher_better else -1
    front = pareto({method: (value, sign * found.mean) for method, (value, found) in points.items()})
    series = [Series("Pareto front", -1, lines=[Line([(points[method][0], points[method][1].mean) for method in front], "dashed")])]
    for method, (value, found) in points.items():
        text = f"{method}: {with_interval(found, lambda share: percent_or_number(results.metric, share))} at {label} {value:,.4g}"
        series.append(Series(method, style_of(results)[method], [Mark(value, found.mean, text, y_span=_span(found), ringed=method in front)]))
    told = f"On the Pareto front, from the cheapest: {', '.join(front)}."
    x = Axis(label, lambda value: f"{value:,.4g}")
    note = f"{told} By means alone: where whiskers overlap, the order may be chance. Whiskers: 95% interval."
    return Figure(key, title, note, [Chart("", told, x, _metric_axis(results.metric), series)])


def pareto(points: dict[str, Span]) -> list[str]:
    """The names of those (cost, value) to which no other is at least as good in both and better in one; from the cheapest."""
    best = [name for name, (cost, value) in points.items() if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points.values())]
    return sorted(best, key=lambda name: points[name])


def _peak(method: str, records: Sequence[Record]) -> float | None:
    return _mean([record.train["peak_memory_bytes"] / 2**20 for record in records if "peak_memory_bytes" in record.train])


def _step_seconds(method: str, records: Sequence[Record]) -> float | None:
    return _mean([record.train["seconds"] / record.train["steps"] for record in records if record.train.get("steps") and "seconds" in record.train])


def _ratio(timed: Sequence[Record]) -> Callable[[str, Sequence[Record]], float | None]:
    return lambda method, _: _mean([record.timing["over_base"] for record in timed if record.method == method])


# --- learning rates, losses ---------------------------------------------------------------------------------------------------


def _learning_rates(results: Results, task: str, suffix: str) -> Figure:
    """The metric by learning rate, a chart for each method: search runs hollow and joined by their length, final ones filled."""
    title = "Learning rates" + (f": {task}" if suffix else "")
    cells = [record for record in results.cells if record.task == task and record.status == "done" and record.stage != "timing"]
    rates = sorted({rate for record in cells if (rate := rate_of(record))})
    by_method = {method: {rate_of(record) for record in cells if record.method == method and rate_of(record)} for method in results.methods}
    if not any(len(found) > 1 for found in by_method.values()):
        return Figure(f"learning-rates{suffix}", title, "Each method ran with one learning rate, so nothing is known of how much that choice matters.")
    cells = [record for record in cells if rate_of(record)]
    metric = results.metric if all(results.metric in record.after for record in cells) else "loss"  # search runs may be scored by their loss alone
    cells = [record for record in cells if metric in record.after]
    if not cells:
        return Figure(f"learning-rates{suffix}", title, "The runs that chose the learning rates were not scored.")
    values = [record.after[metric] for record in cells]
    log = metric not in SHARES and min(values) > 0 and max(values) / min(values) > 20
    x = Axis("learning rate", lambda value: f"{value:.0e}".replace("e-0", "e-"), log=True, range=(rates[0] / 1.3, rates[-1] * 1.3))
    y, charts = replace(_metric_axis(metric, (min(values), max(values))), log=log), []
    for method, style in style_of(results).items():
        own = [record for record in cells if record.method == method]
        marks, lines, told = [], [], []
        for stage, steps in sorted({(record.stage, record.train.get("steps", 0)) for record in own}, reverse=True):
            found: dict[float, list[float]] = {}
            for record in own:
                if (record.stage, record.train.get("steps", 0)) == (stage, steps):
                    found.setdefault(rate_of(record) or 0.0, []).append(record.after[metric])
            for rate, scores in sorted(found.items()):
                mean = statistics.fmean(scores)
                text = f"learning rate {rate:g}, {stage}, {steps} steps: {metric} {percent_or_number(metric, mean)} over {len(scores)} seeds"
                reach = (min(scores), max(scores)) if len(scores) > 1 else None
                marks.append(Mark(rate, mean, f"{method}: {text}", y_span=reach, hollow=stage == "search"))
                told.append(text)
            if len(found) > 1:
                lines.append(Line([(rate, statistics.fmean(scores)) for rate, scores in sorted(found.items())], "bold" if stage == "final" else "dashed"))
        if marks:
            charts.append(Chart(method, "; ".join(told), x, y, [Series(method, style, marks, lines)]))
    note = "Hollow: shorter runs that chose the rate, joined where they have the same number of steps. Filled: final runs; their whiskers reach over the seeds."
    if metric != results.metric:
        judged = next((each.judged_by for each in results.search if each.task == task), "rows of their own")
        note += f" Not of one set: the loss of the hollow ones is over {judged}, that of the filled ones over the evaluation set."
    return Figure(f"learning-rates{suffix}", title, note, charts, small=True)


def rate_of(record: Record) -> float | None:
    """The learning rate of a cell, from its recipe where an older record does not say."""
    return record.learning_rate or record.recipe.get("train", {}).get("learning_rate")


def _losses(results: Results, task: str, suffix: str) -> Figure:
    """Training losses, a chart for each method: seeds faint, their mean bold, the reference's mean dashed."""
    title = "Training loss" + (f": {task}" if suffix else "")
    curves = {
        method: [thin([(point[0], point[1]) for point in record.curve]) for record in done(records, task) if record.curve]
        for method, records in results.methods.items()
    }
    curves = {method: found for method, found in curves.items() if found}
    if not curves:
        return Figure(f"loss{suffix}", title, "These results hold no loss curves.")
    all_values = [value for found in curves.values() for curve in found for _, value in curve]
    log = min(all_values) > 0 and max(all_values) / min(all_values) > 20
    last = max(curve[-1][0] for found in curves.values() for curve in found)
    x = Axis("step", lambda value: f"{value:,.0f}", range=(0, last))
    y = Axis("loss, nats per token", lambda value: f"{value:.3g}", log=log, range=(min(all_values), max(all_values)))
    reference = next(iter(results.methods))
    charts = []
    for method, found in curves.items():
        lines = [Line(curve, "faint") for curve in found] + [Line(mean_curve(found))]
        compared = [] if method == reference or reference not in curves else [Series(reference, -1, lines=[Line(mean_curve(curves[reference]), "dashed")])]
        end = mean_curve(found)[-1]
        told = f"{method}: the mean loss of {len(found)} seeds ends at {end[1]:.3g} after {end[0]:.0f} steps"
        charts.append(Chart(method, told, x, y, [*compared, Series(method, style_of(results)[method], lines=lines)]))
    note = f"Each seed faint, their mean bold; dashed: the mean of {reference}. Averaged within at most {POINTS} stretches of steps."
    return Figure(f"loss{suffix}", title, note, charts, small=True)


def thin(curve: Sequence[Span], most: int = POINTS) -> list[Span]:
    """At most `most` points: means of stretches of equal length."""
    size = -(-len(curve) // most)
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part)) for part in parts]


def mean_curve(curves: Sequence[Sequence[Span]]) -> list[Span]:
    """The mean where all curves run; between the steps that one has (seeds of a token budget log at steps of their own) it goes on in a straight line."""
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    steps = sorted({step for curve in curves for step, _ in curve if first <= step <= last})
    values = [np.interp(steps, [step for step, _ in curve], [value for _, value in curve]) for curve in curves]
    return [(step, float(value)) for step, value in zip(steps, np.mean(values, axis=0), strict=True)] if steps else list(curves[0])


# --- parts --------------------------------------------------------------------------------------------------------------------


def with_interval(found: Interval, text: Callable[[float], str]) -> str:
    return text(found.mean) + ("" if found.low is None or found.high is None else f" ({text(found.low)} to {text(found.high)})")


def _metric_axis(metric: str, span: Span | None = None) -> Axis:
    return Axis(_named(metric), lambda value: f"{value:.1%}".replace(".0%", "%") if percent_or_number(metric, 0.5) == "50.0%" else f"{value:.3g}", range=span)


def _named(metric: str) -> str:
    return metric.replace("_", " ")


def _span(found: Interval) -> Span | None:
    return None if found.low is None or found.high is None else (found.low, found.high)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
