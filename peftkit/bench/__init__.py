"""The benchmark harness: suite -> cells (one process each) -> results.json -> report, and a gate for CI.

suite = load_suite("benchmarks/suites/ci.yaml")
run_suite(suite, "runs/bench")
results = load_results("runs/bench/ci")
print(markdown(results))
verdicts = gate(results, load_baseline("benchmarks/baselines/ci.json"))
"""

from __future__ import annotations

from peftkit.bench.cells import Record, Results, load_results, run_suite
from peftkit.bench.gate import Baseline, Verdict, accept, gate, load_baseline
from peftkit.bench.report import Row, markdown, table
from peftkit.bench.statistics import Difference, Interval, accuracy, difference, mean_over_seeds
from peftkit.bench.suite import Cell, Suite, cells, load_suite

__all__ = [
    "Baseline",
    "Cell",
    "Difference",
    "Interval",
    "Record",
    "Results",
    "Row",
    "Suite",
    "Verdict",
    "accept",
    "accuracy",
    "cells",
    "difference",
    "gate",
    "load_baseline",
    "load_results",
    "load_suite",
    "markdown",
    "mean_over_seeds",
    "run_suite",
    "table",
]
