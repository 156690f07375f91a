"""What a person sees while work goes on: progress bars on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

LINE_EVERY = 15.0  # seconds between lines where there is no terminal


class Bar:
    """One piece of long work: `advance` after each part, with a note shown beside the bar."""

    def __init__(self, console: Console, title: str, total: int):
        self.console, self.title, self.total, self.done, self.note = console, title, total, 0, ""
        self.started = self.printed = time.monotonic()
        self.behind = 0  # parts that were done before this bar began
        self.progress: Progress | None = None
        self.task: Any = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
            )
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task(title, total=total, note="")
            self.progress.start()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        self.note = self.note if note is None else note
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done, note=self.note)
        elif time.monotonic() - self.printed > LINE_EVERY:
            self.printed = time.monotonic()
            self.console.print(f"{self.title} {self.done}/{self.total}  {self.note}  {self._left()}", highlight=False)

    def _left(self) -> str:
        """The time left at the pace so far."""
        seconds = (time.monotonic() - self.started) / max(self.done - self.behind, 1) * (self.total - self.done)
        return f"{seconds / 60:.0f} min left" if seconds >= 120 else f"{seconds:.0f} s left"

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
        else:
            self.console.print(f"{self.title} {self.done}/{self.total}  {self.note}", highlight=False)


@contextmanager
def bar(console: Console, title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A progress bar for `total` parts, of which `done` lie behind."""
    shown = Bar(console, title, total)
    if done:
        shown.behind = done
        shown.advance(done)
    try:
        yield shown
    finally:
        shown.stop()


def number(value: Any) -> str:
    """A metric for a table."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def table(title: str, columns: list[str], rows: list[list[Any]]) -> Table:
    """A plain table: texts to the left, numbers to the right."""
    made = Table(title=title, title_justify="left", min_width=min(len(title) + 4, 100))
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if all(isinstance(row[i], str) for row in rows) else "right")
    for row in rows:
        made.add_row(*(number(cell) for cell in row))
    return made
