"""The command line: each command parses, calls one function and prints.

Exit codes: 0 done, 1 failed, 2 bad recipe or usage. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from typing import Annotated

import typer

from peftkit.cli.bench import bench
from peftkit.cli.show import doctor, methods, recipes
from peftkit.cli.train import check, rehearse, run
from peftkit.cli.use import chat, evaluate, export, generate, merge
from peftkit.interrupts import StoppedAtOnce

CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

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
    gc.disable()  # importing torch and transformers makes a million objects that stay: looking through them took a fifth of the time, for nothing
    try:
        app(arguments, standalone_mode=True)
    except Exception as error:
        sys.exit(_report(error))
    except StoppedAtOnce as stopped:
        typer.secho(str(stopped), fg="red", err=True)
        sys.exit(stopped.exit_code)
    finally:
        gc.freeze()  # nor are they looked through at the end, when all of it goes anyway
        gc.enable()


def _report(error: Exception) -> int:
    """Prints what a person can act on and returns the exit code; a bug of ours keeps its traceback."""
    from peftkit.config import ConfigError

    def say(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
            typer.secho(text, fg="red", err=True)

    notes = getattr(error, "__notes__", [])  # where what was made is kept
    if isinstance(error, ConfigError):
        say("\n".join([f"error: {error}", *notes]))
        return 2
    from peftkit.interrupts import Interrupted

    if isinstance(error, Interrupted):
        say("\n".join([f"stopped: {error}", *notes]))
        return error.exit_code
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        unreadable = error.filename is not None and os.path.isfile(error.filename) and not os.access(error.filename, os.R_OK)
        hint = "this file may not be read" if unreadable else "what was complete before is untouched. Make room, or give another folder"
        say("\n".join([f"failed: {error.strerror}: {error.filename or 'while writing'}; {hint}", *notes]))
        return 1
    from peftkit.checkpoint import CheckpointError
    from peftkit.merge import MergeError
    from peftkit.train import TrainingStopped

    if isinstance(error, (CheckpointError, MergeError, TrainingStopped)):
        say("\n".join([f"failed: {error}", *notes]))
        return 1
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        remedy = "lower train.micro_batch_size or set it to auto, set train.gradient_checkpointing: true, shorten data.max_length, or quantize the base"
        say(f"failed: the GPU's memory is full: {error}\n{remedy}; `peftkit check` forecasts what is needed. Earlier checkpoints are whole")
        return 1
    raise error
