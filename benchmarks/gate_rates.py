"""How often the gate fails equal code, and how often it sees a drop of five points, on resampled outcomes of real runs.

    peftkit bench run benchmarks/suites/lora-many.yaml --output benchmarks/results/lora-many.json
    python benchmarks/gate_rates.py benchmarks/results/lora-many.json --output benchmarks/results/gate_rates.json

A null: the seeds of one method are split at random into a baseline and a run, disjoint; of several methods each gets a split of its own.
The test examples stay as they are, as they do between a baseline and a run (drawing them with replacement would count the noise of an
answer twice). A drop: in the run, right answers turn wrong at random, 5 points of them. An
error rate is of whole gates: one that has any failing verdict. Where the file holds too few seeds or examples for a plan, answers are
simulated with the variances that the file shows (marked so). Step times are simulated: rounds scatter by 3%, processes by 1%.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.bench.baseline import Baseline, BaselineMethod, BaselineTiming
from peftkit.bench.cells import Record, Results, load_results
from peftkit.bench.gate import ALPHA, gate, slower
from peftkit.result import machine, versions, write_json

DROP = 0.05


@dataclass(frozen=True)
class Plan:
    """A size of the ci suite."""

    methods: int
    seeds: int
    """Of the run under test."""
    baseline_seeds: int
    examples: int


PLANS = [
    Plan(1, 3, 3, 200), Plan(1, 3, 12, 200), Plan(1, 6, 10, 200), Plan(1, 8, 8, 200), Plan(1, 6, 12, 200), Plan(1, 8, 16, 200),
    Plan(7, 3, 3, 200), Plan(7, 3, 12, 200), Plan(7, 6, 10, 200), Plan(7, 8, 16, 200),
    Plan(1, 6, 12, 500), Plan(7, 3, 12, 500), Plan(7, 6, 12, 500), Plan(7, 8, 16, 500),
]  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """Outcomes of one method: (seeds, examples)."""

    outcomes: np.ndarray

    def draw(self, rng: np.random.Generator, plan: Plan) -> tuple[list[tuple[np.ndarray, np.ndarray]], bool]:
        """Per method the outcomes of (baseline, run), and whether they are real."""
        seeds, examples = self.outcomes.shape
        need = plan.seeds + plan.baseline_seeds
        real = need <= seeds and plan.examples == examples
        drawn = [self.outcomes[rng.permutation(seeds)[:need]] if real else self._simulated(rng, need, plan.examples) for _ in range(plan.methods)]
        return [(y[: plan.baseline_seeds], y[plan.baseline_seeds :]) for y in drawn], real

    def _simulated(self, rng: np.random.Generator, seeds: int, examples: int) -> np.ndarray:
        """Each example is right with a chance of its own, which the seed shifts; both scatter as in the file."""
        mean, of_seed, of_example = self.spread()
        weight = mean * (1 - mean) / max(of_example, 1e-6) - 1  # of the beta distribution with that variance
        ease = rng.beta(mean * weight, (1 - mean) * weight, examples)
        chance = ease + of_seed**0.5 * rng.standard_normal((seeds, 1))
        return (rng.random((seeds, examples)) < chance).astype(int)

    def spread(self) -> tuple[float, float, float]:
        """Mean, variance of the seeds and of the examples, the noise of single answers taken out (crossed analysis of variance)."""
        y = self.outcomes.astype(float)
        seeds, examples = y.shape
        rest = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
        answer = (rest**2).sum() / (seeds - 1) / (examples - 1)
        return float(y.mean()), max(float(y.mean(1).var(ddof=1) - answer / examples), 0.0), max(float(y.mean(0).var(ddof=1) - answer / seeds), 0.0)


def dropped(rng: np.random.Generator, outcomes: np.ndarray) -> np.ndarray:
    """The outcomes with DROP of all answers turned from right to wrong, in expectation."""
    return outcomes * (rng.random(outcomes.shape) >= DROP / outcomes.mean())


def fails(sides: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    methods = {
        f"m{i}": BaselineMethod(accuracy=float(old.mean()), seed_accuracies=[float(v) for v in old.mean(1)], examples=old.shape[1])
        for i, (old, _) in enumerate(sides)
    }
    cells = [
        Record(method=f"m{i}", seed=s, key="k", status="done", wall_seconds=0, log="", outcomes=[int(o) for o in row], after={"exact_match": float(row.mean())})
        for i, (_, new) in enumerate(sides) for s, row in enumerate(new)
    ]  # fmt: skip
    results = Results(suite="s", metric="exact_match", created="", cells=cells)
    return not all(verdict.passed for verdict in gate(results, Baseline(methods=methods)))


def rates(pool: Pool, plan: Plan, draws: int, rng: np.random.Generator) -> dict[str, Any]:
    false = one = everywhere = 0
    real = True
    for _ in range(draws):
        sides, real = pool.draw(rng, plan)
        false += fails(sides)
        (old, new), *others = sides
        one += fails([(old, dropped(rng, new)), *others])
        everywhere += fails([(old, dropped(rng, new)) for old, new in sides])
    shares = {"false_alarms": false / draws, "sees_drop_of_one_method": one / draws, "sees_drop_of_all_methods": everywhere / draws}
    return asdict(plan) | {"outcomes": "real" if real else "simulated"} | shares


def step_rates(draws: int, rng: np.random.Generator, rounds: int = 15, of_round: float = 0.03, of_process: float = 0.01) -> dict[str, Any]:
    """Of the ratio: equal code, and steps slower by 10%."""

    def measured(factor: float) -> np.ndarray:
        return 1.08 * factor * np.exp(of_process * rng.standard_normal() + of_round * rng.standard_normal(rounds))

    def alarm(factor: float) -> bool:
        old = measured(1.0)
        return slower(measured(factor), BaselineTiming(over_base=float(np.median(old)), rounds=[float(v) for v in old]))

    equal, slow = (sum(alarm(factor) for _ in range(draws)) / draws for factor in (1.0, 1.1))
    return {"rounds": rounds, "of_round": of_round, "of_process": of_process, "false_alarms": equal, "sees_ten_percent": slow}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="of a suite with many seeds of a method")
    parser.add_argument("--method", help="by default the first of the results")
    parser.add_argument("--draws", type=int, default=2000, help="nulls, and drops, of each setting; 200 tell a rate of 1% from none, 2000 from one of 2%")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write what was found, as JSON")
    options = parser.parse_args(arguments)
    results = load_results(options.results)
    method = options.method or next(iter(results.methods))
    pool = Pool(np.array([record.outcomes for record in results.methods[method] if record.status == "done"]))
    rng = np.random.default_rng(options.seed)
    found = []
    for plan in PLANS:
        found.append(rates(pool, plan, options.draws, rng))
        print(found[-1], flush=True)
    steps = [step_rates(options.draws, rng), step_rates(options.draws, rng, of_round=0.05), step_rates(options.draws, rng, of_round=0.05, of_process=0.02)]
    print(*steps, sep="\n")
    mean, of_seed, of_example = pool.spread()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if options.output:
        source = {
            "suite": results.suite, "method": method, "commit": results.commit, "seeds": len(pool.outcomes), "examples": pool.outcomes.shape[1], "mean": mean,
            "standard_deviation_of_seeds": of_seed**0.5, "standard_deviation_of_examples": of_example**0.5,
        }  # fmt: skip
        record = {
            "draws": options.draws, "alpha": ALPHA, "drop": DROP, "source": source, "accuracy": found, "step_time": steps, "machine": machine(),
            "versions": versions(), "commit": head.stdout.strip() or None, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
