"""What the kernels must compute, written out in fp64: in plain torch, in Triton's interpreter and on GPUs by the same lines.

`kernels` is the module with the functions of peftkit.kernels.dora: that one or triton_dora.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkit.kernels.dropout import Dropout

EPS = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # two to four roundings of one number


def close(got: Tensor, want: Tensor, dtype: torch.dtype, size: float | Tensor = 0.0) -> None:
    """Equal up to the rounding of `dtype`, of `want` itself and of what was summed to it, `size` in all."""
    bound = EPS[dtype] * (want.abs() + size) + torch.finfo(dtype).smallest_normal * EPS[dtype] + 1e-12
    worst = ((got.double() - want).abs() / bound).max().item() if want.numel() else 0.0
    assert worst <= 1, f"off by {worst:.2f} times the rounding of {dtype}"


@dataclass
class Layer:
    """A random layer: zero rows in W, B and m, so that norms and magnitudes vanish where they can."""

    device: str
    dtype: torch.dtype
    tokens: int
    outputs: int
    inputs: int
    r: int
    biased: bool
    seed: int
    scale: float = 1.5

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.x, self.y, self.grad = (self.random(self.tokens, n) for n in (self.inputs, self.outputs, self.outputs))
        self.weight = self.random(self.outputs, self.inputs)
        self.h = self.random(self.tokens, 3 * self.r)[:, self.r : 2 * self.r]  # one of three that share a product: not contiguous
        self.a, self.b = self.random(self.r, self.inputs, wide=True), self.random(self.outputs, self.r, wide=True)
        self.magnitude = self.random(self.outputs, wide=True).abs() + 0.1
        self.norm = self.random(self.outputs, wide=True).abs() + 0.1
        self.bias = self.random(self.outputs) if self.biased else None
        if self.device == "cpu":  # Triton's interpreter cuts bf16 off where torch and GPUs round: leave it nothing to round
            self.a, self.b = self.a.to(self.dtype).float(), self.b.to(self.dtype).float()
        self.weight[::3] = 0
        self.b[::6] = 0
        self.magnitude[::4] = 0
        self.norm[::8] = 0
        self.squares = self.weight.double().square().sum(1).float()

    def random(self, *shape: int, wide: bool = False) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, torch.float32 if wide else self.dtype)

    def low(self, factor: Tensor) -> Tensor:
        """A factor as it enters products: rounded to the dtype of x."""
        return factor.to(self.dtype).double()

    @property
    def gain(self) -> Tensor:
        return torch.where(self.norm == 0, 1, self.magnitude.double() / self.norm)

    @property
    def shift(self) -> Tensor | float:
        return 0.0 if self.bias is None else self.bias.double()


def check_compose(layer: Layer, kernels: Any) -> None:
    y = layer.y.clone()
    update = layer.scale * layer.h.double() @ layer.low(layer.b).T
    want = layer.gain * (layer.y.double() + update) + layer.shift
    size = layer.gain * (layer.y.double().abs() + layer.scale * layer.h.double().abs() @ layer.low(layer.b).abs().T)
    got = kernels.compose_(y, layer.h, layer.b, layer.scale, layer.magnitude, layer.norm, layer.bias)
    assert got is y
    close(y, want, layer.dtype, size=EPS[torch.float32] / EPS[layer.dtype] * size)


def check_compose_backward(layer: Layer, kernels: Any) -> None:
    scaled, grad_magnitude, grad_bias = kernels.compose_backward(
        layer.grad, layer.y, layer.magnitude, layer.norm, layer.bias, need_magnitude=True, need_bias=layer.biased
    )
    g = layer.grad.double()
    close(scaled, g * layer.gain, layer.dtype)
    terms = g * (layer.y.double() - layer.shift)
    m = layer.magnitude.double()
    want = torch.where(m == 0, 0, terms.sum(0) / m)
    assert grad_magnitude is not None
    close(grad_magnitude, want, torch.float32, size=torch.where(m == 0, 0, 4 * terms.abs().sum(0) / m))
    if layer.biased:
        assert grad_bias is not None
        close(grad_bias, g.sum(0), layer.dtype, size=EPS[torch.float32] / EPS[layer.dtype] * 4 * g.abs().sum(0))
    # The same once more, bit for bit; and nothing where nothing is asked for.
    again = kernels.compose_backward(layer.grad, layer.y, layer.magnitude, layer.norm, layer.bias, need_magnitude=True, need_bias=layer.biased)
    assert torch.equal(again[0], scaled) and torch.equal(again[1], grad_magnitude)
    alone = kernels.compose_backward(layer.grad, None, layer.magnitude, layer.norm, None, need_magnitude=False, need_bias=False)
    assert torch.equal(alone[0], scaled) and alone[1:] == (None, None)


def check_norm(layer: Layer, kernels: Any) -> None:
    """Against the norm of the built sum. The products with W round A, so their part is exact for the rounded A."""
    w, b, s = layer.weight.double(), layer.b.double(), layer.scale
    cross, gram = w @ layer.low(layer.a).T, layer.a.double() @ layer.a.double().T
    squares = w.square().sum(1) + (b * (2 * s * cross + s * s * b @ gram)).sum(1)
    size = w.square().sum(1) + (b.abs() * (2 * s * w.abs() @ layer.low(layer.a).abs().T + s * s * b.abs() @ gram.abs())).sum(1)
    if layer.dtype == torch.float32:
        built = (w + s * b @ layer.a.double()).square().sum(1)
        torch.testing.assert_close(squares, built)
    memory = kernels.norm_memory(layer.weight, layer.r)
    norm = kernels.dora_norm(layer.weight, layer.squares, layer.a, layer.b, s, memory)
    close(norm.double().square(), squares, torch.float32, size=16 * size)
    assert not norm[::6].any()  # rows of zeros
    transposed = layer.weight.T.contiguous().T  # a Conv1D's weight
    fresh = kernels.norm_memory(layer.weight, layer.r)
    torch.testing.assert_close(kernels.dora_norm(transposed, layer.squares, layer.a, layer.b, s, fresh), norm)


def check_nan(layer: Layer, kernels: Any) -> None:
    """A factor that holds a NaN gives norms that say so: `maximum` of a GPU would turn it into 0."""
    layer.a[0, -1] = float("nan")
    norm = kernels.dora_norm(layer.weight, layer.squares, layer.a, layer.b, layer.scale, kernels.norm_memory(layer.weight, layer.r))
    assert norm.isnan().all()


def check_memory(layer: Layer, kernels: Any) -> None:
    """The norm is reused exactly while A and B keep their bits, and each single element of them counts."""
    memory = kernels.norm_memory(layer.weight, layer.r)

    def norm(weight: Tensor) -> Tensor:
        return kernels.dora_norm(weight, layer.squares, layer.a, layer.b, layer.scale, memory)

    first = norm(layer.weight)
    before = first.clone()
    poisoned = torch.full_like(layer.weight, float("nan"))
    assert torch.equal(norm(poisoned), first)  # W was not read: the norm is the old one
    for factor in (layer.a, layer.b):
        for place in {0, factor.numel() - 1}:
            bits = factor.data.view(-1).view(torch.int32)  # a write that leaves no trace on the tensor
            bits[place] ^= 1  # the last bit of one element
            assert norm(poisoned).isnan().any(), "a changed factor must be seen"
            bits[place] ^= 1
            norm(layer.weight)
    assert torch.equal(norm(poisoned), before) and torch.equal(first, before)  # what was handed out is never written to
    last = min(layer.a.numel(), layer.b.numel()) - 1
    swapped = layer.a.view(-1)[last].item(), layer.b.view(-1)[last].item()
    assert swapped[0] != swapped[1]
    layer.b.view(-1)[last], layer.a.view(-1)[last] = swapped  # the same elements in the other factor
    assert norm(poisoned).isnan().any()
    norm(layer.weight)
    if layer.r > 1 and not torch.equal(layer.a[0], layer.a[-1]):
        layer.a[[0, -1]] = layer.a[[-1, 0]]  # the same elements at other places
        assert norm(poisoned).isnan().any()


def check_dropout(device: str, dtype: torch.dtype, size: int, p: float = 0.3) -> None:
    """The zeros of one seed are the same in a copy, in place and added to something; they have their rate, and no pattern."""
    ones = torch.ones(size, dtype=dtype, device=device)
    drop = Dropout(p, 2**61 + 5, None)
    dropped = drop(ones)
    assert dropped.dtype == dtype and set(dropped.unique().tolist()) <= {0.0, 1.0} and ones.all()
    assert torch.equal(drop.zero_(ones.clone()), dropped)
    y = torch.randn(size, device=device).to(dtype)
    added = drop.add_to_(y.clone(), ones * 3)
    close(added, y.double() + 3 * dropped.double(), dtype, size=3.0)
    assert torch.equal(added[dropped == 0], y[dropped == 0])
    together = y.clone()
    assert torch.equal(drop.of_both(ones, together, ones * 3), dropped) and torch.equal(together, added), "both at once"
    zeros = (dropped == 0).double()
    if size > 1000:
        for shift in (1, 2, 1024, 2048, 4096):  # neighbours, and what one draw of Philox gives
            rest = size - shift
            both = (zeros[shift:] * zeros[:-shift]).sum().item()
            assert abs(both - p * p * rest) <= 5 * (p * p * rest) ** 0.5, shift
        assert abs(zeros.sum().item() - p * size) <= 5 * (p * (1 - p) * size) ** 0.5
        assert not torch.equal(Dropout(p, 2**61 + 6, None)(ones), dropped)
