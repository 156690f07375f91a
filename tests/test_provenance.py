"""An adapter says what it was trained on, and what is not so when it is loaded (row 25 of the table of silent failures)."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import quantized_llama, tiny_llama, wake
from torch import nn

import peftkit as pk
from peftkit.adapter_file import CARD_FILE, CheckpointError, differs, identity
from peftkit.layers import adapter_layers
from peftkit.provenance import base_record, mismatches, stored_as, template_hash, weight_hash
from peftkit.run import run
from peftkit.use import find_origin, load_adapted


def saved(model: nn.Module, folder, **options):
    torch.manual_seed(0)
    pk.attach(model, pk.LoRA(r=4, alpha=12))
    wake(model)
    return pk.save_adapter(model, folder, **options)


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.row)
def test_the_hash_is_the_same_before_and_after_adapters(row):
    model, again = row.build(), row.build()
    before = weight_hash(model)
    pk.attach(model, pk.LoRA(r=2))
    wake(model)
    assert weight_hash(model) == before == weight_hash(again) and len(before) == 64
    frozen = [parameter for name, parameter in again.base_model.named_parameters() if parameter.ndim == 2 and "embed" not in name]
    with torch.no_grad():
        frozen[-1].mul_(1.5)
    assert weight_hash(again) != before


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_hash_of_quantised_weights(kind, saved_llama, ids):
    model = quantized_llama(saved_llama, kind)
    before = base_record(model)
    pk.attach(model, pk.LoRA(r=2))
    wake(model)
    if kind == "nf4":
        model.eval()(input_ids=ids)
    assert base_record(model) == before and before["quantization"] == kind == stored_as(model)


def test_a_base_that_was_merged_since_is_another_one(tmp_path):
    """First the trap: the embedding of a merged base is the same, so nothing that looks at it can tell."""
    folder = saved(tiny_llama(), tmp_path / "adapter")
    merged = tiny_llama()
    pk.attach(merged, pk.LoRA(r=2))
    wake(merged)
    pk.merge(merged)
    merged.save_pretrained(tmp_path / "merged")
    merged = type(merged).from_pretrained(tmp_path / "merged")
    card = json.loads((folder / CARD_FILE).read_text())
    assert differs(merged, card) is None
    with pytest.raises(CheckpointError, match=r"trained on other weights .* finetuned or merged since\. Load it as it was, or give another_base=True"):
        pk.load_adapter(merged, folder)
    assert not adapter_layers(merged), "nothing was attached"
    pk.load_adapter(merged, folder, another_base=True)


def test_another_dtype_is_not_another_base(tmp_path):
    folder = saved(tiny_llama(), tmp_path / "adapter")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        pk.load_adapter(tiny_llama().to(dtype), folder)


def test_another_quantisation_is_said_with_what_to_do(tmp_path, saved_llama):
    folder = saved(quantized_llama(saved_llama), tmp_path / "adapter")
    pk.load_adapter(quantized_llama(saved_llama), folder)
    with pytest.warns(UserWarning, match=r"its base was in nf4 in training and is not quantised here, .* load it with quantize='nf4' \(--quantize nf4\)"):
        pk.load_adapter(tiny_llama(), folder)
    with pytest.warns(UserWarning, match="in nf4 in training and is in fp4 here"):
        pk.load_adapter(quantized_llama(saved_llama, "fp4"), folder)
    pk.load_adapter(tiny_llama(), folder, another_base=True)


def test_quantised_weights_that_changed_are_said(tmp_path, saved_llama):
    folder = saved(quantized_llama(saved_llama), tmp_path / "adapter")
    changed = quantized_llama(saved_llama)
    changed.model.layers[1].mlp.up_proj.weight.data.bitwise_xor_(0x11)
    with pytest.warns(UserWarning, match="the nf4 weights of the base are not those of the training"):
        pk.load_adapter(changed, folder)


def test_another_template_is_said(tmp_path):
    model, tokenizer = pk.load("builtin:tiny", dtype="float32")
    folder = saved(model, tmp_path / "adapter", tokenizer=tokenizer)
    assert json.loads((folder / CARD_FILE).read_text())["template"] == template_hash(tokenizer)
    pk.load_adapter(pk.load("builtin:tiny", dtype="float32")[0], folder, tokenizer=tokenizer)
    pk.load_adapter(pk.load("builtin:tiny", dtype="float32")[0], folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "human") + " "
    with pytest.warns(UserWarning, match="chat template is not the one of the training.*load the tokenizer of the base"):
        pk.load_adapter(pk.load("builtin:tiny", dtype="float32")[0], folder, tokenizer=tokenizer)
    tokenizer.chat_template = None
    assert mismatches(tiny_llama(), {"template": "abc"}, tokenizer) and not mismatches(tiny_llama(), {"template": None}, tokenizer)


def test_cards_of_before_are_read(tmp_path):
    folder = saved(tiny_llama(), tmp_path / "adapter")
    card = json.loads((folder / CARD_FILE).read_text())
    for gone in ("stored", "versions"):
        del card[gone]
    (folder / CARD_FILE).write_text(json.dumps(card))
    pk.load_adapter(tiny_llama(), folder)
    (folder / CARD_FILE).write_text(json.dumps(card | {"stored": "nf4"}))
    pk.load_adapter(tiny_llama(), folder)


def test_weights_on_no_device_have_no_hash():
    with torch.device("meta"):
        model = tiny_llama()
    assert weight_hash(model) is None and identity(tiny_llama())["weights"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run on a 4-bit base."""
    folder = tmp_path_factory.mktemp("run")
    run({
        "model": {"name": "builtin:tiny", "quantize": "nf4", "dtype": "float32"}, "methods": [{"lora": {"r": 2, "alpha": 4}}],
        "data": {"train": "builtin:tool-calls/train", "train_rows": 8}, "train": {"max_steps": 2, "batch_size": 4}, "eval": {"before": False},
        "output_dir": str(folder / "run"),
    })  # fmt: skip
    return folder / "run"


def test_an_adapter_taken_out_of_its_run_describes_itself(finished, tmp_path):
    card = json.loads((finished / "adapter" / CARD_FILE).read_text())
    assert (card["recipe"]["train"]["max_steps"] == 2 and card["versions"]["torch"] == torch.__version__.split("+")[0]) or "+" in torch.__version__
    assert card["stored"]["quantization"] == "nf4" and card["stored"]["hash"] and card["template"]
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (finished / "adapter").iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    origin = find_origin(str(alone))
    assert (origin.quantize, origin.dtype) == ("nf4", "float32") and find_origin(str(alone), quantize="none").quantize is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load_adapted(origin)
    assert stored_as(model) == "nf4"


def test_an_average_knows_what_its_parts_agree_on(finished, tmp_path):
    from peftkit.average import average

    average([finished, finished], None, tmp_path / "mean")
    own, mean = (json.loads((folder / CARD_FILE).read_text()) for folder in (finished / "adapter", tmp_path / "mean"))
    assert mean["stored"] == own["stored"] and mean["template"] == own["template"] and find_origin(str(tmp_path / "mean")).quantize == "nf4"
    (tmp_path / "other").mkdir()
    for file in (finished / "adapter").iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / CARD_FILE).write_text(json.dumps(own | {"stored": own["stored"] | {"quantization": "fp4"}}))
    average([finished, tmp_path / "other"], None, tmp_path / "mixed")
    assert "stored" not in json.loads((tmp_path / "mixed" / CARD_FILE).read_text())


def test_the_command_line_says_it_in_one_line(finished):
    command = [sys.executable, "-m", "peftkit", "generate", "hello", "--adapter", str(finished), "--quantize", "none", "--max-new-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "in training" in line]
    assert line.startswith("warning: ") and "--quantize nf4" in line and ".py" not in done.stderr
