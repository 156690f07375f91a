"""Exact match by greedy generation, of texts or of the numbers they end with."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from peftkit.config import ConfigError

SLACK = 8  # tokens that an answer may run over the longest reference before it is cut


class Prediction(NamedTuple):
    """One answer beside its reference."""

    prediction: str
    answer: str
    match: Literal["text", "number"] = "text"

    @property
    def correct(self) -> bool:
        if self.match == "number":
            return (wanted := final_number(self.answer)) is not None and final_number(self.prediction) == wanted
        return self.prediction == self.answer


_NUMBER = re.compile(r"(?:(?<![\d.])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """The number an answer comes to: the first after its last `####` where it has one (GSM8K), else its last. None without any.

    Commas within numbers are passed over: 1,250.50 is 1250.5.
    """
    _, marked, after = text.rpartition("####")
    found = _NUMBER.findall(after)  # the whole text where nothing is marked
    return Decimal((found[0] if marked else found[-1]).replace(",", "")) if found else None


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's eos, the model's own, and what the chat template closes a turn with."""
    own = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for last in reversed(tokenizer(tokenizer.apply_chat_template(turn, tokenize=False), add_special_tokens=False)["input_ids"]):
            token = tokenizer.added_tokens_decoder.get(last)
            if token is not None and token.special:
                found.add(last)
            elif tokenizer.decode([last]).strip():  # the answer itself: what stands behind it ends a turn
                break
    return sorted(found - {None})


def generation_config(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding that stops where a turn ends."""
    ends = stop_ids(model, tokenizer)
    if not ends and tokenizer.pad_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text and no padding token, so answers have no end; set tokenizer.eos_token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    # What is not set here, transformers would take from the model's own generation config: penalties of chat models, say, or BART's least length.
    least = {"min_length": 0} | ({"min_new_tokens": 0} if getattr(model.generation_config, "min_new_tokens", None) else {})  # it warns where both are set
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0,
        eos_token_id=ends, pad_token_id=pad, **least,
    )  # fmt: skip


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[str]:  # fmt: skip
    """The greedy answers to token prompts, in their order, decoded without special tokens and stripped.

    Prompts of like length share a batch, padded on the left, or on the right where an encoder reads them. Answers end where
    the model's positions do.
    """
    config = generation_config(model, tokenizer, max_new_tokens)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    pad = config.pad_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        spaces = [width - len(prompts[i]) for i in chosen]
        before, after = ([0] * len(chosen), spaces) if model.config.is_encoder_decoder else (spaces, [0] * len(chosen))
        ids = torch.tensor([[pad] * left + list(prompts[i]) + [pad] * right for i, left, right in zip(chosen, before, after, strict=True)])
        mask = torch.tensor([[0] * left + [1] * len(prompts[i]) + [0] * right for i, left, right in zip(chosen, before, after, strict=True)])
        before_answer = 0 if model.config.is_encoder_decoder else width
        room = longest - before_answer if longest is not None else 0  # where GPT-2 would have no row for a position
        config.max_new_tokens = min(max_new_tokens, room) if room > 0 else max_new_tokens
        output: Any = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
        for i, text in zip(chosen, tokenizer.batch_decode(output[:, answer_start(model, width) :], skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
        if progress:
            progress(len(chosen))
    return answers


def answer_start(model: Any, prompt: int) -> int:
    """Where in generate's output the answer begins: behind the prompt of `prompt` tokens, or, where an encoder read that, behind the decoder's first token."""
    return 1 if model.config.is_encoder_decoder else prompt


def answer_room(tokenizer: PreTrainedTokenizerBase, references: Sequence[str]) -> int:
    """Tokens that an answer may have where nothing else is said: a little more than the longest reference."""
    return max(len(ids) for ids in tokenizer(list(references), add_special_tokens=False)["input_ids"]) + SLACK


def exact_match(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], references: Sequence[str], batch_size: int,
    max_new_tokens: int | None = None, progress: Callable[[int], None] | None = None, match: Literal["text", "number"] = "text",
) -> list[Prediction]:  # fmt: skip
    """Greedy answers beside their references; by default an answer may be a little longer than the longest reference."""
    if max_new_tokens is None:
        max_new_tokens = answer_room(tokenizer, references)
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    return [Prediction(after_thinking(answer), after_thinking(reference), match) for answer, reference in zip(answers, references, strict=True)]


def after_thinking(text: str) -> str:
    """What is said after the thinking: templates such as Qwen3's write an empty one before every answer, which no reference holds."""
    return text.rpartition("</think>")[2].strip()
