"""NEFTune: Jain et al. 2023, arXiv 2310.05914."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftkit.layers import ADAPTER, AdapterLayer, input_embedding
from peftkit.methods.base import Handle, Method


class NEFTune(Method):
    """Uniform noise on the input embeddings in training: e + alpha / sqrt(L d) * U(-1, 1).

    L is the number of real tokens of the sample (of the document, where rows are packed) and d the width; padding gets
    no noise. transformers and trl use the padded length instead: `length: padded` does as they do.
    """

    alpha: float = Field(5.0, gt=0)
    """Size of the noise; the paper uses 5, 10 and 15."""
    length: Literal["real", "padded"] = "real"
    """What L counts: the sample's own tokens, or the padded row (as transformers does)."""
    seed: int | None = None
    """Seed of the noise's own generator; by default drawn from torch's, so that train.seed covers it."""

    def attach(self, model: nn.Module, adapter: str = ADAPTER) -> Handle | None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"neftune is noise on what a model reads, and the embeddings of {type(model).__name__} serve what it writes too; leave it out")
        embedding = input_embedding(model)
        if embedding is None:
            raise ValueError(f"neftune needs the model's input embeddings, and {type(model).__name__} does not name them")
        return Noise(self, model, embedding)


class Noise(Handle):
    """The two hooks that make the noise: one on the model's body that sees the lengths, one on the embedding that adds it."""

    def __init__(self, config: NEFTune, model: nn.Module, embedding: nn.Module):
        self.config = config
        self.inputs: dict[str, Any] = {}
        device = next(embedding.parameters()).device
        self.seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
        self.generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(self.seed)
        body = getattr(model, "base_model", model)  # not the model: a loss that gathers before the head calls the body alone
        self.signature = inspect.signature(body.forward)
        self.plain = _plain(embedding)
        self.hooks = [
            embedding.register_forward_hook(self._add),
            body.register_forward_pre_hook(self._remember, with_kwargs=True),
            body.register_forward_hook(self._forget, always_call=True),
        ]

    def _remember(self, body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = self.signature.bind_partial(*args, **kwargs).arguments
        self.inputs = {key: given.get(key) for key in ("attention_mask", "position_ids")} if body.training else {}
        embedding = input_embedding(body)
        if embedding is not None and _plain(embedding) is not self.plain:  # resize_token_embeddings has put another in its place
            self.plain = _plain(embedding)
            self.hooks[0].remove()
            self.hooks[0] = embedding.register_forward_hook(self._add)

    def _forget(self, body: nn.Module, args: tuple, output: Any) -> None:
        self.inputs = {}  # an embedding that is called by itself is told nothing of its rows

    def _add(self, embedding: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not (self.enabled and embedding.training and torch.is_grad_enabled()):  # without grad it is generation, whatever the mode says
            return output
        if output.ndim != 3:  # single tokens that somebody looks up: no rows to speak of
            return output
        lengths = self._lengths(output)  # (rows, tokens)
        noise = torch.rand(output.shape, generator=self.generator, device=self.generator.device).mul_(2).sub_(1)
        size = torch.where(lengths > 0, self.config.alpha / (lengths * output.shape[-1]).clamp_min(1).sqrt(), 0.0)
        return output + (noise.to(output.device) * size.unsqueeze(-1)).to(output.dtype)

    def _lengths(self, output: Tensor) -> Tensor:
        """For every token the number of real tokens in its sample, 0 on padding (rows, tokens)."""
        rows, tokens = output.shape[:2]
        if self.config.length == "padded":
            return torch.full((rows, tokens), float(tokens), device=output.device)
        mask, positions = self.inputs.get("attention_mask"), self.inputs.get("position_ids")
        if positions is not None and positions.shape == (rows, tokens):
            document = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)  # (rows, tokens)
            same = nn.functional.one_hot(document).to(output.device, torch.float32)  # (rows, tokens, documents)
            if mask is not None and mask.shape == (rows, tokens):
                same = same * mask.unsqueeze(-1)
            return (same * same.sum(1, keepdim=True)).sum(-1)
        if mask is not None and mask.shape == (rows, tokens):
            mask = mask.to(output.device, torch.float32)
            return mask * mask.sum(1, keepdim=True)
        return torch.full((rows, tokens), float(tokens), device=output.device)

    def on_process(self, index: int) -> None:
        self.generator.manual_seed(self.seed + index)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())


def _plain(embedding: nn.Module) -> nn.Module:
    """The embedding itself, where adapter layers stand around it."""
    while isinstance(embedding, AdapterLayer):
        embedding = embedding.base_layer
    return embedding
