"""Texts to token ids, many at once, and spans of characters to spans of tokens, without a list of every token's place."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

LOOK_BACK = 16  # tokens from the end of a prompt within which its last special token is looked for


class Encoder:
    """A fast tokenizer that adds nothing to what it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        # Text is cut at these before anything else is done to it: what follows one is tokenised whatever stands before it.
        self.cutting = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and not _bends(token)}
        self.tails: dict[str, list[int]] = {}  # ends of prompts from their last such token on, which are few

    def __call__(self, texts: list[str]) -> list[Encoding]:
        """Each text with its ids and where in it they stand."""
        if not texts:
            return []
        out = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(out.encodings or [])

    def prompts(self, rows: Sequence[tuple[str, str, Encoding | None, list[int]]]) -> list[list[int]]:
        """The ids of the prompt of each (prompt, text, encoding, ids of the text), tokenised only where the text's own do not tell them."""
        found = [self._in_row(*row) for row in rows]
        others = iter(self([prompt for (prompt, *_), ids in zip(rows, found, strict=True) if ids is None]))
        return [next(others).ids if ids is None else ids for ids in found]

    def _in_row(self, prompt: str, text: str, encoding: Encoding | None, ids: list[int]) -> list[int] | None:
        """The ids of a prompt that its row begins with: the row's own before a special token near its end, and those of the rest. Else None."""
        if not prompt:
            return []
        if encoding is None or not text.startswith(prompt) or (at := encoding.char_to_token(len(prompt) - 1)) is None:
            return None
        last = next((i for i in range(at, max(-1, at - LOOK_BACK), -1) if ids[i] in self.cutting), None)
        place = None if last is None else encoding.token_to_chars(last)
        if last is None or place is None or place[1] > len(prompt):
            return None
        tail = prompt[place[0] :]
        if tail not in self.tails:
            self.tails[tail] = self([tail])[0].ids
        return ids[:last] + self.tails[tail]


def _bends(token: Any) -> bool:
    """Whether an added token takes text around it along, or is looked for in normalised text."""
    return bool(token.normalized or token.lstrip or token.rstrip or token.single_word)


def mark(encoding: Encoding, tokens: int, spans: list[tuple[int, int]]) -> list[bool]:
    """Token i is trained if it shares a character with a span (begin, end) of the text."""

    def begin(token: int) -> int:
        return encoding.token_to_chars(token)[0]  # type: ignore[index]  # there are no tokens but those of the text

    def end(token: int) -> int:
        return encoding.token_to_chars(token)[1]  # type: ignore[index]

    trained = [False] * tokens
    for start, stop in spans:
        first, last = bisect_right(range(tokens), start, key=end), bisect_left(range(tokens), stop, key=begin)
        trained[first:last] = [True] * (last - first)
    return trained


def marked_runs(encoding: Encoding, tokens: int, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) of each unbroken run of tokens in what the template marks, as transformers' own mask has them."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
        if first is None:
            break
        end = last + 1 if last else tokens
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif first < end:
            found.append((first, end))
    return found


def last_run(trained: list[bool]) -> tuple[int, int]:
    """(start, end) of the last unbroken run of trained tokens, of which there is one."""
    backward = trained[::-1]
    skipped = backward.index(True)
    start = backward.index(False, skipped) if False in backward[skipped:] else len(trained)
    return len(trained) - start, len(trained) - skipped
