"""ROUGE and BLEU of generated answers, by the packages that published figures are made with; imported only where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from peftkit.config import ConfigError

NEEDS = {"rouge": ("rouge_score", "rouge-score"), "bleu": ("sacrebleu", "sacrebleu")}
"""metric -> (module, package)"""


def check_installed(metrics: Sequence[str]) -> None:
    """Raises ConfigError, with the command that installs it, where a package that a metric needs is missing."""
    for metric in metrics:
        module, package = NEEDS.get(metric, ("", ""))
        if module and find_spec(module) is None:
            raise ConfigError(f'eval.metrics: {metric} needs the package {package}, which is not installed: pip install "peftkit[text]"')


def must_have_words(references: Sequence[str]) -> None:
    """Raises ConfigError where ROUGE would have nothing to count in a reference: before the training, not after it."""
    check_installed(["rouge"])
    from rouge_score.tokenize import tokenize

    if empty := [text for text in references if text.strip() and not tokenize(text, None)]:
        raise ConfigError(f"rouge counts words of a-z and 0-9, and {len(empty)} references have none (such as {empty[0][:40]!r}); use bleu or exact_match")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2 and -L over the pairs, 0 to 1, with Porter's stemmer as in the summarisation literature."""
    must_have_words(references)
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    found = [scorer.score(reference, prediction) for reference, prediction in zip(references, predictions, strict=True)]
    return {name: sum(each[name].fmeasure for each in found) / len(found) for name in names}


def bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU of the whole set, 0 to 100, with sacrebleu's defaults (13a tokens, exponential smoothing)."""
    check_installed(["bleu"])
    from sacrebleu.metrics import BLEU

    return {"bleu": BLEU().corpus_score(list(predictions), [list(references)]).score}
