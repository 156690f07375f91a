"""The GPU benchmarks rehearsed on a CPU with tiny shapes: their code runs, and no file calls a CPU's numbers a GPU's."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftkit import quant

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def module_of(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.gpu.{name}")


@pytest.mark.parametrize("name", ["adapters", "llama8b", "kernels"])
def test_no_file_of_a_cpu(module_of, name, tmp_path, monkeypatch):
    output = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="ran on cpu"):
        module_of(name).main(["--shape", "tiny", "--device", "cpu", "--output", str(output)])
    with pytest.raises(SystemExit, match="ran on cpu"):
        module_of("common").write(output, "cpu", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds none"):
        module_of(name).main([])
    assert not list(tmp_path.iterdir())


def test_every_variant_starts_at_the_same_loss(module_of):
    """One base, adapters that begin as nothing: whoever computes the loss, the first is the same, and training goes on."""
    llama8b = module_of("llama8b")
    found = {
        (who, dora, checkpointing): llama8b.measure("tiny", "cpu", who, dora, checkpointing, tokens=16, steps=1)
        for who, dora, checkpointing in [
            ("peftkit", False, False), ("peftkit", True, True), ("peftkit, own loss", False, True), ("peft", False, True), ("peft", True, False),
        ]
    }  # fmt: skip
    first = [row["first_loss"] for row in found.values()]
    assert max(first) - min(first) < 1e-4
    assert all(math.isfinite(row["last_loss"]) and row["last_loss"] < row["first_loss"] and row["median_seconds"] > 0 for row in found.values())
    assert found["peftkit", False, False]["trained"] == found["peft", False, True]["trained"]


def test_the_base_is_in_4_bits_and_loads_from_its_folder(module_of, tmp_path):
    llama8b = module_of("llama8b")
    base = llama8b.build_base("tiny", "cpu", torch.float32).eval()
    assert len(quant.quantized_modules(base)) == 2 * 7
    llama8b.save_base(base, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert len(quant.quantized_modules(loaded)) == 2 * 7
    quant.protect(base), quant.protect(loaded)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, base(input_ids=ids).logits)


def test_variants_run_in_processes_of_their_own(module_of, monkeypatch):
    llama8b = module_of("llama8b")
    spec = {"shape": "tiny", "device": "cpu", "who": "peftkit", "dora": True, "checkpointing": False, "tokens": 8, "steps": 1}
    row = llama8b.in_a_process(spec)
    assert row["last_loss"] > 0 and row["peak_bytes"] is None
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # a process that fails
    failed = llama8b.in_a_process(spec)
    assert failed["error"]
    llama8b.show([spec | row, spec | failed], "rehearsal")


def test_the_table(module_of, capsys):
    adapters = module_of("adapters")
    adapters.main(["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--only", "lora", "--who", "peftkit,peft"])
    assert "faster than peft" in capsys.readouterr().out


def test_the_kernels_one_by_one():
    """In the interpreter, in a process of its own."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--shape", "tiny", "--device", "cpu", "--ranks", "16"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kernel in ("compose", "compose backward", "norm, kept", "norm, taken anew"):
        assert kernel in done.stdout, kernel


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("gpu_*.json")), ids=lambda path: path.name)
def test_committed_results_are_of_a_gpu(path):
    content = json.loads(path.read_text())
    assert content["machine"]["gpu"] and content["commit"] and content["versions"]["torch"]
