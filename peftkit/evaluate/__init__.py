"""Evaluation: loss over supervised tokens, exact match of greedy answers."""

from peftkit.evaluate.exact_match import Prediction, answer_room, exact_match, generate_answers
from peftkit.evaluate.loss import mean_loss
from peftkit.evaluate.scores import EvalConfig, EvalSet, Scores, evaluate, steps

__all__ = ["EvalConfig", "EvalSet", "Prediction", "Scores", "answer_room", "evaluate", "exact_match", "generate_answers", "mean_loss", "steps"]
