"""The Triton kernels through the compiler to machine code for GPUs that need not be there. test_triton.py runs this file in a process of its own.

The interpreter knows nothing of what a compiler refuses: types that do not join, products of wrong shapes, tiles beyond
the shared memory. The driver below is asked for a GPU's properties, compiles, and launches nothing.
"""

from __future__ import annotations

from typing import Any

import kernel_checks as checks
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from peftkit.kernels import triton_dora, triton_dropout

SHARED_MEMORY = {89: 99 * 1024, 90: 227 * 1024}  # bytes per block: RTX 4090 and L4; H100


class CompileOnly:
    """A Triton driver for a GPU of one compute capability. `compiled` names what reached machine code."""

    def __init__(self, capability: int):
        self.capability, self.compiled = capability, set[str]()
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.capability]}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        assert len(kernel) > 1000
        self.compiled.add(name)
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads a block may have

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


@pytest.mark.parametrize(("capability", "dtype", "r"), [(89, torch.float32, 16), (90, torch.bfloat16, 64)], ids=["4090", "H100"])
def test_every_kernel_compiles(capability, dtype, r, monkeypatch, tmp_path):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))  # nothing is taken from an earlier run
    driver = CompileOnly(capability)
    triton.runtime.driver.set_active(driver)
    layer = checks.Layer("cpu", dtype, 64, 256, 512, r, True, 0)
    triton_dora.compose_(layer.y, layer.h, layer.b, 2.0, layer.magnitude, layer.norm, layer.bias)
    triton_dora.compose_backward(layer.grad, layer.y, layer.magnitude, layer.norm, layer.bias, need_magnitude=True, need_bias=True)
    memory = triton_dora.norm_memory(layer.weight, r)
    triton_dora.dora_norm(layer.weight, layer.squares, layer.a, layer.b, 2.0, memory)
    triton_dropout.drop(layer.y, 0.1, 2**61 + 5)
    triton_dropout.drop_and_add_(layer.y, layer.y.clone(), layer.y, 0.1, 2**61 + 5)
    assert driver.compiled == {"_compose", "_compose_backward", "_finish", "_survey", "_norm", "_drop"}
