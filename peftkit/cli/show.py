"""peftkit recipes, methods, doctor: what is there, and what this machine can do."""

from __future__ import annotations


def recipes() -> None:
    """The recipes that come with peftkit."""
    from peftkit.cli.common import shipped_recipes, stdout
    from peftkit.console import table

    rows = []
    for name, path in shipped_recipes().items():
        first = next((line for line in path.read_text().splitlines() if line.startswith("#")), "")
        rows.append([name, first.lstrip("# ").strip()])
    stdout().print(table("recipes", ["name", "what it does"], rows))


def methods() -> None:
    """The methods with their options and defaults."""
    from peftkit.cli.common import stdout
    from peftkit.config import defaults_table
    from peftkit.console import table
    from peftkit.methods import REGISTRY

    for name, method in REGISTRY.items():
        rows = [[key, default, description] for key, _, default, description in defaults_table(method)]
        stdout().print(table(f"{name}: {(method.__doc__ or '').strip().splitlines()[0]}", ["option", "default", "what it does"], rows))


def doctor() -> None:
    """Versions and hardware, and what follows from them."""
    import torch

    from peftkit.cli.common import stdout
    from peftkit.console import table
    from peftkit.model import best_dtype
    from peftkit.result import machine, versions

    facts = {**versions(), **machine()}
    facts["dtype auto means"] = str(best_dtype()).removeprefix("torch.")
    facts["paged 8-bit optimizer"] = "yes" if torch.cuda.is_available() else "no GPU: plain AdamW runs instead"
    stdout().print(table("this machine", ["", ""], [[key, str(value)] for key, value in facts.items()]))
