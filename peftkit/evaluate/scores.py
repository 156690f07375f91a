"""The evaluation of a recipe: its metrics on the evaluation set, and exact match on sets that must not be forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import Field
from torch import nn

from peftkit.config import Config
from peftkit.evaluate.exact_match import Prediction, exact_match
from peftkit.evaluate.loss import Batch, in_batches, mean_loss


class EvalConfig(Config):
    """What is measured before and after training."""

    metrics: list[Literal["loss", "exact_match"]] = ["loss"]
    """loss: nats per supervised token; exact_match: share of greedy answers that equal the reference."""
    batch_size: int = Field(50, gt=0)
    """Rows at a time."""
    max_new_tokens: int | None = None
    """Longest generated answer; by default a little more than the longest reference."""
    retained: list[str] = []
    """Data sets scored by exact match before and after, to see what is forgotten."""
    retained_rows: int = Field(25, gt=0)
    """Rows of each retained set."""
    before: bool = True
    """Whether to evaluate before training too."""


class Evaluated(Protocol):
    """What evaluation needs of an example: its prompt and its answer."""

    prompt_ids: list[int]
    answer: str


@dataclass(frozen=True)
class EvalSet:
    """One data set to score: its examples, and the same ones as batches for the loss."""

    name: str
    examples: Sequence[Evaluated]


@dataclass
class Scores:
    """metric -> value, and the single answers by data set."""

    values: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, list[Prediction]] = field(default_factory=dict)


def evaluate(
    model: Any, tokenizer: Any, loss: nn.Module, main: EvalSet | None, retained: Sequence[EvalSet], config: EvalConfig,
    to_batch: Callable[[Sequence], Batch], progress: Callable[[int], None] | None = None,
) -> Scores:  # fmt: skip
    """Scores the model in eval mode and leaves its mode as it was. `to_batch` makes the loss's input of examples."""
    scores, was_training = Scores(), model.training
    model.eval()
    if main is not None and "loss" in config.metrics:
        ordered = sorted(main.examples, key=lambda example: len(example.input_ids))  # type: ignore[attr-defined]
        scores.values["loss"] = mean_loss(loss, (to_batch(part) for part in in_batches(ordered, config.batch_size)), progress)
    if main is not None and "exact_match" in config.metrics:
        scores.values["exact_match"] = _match(model, tokenizer, main, "eval", scores, config, progress)
    if retained:
        by_set = {each.name: _match(model, tokenizer, each, each.name, scores, config, progress) for each in retained}
        scores.values |= {"retained_exact_match": sum(by_set.values()) / len(by_set), "retained": by_set}
    model.train(was_training)
    return scores


def _match(model: Any, tokenizer: Any, data: EvalSet, name: str, scores: Scores, config: EvalConfig, progress: Callable[[int], None] | None) -> float:
    prompts, answers = [e.prompt_ids for e in data.examples], [e.answer for e in data.examples]
    found = exact_match(model, tokenizer, prompts, answers, config.batch_size, config.max_new_tokens, progress)
    scores.predictions[name] = found
    return sum(p.correct for p in found) / len(found)


def steps(main: EvalSet | None, retained: Sequence[EvalSet], config: EvalConfig) -> int:
    """How many examples `evaluate` will report to `progress`, over all metrics."""
    return (len(main.examples) * len(config.metrics) if main else 0) + sum(len(each.examples) for each in retained)
