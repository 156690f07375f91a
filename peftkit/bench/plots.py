"""The report's figures as files, SVG and PNG, drawn by matplotlib from the same charts as those of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit.bench.charts import Axis, Chart, Figure, figures
from peftkit.bench.palette import GREY, LIGHT
from peftkit.bench.records import Results

MARKERS = ("o", "s", "^", "D", "v", "P", "*", "d")
COLUMNS = 3
WIDTHS: dict[str, dict[str, Any]] = {"bold": {"linewidth": 2}, "faint": {"linewidth": 1, "alpha": 0.35}, "dashed": {"linewidth": 1.2, "linestyle": "--"}}


def save_plots(results: Results, folder: str | Path) -> list[Path]:
    """Writes every figure that has something to show as <key>.svg and <key>.png into `folder`; the paths written."""
    import matplotlib

    Path(folder).mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "peftkit"}):  # equal results give equal files
        return [path for figure in figures(results) if figure.charts for path in _save(figure, Path(folder))]


def _save(figure: Figure, folder: Path) -> list[Path]:
    from matplotlib import pyplot

    columns = min(COLUMNS, len(figure.charts))
    rows = -(-len(figure.charts) // columns)
    size = (3.6 * columns, 2.9 * rows) if figure.small else (7, 4.5)
    drawn, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for place, chart in zip(axes.flat, figure.charts, strict=False):
        _draw(place, chart)
    for empty in axes.flat[len(figure.charts) :]:
        empty.set_axis_off()
    if not figure.small and not figure.charts[0].y.categories:
        axes[0][0].legend(fontsize=8)
    drawn.suptitle(_plain(figure.title), fontsize=11)
    paths = [folder / f"{_file_name(figure.key)}.{kind}" for kind in ("svg", "png")]
    drawn.savefig(paths[0], metadata={"Date": None})
    drawn.savefig(paths[1], dpi=130)
    pyplot.close(drawn)
    return paths


def _draw(place: Any, chart: Chart) -> None:
    for series in chart.series:
        colour = LIGHT[series.style % len(LIGHT)] if series.style >= 0 else GREY
        for line in series.lines:
            place.plot(*zip(*line.points, strict=True), color=colour, **WIDTHS[line.weight])
        for i, mark in enumerate(series.marks):
            x_error = None if mark.x_span is None else [[mark.x - mark.x_span[0]], [mark.x_span[1] - mark.x]]
            y_error = None if mark.y_span is None else [[mark.y - mark.y_span[0]], [mark.y_span[1] - mark.y]]
            face = "white" if mark.hollow else colour
            place.errorbar(
                mark.x, mark.y, y_error, x_error, marker=MARKERS[series.style % len(MARKERS)], color=colour, markerfacecolor=face, capsize=3,
                linestyle="none", label=_plain(series.name) if i == 0 else None,
            )  # fmt: skip
            if mark.ringed:
                place.plot(mark.x, mark.y, marker="o", markersize=14, color=colour, fillstyle="none", linestyle="none")
    for axis, which in ((chart.x, "x"), (chart.y, "y")):
        _scale(place, axis, which)
    place.set_title(_plain(chart.title), fontsize=9)
    place.grid(alpha=0.3)


def _scale(place: Any, axis: Axis, which: str) -> None:
    getattr(place, f"set_{which}label")(_plain(axis.label), fontsize=8)
    place.tick_params(which, labelsize=8)
    if axis.categories:
        getattr(place, f"set_{which}ticks")(range(len(axis.categories)), [_plain(name) for name in axis.categories])
        place.invert_yaxis()
        return
    if axis.log:
        getattr(place, f"set_{which}scale")("log")
    else:
        getattr(place, f"{which}axis").set_major_formatter(lambda value, _: _plain(axis.text(value)))


def _plain(text: str) -> str:
    """Without matplotlib's own mathematics: a dollar sign in a name is a dollar sign."""
    return text.replace("$", r"\$")


def _file_name(key: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in key)
