"""Which setting to take for a model, so many rows and so much memory: from measured records, each recommendation with its evidence and limits.

Of the results given, those on the base nearest in size to the model count. Among their methods those are kept that cannot be told apart
from the best one; of these the one with the cheapest step that fits. Memory is a forecast (`peftkit.forecast`), not a measurement. What
was not measured near the model's size is said to be unknown: no setting is filled in from elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.amounts import human
from peftkit.bench.cells import Record, Results, load_results
from peftkit.bench.charts import rate_of, with_interval
from peftkit.bench.compare import Comparison, against, task_names
from peftkit.bench.overview import done, percent_or_number, score
from peftkit.config import ConfigError, dump_yaml
from peftkit.forecast import Budget, Forecast, Plan, Row, Sizes, Skeleton, budget, largest_micro_batch, of_micro_batch
from peftkit.model import load_config
from peftkit.recipe import Recipe, load_recipe

FOLDER = Path("benchmarks/results")  # of a checkout, where no results are named
NEAR = 4.0  # models within this factor of each other's size count as of one size
UNKNOWN = "unknown"
STAND_IN = "builtin:copy/train"  # rows that the forecast's recipe names and nobody reads


@dataclass(frozen=True)
class Setting:
    """One line of the advice."""

    name: str
    take: str
    evidence: str


@dataclass
class Advice:
    """What to take, why, and how far that holds; `recipe` holds the settings that are known."""

    settings: list[Setting] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    fits: bool = True

    def to_json(self) -> dict[str, Any]:
        return {"settings": [vars(setting) for setting in self.settings], "limits": self.limits, "recipe": self.recipe, "fits": self.fits}

    def yaml(self) -> str:
        return dump_yaml(self.recipe)


@dataclass(frozen=True)
class Evidence:
    """A results file and the size of the base that it is about, None where that is not known here."""

    path: str
    results: Results
    base: str
    parameters: int | None


def advise(model: str, rows: int, memory: str, files: Sequence[str] = (), max_length: int = 512) -> Advice:
    """The advice for `rows` training rows of at most `max_length` tokens and a GPU of `memory`, such as "24GB".

    files: results files or suite folders; by default those in benchmarks/results. Raises ConfigError where there are none, where a named
    one is not whole, and where the model's config cannot be had.
    """
    there = budget(memory, "--memory")
    config = load_config(model)
    found = _nearest([_evidence(path, results) for path, results in read_results(files)], _parameters(model, config))
    size = _parameters(model, config)
    advice = Advice()
    best, contenders = _contenders(found.results)
    chosen = _choose(advice, found, best, contenders, model, config, there, max_length)
    if chosen is None:
        return advice
    method, recipe, comparison = chosen
    record = done(found.results.methods[method])[0]
    _tell_rank(advice, found, method)
    _tell_rate(advice, found, method, size)
    _tell_rows(advice, record, rows, recipe)
    _tell_limits(advice, found, size, model, comparison)
    return advice


def read_results(files: Sequence[str]) -> list[tuple[str, Results]]:
    """The named results, or those of suites in FOLDER; only such as have a finished cell. Raises ConfigError."""
    if files:
        read = [(path, load_results(path)) for path in files]
    else:
        paths = sorted(FOLDER.glob("*.json")) if FOLDER.is_dir() else []
        read = [(str(path), load_results(path)) for path in paths if _is_suite(path)]
        if not read:
            raise ConfigError(f"no results to advise from: {FOLDER}/ holds none; name some with --results, or measure: peftkit bench run SUITE")
    usable = [(path, results) for path, results in read if _contenders(results)[1]]
    if not usable:
        raise ConfigError(f"no finished cells to advise from in {', '.join(path for path, _ in read)}: peftkit bench run goes on with the others")
    return usable


def _is_suite(path: Path) -> bool:
    """Whether a JSON file is results of a suite; measurements of other kinds stand beside them."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    return isinstance(content, dict) and {"suite", "metric", "cells"} <= content.keys()


# --- which records count ------------------------------------------------------------------------------------------------------


def _evidence(path: str, results: Results) -> Evidence:
    record = next(record for records in results.methods.values() for record in done(records))
    base = str(record.recipe.get("model", {}).get("name", UNKNOWN))
    try:
        return Evidence(path, results, base, _parameters(base, load_config(base)))
    except ConfigError:  # a base that is not on this machine: its records count, without a size to go by
        return Evidence(path, results, base, None)


def _parameters(name: str, config: Any) -> int:
    """Parameters of a model, its weights not loaded."""
    return Skeleton(_recipe(name, {"methods": ["lora"]}, 512, False), config, gpu=False).parameters


def _nearest(found: list[Evidence], parameters: int) -> Evidence:
    """The one on the base nearest in size; unknown sizes last, more finished cells first among equals."""

    def distance(each: Evidence) -> tuple[float, int]:
        far = math.inf if each.parameters is None else abs(math.log(each.parameters / parameters))
        return far, -sum(len(done(records)) for records in each.results.methods.values())

    return min(found, key=distance)


def _contenders(results: Results) -> tuple[str, dict[str, Comparison | None]]:
    """The best method by its mean, and the methods that cannot be told apart from it (itself: None), those with failed cells left out."""
    whole = {name: records for name, records in results.methods.items() if records and all(r.status == "done" for r in records)}
    means = {name: found.mean for name, records in whole.items() if (found := score(records, results.metric, task_names(results)))}
    if not means:
        return "", {}
    sign = 1 if results.higher_better else -1
    best = max(means, key=lambda name: sign * means[name])
    compared = {name: against(results, name, best) for name in means if name != best}
    return best, {best: None} | {name: each for name, each in compared.items() if each.outcome == "equal"}


# --- the choice ---------------------------------------------------------------------------------------------------------------


def _choose(
    advice: Advice, found: Evidence, best: str, contenders: dict[str, Comparison | None], model: str, config: Any, there: Budget, max_length: int
) -> tuple[str, Recipe, Comparison | None] | None:  # fmt: skip
    """The cheapest contender that fits, with its recipe; tells method, quantisation, batch and checkpointing. None where nothing fits."""
    costs = _costs(found.results, list(contenders))
    ordered = sorted(contenders, key=lambda name: (costs.get(name, math.inf), list(contenders).index(name)))
    tried: list[str] = []
    unfit: list[str] = []
    for checkpointing in (False, True):
        for method in ordered:
            given = done(found.results.methods[method])[0].recipe
            try:
                recipe = _recipe(model, given, max_length, checkpointing)
                skeleton = Skeleton(recipe, config, there.gpu)
            except ConfigError as error:  # targets by name that this model does not have, say
                unfit.append(f"{method} cannot be used on {model}: {str(error).splitlines()[0]}")
                continue
            plan = Plan(Sizes.of([Row(max_length, max_length)] * recipe.train.batch_size))
            if there.holds(smallest := of_micro_batch(skeleton, plan, 1)):
                micro = largest_micro_batch(skeleton, plan, there)
                _tell_choice(advice, found, best, method, contenders, ordered)
                advice.limits += list(dict.fromkeys(unfit))
                _tell_memory(advice, recipe, of_micro_batch(skeleton, plan, micro), micro, there, tried)
                return method, recipe, contenders[method]
            tried.append(f"{method}{' with checkpointing' if checkpointing else ''} needs {human(smallest.total)} for one row at a time")
    advice.fits = False
    advice.limits += [*tried, *dict.fromkeys(unfit)]
    advice.settings.append(Setting("method", UNKNOWN, f"none of {', '.join(ordered)} fits into {human(there.bytes)} with rows of {max_length} tokens"))
    return None


def _costs(results: Results, methods: list[str]) -> dict[str, float]:
    """Step times to compare methods by: over the frozen base where all of them were timed so, else seconds per step; without those that have none."""
    timed = [record for record in results.cells if record.stage == "timing" and record.status == "done"]
    ratios = {method: [record.timing["over_base"] for record in timed if record.method == method] for method in methods}
    if not all(ratios.values()):
        ratios = {
            method: [record.train["seconds"] / record.train["steps"] for record in done(results.methods[method]) if record.train.get("steps")]
            for method in methods
        }  # fmt: skip
    return {method: sum(found) / len(found) for method, found in ratios.items() if found}


def _recipe(model: str, given: dict[str, Any], max_length: int, checkpointing: bool) -> Recipe:
    """The measured recipe on another model: methods, quantisation and batch of it, nothing else."""
    train = {key: value for key, value in given.get("train", {}).items() if key in ("batch_size", "full_finetuning")}
    quantize = given.get("model", {}).get("quantize")
    return load_recipe({
        "model": {"name": model} | ({"quantize": quantize} if quantize else {}),
        "methods": given.get("methods", []),
        "data": {"train": STAND_IN, "max_length": max_length},
        "train": train | {"max_steps": 1, "gradient_checkpointing": checkpointing},
        "output_dir": "runs/advised",
    })  # fmt: skip


# --- what is told -------------------------------------------------------------------------------------------------------------


def _tell_choice(advice: Advice, found: Evidence, best: str, method: str, contenders: dict[str, Comparison | None], ordered: list[str]) -> None:
    results = found.results
    own = score(done(results.methods[method]), results.metric, task_names(results))
    assert own is not None
    text = with_interval(own, lambda value: percent_or_number(results.metric, value))
    why = f"{results.metric} {text}, {_cells(found, method)}"
    if comparison := contenders[method]:
        why += f"; {comparison.words()}"
    if len(contenders) > 1 and method in _costs(results, list(contenders)):
        why += f"; its step is the cheapest of those that fit and cannot be told apart from the best ({', '.join(ordered)})"
    advice.settings.append(Setting("method", method, why))
    record = done(results.methods[method])[0]
    advice.recipe["methods"] = record.recipe.get("methods", [])
    if record.recipe.get("train", {}).get("full_finetuning"):
        advice.recipe["train"] = {"full_finetuning": True}
    beaten = [name for name in results.methods if name not in contenders and done(results.methods[name])]
    if beaten:
        advice.limits.append("left out, told apart from the best or with failed cells: " + "; ".join(_beaten(results, name, best) for name in beaten))


def _beaten(results: Results, name: str, best: str) -> str:
    failed = [record for record in results.methods[name] if record.status == "failed"]
    return f"{name} ({len(failed)} cells failed)" if failed else against(results, name, best).words()


def _tell_memory(advice: Advice, recipe: Recipe, forecast: Forecast, micro: int, there: Budget, tried: list[str]) -> None:
    train, length = recipe.train, recipe.data.max_length
    peak = f"forecast, not measured: peak {human(forecast.total)} of {human(there.bytes)} with {micro} rows of {length} tokens at a time, evaluation left out"
    advice.settings += [
        Setting("quantisation", recipe.quantize or "none", "as in the measured cells"),
        Setting("batch_size", str(train.batch_size), "as in the measured cells"),
        Setting("micro_batch_size", str(micro), peak),
        Setting("gradient_checkpointing", "yes" if train.gradient_checkpointing else "no", "; ".join(tried) if tried else "it fits without"),
    ]
    advice.recipe["model"] = {"name": recipe.model.name} | ({"quantize": recipe.model.quantize} if recipe.model.quantize else {})
    advice.recipe["data"] = {"max_length": length}
    advice.recipe["train"] = advice.recipe.get("train", {}) | {
        "batch_size": train.batch_size,
        "micro_batch_size": micro,
        "gradient_checkpointing": train.gradient_checkpointing,
    }


def _tell_rank(advice: Advice, found: Evidence, method: str) -> None:
    """The rank, and what methods that differ in nothing else than rank scored."""
    results, own = found.results, _ranks(done(found.results.methods[method])[0])
    if not own:
        return
    others = [
        name
        for name, records in results.methods.items()
        if name != method and (part := done(records)) and _same_but_rank(done(results.methods[method])[0], part[0])
    ]
    compared = [f"rank {_text(_ranks(done(results.methods[name])[0]))}: {against(results, name, method).words()}" for name in others]
    why = "; ".join(compared) if compared else f"the only rank measured with these methods, {_cells(found, method)}: whether another is better is unknown"
    advice.settings.append(Setting("rank", _text(own), why))


def _ranks(record: Record) -> list[int]:
    return [options["r"] for entry in record.recipe.get("methods", []) if isinstance(entry, dict) for options in entry.values() if "r" in (options or {})]


def _text(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _same_but_rank(a: Record, b: Record) -> bool:
    def without(record: Record) -> Any:
        return [{name: {k: v for k, v in (options or {}).items() if k not in ("r", "alpha")} for name, options in entry.items()}
                for entry in record.recipe.get("methods", []) if isinstance(entry, dict)]  # fmt: skip

    return without(a) == without(b) and a.recipe.get("model") == b.recipe.get("model") and _ranks(a) != _ranks(b)


def _tell_rate(advice: Advice, found: Evidence, method: str, size: int) -> None:
    """The learning rate, where it was measured near the model's size; else that it is unknown, and how to find it."""
    final = sorted({rate for record in done(found.results.methods[method]) if (rate := rate_of(record))})
    cells = [record for record in found.results.cells if record.method == method and record.status == "done" and record.stage != "timing"]
    rates = sorted({rate for record in cells if (rate := rate_of(record))})
    told = f"{', '.join(f'{rate:g}' for rate in final)} in the final cells, of {len(rates)} tried ({', '.join(f'{rate:g}' for rate in rates)})"
    if len(rates) == 1:
        told = f"{rates[0]:g}, the only one tried"
    if found.parameters is not None and 1 / NEAR < found.parameters / size < NEAR and final:
        edge = " the best lies at the end of those tried, so a better one may lie beyond" if len(rates) > 1 and final[0] in (rates[0], rates[-1]) else ""
        advice.settings.append(
            Setting("learning_rate", f"{final[0]:g}" if len(final) == 1 else UNKNOWN, f"{told}, {_cells(found, method)}{edge and ';' + edge}")
        )
        if len(final) == 1:
            advice.recipe["train"]["learning_rate"] = final[0]
        return
    why = f"measured on {found.base} only ({told}), which is of another size ({_of(found.parameters)} parameters to {_of(size)}); search for it: "
    advice.settings.append(Setting("learning_rate", UNKNOWN, f"{why}learning_rates in a suite, or several runs with train.learning_rate"))


def _tell_rows(advice: Advice, record: Record, rows: int, recipe: Recipe) -> None:
    """How long: one pass in steps, beside what the measured cells did."""
    steps, batch = record.train.get("steps") or None, recipe.train.batch_size
    measured = f"each measured cell trained {steps} steps, which is {steps * batch:,} rows" if steps else "how long the measured cells trained is not known"
    one_pass = -(-rows // batch)
    why = f"{measured}; one pass over {rows:,} rows is {one_pass:,} steps of {batch}, and how many passes are best was not measured"
    near = steps is not None and 1 / NEAR < one_pass / steps < NEAR
    advice.settings.append(Setting("steps", f"{one_pass:,} (one pass)" if near else UNKNOWN, why))
    if near:
        advice.recipe["train"]["max_steps"] = one_pass


def _tell_limits(advice: Advice, found: Evidence, size: int, model: str, comparison: Comparison | None) -> None:
    results = found.results
    about = ", ".join(task for task in task_names(results) if task) or "one task"
    advice.limits.append(f"all evidence is from {found.path}: suite {results.suite}, {about}, base {found.base} with {_of(found.parameters)} parameters")
    if found.parameters is None or not 1 / NEAR < found.parameters / size < NEAR:
        advice.limits.append(f"nothing was measured near the {_of(size)} parameters of {model}: that the order of methods is the same there is not known")
    if comparison and comparison.difference:
        advice.limits.append(f"the choice among methods that cannot be told apart is by cost; the best of them may be up to {_reach(comparison)} better")
    advice.limits.append("your rows are not the suite's: peftkit bench run on your own recipe tells for them")


def _reach(comparison: Comparison) -> str:
    """The most that the best method may be ahead of the one chosen."""
    d = comparison.difference
    assert d is not None
    return f"{d.measure.number(max(d.high if d.measure.lower_is_better else -d.low, 0.0), sign=False)} {d.measure.unit}"


def _cells(found: Evidence, method: str) -> str:
    records = done(found.results.methods[method])
    return (
        f"{found.path}: {len(records)} cells of {method} (n = {len(records[0].outcomes)} examples each)"
        if records[0].outcomes
        else f"{found.path}: {len(records)} cells of {method}"
    )


def _of(parameters: int | None) -> str:
    """A number of parameters for people; unknown where it is."""
    if parameters is None:
        return "an unknown number of"
    return f"{parameters / 1e9:.2g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"
