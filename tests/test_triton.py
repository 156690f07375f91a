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

import pytest

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


def test_nothing_on_a_cpu_imports_the_triton_kernels():
    """A DoRA layer and a step of it."""
    code = """
import sys, torch, peftkit
from peftkit.kernels import dora
y, h, b, g = torch.randn(3, 4), torch.randn(3, 2), torch.randn(4, 2), torch.ones(4)
dora.compose_(y.clone(), h, b, 1.0, g, None)
dora.compose_backward(y, y, g, g, None, need_magnitude=True, need_bias=False)
assert dora.norm_memory(torch.randn(4, 5), 2) is None
dora.dora_gain(torch.randn(4, 5), torch.ones(4), torch.randn(2, 5), b, g, 1.0, None)
print([name for name in sys.modules if name.startswith("peftkit.kernels.triton") or name == "triton"])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
