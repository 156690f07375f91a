"""How often the 95% intervals of peftkit.bench.statistics cover the truth, and how often equal methods are told apart, on simulated answers.

    python benchmarks/coverage.py --output benchmarks/results/coverage.json

Answers are right with probability logistic(1.5 + seed effect + example effect), both normal; the truth is the mean over all of either. For
differences two methods answer the same examples, their seeds independent, and one is better by a shift that is the same for all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.bench.statistics import accuracy, difference, pooled_difference
from peftkit.result import machine, versions, write_json

CENTRE, OF_EXAMPLE, SHIFT = 1.5, 1.0, 0.3
POINTS = {0.0: 0.0, 0.04: 0.3, 0.08: 0.6}  # scatter of a seed's accuracy, about -> standard deviation of the seed effect
SIZES = [(3, 200), (10, 200)]


def chance(effects: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-CENTRE - effects))


def truth(of_seed: float, shift: float, rng: np.random.Generator) -> float:
    return float(chance(shift + np.hypot(of_seed, OF_EXAMPLE) * rng.standard_normal(1_000_000)).mean())


def answers(rng: np.random.Generator, seeds: int, ease: np.ndarray, of_seed: float, shift: float = 0.0) -> dict[int, list[int]]:
    right = rng.random((seeds, ease.size)) < chance(shift + ease + of_seed * rng.standard_normal((seeds, 1)))
    return {seed: [int(each) for each in row] for seed, row in enumerate(right)}


def coverage(rng: np.random.Generator, seeds: int, examples: int, of_seed: float, draws: int) -> dict[str, float]:
    """Shares of draws: intervals that hold the truth, of one method's accuracy and of a difference, over one task and over three; false findings."""
    level, apart = truth(of_seed, 0.0, rng), truth(of_seed, SHIFT, rng) - truth(of_seed, 0.0, rng)
    held = dict.fromkeys(("accuracy", "difference", "difference_of_three_tasks", "equal_methods_told_apart"), 0)
    for _ in range(draws):
        tasks = []
        for _ in range(3):
            ease = OF_EXAMPLE * rng.standard_normal(examples)
            tasks.append(tuple(answers(rng, seeds, ease, of_seed, shift) for shift in (SHIFT, 0.0, 0.0)))
        better, plain, again = tasks[0]
        one, two = accuracy(list(plain.values())), difference(better, plain)
        three = pooled_difference([(a, b) for a, b, _ in tasks])
        assert one.low is not None and one.high is not None
        held["accuracy"] += one.low <= level <= one.high
        held["difference"] += two.low <= apart <= two.high
        held["difference_of_three_tasks"] += three.low <= apart <= three.high
        held["equal_methods_told_apart"] += difference(plain, again).told_apart
    return {name: count / draws for name, count in held.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--output", type=Path, help="where to write what was found, as JSON")
    options = parser.parse_args(arguments)
    rng, found = np.random.default_rng(0), list[dict[str, Any]]()
    for seeds, examples in SIZES:
        for points, of_seed in POINTS.items():
            found.append({"seeds": seeds, "examples": examples, "seeds_scatter_by": points} | coverage(rng, seeds, examples, of_seed, options.draws))
            print(found[-1], flush=True)
            if options.output:
                write_json(options.output, {"draws": options.draws, "coverage": found, "machine": machine(), "versions": versions()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
