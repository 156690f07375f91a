"""The Triton kernels without a GPU: interpreted against fp64 formulas, and compiled for GPUs that are not there.

Triton reads TRITON_INTERPRET once, at its import: each way has a process of its own, so neither touches other tests.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import kernel_checks as checks
import pytest
import torch

from peftkit.kernels import dora

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; it exists for Linux only")


def run_in_a_process(file: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(HERE / file)]
    found = subprocess.run(command, cwd=HERE.parent, env=os.environ | environment, capture_output=True, text=True)
    last = found.stdout.strip().splitlines()[-1] if found.stdout.strip() else ""
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r"\d+ passed", last) and "skipped" not in last, last


@needs_triton
def test_kernels_in_the_interpreter():
    run_in_a_process("triton_interpreted.py", TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_gpus():
    run_in_a_process("triton_compiled.py", TRITON_INTERPRET="0")


@pytest.mark.parametrize(("tokens", "outputs", "inputs", "r", "biased"), [(37, 19, 23, 5, True), (8, 64, 3, 1, False), (0, 9, 9, 3, True)])
def test_plain_torch_computes_the_same(tokens, outputs, inputs, r, biased):
    layer = checks.Layer("cpu", torch.float32, tokens, outputs, inputs, r, biased, 0)
    checks.check_compose(layer, dora)
    checks.check_compose_backward(layer, dora)
    checks.check_norm(layer, dora)


def test_nothing_on_a_cpu_imports_the_triton_kernels():
    code = """
import sys, torch
from peftkit.kernels import dora
y, h, a, b, m = torch.randn(3, 4), torch.randn(3, 2), torch.randn(2, 5), torch.randn(4, 2), torch.ones(4)
weight = torch.randn(4, 5)
memory = dora.norm_memory(weight, 2)
norm = dora.dora_norm(weight, weight.square().sum(1), a, b, 1.0, memory)
dora.compose_(y, h, b, 1.0, m, norm, None)
dora.compose_backward(y, y, m, norm, None, need_magnitude=True, need_bias=False)
print(memory, [name for name in sys.modules if name.startswith("peftkit.kernels.triton") or name == "triton"])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "None []"
