"""Rows as questions with choices: each choice rendered as the row's answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peftkit.config import ConfigError, suggest
from peftkit.data.config import DataConfig
from peftkit.data.examples import Example
from peftkit.data.formats import FORMATS, find_format, normalise
from peftkit.data.load import Source
from peftkit.data.pairs import PairRenderer
from peftkit.data.read import BadRow, Record
from peftkit.data.render import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 10  # rows listed one by one


class Question(NamedTuple):
    """A row once for each of its choices; the one at `correct` is right."""

    where: str
    candidates: list[Example]
    correct: int


def load_choices(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, choices: Sequence[str] | None, encoder_decoder: bool = False
) -> tuple[list[Question], list[str]]:
    """The evaluation rows with their choices, and what is to be said of them.

    choices: those of every row; None where each row has a column `choices`, a list of texts, or `{text: [...], label:
    [...]}`. Which is right, the row's own answer says: the text, its label, or its number from 0. Raises ConfigError,
    naming the rows, for those of which this cannot be told, and where a choice is cut off by max_length.
    """
    source, records = config.eval or config.train, _records(config)
    # A choice whose end is cut off cannot be compared, and the loss must be of the choice alone.
    own = config.model_copy(update={"truncation": "drop", "loss_on": "last"})
    form = find_format(records, own, source)
    if form == "text":
        raise ConfigError(f"{source}: plain text has no answer, so no choices; choice_accuracy needs rows with an answer")
    questions, bad, long = [], [], 0
    renderer = (PairRenderer if encoder_decoder else Renderer)(tokenizer, own)
    for record in records:
        found = _variants(record, form, own, choices)
        if isinstance(found, BadRow):
            bad.append(found)
            continue
        variants, correct = found
        drawn = renderer([normalise(variant, form, own) for variant in variants])
        wrong = [each for each in drawn if isinstance(each, BadRow)]
        if wrong:
            long += all(each.too_long for each in wrong)
            bad += [] if all(each.too_long for each in wrong) else wrong[:1]
        else:
            questions.append(Question(record.where, [each for each in drawn if isinstance(each, Example)], correct))
    if bad and config.on_bad_row == "error":
        listed = "".join(f"\n  {row.where}: {row.reason}" for row in bad[:SHOWN]) + (f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
        raise ConfigError(f"{source}: {len(bad)} of {len(records)} rows cannot be used for choice_accuracy (data.on_bad_row: skip leaves them out):{listed}")
    if not questions:
        raise ConfigError(f"{source}: no row is left for choice_accuracy ({long} of {len(records)} with a choice beyond max_length {config.max_length})")
    notes = [f"{source}: {len(questions)} of {len(records)} rows with choices"]
    notes += [f"  {long} rows left out: a choice of theirs ends beyond max_length {config.max_length}"] if long else []
    notes += [f"  {row.where}: {row.reason}" for row in bad[:SHOWN]]
    return questions, notes


def _records(config: DataConfig) -> list[Record | BadRow]:
    """The rows of the evaluation set, as `load_examples` takes them."""
    source = Source(config.eval or config.train, config, "eval", not config.eval, config.eval_rows)
    return [record for _, record in source.records()]


def _variants(record: Record | BadRow, form: str, config: DataConfig, choices: Sequence[str] | None) -> tuple[list[Record], int] | BadRow:
    """(the row with each choice as its answer, the place of the right one)"""
    if isinstance(record, BadRow):
        return record
    row = normalise(record, form, config)
    if isinstance(row, BadRow):
        return row
    told = record.columns.get("choices") if choices is None else list(choices)
    texts, labels = (told.get("text"), told.get("label")) if isinstance(told, dict) else (told, None)
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        return BadRow(record.where, "no column 'choices' with at least two texts, and eval.choices names none")
    if len({text.strip() for text in texts}) < len(texts):
        return BadRow(record.where, f"two of its choices are the same: {texts}")
    chats = form in ("messages", "conversations")
    column = form if chats else FORMATS[form][1]
    name = (config.columns or {}).get(column, column)
    answer = str(row.messages[-1]["content"]).strip()
    named = [text.strip() for text in texts]
    if row.messages[-1]["role"] != "assistant":
        return BadRow(record.where, "it does not end with an answer")
    given = None if chats else record.columns.get(name)
    if isinstance(given, int) and not isinstance(given, bool) and labels is None and 0 <= given < len(texts):
        correct = given  # MMLU's: the place of the right one, also where the choices are numbers
    elif isinstance(labels, list) and answer in map(str, labels):
        correct = [str(label) for label in labels].index(answer)
    elif answer in named:
        correct = named.index(answer)
    elif answer.isdecimal() and int(answer) < len(texts):
        correct = int(answer)
    else:
        return BadRow(record.where, f"its answer {answer[:80]!r} is none of its choices{suggest(answer, named)} (there are: {', '.join(named)[:200]})")

    def with_answer(text: str) -> dict[str, Any]:
        if not chats:
            return {**record.columns, name: text}
        turns = record.columns[name]
        return {**record.columns, name: [*turns[:-1], {**turns[-1], ("content" if "role" in turns[-1] else "value"): text}]}

    return [Record(record.where, with_answer(text)) for text in texts], correct
