"""One answer, told while it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from peftkit.evaluate.exact_match import answer_start, generation_config


class _Writer(TextStreamer):
    """Hands whole words on instead of printing them."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)


def stream_answer(
    model: Any, tokenizer: Any, prompt: Sequence[int], max_new_tokens: int, write: Callable[[str], None], temperature: float = 0.0
) -> str:  # fmt: skip
    """The answer to a token prompt, stripped; `write` gets its words as they come. Greedy, or drawn at a temperature above 0."""
    config = generation_config(model, tokenizer, max_new_tokens)
    if temperature:
        config.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=_Writer(tokenizer, write))
    return str(tokenizer.decode(output[0, answer_start(model, len(prompt)) :], skip_special_tokens=True)).strip()
