"""Baselines of the gate: what every method reached, its step time over the frozen base and its memory, as `bench accept` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from peftkit.bench.records import Record, Results, read_json_file
from peftkit.bench.statistics import accuracy, mean_over_seeds
from peftkit.config import Config, ConfigError, Source, validate


class BaselineMethod(Config):
    """What is expected of a method (on one task). What is left out is not judged."""

    accuracy: float
    """The number that counts, of the suite's metric; edit it to ask for more or less."""
    low: float | None = None
    high: float | None = None
    """95% interval when it was accepted; for the reader."""
    seed_accuracies: list[float] = []
    """Only their spread is used."""
    seeds: int | None = Field(None, gt=0)
    """How many seeds the accuracy is a mean of, where seed_accuracies is not given; by default as many as are tested."""
    examples: int | None = Field(None, gt=0)
    """Test examples per seed; by default as many as are tested."""
    examples_hash: str | None = None
    """Of their reference answers: accuracies on other examples are not compared."""
    peak_memory_bytes: float | None = Field(None, gt=0)
    """Mean over seeds."""


class BaselineTiming(Config):
    """What a method's step costs over that of the frozen base."""

    over_base: float = Field(gt=0)
    """Median of the rounds; edit it, and leave the rounds out, to ask for more or less."""
    rounds: list[float] = []
    """One ratio per interleaved round."""
    saved_bytes: float | None = Field(None, gt=0)
    """What autograd keeps for backward."""


class Baseline(Config):
    """A baseline file, as `peftkit bench accept` writes it."""

    suite: str | None = None
    metric: str | None = None
    machine: dict[str, Any] = {}
    """That made it: the gate says where another one made the results."""
    methods: dict[str, BaselineMethod] = {}
    """Of a suite without tasks."""
    tasks: dict[str, dict[str, BaselineMethod]] = {}
    """Task -> methods, of a suite with tasks."""
    timing: dict[str, BaselineTiming] = {}
    """By method."""

    @model_validator(mode="after")
    def _expects_something(self) -> Baseline:
        if not self.methods and not any(self.tasks.values()):
            raise ValueError("neither methods nor tasks: nothing is expected of any method, so everything would pass")
        return self

    def entries(self) -> Iterator[tuple[str, str, BaselineMethod]]:
        """(task, method, what is expected), the task empty where the suite has none."""
        for task, methods in {"": self.methods, **self.tasks}.items():
            for method, expected in methods.items():
                yield task, method, expected


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
    counted = [record for record in results.cells if record.stage != "search"]
    failed = [record for record in counted if record.status == "failed"]
    if failed and not partly:
        names = ", ".join(f"{record.method} seed {record.seed}" for record in failed)
        raise ConfigError(
            f"suite {results.suite}: {len(failed)} of {len(counted)} cells failed ({names}): run them again before their results become a baseline"
        )
    if results.unfinished and not partly:
        raise ConfigError(f"suite {results.suite}: {results.unfinished} cells were not run: run it to its end before its results become a baseline")
    groups: dict[str, dict[str, list[Record]]] = {}
    timing = {}
    for record in counted:
        if record.status == "done" and record.stage == "final":
            groups.setdefault(record.task, {}).setdefault(record.method, []).append(record)
        elif record.status == "done" and record.timing.get("rounds"):
            timing[record.method] = _timing(record)
    if not groups:
        raise ConfigError(f"suite {results.suite}: no cell is done, so there is nothing to accept")
    accepted = {task: {method: _accepted(records, results.metric) for method, records in methods.items()} for task, methods in groups.items()}
    alone = accepted.pop("", {})
    return Baseline(suite=results.suite, metric=results.metric, machine=results.machine, methods=alone, tasks=accepted, timing=timing)


def _accepted(done: list[Record], metric: str) -> BaselineMethod:
    values, outcomes, hashes = [record.after[metric] for record in done], [record.outcomes for record in done], {record.examples for record in done}
    counts = {len(each) for each in outcomes}
    whole = len(counts) == 1 and 0 not in counts and len(hashes) == 1
    interval = accuracy(outcomes) if whole else mean_over_seeds(values)
    peaks = [peak for record in done if (peak := record.train.get("peak_memory_bytes"))]
    return BaselineMethod(
        accuracy=float(np.mean(values)), low=interval.low, high=interval.high, seed_accuracies=values, seeds=len(values),
        examples=counts.pop() if whole else None, examples_hash=hashes.pop() or None if whole else None,
        peak_memory_bytes=float(np.mean(peaks)) if len(peaks) == len(done) else None,
    )  # fmt: skip


def _timing(record: Record) -> BaselineTiming:
    rounds = [float(ratio) for ratio in record.timing["rounds"]]
    return BaselineTiming(over_base=float(np.median(rounds)), rounds=rounds, saved_bytes=record.timing.get("saved_bytes"))


def baseline_json(baseline: Baseline) -> str:
    """The text of a baseline file: one line per method, so that a change shows where it is."""
    parts = [f'  "{key}": {json.dumps(value)}' for key in ("suite", "metric", "machine") if (value := getattr(baseline, key))]
    for key in ("methods", "timing"):
        if found := getattr(baseline, key):
            parts.append(f'  "{key}": {_lines(found, "    ")}')
    if baseline.tasks:
        blocks = [f"    {json.dumps(task)}: {_lines(methods, '      ')}" for task, methods in baseline.tasks.items()]
        parts.append('  "tasks": {\n' + ",\n".join(blocks) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(found: dict[str, Any], indent: str) -> str:
    lines = [f"{indent}{json.dumps(name)}: {json.dumps(_rounded(value))}" for name, value in found.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent[2:]}}}"


def _rounded(value: Config) -> dict[str, Any]:
    def rounded(each: Any) -> Any:
        return [rounded(x) for x in each] if isinstance(each, list) else round(each, 6) if isinstance(each, float) else each

    return {key: rounded(each) for key, each in value.model_dump(exclude_none=True).items() if each != []}
