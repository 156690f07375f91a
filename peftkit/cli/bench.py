"""peftkit bench run | report | advise | gate | accept: suites, side-by-side reports, advice, and a gate for CI."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from peftkit.bench.launch import Launcher
    from peftkit.bench.records import Record
    from peftkit.bench.suite import Suite

bench = typer.Typer(help="Suites of methods and seeds; side-by-side report; gate on a baseline.", no_args_is_help=True)

FOLDER = "runs/bench"
ResultsPath = Annotated[str, typer.Argument(metavar="RESULTS", help="A results.json, or the folder of a suite.")]
Folder = Annotated[str, typer.Option(help="Where suites keep their cells.")]


@bench.command()
def run(
    suite: Annotated[str | None, typer.Argument(metavar="[SUITE]", help="A suite (YAML), or the name of one in benchmarks/suites.")] = None,
    output: Annotated[str | None, typer.Option(help="Write the results to this file too.")] = None,
    folder: Folder = FOLDER,
    jobs: Annotated[int, typer.Option(min=1, help="Cells that run at the same time; on GPUs each has one of its own.")] = 1,
    only: Annotated[str | None, typer.Option(help="Run these methods only: lora,dora")] = None,
    recipe: Annotated[str | None, typer.Option(help="Instead of a suite: your own recipe, with --methods in the place of its own.")] = None,
    methods: Annotated[str | None, typer.Option(help="With --recipe: lora,dora,qlora,loraplus,lora+neftune,full,...; the first is the reference.")] = None,
    budget: Annotated[str | None, typer.Option(help="With --recipe: time for all, such as 2h; learning rates and seeds are chosen to fit.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="With --recipe: seeds of each method.")] = None,
    learning_rates: Annotated[str | None, typer.Option(help="With --recipe: 1e-4,3e-4,1e-3; of several, each method's best is chosen first.")] = None,
    launcher: Annotated[str, typer.Option(help="local, or submitit for a cluster.")] = "local",
    launcher_option: Annotated[list[str] | None, typer.Option(help="With submitit, as often as needed: slurm_partition=gpu, timeout_min=240, ...")] = None,
) -> None:
    """Run every cell of a suite that is not done yet; exit 1 when any failed or the time was over."""
    import signal

    from peftkit.bench.cells import load_results, run_suite, write_results
    from peftkit.bench.report import terminal
    from peftkit.bench.suite import find_suite, load_suite
    from peftkit.cli.common import stderr, stdout
    from peftkit.config import ConfigError

    gc.enable()  # off for the imports
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped CI job must not leave its cells running
    given = {"--methods": methods, "--budget": budget, "--seeds": seeds, "--learning-rates": learning_rates}
    if (suite is None) == (recipe is None):
        raise ConfigError("give a suite, or --recipe with --methods" + (", not both" if suite else ""))
    if suite is not None and (odd := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"{', '.join(odd)}: for --recipe; a suite says these itself")
    names = _names(only) or None
    started = _launcher(launcher, launcher_option or [], Path(folder))
    try:
        if suite is not None:
            loaded, seconds = load_suite(find_suite(suite)), None
        else:
            loaded, seconds = _own(recipe_file(recipe), _names(methods), budget, seeds, learning_rates, Path(folder), jobs, started)
        records = run_suite(loaded, folder, jobs, names, stderr(), launcher=started, seconds=seconds)
    except KeyboardInterrupt:
        typer.echo("stopped; finished cells are kept, begun ones too, and the same command goes on with them", err=True)
        raise typer.Exit(130) from None
    results = load_results(Path(folder) / loaded.name)
    if output:
        write_results(Path(output), results)
    terminal(results, stdout())
    for found in results.search:
        typer.echo(found.words(), err=True)
    for record in results.failed:
        typer.secho(f"{record.failure()}, log: {record.log}", fg="red", err=True)
    if results.unfinished:
        typer.secho(f"{results.unfinished} cells are not done: the time was over", fg="red", err=True)
    if results.failed or results.unfinished or not records:
        raise typer.Exit(1)


def recipe_file(recipe: str | None) -> str:
    """The file of --recipe."""
    from peftkit.cli.common import recipe_path

    assert recipe is not None
    return recipe_path(recipe)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _launcher(name: str, options: list[str], folder: Path) -> Launcher | None:
    """The launcher of --launcher; None is this machine. Raises ConfigError."""
    from peftkit.bench.launch import Submitit
    from peftkit.config import ConfigError, apply_overrides, parse_yaml, suggest

    if name not in ("local", "submitit"):
        raise ConfigError(f"--launcher {name}: unknown{suggest(name, ('local', 'submitit'))} (there are: local, submitit)")
    if name == "local":
        if options:
            raise ConfigError("--launcher-option: for --launcher submitit")
        return None
    given = apply_overrides(parse_yaml("cluster: null"), options).data
    return Submitit(folder.absolute() / "submitit", {key: value for key, value in given.items() if key != "cluster"}, given["cluster"])


def _own(
    recipe: str, methods: list[str], budget: str | None, seeds: int | None, rates: str | None, folder: Path, jobs: int, launcher: Launcher | None
) -> tuple[Suite, float | None]:
    """The suite of the user's own recipe, and the seconds left for it."""
    from peftkit.bench.own import SEEDS, checked, own_suite, plan, rungs_of, searching, seconds_of
    from peftkit.bench.search import must_have_optuna
    from peftkit.cli.common import stderr
    from peftkit.config import ConfigError

    if not methods:
        raise ConfigError("--recipe needs --methods: lora,dora,qlora,loraplus, say")
    try:
        grid = [float(rate) for rate in _names(rates)] or None
    except ValueError:
        raise ConfigError(f"--learning-rates {rates}: write numbers, as in 1e-4,3e-4,1e-3") from None
    if (grid is None and budget) or len(grid or []) > 1:
        must_have_optuna()
    if budget is None:
        suite = own_suite(recipe, methods, seeds or SEEDS, grid, False)
        steps = suite.recipe_of("", methods[0])["train"].get("max_steps")
        return checked(searching(suite, rungs_of(steps)) if steps and len(grid or []) > 1 else suite, folder / suite.name), None
    allowed, console, started = seconds_of(budget), stderr(), time.monotonic()
    console.print("the first run tells how much fits", highlight=False)
    middle = sorted(grid)[(len(grid) - 1) // 2 :][:1] if grid else None
    record = next((found for method in methods if (found := _first(recipe, method, middle, folder, launcher, allowed - time.monotonic() + started))), None)
    if record is None:
        raise ConfigError(f"--budget {budget}: no run got through in that time; what is done is kept, and the same command with more goes on")
    planned = plan(record, len(methods), allowed - record.wall_seconds, jobs, seeds, len(grid) if grid else None)
    console.print(planned.words(allowed), highlight=False)
    suite = own_suite(recipe, methods, planned.seeds, grid, planned.rates > 1)
    return checked(searching(suite, planned.rungs), folder / suite.name), max(allowed - (time.monotonic() - started), 1.0)


def _first(recipe: str, method: str, rates: list[float] | None, folder: Path, launcher: Launcher | None, seconds: float) -> Record | None:
    """One run of a method by itself, to reckon from; None where it failed (which is told, and stands in the results later) or there was no time for it."""
    from peftkit.bench.cells import run_suite
    from peftkit.bench.own import checked, own_suite
    from peftkit.cli.common import stderr

    alone = own_suite(recipe, [method], 1, rates, False)
    alone = checked(alone.model_copy(update={"timing": False}), folder / alone.name)
    records = run_suite(alone, folder, 1, None, stderr(), launcher=launcher, seconds=seconds)
    return next((record for record in records if record.status == "done"), None)


@bench.command()
def report(
    results: ResultsPath,
    format: Annotated[str, typer.Option(help="terminal, markdown or html")] = "terminal",
    output: Annotated[str | None, typer.Option(help="Write it to this file.")] = None,
    plots: Annotated[str | None, typer.Option(metavar="FOLDER", help="Write the figures there too, as SVG and PNG.")] = None,
) -> None:
    """Methods side by side: accuracy with intervals, forgetting, speed, memory, size; html is one page with figures and examples."""
    from pathlib import Path

    from rich.console import Console

    from peftkit.bench.cells import load_results
    from peftkit.bench.report import markdown, terminal
    from peftkit.cli.common import stdout
    from peftkit.config import ConfigError, suggest

    formats = ("terminal", "markdown", "html")
    if format not in formats:
        raise ConfigError(f"--format {format}: unknown{suggest(format, formats)} (there are: {', '.join(formats)})")
    loaded = load_results(results)
    if plots:
        from peftkit.bench.plots import save_plots

        for path in save_plots(loaded, plots):
            typer.echo(f"figure: {path}", err=True)
    if format == "terminal":
        if output:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            with Path(output).open("w") as file:
                terminal(loaded, Console(file=file, width=160))
        else:
            terminal(loaded, stdout())
        return
    if format == "html":
        from peftkit.bench.page import html

        text = html(loaded)
    else:
        text = markdown(loaded)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text)
    else:
        typer.echo(text, nl=False)


@bench.command()
def advise(
    model: Annotated[str, typer.Option(help="A hub id, a local folder or builtin:tiny.")],
    rows: Annotated[int, typer.Option(min=1, help="Training rows.")],
    memory: Annotated[str, typer.Option(help="Of the GPU: 24GB or 24GiB.")],
    results: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Measured results; may be repeated. By default benchmarks/results.")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of the longest row.")] = 512,
    json_: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Which setting to take, from measured records, with the evidence and its limits; exit 1 when nothing fits."""
    import json

    from rich.markup import escape

    from peftkit.bench.advise import advise as advised
    from peftkit.cli.common import quiet_libraries, stdout
    from peftkit.console import table

    quiet_libraries()
    found = advised(model, rows, memory, results or [], max_length)
    if json_:
        print(json.dumps(found.to_json(), indent=2))
    else:
        lines = [[each.name, escape(each.take), escape(each.evidence)] for each in found.settings]
        stdout().print(table("advice", ["setting", "take", "evidence"], lines))
        for limit in found.limits:
            typer.echo(f"limit: {limit}")
        if found.recipe:
            typer.echo(f"\n{found.yaml()}", nl=False)
    if not found.fits:
        raise typer.Exit(1)


@bench.command()
def gate(
    baseline: Annotated[str, typer.Option(metavar="FILE", help="Made by `bench accept`, or an earlier results.json.")],
    results: Annotated[str | None, typer.Argument(metavar="[RESULTS]", help="By default those of the suite in --folder.")] = None,
    margin: Annotated[float, typer.Option(min=0.0, max=1.0, help="Drop of accuracy that is tolerated, as a fraction.")] = 0.02,
    time_margin: Annotated[float, typer.Option(min=0.0, help="Rise of the step time over the frozen base that is tolerated, as a fraction.")] = 0.05,
    memory_margin: Annotated[float, typer.Option(min=0.0, help="Rise of memory that is tolerated, as a fraction.")] = 0.10,
    junit: Annotated[str | None, typer.Option(metavar="FILE", help="Write the verdicts as JUnit XML.")] = None,
    summary: Annotated[str | None, typer.Option(metavar="FILE", envvar="GITHUB_STEP_SUMMARY", help="Add the verdicts to this file as Markdown.")] = None,
    folder: Folder = FOLDER,
) -> None:
    """Exit 1 when accuracy, step time or memory of a method are worse than its baseline by more than margin and noise."""
    import os
    from pathlib import Path

    from peftkit.bench import ci
    from peftkit.bench.baseline import load_baseline
    from peftkit.bench.cells import load_results
    from peftkit.bench.gate import Margins
    from peftkit.bench.gate import gate as judge
    from peftkit.cli.common import stdout
    from peftkit.config import ConfigError
    from peftkit.console import table

    expected = load_baseline(baseline)
    if results is None and expected.suite is None:
        raise ConfigError(f"{baseline}: names no suite, so name the results too: peftkit bench gate RESULTS --baseline {baseline}")
    loaded = load_results(results or Path(folder) / str(expected.suite))
    verdicts = judge(loaded, expected, Margins(margin, time_margin, memory_margin))
    stdout().print(table("gate", list(ci.COLUMNS), ci.rows(verdicts)))
    typer.echo(ci.headline(loaded.suite, verdicts))
    if junit:
        Path(junit).parent.mkdir(parents=True, exist_ok=True)
        Path(junit).write_text(ci.junit(loaded.suite, verdicts))
    if summary:
        ci.append(Path(summary), ci.summary(loaded.suite, verdicts))
    if os.environ.get("GITHUB_ACTIONS"):
        for line in ci.github_annotations(loaded.suite, verdicts):
            typer.echo(line)
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


@bench.command()
def accept(
    results: ResultsPath,
    output: Annotated[str, typer.Option(metavar="FILE", help="The baseline file to write.")],
) -> None:
    """Make results the baseline of later ones."""
    from pathlib import Path

    from peftkit.bench.baseline import accept as accepted
    from peftkit.bench.baseline import baseline_json
    from peftkit.bench.cells import load_results

    text = baseline_json(accepted(load_results(results)))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(text)
    typer.echo(f"baseline: {output}")
