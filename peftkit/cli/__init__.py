"""The command line: each command parses, calls one function and prints.

Exit codes: 0 done, 1 failed, 2 bad recipe or usage. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from peftkit.cli.bench import bench
from peftkit.cli.show import doctor, methods, recipes
from peftkit.cli.train import check, rehearse, run
from peftkit.cli.use import chat, evaluate, export, generate, merge

app = typer.Typer(help="Parameter-efficient finetuning of Hugging Face models.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(run)
app.command()(check)
app.command()(rehearse)
app.command(name="eval")(evaluate)
app.command()(generate)
app.command()(chat)
app.command()(merge)
app.command()(export)
app.add_typer(bench, name="bench")
app.command()(recipes)
app.command()(methods)
app.command()(doctor)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from peftkit import __version__

        typer.echo(__version__)
        raise typer.Exit()


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; wrong recipes and failed runs end in one message and an exit code, not in a traceback."""
    try:
        app(arguments, standalone_mode=True)
    except Exception as error:
        sys.exit(_report(error))


def _report(error: Exception) -> int:
    """Prints what a person can act on and returns the exit code; a bug of ours keeps its traceback."""
    from peftkit.config import ConfigError

    if isinstance(error, ConfigError):
        typer.secho(f"error: {error}", fg="red", err=True)
        return 2
    from peftkit.checkpoint import CheckpointError
    from peftkit.merge import MergeError
    from peftkit.train import TrainingStopped

    if isinstance(error, (CheckpointError, MergeError, TrainingStopped)):
        typer.secho(f"failed: {error}", fg="red", err=True)
        return 1
    raise error
