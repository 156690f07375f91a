"""The Triton kernels in Triton's interpreter, on a CPU. test_triton.py runs this file in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import functools

import kernel_checks as checks
import pytest
import torch
import triton
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from peftkit.kernels import dora, dropout, linear, triton_dora

assert triton.knobs.runtime.interpret, "run this through test_triton.py"

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
layers = st.builds(
    checks.Layer,
    device=st.just("cpu"), dtype=st.sampled_from(DTYPES), tokens=st.integers(0, 90), outputs=st.integers(1, 140), inputs=st.integers(1, 150),
    r=st.integers(1, 64), biased=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
examples = settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking would take minutes


@examples
@given(layers)
def test_compose(layer):
    checks.check_compose(layer, triton_dora)


@examples
@given(layers)
def test_compose_backward(layer):
    checks.check_compose_backward(layer, triton_dora)


def test_the_sums_over_many_tokens_are_split():
    """More tokens than one program takes, in parts of different lengths."""
    checks.check_compose_backward(checks.Layer("cpu", torch.float32, 321, 3, 2, 1, True, 0), triton_dora)


@examples
@given(layers)
def test_norm(layer):
    checks.check_norm(layer, triton_dora)


@pytest.mark.parametrize(("dtype", "outputs", "inputs", "r"), [(torch.float32, 37, 140, 1), (torch.float16, 130, 21, 5), (torch.bfloat16, 6, 1, 64)])
def test_memory_of_the_norm(dtype, outputs, inputs, r):
    checks.check_memory(checks.Layer("cpu", dtype, 1, outputs, inputs, r, False, 0), triton_dora)


def test_a_norm_of_nan_is_nan():
    checks.check_nan(checks.Layer("cpu", torch.float32, 1, 37, 21, 5, False, 0), triton_dora)


@pytest.mark.parametrize("biased", [False, True])
def test_a_dora_layer_forward_and_backward(monkeypatch, biased):
    """The node of the layers, once in plain torch and once with the kernels in it."""
    layer = checks.Layer("cpu", torch.float32, 20, 33, 17, 3, biased, 0)
    found = []
    for fused in (False, True):
        monkeypatch.setattr(dora, "triton_serves", lambda x, r, fused=fused: fused)
        trained = [tensor.clone().requires_grad_() for tensor in (layer.x, layer.a, layer.b, layer.magnitude, *([layer.bias] if biased else []))]
        x, a, b, magnitude, *bias = trained
        norm = functools.partial(dora.dora_norm, layer.weight, layer.squares, a.detach(), b.detach(), 2.0, dora.norm_memory(layer.weight, 3))
        y = linear(
            x, b, frozen=lambda flat: flat @ layer.weight.T, weight=lambda dtype: layer.weight, scale=2.0, a=a, magnitude=magnitude,
            bias=bias[0] if bias else None, norm=norm,
        )  # fmt: skip
        y.backward(layer.grad)
        found.append([y, *(tensor.grad for tensor in trained)])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 4097, 20_000])
def test_dropout(monkeypatch, dtype, size):
    monkeypatch.setattr(dropout, "triton_serves", lambda x, r: True)
    checks.check_dropout("cpu", dtype, size)
