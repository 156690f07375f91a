"""peftkit run, peftkit check, peftkit rehearse."""

from __future__ import annotations

import gc
import json
import os
from typing import Annotated

import typer

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe (YAML), or the name of one of `peftkit recipes`.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as train.max_steps=50.")]


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in output_dir.")] = False,
) -> None:
    """Train, evaluate, save."""
    from peftkit.cli.common import quiet_libraries, recipe_path, stderr
    from peftkit.cli.print import print_result
    from peftkit.run import run as run_recipe

    quiet_libraries()
    result = run_recipe(recipe_path(recipe), overrides or [], resume, stderr())
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        print_result(result)


def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="SIZE", help="Memory of the GPU that the run is for, such as 24GB; by default this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="For a run that is to go on from the newest checkpoint in output_dir.")] = False,
) -> None:
    """All that can be known before training, without training or loading weights: recipe, data, what would be adapted, peak memory."""
    from peftkit.check import check as check_recipe
    from peftkit.cli.common import quiet_libraries, recipe_path
    from peftkit.cli.print import print_check

    quiet_libraries()
    gc.disable()  # for seconds, in which nothing piles up: looking for garbage among all that was imported took a seventh of them
    report = check_recipe(recipe_path(recipe), overrides or [], gpu, resume)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print_check(report)


def rehearse(
    recipe: RecipeFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps to train.")] = 3,
) -> None:
    """The whole recipe in seconds on a shrunken random model of its architecture, before a GPU is rented; keeps nothing."""
    from peftkit.cli.common import quiet_libraries, recipe_path, stderr
    from peftkit.cli.print import print_rehearsal
    from peftkit.rehearse import rehearse as rehearse_recipe

    quiet_libraries()
    print_rehearsal(rehearse_recipe(recipe_path(recipe), overrides or [], steps, stderr()))
