"""The model of a recipe without its weights: in the shapes, dtypes and adapters of the run, and what they take."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftkit import quant
from peftkit.attention import attend_within_documents
from peftkit.config import ConfigError
from peftkit.forecast.trace import Trace
from peftkit.layers import LoRAExperts, features, is_experts, is_linear, output_head
from peftkit.layers.frozen_experts import unknown
from peftkit.loss import TokenLoss
from peftkit.methods import LoRA, Method, method_name
from peftkit.model import from_config, resolve_dtype
from peftkit.recipe import Recipe
from peftkit.train import enable_checkpointing

SCALES = 4 / quant.BLOCK  # bytes a weight that dequantising in 4 bits needs beside the weight: its scales in fp32
_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_scale", "lm_head_multiplier")


class Skeleton:
    """The model with the methods attached, in training mode, all of it tensors without data; bytes of what it stores by kind."""

    def __init__(self, recipe: Recipe, config: Any, gpu: bool):
        self.recipe, self.gpu = recipe, gpu
        self.kept = 0  # bytes that layers keep from step to step, such as DoRA's norms; told by the first step
        self.evaluations: dict[Any, int] = {}  # peaks that were traced already
        self.dtype = torch.float32 if recipe.train.full_finetuning else _dtype(recipe.model.dtype, gpu)
        self.autocast = recipe.train.full_finetuning and _dtype(recipe.model.dtype, gpu) == torch.bfloat16
        self.trace = Trace(exact_head=not any(getattr(config.get_text_config(), name, None) not in (None, 1.0) for name in _CHANGES_LOGITS))
        options = {} if recipe.model.attention in ("auto", "flash_attention_2") else {"attn_implementation": recipe.model.attention}
        with self.trace.running():
            self.model: Any = from_config(copy.deepcopy(config), recipe.model.name, dtype=self.dtype, **options)
            if recipe.attends_within_documents and not gpu:
                attend_within_documents(self.model)
            self.parameters = self.model.num_parameters()
            self.weights = self.trace.live
            self.quantised_parameters = 0
            self._quantise(recipe.quantize)
            before = self.trace.live
            self.adapted = self._attach(recipe.build_methods())
            self.adapters = self.trace.live - before
            self.model.train()
            enable_checkpointing(self.model, recipe.train.gradient_checkpointing)
            self.loss = TokenLoss(self.model)
        self.trained = {id(p): p for p in self.model.parameters() if p.requires_grad}
        self.gradients = sum(p.nbytes for p in self.trained.values())
        self.optimizer = sum(state_bytes(p, self._paged()) for p in self.trained.values())

    def _quantise(self, kind: str | None) -> None:
        """Counts the weights that will be quantised as they are stored then, and what each use of one borrows."""
        if kind is None:
            return
        head = output_head(self.model)
        for module in self.model.modules():
            if type(module) in (nn.Linear, Conv1D) and is_linear(module) and module is not head:
                if kind == "int8" or self.gpu or not quant.misread_on_cpu(module):
                    self._store(module.weight, _stored_bytes(module, kind), _borrowed(module.weight.numel(), kind, self.dtype))
            elif kind != "int8" and is_experts(module) and unknown(module) is None:
                for part in LoRAExperts.parts(module):
                    weight = getattr(module, part)
                    self._store(weight, _four_bits(weight.numel()), _borrowed(weight[0].numel(), kind, self.dtype))

    def _store(self, weight: torch.Tensor, stored: int, borrowed: int) -> None:
        self.weights += stored - weight.nbytes
        self.quantised_parameters += weight.numel()
        self.trace.dequantised(weight, borrowed)

    def _attach(self, methods: list[Method]) -> dict[str, dict[str, int]]:
        """Attaches without the doors to other libraries; by method, name ending -> how many, of what is adapted. Raises ConfigError."""
        adapted: dict[str, dict[str, int]] = {}
        self.whole: list[str] = []
        self.rows: dict[str, int] = {}
        if not self.recipe.train.full_finetuning:
            self.model.requires_grad_(False)
        for method in methods:
            try:
                if isinstance(method, LoRA):
                    found, whole, rows = method.plan(self.model)
                    adapted[method_name(method)] = dict(Counter(name.rsplit(".", 1)[-1] for name in found))
                    self.whole, self.rows = list(whole), {name: len(row.tokens) for name, row in rows.items()}
                    if method.init == "loftq":  # as large as any other start, and read from the weights themselves
                        method = method.model_copy(update={"init": "kaiming", "init_weights": None})
                    LoRA.attach(method, self.model)  # not qlora's own, which looks for weights in 4 bits
                else:
                    method.attach(self.model)
            except ValueError as error:
                raise ConfigError(f"methods: {method_name(method)}: {error}") from error
        return adapted

    def _paged(self) -> bool:
        kind = self.recipe.train.optimizer
        return kind.endswith("8bit") or (kind == "auto" and self.gpu and any(method.paged_optimizer for method in self.recipe.build_methods()))


def _dtype(name: str, gpu: bool) -> torch.dtype:
    """What the run will compute in: `auto` is bfloat16 on any GPU that is worth a forecast."""
    return torch.bfloat16 if gpu and name == "auto" else resolve_dtype(name)


def _four_bits(weights: int) -> int:
    """Codes, the 8-bit scale of each block, and the fp32 scale of each block of those."""
    blocks = -(-weights // quant.BLOCK)
    return -(-weights // 2) + blocks + 4 * -(-blocks // quant.SCALE_BLOCK)


def _stored_bytes(module: nn.Module, kind: str) -> int:
    inputs, outputs = features(module)
    return inputs * outputs + 4 * outputs if kind == "int8" else _four_bits(inputs * outputs) + 4 * (256 + 16)


def _borrowed(weights: int, kind: str, dtype: torch.dtype) -> int:
    """What an operation on a quantised weight needs for the weight itself."""
    return int(weights * (4 + dtype.itemsize if kind == "int8" else dtype.itemsize + SCALES))


def state_bytes(parameter: torch.Tensor, paged: bool) -> int:
    """Of AdamW's two moments: in the parameter's dtype, or in 8 bits with a scale for each 256 where the parameter is large enough."""
    if not paged:
        return 2 * parameter.nbytes
    return 2 * parameter.numel() + 8 * -(-parameter.numel() // 256) if parameter.numel() >= 4096 else 8 * parameter.numel()
