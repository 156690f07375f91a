"""Rows for encoder-decoder models: the encoder reads the prompt, the decoder learns the whole answer.

An Example holds both, one after the other: its `prompt_ids` are what the encoder reads, and what follows them in `input_ids` is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peftkit.config import ConfigError
from peftkit.data.config import DataConfig
from peftkit.data.examples import Example
from peftkit.data.formats import Row
from peftkit.data.pack import IGNORED
from peftkit.data.read import BadRow
from peftkit.data.render import CHUNK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def refuse_for_pairs(config: DataConfig) -> None:
    """Raises ConfigError for what has no meaning where the prompt is read by an encoder."""
    if config.packing:
        raise ConfigError("data.packing: an encoder-decoder model cannot keep packed rows apart: set it to false (rows of similar length then share a batch)")
    if config.loss_on == "all":
        raise ConfigError("data.loss_on: all has no meaning for an encoder-decoder model: only the answer is written, the prompt is read; leave it out")


class Pair(NamedTuple):
    """A row as two texts."""

    where: str
    prompt: str
    answer: str


class PairRenderer:
    """Rows to Examples for the tokenizer of an encoder-decoder model; as `Renderer`, but without a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig):
        refuse_for_pairs(config)
        self.tokenizer, self.config = tokenizer, config
        self.truncated = 0
        self.counts: Counter[str] = Counter()

    def __call__(self, rows: Sequence[Row | BadRow]) -> list[Example | BadRow]:
        """The rows in their order, each as an Example or with what is wrong with it."""
        return [done for start in range(0, len(rows), CHUNK) for done in self.chunk(rows[start : start + CHUNK])]

    def chunk(self, rows: Sequence[Row | BadRow]) -> list[Example | BadRow]:
        """As many rows as are tokenised at once."""
        pairs = [row if isinstance(row, BadRow) else self.pair(row) for row in rows]
        good = [pair for pair in pairs if isinstance(pair, Pair)]
        if not good:
            return [pair for pair in pairs if isinstance(pair, BadRow)]
        sources = self.tokenizer([pair.prompt for pair in good], verbose=False)["input_ids"]
        targets = self.tokenizer(text_target=[pair.answer for pair in good], verbose=False)["input_ids"]
        ids = zip(sources, targets, strict=True)
        return [pair if isinstance(pair, BadRow) else self.example(pair, *map(list, next(ids))) for pair in pairs]

    def pair(self, row: Row) -> Pair | BadRow:
        """The row's two texts."""
        if not row.messages:
            return BadRow(row.where, "plain text has no answer, and an encoder-decoder model reads a prompt and writes an answer: give prompt and completion")
        if row.rejected is not None:
            self.counts["preference pairs: the chosen answer is trained, the rejected one is not read"] += 1
        *given, answer = row.messages
        if row.plain_prompt is not None:
            return Pair(row.where, row.plain_prompt.removesuffix("\n"), answer["content"])
        roles = [turn["role"] for turn in row.messages]
        if roles[-2:] != ["user", "assistant"] or roles[:-2] not in ([], ["system"]) or not answer["content"]:
            return BadRow(
                row.where, f"an encoder-decoder model reads one prompt and writes one answer, and the row has {len(roles)} turns ({', '.join(roles)}): "
                "give it as prompt and completion"
            )  # fmt: skip
        return Pair(row.where, "\n\n".join(turn["content"] for turn in given), answer["content"])

    def example(self, row: Pair, source: list[int], target: list[int]) -> Example | BadRow:
        """The row with its ids: `source` for the encoder, `target` for the decoder. Of what is too long, the prompt is cut, never the answer."""
        end, longest = self.tokenizer.eos_token_id, self.config.max_length
        if end is not None and target[-1:] != [end]:
            target = [*target, end]
        if not source:
            return BadRow(row.where, "the prompt is empty")
        if len(source) + len(target) > longest:
            if self.config.truncation == "drop":
                return BadRow(row.where, f"{len(source)} tokens of prompt and {len(target)} of answer, and max_length is {longest}", too_long=True)
            room = longest - len(target)
            if room < 2:
                return BadRow(row.where, f"the answer has {len(target)} tokens, which leave no prompt within max_length {longest}")
            source = [*source[: room - 1], end] if source[-1] == end else source[:room]
            self.truncated += 1
        if self.tokenizer.unk_token_id is not None:
            self.counts["the answer has characters that the tokenizer does not know, and the model cannot learn to write them"] += (
                self.tokenizer.unk_token_id in target
            )
            self.counts["the prompt has characters that the tokenizer does not know"] += self.tokenizer.unk_token_id in source
        return Example(source + target, [False] * len(source) + [True] * len(target), row.where, source, row.answer.strip())

    def notes(self) -> list[str]:
        """What was seen on the way, in sentences."""
        return [f"{count} rows: {what}" for what, count in self.counts.items() if count]


def collate_pairs(examples: Sequence[Example], pad_token_id: int) -> dict[str, Any]:
    """Each example a row, padded on the right: `input_ids` and `attention_mask` (rows, prompt) for the encoder, `labels` (rows, answer), -100 on padding.

    Labels are not shifted: label i is what the decoder writes at place i. Raises ValueError for an empty batch.
    """
    import torch

    if not examples:
        raise ValueError("a batch needs at least one example")
    sources = [example.prompt_ids for example in examples]
    targets = [example.input_ids[len(example.prompt_ids) :] for example in examples]
    width, length = max(map(len, sources)), max(map(len, targets))
    return {
        "input_ids": torch.tensor([ids + [pad_token_id] * (width - len(ids)) for ids in sources]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sources]),
        "labels": torch.tensor([ids + [IGNORED] * (length - len(ids)) for ids in targets]),
    }
