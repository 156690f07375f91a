"""Whether a model keeps packed documents apart: tried on it, because lists of models and backends go out of date."""

from __future__ import annotations

from typing import Any

from peftkit.config import ConfigError

DOCUMENT = 6  # tokens; short enough for any sliding window or chunk to reach from one document into the next
TOLERANCE = 0.1  # of what a document does to the next where nothing parts them; rounding is far below, a leak far above


def check_isolation(model: Any) -> None:
    """Raises ConfigError, naming model and backend, where one packed document changes what the model makes of the next.

    The second of two documents is scored behind two different first ones, as documents of their own (positions start
    anew) and, for the measure of what a leak would do, as parts of one.
    """
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(vocabulary, (DOCUMENT,), generator=generator) for _ in range(3))
    apart = torch.arange(DOCUMENT).repeat(2)
    name, backend = type(model).__name__, getattr(model.config, "_attn_implementation", None)
    remedy = "set data.packing: false (rows of similar length then share a batch)" + ("" if backend == "eager" else ", or try model.attention: eager")

    def change(positions: Any) -> float:
        """The largest change of a logit of the second document, when the first is exchanged."""
        logits = []
        for before in (first, other):
            ids = torch.cat([before, second])[None].to(model.device)  # (1, 2 * DOCUMENT)
            logits.append(model(input_ids=ids, position_ids=positions[None].to(model.device), use_cache=False).logits[0, DOCUMENT:].detach().float())
        return float((logits[0] - logits[1]).abs().max())

    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():  # as in training, which may have attention of its own
            leaked, joined = change(apart), change(torch.arange(2 * DOCUMENT))
    except TypeError as error:
        raise ConfigError(f"data.packing: {name} cannot be told where documents begin ({error}); {remedy}") from error
    finally:
        model.train(was_training)
    if leaked > TOLERANCE * joined:
        raise ConfigError(
            f"data.packing: {name} with {backend} attention lets packed documents see each other (another document before it changes a document's "
            f"logits by up to {leaked:.2g}, and by {joined:.2g} where both are one); {remedy}"
        )
