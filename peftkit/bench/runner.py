"""Runs single cells, one process each: places to run in, records kept, killed cells resumed, all of them ended at an interrupt.

A cell's folder holds cell.yaml, log.txt (all the process printed), run/ (the run folder) and, once the cell has ended, record.json. A cell
whose record is settled is not run again. One without a record was killed, and goes on from the checkpoints in run/; one that crashed starts anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from peftkit.bench.launch import Launcher, Local
from peftkit.bench.records import KILLED, STOPPED, Record, read_record, record_of, write_whole
from peftkit.bench.suite import Cell, Suite
from peftkit.config import ConfigError, dump_yaml

Command = Callable[[Path], Sequence[str]]
T = TypeVar("T")


class NotRun(Exception):
    """A cell that has no record and is not to be run."""


class TimeOver(Exception):
    """The time given to the suite is over."""


def peftkit_run(cell: Path) -> list[str]:
    """The command of one cell, given its cell.yaml."""
    return [sys.executable, "-m", "peftkit", "run", str(cell)]


def gpus() -> list[str]:
    """The GPUs that cells may be given, as CUDA_VISIBLE_DEVICES names them; asked of the driver, since importing torch takes seconds."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, line in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))] if listed.returncode == 0 else []


class Runner:
    """Runs the cells of a suite in at most `jobs` processes at a time, each on a GPU of its own where there are any."""

    def __init__(self, suite: Suite, home: Path, jobs: int, only: Sequence[str] | None, command: Command, console: Console, launcher: Launcher | None = None,
                 deadline: float | None = None):  # fmt: skip
        self.suite, self.home, self.jobs, self.only, self.command, self.console = suite, home, jobs, only, command, console
        self.launcher, self.deadline = launcher or Local(), deadline
        self.lock, self.stopped = threading.Lock(), False
        self.records: dict[str, Record] = {}
        """By folder, of all cells asked for."""
        self.new: list[Record] = []
        self.expected = 0
        """Cells to run in this part of the suite, for the count that people see."""
        self.slots: queue.Queue[str | None] = queue.Queue()
        devices = gpus() if self.launcher.here else []
        if devices and jobs > len(devices):
            raise ConfigError(f"--jobs {jobs}: each cell gets a GPU of its own, and there are {len(devices)}")
        for slot in devices[:jobs] if devices else [None] * jobs:
            self.slots.put(slot)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def kept(self, cell: Cell) -> Record | None:
        """The record of a cell that need not run."""
        record = self.records.get(cell.folder) or read_record(self.home / cell.folder, cell.key)
        if record is not None and (record.settled or self._left_out(cell) or cell.folder in self.records):
            self.records[cell.folder] = record
            return record
        return None

    def record(self, cell: Cell) -> Record:
        """The record of a cell, which is run where that is needed. Raises NotRun for one without a record that is not to be run."""
        if (kept := self.kept(cell)) is not None:
            return kept
        if self._left_out(cell):
            raise NotRun(cell.label)
        slot = self.slots.get()
        try:
            record = self._run(cell, slot)
        finally:
            self.slots.put(slot)
        with self.lock:
            self.records[cell.folder] = record
            self.new.append(record)
        if cell.stage == "search":  # what the works of `all` return is said there, and a search returns only at its end
            self.console.print(record.line(self.suite.metric), highlight=False, markup=False, soft_wrap=True)
        return record

    def _left_out(self, cell: Cell) -> bool:
        return bool(self.only) and cell.method not in (self.only or ())

    def all(self, works: Sequence[Callable[[], T]], shown: Callable[[T], str | None]) -> list[T]:
        """What the works return, up to `jobs` of them at a time, in their order; those left out are missing.

        Raises TimeOver at the deadline and whatever a work raises, with no process left running.
        """
        found: dict[int, T] = {}
        pool = ThreadPoolExecutor(self.jobs)
        pending = {pool.submit(work): i for i, work in enumerate(works)}
        try:
            with self.progress:
                while pending:
                    # with a timeout, because a wait without one would hold Ctrl-C back on some platforms
                    for future in wait(pending, timeout=1.0, return_when=FIRST_COMPLETED).done:
                        i = pending.pop(future)
                        try:
                            found[i] = future.result()
                        except NotRun:
                            continue
                        if line := shown(found[i]):
                            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
                    if self.deadline is not None and pending and time.monotonic() > self.deadline:
                        raise TimeOver
        except BaseException:
            self._stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [found[i] for i in sorted(found)]

    def _run(self, cell: Cell, slot: str | None) -> Record:
        place = self.home / cell.folder
        place.mkdir(parents=True, exist_ok=True)
        with self._alone(place, cell) as handle:
            if self.stopped:
                raise InterruptedError("the suite was stopped")
            failed = read_record(place, cell.key)
            resume = self._resumes(place, failed, cell)
            (place / "record.json").unlink(missing_ok=True)
            if not resume:
                shutil.rmtree(place / "run", ignore_errors=True)
            write_whole(place / "cell.yaml", dump_yaml(cell.recipe | {"output_dir": str(place / "run")}))
            command = [sys.executable, "-m", "peftkit.bench.steps", str(place / "cell.yaml"), str(cell.rounds)]
            task = self.progress.add_task(cell.label)
            started = time.monotonic()
            with self.lock:
                if self.stopped:
                    raise InterruptedError("the suite was stopped")
                asked = command if cell.stage == "timing" else [*self.command(place / "cell.yaml"), *(["--resume"] if resume else [])]
                process = self.launcher.start(asked, place / "log.txt", self._environment(slot, cell), handle)
            code = process.wait()
            with self.lock:
                if self.stopped:  # killed by us: no result of the cell
                    raise InterruptedError("the suite was stopped")
            self.progress.remove_task(task)
            record = record_of(cell, place, code, time.monotonic() - started, self.suite)
            write_whole(place / "record.json", json.dumps(record.model_dump(), indent=1))
            if record.status == "done":
                shutil.rmtree(place / "run" / "checkpoints", ignore_errors=True)
            return record

    def _resumes(self, place: Path, failed: Record | None, cell: Cell) -> bool:
        """Whether the run goes on: it was ended from outside, and has a folder to go on from."""
        killed = failed is None or failed.exit_code in (*KILLED, *STOPPED)
        return cell.stage != "timing" and killed and (place / "run" / "recipe.yaml").exists()

    @contextmanager
    def _alone(self, place: Path, cell: Cell) -> Iterator[int]:
        """Holds the cell's lock, which its process shares: where only the harness was killed, the process it left behind still has it."""
        handle = os.open(place / "lock", os.O_RDWR | os.O_CREAT)
        told = False
        try:
            while not self.stopped:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told:
                        self.console.print(f"{cell.label}: another process still runs it; waiting until that one ends", highlight=False, markup=False)
                        told = True
                    time.sleep(0.5)
            yield handle
        finally:
            os.close(handle)

    def _environment(self, slot: str | None, cell: Cell) -> dict[str, str]:
        environment = dict(os.environ)
        if slot is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot
        if self.jobs > 1 and self.launcher.here and cell.stage != "timing":  # else each process takes all cores, and they slow each other down
            environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.jobs, 1)))
        return environment

    def _stop(self) -> None:
        """Ends all running cells; none starts any more."""
        with self.lock:
            self.stopped = True
            self.launcher.stop()
