"""The report: results side by side, as a table for the terminal and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from peftkit.bench.cells import Record, Results
from peftkit.bench.statistics import Difference, Interval, accuracy, difference, mean_over_seeds

COLUMNS = (
    "method",
    "seeds",
    "before",
    "accuracy (95% interval)",
    "forgetting, points (95% interval)",
    "tokens/s",
    "peak memory, MiB",
    "trainable parameters",
    "adapter, KiB",
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
    tokens_per_second: Interval | None
    peak_memory_bytes: Interval | None
    trainable_parameters: int | None
    adapter_bytes: int | None

    def texts(self) -> list[str]:
        """The row as a table shows it, in the order of COLUMNS."""
        return [
            self.method,
            f"{self.done} done" + (f", {len(self.failed)} FAILED" if self.failed else ""),
            "-" if self.before is None else f"{self.before:.1%}",
            _with_interval(self.accuracy, lambda value: f"{value:.1%}"),
            _with_interval(self.forgetting, lambda value: f"{100 * value:+.1f}"),
            _with_interval(self.tokens_per_second, lambda value: f"{value:,.0f}", spread=False),
            _with_interval(self.peak_memory_bytes, lambda value: f"{value / 2**20:,.0f}", spread=False),
            "-" if self.trainable_parameters is None else f"{self.trainable_parameters:,}",
            "-" if self.adapter_bytes is None else f"{self.adapter_bytes / 1024:,.0f}",
        ]


def table(results: Results) -> list[Row]:
    """One row per method, in the order of the suite; methods all of whose cells failed included."""
    return [_row(method, records, results) for method, records in results.methods.items()]


def differences(results: Results) -> list[tuple[str, Difference | None]]:
    """Every other method against the first: its sentence, and the numbers, None where there is nothing to compare."""
    by_method = {method: [record for record in records if record.status == "done"] for method, records in results.methods.items()}
    if not by_method:
        return []
    first, *others = by_method
    return [_compare(method, by_method[method], first, by_method[first]) for method in others]


def notes(results: Results) -> list[str]:
    """What stands below the table: differences, target, the base, failures, and where the numbers come from."""
    lines = [sentence for sentence, _ in differences(results)]
    if len(lines) > 1:
        lines.append(f"Intervals are of each comparison by itself: among {len(lines)}, some may leave out 0 by chance.")
    if results.target is not None:
        reached = ", ".join(f"{row.method} {row.at_target} of {row.done + len(row.failed)}" for row in table(results))
        lines.append(f"Seeds that reached {results.metric} {results.target:.1%}: {reached}.")
    lines += _base(results)
    if any(row.done == 1 for row in table(results)):
        lines.append("The interval of a method with one seed is about that one run; other seeds may lie outside.")
    lines += [_failure(record) for record in results.failed]
    return lines + [_origin(results)]


def terminal(results: Results, console: Console) -> None:
    """Prints the report as a table with its notes."""
    shown = Table(title=f"suite {results.suite}: {results.metric}", title_justify="left")
    for i, column in enumerate(COLUMNS):
        shown.add_column(column, justify="left" if i < 2 else "right")
    for row in table(results):
        shown.add_row(*row.texts(), style="red" if row.failed else None)
    console.print(shown)
    for line in notes(results):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def markdown(results: Results) -> str:
    """The report as GitHub-flavoured Markdown."""
    rows = [list(COLUMNS), ["---", "---", *["---:"] * (len(COLUMNS) - 2)], *(row.texts() for row in table(results))]
    lines = ["| " + " | ".join(_escaped(text) for text in row) + " |" for row in rows]
    lines = [f"### Suite {results.suite}: {results.metric}", "", *lines, "", *(f"- {_escaped(line)}" for line in notes(results))]
    return "\n".join(lines) + "\n"


# --- parts --------------------------------------------------------------------------------------------------------------------


def _row(method: str, records: Sequence[Record], results: Results) -> Row:
    done = [record for record in records if record.status == "done"]
    scores = [record.after[results.metric] for record in done]
    before = _measured(done, lambda record: record.before[results.metric])
    return Row(
        method=method,
        done=len(done),
        failed=[record for record in records if record.status == "failed"],
        at_target=None if results.target is None else sum(score >= results.target for score in scores),
        before=before.mean if before else None,
        accuracy=_accuracy(done, scores),
        forgetting=_measured(done, lambda record: record.before["retained_exact_match"] - record.after["retained_exact_match"]),
        tokens_per_second=_measured(done, lambda record: record.train["tokens_per_second"]),
        peak_memory_bytes=_measured(done, lambda record: record.train["peak_memory_bytes"]),
        trainable_parameters=done[0].adapter.get("trainable_parameters") if done else None,
        adapter_bytes=done[0].adapter.get("bytes") if done else None,
    )


def _accuracy(done: Sequence[Record], scores: list[float]) -> Interval | None:
    """Over seeds and examples where all seeds answered the same ones, else over seeds alone."""
    if not done:
        return None
    same = len({record.examples for record in done}) == 1 and all(record.outcomes for record in done)
    return accuracy([record.outcomes for record in done]) if same else mean_over_seeds(scores)


def _measured(done: Sequence[Record], value: Callable[[Record], float]) -> Interval | None:
    """Mean and t-interval over seeds; None where a seed did not measure it (a recipe without `retained`, say)."""
    try:
        return mean_over_seeds([value(record) for record in done]) if done else None
    except KeyError:
        return None


def _compare(method: str, a: Sequence[Record], first: str, b: Sequence[Record]) -> tuple[str, Difference | None]:
    if not a or not b:
        return f"{method} cannot be compared with {first}: {method if not a else first} has no finished seed", None
    if len({record.examples for record in (*a, *b)}) > 1 or not all(record.outcomes for record in (*a, *b)):
        return f"{method} cannot be compared with {first}: they did not answer the same examples", None
    found = difference({record.seed: record.outcomes for record in a}, {record.seed: record.outcomes for record in b})
    return found.words(method, first), found


def _base(results: Results) -> list[str]:
    """The base before training; once where all methods started alike, else (a quantised base is another base) by method."""
    lines: dict[str, list[str]] = {}
    for method, records in results.methods.items():
        for record in records:
            if record.status == "done" and record.before:
                values = {key: value for key, value in record.before.items() if isinstance(value, (int, float))}
                text = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
                lines.setdefault(text, []).append(method)
    if len(lines) == 1:
        return [f"Before training: {text}." for text in lines]
    return [f"Before training ({', '.join(dict.fromkeys(methods))}): {text}." for text, methods in lines.items()]


def _failure(record: Record) -> str:
    last = next((line.strip() for line in reversed((record.traceback or "").splitlines()) if line.strip()), "nothing in its log")
    return f"{record.failure()}: {last} (log: {record.log})"


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
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
