"""Results as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.text import Text

from peftkit.amounts import human
from peftkit.cli.common import stdout
from peftkit.console import table

if TYPE_CHECKING:
    from peftkit.check import CheckReport
    from peftkit.rehearse import Rehearsal
    from peftkit.result import Result


def print_result(result: Result) -> None:
    """The final table of a run: scores before and after, then what it cost and where it lies."""
    console = stdout()
    names = [name for name in result.after if name != "retained"]
    rows: list[list[Any]] = [[name, result.before.get(name), result.after[name]] for name in names]
    rows += [[f"  {name}", result.before.get("retained", {}).get(name), score] for name, score in result.after.get("retained", {}).items()]
    rows = [[escape(name), *scores] for name, *scores in rows]
    console.print(table(escape(f"{result.recipe['model']['name']} on {result.recipe['data']['train']}"), ["", "before", "after"], rows))
    train, adapter = result.train, result.adapter
    console.print(
        f"training {train['seconds']:.1f} s, {train['steps']} steps, {train['tokens']:,} tokens ({train['tokens_per_second']:,.0f} tokens/s), "
        f"peak memory {human(train['peak_memory_bytes'])}; {adapter['trainable_parameters']:,} parameters trained, {human(adapter['bytes'])} saved",
        highlight=False,
    )
    console.print(f"run folder: {result.output_dir}", highlight=False, markup=False, soft_wrap=True)


def print_check(report: CheckReport) -> None:
    """The report of `peftkit check`: every section, then the first rows with their trained tokens marked."""
    console = stdout()
    for title, lines in report.sections.items():
        console.print(Text(title, style="bold"))
        for line in lines:
            console.print(Text(f"  {line}"), soft_wrap=True)
    for shown, marked in report.rows:
        console.print(Text("row with its trained tokens marked", style="bold"))
        console.print(shown if console.is_terminal else Text(marked), soft_wrap=True)
    console.print(Text("ok", style="green"))


def print_rehearsal(rehearsal: Rehearsal) -> None:
    """What a rehearsal was of, and what it cannot tell since it was stood in for."""
    console = stdout()
    for title, lines in {"real": rehearsal.real, "stood in for": rehearsal.stood_in, "done": rehearsal.did}.items():
        console.print(Text(title, style="bold"))
        for line in lines:
            console.print(Text(f"  {line}"), soft_wrap=True)
    console.print(Text("ok", style="green"))
