"""The report as one HTML page that needs no network: tables, figures, examples and the recipe of every cell, with its styles and script in it.

A content security policy allows the page's own style and script by their hashes and nothing else, so that even text which slipped
through unescaped could neither run nor fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from peftkit.bench.charts import Chart, Figure, figures, rate_of, style_of, with_interval
from peftkit.bench.compare import compare, task_names
from peftkit.bench.overview import comparisons_by_task, done, in_one_sentence, percent_or_number, score
from peftkit.bench.palette import DARK, GREY, LIGHT, MUTED, PAGE, TEXT
from peftkit.bench.records import Record, Results
from peftkit.bench.report import SCORE, Row, columns_and_rows, heading, notes, table
from peftkit.bench.statistics import mean_over_seeds
from peftkit.bench.svg import legend, marker, render
from peftkit.config import dump_yaml

FILES = Path(__file__).parent / "page"
WIDE, HALF, NARROW, SMALL = 1080, 540, 350, 300  # widths of figures: the page's, half of it, a phone's, one of many


def html(results: Results) -> str:
    """The whole page."""
    environment = Environment(loader=FileSystemLoader(FILES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["column"] = lambda name: {"name": name, "kind": "number", "first": "descending"}
    style, script = _colours() + (FILES / "page.css").read_text(), (FILES / "page.js").read_text()
    return environment.get_template("page.html.j2").render(
        results=results,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'",
        sentence=in_one_sentence(results),
        columns=_columns(results),
        rows=_rows(results),
        comparisons=compare(results),
        by_task=comparisons_by_task(results),
        figures=[_drawn(figure, results) for figure in figures(results)],
        tasks=task_names(results),
        task_rows=_task_rows(results) if len(task_names(results)) > 1 else [],
        families=_families(results),
        answers=_answers(results),
        keys={method: _key(style) for method, style in style_of(results).items()},
        groups=_groups(results),
        notes=notes(results),
    )


# --- the tables ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it shows, and what it is sorted by ("" where nothing was measured)."""

    text: str
    sort: str
    small: str = ""


NUMBERS = {
    "before": lambda row: row.before,
    SCORE: lambda row: row.accuracy and row.accuracy.mean,
    "forgetting, points (95% interval)": lambda row: row.forgetting and row.forgetting.mean,
    "step time, x frozen base": lambda row: row.step_ratio,
    "tokens/s": lambda row: row.tokens_per_second and row.tokens_per_second.mean,
    "peak memory, MiB": lambda row: row.peak_memory_bytes and row.peak_memory_bytes.mean,
    "trainable parameters": lambda row: row.trainable_parameters,
    "adapter, KiB": lambda row: row.adapter_bytes,
    "energy of training, kJ": lambda row: row.energy_joules and row.energy_joules.mean,
}
HIGH_FIRST = ("before", SCORE, "tokens/s")


def _columns(results: Results) -> list[dict[str, str]]:
    """The headers; accuracy comes first, because a phone shows no more than that beside the names."""
    high = HIGH_FIRST if results.higher_better else ("tokens/s",)
    columns = [
        {"name": _short(heading(name, results.metric)), "kind": "number", "first": "descending" if name in high else "ascending"} for name in _measured(results)
    ]
    return [{"name": "method", "kind": "text", "first": "ascending"}, *columns]


def _measured(results: Results) -> list[str]:
    names, _ = columns_and_rows(results)
    return sorted((name for name in names if name in NUMBERS), key=lambda name: name != SCORE)


def _short(name: str) -> str:
    return name.replace(" (95% interval)", "")


def _rows(results: Results) -> list[dict[str, Any]]:
    """Our methods, then the published rows of others: the metric and its source, and nothing that was not published."""
    names, texts = columns_and_rows(results)
    rows, shown = [], _measured(results)
    for row, each in zip(table(results), texts, strict=True):
        by_name = dict(zip(names, each, strict=True))
        rows.append(
            {"method": row.method, "small": by_name[names[1]], "failed": bool(row.failed), "published": False}
            | {"cells": [_cell(row, name, by_name[name]) for name in shown]}
        )
    for published in results.published:
        task, metric = f", {published['task']}" if published.get("task") else "", published["metric"]
        value = percent_or_number(metric, published["value"])
        found = Cell(value, str(published["value"])) if metric == results.metric else Cell(value, "", metric)  # another metric is in no order with ours
        cells = [found if name == SCORE else Cell("-", "") for name in shown]
        rows.append({"method": f"{published['method']}{task}", "small": published["source"], "failed": False, "published": True, "cells": cells})
    return rows


def _cell(row: Row, name: str, text: str) -> Cell:
    value = NUMBERS[name](row)
    main, _, interval = text.partition(" (")
    return Cell(main, "" if value is None else str(value), interval.removesuffix(")"))


def _task_rows(results: Results) -> list[dict[str, Any]]:
    """Methods by tasks, the metric with its interval."""
    rows = []
    for method, records in results.methods.items():
        cells = []
        for task in task_names(results):
            found = score(done(records, task), results.metric)
            text = "-" if found is None else with_interval(found, lambda value: percent_or_number(results.metric, value))
            main, _, interval = text.partition(" (")
            cells.append(Cell(main, "" if found is None else str(found.mean), interval.removesuffix(")")))
        rows.append({"method": method, "cells": cells})
    return rows


def _families(results: Results) -> dict[str, Any] | None:
    """Exact match on the families that the base knew: before, and after each method; None where none were scored."""
    names = list(dict.fromkeys(name for records in results.methods.values() for record in done(records) for name in record.after.get("retained", {})))
    if not names:
        return None
    rows = []
    for method, records in results.methods.items():
        cells = []
        for name in names:
            pairs = [(r.before.get("retained", {}).get(name), r.after["retained"][name]) for r in done(records) if name in r.after.get("retained", {})]
            if not pairs:
                cells.append(Cell("-", ""))
                continue
            after = mean_over_seeds([share for _, share in pairs]).mean
            before = [share for share, _ in pairs if share is not None]
            cells.append(Cell(f"{after:.0%}", str(after), f"from {mean_over_seeds(before).mean:.0%}" if before else ""))
        rows.append({"method": method, "cells": cells})
    return {"names": [name.removeprefix("builtin:").removesuffix("/test") for name in names], "rows": rows}


# --- figures ------------------------------------------------------------------------------------------------------------------


def _drawn(figure: Figure, results: Results) -> dict[str, Any]:
    """A figure as SVG: one drawing for a wide page and one for a phone, where the text of one would be too small in the other."""
    drawn, name = [], "".join(c if c.isalnum() else "-" for c in figure.key)
    for i, chart in enumerate(figure.charts):
        wide, narrow = (SMALL, SMALL) if figure.small else (WIDE if chart.y.categories else HALF, NARROW)
        drawings = [render(chart, wide, _height(chart, wide), f"{name}-{i}")]
        if narrow != wide:
            drawings.append(render(chart, narrow, _height(chart, narrow), f"{name}-{i}-narrow"))
        drawn.append(drawings)
    shown = {series.name for chart in figure.charts for series in chart.series if series.style >= 0}
    keys = {method: style for method, style in style_of(results).items() if method in shown}
    needs_legend = any(len({series.name for series in chart.series}) > 2 and not chart.y.categories and not figure.small for chart in figure.charts)
    wide = any(chart.y.categories for chart in figure.charts) or figure.small
    return {"figure": figure, "name": name, "drawn": drawn, "legend": legend(keys) if needs_legend else "", "wide": wide}


def _height(chart: Chart, width: int) -> int:
    if chart.y.categories:
        return 60 + 28 * len(chart.y.categories)
    return round(width * 0.8) if width <= NARROW else round(width * 0.66)


def _key(style: int) -> Markup:
    return Markup('<svg class="key" viewBox="-8 -8 16 16" width="16" height="16" aria-hidden="true">{}</svg>').format(marker(style))


# --- examples -----------------------------------------------------------------------------------------------------------------


def _answers(results: Results) -> dict[str, Any]:
    """task -> texts, and of every method how many seeds got each example right, with the first wrong answer."""
    found: dict[str, Any] = {}
    for task in task_names(results):
        methods = {}
        for method, records in results.methods.items():
            counted = [record for record in done(records, task) if record.outcomes]
            if not counted or len({record.examples for record in counted}) > 1:
                continue
            wrong: dict[str, str] = {}
            for record in counted:
                wrong = record.wrong | wrong
            right = [sum(outcomes) for outcomes in zip(*(record.outcomes for record in counted), strict=True)]
            methods[method] = {"seeds": len(counted), "examples": counted[0].examples, "right": right, "wrong": wrong}
        if len(methods) > 1:
            found[task] = {"texts": results.examples.get(task, []), "methods": methods}
    return found


# --- cells --------------------------------------------------------------------------------------------------------------------


def _groups(results: Results) -> list[dict[str, Any]]:
    """Cells whose recipes differ in nothing but the seed, with that recipe once."""
    found: dict[str, list[Record]] = {}
    for record in results.cells:
        key = json.dumps([record.method, record.task, record.stage, _without_seed(record.recipe), record.machine, record.versions], sort_keys=True)
        found.setdefault(key, []).append(record)
    return [
        {
            "title": _title(records[0]),
            "stage": records[0].stage,
            "records": records,
            "failed": sum(record.status == "failed" for record in records),
            "recipe": dump_yaml(_without_seed(records[0].recipe)) if records[0].recipe else "not kept",
            "machine": _facts(records[0].machine or results.machine),
            "versions": _facts(records[0].versions or results.versions),
            "scores": [percent_or_number(results.metric, r.after[results.metric]) if results.metric in r.after else "-" for r in records],
        }
        for records in found.values()
    ]


def _title(record: Record) -> str:
    rate = rate_of(record)
    steps = record.train.get("steps")
    parts = [record.method, record.task, record.stage, f"learning rate {rate:g}" if rate is not None else "", f"{steps} steps" if steps else ""]
    return ", ".join(part for part in parts if part)


def _without_seed(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"train": {key: value for key, value in recipe["train"].items() if key != "seed"}} if "train" in recipe else recipe


def _facts(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "unknown"


# --- style --------------------------------------------------------------------------------------------------------------------


def _colours() -> str:
    """The palettes as CSS variables, light and dark, and a class for each method's colour."""
    light = {"good": "#116329", "bad": "#a40e26", "link": "#0a58ca", "rule": "#d9dee4", "edge": "#8a939d", "raised": "#f4f6f8"}
    dark = {"good": "#5bd18b", "bad": "#ff8a8a", "link": "#7cb7ff", "rule": "#323a44", "edge": "#717c89", "raised": "#1e242c"}
    themes = {
        name: "".join(f"--{key}: {value}; " for key, value in values.items()) + _variables(colours)
        for name, values, colours in (
            ("light", light | {"page": PAGE["light"], "text": TEXT["light"], "muted": MUTED["light"]}, LIGHT),
            ("dark", dark | {"page": PAGE["dark"], "text": TEXT["dark"], "muted": MUTED["dark"]}, DARK),
        )
    }
    classes = "".join(f".s{i} {{ --c: var(--c{i}); }}\n" for i in range(len(LIGHT))) + f".other {{ --c: {GREY}; }}\n"
    return (
        f":root {{ color-scheme: light; {themes['light']}}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ color-scheme: dark; {themes['dark']}}} }}\n"
        f"@media screen {{ :root[data-theme=dark] {{ color-scheme: dark; {themes['dark']}}} }}\n{classes}"
    )


def _variables(colours: Sequence[str]) -> str:
    return "".join(f"--c{i}: {colour}; " for i, colour in enumerate(colours))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
