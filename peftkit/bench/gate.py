"""The gate: does a method still reach its baseline, in accuracy, step time and memory?

**Accuracy.** Both sides answer the same test examples, so what differs between two runs of equal code is training: the accuracy of a
seed is one draw. A method fails when its mean lies below the baseline by more than the margin and by more than chance explains:

    accuracy < baseline - max(margin, t(1 - ALPHA / verdicts, df) * s * sqrt(1 / seeds + 1 / baseline seeds))

The two are not added: a margin on top of the noise would let a drop of twice its size through. ALPHA is the chance that a gate over
equal code fails at all, shared by its verdicts (Bonferroni). Few seeds say little about their own spread, so s is the moderated standard
deviation of Smyth (2004, "Linear models and empirical Bayes methods"), with a prior variance that counts for PRIOR degrees of freedom:

    s^2 = (PRIOR * s0^2 + sum of squared deviations of the seeds) / df,   df = PRIOR + seeds - 1 + known baseline seeds - 1
    s0^2 = max(p (1 - p) / examples, 0.01^2)

p (1 - p) / examples being what chance alone does to a run whose answers are independent. **All methods together** are judged besides, by
the mean of their differences: a fault in what they share shows there although each has few seeds.

**Step time** is compared as the ratio to the frozen base, of the interleaved rounds of one process, which leaves the speed of the machine
out. It fails where the rounds lie above `1 + time margin` times the baseline's (Mann and Whitney, one-sided at TIME_ALPHA).

**Memory**, peak and kept for backward, fails where it is above `1 + memory margin` times the baseline's.

What is missing, failed or was not measured fails, with its reason. benchmarks/gate_rates.py measures how often equal code fails and how
often a drop of five points is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit
from scipy.stats import mannwhitneyu, wilcoxon

from peftkit.bench.baseline import Baseline, BaselineMethod, BaselineTiming
from peftkit.bench.records import Record, Results
from peftkit.bench.statistics import Measure, measure
from peftkit.config import ConfigError

ALPHA = 0.007  # nominal: a prior on the spread errs by up to a third of it, so that measured rates (benchmarks/gate_rates.py) stay within 1%
PRIOR = 4  # degrees of freedom
LEAST = 0.01  # standard deviation of a seed's accuracy that is taken for granted
TIME_ALPHA = 0.2  # of steps that are slower by the margin itself: equal code is a whole margin away from it
ROUNDS = 7  # fewer are no measurement
ALL = "all methods"
MARGIN, TIME_MARGIN, MEMORY_MARGIN = 0.02, 0.05, 0.10


@dataclass(frozen=True)
class Margins:
    """What is tolerated: points of accuracy (of a loss: its share), shares of step time and of memory."""

    accuracy: float = MARGIN
    time: float = TIME_MARGIN
    memory: float = MEMORY_MARGIN


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one method in one respect; None where a number is not there."""

    method: str
    passed: bool
    value: float | None
    baseline: float | None
    limit: float | None
    """The lowest accuracy, or the highest step time or memory, that passes."""
    words: str
    check: str = "accuracy"
    """accuracy, step time, peak memory or saved bytes."""
    task: str = ""

    @property
    def name(self) -> str:
        return f"{self.method} on {self.task}" if self.task else self.method

    def numbers(self) -> list[str]:
        """Value, baseline and limit as a table shows them."""
        return ["-" if value is None else self._text(value) for value in (self.value, self.baseline, self.limit)]

    def _text(self, value: float) -> str:
        if self.check == "step time":
            return f"{value:.3f}"
        if self.check in ("peak memory", "saved bytes"):
            return f"{value / 2**20:,.1f} MiB"
        of = measure(self.check)
        return f"{value:.4f}" if of.lower_is_better else f"{value:.1%}" if of.scale == 100 else f"{value:.{of.digits}f}"


@dataclass(frozen=True)
class _Drop:
    """How far a method is below its baseline, and what it scatters by."""

    mean: float
    """Baseline minus value, turned so that above 0 is worse."""
    variance: float
    """Of that mean."""
    df: float


def gate(results: Results, baseline: Baseline, margin: float | Margins = MARGIN) -> list[Verdict]:
    """All verdicts, accuracy first; a method that only the results have passes and is called new.

    margin: of accuracy, or all of them. Raises ConfigError where the two are of different suites or metrics.
    """
    for what, ours, theirs in (("suite", results.suite, baseline.suite), ("metric", results.metric, baseline.metric)):
        if theirs is not None and ours != theirs:
            raise ConfigError(f"baseline: {what} is {theirs!r}, but the results are of {what} {ours!r}: they cannot be compared")
    margins = margin if isinstance(margin, Margins) else Margins(margin)
    verdicts = _accuracies(results, baseline, margins.accuracy)
    if results.unfinished:
        verdicts.append(Verdict(ALL, False, None, None, None, f"{results.unfinished} cells were not run, as the time was over: run the suite to its end"))
    elsewhere = "; another machine than the baseline's" if baseline.machine and baseline.machine != results.machine else ""
    for method, expected in baseline.timing.items():
        verdicts += _step(method, expected, results, margins, elsewhere)
    for task, method, expected_ in baseline.entries():
        verdicts += _memory(method, task, expected_, results, margins.memory, elsewhere)
    return verdicts


# --- accuracy -----------------------------------------------------------------------------------------------------------------


def _accuracies(results: Results, baseline: Baseline, margin: float) -> list[Verdict]:
    final, of = results.methods, measure(results.metric)
    check = "accuracy" if of.scale == 100 else results.metric
    entries = list(baseline.entries())
    count = len(entries) + (len(entries) > 1)  # and all methods together
    verdicts, drops = [], []
    for task, method, expected in entries:
        records = [record for record in final.get(method, []) if record.task == task]
        verdict, drop = _accuracy(method, task, expected, records, results.metric, check, margin, count)
        verdicts.append(verdict)
        if drop:
            drops.append(drop)
    if len(entries) > 1 and len(drops) > 1:
        verdicts.append(_together(drops, check, of, margin, count, np.mean([expected.accuracy for _, _, expected in entries]).item()))
    known = {(task, method) for task, method, _ in entries}
    for method, records in final.items():
        for task in dict.fromkeys(record.task for record in records):
            if (task, method) not in known:
                values = [record.after[results.metric] for record in records if record.task == task and record.status == "done"]
                mean = float(np.mean(values)) if values else None
                verdicts.append(Verdict(method, True, mean, None, None, "new: the baseline does not have it", check, task))
    return verdicts


def _accuracy(
    method: str, task: str, expected: BaselineMethod, records: list[Record], metric: str, check: str, margin: float, count: int
) -> tuple[Verdict, _Drop | None]:  # fmt: skip
    def verdict(passed: bool, words: str, value: float | None = None, limit: float | None = None) -> Verdict:
        return Verdict(method, passed, value, expected.accuracy, limit, words, check, task)

    done = [record for record in records if record.status == "done"]
    failed = [record for record in records if record.status == "failed"]
    if not done:
        return verdict(False, f"all {len(failed)} seeds failed ({_kinds(failed)})" if failed else "no results: the method was not run"), None
    if any(record.after.get(metric) is None for record in done):
        return verdict(False, f"{metric} was not measured"), None
    if expected.examples_hash and any(record.examples and record.examples != expected.examples_hash for record in done):
        return verdict(False, "answered other test examples than the baseline: their accuracies cannot be compared; accept a new baseline"), None
    values, of = np.array([record.after[metric] for record in done], dtype=float), measure(metric)
    drop = _drop(values, expected, expected.examples or min(len(record.outcomes) for record in done) or None, of)
    allowed = max(_allowed(margin, of, expected.accuracy), _noise(drop, count))
    mean, worse = float(values.mean()), -1.0 if of.lower_is_better else 1.0
    limit = expected.accuracy - worse * allowed
    said = f"{of.number(mean - expected.accuracy)} {of.unit}; {of.number(-worse * allowed)} are within margin and noise"
    if len(done) < len(expected.seed_accuracies):
        said += f" ({len(done)} seed{'s' * (len(done) > 1)}, the baseline {len(expected.seed_accuracies)})"
    if drop.mean > allowed:
        return verdict(False, f"{'above' if of.lower_is_better else 'below'} the baseline: {said}", mean, limit), drop
    if failed:
        return verdict(False, f"{len(failed)} of {len(records)} seeds failed ({_kinds(failed)}); the others: {said}", mean, limit), drop
    return verdict(True, said, mean, limit), drop


def _drop(values: np.ndarray, expected: BaselineMethod, examples: int | None, of: Measure) -> _Drop:
    """Of the mean of `values` (seeds,); the rule of its variance is in the module's docstring. For a loss, s0 is 2% of it."""
    known = np.array(expected.seed_accuracies)  # (baseline seeds,)
    p = min(max((float(values.mean()) + expected.accuracy) / 2, 0.0), 1.0)
    least = (LEAST * 100 / of.scale) ** 2  # of BLEU's hundred points as of the hundred of a share
    share = p * (1 - p) / examples if examples and of.scale == 100 else 0.0
    chance = (0.02 * expected.accuracy) ** 2 if of.lower_is_better else max(share, least)
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in (values, known) if side.size)
    df = PRIOR + values.size - 1 + max(known.size - 1, 0)
    variance = (PRIOR * chance + squares) / df
    seeds = known.size or expected.seeds or values.size
    worse = -1.0 if of.lower_is_better else 1.0
    return _Drop(worse * (expected.accuracy - float(values.mean())), variance * (1 / values.size + 1 / seeds), df)


def _noise(drop: _Drop, count: int) -> float:
    """How far below the baseline a mean may fall by chance where `count` verdicts are given."""
    return float(stdtrit(drop.df, 1 - ALPHA / count)) * drop.variance**0.5


def _together(drops: list[_Drop], check: str, of: Measure, margin: float, count: int, baseline: float) -> Verdict:
    total = sum(drop.variance for drop in drops)
    df = total**2 / sum(drop.variance**2 / drop.df for drop in drops)
    pooled = _Drop(float(np.mean([drop.mean for drop in drops])), total / len(drops) ** 2, df)
    allowed, worse = max(_allowed(margin, of, baseline), _noise(pooled, count)), -1.0 if of.lower_is_better else 1.0
    said = f"{of.number(-worse * pooled.mean)} {of.unit} as the mean of {len(drops)}; {of.number(-worse * allowed)} are within margin and noise"
    value, limit = baseline - worse * pooled.mean, baseline - worse * allowed
    return Verdict(ALL, pooled.mean <= allowed, value, baseline, limit, said, check)


def _allowed(margin: float, of: Measure, baseline: float) -> float:
    return margin * abs(baseline) if of.lower_is_better else margin * 100 / of.scale


# --- step time and memory -----------------------------------------------------------------------------------------------------


def _step(method: str, expected: BaselineTiming, results: Results, margins: Margins, elsewhere: str) -> list[Verdict]:
    def verdict(passed: bool, words: str, value: float | None = None) -> Verdict:
        return Verdict(method, passed, value, expected.over_base, expected.over_base * (1 + margins.time), words, "step time")

    records = [record for record in results.cells if record.stage == "timing" and record.method == method]
    done = [record for record in records if record.status == "done" and record.timing.get("rounds")]
    if not done:
        return [verdict(False, f"its timing cell failed ({_kinds(records)})" if any(r.status == "failed" for r in records) else "no step times were measured")]
    timing = done[-1].timing
    rounds = np.array(timing["rounds"], dtype=float)
    median = float(np.median(rounds))
    if len(rounds) < ROUNDS or 0 < len(expected.rounds) < ROUNDS:
        few = f"{len(rounds)} rounds, {len(expected.rounds)} of the baseline: at least {ROUNDS} are needed to judge"
        return [verdict(False, few, median)]
    said = f"{median / expected.over_base - 1:+.1%} over the baseline's ratio to the frozen base{elsewhere}"
    found = [verdict(not slower(rounds, expected, margins.time), said, median)]
    if expected.saved_bytes is not None:
        found.append(_bytes(method, "", "saved bytes", timing.get("saved_bytes"), expected.saved_bytes, margins.memory, elsewhere))
    return found


def slower(rounds: np.ndarray, expected: BaselineTiming, margin: float = TIME_MARGIN) -> bool:
    """Whether step time ratios lie above the baseline's by more than the margin, one-sided at TIME_ALPHA."""
    if expected.rounds:
        return bool(mannwhitneyu(rounds, np.array(expected.rounds) * (1 + margin), alternative="greater").pvalue < TIME_ALPHA)
    over = rounds - expected.over_base * (1 + margin)
    return bool(over.any() and wilcoxon(over, alternative="greater").pvalue < TIME_ALPHA)


def _memory(method: str, task: str, expected: BaselineMethod, results: Results, margin: float, elsewhere: str) -> list[Verdict]:
    if expected.peak_memory_bytes is None:
        return []
    done = [record for record in results.methods.get(method, []) if record.task == task and record.status == "done"]
    peaks = [record.train.get("peak_memory_bytes") for record in done]
    known = [peak for peak in peaks if peak]
    mean = float(np.mean(known)) if known and len(known) == len(peaks) else None
    return [_bytes(method, task, "peak memory", mean, expected.peak_memory_bytes, margin, elsewhere)]


def _bytes(method: str, task: str, check: str, value: float | None, baseline: float, margin: float, elsewhere: str) -> Verdict:
    limit = baseline * (1 + margin)
    if value is None:
        return Verdict(method, False, None, baseline, limit, "was not measured", check, task)
    return Verdict(method, value <= limit, value, baseline, limit, f"{value / baseline - 1:+.1%} over the baseline{elsewhere}", check, task)


def _kinds(records: list[Record]) -> str:
    return ", ".join(sorted({str(record.kind).replace("_", " ") for record in records if record.status == "failed"}))
