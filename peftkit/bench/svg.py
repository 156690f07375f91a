"""Charts as SVG for the page: colours by class, so that they follow the page's light and dark; everything that comes from data escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from peftkit.bench.charts import Axis, Chart, Mark, Series

CHARACTER = 6.6  # width of a character at 12 px, about
SHAPES = 8
COLOURS = 10
RIGHT = 22  # room for half of a label at the end of the axis


class Scale:
    """Values of an axis as pixels from `start` to `end`, and the values that get a tick."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float, most: int):
        self.axis, self.start, self.end = axis, start, end
        if axis.categories:
            self.low, self.high = -0.6, len(axis.categories) - 0.4
            self.ticks: list[float] = [float(i) for i in range(len(axis.categories))]
            return
        values = [*values, *(axis.range or ())]
        self.low, self.high = min(values), max(values)
        if axis.log:
            self.low, self.high = math.log10(self.low), math.log10(self.high)
        gap = (self.high - self.low) * 0.06 or abs(self.high) * 0.1 or 1.0
        exact = axis.range is not None and not axis.log and axis.range[0] == 0 and min(values) == 0
        self.low, self.high = self.low if exact else self.low - gap, self.high + (0 if exact else gap)
        self.ticks = log_ticks(self.low, self.high, most) if axis.log else ticks(self.low, self.high, most)

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self.axis.log and not self.axis.categories else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)

    def text(self, tick: float) -> str:
        return self.axis.categories[int(tick)] if self.axis.categories else self.axis.text(tick)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values between low and high: multiples of 1, 2, 2.5 or 5 times a power of ten, at most `most`."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10, 20) if (high - low) / (factor * step) <= most)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values between 10^low and 10^high: 1, 2, 5 times powers of ten, or powers alone where those are enough."""
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for f in factors if low <= math.log10(f * 10.0**e) <= high]
        if len(found) <= most:
            break
    return found[:: -(-len(found) // most) or 1] or [10 ** ((low + high) / 2)]


def render(chart: Chart, width: int, height: int, name: str) -> Markup:
    """One chart, `width` x `height` in units of the view box; `name` makes the ids of its title and description unlike others'."""
    marks = [mark for series in chart.series for mark in series.marks]
    points = [point for series in chart.series for line in series.lines for point in line.points]
    xs = [mark.x for mark in marks] + [x for x, _ in points] + [x for mark in marks for x in mark.x_span or ()]
    ys = [mark.y for mark in marks] + [y for _, y in points] + [y for mark in marks for y in mark.y_span or ()]
    top, bottom = (26 if chart.title else 8), (44 if chart.x.label else 26)
    y = Scale(chart.y, ys, *((top, height - bottom) if chart.y.categories else (height - bottom, top)), most=max(2, height // 45))
    longest = max((len(y.text(tick)) for tick in y.ticks), default=1)
    left = min(longest, width * 0.4 / CHARACTER) * CHARACTER + (10 if chart.y.categories else 34)
    x = Scale(chart.x, xs, left, width - RIGHT, most=max(2, int((width - left) // 64)))

    parts = [Markup('<title id="{0}-t">{1}</title><desc id="{0}-d">{2}</desc>').format(name, chart.title or chart.x.label or name, chart.told)]
    if chart.title:
        parts.append(Markup('<text class="head" x="{}" y="15">{}</text>').format(_n(left if not chart.y.categories else 4), chart.title))
    parts += _axes(chart, x, y, left, top, width, height - bottom)
    for series in chart.series:
        parts += _series(series, x, y)
    body = Markup("").join(parts)
    opening = Markup('<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-labelledby="{2}-t {2}-d">').format(width, height, name)
    return opening + body + Markup("</svg>")


def marker(style: int, x: float = 0, y: float = 0, hollow: bool = False, size: float = 5) -> Markup:
    """The shape of a style around (x, y)."""
    place = {"x": _n(x), "y": _n(y)}
    kind = Markup("mark hollow" if hollow else "mark")
    return Markup('<path class="{kind} s{colour}" transform="translate({x} {y})" d="{d}"/>').format(
        kind=kind, colour=style % COLOURS, d=_shape(style % SHAPES, size), **place
    )


def legend(names: dict[str, int]) -> Markup:
    """The markers of methods with their names."""
    entry = '<li><svg class="key" viewBox="-8 -8 16 16" width="16" height="16" aria-hidden="true">{}</svg>{}</li>'
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(Markup(entry).format(marker(style), name) for name, style in names.items()))


# --- parts --------------------------------------------------------------------------------------------------------------------


def _axes(chart: Chart, x: Scale, y: Scale, left: float, top: float, width: int, floor: float) -> list[Markup]:
    line = Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    label = Markup('<text class="{}" x="{}" y="{}">{}</text>')
    parts = []
    for tick in x.ticks:
        parts += [line.format("grid", _n(x(tick)), _n(x(tick)), _n(top), _n(floor)), label.format("tick mid", _n(x(tick)), _n(floor + 16), x.text(tick))]
    for tick in y.ticks:
        text, room = y.text(tick), int(left / CHARACTER)
        shown = text if len(text) <= room else text[: room - 1] + "…"
        parts += [line.format("grid", _n(left), _n(width - RIGHT), _n(y(tick)), _n(y(tick))), label.format("tick end", _n(left - 6), _n(y(tick) + 4), shown)]
    if chart.x.label:
        parts.append(label.format("name mid", _n((left + width - RIGHT) / 2), _n(floor + 36), chart.x.label))
    if chart.y.label:
        middle = _n((top + floor) / 2)
        parts.append(Markup('<text class="name mid" transform="translate(12 {}) rotate(-90)">{}</text>').format(middle, chart.y.label))
    return parts


def _series(series: Series, x: Scale, y: Scale) -> list[Markup]:
    colour = f"s{series.style % COLOURS}" if series.style >= 0 else "other"
    parts = []
    for line in series.lines:
        points = " ".join(f"{_n(x(a))},{_n(y(b))}" for a, b in line.points)
        parts.append(Markup('<polyline class="line {} {}" points="{}"/>').format(line.weight, colour, points))
    for mark in series.marks:
        parts.append(Markup('<g class="point"><title>{}</title>{}</g>').format(mark.text, Markup("").join(_mark(mark, series.style, colour, x, y))))
    return parts


def _mark(mark: Mark, style: int, colour: str, x: Scale, y: Scale) -> list[Markup]:
    parts, whisker = [], Markup('<path class="whisker {}" d="{}"/>')
    if mark.x_span:
        low, high, at = _n(x(mark.x_span[0])), _n(x(mark.x_span[1])), y(mark.y)
        parts.append(whisker.format(colour, f"M{low} {_n(at)}H{high}M{low} {_n(at - 4)}v8M{high} {_n(at - 4)}v8"))
    if mark.y_span:
        low, high, at = _n(y(mark.y_span[0])), _n(y(mark.y_span[1])), x(mark.x)
        parts.append(whisker.format(colour, f"M{_n(at)} {low}V{high}M{_n(at - 4)} {low}h8M{_n(at - 4)} {high}h8"))
    if mark.ringed:
        parts.append(Markup('<circle class="ring" cx="{}" cy="{}" r="10"/>').format(_n(x(mark.x)), _n(y(mark.y))))
    return [*parts, marker(style, x(mark.x), y(mark.y), mark.hollow)]


def _shape(number: int, r: float) -> str:
    """Circle, square, triangle, diamond, triangle down, cross, star, bar: told apart without colour."""
    arm, star = 0.4, [(math.sin(i * math.pi / 5) * (1.4, 0.6)[i % 2], -math.cos(i * math.pi / 5) * (1.4, 0.6)[i % 2]) for i in range(10)]
    quarter = [(-arm, -1.2), (arm, -1.2), (arm, -arm)]
    polygons = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
        3: [(0, -1.35), (1.1, 0), (0, 1.35), (-1.1, 0)],
        4: [(0, 1.2), (1.15, -0.9), (-1.15, -0.9)],
        5: [*quarter, *((-b, a) for a, b in quarter), *((-a, -b) for a, b in quarter), *((b, -a) for a, b in quarter)],
        6: star,
        7: [(-0.5, -1.3), (0.5, -1.3), (0.5, 1.3), (-0.5, 1.3)],
    }
    if number == 0:
        return f"M{-r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z"
    return "M" + "L".join(f"{_n(a * r)} {_n(b * r)}" for a, b in polygons[number]) + "Z"


def _n(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return escape(f"{value:.1f}".removesuffix(".0"))
