"""Where the processes of cells run: here, or as jobs of a cluster through submitit."""

from __future__ import annotations

import fcntl
import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from peftkit.config import ConfigError

ENDED = -15
"""Exit code of a cell whose job the cluster ended, at its time limit say: one of `records.STOPPED`, so it goes on from its checkpoint."""


class Running(Protocol):
    """A process or a job that was started."""

    def wait(self) -> int:
        """Waits for its end; its exit code, negative for the signal that ended it."""


class Launcher(ABC):
    """Starts commands, and can end all that still run."""

    here: bool
    """Whether they share this machine's cores and GPUs."""

    @abstractmethod
    def start(self, command: Sequence[str], log: Path, environment: dict[str, str], lock: int) -> Running:
        """Starts a command that writes what it prints to `log` and, where it runs here, inherits the open file `lock`."""

    @abstractmethod
    def stop(self) -> None:
        """Ends all that was started and still runs."""


class Local(Launcher):
    """Processes of this machine, in the process group of the harness: what kills that, kills them."""

    here = True

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], log: Path, environment: dict[str, str], lock: int) -> Running:
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock])
        self.processes = [each for each in self.processes if each.poll() is None] + [process]
        return process

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


class Submitit(Launcher):
    """Jobs of Slurm, or of submitit's other executors. `options` go to it as they are: slurm_partition, timeout_min, gpus_per_node, ..."""

    here = False

    def __init__(self, folder: Path, options: Mapping[str, Any], cluster: str | None = None):
        if find_spec("submitit") is None:
            raise ConfigError('--launcher submitit: the package submitit is not installed: pip install "peftkit[slurm]"')
        import submitit

        self.jobs: list[Any] = []
        try:
            self.executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
            self.executor.update_parameters(**options)
        except (RuntimeError, ValueError, NameError, TypeError) as error:
            raise ConfigError(f"--launcher submitit: {error}") from error

    def start(self, command: Sequence[str], log: Path, environment: dict[str, str], lock: int) -> Running:
        job = self.executor.submit(run_here, list(command), str(log), os.getcwd())
        self.jobs.append(job)
        return _Job(job, log)

    def stop(self) -> None:
        for job in self.jobs:
            if not job.done():
                job.cancel()


class _Job:
    def __init__(self, job: Any, log: Path):
        self.job, self.log = job, log

    def wait(self) -> int:
        try:
            return int(self.job.result())
        except Exception as error:  # what ended the job itself, such as a time limit of the cluster
            with self.log.open("a") as file:
                file.write(f"\njob {self.job.job_id} of the cluster ended without an exit code: {error}\n")
            return ENDED


def run_here(command: list[str], log: str, folder: str) -> int:
    """What a job of the cluster does: the command, in the folder that it was given in; its exit code.

    It holds a lock of the cell's folder meanwhile, and waits for it: where the harness was killed, the job it had started may still run.
    """
    with Path(log).with_name("job.lock").open("w") as lock, Path(log).open("wb") as file:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            file.write(f"warning: this disk has no locks ({error}), so nothing would keep a second job out of this folder\n".encode())
            file.flush()
        return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT).returncode
