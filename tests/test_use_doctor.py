"""`peftkit doctor`: what it tells is so, and what is broken gives exit code 1."""

from __future__ import annotations

import json
import re

import pytest
import torch

from peftkit import doctor as doctoring
from peftkit import quant
from peftkit.cli import main
from peftkit.doctor import Diagnosis, Finding, doctor


@pytest.fixture(scope="module")
def healthy() -> Diagnosis:
    return doctor()


def named(found: Diagnosis, name: str) -> Finding:
    [each] = [each for each in found.findings if each.name == name]
    return each


def test_this_machine(healthy):
    assert healthy.ok, [each for each in healthy.findings if each.state == "broken"]
    assert named(healthy, "torch").told.startswith(torch.__version__.split("+")[0]) and named(healthy, "torch").state == "ok"
    assert named(healthy, "nf4").told.startswith("42 linears") and str(torch.get_num_threads()) in named(healthy, "CPU").told
    assert ("AVX512-BF16" in named(healthy, "4-bit weights after evaluation").told) == quant.repacks_on_cpu()
    for each in healthy.findings:
        assert each.state in ("ok", "note", "warning") and each.told


def test_every_requirement_is_looked_at(healthy):
    names = {re.split(r"[><=\[]", line)[0] for line in doctoring.tested_ranges()}
    assert {"torch", "transformers", "peft", "bitsandbytes"} < names <= {each.name for each in healthy.findings}


def test_versions_outside_what_was_tested_and_missing_ones(monkeypatch):
    monkeypatch.setattr(doctoring, "tested_ranges", lambda: ["torch>=99,<100", "no-such-package>=1", "peft>=0.1; python_version < '3'"])
    found = {name: (state, told, remedy) for name, state, told, remedy in doctoring._versions()}
    assert found["torch"][0] == "warning" and "outside what was tested" in found["torch"][1] and 'pip install "torch<100,>=99"' in found["torch"][2]
    assert found["no-such-package"] == ("broken", "not installed", 'pip install "no-such-package>=1"')
    assert "peft" not in found


def test_weights_that_evaluation_rewrites_are_found(monkeypatch):
    """The trap of bitsandbytes on CPUs with AVX512-BF16, made here by hand so that it shows on every machine."""
    load = doctoring.load

    def trapped(*args, **kwargs):
        model, tokenizer = load(*args, **kwargs)
        module = next(iter(quant.quantized_modules(model).values()))

        def rewrite(layer, inputs, output) -> None:
            layer.weight.data.bitwise_xor_(0x11)

        module.register_forward_hook(rewrite)
        return model, tokenizer

    monkeypatch.setattr(doctoring, "load", trapped)
    monkeypatch.setattr(doctoring, "AREAS", {"4 bits": doctoring._four_bits})
    found = doctor()
    assert not found.ok and named(found, "4-bit weights after evaluation").state == "broken"


def test_what_raises_is_broken_and_the_rest_is_looked_at(monkeypatch):
    def bursts():
        raise ImportError("libcudart.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(doctoring, "AREAS", {"4 bits": bursts, "extras": doctoring._extras})
    found = doctor()
    assert not found.ok and named(found, "4 bits").told == "ImportError: libcudart.so.13: cannot open shared object file"
    assert named(found, "lm_eval")


def test_extras_and_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(doctoring, "find_spec", lambda name: None)
    found = {name: (state, told, remedy) for name, state, told, remedy in doctoring._extras()}
    assert found["sacrebleu"] == ("note", "not installed, for bleu of eval.metrics", 'pip install "peftkit[text]"')
    if not torch.cuda.is_available():
        monkeypatch.setattr(doctoring.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
        gpu = next(found for found in doctoring._device() if found[0] == "GPU")
        assert gpu[1] == "warning" and "torch" in gpu[2] and "does not see it" in gpu[2]


@pytest.mark.parametrize("broken", [False, True])
def test_the_command(broken, monkeypatch, capsys):
    def look():
        yield "a part", "broken" if broken else "ok", "told", 'pip install "peftkit[text]"'

    monkeypatch.setattr(doctoring, "AREAS", {"area": look})
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            main(["doctor", *arguments])
        out = capsys.readouterr().out
        assert (stopped.value.code or 0) == broken
        assert arguments or 'told. To do: pip install "peftkit[text]"' in out
        assert json.loads(out)["ok"] is not broken if arguments else ("broken: a part" in out) is broken
