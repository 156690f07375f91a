"""Tiny random models for the tests: no downloads, seconds each."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; a slip should fail at once

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftkit import quant
from peftkit.kernels.dropout import Dropout


def tiny_llama(seed: int = 0, bias: bool = True, **options) -> LlamaForCausalLM:
    """Two layers of width 64, biases everywhere and not zero, so that nothing passes because it is missing."""
    torch.manual_seed(seed)
    config = dict(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, attention_bias=bias, mlp_bias=bias, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(config | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                   pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -m gpu` runs what needs a GPU; everything else runs on the CPU, also where there is one, and in processes of its own too."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def saved_llama(tmp_path):
    """The folder of a tiny Llama without tokenizer."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantized_llama(folder, kind: str = "nf4", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The model in `folder`, loaded the way transformers loads quantised models (not by peftkit.load)."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quant.quantization_config(kind, dtype), device_map={"": "cpu"})


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(5))


def wake(model: torch.nn.Module, seed: int = 3) -> None:
    """Moves every trained parameter off its start: B is no longer zero, magnitudes are no longer norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * 0.05)


def zeroed(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x, with what the layers' dropout zeroes for this seed zeroed in place."""
    return Dropout.of(x, p, seed).zero_(x)


def clone(model):
    return copy.deepcopy(model)
