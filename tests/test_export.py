"""Export: what servers take is said with the reason, and what is written computes the same or says how far it is off.

Row 24 of the table of silent failures: an adapter that will not serve. The rules are those of the servers' own loaders, as named in servers.py.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import peftkit as pk
from peftkit.adapter_file import ADAPTER_FILE, CONFIG_FILE
from peftkit.cli import main
from peftkit.config import ConfigError
from peftkit.export import export, servers_for
from peftkit.layers import adapter_layers
from peftkit.save_model import logits_of
from peftkit.servers import SERVERS

METHODS = {
    "lora": pk.LoRA(r=4, alpha=8),
    "rslora": pk.LoRA(r=4, alpha=8, rslora=True),
    "patterns": pk.LoRA(r=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}),
    "ranks": pk.LoRA(r=4, alpha=8, rank_pattern={"q_proj": 2}),
    "dora": pk.DoRA(r=4, alpha=8),
    "saved": pk.LoRA(r=4, alpha=8, modules_to_save=["lm_head"]),
    "tokens": pk.LoRA(r=4, alpha=8, trainable_tokens=[5, 9]),
    "bias": pk.LoRA(r=4, alpha=8, bias="lora_only"),
    "embedding": pk.LoRA(r=4, alpha=8, target_modules=["q_proj", "embed_tokens"]),
    "high rank": pk.LoRA(r=600, alpha=8, target_modules=["q_proj"]),
}
# What each server does with it, by its own loader: A as it is, P plain LoRA first, M merged.
MERGED = dict.fromkeys(("dora", "saved", "tokens", "bias", "embedding"), "M")
TAKES = {
    "peft": dict.fromkeys(METHODS, "A"),
    "vllm": MERGED | {"lora": "A", "rslora": "A", "ranks": "P", "patterns": "P", "high rank": "M"},
    "sglang": MERGED | {"lora": "A", "rslora": "P", "ranks": "P", "patterns": "P", "high rank": "A"},
    "tgi": MERGED | {"lora": "A", "rslora": "A", "ranks": "P", "patterns": "P", "high rank": "A"},
    "llama.cpp": MERGED | {"lora": "A", "rslora": "P", "ranks": "A", "patterns": "P", "high rank": "A"},
}


def made(tmp_path, name: str) -> tuple[nn.Module, str]:
    """A model with an adapter that does something, and the adapter's folder."""
    model, _ = pk.load("builtin:tiny", dtype="float32")
    torch.manual_seed(0)
    pk.attach(model, METHODS[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    pk.save_adapter(model, tmp_path / "adapter")
    return model.eval(), str(tmp_path / "adapter")


def exported(adapter: str, tmp_path, server: str, form: str = "auto", **options):
    return export(adapter, str(tmp_path / "out"), server, form, model="builtin:tiny", dtype="float32", **options)


@pytest.mark.parametrize("name", METHODS)
def test_what_servers_take(name, tmp_path):
    _, adapter = made(tmp_path, name)
    told = {server: (takes, why) for server, takes, why in servers_for(adapter)}
    for key, server in SERVERS.items():
        takes, why = told[server.name]
        assert takes == {"A": "as it is", "P": "plain LoRA, converted exactly", "M": "a merged model"}[TAKES[key][name]], (key, why)
        assert bool(why) == (takes != "as it is")
    if name == "saved":
        assert "lm_head" in told["vLLM"][1] and "lm_head" in told["text-generation-inference"][1]


@pytest.mark.parametrize(
    "name,server", [("lora", "vllm"), ("patterns", "vllm"), ("rslora", "llama.cpp"), ("dora", "vllm"), ("saved", "sglang"), ("tokens", "tgi")]
)
def test_what_is_written_computes_the_same(name, server, tmp_path):
    model, adapter = made(tmp_path, name)
    report = exported(adapter, tmp_path, server)
    assert report.form == {"A": "adapter", "P": "plain", "M": "merged"}[TAKES[server][name]]
    if report.form == "merged":
        again, _ = pk.load(str(tmp_path / "out"), dtype="float32")
        assert not (tmp_path / "out" / CONFIG_FILE).exists()
    else:
        base, _ = pk.load("builtin:tiny", dtype="float32")
        again = PeftModel.from_pretrained(base, tmp_path / "out", autocast_adapter_dtype=False)
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-4, atol=1e-4)


def served_by_alpha_over_r(folder, base: nn.Module) -> nn.Module:
    """A server that reads r and lora_alpha of the config and nothing else, as the loaders do that misread patterns and rslora."""
    config, state = json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / ADAPTER_FILE)
    with torch.no_grad():
        for key, a in state.items():
            if key.endswith("lora_A.weight"):
                b = state[key.replace("lora_A", "lora_B")]
                weight = base.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")).weight
                weight += config["lora_alpha"] / config["r"] * (b @ a)
    return base


@pytest.mark.parametrize("name", ["patterns", "ranks", "rslora"])
def test_plain_lora_is_read_rightly_by_a_server_that_reads_one_scale(name, tmp_path):
    """First the trap: the adapter as it is loads without an error there, and is another model."""
    model, adapter = made(tmp_path, name)
    wanted = logits_of(model)
    wrong = served_by_alpha_over_r(tmp_path / "adapter", pk.load("builtin:tiny", dtype="float32")[0])
    assert (logits_of(wrong) - wanted).abs().max() > 0.1
    report = exported(adapter, tmp_path, "sglang")
    right = served_by_alpha_over_r(tmp_path / "out", pk.load("builtin:tiny", dtype="float32")[0])
    torch.testing.assert_close(logits_of(right), wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    ranks = {len(tensor) for key, tensor in load_file(tmp_path / "out" / ADAPTER_FILE).items() if "lora_A" in key}
    assert ranks == {4} == {config["r"]} and not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert "rounding to fp32" in str(report)
    fresh, _ = pk.load("builtin:tiny", dtype="float32")
    pk.load_adapter(fresh, tmp_path / "out")
    torch.testing.assert_close(logits_of(fresh), wanted, rtol=1e-4, atol=1e-4)


def test_a_copy_has_the_same_bytes(tmp_path):
    _, adapter = made(tmp_path, "lora")
    exported(adapter, tmp_path, "vllm")
    for path in (tmp_path / "adapter").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_approximation_of_dora_says_how_far_it_is(tmp_path):
    model, adapter = made(tmp_path, "dora")
    wanted = logits_of(model)
    report = exported(adapter, tmp_path, "vllm", "approximation", rank=8)
    base, _ = pk.load("builtin:tiny", dtype="float32")
    near = PeftModel.from_pretrained(base, tmp_path / "out", autocast_adapter_dtype=False)
    missed = whole = 0.0
    plain, _ = pk.load("builtin:tiny", dtype="float32")
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            delta = layer.merged_weight() - plain.get_submodule(name).weight
            inner = near.base_model.model.get_submodule(name)
            missed += (inner.get_delta_weight("default") - delta).square().sum().item()
            whole += delta.square().sum().item()
            best = torch.linalg.svdvals(delta)[8:].square().sum().item()
            assert (inner.get_delta_weight("default") - delta).square().sum().item() == pytest.approx(best, rel=1e-2)
    assert f"misses {math.sqrt(missed / whole):.1%} of the update" in str(report) and 0.01 < math.sqrt(missed / whole) < 0.95
    assert "KL" in str(report) and (logits_of(near) - wanted).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="serves ranks up to 512, not 513"):
        export(adapter, str(tmp_path / "other"), "vllm", "approximation", rank=513, model="builtin:tiny")


def test_forms_that_cannot_be_are_refused_with_the_reason(tmp_path):
    _, adapter = made(tmp_path, "dora")
    cases = [
        (("vllm", "adapter"), "does not take this one: its loader stops at use_dora"), (("vllm", "plain"), "cannot be written as plain LoRA"),
        (("peft", "plain"), "magnitudes"), (("vlm", "auto"), "unknown 'vlm'; did you mean 'vllm'"),
        (("vllm", "merge"), "unknown 'merge'; did you mean 'merged'"),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message):
            exported(adapter, tmp_path, *arguments)
    with pytest.raises(ConfigError, match="--rank is of an approximation"):
        exported(adapter, tmp_path, "vllm", rank=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name,what", [("saved", "modules_to_save"), ("tokens", "trained tokens"), ("bias", "trained biases"), ("embedding", "embeddings")])
def test_nothing_is_left_out_of_plain_lora_in_silence(name, what, tmp_path):
    """peft takes these as they are; written as plain LoRA they would lose a part."""
    _, adapter = made(tmp_path, name)
    with pytest.raises(ConfigError, match=f"cannot be written as plain LoRA: it has .*{what}"):
        exported(adapter, tmp_path, "peft", "plain")
    assert not (tmp_path / "out").exists()


def test_an_approximation_of_what_is_no_dora_is_refused(tmp_path):
    _, adapter = made(tmp_path, "lora")
    with pytest.raises(ConfigError, match="plain LoRA already"):
        exported(adapter, tmp_path, "vllm", "approximation")
    (tmp_path / "other").mkdir()
    _, saved = made(tmp_path / "other", "saved")
    with pytest.raises(ConfigError, match=r"has modules_to_save \(lm_head\): it needs merging"):
        exported(saved, tmp_path, "vllm", "approximation")


def test_an_embedding_resized_for_new_tokens_is_seen(tmp_path):
    """peft writes it along, frozen; a server that reads A and B alone would look new tokens up in the base's own rows."""
    model, _ = pk.load("builtin:tiny", dtype="float32")
    model.resize_token_embeddings(model.config.vocab_size + 8)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    told = {server: (takes, why) for server, takes, why in servers_for(str(tmp_path / "adapter"))}
    assert told.pop("peft")[0] == "as it is"
    assert all(takes == "a merged model" and "resized embedding" in why for takes, why in told.values())
    with pytest.raises(ConfigError, match="it has weights of the base"):
        exported(str(tmp_path / "adapter"), tmp_path, "peft", "plain")


def test_options_that_do_nothing_are_said(tmp_path, capsys):
    _, adapter = made(tmp_path, "lora")
    assert "--dtype is of the base, and did nothing" in str(exported(adapter, tmp_path, "vllm"))
    with pytest.raises(SystemExit) as stopped:
        main(["export", adapter, "--form", "plain", "--rank", "4"])
    assert stopped.value.code == 2 and "--form, --rank: of what is written; give a FOLDER and --for SERVER" in capsys.readouterr().err


def test_the_lines_to_serve_by(tmp_path):
    _, adapter = made(tmp_path, "lora")
    for server, expected in {
        "vllm": "--enable-lora --max-lora-rank 8 --lora-modules out=", "sglang": "--max-lora-rank 4 --lora-paths out=", "tgi": "LORA_ADAPTERS=out=",
        "llama.cpp": "convert_lora_to_gguf.py", "peft": "PeftModel.from_pretrained",
    }.items():  # fmt: skip
        report = export(adapter, str(tmp_path / server / "out"), server, model="builtin:tiny")
        assert expected in report.commands and str(tmp_path / server / "out") in report.commands
    merged = export(adapter, str(tmp_path / "merged"), "llama.cpp", "merged", model="builtin:tiny", dtype="float32")
    assert "convert_hf_to_gguf.py" in merged.commands and "llama-quantize" in merged.commands and "lora" not in merged.commands


def test_a_quantised_base_is_noted(tmp_path):
    """By what it was trained on, whatever --quantize says."""
    model, _ = pk.load("builtin:tiny", quantize="nf4")
    pk.attach(model, METHODS["lora"])
    pk.save_adapter(model, tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    assert "trained on a base in nf4" in str(export(adapter, str(tmp_path / "out"), "vllm"))
    (tmp_path / "plain").mkdir()
    said = str(export(made(tmp_path / "plain", "lora")[1], str(tmp_path / "other"), "vllm", quantize="nf4"))
    assert "trained on a base" not in said and "--quantize is of the base, and did nothing" in said


def test_the_command(tmp_path, capsys):
    _, adapter = made(tmp_path, "dora")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["export", *map(str, arguments)])
        return (stopped.value.code or 0, *capsys.readouterr())

    code, out, _ = call(adapter)
    assert code == 0 and "vLLM" in out and "a merged model" in out and "DoRA is not supported" in " ".join(out.split())
    code, out, err = call(adapter, tmp_path / "out", "--for", "vllm", "--model", "builtin:tiny")
    assert code == 0 and "for vLLM: a merged model" in out and "because its loader stops at use_dora" in out, err
    code, _, err = call(adapter, tmp_path / "more")
    assert code == 2 and "--for SERVER" in err
    code, _, err = call(tmp_path / "nowhere")
    assert code == 2 and "no folder" in err and "Traceback" not in err
    code, _, err = call(adapter, tmp_path / "out", "--for", "vllm", "--model", "builtin:tiny")
    assert code == 2 and "not empty" in err
