"""The architectures that adapters must work on: tiny random models of transformers, no downloads, one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, WIDTH, LABELS = 96, 32, 3
ROWS, TOKENS, ANSWER = 3, 9, 7

# ------------------------------------------------------------------------------------------------------------- batches


def _numbers(*shape: int, low: int, high: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(5))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def _text() -> dict[str, Tensor]:
    """Three rows, the second one padded on the right."""
    ids, mask = _numbers(ROWS, TOKENS, low=3, high=VOCABULARY), torch.ones(ROWS, TOKENS, dtype=torch.long)
    ids[1, -3:], mask[1, -3:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _own_tokens() -> dict[str, Tensor]:
    batch = _text()
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _label() -> dict[str, Tensor]:
    return {"labels": _numbers(ROWS, low=0, high=LABELS)}


def _answer() -> dict[str, Tensor]:
    return {"labels": _numbers(ROWS, ANSWER, low=3, high=VOCABULARY)}


BATCHES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "causal LM": _own_tokens,
    "masked LM": _own_tokens,
    "sequence classification": lambda: _text() | _label(),
    "token classification": lambda: _text() | {"labels": _numbers(ROWS, TOKENS, low=0, high=LABELS)},
    "seq2seq": lambda: _text() | _answer(),
    "image classification": lambda: {"pixel_values": _noise(ROWS, 3, 16, 16)} | _label(),
    "speech to text": lambda: {"input_features": _noise(ROWS, 8, 32)} | _answer(),
    "audio classification": lambda: {"input_values": _noise(ROWS, 400)} | _label(),
}

# --------------------------------------------------------------------------------------------------------------- sizes

_TEXT = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=LABELS, classifier_dropout=0.0)
_LAYERS = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4)
_LLAMA = _TEXT | _LAYERS | dict(intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64)
_GEMMA = _LLAMA | dict(head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
_GPT2 = _TEXT | dict(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
_BLOOM = _TEXT | dict(hidden_size=WIDTH, n_layer=2, n_head=4)
_OPT = dict(ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0)
_T5 = _TEXT | dict(d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
_BART = _TEXT | dict(
    d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    max_position_embeddings=64, dropout=0.0, decoder_start_token_id=2,
)  # fmt: skip
_BERT = _TEXT | _LAYERS | dict(intermediate_size=48, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_DEBERTA = _BERT | dict(relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"])
_IMAGE = _LAYERS | dict(intermediate_size=48, image_size=16, patch_size=8)
_WAVES = _BERT | dict(
    conv_dim=(WIDTH, WIDTH), conv_kernel=(5, 3), conv_stride=(4, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, classifier_proj_size=WIDTH, mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0, activation_dropout=0.0,
    attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Architecture:
    """One row of the table."""

    name: str
    head: str
    """What it is trained for: a key of BATCHES."""
    model: str
    """Class of the model, as transformers names it."""
    sizes: dict[str, Any]
    """Arguments of its config."""
    passed_by: bool = False
    """Whether the model multiplies with weights of linears itself, past peft's layers: peft is then compared as it merges."""
    experts: bool = False
    """Whether it has experts, for which DoRA has no form."""
    refused_by_peft: str | None = None
    """What peft says that does not take all linears of it."""

    @property
    def row(self) -> str:
        return f"{self.name}, {self.head}"

    def batch(self) -> dict[str, Tensor]:
        """What the model is called with, labels included."""
        return BATCHES[self.head]()

    def build(self) -> Any:
        """The model in evaluation mode, all weights random: biases and norms too, so that nothing passes because it is zero or one."""
        torch.manual_seed(0)
        kind = getattr(transformers, self.model)
        model = kind(kind.config_class(**self.sizes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim < 2:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif "embed" not in name:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
        return model.eval()


ARCHITECTURES = [
    Architecture("Llama", "causal LM", "LlamaForCausalLM", _LLAMA),
    Architecture("Llama, tied embeddings", "causal LM", "LlamaForCausalLM", _LLAMA | dict(tie_word_embeddings=True)),
    Architecture("Llama", "sequence classification", "LlamaForSequenceClassification", _LLAMA),
    Architecture("Mistral", "causal LM", "MistralForCausalLM", _LLAMA | dict(sliding_window=4)),
    Architecture("Mixtral", "causal LM", "MixtralForCausalLM", _LLAMA | dict(num_local_experts=4, num_experts_per_tok=2), experts=True),
    Architecture("Qwen2", "causal LM", "Qwen2ForCausalLM", _LLAMA),
    Architecture("Qwen2", "token classification", "Qwen2ForTokenClassification", _LLAMA),
    Architecture("Qwen3", "causal LM", "Qwen3ForCausalLM", _LLAMA | dict(head_dim=8)),
    Architecture(
        "Qwen3-MoE", "causal LM", "Qwen3MoeForCausalLM", _LLAMA | dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
        experts=True,
    ),
    Architecture("Gemma 2", "causal LM", "Gemma2ForCausalLM", _GEMMA),
    Architecture("Gemma 3 (text)", "causal LM", "Gemma3ForCausalLM", _GEMMA),
    Architecture("OLMo 2", "causal LM", "Olmo2ForCausalLM", _LLAMA),
    Architecture("Phi-3", "causal LM", "Phi3ForCausalLM", _LLAMA),
    Architecture("Falcon", "causal LM", "FalconForCausalLM", _TEXT | _LAYERS | dict(num_kv_heads=2, new_decoder_architecture=True)),
    Architecture("Falcon, ALiBi", "causal LM", "FalconForCausalLM", _TEXT | _LAYERS | dict(multi_query=False, alibi=True, bias=True)),
    Architecture("GPT-NeoX (Pythia)", "causal LM", "GPTNeoXForCausalLM", _TEXT | _LAYERS | dict(intermediate_size=48)),
    Architecture("GPT-2", "causal LM", "GPT2LMHeadModel", _GPT2),
    Architecture("GPT-2", "sequence classification", "GPT2ForSequenceClassification", _GPT2),
    Architecture("OPT", "causal LM", "OPTForCausalLM", _TEXT | _LAYERS | _OPT),
    Architecture("MPT", "causal LM", "MptForCausalLM", _TEXT | dict(d_model=WIDTH, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2)),
    Architecture("Bloom", "causal LM", "BloomForCausalLM", _BLOOM),
    Architecture("Bloom, sliced products", "causal LM", "BloomForCausalLM", _BLOOM | dict(pretraining_tp=2, slow_but_exact=True), passed_by=True),
    Architecture(
        "Mamba", "causal LM", "MambaForCausalLM", _TEXT | dict(hidden_size=WIDTH, state_size=4, num_hidden_layers=2, time_step_rank=4), passed_by=True,
        refused_by_peft="incompatible with Mamba-based models",
    ),
    Architecture("T5", "seq2seq", "T5ForConditionalGeneration", _T5),
    Architecture("FLAN-T5 (gated)", "seq2seq", "T5ForConditionalGeneration", _T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    Architecture("BART", "seq2seq", "BartForConditionalGeneration", _BART),
    Architecture("BERT", "masked LM", "BertForMaskedLM", _BERT),
    Architecture("BERT", "sequence classification", "BertForSequenceClassification", _BERT),
    Architecture("BERT", "token classification", "BertForTokenClassification", _BERT),
    Architecture("RoBERTa", "masked LM", "RobertaForMaskedLM", _BERT),
    Architecture("RoBERTa", "sequence classification", "RobertaForSequenceClassification", _BERT),
    Architecture("DeBERTa", "sequence classification", "DebertaForSequenceClassification", _DEBERTA),
    Architecture("DeBERTa-v2", "masked LM", "DebertaV2ForMaskedLM", _DEBERTA | dict(share_att_key=False, norm_rel_ebd="layer_norm")),
    Architecture("DeBERTa-v2", "sequence classification", "DebertaV2ForSequenceClassification", _DEBERTA | dict(share_att_key=True)),
    Architecture("ViT", "image classification", "ViTForImageClassification", _IMAGE | dict(num_labels=LABELS)),
    Architecture("SigLIP", "image classification", "SiglipForImageClassification", dict(vision_config=_IMAGE | dict(vision_use_head=False), num_labels=LABELS)),
    Architecture("Whisper", "speech to text", "WhisperForConditionalGeneration", _BART | dict(num_mel_bins=8, max_source_positions=16)),
    Architecture("WavLM", "audio classification", "WavLMForSequenceClassification", _WAVES, passed_by=True),
]  # fmt: skip
