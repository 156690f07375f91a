"""The learning rate of a method on a task, by successive halving (Jamieson & Talwalkar 2016; asynchronous: Li et al. 2020) with optuna.

A run of a rung is a whole short run with its own schedule. The rates are tried in turn, the middle of the grid first; one goes on to the next rung
while it is among the best third, and at least the best, of those that were there before it. Rates are judged by the loss on rows of the training
set that are held out, never by the evaluation set. The same suite gives the same trials, so an interrupted search goes on from its records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal

from peftkit.bench.keys import Code
from peftkit.bench.records import Record, Searched
from peftkit.bench.suite import Cell, Suite, make_cell, merge
from peftkit.config import ConfigError

FACTOR = 3  # one in so many goes on


def must_have_optuna() -> None:
    """Raises ConfigError where it is not installed."""
    if find_spec("optuna") is None:
        raise ConfigError('a learning rate is chosen with optuna, which is not installed: pip install "peftkit[bench]"; or give each method one rate')


def search(suite: Suite, task: str, method: str, code: Code, run: Callable[[Cell], Record]) -> Searched:
    """Tries the method's learning rates on a task. `run` gives the record of a cell. Raises ConfigError where optuna is not installed."""
    must_have_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rates, rungs = sorted(suite.rates_of(method)), suite.search.rungs
    changes, judged_by = held_out(suite.recipe_of(task, method), suite.search.holdout)
    tried: dict[float, list[list[float | None]]] = {}

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_categorical("learning_rate", rates)
        loss = math.inf
        for i, steps in enumerate(rungs):
            at = merge(changes, {"train": {"learning_rate": rate, "max_steps": steps, "num_epochs": None}})
            records = [run(make_cell(suite, code, task, method, seed, at, "search")) for seed in suite.search.seeds]
            whole = all(record.status == "done" for record in records)
            loss = sum(record.after["loss"] for record in records) / len(records) if whole else math.inf
            tried.setdefault(rate, []).append([steps, loss if whole else None])
            trial.report(loss, FACTOR**i)
            if not whole or trial.should_prune():
                raise optuna.TrialPruned
        return loss

    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=FACTOR)
    study = optuna.create_study(direction="minimize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    for rate in sorted(rates, key=lambda rate: abs(rates.index(rate) - (len(rates) - 1) / 2)):
        study.enqueue_trial({"learning_rate": rate})
    study.optimize(objective, n_trials=len(rates))
    chosen = best(tried, rates)
    edges: dict[float, Literal["lowest", "highest"]] = {rates[0]: "lowest", rates[-1]: "highest"}
    return Searched(
        task=task, method=method, rates=rates, chosen=chosen, edge=edges.get(chosen), judged_by=judged_by,
        losses={f"{rate:g}": tried[rate] for rate in sorted(tried)},
    )  # fmt: skip


def best(tried: Mapping[float, list[list[float | None]]], rates: list[float]) -> float:
    """The rate of lowest loss among those that got furthest; the lowest rate where none got through."""
    reached = {rate: (-len(finite), finite[-1]) for rate, rungs in tried.items() if (finite := [loss for _, loss in rungs if loss is not None])}
    return min(reached, key=lambda rate: reached[rate]) if reached else min(rates)


def held_out(recipe: Mapping[str, Any], share: float) -> tuple[dict[str, Any], str]:
    """(changes to a recipe that has it judged by the loss on held-out training rows, those rows in words)."""
    changes: dict[str, Any] = {
        "eval": {"metrics": ["loss"], "retained": [], "before": False, "choices": None, "choice_length": "total", "match": "text"},
        "train": {"eval_every": None, "patience": None},
    }  # fmt: skip
    if recipe.get("data", {}).get("holdout"):
        return changes, "the recipe's own holdout, which the final runs are judged by too"
    return merge(changes, {"data": {"eval": None, "holdout": share}}), f"the last {share:.0%} of the training rows, held out"
