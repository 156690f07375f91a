"""The evaluation of a recipe: its metrics on the evaluation set, and exact match on sets that must not be forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator
from torch import nn

from peftkit.config import Config, ConfigError
from peftkit.evaluate.choice import ChoiceLength, ChoiceRow, Picked, pick
from peftkit.evaluate.exact_match import Prediction, exact_match
from peftkit.evaluate.loss import Batch, in_batches, mean_loss
from peftkit.evaluate.text import bleu, rouge

PASSES = {"loss": "loss", "perplexity": "loss", "exact_match": "answers", "rouge": "answers", "bleu": "answers", "choice_accuracy": "choices"}
"""metric -> the pass over the rows that it takes; one pass serves several"""
GENERATING = tuple(metric for metric, taken in PASSES.items() if taken == "answers")


def must_have_answers(metrics: Sequence[str], name: str, examples: Sequence[Any]) -> None:
    """Raises ConfigError where answers are to be generated for a set, told by its name, of which a row has none."""
    if any(not example.prompt_ids for example in examples):
        raise ConfigError(f"eval: {', '.join(metrics) or 'exact_match'} needs rows with an answer, and {name} holds plain text; use the metric loss")


class EvalConfig(Config):
    """What is measured before and after training."""

    metrics: list[Literal["loss", "perplexity", "exact_match", "choice_accuracy", "rouge", "bleu"]] = ["loss"]
    """loss: nats per supervised token; perplexity: its exponential; exact_match: share of greedy answers that equal the reference; choice_accuracy:
    share of rows whose right choice is the likeliest; rouge, bleu: of greedy answers, with `pip install "peftkit[text]"`."""
    match: Literal["text", "number"] = "text"
    """What exact_match compares: whole texts, or the numbers they come to (after `####`, else the last one)."""
    choices: list[str] | None = Field(None, min_length=2)
    """The choices of every row, for choice_accuracy; null where each row has a column `choices`. The row's own answer says which is right."""
    choice_length: ChoiceLength = "total"
    """How likely a choice is: in total, or per token or character of it, which does not favour short ones."""
    batch_size: int = Field(50, gt=0)
    """Rows at a time."""
    max_new_tokens: int | None = Field(None, gt=0)
    """Longest generated answer; by default a little more than the longest reference."""
    retained: list[str] = []
    """Data sets scored by exact match before and after, to see what is forgotten."""
    retained_rows: int = Field(25, gt=0)
    """Rows of each retained set."""
    before: bool = True
    """Whether to evaluate before training too."""

    @model_validator(mode="after")
    def _nothing_unread(self) -> EvalConfig:
        if "choice_accuracy" not in self.metrics and (self.choices is not None or self.choice_length != "total"):
            raise ValueError("choices and choice_length are for the metric choice_accuracy, which is not among the metrics; add it, or leave them out")
        if "exact_match" not in self.metrics and not self.retained and self.match != "text":
            raise ValueError("match is for the metric exact_match, which is not among the metrics; add it, or leave match out")
        return self


class Evaluated(Protocol):
    """What evaluation needs of an example: its prompt and its answer."""

    prompt_ids: list[int]
    answer: str


@dataclass(frozen=True)
class EvalSet:
    """One data set to score: its examples, and the same rows as questions with choices where choice_accuracy is asked for."""

    name: str
    examples: Sequence[Evaluated]
    choices: Sequence[ChoiceRow] = ()


@dataclass
class Scores:
    """metric -> value, and the single answers by data set."""

    values: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, Sequence[Prediction | Picked]] = field(default_factory=dict)


def evaluate(
    model: Any, tokenizer: Any, loss: nn.Module, main: EvalSet | None, retained: Sequence[EvalSet], config: EvalConfig,
    to_batch: Callable[[Sequence], Batch], progress: Callable[[int], None] | None = None,
) -> Scores:  # fmt: skip
    """Scores the model in eval mode and leaves its mode as it was. `to_batch` makes the loss's input of examples."""
    scores, was_training = Scores(), model.training
    model.eval()
    if main is not None and _takes("loss", config):
        ordered = sorted(main.examples, key=lambda example: len(example.input_ids))  # type: ignore[attr-defined]
        mean = mean_loss(loss, (to_batch(part) for part in in_batches(ordered, config.batch_size)), progress)
        scores.values |= {name: {"loss": mean, "perplexity": math.exp(min(mean, 700))}[name] for name in ("loss", "perplexity") if name in config.metrics}
    if main is not None and _takes("answers", config):
        found = _answers(model, tokenizer, main, config, progress)
        scores.predictions["eval"] = found
        texts, references = [each.prediction for each in found], [each.answer for each in found]
        if "exact_match" in config.metrics:
            scores.values["exact_match"] = _share(found)
        if "rouge" in config.metrics:
            scores.values |= rouge(texts, references)
        if "bleu" in config.metrics:
            scores.values |= bleu(texts, references)
    if main is not None and _takes("choices", config):
        picked = pick(loss, main.choices, to_batch, config.batch_size, config.choice_length, progress)
        scores.predictions["choices"] = picked
        scores.values["choice_accuracy"] = _share(picked)
    if retained:
        for each in retained:
            scores.predictions[each.name] = _answers(model, tokenizer, each, config, progress)
        by_set = {each.name: _share(scores.predictions[each.name]) for each in retained}
        scores.values |= {"retained_exact_match": sum(by_set.values()) / len(by_set), "retained": by_set}
    model.train(was_training)
    return scores


def _takes(what: str, config: EvalConfig) -> bool:
    return any(PASSES[metric] == what for metric in config.metrics)


def _answers(model: Any, tokenizer: Any, data: EvalSet, config: EvalConfig, progress: Callable[[int], None] | None) -> list[Prediction]:
    prompts, answers = [e.prompt_ids for e in data.examples], [e.answer for e in data.examples]
    return exact_match(model, tokenizer, prompts, answers, config.batch_size, config.max_new_tokens, progress, config.match)


def _share(found: Sequence[Prediction | Picked]) -> float:
    return sum(each.correct for each in found) / len(found)


def steps(main: EvalSet | None, retained: Sequence[EvalSet], config: EvalConfig) -> int:
    """How many rows `evaluate` will report to `progress`, over all passes."""
    own = 0 if main is None else len(main.examples) * (_takes("loss", config) + _takes("answers", config)) + len(main.choices)
    return own + sum(len(each.examples) for each in retained)
