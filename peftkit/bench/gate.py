"""The gate: does a method still reach its baseline? And `accept`, which makes baselines of results.

Both sides answer the same test examples, so what differs between two runs of equal code is training: the accuracy of a seed is one
draw. A method fails when its mean accuracy lies below the baseline by more than margin plus noise, one-sided at 99%:

    accuracy < baseline - margin - t(0.99, df) * s * sqrt(1 / seeds + 1 / baseline seeds)

Three seeds say little about their own spread, and a plain t-test of them would let 20 points pass now and then. s is therefore the
moderated standard deviation of Smyth (2004, "Linear models and empirical Bayes methods"): the variances of the seeds of both sides
are pooled with a prior one that counts for PRIOR degrees of freedom,

    s^2 = (PRIOR * s0^2 + sum of squared deviations of the seeds) / df,   df = PRIOR + seeds - 1 + known baseline seeds - 1
    s0^2 = max(p (1 - p) / examples, 0.01^2)

p (1 - p) / examples being what chance alone does to a run whose answers are independent. A method also fails when it has no results
or when one of its seeds failed: the mean over those that got through would be too good.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field
from scipy.special import stdtrit

from peftkit.bench.cells import Results, read_json_file
from peftkit.bench.statistics import accuracy, mean_over_seeds
from peftkit.config import Config, ConfigError, Source, validate

CONFIDENCE = 0.99
PRIOR = 4  # degrees of freedom
LEAST = 0.01  # standard deviation of a seed's accuracy that is taken for granted
MARGIN = 0.02


class BaselineMethod(Config):
    """What is expected of a method."""

    accuracy: float
    """The number that counts; edit it to ask for more or less."""
    low: float | None = None
    high: float | None = None
    """95% interval when it was accepted; for the reader."""
    seed_accuracies: list[float] = []
    """Only their spread is used."""
    seeds: int | None = Field(None, gt=0)
    """How many seeds the accuracy is a mean of, where seed_accuracies is not given; by default as many as are tested."""
    examples: int | None = Field(None, gt=0)
    """Test examples per seed; by default as many as are tested."""


class Baseline(Config):
    """A baseline file, as `peftkit bench accept` writes it."""

    suite: str | None = None
    metric: str | None = None
    methods: dict[str, BaselineMethod] = Field(min_length=1)


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one method; accuracies as fractions."""

    method: str
    passed: bool
    accuracy: float | None
    baseline: float | None
    least: float | None
    """The lowest accuracy that passes."""
    words: str


def gate(results: Results, baseline: Baseline, margin: float = MARGIN) -> list[Verdict]:
    """One verdict per method of the baseline, then one per method that only the results have (it passes).

    Raises ConfigError where the two are of different suites or metrics.
    """
    for what, ours, theirs in (("suite", results.suite, baseline.suite), ("metric", results.metric, baseline.metric)):
        if theirs is not None and ours != theirs:
            raise ConfigError(f"baseline: {what} is {theirs!r}, but the results are of {what} {ours!r}: they cannot be compared")
    verdicts = [_verdict(method, expected, results, margin) for method, expected in baseline.methods.items()]
    for method, records in results.methods.items():
        if method not in baseline.methods:
            done = [record.after[results.metric] for record in records if record.status == "done"]
            verdicts.append(Verdict(method, True, float(np.mean(done)) if done else None, None, None, "new: the baseline does not have it"))
    return verdicts


def _verdict(method: str, expected: BaselineMethod, results: Results, margin: float) -> Verdict:
    records = results.methods.get(method, [])
    done = [record for record in records if record.status == "done"]
    failed = [record for record in records if record.status == "failed"]
    if not done:
        words = "no results: the method was not run" if not failed else f"all {len(failed)} seeds failed ({_kinds(failed)})"
        return Verdict(method, False, None, expected.accuracy, None, words)
    values = np.array([record.after[results.metric] for record in done])
    mean, examples = float(values.mean()), expected.examples or min(len(record.outcomes) for record in done) or None
    allowed = margin + noise(values, expected, examples)
    least = expected.accuracy - allowed
    drop = f"{100 * (mean - expected.accuracy):+.1f} points; {-100 * allowed:.1f} are within margin and noise"
    if mean < least:
        return Verdict(method, False, mean, expected.accuracy, least, f"below the baseline: {drop}")
    if failed:
        words = f"{len(failed)} of {len(records)} seeds failed ({_kinds(failed)}); the others: {drop}"
        return Verdict(method, False, mean, expected.accuracy, least, words)
    return Verdict(method, True, mean, expected.accuracy, least, drop)


def noise(values: np.ndarray, expected: BaselineMethod, examples: int | None) -> float:
    """How far below the baseline the mean of `values` (seeds,) may fall by chance; the rule is in the module's docstring."""
    known = np.array(expected.seed_accuracies)  # (baseline seeds,)
    p = min(max((float(values.mean()) + expected.accuracy) / 2, 0.0), 1.0)
    prior = max(p * (1 - p) / examples if examples else 0.0, LEAST**2)
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in (values, known) if side.size)
    df = PRIOR + values.size - 1 + max(known.size - 1, 0)
    variance = (PRIOR * prior + squares) / df
    seeds = known.size or expected.seeds or values.size
    return float(stdtrit(df, CONFIDENCE)) * (variance * (1 / values.size + 1 / seeds)) ** 0.5


def _kinds(failed: list) -> str:
    return ", ".join(sorted({str(record.kind).replace("_", " ") for record in failed}))


# --- baselines ----------------------------------------------------------------------------------------------------------------


def load_baseline(path: str | Path) -> Baseline:
    """The baseline in a file of `bench accept`, in one written by hand, or in an earlier results.json. Raises ConfigError."""
    path = Path(path)
    data = read_json_file(path, "peftkit bench accept RESULTS --output FILE writes one")
    source = Source(data, str(path))
    if isinstance(data, dict) and "cells" in data:
        return accept(validate(Results, source), partly=True)
    return validate(Baseline, source)


def accept(results: Results, partly: bool = False) -> Baseline:
    """The results as the baseline of later ones.

    Raises ConfigError where a cell failed (unless `partly`: then of the seeds that are done) or no cell is done.
    """
    if results.failed and not partly:
        names = ", ".join(f"{record.method} seed {record.seed}" for record in results.failed)
        count = f"{len(results.failed)} of {len(results.cells)} cells failed"
        raise ConfigError(f"suite {results.suite}: {count} ({names}): run them again before their results become a baseline")
    methods = {}
    for method, records in results.methods.items():
        done = [record for record in records if record.status == "done"]
        if done:
            methods[method] = _accepted([record.after[results.metric] for record in done], [record.outcomes for record in done])
    if not methods:
        raise ConfigError(f"suite {results.suite}: no cell is done, so there is nothing to accept")
    return Baseline(suite=results.suite, metric=results.metric, methods=methods)


def _accepted(values: list[float], outcomes: list[list[int]]) -> BaselineMethod:
    counts = {len(each) for each in outcomes}
    whole = len(counts) == 1 and 0 not in counts
    interval = accuracy(outcomes) if whole else mean_over_seeds(values)
    examples = counts.pop() if whole else None
    mean = float(np.mean(values))
    return BaselineMethod(accuracy=mean, low=interval.low, high=interval.high, seed_accuracies=values, seeds=len(values), examples=examples)


def baseline_json(baseline: Baseline) -> str:
    """The text of a baseline file: one line per method."""
    head = "".join(f'  "{key}": {json.dumps(value)},\n' for key in ("suite", "metric") if (value := getattr(baseline, key)) is not None)
    lines = [f"    {json.dumps(name)}: {_line(method)}" for name, method in baseline.methods.items()]
    return "{\n" + head + '  "methods": {\n' + ",\n".join(lines) + "\n  }\n}\n"


def _line(method: BaselineMethod) -> str:
    found = {}
    for key, value in method.model_dump(exclude_none=True).items():
        found[key] = [round(v, 6) for v in value] if isinstance(value, list) else round(value, 6)
    return json.dumps(found)
