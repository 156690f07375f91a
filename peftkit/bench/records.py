"""Records of cells and results.json: what became of every run of a suite, failures included."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from peftkit.amounts import parse_bytes
from peftkit.bench.answers import read_answers, shared_examples, wrong_answers
from peftkit.bench.keys import PACKAGE
from peftkit.bench.suite import METRICS, Cell, Stage, Suite
from peftkit.config import Config, ConfigError, Source, validate

TAIL = 60  # lines of a failed cell's log that are kept in its record
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError", "out of memory", "can't allocate memory")
DIVERGED = re.compile(r"\(tripwire (not_finite|loss_rising|no_gradient); `train\.warn_only")  # as tripwires.py ends what stops a run, not what only warns
KILLED = (-9, 137)  # how the kernel's out-of-memory killer ends a process, seen by the parent and by a shell
STOPPED = (-15, 143, -2, 130)  # SIGTERM and Ctrl-C, before the process could answer and after it had saved a checkpoint
Kind = Literal["out_of_memory", "divergence", "stopped", "crash"]


class Record(Config):
    """What became of one cell."""

    method: str
    seed: int
    key: str
    status: Literal["done", "failed"]
    wall_seconds: float
    """From the start of the process to its end."""
    log: str
    recipe: dict[str, Any] = {}
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    train: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    outcomes: list[int] = []
    """1 or 0 for every example of the evaluation set, in its order; empty where the metric has no single answers."""
    examples: str = ""
    """Hash of the reference answers: outcomes are paired only where it agrees."""
    wrong: dict[str, str] = {}
    """Position of an example that was answered wrong -> the answer, cut after `answers.KEPT` characters."""
    task: str = ""
    """Of a suite with several tasks; empty where there is one."""
    stage: Stage = "final"
    """search: a shorter run that chooses a learning rate; final: a run that the report counts; timing: no training, step times only."""
    learning_rate: float | None = None
    """What the cell trained with."""
    curve: list[list[float]] = []
    """[step, training loss, seconds since the start of training] of every logged step."""
    evaluations: list[list[float]] = []
    """[step, evaluation loss, seconds since the start of training] where the recipe evaluates between."""
    timing: dict[str, Any] = {}
    """Of a timing cell: rounds (step time over the frozen base, one per interleaved round), over_base (their median), seconds,
    base_seconds (medians), saved_bytes, base_saved_bytes (what autograd keeps for backward)."""
    exit_code: int | None = None
    kind: Kind | None = None
    """Of a failure; stopped: something outside ended the process, which goes on from its checkpoint the next time."""
    traceback: str | None = None
    """End of a failed cell's log."""

    def name(self) -> str:
        """The cell, for people."""
        what = {"final": f" seed {self.seed}", "search": f" rate {self.learning_rate:g} seed {self.seed}" if self.learning_rate else "", "timing": " timing"}
        return f"{self.task + ': ' if self.task else ''}{self.method}{what[self.stage]}"

    def failure(self) -> str:
        """One line on what failed and how."""
        return f"{self.name()}: FAILED ({str(self.kind).replace('_', ' ')}, exit code {self.exit_code})"

    def line(self, metric: str) -> str:
        """What a person sees of a cell that has ended."""
        if self.status == "failed":
            return f"{self.failure()}, after {self.wall_seconds:.0f} s, log: {self.log}"
        if self.stage == "timing":
            return f"{self.name()}: {self.timing['over_base']:.3f} of the frozen base's step, {self.wall_seconds:.0f} s"
        shown = "loss" if self.stage == "search" else metric
        steps = f", {self.train['steps']} steps" if self.stage == "search" else ""
        return f"{self.name()}{steps}: {shown} {self.after[shown]:.3f}, {self.wall_seconds:.0f} s"

    @property
    def settled(self) -> bool:
        """Whether running the cell again would tell nothing new: it is done, diverged or ran out of memory.

        A process that was killed by the kernel for memory looks like one that a person killed, so that one is run again.
        """
        return self.status == "done" or (self.kind in ("divergence", "out_of_memory") and self.exit_code not in KILLED)


class Searched(Config):
    """How the learning rate of a method was chosen on a task."""

    task: str
    method: str
    rates: list[float]
    chosen: float
    edge: Literal["lowest", "highest"] | None
    """Where the chosen rate is the end of the grid, a better one may lie beyond."""
    judged_by: str
    """The rows whose loss decided."""
    losses: dict[str, list[list[float | None]]]
    """Rate -> [steps, mean loss over the seeds] of every rung it was tried for; null where a run failed."""

    def words(self) -> str:
        """What a person is told."""
        name = f"{self.task + ': ' if self.task else ''}{self.method}"
        if not any(loss is not None for rungs in self.losses.values() for _, loss in rungs):
            return f"{name}: no learning rate of {self.rates} got through the search; its final cells take the lowest, {self.chosen:g}"
        edge = f"; it is the {self.edge} of the grid, so a better one may lie beyond: widen learning_rates" if self.edge else ""
        return f"{name}: learning rate {self.chosen:g} of {', '.join(f'{rate:g}' for rate in self.rates)}{edge}"


class Results(Config):
    """All records of a suite and where they come from: the content of results.json."""

    suite: str
    metric: str
    higher_better: bool = True
    """Whether a higher value of the metric is the better one."""
    target: float | None = None
    target_loss: float | None = None
    commit: str | None = None
    """Of the package's repository; None where it is installed without one."""
    dirty: bool | None = None
    """Whether the package differed from the commit."""
    created: str
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    tasks: list[str] = []
    """In the order of the suite; empty where it has one task."""
    budget: dict[str, Any] = {}
    """What every method might spend, where the suite says so: its key and value, and `train_steps`: "task/method" -> steps that it came to."""
    published: list[dict[str, Any]] = []
    """Numbers from papers: method, task, metric, value, source."""
    unfinished: int = 0
    """Cells that were not run because the time given to the suite was over."""
    search: list[Searched] = []
    examples: dict[str, list[dict[str, str]]] = {}
    """task -> prompt and answer of every example of its evaluation set, cut after `answers.KEPT` characters."""
    order: list[str] = []
    """The methods as the suite lists them. The first is the one that others are compared with, whether or not its cells ran."""
    cells: list[Record]

    @property
    def methods(self) -> dict[str, list[Record]]:
        """Final records by method, in the order of the suite; a method none of whose final cells ran has none."""
        found: dict[str, list[Record]] = {method: [] for method in self.order}
        for record in self.cells:
            found.setdefault(record.method, []).extend([record] if record.stage == "final" else [])
        return found

    @property
    def timings(self) -> dict[str, Record]:
        """The timing cell of each method that has one."""
        return {record.method: record for record in self.cells if record.stage == "timing" and record.status == "done"}

    @property
    def failed(self) -> list[Record]:
        """What failed. A learning rate of a search that diverges or does not fit is an answer of the search, not a failure."""
        return [record for record in self.cells if record.status == "failed" and (record.stage != "search" or record.kind in ("crash", "stopped"))]


# --- from a run folder to a record --------------------------------------------------------------------------------------------


def record_of(cell: Cell, place: Path, code: int, seconds: float, suite: Suite) -> Record:
    """The record of a cell whose process has ended with exit code `code`, from its folder."""
    shared: dict[str, Any] = {
        "method": cell.method, "seed": cell.seed, "key": cell.key, "recipe": cell.recipe, "wall_seconds": seconds, "log": str(place / "log.txt"),
        "exit_code": code, "task": cell.task, "stage": cell.stage, "learning_rate": cell.learning_rate,
    }  # fmt: skip
    if code:
        text = _tail(place / "log.txt")
        return Record(**shared, status="failed", kind=_kind(code, text), traceback=text)
    try:
        found = _timing(place) if cell.stage == "timing" else _trained(place, "loss" if cell.stage == "search" else suite.metric)
        if cell.learning_rate is None:
            shared["learning_rate"] = found.pop("learning_rate")
        found.pop("learning_rate", None)
        record = Record(**shared, status="done", **found)
    except (OSError, ValueError, KeyError) as error:  # a run that says it is done and is not
        text = f"exit code 0, but its results cannot be used: {type(error).__name__}: {error}"
        return Record(**shared, status="failed", kind="crash", traceback=text)
    allowed, taken = suite.budget and suite.budget.memory, record.train.get("peak_memory_bytes", 0)
    if cell.stage == "final" and allowed and taken > parse_bytes(allowed):
        text = f"the suite's budget is {allowed}, and the run took {taken / 10**9:.2f} GB at its peak"
        return record.model_copy(update={"status": "failed", "kind": "out_of_memory", "traceback": text, "outcomes": [], "after": {}})
    return record


def _timing(place: Path) -> dict[str, Any]:
    result = read_json(place / "run" / "timing.json")
    return {name: result[name] for name in ("timing", "machine", "versions")} | {"learning_rate": None}


def _trained(place: Path, metric: str) -> dict[str, Any]:
    """The fields of a record that a finished run fills."""
    result = read_json(place / "run" / "result.json")
    found = {name: result[name] for name in ("before", "after", "train", "adapter", "machine", "versions")}
    found["learning_rate"] = (result["recipe"].get("train") or {}).get("learning_rate")
    value, answers = result["after"][metric], METRICS[metric].answers
    if answers is not None:
        rows = read_answers(place / "run" / "predictions.jsonl", answers)
        found |= {"outcomes": [int(row["correct"]) for row in rows], "examples": _hash_of_references(rows), "wrong": wrong_answers(rows)}
        share = sum(found["outcomes"]) / max(len(found["outcomes"]), 1)
        if abs(share - value) > 1e-6:
            raise ValueError(f"result.json says {metric} {value}, predictions.jsonl {share}")
    metrics = place / "run" / "metrics.jsonl"
    found["curve"], found["evaluations"] = _curves(metrics) if metrics.exists() else ([], [])
    return found


def _curves(path: Path) -> tuple[list[list[float]], list[list[float]]]:
    """(training losses, evaluation losses) by step, each with the seconds of training until then."""
    curve: list[list[float]] = []
    evaluations: list[list[float]] = []
    for text in filter(None, path.read_text().split("\n")):
        line = json.loads(text)
        if "loss" in line and math.isfinite(line["loss"]):  # a step that was not taken, where not_finite only warns
            curve.append([line["step"], line["loss"], line["seconds"]])
        if "eval_loss" in line:  # the clock of training stands while it evaluates
            before = [point for point in curve if point[0] <= line["step"]]
            seconds = before[-1][2] * line["step"] / before[-1][0] if before else 0.0
            evaluations.append([line["step"], line["eval_loss"], seconds])
    return curve, evaluations


def _kind(code: int, text: str) -> Kind:
    if code in STOPPED:
        return "stopped"
    if DIVERGED.search(text):
        return "divergence"
    return "out_of_memory" if code in KILLED or any(sign in text for sign in OUT_OF_MEMORY) else "crash"


def _tail(log: Path) -> str:
    """The end of a log, from its last traceback on if that is in it."""
    text = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
    return text[max(text.rfind("Traceback (most recent call last)"), 0) :]


def _hash_of_references(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([row["answer"] for row in rows]).encode()).hexdigest()[:12]


def read_record(place: Path, key: str) -> Record | None:
    """The record in a cell's folder, None where there is none for this key."""
    path = place / "record.json"
    if not path.exists():
        return None
    record = validate(Record, Source(read_json(path), str(path)))
    return record if record.key == key else None


# --- results.json -------------------------------------------------------------------------------------------------------------


def load_results(path: str | Path) -> Results:
    """The results in a results.json, or in the folder of a suite. Raises ConfigError where there are none or they are not whole."""
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    return validate(Results, Source(read_json_file(file, "peftkit bench run SUITE writes it"), str(file)))


def read_json_file(path: Path, hint: str) -> Any:
    """The content of a JSON file that a user named. Raises ConfigError."""
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; {hint}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error


def write_results(path: Path, results: Results) -> None:
    """Writes results.json, one line per cell, so that a committed file stays readable and a change shows where it is."""
    head = json.dumps(results.model_dump(exclude={"cells", "examples"}), indent=2, ensure_ascii=False).removesuffix("\n}")
    examples = ",\n".join(f"    {json.dumps(task)}: {json.dumps(rows, ensure_ascii=False)}" for task, rows in results.examples.items())
    head += f',\n  "examples": {{\n{examples}\n  }}' if examples else ""
    lines = ",\n".join("    " + json.dumps(record.model_dump(exclude_defaults=True), ensure_ascii=False) for record in results.cells)
    write_whole(path, f'{head},\n  "cells": [\n{lines}\n  ]\n}}\n')


def results_of(suite: Suite, records: Sequence[Record], searched: Sequence[Searched], steps: dict[tuple[str, str], int], unfinished: int) -> Results:
    """The content of results.json."""
    done = [record for record in records if record.status == "done"]
    answers = METRICS[suite.metric].answers
    predictions = [(record.task, Path(record.log).parent / "run" / "predictions.jsonl") for record in done if record.stage == "final"]
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "__init__.py") else None
    budget = suite.budget.model_dump(exclude_none=True) if suite.budget else {}
    return Results(
        suite=suite.name,
        metric=suite.metric,
        higher_better=METRICS[suite.metric].higher_better,
        target=suite.target,
        target_loss=suite.target_loss,
        commit=commit,
        dirty=bool(_git("status", "--porcelain", ".")) if commit else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=done[0].machine if done else {},
        versions=done[0].versions if done else {},
        tasks=list(suite.tasks),
        budget=budget | ({"train_steps": {f"{task}/{method}": n for (task, method), n in steps.items()}} if steps else {}),
        published=[row.model_dump() for row in suite.published],
        unfinished=unfinished,
        order=list(suite.methods),
        search=list(searched),
        examples=shared_examples(predictions, answers) if answers else {},
        cells=list(records),
    )


def _git(*arguments: str) -> str | None:
    """What git prints about the repository that holds the package; None without git or repository."""
    try:
        found = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError for NaN and infinity too."""

    def refuse(constant: str) -> None:
        raise ValueError(f"holds {constant}, which is no number")

    return json.loads(path.read_text(), parse_constant=refuse)


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)
