"""LoRA: Hu et al. 2021, arXiv 2106.09685; rank-stabilised scaling: Kalajdzievski 2023, arXiv 2312.03732."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from peftkit.layers import ADAPTER, AdapterLayer, Spec, find_targets, is_linear, layer_class, share_inputs, swap
from peftkit.methods.base import Handle, Method


class LoRA(Method):
    """Adds a trained low-rank product to frozen linears: y = x W^T + b + s x A^T B^T."""

    swaps_layers: ClassVar[bool] = True
    dora: ClassVar[bool] = False

    r: int = Field(8, gt=0)
    """Rank of the update."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the update only, in training."""
    target_modules: str | list[str] = "all-linear"
    """"all-linear" (all but the output head), a list of names or name endings, or one regular expression."""
    exclude_modules: str | list[str] | None = None
    """Names, name endings or one regular expression of linears to leave as they are."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def spec(self, name: str) -> Spec:
        """The update on the module `name`."""
        return Spec(self.r, self.scale, self.dropout, dora=self.dora)

    def attach(self, model: nn.Module, adapter: str = ADAPTER) -> Handle | None:
        for name, module in find_targets(model, self.target_modules, self.exclude_modules).items():
            if isinstance(module, AdapterLayer):
                module.add(adapter, self.spec(name))
                continue
            kind = layer_class(module)
            assert kind is not None
            layer = kind(module)
            layer.add(adapter, self.spec(name))
            swap(model, name, layer)
        share_inputs(model)
        return None

    def peft_config(self, targets: list[str], model: nn.Module) -> Any:
        """This method as peft's LoraConfig for the modules `targets`, whose names are shortened where that is exact."""
        from peft import LoraConfig, TaskType
        from transformers.pytorch_utils import Conv1D

        linears = [name for name, module in model.named_modules() if is_linear(module)] + targets
        endings = sorted({name.rsplit(".", 1)[-1] for name in targets})
        exact = {name for name in linears if name.rsplit(".", 1)[-1] in endings} == set(targets)
        causal = type(model).__name__.endswith("ForCausalLM")
        return LoraConfig(
            r=self.r,
            lora_alpha=int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,  # type: ignore[arg-type]  # peft's hint says int
            lora_dropout=self.dropout,
            target_modules=endings if exact else sorted(targets),
            use_rslora=self.rslora,
            use_dora=self.dora,
            fan_in_fan_out=any(isinstance(getattr(model.get_submodule(n), "base_layer", None), Conv1D) for n in targets),
            task_type=TaskType.CAUSAL_LM if causal else None,
            base_model_name_or_path=getattr(model, "name_or_path", None),
            inference_mode=True,
        )
