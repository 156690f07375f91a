"""The report: results side by side, as a table for the terminal and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftkit.bench.compare import compare, task_names
from peftkit.bench.measures import forgetting, sensitivity, to_target
from peftkit.bench.overview import SHARES, comparisons_by_task, in_one_sentence, percent_or_number, score
from peftkit.bench.power import plan
from peftkit.bench.records import Record, Results
from peftkit.bench.statistics import Interval, mean_over_seeds

SCORE = "accuracy (95% interval)"
COLUMNS = (
    "method",
    "seeds",
    "before",
    SCORE,
    "forgetting, points (95% interval)",
    "step time, x frozen base",
    "tokens/s",
    "peak memory, MiB",
    "trainable parameters",
    "adapter, KiB",
    "energy of training, kJ",
)


@dataclass(frozen=True)
class Row:
    """One method; None where no seed is done or nothing was measured. Fractions, bytes, tokens per second."""

    method: str
    done: int
    failed: list[Record]
    at_target: int | None
    """Seeds that reached the suite's target; None where it has none."""
    before: float | None
    accuracy: Interval | None
    forgetting: Interval | None
    """Exact match lost on the retained sets; below 0 where it rose."""
    step_ratio: float | None
    """Step time over that of the frozen base: median of the interleaved rounds of the timing cells."""
    tokens_per_second: Interval | None
    peak_memory_bytes: Interval | None
    trainable_parameters: int | None
    adapter_bytes: int | None
    energy_joules: Interval | None
    """Of training; where a GPU counts it."""

    def texts(self, metric: str = "exact_match") -> list[str]:
        """The row as a table shows it, in the order of COLUMNS."""
        return [
            self.method,
            f"{self.done} done" + (f", {len(self.failed)} FAILED" if self.failed else ""),
            "-" if self.before is None else percent_or_number(metric, self.before),
            _with_interval(self.accuracy, lambda value: percent_or_number(metric, value)),
            _with_interval(self.forgetting, lambda value: f"{100 * value:+.1f}"),
            "-" if self.step_ratio is None else f"{self.step_ratio:.2f}",
            _with_interval(self.tokens_per_second, lambda value: f"{value:,.0f}", spread=False),
            _with_interval(self.peak_memory_bytes, lambda value: f"{value / 2**20:,.0f}", spread=False),
            "-" if self.trainable_parameters is None else f"{self.trainable_parameters:,}",
            "-" if self.adapter_bytes is None else f"{self.adapter_bytes / 1024:,.0f}",
            _with_interval(self.energy_joules, lambda value: f"{value / 1000:,.1f}", spread=False),
        ]


def table(results: Results) -> list[Row]:
    """One row per method, in the order of the suite; methods all of whose cells failed included."""
    return [_row(method, records, results) for method, records in results.methods.items()]


def notes(results: Results) -> list[str]:
    """What stands below the table: differences, what would settle them, targets, learning rates, the base, failures, where it all comes from."""
    found = compare(results) + comparisons_by_task(results)
    lines = [each.words() for each in found]
    if len(lines) > 1:
        lines.append("Told apart: by p values corrected (Holm) over all comparisons of their kind, pooled or by task; an interval is of its comparison alone.")
    lines += [
        f"{each.task + ': ' if each.task else ''}{each.method} against {each.other}: {plan(each.difference, each.comparisons).words()}"
        for each in found if each.outcome == "equal" and each.difference
    ]  # fmt: skip
    if results.target_loss is not None:
        lines += [each.words() for each in to_target(results, results.target_loss)]
    lines += [each.words() for each in results.search] + short_searches(results) + [each.words() for each in sensitivity(results)]
    if results.target is not None:
        reached = ", ".join(f"{row.method} {row.at_target} of {row.done + len(row.failed)}" for row in table(results))
        lines.append(f"Seeds that reached {results.metric} {percent_or_number(results.metric, results.target)}: {reached}.")
    lines += _base(results) + [published(row) for row in results.published] + _machines(results)
    if any(row.done == 1 for row in table(results)):
        lines.append("The interval of a method with one seed is about that one run; other seeds may lie outside.")
    lines += [_failure(record) for record in results.failed]
    return lines + [_origin(results)]


def short_searches(results: Results) -> list[str]:
    """A warning where rates were chosen on runs of less than half the steps of the final ones: higher rates win short runs, and may break down in long ones."""
    found: dict[tuple[int, int], list[str]] = {}
    for each in results.search:
        steps = [int(steps) for rungs in each.losses.values() for steps, _ in rungs if steps is not None]
        final = [int(record.train["steps"]) for record in results.methods.get(each.method, []) if record.task == each.task and record.train]
        if len(each.rates) > 1 and steps and final and 2 * max(steps) < min(final):
            found.setdefault((max(steps), min(final)), []).append(f"{each.method} on {each.task}" if each.task else each.method)
    return [
        f"Learning rates of {', '.join(names)} were chosen on runs of {steps} steps, for final runs of {many}: the highest rates win short runs and may break "
        "down in longer ones; add a rung of at least half the steps."
        for (steps, many), names in found.items()
    ]


def terminal(results: Results, console: Console) -> None:
    """Prints the report as a table with its notes."""
    columns, rows = columns_and_rows(results)
    console.print(in_one_sentence(results), highlight=False, markup=False, soft_wrap=True)
    shown = Table(title=f"suite {results.suite}: {results.metric}", title_justify="left")
    for i, column in enumerate(heading(name, results.metric) for name in columns):
        shown.add_column(column, justify="left" if i < 2 else "right")
    for row, texts in zip(table(results), rows, strict=True):
        shown.add_row(*(Text(text) for text in texts), style="red" if row.failed else None)
    console.print(shown)
    for line in notes(results):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def markdown(results: Results) -> str:
    """The report as GitHub-flavoured Markdown: what is known in a sentence, the table, and what stands behind it."""
    columns, texts = columns_and_rows(results)
    lines = [_line([heading(name, results.metric) for name in columns]), _line(["---", "---", *["---:"] * (len(columns) - 2)]), *map(_line, texts)]
    lines = [f"### Suite {results.suite}: {results.metric}", "", _escaped(in_one_sentence(results)), "", *lines, ""]
    if len(task_names(results)) > 1:
        lines += [*_task_table(results), ""]
    return "\n".join([*lines, *(f"- {_escaped(line)}" for line in notes(results))]) + "\n"


def heading(column: str, metric: str) -> str:
    """What stands over a column: that of the score says which metric, unless it is the share of right answers."""
    return column if column != SCORE or metric in SHARES else SCORE.replace("accuracy", metric)


def published(row: dict[str, Any]) -> str:
    """A number of others, in a line."""
    task = f" on {row['task']}" if row.get("task") else ""
    return f"Published for {row['method']}{task}: {row['metric']} {percent_or_number(row['metric'], row['value'])} ({row['source']})."


def columns_and_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """The table as texts, without the columns that no method measured."""
    rows = [row.texts(results.metric) for row in table(results)]
    shown = [i for i in range(len(COLUMNS)) if i < 2 or any(row[i] != "-" for row in rows)]
    names = ["cells" if name == "seeds" and len(task_names(results)) > 1 else name for name in COLUMNS]
    return [names[i] for i in shown], [[row[i] for i in shown] for row in rows]


def _task_table(results: Results) -> list[str]:
    """Methods by tasks."""
    lines = [_line(["method", *task_names(results)]), _line(["---", *["---:"] * len(task_names(results))])]
    for method, records in results.methods.items():
        cells = [score([record for record in records if record.task == task], results.metric) for task in task_names(results)]
        lines.append(_line([method, *(_with_interval(cell, lambda value: percent_or_number(results.metric, value)) for cell in cells)]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(text) for text in cells)} |"


# --- parts --------------------------------------------------------------------------------------------------------------------


def _row(method: str, records: Sequence[Record], results: Results) -> Row:
    done = [record for record in records if record.status == "done"]
    scores = [record.after[results.metric] for record in done]
    before = _measured(done, lambda record: record.before[results.metric])
    return Row(
        method=method,
        done=len(done),
        failed=[record for record in records if record.status == "failed"],
        at_target=None if results.target is None else sum(score >= results.target if results.higher_better else score <= results.target for score in scores),
        before=before.mean if before else None,
        accuracy=score(done, results.metric, task_names(results)),
        forgetting=forgetting(results)[method],
        step_ratio=_step_ratio(method, results),
        tokens_per_second=_measured(done, lambda record: record.train["tokens_per_second"]),
        peak_memory_bytes=_measured(done, lambda record: record.train["peak_memory_bytes"]),
        trainable_parameters=done[0].adapter.get("trainable_parameters") if done else None,
        adapter_bytes=done[0].adapter.get("bytes") if done else None,
        energy_joules=_measured(done, lambda record: record.train["energy_joules"]),
    )


def _step_ratio(method: str, results: Results) -> float | None:
    """The mean over tasks of the timing cells' medians."""
    timed = [record.timing["over_base"] for record in results.cells if record.method == method and record.stage == "timing" and record.status == "done"]
    return sum(timed) / len(timed) if timed else None


def _measured(done: Sequence[Record], value: Callable[[Record], float]) -> Interval | None:
    """Mean and t-interval over seeds; None where a seed did not measure it (a recipe without `retained`, say)."""
    try:
        return mean_over_seeds([value(record) for record in done]) if done else None
    except KeyError:
        return None


def _base(results: Results) -> list[str]:
    """The base before training; once where all methods started alike, else (a quantised base is another base) by method."""
    lines: dict[tuple[str, str], list[str]] = {}
    for method, records in results.methods.items():
        for record in records:
            if record.status == "done" and record.before:
                values = {key: value for key, value in record.before.items() if isinstance(value, (int, float))}
                text = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
                lines.setdefault((record.task, text), []).append(method)
    alike = {task for task, _ in lines} if len(lines) == len({task for task, _ in lines}) else set()
    found = []
    for (task, text), methods in lines.items():
        of = [task] * bool(task) + [", ".join(dict.fromkeys(methods))] * (task not in alike)
        found.append(f"Before training{' (' + ': '.join(of) + ')' if of else ''}: {text}.")
    return found


def _machines(results: Results) -> list[str]:
    """Where the cells ran, if on machines of several kinds: seconds and memory of one cannot be held against those of another."""
    kinds: dict[str, list[str]] = {}
    for record in results.cells:
        if record.status == "done" and record.stage != "search":
            kind = ", ".join(f"{key} {value}" for key, value in record.machine.items() if key != "threads")  # those are fewer where cells run side by side
            kinds.setdefault(kind, []).append(record.method)
    if len(kinds) < 2:
        return []
    ran = "; ".join(f"{len(methods)} cells of {', '.join(dict.fromkeys(methods))} on {machine or 'an unknown one'}" for machine, methods in kinds.items())
    return [f"The cells ran on {len(kinds)} kinds of machines, so their times and memory are not of one kind: {ran}."]


def _failure(record: Record) -> str:
    again = "; it is not run again: for another try, on a larger machine say, remove that folder" if record.settled else ""
    last = next((line.strip() for line in reversed((record.traceback or "").splitlines()) if line.strip()), "nothing in its log")
    return f"{record.failure()}: {last} (log: {record.log}{again})"


def _origin(results: Results) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    versions = ", ".join(f"{key} {value}" for key, value in results.versions.items())
    commit = f"commit {results.commit[:12]}{' with changes' if results.dirty else ''}" if results.commit else "no commit"
    return f"{results.created}; {commit}; machine: {machine or 'unknown'}; versions: {versions or 'unknown'}."


def _with_interval(interval: Interval | None, text: Callable[[float], str], spread: bool = True) -> str:
    if interval is None:
        return "-"
    if not spread or interval.low is None or interval.high is None:
        return text(interval.mean)
    return f"{text(interval.mean)} ({text(interval.low)} to {text(interval.high)})"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
