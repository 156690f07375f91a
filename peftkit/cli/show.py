"""peftkit recipes, methods, doctor: what is there, and what this machine can do."""

from __future__ import annotations

from typing import Annotated

import typer


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


def doctor(json_: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """What this machine can do, tried out: versions, device, 4 bits, kernels, extras. Exit code 1 where something needed is broken."""
    import json

    from rich.markup import escape

    from peftkit.cli.common import quiet_libraries, stdout
    from peftkit.console import table
    from peftkit.doctor import doctor as look

    quiet_libraries()
    found = look()
    if json_:
        print(json.dumps(found.to_json(), indent=2))
    else:
        rows = [[each.area, each.name, each.state, escape(each.told + (f". To do: {each.remedy}" if each.remedy else ""))] for each in found.findings]
        stdout().print(table("this machine", ["", "", "", ""], rows))
        stdout().print("ok" if found.ok else "broken: " + ", ".join(each.name for each in found.findings if each.state == "broken"), highlight=False)
    if not found.ok:
        raise typer.Exit(1)
