"""Runs the cells of a suite, one process each, and keeps a record of every one, failures included.

`<folder>/<suite>/<method>-seed<k>-<key>/` holds cell.yaml, log.txt (all the process printed), run/ (the run folder) and, once the
cell has ended, record.json. A cell with a record that says "done" is not run again; a failed one is. All records together are
`<folder>/<suite>/results.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from peftkit.bench.answers import read_answers, shared_examples, wrong_answers
from peftkit.bench.suite import PACKAGE, Cell, Suite, cells, code_hash
from peftkit.config import Config, ConfigError, Source, dump_yaml, suggest, validate

TAIL = 60  # lines of a failed cell's log that are kept in its record
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError", "out of memory", "can't allocate memory")
KILLED = (-9, 137)  # how the kernel's out-of-memory killer ends a process, seen by the parent and by a shell
Kind = Literal["out_of_memory", "divergence", "crash"]
Stage = Literal["search", "final", "timing"]
Command = Callable[[Path], Sequence[str]]


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
    """1 or 0 for every example of the evaluation set, in its order."""
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
    """Of a failure."""
    traceback: str | None = None
    """End of a failed cell's log."""

    def failure(self) -> str:
        """One line on what failed and how."""
        return f"{self.method} seed {self.seed}: FAILED ({str(self.kind).replace('_', ' ')}, exit code {self.exit_code})"


class Results(Config):
    """All records of a suite and where they come from: the content of results.json."""

    suite: str
    metric: str
    target: float | None = None
    commit: str | None = None
    """Of the package's repository; None where it is installed without one."""
    dirty: bool | None = None
    """Whether the package differed from the commit."""
    created: str
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    published: list[dict[str, Any]] = []
    """Rows of others, shown beside ours: method, task, metric, value, source."""
    examples: dict[str, list[dict[str, str]]] = {}
    """task -> prompt and answer of every example of its evaluation set, cut after `answers.KEPT` characters."""
    cells: list[Record]

    @property
    def methods(self) -> dict[str, list[Record]]:
        """Final records by method, in the order of the suite; a method none of whose final cells ran has none."""
        found: dict[str, list[Record]] = {}
        for record in self.cells:
            found.setdefault(record.method, []).extend([record] if record.stage == "final" else [])
        return found

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.cells if record.status == "failed"]


def peftkit_run(cell: Path) -> list[str]:
    """The command of one cell, given its cell.yaml."""
    return [sys.executable, "-m", "peftkit", "run", str(cell)]


def run_suite(
    suite: Suite, folder: str | Path, jobs: int = 1, only: Sequence[str] | None = None, console: Console | None = None,
    command: Command | None = None,
) -> list[Record]:  # fmt: skip
    """Runs what is not done yet, `jobs` cells at a time, and writes results.json; returns the records of all cells that have one.

    only: the methods to run; the others keep the records they have. command: makes a cell's command line of its cell.yaml,
    by default `peftkit_run`.
    KeyboardInterrupt ends the running cells and is raised again; those have no record then and run the next time.
    Raises ConfigError for an unknown method in `only`.
    """
    console = console or Console(stderr=True)
    for method in only or []:
        if method not in suite.methods:
            known = f"{suggest(method, suite.methods)} (it has: {', '.join(suite.methods)})"
            raise ConfigError(f"suite {suite.name} has no method {method!r}{known}")
    home, code, planned = Path(folder) / suite.name, code_hash(), cells(suite)
    kept = {cell.folder: record for cell in planned if (record := _read_record(home / cell.folder, cell.key))}
    todo = [cell for cell in planned if (not only or cell.method in only) and (cell.folder not in kept or kept[cell.folder].status == "failed")]
    console.print(f"suite {suite.name}: {len(planned)} cells, {len(todo)} to run", highlight=False)
    new = _Runner(home, suite.metric, jobs, command or peftkit_run, console).run(todo) if todo else {}
    if code_hash() != code:  # the keys are of the code at the start, so the next run starts the cells anew
        console.print("warning: peftkit's files changed while the suite ran: its cells may be of different code; run it again", style="yellow")
    records = [record for cell in planned if (record := new.get(cell.folder) or kept.get(cell.folder))]
    write_results(home / "results.json", _results(suite, records))
    return records


class _Runner:
    """Runs cells in processes of their own and can end them all."""

    def __init__(self, home: Path, metric: str, jobs: int, command: Command, console: Console):
        self.home, self.metric, self.jobs, self.command, self.console = home, metric, jobs, command, console
        self.lock, self.stopped = threading.Lock(), False
        self.processes: set[subprocess.Popen[bytes]] = set()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def run(self, todo: list[Cell]) -> dict[str, Record]:
        """The records by cell folder, in the order in which the cells ended."""
        records: dict[str, Record] = {}
        pool = ThreadPoolExecutor(self.jobs)
        pending = {pool.submit(self._run, cell): cell for cell in todo}
        try:
            with self.progress:
                while len(records) < len(todo):
                    # with a timeout, because a wait without one would hold Ctrl-C back on some platforms
                    for future in wait(pending, timeout=1.0, return_when=FIRST_COMPLETED).done:
                        record = future.result()
                        records[pending.pop(future).folder] = record
                        line = f"[{len(records)}/{len(todo)}] {_line(record, self.metric)}"
                        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        except BaseException:
            self._stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return records

    def _run(self, cell: Cell) -> Record:
        place = self.home / cell.folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "record.json").unlink(missing_ok=True)
        shutil.rmtree(place / "run", ignore_errors=True)  # of a cell that did not end: it starts anew
        (place / "cell.yaml").write_text(dump_yaml(cell.recipe | {"output_dir": str(place / "run")}))
        environment = dict(os.environ)
        if self.jobs > 1:  # else each process takes all cores, and they slow each other down
            environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.jobs, 1)))
        task = self.progress.add_task(f"{cell.method} seed {cell.seed}")
        started = time.monotonic()
        with (place / "log.txt").open("wb") as log:
            with self.lock:
                if self.stopped:
                    raise InterruptedError("the suite was stopped")
                process = subprocess.Popen(self.command(place / "cell.yaml"), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment)
                self.processes.add(process)
            code = process.wait()
        with self.lock:
            self.processes.discard(process)
            if self.stopped:  # killed by us: no result of the cell
                raise InterruptedError("the suite was stopped")
        self.progress.remove_task(task)
        record = _record(cell, place, code, time.monotonic() - started, self.metric)
        _write(place / "record.json", json.dumps(record.model_dump(), indent=1))
        return record

    def _stop(self) -> None:
        """Ends all running cells; none starts any more."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.kill()


# --- records ------------------------------------------------------------------------------------------------------------------


def _record(cell: Cell, place: Path, code: int, seconds: float, metric: str) -> Record:
    """The record of a cell whose process has ended with exit code `code`."""
    shared: dict[str, Any] = {
        "method": cell.method,
        "seed": cell.seed,
        "key": cell.key,
        "recipe": cell.recipe,
        "wall_seconds": seconds,
        "log": str(place / "log.txt"),
        "exit_code": code,
    }
    if code:
        text = _tail(place / "log.txt")
        return Record(**shared, status="failed", kind=_kind(code, text), traceback=text)
    try:
        result = _read_json(place / "run" / "result.json")
        found = {name: result[name] for name in ("before", "after", "train", "adapter", "machine", "versions")}
        rows = read_answers(place / "run" / "predictions.jsonl")
        outcomes, examples = _outcomes(rows)
        share = sum(outcomes) / max(len(outcomes), 1)
        if abs(share - result["after"][metric]) > 1e-6:
            raise ValueError(f"result.json says {metric} {result['after'][metric]}, predictions.jsonl {share}")
        return Record(**shared, status="done", outcomes=outcomes, examples=examples, wrong=wrong_answers(rows), **found)
    except (OSError, ValueError, KeyError) as error:  # a run that says it is done and is not
        text = f"exit code 0, but its results cannot be used: {type(error).__name__}: {error}"
        return Record(**shared, status="failed", kind="crash", traceback=text)


def _kind(code: int, text: str) -> Kind:
    if "non-finite loss" in text:
        return "divergence"
    return "out_of_memory" if code in KILLED or any(sign in text for sign in OUT_OF_MEMORY) else "crash"


def _tail(log: Path) -> str:
    """The end of a log, from its last traceback on if that is in it."""
    text = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
    return text[max(text.rfind("Traceback (most recent call last)"), 0) :]


def _outcomes(rows: list[dict[str, Any]]) -> tuple[list[int], str]:
    """Whether each example of the evaluation set was answered right, and the hash of the reference answers."""
    answers = json.dumps([row["answer"] for row in rows])
    return [int(row["correct"]) for row in rows], hashlib.sha256(answers.encode()).hexdigest()[:12]


def _read_record(place: Path, key: str) -> Record | None:
    """The record in a cell's folder, None where there is none for this key."""
    path = place / "record.json"
    if not path.exists():
        return None
    record = validate(Record, Source(_read_json(path), str(path)))
    return record if record.key == key else None


def _line(record: Record, metric: str) -> str:
    if record.status == "done":
        return f"{record.method} seed {record.seed}: {metric} {record.after[metric]:.3f}, {record.wall_seconds:.0f} s"
    return f"{record.failure()}, after {record.wall_seconds:.0f} s, log: {record.log}"


# --- results.json -------------------------------------------------------------------------------------------------------------


def load_results(path: str | Path) -> Results:
    """The results in a results.json, or in the folder of a suite. Raises ConfigError where there are none or they are not whole."""
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    return validate(Results, Source(read_json_file(file, "peftkit bench run SUITE writes it"), str(file)))


def read_json_file(path: Path, hint: str) -> Any:
    """The content of a JSON file that a user named. Raises ConfigError."""
    try:
        return _read_json(path)
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
    _write(path, f'{head},\n  "cells": [\n{lines}\n  ]\n}}\n')


def _results(suite: Suite, records: list[Record]) -> Results:
    done = [record for record in records if record.status == "done"]
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "__init__.py") else None
    return Results(
        suite=suite.name,
        metric=suite.metric,
        target=suite.target,
        commit=commit,
        dirty=bool(_git("status", "--porcelain", ".")) if commit else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=done[0].machine if done else {},
        versions=done[0].versions if done else {},
        examples=shared_examples((record.task, Path(record.log).parent / "run" / "predictions.jsonl") for record in done),
        cells=records,
    )


def _git(*arguments: str) -> str | None:
    """What git prints about the repository that holds the package; None without git or repository."""
    try:
        found = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _read_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"holds {constant}, which is no number")

    return json.loads(path.read_text(), parse_constant=refuse)


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)
