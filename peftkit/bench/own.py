"""Suites without a suite file: the user's own recipe with each of several methods in the place of its own, sized to a time.

The first cell is run and timed; learning rates and seeds are planned so that all cells fit into what is left, and the plan is said before it is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.bench.records import Record
from peftkit.bench.suite import METRICS, Search, Suite, Timing, load_suite, merge
from peftkit.config import ConfigError, dump_yaml, read_yaml, suggest

COMPOSED: dict[str, dict[str, Any]] = {
    "full": {"methods": [], "train": {"full_finetuning": True}},
    "qdora": {"model": {"quantize": "nf4"}, "methods": ["dora"]},
    "rslora": {"methods": [{"lora": {"rslora": True}}]},
    "pissa": {"methods": [{"lora": {"init": "pissa"}}]},
}
"""Methods under names of their own, beside those of the registry and their sums (`lora+neftune`)."""
FULL_RATE = 0.1  # full finetuning's learning rate over that of adapters, where the recipe gives the other's
SPREAD = (1 / 3, 1.0, 3.0)  # of the recipe's learning rate: what is searched
SEEDS = 3
SEARCH_SEED = 1000  # no final cell's, and the same for every plan: a longer budget goes on with the searches of a shorter one
PLANS = ((3, 3), (1, 3), (3, 2), (1, 2), (3, 1), (1, 1))  # (learning rates, seeds), the best first


def own_suite(path: str, names: Sequence[str], seeds: int, rates: Sequence[float] | None, searched: bool) -> Suite:
    """The suite of the recipe file at `path` and the named methods, `seeds` seeds each.

    rates: of every method; by default the recipe's own, or that and its neighbours where `searched`. Raises ConfigError.
    """
    recipe = read_yaml(path).data
    recipe.pop("output_dir", None)
    methods = {name: changes_of(name, recipe) for name in dict.fromkeys(names)}
    metrics = (recipe.get("eval") or {}).get("metrics") or ["loss"]
    compared = {metric.asked_by: name for name, metric in reversed(METRICS.items())}
    metric = next((compared[wanted] for wanted in ("exact_match", "choice_accuracy", *metrics) if wanted in metrics and wanted in compared), None)
    if metric is None:
        raise ConfigError(f"{path}: eval.metrics: nothing in {metrics} can be compared (one of {', '.join(METRICS)})")
    content: dict[str, Any] = {"name": f"{re.sub(r'[^A-Za-z0-9_.+-]', '-', Path(path).stem).lstrip('_.+-') or 'own'}-methods", "recipe": recipe}
    content |= {"methods": methods, "seeds": list(range(seeds)), "metric": metric, "timing": Timing().model_dump()}
    train = recipe.get("train") or {}
    own, full = train.get("learning_rate", 2.0e-4), bool(train.get("full_finetuning"))
    middle = {name: own if (name == "full") == full else own * FULL_RATE if name == "full" else own / FULL_RATE for name in methods}
    if rates or searched:
        content["learning_rates"] = {name: list(rates) if rates else [middle[name] * factor for factor in SPREAD] for name in methods}
        for changes in methods.values():
            changes.get("train", {}).pop("learning_rate", None)
    else:
        for name in methods:
            if middle[name] != own:
                methods[name]["train"] = methods[name].get("train", {}) | {"learning_rate": middle[name]}
    return Suite(**content)


def changes_of(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """What puts a named method in the place of the recipe's own: rank, alpha, targets and whatever else both have are kept."""
    from peftkit.methods import REGISTRY, from_recipe  # imports torch

    if name in COMPOSED:
        changes = merge(COMPOSED[name], {})
    else:
        parts = name.split("+")
        for part in parts:
            if part not in REGISTRY:
                raise ConfigError(f"--methods: unknown method {part!r}{suggest(part, [*REGISTRY, *COMPOSED])} (there are: {', '.join([*REGISTRY, *COMPOSED])})")
        swapping = any(REGISTRY[part].swaps_layers for part in parts)
        changes = {"methods": parts if swapping else ["lora", *parts]}
    own = next((method for method in from_recipe(recipe.get("methods") or []) if method.swaps_layers), None)
    kept = own.model_dump(exclude_unset=True) if own is not None else {}
    written = []
    for entry in changes["methods"]:
        [(method, fields)] = entry.items() if isinstance(entry, dict) else [(entry, {})]
        shared = {key: value for key, value in kept.items() if key in REGISTRY[method].model_fields} if REGISTRY[method].swaps_layers else {}
        written.append({method: shared | fields})
    train = {} if name == "full" else {"train": {"full_finetuning": False}} if (recipe.get("train") or {}).get("full_finetuning") else {}
    return merge(changes | {"methods": written}, train)


# --- time ---------------------------------------------------------------------------------------------------------------------


def seconds_of(text: str) -> float:
    """2h, 90m, 1h30m, 45s -> seconds. Raises ConfigError."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    total = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if not total:
        raise ConfigError(f"--budget {text}: write a time such as 2h, 90m or 1h30m")
    return total


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    rates: int
    seeds: int
    cells: int
    seconds: float
    """Expected, of all cells."""
    rungs: tuple[int, ...] = ()

    def words(self, budget: float) -> str:
        """The plan in a sentence."""
        search = (
            f"{self.rates} learning rates each, chosen after {' and '.join(map(str, self.rungs))} steps" if self.rates > 1 else "the learning rate as it is"
        )
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        line = f"plan: {search}; {seeds}; {self.cells} runs, about {clock(self.seconds)} of the {clock(budget)}"
        if self.seconds > budget:
            line += "; that is more than there is time for, so it will end before it is done: name fewer methods, or give it longer"
        return line


def clock(seconds: float) -> str:
    """5430 -> 1h31m, for people."""
    minutes = max(round(seconds / 60), 1)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m" if seconds >= 90 else f"{seconds:.0f}s"


def plan(first: Record, methods: int, budget: float, jobs: int, seeds: int | None, rates: int | None) -> Plan:
    """The best of PLANS that fits into `budget` seconds, else the smallest; `seeds` and `rates` are what the user has set.

    Reckoned from the first cell: a run takes the seconds beside training that it took, and its seconds per step; step times of methods differ, so a
    quarter is added.
    """
    steps = first.train["steps"]
    beside, per_step = max(first.wall_seconds - first.train["seconds"], 0.0), first.train["seconds"] / steps
    rungs = rungs_of(steps)

    def sized(r: int, s: int) -> Plan:
        tried = methods * r if r > 1 else 0
        again = methods * math.ceil(r / 2) if r > 1 and len(rungs) > 1 else 0
        searching = tried * (beside + rungs[0] * per_step) + again * (beside + rungs[-1] * per_step)
        final = methods * s * (beside + steps * per_step)
        alone = methods * (beside + 16 * 8 * per_step)
        return Plan(r, s, tried + again + methods * s, 1.25 * ((searching + final) / jobs + alone), rungs)

    wanted = [sized(rates or r, seeds or s) for r, s in PLANS]
    return next((each for each in wanted if each.seconds <= budget), min(wanted, key=lambda each: each.seconds))


def rungs_of(steps: int) -> tuple[int, ...]:
    """The steps for which learning rates are tried where runs have so many: a quarter, and half for those that keep up."""
    return tuple(sorted({max(steps // 4, 1), max(steps // 2, 1)}))


def searching(suite: Suite, rungs: Sequence[int]) -> Suite:
    """The suite with its rungs and a search seed that no final cell has."""
    return suite.model_copy(update={"search": Search(rungs=list(rungs), seeds=[SEARCH_SEED])})


def checked(suite: Suite, folder: Path) -> Suite:
    """The suite, read back from the file that it is kept in: what is wrong with it is told as of any other, and it can be run again by its file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "suite.yaml"
    path.write_text(dump_yaml(suite.model_dump(exclude_defaults=True)))
    return load_suite(path)
