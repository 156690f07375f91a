"""Token losses that never build the full logits."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)

CHUNK = 1024  # supervised rows whose logits exist at one time
IGNORE = -100


class TokenLoss(nn.Module):
    """Sum of the cross-entropies of the supervised tokens of a batch, and their number.

    The hidden states of supervised positions are gathered before lm_head, and the loss is taken over chunks of them
    whose logits are computed again in backward: memory is 4 d per token instead of the T x V logits. That is exact only
    where the logits are lm_head's output as it is; the first batch is checked against the model's own logits, and a
    model that scales or caps them goes through its own forward instead (said once in the log).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        self.gathers: bool | None = None

    def forward(self, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """(loss sum, supervised tokens) for labels (rows, tokens), -100 where not supervised, and the model's inputs.

        As everywhere in transformers, the label at position i is predicted from position i - 1; where a decoder of its own writes the answer,
        labels (rows, answer) are of what it writes.
        """
        inputs, targets = self._prepared(labels, inputs)
        if self.gathers is None:
            self.gathers = self._gathering_is_exact(inputs)
        if not self.gathers and not torch.is_grad_enabled():
            losses, tokens = self._by_row(inputs, targets)
            return losses.sum(), tokens.sum()
        chosen = targets != IGNORE
        targets = targets[chosen]  # (supervised,)
        if not self.gathers:
            logits = self.model(**inputs, use_cache=False).logits[chosen]
            return F.cross_entropy(logits.float(), targets, reduction="sum"), chosen.sum()
        hidden = self._hidden(inputs)[chosen]  # (supervised, dim)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, max(len(hidden), 1), CHUNK):  # at least once: a batch without supervised tokens still goes backward
            part = (hidden[start : start + CHUNK], targets[start : start + CHUNK])
            # One chunk alone is no saving, and its logits need not be computed twice.
            total = total + (checkpoint(self._chunk, *part, use_reentrant=False) if len(hidden) > CHUNK and torch.is_grad_enabled() else self._chunk(*part))
        return total, chosen.sum()

    @torch.no_grad()
    def by_row(self, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """(loss sum (rows,) in fp32, supervised tokens (rows,)), for evaluation, of the arguments of `forward`.

        A model whose logits are not its head's output runs row by row: of them, those of one row exist at one time.
        """
        inputs, targets = self._prepared(labels, inputs)
        if self.gathers is None:
            self.gathers = self._gathering_is_exact(inputs)
        return self._by_row(inputs, targets)

    def _by_row(self, inputs: dict[str, Any], targets: Tensor) -> tuple[Tensor, Tensor]:
        chosen = targets != IGNORE
        losses = torch.zeros(len(targets), device=targets.device)
        if not self.gathers:
            for i in range(len(targets)):
                row = {key: value[i : i + 1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
                logits = self.model(**row, use_cache=False).logits[chosen[i : i + 1]]
                losses[i] = F.cross_entropy(logits.float(), targets[i][chosen[i]], reduction="sum")
            return losses, chosen.sum(1)
        hidden, wanted, rows = self._hidden(inputs)[chosen], targets[chosen], chosen.nonzero()[:, 0]
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            losses.index_add_(0, rows[part], self._chunk(hidden[part], wanted[part], "none"))
        return losses, chosen.sum(1)

    def _prepared(self, labels: Tensor, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """(the model's inputs, (rows, tokens) what each position predicts); an encoder-decoder model's with what its decoder has written before."""
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            return {**inputs, "decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels=labels)}, labels
        return inputs, F.pad(labels[:, 1:], (0, 1), value=IGNORE)

    def _hidden(self, inputs: dict[str, Any]) -> Tensor:
        """(rows, tokens, dim), of the decoder where there is an encoder too."""
        if self.model.base_model is not self.model:
            return self.model.base_model(**inputs, use_cache=False).last_hidden_state
        mask = inputs["attention_mask"]  # T5 has no body: its encoder and decoder stand beside the head
        read = self.model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        return self.model.get_decoder()(
            input_ids=inputs["decoder_input_ids"], encoder_hidden_states=read, encoder_attention_mask=mask, use_cache=False
        ).last_hidden_state

    def _chunk(self, hidden: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        return F.cross_entropy(self.model.get_output_embeddings()(hidden).float(), targets, reduction=reduction)

    @torch.no_grad()
    def _gathering_is_exact(self, inputs: dict[str, Any]) -> bool:
        """Whether lm_head on the last hidden state gives the model's own logits, tried on one row."""
        model = self.model
        bodiless = getattr(model, "base_model", model) is model and not ("decoder_input_ids" in inputs and "attention_mask" in inputs)
        if bodiless or getattr(model, "get_output_embeddings", lambda: None)() is None:
            logger.warning("%s does not separate its body from its head: the loss is taken from full logits", type(model).__name__)
            return False
        was_training = model.training
        model.eval()
        row = {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
        own = model(**row, use_cache=False).logits
        ours = model.get_output_embeddings()(self._hidden(row))
        model.train(was_training)
        exact = own.shape == ours.shape and torch.allclose(own.float(), ours.float(), rtol=1e-3, atol=1e-3)
        if not exact:
            logger.warning("%s changes its logits after the head (scaling or capping): the loss is taken from full logits", type(model).__name__)
        return exact
