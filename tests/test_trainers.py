"""A wrapped model trains unchanged under transformers' Trainer and trl's SFTTrainer, in 4 bit too."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import quantized_llama, tiny_llama
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import peftkit as pk
from peftkit.layers import adapter_layers

pytestmark = pytest.mark.filterwarnings(
    # The data loaders of the trainers ask for pinned memory whether there is a GPU or not.
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
    "ignore:`gradient_checkpointing.*` is deprecated:FutureWarning",  # the one name that all 5.x have; trl sets it too
)

CASES = [("LoRA", None), ("DoRA", None), ("QLoRA", "nf4"), ("DoRA", "nf4")]


def rows() -> list[dict[str, list[int]]]:
    """Sequences that count upwards: something a tiny model can learn to lower its loss on."""
    found = []
    for start in range(16):
        ids = [3 + (start + k) % 40 for k in range(12)]
        found.append({"input_ids": ids, "attention_mask": [1] * 12, "labels": ids})
    return found


def wrapped(method: str, kind: str | None, folder: Path) -> nn.Module:
    model = quantized_llama(folder, kind) if kind else tiny_llama()
    torch.manual_seed(0)
    pk.attach(model, [getattr(pk, method)(r=4), pk.NEFTune(alpha=1)])
    return model


def arguments(folder: Path) -> dict:
    return dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, save_strategy="steps", save_steps=3,
        report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip


def assert_trained(model: nn.Module, trainer: Trainer, folder: Path, fresh: nn.Module, ids: torch.Tensor) -> None:
    """Finite, falling loss; every B moved; and the Trainer's checkpoint, read by peftkit, is the trained model."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    layers = adapter_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert layer.b().any(), name
    checkpoint = folder / "checkpoint-3"
    assert not list(checkpoint.glob("model*.safetensors")), "the base is not written"
    pk.load_adapter(fresh, checkpoint)
    model.eval(), fresh.eval()
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("method,kind", CASES)
def test_transformers_trainer(method, kind, saved_llama, tmp_path, ids):
    model = wrapped(method, kind, saved_llama)
    trainer = Trainer(model, TrainingArguments(**arguments(tmp_path / "out")), train_dataset=rows())
    trainer.train()
    assert trainer.model is model
    fresh = quantized_llama(saved_llama, kind) if kind else tiny_llama()
    assert_trained(model, trainer, tmp_path / "out", fresh, ids)


@pytest.mark.parametrize("method,kind", [("LoRA", None), ("QLoRA", "nf4")])
def test_transformers_trainer_with_loraplus_and_recomputed_activations(method, kind, saved_llama, tmp_path, ids):
    model = wrapped(method, kind, saved_llama)
    pk.detach(model)
    pk.attach(model, [getattr(pk, method)(r=4), pk.LoRAPlus(ratio=2)])
    options = arguments(tmp_path / "out") | {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = Trainer(model, TrainingArguments(**options), train_dataset=rows(), optimizers=(pk.build_optimizer(model, learning_rate=5e-3), None))
    trainer.train()
    assert_trained(model, trainer, tmp_path / "out", quantized_llama(saved_llama, kind) if kind else tiny_llama(), ids)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, the words being numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {str(k): 4 + k for k in range(60)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("method,kind", CASES)
def test_trl_sft_trainer(method, kind, saved_llama, tmp_path, ids):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = wrapped(method, kind, saved_llama)
    data = datasets.Dataset.from_dict({"text": [" ".join(str((start + k) % 40) for k in range(12)) for start in range(16)]})
    options = arguments(tmp_path / "out") | {"max_length": 32, "bf16": False}
    trainer = trl.SFTTrainer(model, args=trl.SFTConfig(**options), train_dataset=data, processing_class=tiny_tokenizer())
    trainer.train()
    fresh = quantized_llama(saved_llama, kind) if kind else tiny_llama()
    assert_trained(model, trainer, tmp_path / "out", fresh, ids)


def test_a_quantised_model_without_adapters_is_refused_by_the_trainer(saved_llama, tmp_path):
    """The door that attach opens is needed: without it the Trainer refuses, and after detach it refuses again."""
    model = wrapped("QLoRA", "nf4", saved_llama)
    pk.detach(model)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(**arguments(tmp_path)), train_dataset=rows())
