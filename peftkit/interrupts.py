"""SIGTERM and SIGINT as a wish that is granted at the end of the step, not as the end of the process."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 2.0  # seconds within which another signal is the same one: launchers hand on what a terminal has sent to all


class Interrupted(RuntimeError):
    """Training ended at a signal, after a whole step and its checkpoint."""

    def __init__(self, number: int, step: int, checkpoint: Path):
        super().__init__(f"{signal.Signals(number).name} after step {step}, which is saved in {checkpoint}")
        self.number = number
        self.exit_code = 128 + number  # 143 for SIGTERM, 130 for SIGINT: what a shell reports of a process that the signal ended


class StoppedAtOnce(BaseException):
    """A second signal: the process is to end, whatever it does. No Exception, so that nothing goes on with it."""

    def __init__(self, number: int):
        super().__init__(f"{signal.Signals(number).name} twice: stopped within a step; earlier checkpoints are whole, `--resume` goes on from the newest")
        self.exit_code = 128 + number


class Interrupts:
    """While it is open, the first SIGTERM or SIGINT is only remembered in `number`; a second one, later, ends the work at once.

    Python lets the main thread alone handle signals; in another thread nothing is changed.
    """

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            # One that is ignored (SIGINT of a background job in a script) stays ignored.
            self.before = {number: signal.signal(number, self._remember) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > ECHO:
            raise StoppedAtOnce(number)
