"""Rows to look at: their text with the trained tokens marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from peftkit.data.examples import Example

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


def pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """(text, trained) of each stretch. Decoded from the start each time: alone, a stretch may lose its first space."""
    done, start = "", 0
    for trained, group in groupby(example.trained):
        start += len(list(group))
        text = str(tokenizer.decode(example.input_ids[:start], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        yield text[len(done) :], trained
        done = text


def colour_row(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The row's text for a terminal: trained tokens green, all else dim, special tokens written out."""
    from rich.text import Text

    return Text.assemble(*((text, "bold green" if trained else "dim") for text, trained in pieces(example, tokenizer)))


def marked_row(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The row's text for a log: what is trained stands in `[[` and `]]`."""
    return "".join(f"[[{text}]]" if trained else text for text, trained in pieces(example, tokenizer))
