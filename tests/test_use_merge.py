"""`peftkit merge` of one adapter: three bases, each verified, and nothing written that is not what was in memory.

Rows 1 and 2 of the table of silent failures: the merged model is not the trained one; the files differ from the model in memory.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkit as pk
from peftkit.checkpoint import CheckpointError
from peftkit.cli import main
from peftkit.config import ConfigError
from peftkit.fold import FoldReport
from peftkit.fold import fold as fold_as_the_machine_likes
from peftkit.layers import adapter_layers, dense_weight
from peftkit.merge import MergeError, compare_logits
from peftkit.save_model import logits_of

fold = functools.partial(fold_as_the_machine_likes, dtype="float32")


def trained(tmp_path, method=pk.LoRA, quantize="nf4", **options):
    """The model with an adapter that does something, and the adapter's folder."""
    model, _ = pk.load("builtin:tiny", quantize=quantize, dtype="float32")
    torch.manual_seed(0)
    pk.attach(model, method(**{"r": 4, "alpha": 8} | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # like a trained one: small against the weights
        for layer in adapter_layers(model).values():
            layer.b().normal_(0, 0.02, generator=generator)
    pk.save_adapter(model, tmp_path / "adapter")
    return model, str(tmp_path / "adapter")


@pytest.mark.parametrize("method", [pk.LoRA, pk.DoRA])
def test_onto_the_trained_weights(method, tmp_path):
    model, adapter = trained(tmp_path, method)
    before = logits_of(model)
    report = fold(adapter, str(tmp_path / "merged"), "builtin:tiny", "nf4")
    merged, tokenizer = pk.load(str(tmp_path / "merged"), dtype=model.dtype)
    found = compare_logits(before, logits_of(merged))
    assert found.kl < 1e-6 and found.top1_agreement > 0.99 and tokenizer is not None
    assert "(bound: KL 0.01)" in str(report) and "top-1 agreement" in str(report) and "bit for bit" in str(report)


@pytest.mark.parametrize("method", [pk.LoRA, pk.DoRA])
def test_onto_the_original_weights(method, tmp_path):
    _, adapter = trained(tmp_path, method)
    report = fold(adapter, str(tmp_path / "merged"), "builtin:tiny", "nf4", "original")
    assert report.check.kl < 1e-6, "it is the adapter on the 16-bit base"
    assert report.from_trained.kl > 1e-3, "which is another model than the trained one, and that is measured"
    plain, _ = pk.load("builtin:tiny", dtype="float32")
    pk.load_adapter(plain, adapter, another_base=True)
    merged, _ = pk.load(str(tmp_path / "merged"), dtype="float32")
    torch.testing.assert_close(logits_of(merged), logits_of(plain), rtol=1e-4, atol=1e-4)
    assert "against the quantised model that was trained" in str(report)


def test_onto_requantised_weights_loses_the_update_and_says_how_much(tmp_path):
    """First the trap: 4-bit weights that are merged and quantised again are nearly the base."""
    model, adapter = trained(tmp_path)
    before = logits_of(model)
    report = fold(adapter, str(tmp_path / "merged"), "builtin:tiny", "nf4", "requantised")
    again, _ = pk.load(str(tmp_path / "merged"), dtype="float32")
    assert "4bit" in type(again.model.layers[0].mlp.up_proj).__name__, "the folder is in 4 bits"
    lost, whole = 0.0, 0.0
    for name, layer in adapter_layers(model).items():
        wanted = layer.merged_weight()
        lost += (dense_weight(again.get_submodule(name)) - wanted).square().sum().item()
        whole += (wanted - dense_weight(layer.base_layer)).square().sum().item()
    assert report.lost == pytest.approx((lost / whole) ** 0.5, rel=1e-3) and report.lost > 0.3
    assert report.check == compare_logits(before, logits_of(again)) and report.check.kl > 1e-5
    assert f"moved the weights by {report.lost:.0%} of the adapter's update" in str(report) and "no bound" in str(report)


def test_requantised_is_never_the_default_and_needs_a_quantised_base(tmp_path):
    _, adapter = trained(tmp_path, quantize=None)
    with pytest.raises(ConfigError, match="is not quantised; --onto trained"):
        fold(adapter, str(tmp_path / "merged"), "builtin:tiny", None, "requantised")
    with pytest.raises(ConfigError, match="unknown 'requantized'; did you mean 'requantised'"):
        fold(adapter, str(tmp_path / "merged"), onto="requantized")


def test_a_merge_that_is_not_the_trained_model_leaves_nothing(tmp_path, monkeypatch):
    from peftkit.layers import LoRALinear

    _, adapter = trained(tmp_path, alpha=800)
    monkeypatch.setattr(LoRALinear, "merged_weight", lambda self, weight=None: dense_weight(self.base_layer).detach())
    with pytest.raises(MergeError, match="the merged model is not the trained one"):
        fold(adapter, str(tmp_path / "merged"), "builtin:tiny", "nf4")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize("harm", ["one weight", "a layer left out"])
def test_files_that_differ_from_the_model_in_memory_are_never_left(harm, tmp_path, monkeypatch):
    """The trap: a save that loses something. The folder is there, loads without an error, and computes something else."""
    _, adapter = trained(tmp_path)
    save = type(pk.load("builtin:tiny")[0]).save_pretrained

    def lossy(self: nn.Module, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        key = "model.layers.0.mlp.up_proj.weight"
        tensors[key] = tensors[key] * (1.001 if harm == "one weight" else 0)
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", lossy)
    with pytest.raises(CheckpointError, match=r"read back from disk is not the one in memory: logits differ by up to \d"):
        fold(adapter, str(tmp_path / "merged"), "builtin:tiny", "nf4")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_the_command(tmp_path, capsys):
    _, adapter = trained(tmp_path)
    arguments = ["merge", adapter, str(tmp_path / "merged"), "--model", "builtin:tiny", "--quantize", "nf4", "--dtype", "float32"]

    def call(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *more])
        return (stopped.value.code or 0, *capsys.readouterr())

    code, out, err = call("--max-kl", "0.001")
    assert code == 0 and "bound: KL 0.001" in out, err
    assert re.search(r"max logit difference \S+, KL \S+ nats, top-1 agreement", out)
    code, _, err = call()
    assert code == 2 and "not empty" in err
    (tmp_path / "merged").rename(tmp_path / "first")
    code, _, err = call("--max-kl", "1e-15")
    assert code == 1 and "bound: KL 1e-15" in err and "Traceback" not in err and not (tmp_path / "merged").exists()


def test_an_empty_folder_is_filled_and_a_file_is_refused(tmp_path):
    _, adapter = trained(tmp_path, quantize=None)
    (tmp_path / "empty").mkdir()
    assert isinstance(fold(adapter, str(tmp_path / "empty"), "builtin:tiny"), FoldReport)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        fold(adapter, str(tmp_path / "file"), "builtin:tiny")
    assert (tmp_path / "file").read_text() == "mine"
