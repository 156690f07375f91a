"""peftkit bench run | report | advise | gate | accept: suites, side-by-side reports, advice, and a gate for CI."""

from __future__ import annotations

from typing import Annotated

import typer

bench = typer.Typer(help="Suites of methods and seeds; side-by-side report; gate on a baseline.", no_args_is_help=True)

FOLDER = "runs/bench"
ResultsPath = Annotated[str, typer.Argument(metavar="RESULTS", help="A results.json, or the folder of a suite.")]
Folder = Annotated[str, typer.Option(help="Where suites keep their cells.")]


@bench.command()
def run(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A suite (YAML).")],
    output: Annotated[str | None, typer.Option(help="Write the results to this file too.")] = None,
    folder: Folder = FOLDER,
    jobs: Annotated[int, typer.Option(min=1, help="Cells that run at the same time.")] = 1,
    only: Annotated[str | None, typer.Option(help="Run these methods only: lora,dora")] = None,
) -> None:
    """Run every cell of a suite that is not done yet; exit 1 when any failed."""
    import signal
    from pathlib import Path

    from peftkit.bench.cells import load_results, run_suite, write_results
    from peftkit.bench.report import terminal
    from peftkit.bench.suite import load_suite
    from peftkit.cli.common import stderr, stdout

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped CI job must not leave its cells running
    loaded = load_suite(suite)
    names = [name.strip() for name in only.split(",")] if only else None
    try:
        records = run_suite(loaded, folder, jobs, names, stderr())
    except KeyboardInterrupt:
        typer.echo("stopped; finished cells are kept, and the same command goes on with the others", err=True)
        raise typer.Exit(130) from None
    results = load_results(Path(folder) / loaded.name)
    if output:
        write_results(Path(output), results)
    terminal(results, stdout())
    failed = [record for record in records if record.status == "failed"]
    for record in failed:
        typer.secho(f"{record.failure()}, log: {record.log}", fg="red", err=True)
    if failed:
        raise typer.Exit(1)


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
    margin: Annotated[float, typer.Option(min=0.0, max=1.0, help="Drop that is tolerated beside noise, as a fraction.")] = 0.02,
    folder: Folder = FOLDER,
) -> None:
    """Exit 1 when a method's accuracy is below its baseline by more than margin and noise."""
    from pathlib import Path

    from peftkit.bench.cells import load_results
    from peftkit.bench.gate import gate as judge
    from peftkit.bench.gate import load_baseline
    from peftkit.cli.common import stdout
    from peftkit.config import ConfigError
    from peftkit.console import table

    expected = load_baseline(baseline)
    if results is None and expected.suite is None:
        raise ConfigError(f"{baseline}: names no suite, so name the results too: peftkit bench gate RESULTS --baseline {baseline}")
    verdicts = judge(load_results(results or Path(folder) / str(expected.suite)), expected, margin)
    rows = []
    for v in verdicts:
        numbers = ["-" if value is None else f"{value:.1%}" for value in (v.accuracy, v.baseline, v.least)]
        rows.append([v.method, *numbers, "pass" if v.passed else "FAIL", v.words])
    stdout().print(table("gate", ["method", "accuracy", "baseline", "lowest that passes", "verdict", "why"], rows))
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


@bench.command()
def accept(
    results: ResultsPath,
    output: Annotated[str, typer.Option(metavar="FILE", help="The baseline file to write.")],
) -> None:
    """Make results the baseline of later ones."""
    from pathlib import Path

    from peftkit.bench.cells import load_results
    from peftkit.bench.gate import accept as accepted
    from peftkit.bench.gate import baseline_json

    text = baseline_json(accepted(load_results(results)))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(text)
    typer.echo(f"baseline: {output}")
