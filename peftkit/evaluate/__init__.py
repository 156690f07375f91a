"""Evaluation: loss over supervised tokens, greedy answers against references, the likeliest of several choices."""

from peftkit.evaluate.choice import ChoiceRow, Picked, pick
from peftkit.evaluate.exact_match import Prediction, answer_room, exact_match, final_number, generate_answers, generation_config
from peftkit.evaluate.harness import harness_scores
from peftkit.evaluate.loss import mean_loss
from peftkit.evaluate.scores import GENERATING, EvalConfig, EvalSet, Scores, evaluate, must_have_answers, steps
from peftkit.evaluate.stream import stream_answer
from peftkit.evaluate.text import check_installed, must_have_words

__all__ = [
    "GENERATING", "ChoiceRow", "EvalConfig", "EvalSet", "Picked", "Prediction", "Scores", "answer_room", "check_installed", "evaluate", "exact_match",
    "final_number", "generate_answers", "generation_config", "harness_scores", "mean_loss", "must_have_answers", "must_have_words", "pick", "steps",
    "stream_answer",
]  # fmt: skip
