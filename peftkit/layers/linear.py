"""LoRA and DoRA for linears: nn.Linear, GPT-2's Conv1D, and bitsandbytes' 4-bit and 8-bit linears."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import quant
from peftkit.kernels import Gain, composed, dora_gain, dora_norm, fingerprint, gain_of, linear, norm_memory, shared_down
from peftkit.layers.base import ADAPTER, AdapterLayer, Factor, Spec, Trained, held, master_dtype, refuse_stacked_dora
from peftkit.layers.bias import bias_copy
from peftkit.layers.frozen import as_stored, compute_dtype, dense_weight, features, is_bare, is_linear, plain_linear, row_squares, weight_reader
from peftkit.layers.read import AdaptedWeight, address


class Start(nn.Module):
    """A (r, in) and B (out, r) that an initialisation takes off again, so that step 0 is the base: part of what the layer computes, and of its state."""

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.a: Tensor
        self.b: Tensor
        self.register_buffer("a", a.detach().clone())
        self.register_buffer("b", b.detach().clone())


class LoRALinear(AdapterLayer):
    """y = x W^T + b + s d(x) A^T B^T                                   (Hu et al. 2021, arXiv 2106.09685)
    y = g * (x W^T + s d(x) A^T B^T) + b,  g = m / |W + s B A|_row      (DoRA, Liu et al. 2024, arXiv 2402.09353)

    x (..., in), y (..., out), A (r, in) uniform, B (out, r) zero, m (out,); d is dropout, in training only. A, B and m are
    fp32 (fp64 on an fp64 base); products run in the dtype of the base's. m starts as the row norms of W, of the
    dequantised one on a quantised base; the norm is a constant for the gradient. With dropout, the dropped x enters the
    low-rank product only: DoRA's reference drops it in x W^T too, which would take a second product with the base.

    Several active LoRA adapters are one of the summed rank; DoRA, which scales whole rows, is active alone.
    """

    in_all_linear = True

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.lora_A, self.lora_B, self.lora_magnitude_vector = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.biases = nn.ModuleDict()  # trained in place of the base's own
        self.starts = nn.ModuleDict()
        self.shared: SharedInput | None = None
        self._squares: tuple[Any, Tensor, Any] | None = None
        self._gain: tuple[Any, Gain, Any] | None = None
        self._memory: tuple[Any, Any, Any] | None = None

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        return is_linear(module)

    def add(self, adapter: str, spec: Spec) -> None:
        inputs, outputs = features(self.base_layer)
        weight = self.base_layer.weight
        dtype = master_dtype(weight)
        bound = 1 / math.sqrt(inputs)
        self._registered(adapter, spec)
        # Drawn on the CPU: the same seed gives the same adapter on every device.
        a = torch.empty(spec.r, inputs, dtype=dtype).uniform_(-bound, bound)
        self.lora_A[adapter] = Factor(a.to(weight.device))
        self.lora_B[adapter] = Factor(torch.zeros(outputs, spec.r, dtype=dtype, device=weight.device))
        if spec.dora:
            self.lora_magnitude_vector[adapter] = Factor(self.squares().sqrt().to(dtype))
        if spec.bias and self.base_layer.bias is not None:
            self.biases[adapter] = bias_copy(self.base_layer)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        refuse_stacked_dora(self, adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def a(self, adapter: str = ADAPTER) -> nn.Parameter:
        return held(self, "lora_A", adapter)

    def b(self, adapter: str = ADAPTER) -> nn.Parameter:
        return held(self, "lora_B", adapter)

    def magnitude(self, adapter: str = ADAPTER) -> nn.Parameter:
        return held(self, "lora_magnitude_vector", adapter)

    def role_parameters(self, adapter: str = ADAPTER) -> list[Trained]:
        if adapter not in self.specs:
            return []
        found = [
            Trained("A", f"lora_A.{adapter}.weight", "lora_A.weight", self.a(adapter)),
            Trained("B", f"lora_B.{adapter}.weight", "lora_B.weight", self.b(adapter)),
        ]
        if self.specs[adapter].dora:
            found.append(Trained("magnitude", f"lora_magnitude_vector.{adapter}.weight", "lora_magnitude_vector", self.magnitude(adapter)))
        if adapter in self.biases:
            found.append(Trained("bias", f"biases.{adapter}.weight", "base_layer.bias", held(self, "biases", adapter)))
        return found

    def written(self, adapter: str) -> list[Trained]:
        a, b = self.plain_factors(adapter)
        plain: dict[str, Any] = {"A": a.detach(), "B": b.detach()}
        return [trained._replace(parameter=plain.get(trained.role, trained.parameter)) for trained in self.role_parameters(adapter)]

    # ---------------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self._modules["base_layer"]
        if not (self.enabled and self.active):
            return base(x)
        dtype = compute_dtype(base, x)
        if _needs_autograd(base):
            y = self._composed(x.to(dtype))
        elif self.shared is not None and self.training:
            through, h = self.shared.take(self, x, dtype)
            y = self._fused(base, through, self.factors(), h=h)
        else:
            factors = self.factors()
            y = self._fused(base, x.to(dtype), factors, a=factors[0], dropout=self.dropout())
        if self._modules["biases"] and (trained := self._trained_bias()) is not None:
            y = y + (trained - base.bias).to(y.dtype)
        return y if y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _trained_bias(self) -> Tensor | None:
        return next((held(self, "biases", adapter) for adapter in self.active if adapter in self.biases), None)

    def plain_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A and B of one adapter as an ordinary LoRA's; where a start is taken off, of rank 2 r.

        B A - B0 A0 = (B - B0) A + B0 (A - A0): at the start that is 0 to the bit, and half precision rounds what was learnt
        instead of the large start.
        """
        a, b = self.a(adapter), self.b(adapter)
        if adapter not in self.starts:
            return a, b
        start: Any = self.starts[adapter]
        start_a, start_b = start.a.to(a), start.b.to(b)
        return torch.cat([a, a - start_a]), torch.cat([b - start_b, start_b], 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the active adapters side by side, every scale but the first one's folded into B."""
        if len(self.active) == 1:
            return self.plain_factors(self.active[0])
        pairs = [self.plain_factors(adapter) for adapter in self.active]
        scales = [self.specs[adapter].scale / self.scale for adapter in self.active]
        return torch.cat([a for a, _ in pairs]), torch.cat([b * scale for (_, b), scale in zip(pairs, scales, strict=True)], 1)

    def low(self) -> Tensor:
        """A (r, in) of `factors` alone."""
        plain = len(self.active) == 1 and self.active[0] not in self.starts
        return self.a(self.active[0]) if plain else self.factors()[0]

    @property
    def scale(self) -> float:
        return self.specs[self.active[0]].scale

    @property
    def dora(self) -> bool:
        return self.specs[self.active[0]].dora

    def dropout(self) -> float:
        """The dropout of the active adapters, 0 outside training. Raises ValueError where stacked ones differ."""
        if not self.training:
            return 0.0
        rate = self.specs[self.active[0]].dropout
        if len(self.active) > 1 and any(self.specs[adapter].dropout != rate for adapter in self.active):
            raise ValueError(f"stacked adapters train with one dropout, and {', '.join(self.active)} have several")
        return rate

    def _fused(self, base: Any, x: Tensor, factors: tuple[Tensor, Tensor], **product: Any) -> Tensor:
        b = factors[1]
        weight = weight_reader(base)
        if not self.dora:
            return linear(x, b, frozen=base, weight=weight, scale=self.scale, bias=base.bias, training=self.training, **product)
        dense, m = weight(x.dtype).detach(), self.magnitude(self.active[0])
        return linear(
            x, b, frozen=lambda x: F.linear(x, dense), weight=weight, scale=self.scale, magnitude=m, bias=base.bias,
            norm=lambda: self.gain(dense, factors, m) if m.device.type == "cpu" else self.norm(dense, factors), training=self.training, **product,
        )  # fmt: skip

    def _composed(self, x: Tensor) -> Tensor:
        a, b = self.factors()
        if not self.dora:
            return composed(x, a, b, frozen=self.base_layer, scale=self.scale, dropout=self.dropout())
        base = self.base_layer
        weight = dense_weight(base, x.dtype)
        with torch.no_grad():
            norm = dora_norm(weight, row_squares(dense_weight(base)), a, b, self.scale)

        def frozen(x: Tensor) -> Tensor:
            if is_bare(base):
                return F.linear(x, weight)
            return base(x) if base.bias is None else base(x) - base.bias

        return composed(
            x, a, b, frozen=frozen, scale=self.scale, dropout=self.dropout(), magnitude=self.magnitude(self.active[0]), bias=base.bias, norm=norm,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ DoRA's norm

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        self.forget_norm()  # what is moved to another dtype and back may come to lie where it lay before, rounded
        return super()._apply(fn, recurse)

    def forget_norm(self) -> None:
        """Has DoRA's norm taken anew by the next forward."""
        self._squares = self._gain = self._memory = None

    def _base_key(self) -> tuple[Any, ...]:
        """Changes where the frozen weight is replaced or written to."""
        weight = self.base_layer.weight
        return address(weight), weight._version, weight.device

    def _hold(self) -> Tensor:
        """The data of the frozen weight, kept beside what was taken of it: no other weight can come to lie at its address then."""
        return self.base_layer.weight.data

    def squares(self) -> Tensor:
        """|W|^2 by row (out,), fp32 at least; kept while the frozen weight stays, and in training only."""
        key = self._base_key()
        if self._squares is None or self._squares[0] != key:
            self._squares = (key, row_squares(dense_weight(self.base_layer)).to(master_dtype(self.base_layer.weight)), self._hold())
        return self._squares[1]

    @torch.no_grad()
    def norm(self, weight: Tensor, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """|W + s B A| by row (out,) of the active adapter; `weight` is W (out, in) in any precision.

        On a GPU it is kept for as long as the bits of A and B stay: Triton reads them and chooses, so that the host need not wait.
        """
        a, b = factors or self.factors()
        memory = None
        if a.device.type != "cpu":
            key = (self._base_key(), self.scale, weight.dtype, a.shape[0])
            if self._memory is None or self._memory[0] != key:
                self._memory = (key, norm_memory(weight, a.shape[0]), self._hold())
            memory = self._memory[1]
        return dora_norm(weight, self.squares(), a, b, self.scale, memory)

    @torch.no_grad()
    def gain(self, weight: Tensor, factors: tuple[Tensor, Tensor], magnitude: Tensor) -> Gain:
        """What a CPU scales outputs in the dtype of `weight` by, which is W (out, in).

        It is kept for as long as the bits of A, B and m stay, which are read for it: fused optimizers, bitsandbytes and `.data` write without a trace.
        """
        key = (self._base_key(), self.scale, weight.dtype, factors[0].dtype, fingerprint(*factors, magnitude))
        if self._gain is None or self._gain[0] != key:
            self._gain = (key, dora_gain(magnitude, weight, self.squares(), *factors, self.scale), self._hold())
            if not self.training:  # the next norm is far off
                self._squares = None
        return self._gain[1]

    # ----------------------------------------------------------------------------------------------------------- merging

    @property
    def weight(self) -> Tensor:
        """What a model gets that reads the weight instead of calling the layer: arithmetic with it is arithmetic with W + s B A."""
        base = self.base_layer
        if not (self.enabled and self.active) or quant.is_quantized(base):
            return base.weight
        return self._stored() if torch.compiler.is_compiling() else AdaptedWeight.of(base.weight, self._stored)

    @property
    def bias(self) -> Tensor | None:
        """What a model gets that reads the bias: the trained one, where one trains."""
        stored, trained = self.base_layer.bias, self._trained_bias() if self.enabled else None
        return stored if trained is None else trained.to(stored.dtype)

    def _stored(self) -> Tensor:
        return as_stored(self.base_layer, self._adapted(dense_weight(self.base_layer)))

    def delta(self) -> Tensor:
        """s B A (out, in) of the active adapters, fp32 at least: trl's SFTTrainer makes the masters bf16 on a quantised base."""
        a, b = self.factors()
        dtype = torch.promote_types(a.dtype, torch.float32)
        return self.scale * (b.to(dtype) @ a.to(dtype))

    @torch.no_grad()
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        weight = dense_weight(self.base_layer) if weight is None else weight
        return self._adapted(weight) if self.active else weight

    def _adapted(self, weight: Tensor) -> Tensor:
        delta = self.delta()
        exact = weight.to(delta.dtype)
        total = exact + delta
        if self.dora:
            with torch.no_grad():
                norm = dora_norm(exact, row_squares(exact), *self.factors(), self.scale)
            total = total * gain_of(self.magnitude(self.active[0]), norm)[:, None]
        return total.to(weight.dtype)

    def merged(self, weight: Tensor | None = None) -> nn.Module:
        plain: Any = plain_linear(self.base_layer, self.merged_weight(weight))
        if (trained := self._trained_bias()) is not None:
            plain.bias = nn.Parameter(trained.detach().to(plain.bias.dtype, copy=True), requires_grad=False)
        return plain


def _needs_autograd(base: Any) -> bool:
    """Whether the fused nodes cannot serve: under torch.compile, jit.trace and torch.func, where the base weight trains itself, or does more than a product."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    return transformed or base.weight.requires_grad or not is_bare(base)


class _Taken(NamedTuple):
    """A product that was taken with one x, and what of it has not been asked for yet."""

    source: weakref.ref[Tensor]
    state: tuple[Any, ...]
    through: Tensor
    products: dict[int, tuple[list[tuple[int, int]], Tensor]]
    """By layer: the state of its A and h."""


class _Last:
    """What one thread has taken last. What a forward that broke off has left goes with the next one."""

    threads: ClassVar[threading.local] = threading.local()
    taken: _Taken | None = None

    @classmethod
    def here(cls) -> _Last:
        """That of the calling thread."""
        found = getattr(cls.threads, "last", None)
        if found is None:
            found = cls.threads.last = cls()
        return found

    def forget(self) -> None:
        self.taken = None


class SharedInput:
    """Layers that are given the same tensor (q, k, v; gate, up): their A's are multiplied with it in one product.

    The first layer that is called with a tensor takes the product for all; each other takes its part when it is called
    with the same tensor. Layers that turn out to be given another one cost a product that is not used, no more.
    """

    def __init__(self, layers: Sequence[LoRALinear]):
        self.layers = list(layers)

    def take(self, layer: LoRALinear, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(x to go on with, h (tokens, r)) for one of the layers, x in `dtype`."""
        last = _Last.here()
        taken, state = last.taken, (dtype, _version(x), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if taken is not None and taken.source() is x and taken.state == state:
            found = taken.products.pop(id(layer), None)
            if not taken.products:
                last.forget()
            if found is not None and found[0] == _state_of_a(layer):
                return taken.through, found[1]
        return self._multiply(layer, x, state, last)

    def _multiply(self, layer: LoRALinear, x: Tensor, state: tuple[Any, ...], last: _Last) -> tuple[Tensor, Tensor]:
        dropout = layer.dropout()
        together = [layer]
        if any(other is layer for other in self.layers):  # else it is a copy, such as a replica on another device
            together += [o for o in self.layers if o is not layer and o.enabled and o.training and o.active and o.dropout() == dropout]
        # What follows a backward may be an optimizer step, so nothing stays beyond it. Backward may run in another thread, as on a GPU.
        through, (h, *others) = shared_down(x.to(state[0]), [other.low() for other in together], dropout, after=last.forget)
        products = {id(other): (_state_of_a(other), product) for other, product in zip(together[1:], others, strict=True)}
        last.taken = _Taken(weakref.ref(x), state, through, products) if products else None
        return through, h


def _state_of_a(layer: LoRALinear) -> list[tuple[int, int]]:
    return [(id(a), _version(a)) for a in map(layer.a, layer.active)]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("query_proj", "key_proj", "value_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"),
)  # fmt: skip
_CROSS = {"EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention"}  # q sees the decoder, k and v the encoder


def share_inputs(model: nn.Module) -> None:
    """Lets adapter layers that stand beside each other under names known for one input share the product with it."""
    for name, parent in model.named_modules():
        for names in SIBLINGS:
            names = names[1:] if len(names) == 3 and not _CROSS.isdisjoint(name.split(".")) else names
            layers = [layer for child in names if isinstance(layer := getattr(parent, child, None), LoRALinear)]
            for width in {features(layer.base_layer)[0] for layer in layers}:
                alike = [layer for layer in layers if features(layer.base_layer)[0] == width]
                shared = SharedInput(alike) if len(alike) > 1 else None
                for layer in alike:
                    layer.shared = shared
