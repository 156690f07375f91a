"""A whole model on disk: written beside its place, read back and compared with the one in memory, and only then put there."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from peftkit.checkpoint import CheckpointError
from peftkit.merge import logits_on
from peftkit.model import load

ROWS, LENGTH = 4, 64  # of the tokens on which models are compared


def write_verified(model: Any, tokenizer: Any, target: Path, keep: bool = False) -> None:
    """Saves a model with its tokenizer beside `target`, reads it back and compares logits bit for bit, and only then replaces `target`.

    keep: what was written stays beside, as `unverified-<name>`, where it could not be verified, because it cannot be made again; no later run clears it
    away. Memory holds the model twice for that while.
    Raises CheckpointError where what was read back computes something else.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".writing-"))
    folder, whole = beside / target.name, False
    try:
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # its own for a disk that is full
            raise CheckpointError(f"the model could not be written to {target}: {error}; make room there") from error
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        whole = True
        again, _ = load(str(folder), None, model.dtype, model.device, getattr(model.config, "_attn_implementation", None) or "auto")
        difference = (logits_of(again).float() - logits_of(model).float()).abs().max().item()
        if difference != 0:  # not a number is no agreement either
            raise CheckpointError(
                f"the model read back from disk is not the one in memory: logits differ by up to {difference:.3g}; nothing was left in {target}"
            )
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    except BaseException as error:
        if keep and whole and folder.exists():
            kept = free_name(target.with_name(f"unverified-{target.name}"))
            folder.rename(kept)
            error.add_note(f"what was written is kept in {kept}, and stays until you remove it")
        shutil.rmtree(beside)
        raise
    beside.rmdir()


def free_name(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that is not there."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """The model's logits (ROWS, LENGTH, vocabulary) in evaluation mode on tokens that are the same in every call."""
    return logits_on(model.eval(), token_ids(model))


def token_ids(model: Any) -> Tensor:
    """The tokens (rows, length) on which models are compared: random ones, the same at every call."""
    config = model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    return torch.randint(config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0)).to(model.device)
