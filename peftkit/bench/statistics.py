"""What a handful of seeds and a few hundred test examples allow to say: means, intervals, differences, p values.

Outcomes are 0 or 1 per seed and test example, in a matrix y of shape (seeds, examples). Two things are drawn at random, the
training run and the test example, and every seed answers the same examples. The variance of the grand mean m has two parts:

    V_example = var(example means) / examples
    V_seed    = (PRIOR * var(y) / examples + (seeds - 1) * var(seed means)) / (PRIOR + seeds - 1) / seeds

Three seeds say little about their own spread, so V_seed is moderated (Smyth 2004, "Linear models and empirical Bayes methods"): the
variance of the seed means is pooled with that of independent answers, which counts for PRIOR degrees of freedom. The noise of
single answers is in both parts, which makes the interval a little wide where nothing but that noise is there.

The interval is a two-level bootstrap (Efron 1979; crossed factors: McCullagh 2000, Owen 2007): each replicate moves m by a normal
draw of variance V_seed (a handful of seeds is too few to draw from) and by the mean of example deviations drawn with replacement.
Its percentiles are stretched away from m by t / z, as the variances are estimates (Hesterberg 2015, "What Teachers Should Know
About the Bootstrap"), t being the quantiles of the two levels weighted by their variances (Cochran & Cox 1950):

    t = (V_seed t(PRIOR + seeds - 1) + V_example t(examples - 1)) / (V_seed + V_example)

Over several tasks, m is the mean of the tasks' means, whatever their sizes; runs and examples of different tasks are independent, so
variances add, and each level has the degrees of freedom of Welch and Satterthwaite. The p value of a difference is the smallest
1 - confidence whose interval leaves out 0: it never contradicts the interval.

Measured by benchmarks/coverage.py (benchmarks/results/coverage.json) on simulated answers of 3 seeds and 200 examples (logistic, with
seed and example effects): the 95% interval of an accuracy covers the truth in 100% of cases where seeds do not scatter, 96% where they
scatter by 4 points, 90% where they scatter by 8; that of a difference in 100%, 94% and 90%, over three tasks in 99%, 92% and 90%. Equal
methods are told apart in 0%, 6% and 12%. More seeds close that gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtr, stdtrit

REPLICATES = 10_000
SEED = 0  # of the bootstrap: the same results file always gives the same report
CONFIDENCE = 0.95
PRIOR = 2  # degrees of freedom that the noise of independent answers counts for in the variance of seeds

Values = Mapping[int, Sequence[int] | Sequence[float]]
"""Seed -> outcomes, on the same examples in the same order."""


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; low and high are None where nothing can be said, as with one seed."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measure:
    """How a metric is said."""

    name: str
    scale: float = 100.0
    unit: str = "points"
    digits: int = 1
    lower_is_better: bool = False

    def number(self, value: float, sign: bool = True) -> str:
        return f"{self.scale * value:{'+' if sign else ''}.{self.digits}f}"


POINTS = Measure("accuracy")


def measure(metric: str) -> Measure:
    """Losses and perplexities are better when lower and are said as they are; BLEU has its own points; everything else is a share."""
    if metric.endswith(("loss", "perplexity")):
        return Measure(metric, scale=1.0, unit=f"of {metric}", digits=4, lower_is_better=True)
    return Measure(metric, scale=1.0 if metric == "bleu" else 100.0)


@dataclass(frozen=True)
class Spread:
    """What the mean of one task scatters by, as variances: what `peftkit.bench.power` plans with."""

    of_seed: float
    """Of the mean of one seed over these very examples; moderated, and the noise of its answers is in it."""
    of_answer: float
    """Of one answer, beside what its seed and its example explain."""
    of_example: float
    """Of what an example adds in every seed."""
    seeds: int
    examples: int | None
    """None for a scalar metric, of which only the seeds are known."""


@dataclass(frozen=True)
class Difference:
    """A metric of one method minus that of another, paired, over one task or as the mean of several."""

    mean: float
    low: float
    high: float
    seeds: int
    """Pairs of runs, of the task that has the fewest."""
    p: float = 1.0
    """Two-sided, of this difference by itself."""
    measure: Measure = POINTS
    spreads: tuple[Spread, ...] = ()
    """One per task."""

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out 0; one run of each never tells methods apart."""
        return self.seeds > 1 and (self.low > 0 or self.high < 0)

    @property
    def better(self) -> bool:
        return (self.mean < 0) == self.measure.lower_is_better and self.mean != 0

    def size(self) -> str:
        """The mean with its unit: +1.2 points."""
        return f"{self.measure.number(self.mean)} {self.measure.unit}"

    def words(self, name: str, other: str, adjusted_p: float | None = None, comparisons: int = 1) -> str:
        """The difference as a sentence; with `adjusted_p`, of one comparison among several."""
        m, mean = self.measure, self.size()
        if self.seeds == 1:
            span = "" if np.isinf(self.low) else f"; 95% interval {m.number(self.low)} to {m.number(self.high)} for these two runs only"
            return f"{name} and {other} cannot be told apart by one seed: {mean} (how far seeds scatter is not known{span})"
        span = f"95% interval {m.number(self.low)} to {m.number(self.high)}"
        if adjusted_p is not None and comparisons > 1:
            span += f"; p {_p(self.p)}, {_p(adjusted_p)} as one of {comparisons} comparisons"
        span += f"; {self.seeds} seeds"
        apart = self.told_apart if adjusted_p is None else adjusted_p < 1 - CONFIDENCE
        if not apart:
            return f"{name} and {other} cannot be told apart: {mean} ({span})"
        return f"{name} is {m.number(abs(self.mean), sign=False)} {m.unit} {'better' if self.better else 'worse'} than {other} ({span})"


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


# --- one method ---------------------------------------------------------------------------------------------------------------


def mean_over_seeds(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of a scalar with the t-interval mean +- t(df = n - 1) s / sqrt(n); no interval from a single value.

    Raises ValueError for no values.
    """
    return mean_over_tasks([values], confidence)


def mean_over_tasks(values: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> Interval:
    """Mean over tasks of the means over seeds of a scalar, (tasks, seeds); no interval where a task has a single seed.

    Raises ValueError for a task without values.
    """
    if not values or not all(len(task) for task in values):
        raise ValueError("no values to take a mean of")
    mean, variance, df = _scalar([np.asarray(task, dtype=float) for task in values])
    if not np.isfinite(variance):
        return Interval(mean)
    half = float(stdtrit(df, (1 + confidence) / 2)) * variance**0.5
    return Interval(mean, mean - half, mean + half)


def accuracy(outcomes: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Mean of 0/1 outcomes (seeds, examples) with the two-level interval of this module, cut to [0, 1].

    One right and one wrong example are added to those that are drawn (Agresti & Coull 1998 in spirit), so that 200 right
    answers of 200 give about 0.985 to 1, not certainty. With one seed the interval is about this very run.
    Raises ValueError where outcomes is no matrix or empty.
    """
    return pooled_accuracy([outcomes], confidence)


def pooled_accuracy(tasks: Sequence[ArrayLike], confidence: float = CONFIDENCE) -> Interval:
    """Mean over tasks of the accuracy of each; the rest as `accuracy`."""
    levels = _Levels([_matrix(outcomes) for outcomes in tasks], extra=(0.0, 1.0))
    low, high = levels.interval(confidence)
    return Interval(levels.mean, min(max(low, 0.0), levels.mean), max(min(high, 1.0), levels.mean))


# --- two methods --------------------------------------------------------------------------------------------------------------


def difference(a: Values, b: Values, confidence: float = CONFIDENCE) -> Difference:
    """Accuracy of `a` minus accuracy of `b`, each seed -> outcomes on the same examples in the same order.

    Paired: the two-level interval of the matrix a - b over the seeds that both have. Where they share none, runs are paired in
    the order of their seeds: those pairs are independent, so the interval holds, only wider. Raises ValueError for other examples.
    """
    return pooled_difference([(a, b)], confidence)


def pooled_difference(tasks: Sequence[tuple[Values, Values]], confidence: float = CONFIDENCE) -> Difference:
    """Mean over tasks of `difference`, every task counting the same. Raises ValueError for other examples within a task."""
    matrices = []
    for a, b in tasks:
        pairs = [(a[s], b[t]) for s, t in paired_seeds(a, b)]
        if len({len(outcomes) for pair in pairs for outcomes in pair}) != 1:
            raise ValueError("outcomes of different numbers of examples cannot be paired")
        matrices.append(_matrix([np.subtract(x, y) for x, y in pairs]))
    # Where all answers differ alike (both always wrong, say), two more examples stand in for the spread that these few do not show.
    levels = _Levels(matrices, extra=() if any(y.std() for y in matrices) else (-1.0, 1.0))
    low, high = levels.interval(confidence)
    low, high = min(max(low, -1.0), levels.mean), max(min(high, 1.0), levels.mean)
    return Difference(levels.mean, low, high, min(len(y) for y in matrices), levels.p_value(), spreads=tuple(_spread(y) for y in matrices))


def scalar_difference(
    tasks: Sequence[tuple[Mapping[int, float], Mapping[int, float]]], of: Measure, confidence: float = CONFIDENCE
) -> Difference:  # fmt: skip
    """Of a metric that has one value per run, as a loss: the t-interval of the differences paired by seed, mean over tasks.

    Without limits (and p 1) where a task has a single pair. Raises ValueError for a task without a pair.
    """
    values = [np.array([a[s] - b[t] for s, t in paired_seeds(a, b)], dtype=float) for a, b in tasks]  # per task (pairs,)
    if not values or not all(task.size for task in values):
        raise ValueError("no pairs of runs to compare")
    seeds = min(task.size for task in values)
    mean, variance, df = _scalar(values)
    if not np.isfinite(variance):
        return Difference(mean, -np.inf, np.inf, seeds, measure=of)
    half = float(stdtrit(df, (1 + confidence) / 2)) * variance**0.5
    p = float(2 * stdtr(df, -abs(mean) / variance**0.5)) if variance else float(mean == 0)
    spreads = tuple(Spread(float(task.var(ddof=1)), 0.0, 0.0, task.size, None) for task in values)
    return Difference(mean, mean - half, mean + half, seeds, p, of, spreads)


def paired_seeds(a: Mapping[int, object], b: Mapping[int, object]) -> list[tuple[int, int]]:
    """The seeds that both have, else those of each in their order."""
    return [(s, s) for s in sorted(set(a) & set(b))] or list(zip(sorted(a), sorted(b), strict=False))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for there being several of them (Holm 1979): below 0.05 falsely in one report of twenty at most."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min((len(p) - rank) * p[i], 1.0))
        adjusted[i] = highest
    return adjusted


# --- the two levels -----------------------------------------------------------------------------------------------------------


class _Levels:
    """The two-level bootstrap of the mean of one matrix (seeds, examples) per task; `extra` values join the examples that are drawn."""

    def __init__(self, tasks: Sequence[NDArray[np.float64]], extra: tuple[float, ...] = ()):
        rng, n = np.random.default_rng(SEED), len(tasks)
        self.mean = float(np.mean([y.mean() for y in tasks]))
        of_seeds, of_examples = [], []  # (variance, degrees of freedom) of each task
        draws = np.zeros(REPLICATES)
        for y in tasks:
            seeds, examples = y.shape
            deviations = np.concatenate([y.mean(0), extra]) - y.mean()  # (examples + extra,)
            weights = np.concatenate([np.ones(examples), np.full(len(extra), 1 / n)])  # the extra values count once, however many tasks there are
            center = np.average(deviations, weights=weights)
            variance = weights @ (deviations - center) ** 2 / max(weights.sum() - 1, 1)
            of_examples.append((variance / examples if examples > 1 else 0.0, max(examples - 1, 1)))
            of_seeds.append((moderated(y) / seeds if seeds > 1 else 0.0, PRIOR + seeds - 1))
            values, inverse = np.unique(deviations.round(9), return_inverse=True)  # few, as outcomes are 0 or 1: drawn at once
            counts = np.bincount(inverse, weights)
            draws += rng.multinomial(examples, counts / counts.sum(), REPLICATES) @ values / examples
        v_seed, df_seed = _satterthwaite(of_seeds)
        v_example, df_example = _satterthwaite(of_examples)
        self.variances, self.df = np.array([v_seed, v_example]) / n**2, np.array([df_seed, df_example])
        self.draws = np.sort(draws / n + self.variances[0] ** 0.5 * rng.standard_normal(REPLICATES))  # less the mean

    def interval(self, confidence: float) -> tuple[float, float]:
        alpha = 1 - confidence
        low, high = np.quantile(self.draws, [alpha / 2, 1 - alpha / 2]) * self._stretch(alpha)
        return float(self.mean + low), float(self.mean + high)

    def p_value(self) -> float:
        """The smallest 1 - confidence whose interval leaves out 0, by bisection; no smaller than the replicates can tell."""
        within, outside = 1, REPLICATES  # of alpha in parts of REPLICATES: the intervals are nested
        while outside - within > 1:
            alpha = (within + outside) // 2
            low, high = self.interval(1 - alpha / REPLICATES)
            within, outside = (within, alpha) if low > 0 or high < 0 else (alpha, outside)
        return outside / REPLICATES

    def _stretch(self, alpha: float) -> float:
        """t / z of a confidence of 1 - alpha."""
        if not self.variances.sum():
            return 1.0
        quantiles = stdtrit(self.df, 1 - alpha / 2)  # Student's t of the two levels
        return float(quantiles @ self.variances / self.variances.sum() / ndtri(1 - alpha / 2))


def moderated(y: NDArray[np.float64]) -> float:
    """Variance of the mean of one seed, of several (seeds, examples); the rule is in the module's docstring."""
    seeds, examples = y.shape
    return float((PRIOR * y.var() / examples + (seeds - 1) * y.mean(1).var(ddof=1)) / (PRIOR + seeds - 1))


def _spread(y: NDArray[np.float64]) -> Spread:
    """Variances by the crossed analysis of variance; with one seed, all that examples scatter counts as theirs."""
    seeds, examples = y.shape
    if seeds == 1 or examples == 1:
        return Spread(0.0, 0.0, float(y.var()), seeds, examples)
    rest = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    of_answer = float((rest**2).sum() / (seeds - 1) / (examples - 1))
    return Spread(moderated(y), of_answer, max(float(y.mean(0).var(ddof=1)) - of_answer / seeds, 0.0), seeds, examples)


def _scalar(tasks: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    """Mean over tasks of values (seeds,), its variance and degrees of freedom; the variance is infinite where a task has one value."""
    mean = float(np.mean([task.mean() for task in tasks]))
    if any(task.size == 1 for task in tasks):
        return mean, np.inf, 1.0
    variance, df = _satterthwaite([(float(task.var(ddof=1)) / task.size, task.size - 1) for task in tasks])
    return mean, variance / len(tasks) ** 2, df


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Sum of variances known with given degrees of freedom, and the degrees of freedom of the sum."""
    total = sum(variance for variance, _ in parts)
    return total, total**2 / sum(variance**2 / df for variance, df in parts) if total else min(df for _, df in parts)


def _matrix(outcomes: ArrayLike) -> NDArray[np.float64]:
    y: NDArray[np.float64] = np.asarray(outcomes, dtype=float)
    if y.ndim != 2 or y.size == 0:
        raise ValueError(f"outcomes must be a matrix (seeds, examples), not of shape {y.shape}")
    return y
