"""What the commands share."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from pathlib import Path

from rich.console import Console

from peftkit.config import ConfigError, suggest


def stderr() -> Console:
    """Where progress goes: standard output stays free for results."""
    return Console(stderr=True)


def stdout() -> Console:
    """Where results go; wide in a file or a pipe, so that tables are not cut."""
    return Console(width=None if sys.stdout.isatty() else 160)


def quiet_libraries() -> None:
    """For the time after the imports: garbage is collected again, the libraries' own progress bars stay out of log files, and their advice out of sight."""
    import transformers

    gc.freeze()  # what was imported stays, and is left out of every collection
    gc.enable()
    transformers.logging.disable_progress_bar()
    warnings.formatwarning = _in_one_line
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _in_one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning to the user without the place in the code that gave it; others, which are about the code, with it."""
    return f"warning: {message}\n" if category is UserWarning else f"{filename}:{lineno}: {category.__name__}: {message}\n"


def shipped_recipes() -> dict[str, Path]:
    """The recipes of this installation by name: beside a checkout's package, or packed into the wheel."""
    package = Path(__file__).parents[1]
    folder = next((place for place in (package / "recipes", package.parent / "recipes") if place.is_dir()), None)
    return {path.stem: path for path in sorted(folder.rglob("*.yaml"))} if folder else {}


def recipe_path(name: str) -> str:
    """The file of a recipe given by path or by name."""
    if Path(name).suffix in (".yaml", ".yml") or Path(name).exists():
        return name
    shipped = shipped_recipes()
    if name not in shipped:
        raise ConfigError(f"no recipe file and no shipped recipe is called {name!r}{suggest(name, shipped)} (shipped: {', '.join(shipped)})")
    return str(shipped[name])
