"""peftkit bench run | report | gate | accept: suites, side-by-side reports, and a gate for CI."""

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
    format: Annotated[str, typer.Option(help="terminal or markdown")] = "terminal",
    output: Annotated[str | None, typer.Option(help="Write it to this file.")] = None,
) -> None:
    """Methods side by side: accuracy with intervals, forgetting, speed, memory, size."""
    from pathlib import Path

    from rich.console import Console

    from peftkit.bench.cells import load_results
    from peftkit.bench.report import markdown, terminal
    from peftkit.cli.common import stdout
    from peftkit.config import ConfigError, suggest

    if format not in ("terminal", "markdown"):
        raise ConfigError(f"--format {format}: unknown{suggest(format, ('terminal', 'markdown'))} (there are: terminal, markdown)")
    loaded = load_results(results)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with Path(output).open("w") as file:
            file.write(markdown(loaded)) if format == "markdown" else terminal(loaded, Console(file=file, width=160))
    elif format == "markdown":
        typer.echo(markdown(loaded), nl=False)
    else:
        terminal(loaded, stdout())


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
