"""How many seeds or test examples would settle what a comparison leaves open, told from the spread that it measured.

With n seeds and E examples the mean difference scatters by (variances of `Spread`; over several tasks their mean, divided by their number)

    true   = (of_seed + of_answer (1/E - 1/E_now)) / n + of_example / E
    ours   = (PRIOR var(y) / E + (n - 1) n true_seed) / (PRIOR + n - 1) / n + (of_example + of_answer / n) / E

true_seed being the first part of `true`, and `ours` what the interval of `statistics` takes it for. A difference d is settled with
probability 0.8 where |d| >= t(0.975) sqrt(ours) + z(0.8) sqrt(true). What scatters by three seeds is itself known to a factor of two or
so, and so are these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from peftkit.bench.statistics import CONFIDENCE, PRIOR, Difference, Spread

POWER = 0.8
MOST_SEEDS = 200  # beyond, the answer is no


@dataclass(frozen=True)
class Plan:
    """What would settle a difference of this size."""

    difference: Difference
    detectable: float
    """The difference that the present seeds and examples settle with 80% power; infinite with one seed."""
    seeds: int | None
    """Needed with the present examples; None where MOST_SEEDS are not enough."""
    examples: int | None
    """Where the present examples are too few for any number of seeds: how many of them `seeds_then` seeds need. Per task."""
    seeds_then: int | None = None

    def words(self) -> str:
        d, m = self.difference, self.difference.measure
        if np.isinf(self.detectable):
            return "one seed says nothing of how seeds scatter: run at least three"
        if not self.detectable:
            return "every example had the same outcome under both, in every seed, so nothing says what would settle a difference: take other examples"
        size = f"{m.number(self.detectable, sign=False)} {m.unit}"
        now = f"{d.seeds} seeds" + (f" and {d.spreads[0].examples} examples" if d.spreads[0].examples else "")
        start = f"{now} settle a difference of {size} (80% power); one of {m.number(abs(d.mean), sign=False)} "
        if self.seeds is not None:
            return start + ("is within their reach" if self.seeds <= d.seeds else f"would take {self.seeds} seeds")
        if self.examples is not None:
            return start + f"no number of seeds would settle on these examples: it would take {self.examples:,} examples and {self.seeds_then} seeds"
        return start + f"would take more than {MOST_SEEDS} seeds"


def plan(difference: Difference, comparisons: int = 1) -> Plan:
    """What would settle `difference`, taken for the true one, as one of so many comparisons that are corrected together."""
    spreads, size = difference.spreads, abs(difference.mean)
    if difference.seeds < 2 or not spreads:
        return Plan(difference, np.inf, None, None)
    detectable = settled(spreads, difference.seeds, comparisons)
    seeds = seeds_for(size, spreads, comparisons)
    if seeds is not None or size == 0 or any(spread.examples is None for spread in spreads):
        return Plan(difference, detectable, seeds, None)
    limit = (ndtri(_level(comparisons)) + ndtri(POWER)) * (sum(spread.of_example / _examples(spread) for spread in spreads) / len(spreads) ** 2) ** 0.5
    if limit < size:  # seeds alone would do, but too many
        return Plan(difference, detectable, None, None)
    factor = 2 * (limit / size) ** 2  # examples that leave half of the variance to the seeds
    more = [_with_examples(spread, factor) for spread in spreads]
    then = seeds_for(size, more, comparisons)
    return Plan(difference, detectable, None, max(_examples(spread) for spread in more) if then else None, then)


def settled(spreads: Sequence[Spread], seeds: int, comparisons: int = 1) -> float:
    """The smallest true difference that `seeds` seeds (at least 2) tell from nothing with 80% power, even as the first of so many comparisons."""
    true = ours = 0.0
    df = []  # (variance, degrees of freedom) of the seeds' part
    for spread in spreads:
        of_seed = spread.of_seed / seeds
        if spread.examples is None:
            true, ours = true + of_seed, ours + of_seed
            df.append((of_seed, seeds - 1))
            continue
        total = spread.of_seed + spread.of_example + spread.of_answer * (1 - 1 / spread.examples)
        moderated = (PRIOR * total / spread.examples + (seeds - 1) * spread.of_seed) / (PRIOR + seeds - 1) / seeds
        true += of_seed + spread.of_example / spread.examples
        ours += moderated + (spread.of_example + spread.of_answer / seeds) / spread.examples
        df.append((moderated, PRIOR + seeds - 1))
    of_seeds = sum(variance for variance, _ in df)
    freedom = of_seeds**2 / sum(variance**2 / each for variance, each in df) if of_seeds else 1.0
    level = _level(comparisons)
    z = ndtri(level)
    quantile = (of_seeds * stdtrit(freedom, level) + (ours - of_seeds) * z) / ours if ours else z
    return float((quantile * ours**0.5 + ndtri(POWER) * true**0.5) / len(spreads))


def _level(comparisons: int) -> float:
    """Of the quantile that a difference must pass: the first step of Holm's correction, which is the strictest."""
    return 1 - (1 - CONFIDENCE) / comparisons / 2


def seeds_for(size: float, spreads: Sequence[Spread], comparisons: int = 1) -> int | None:
    """The least number of seeds, of 2 to MOST_SEEDS, that settles a true difference of `size`; None where none does."""
    return next((seeds for seeds in range(2, MOST_SEEDS + 1) if settled(spreads, seeds, comparisons) <= size), None)


def _with_examples(spread: Spread, factor: float) -> Spread:
    """The spread that `factor` times as many examples would leave."""
    now = _examples(spread)
    examples = int(np.ceil(now * factor))
    of_seed = max(spread.of_seed + spread.of_answer * (1 / examples - 1 / now), 0.0)
    return Spread(of_seed, spread.of_answer, spread.of_example, spread.seeds, examples)


def _examples(spread: Spread) -> int:
    if spread.examples is None:
        raise ValueError("a scalar metric has no examples to add")
    return spread.examples
