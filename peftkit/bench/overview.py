"""Methods side by side: their metric over all tasks, what differs from the first one, and the sentence that a report begins with."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.bench.compare import Comparison, compare, task_names
from peftkit.bench.records import Record, Results
from peftkit.bench.statistics import Interval, mean_over_tasks, pooled_accuracy

SHARES = ("exact_match", "choice_accuracy")  # metrics that are a share of examples, 0 to 1


def done(records: Sequence[Record], task: str | None = None) -> list[Record]:
    """Those that ended well, of all tasks or one."""
    return [record for record in records if record.status == "done" and task in (None, record.task)]


def score(records: Sequence[Record], metric: str, tasks: Sequence[str] | None = None) -> Interval | None:
    """The metric of a method's records, as the mean over `tasks` (by default those of the records).

    None where no cell of one of them is done: the others may be the easy ones. Over seeds and examples where all seeds of a task answered the same ones, else
    over seeds alone.
    """
    by_task = [done(records, task) for task in (tasks or dict.fromkeys(record.task for record in records))]
    if not by_task or not all(by_task):
        return None
    same = all(len({record.examples for record in part}) == 1 and all(record.outcomes for record in part) for part in by_task)
    if same and metric in SHARES:
        return pooled_accuracy([[record.outcomes for record in part] for part in by_task])
    return mean_over_tasks([[record.after[metric] for record in part] for part in by_task])


def comparisons_by_task(results: Results) -> list[Comparison]:
    """Every other method against the first, task by task; none where there is one task."""
    return [each for each in compare(results, by_task=True) if each.task is not None]


def in_one_sentence(results: Results) -> str:
    """What is known, first of all: which methods differ from the first one and whether all cells ran."""
    found = compare(results)
    cells = [record for records in results.methods.values() for record in records]
    state = f"{len(done(cells))} of {len(cells)} cells done" + (f", {len(results.failed)} failed" if results.failed else "")
    state += f", {results.unfinished} not run" if results.unfinished else ""
    seeds = {len(done(records)) // max(len(task_names(results)), 1) for records in results.methods.values()}
    by_outcome = {said: [each.method for each in found if each.outcome == said] for said in ("better", "worse", "equal", "unknown")}
    if not found:
        only = next(iter(results.methods), None)
        interval = score(results.methods[only], results.metric, task_names(results)) if only else None
        said = f"{only}: {percent_or_number(results.metric, interval.mean)} {results.metric}" if interval else "Nothing is measured"
        return f"{said}; {state}."
    reference, parts = found[0].other, []
    for side in ("better", "worse"):
        named = [f"{each.method} ({d.measure.number(d.mean)} {d.measure.unit})" for each in found if each.outcome == side and (d := each.difference)]
        if named:
            parts.append(f"{_and(named)} {'is' if len(named) == 1 else 'are'} {side} than {reference}")
    if equal := by_outcome["equal"]:
        some = f"{_and(equal) if len(equal) < 4 else f'{len(equal)} methods'} cannot be told apart"
        parts.append(f"{f'None of {len(equal)} methods can be told apart' if len(equal) == len(found) > 2 else some} from {reference}")
    if by_outcome["unknown"]:
        parts.append(f"{_and(by_outcome['unknown'])} cannot be compared with {reference}")
    spread = f"{min(seeds)} to {max(seeds)} seeds" if len(seeds) > 1 else "1 seed" if seeds == {1} else f"{max(seeds)} seeds"
    each_task = " a task" if len(task_names(results)) > 1 else ""
    return f"{'; '.join(parts)} ({spread}{each_task}; {state})."


def percent_or_number(metric: str, value: float) -> str:
    """A value of the metric as people read it."""
    return f"{value:.1%}" if metric in SHARES else f"{value:.4g}"


def _and(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
