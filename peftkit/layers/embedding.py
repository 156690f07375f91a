"""LoRA and DoRA for embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from peftkit.kernels import dora_norm, gain_of
from peftkit.layers.base import ADAPTER, AdapterLayer, Factor, Spec, Trained, held, master_dtype, refuse_stacked_dora
from peftkit.layers.read import address


class LoRAEmbedding(AdapterLayer):
    """y = E[i] + s A^T[i] B^T                                          (Hu et al. 2021, arXiv 2106.09685)
    y = g * (E[i] + s A^T[i] B^T),  g = m / |E + s A^T B^T|_column      (DoRA: an embedding is a linear of one-hot rows)

    i (...) token ids, E (V, d), A (r, V) zero, B (d, r) normal, m (d,), y (..., d). The zero matrix is A here, as in peft's
    files. Both have the role "embedding": B is of size 1 rather than 1/sqrt(d), so a step of A moves the output by about
    sqrt(r) times the learning rate already, and LoRA+ must not raise it further.

    Embeddings that scale their output (`embed_scale`) scale the update with it; any other arithmetic of their own runs on
    the whole adapted matrix, which costs V x d in every forward. Dropout, which has no meaning for an id, is not applied.
    Several active LoRA adapters are summed; DoRA is active alone. Raises ValueError for an embedding that is quantised
    or changes its weights in forward (`max_norm`).
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self._squares: tuple[Any, Tensor, Any] | None = None

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def add(self, adapter: str, spec: Spec) -> None:
        refuse_embedding(self.base_layer)
        weight = self.base_layer.weight
        dtype = master_dtype(weight)
        self._registered(adapter, spec)
        rows, width = weight.shape
        # Drawn on the CPU: the same seed gives the same adapter on every device.
        self.lora_embedding_A[adapter] = nn.Parameter(torch.zeros(spec.r, rows, dtype=dtype, device=weight.device))
        self.lora_embedding_B[adapter] = nn.Parameter(torch.randn(width, spec.r, dtype=dtype).to(weight.device))
        if spec.dora:
            self.lora_magnitude_vector[adapter] = Factor(self.squares().sqrt().to(dtype))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        refuse_stacked_dora(self, adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def role_parameters(self, adapter: str = ADAPTER) -> list[Trained]:
        if adapter not in self.specs:
            return []
        found = [
            Trained("embedding", f"lora_embedding_{side}.{adapter}", f"lora_embedding_{side}", factors[adapter])
            for side, factors in (("A", self.lora_embedding_A), ("B", self.lora_embedding_B))
        ]
        if self.specs[adapter].dora:
            found.append(Trained("magnitude", f"lora_magnitude_vector.{adapter}.weight", "lora_magnitude_vector", held(self, "lora_magnitude_vector", adapter)))
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if not (self.enabled and self.active):
            return base(*args, **kwargs)
        scale = row_scale(base)
        if scale is None:
            return functional_call(base, {"weight": self._adapted(base.weight).to(base.weight.dtype)}, args, kwargs)
        y = base(*args, **kwargs)  # (..., d)
        ids = args[0] if args else next(iter(kwargs.values()))
        adapted = y + scale * sum(self._rows(adapter, ids) for adapter in self.active)
        if self._dora:
            adapted = adapted * self._gain()
        return adapted.to(y.dtype)

    def _rows(self, adapter: str, ids: Tensor) -> Tensor:
        """s A^T[i] B^T (..., d). The padding row is as frozen as it is in an embedding that trains."""
        base, a, b = self.base_layer, self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        h = F.embedding(ids, a.T, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)  # (..., r)
        return self.specs[adapter].scale * (h @ b.T)

    def _adapted(self, weight: Tensor) -> Tensor:
        """The whole matrix (V, d) with the active updates, in the dtype of the factors."""
        total = weight
        for adapter in self.active:
            a, b = self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
            total = total + self.specs[adapter].scale * (a.T @ b.T)
        return total * self._gain(weight) if self._dora else total

    @property
    def _dora(self) -> bool:
        return bool(self.active) and self.specs[self.active[0]].dora

    def squares(self) -> Tensor:
        """|E|^2 by column (d,), fp32 at least; taken anew where the weight was replaced or written to."""
        weight = self.base_layer.weight
        if torch.compiler.is_compiling():  # addresses mean nothing there
            return _column_squares(weight)
        key = (address(weight), weight._version, weight.device)
        if self._squares is None or self._squares[0] != key:
            self._squares = (key, _column_squares(weight), weight.data)  # held, so that no other weight comes to lie there
        return self._squares[1]

    def _gain(self, weight: Tensor | None = None) -> Tensor:
        """g (d,) of the active DoRA adapter. The norm is a constant for the gradient."""
        [adapter] = self.active
        squares = self.squares() if weight is None else _column_squares(weight)
        weight = self.base_layer.weight if weight is None else weight
        a, b = self.lora_embedding_A[adapter].detach(), self.lora_embedding_B[adapter].detach()
        norm = dora_norm(weight.detach().T, squares, a, b, self.specs[adapter].scale)
        return gain_of(held(self, "lora_magnitude_vector", adapter), norm)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        weight = self.base_layer.weight if weight is None else weight
        return self._adapted(weight).to(weight.dtype)

    def merged(self, weight: Tensor | None = None) -> nn.Module:
        """The embedding with a new weight. A head that shared the old one keeps it: it was not adapted."""
        self.base_layer.weight = nn.Parameter(self.merged_weight(weight), requires_grad=False)
        return self.base_layer


def _column_squares(weight: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(weight.detach(), dim=0, dtype=torch.float64)
    return norm.square_().to(master_dtype(weight))


def row_scale(embedding: Any) -> float | Tensor | None:
    """What a looked-up row is multiplied with: 1, or an `embed_scale`. None where the module does something else with it."""
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    if len(list(embedding.parameters())) > 1:  # T5Gemma 2 puts a row of its own in after scaling
        return None
    scale = getattr(embedding, "embed_scale", None)
    return scale.to(embedding.weight.dtype) if isinstance(scale, Tensor) else scale


def refuse_embedding(embedding: Any) -> None:
    """Raises ValueError where rows of this embedding cannot be adapted."""
    if not embedding.weight.is_floating_point():
        raise ValueError(f"{type(embedding).__name__}: a quantised embedding cannot be adapted; leave it unquantised (llm_int8_skip_modules)")
    if embedding.max_norm is not None:
        raise ValueError("an embedding with max_norm rewrites its own weights in forward, so it cannot stay frozen; make it one without max_norm")
