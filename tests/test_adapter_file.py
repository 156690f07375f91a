"""Adapter folders that are damaged, wrong or of another model: a clear error, and the model as it was, bit for bit."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quantized_llama, tiny_gpt2, tiny_llama, wake
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapter_file import ADAPTER_FILE, CARD_FILE, CONFIG_FILE, CheckpointError, read_folder
from peftkit.config import ConfigError
from peftkit.layers import adapter_layers


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def attached(model: nn.Module, method: pk.LoRA | None = None, adapter: str = "default", seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    pk.attach(model, method or pk.LoRA(r=4, alpha=12), adapter=adapter)
    wake(model, seed)
    return model


class Still:
    """Everything about a model that must stay: modules and parameters by identity, their bits, what trains, what is attached."""

    def __init__(self, model: nn.Module):
        self.model, self.modules, self.parameters = model, dict(model.named_modules()), dict(model.named_parameters())
        self.bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.rest = self.look()

    def look(self) -> tuple[Any, ...]:
        model = self.model
        record = vars(model).get("_peftkit")
        layers = {name: (dict(layer.specs), layer.active, layer.chosen, layer.enabled) for name, layer in adapter_layers(model).items()}
        return (
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()},
            sorted(vars(model)), list(vars(model).get("peft_config", {})), layers, record and dict(record.by_adapter), record and dict(record.handles),
        )  # fmt: skip

    def check(self) -> None:
        model = self.model
        now = dict(model.named_modules())
        assert now.keys() == self.modules.keys() and all(module is self.modules[name] for name, module in now.items())
        assert all(parameter is self.parameters[name] for name, parameter in model.named_parameters()) and len(list(model.parameters())) > 0
        state = model.state_dict()
        assert state.keys() == self.bits.keys()
        assert all(torch.equal(tensor, self.bits[name]) and tensor.dtype == self.bits[name].dtype for name, tensor in state.items())
        assert self.look() == self.rest


def test_still_sees_what_moves():
    for move in (
        lambda m: m.model.norm.weight.data.add_(1e-6), lambda m: m.model.norm.requires_grad_(False), lambda m: m.model.layers[1].eval(),
        lambda m: setattr(m.model, "norm", nn.LayerNorm(64)), lambda m: pk.attach(m, pk.NEFTune()), lambda m: pk.detach(attached(m)) and setattr(m, "x", 1),
    ):  # fmt: skip
        model = tiny_llama()
        still = Still(model)
        still.check()
        move(model)
        with pytest.raises(AssertionError):
            still.check()


# ------------------------------------------------------------------------------------------------------------ bad folders

KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the tensors of a folder, as a tool that writes no card would."""

    def harm(folder: Path) -> None:
        state = load_file(folder / ADAPTER_FILE)
        change(state)
        save_file(state, folder / ADAPTER_FILE)
        (folder / CARD_FILE).unlink()

    return harm


def spoil(key: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[key].view(-1)[7] = value

    return change


def config(**options: Any) -> Callable[[Path], None]:
    """Sets keys of adapter_config.json; None of type takes one out."""

    def harm(folder: Path) -> None:
        found = json.loads((folder / CONFIG_FILE).read_text()) | options
        (folder / CONFIG_FILE).write_text(json.dumps({key: value for key, value in found.items() if value is not type(None)}))

    return harm


def card(**options: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / CARD_FILE).write_text(json.dumps(json.loads((folder / CARD_FILE).read_text()) | options)) and None


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def cut(bytes_left: int, card: bool = False) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        content = (folder / ADAPTER_FILE).read_bytes()
        (folder / ADAPTER_FILE).write_bytes(content[:bytes_left])
        if not card:
            (folder / CARD_FILE).unlink()

    return harm


def flipped(at: int) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        content = bytearray((folder / ADAPTER_FILE).read_bytes())
        content[at] ^= 4
        (folder / ADAPTER_FILE).write_bytes(bytes(content))

    return harm


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / ADAPTER_FILE), folder / "adapter_model.bin")
    (folder / ADAPTER_FILE).unlink()


BAD: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    # keys and shapes
    "a missing key": (tensors(lambda s: s.pop(KEY)), CheckpointError, f"nothing was loaded \\(missing: {KEY}\\)"),
    "a surplus key": (tensors(lambda s: s.update({KEY.replace("lora_B", "lora_C"): torch.zeros(2)})), CheckpointError, "unexpected: .*lora_C.weight"),
    "a surplus key outside": (tensors(lambda s: s.update({"base_model.model.extra.weight": torch.zeros(2)})), CheckpointError, "unexpected: .*extra.weight"),
    "a module that is not there": (
        tensors(lambda s: s.update({KEY.replace("layers.1", "layers.9"): s.pop(KEY)})), CheckpointError, "1 modules that this LlamaForCausalLM does not have",
    ),
    "keys without peft's prefix": (
        tensors(lambda s: [s.update({k.removeprefix("base_model.model."): s.pop(k)}) for k in list(s)]), CheckpointError, "missing: base_model.*unexpected: mo",
    ),
    "a shape": (tensors(lambda s: s.update({KEY: s[KEY].T.contiguous()})), CheckpointError, r"q_proj.lora_B.weight: \(4, 64\) in the file, \(64, 4\) here"),
    "no tensors": (tensors(lambda s: s.clear()), CheckpointError, "holds no tensors"),
    "a rank that the shapes contradict": (config(r=5), CheckpointError, r"\(5, 64\) here; .*adapter_config.json says r = 5|scales its update"),
    "a rank pattern that they contradict": (config(rank_pattern={"q_proj": 2}), CheckpointError, r"\(4, 64\) in the file, \(2, 64\) here|scales its update"),
    "a bias without its tensors": (config(bias="lora_only"), CheckpointError, "missing: .*base_layer.bias|say different things of use_dora and bias"),
    "DoRA without its magnitudes": (config(use_dora=True), CheckpointError, "missing: .*lora_magnitude_vector|say different things of use_dora and bias"),
    # values
    "NaN": (tensors(spoil(KEY, float("nan"))), CheckpointError, f"{KEY} holds NaN or infinity"),
    "infinity": (tensors(spoil(KEY, float("-inf"))), CheckpointError, f"{KEY} holds NaN or infinity"),
    "whole numbers": (tensors(lambda s: s.update({KEY: s[KEY].to(torch.int8)})), CheckpointError, f"{KEY} holds int8 numbers"),
    # the file of the tensors
    "an empty file": (cut(0), CheckpointError, r"adapter_model\.safetensors cannot be read"),
    "a header cut off": (cut(40), CheckpointError, r"adapter_model\.safetensors cannot be read"),
    "an end cut off": (cut(-3), CheckpointError, r"adapter_model\.safetensors cannot be read"),
    "an end cut off under its card": (cut(-3, card=True), CheckpointError, "is not the file that was saved"),
    "a bit flipped in a number": (flipped(-21), CheckpointError, r"is not the file that was saved: its SHA-256 differs from the one in peftkit\.json"),
    "a bit flipped in the header": (flipped(30), CheckpointError, "is not the file that was saved"),
    "noise": (written(ADAPTER_FILE, b"\x93NUMPY" * 99), CheckpointError, "is not the file that was saved"),
    "a pickle": (pickled, ConfigError, r"holds its weights as a pickle, adapter_model\.bin, which can run code when it is read"),
    "no tensors' file": (lambda f: (f / ADAPTER_FILE).unlink(), ConfigError, r"is no adapter folder: it holds no adapter_model\.safetensors"),
    # the card
    "a card that is no JSON": (written(CARD_FILE, "{"), CheckpointError, r"peftkit\.json cannot be read as JSON"),
    "a card that is a list": (written(CARD_FILE, "[]"), CheckpointError, r"peftkit\.json holds no JSON object"),
    **{
        f"a card with weights {i}": (card(weights=weights), CheckpointError, r"peftkit\.json: weights does not describe a weight of the base")
        for i, weights in enumerate((3, {}, {"name": "x", "shape": [2, 2], "values": [0.5]}, {"name": "x", "shape": [], "values": [0.5] * 64}, ["x"]))
    },
    # the config
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), ConfigError, r"is no adapter folder: it holds no adapter_config\.json"),
    "a config that is no JSON": (written(CONFIG_FILE, "r: 4"), CheckpointError, r"adapter_config\.json cannot be read as JSON"),
    "a config that is no text": (written(CONFIG_FILE, b"\xff\xfe\x00"), CheckpointError, r"adapter_config\.json cannot be read as JSON"),
    "a config that is a list": (written(CONFIG_FILE, "[1]"), CheckpointError, r"adapter_config\.json holds no JSON object"),
    "no r": (config(r=type(None)), ConfigError, "adapter_config.json has no r: it is no config of a LoRA or DoRA adapter"),
    "no alpha and no type": (config(lora_alpha=type(None), peft_type=type(None)), ConfigError, "has no peft_type and no lora_alpha"),
    "another kind": (config(peft_type="IA3"), ConfigError, "peft_type 'IA3' is not LoRA or DoRA"),
    "r as a text": (config(r="4"), ConfigError, "adapter_config.json: r: .*, got '4'"),
    "r of zero": (config(r=0), ConfigError, "adapter_config.json: r: .*, got 0"),
    "a negative alpha": (config(lora_alpha=-1), ConfigError, "adapter_config.json: lora_alpha: .*, got -1"),
    "an alpha of NaN": (config(lora_alpha=float("nan")), ConfigError, "adapter_config.json: lora_alpha: .*, got nan"),
    "a dropout of 2": (config(lora_dropout=2.0), ConfigError, "adapter_config.json: lora_dropout: .*, got 2"),
    "an unknown bias": (config(bias="some"), ConfigError, "adapter_config.json: bias: .*, got 'some'"),
    "a pattern that is none": (config(rank_pattern={"(": 4}), ConfigError, r"adapter_config.json: rank_pattern: '\(' is no regular expression"),
    "patterns in a list": (config(alpha_pattern=["q_proj"]), ConfigError, r"adapter_config.json: alpha_pattern: \['q_proj'\] is no JSON object"),
    **{
        key: (config(**{key: value}), ConfigError, f"adapter_config.json: {key}: .* is not supported, and without it the adapter would compute something else")
        for key, value in {
            "lora_bias": True, "layer_replication": [[0, 2]], "use_qalora": True, "alora_invocation_tokens": [1], "use_bdlora": {"a": 1},
            "kasa_config": {"a": 1}, "an_option_of_next_year": 3,
        }.items()
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return pk.save_adapter(attached(tiny_llama()), tmp_path_factory.mktemp("good") / "adapter")


CASES = [(name, before) for name in BAD for before in ("plain", "filled", "beside")]


@pytest.mark.parametrize("name,before", [*CASES, *((name, "nf4") for name in ("a missing key", "NaN", "a shape", "r of zero"))])
def test_a_bad_folder_is_refused_and_the_model_untouched(name, before, good, saved_llama, tmp_path):
    harm, error, message = BAD[name]
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    harm(folder)
    model = quantized_llama(saved_llama) if before == "nf4" else tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    if before == "nf4":
        pk.detach(attached(model))  # protected, as any model that has had an adapter
    elif before != "plain":
        attached(model, adapter="default" if before == "filled" else "other", seed=9)
    still = Still(model)
    with pytest.raises(error, match=message) as caught:
        pk.load_adapter(model, folder)
    assert str(folder) in str(caught.value)
    still.check()


@pytest.mark.parametrize("before", ["plain", "filled", "beside"])
def test_the_good_folder_loads_where_the_bad_ones_do_not(before, good, ids):
    model = tiny_llama()
    if before != "plain":
        attached(model, adapter="default" if before == "filled" else "other", seed=9)
    still = Still(model)
    pk.load_adapter(model, good)
    pk.set_adapter(model, "default")
    assert torch.equal(logits(model, ids), logits(attached(tiny_llama()), ids))
    with pytest.raises(AssertionError):
        still.check()


def test_every_cut_and_every_flipped_byte_is_seen(good, tmp_path):
    content = (good / ADAPTER_FILE).read_bytes()
    generator = torch.Generator().manual_seed(0)
    for name in (CONFIG_FILE, CARD_FILE):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    for at in torch.randint(len(content), (60,), generator=generator).tolist():
        for harmed in (content[:at], content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]):
            (tmp_path / ADAPTER_FILE).write_bytes(harmed)
            with pytest.raises(CheckpointError, match="is not the file that was saved"):
                read_folder(tmp_path)


def test_a_file_of_another_scale_does_not_fill(good):
    for method in (pk.LoRA(r=4, alpha=4), pk.LoRA(r=4, alpha=12, alpha_pattern={"q_proj": 2})):
        model = attached(tiny_llama(), method)
        still = Still(model)
        with pytest.raises(CheckpointError, match=r"scales its update of model\.layers\.0\..* by 3, the attached adapter by (1|0\.5) \(alpha, r"):
            pk.load_adapter(model, good)
        still.check()


def test_a_run_folder_is_told_from_its_adapter(tmp_path):
    pk.save_adapter(attached(tiny_llama()), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"is no adapter folder: it holds no adapter_config\.json; there is one in .*adapter"):
        pk.load_adapter(tiny_llama(), tmp_path)


def test_what_the_advice_about_pickles_does(good, tmp_path, ids, monkeypatch):
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pickled(tmp_path)
    with pytest.raises(ConfigError) as caught:
        pk.load_adapter(tiny_llama(), tmp_path)
    monkeypatch.chdir(tmp_path)
    import safetensors.torch  # the advice names it

    exec(str(caught.value).split("convert it: ")[1], {"safetensors": safetensors, "torch": torch})
    (tmp_path / CARD_FILE).unlink()
    assert torch.equal(logits(pk.load_adapter(tiny_llama(), tmp_path), ids), logits(attached(tiny_llama()), ids))


# ----------------------------------------------------------------------------------------------------------- another base


def test_a_base_of_other_shapes(good):
    shorter, narrower = tiny_llama(), tiny_llama()
    shorter.model.layers = shorter.model.layers[:1]
    for layer in narrower.model.layers:
        layer.mlp.down_proj = nn.Linear(64, 64)
    for model, message in (
        (tiny_llama(hidden_size=128), r"model\.embed_tokens\.weight is \(96, 128\) here and was \(96, 64\)"),
        (tiny_gpt2(), "modules that this GPT2LMHeadModel does not have, such as 'model.layers.0"),
        (shorter, "adapts 7 modules that this LlamaForCausalLM does not have"),
        (narrower, r"\(4, 96\) in the file, \(4, 64\) here"),
    ):
        still = Still(model)
        with pytest.raises(CheckpointError, match=message):
            pk.load_adapter(model, good)
        still.check()


def test_a_base_of_the_same_shapes_and_other_weights(good, ids):
    """Finetuned a little, all of it other: told by its weights, whatever its name."""
    model = tiny_llama(seed=4)
    still = Still(model)
    with pytest.raises(CheckpointError, match=r"was trained on another base .*: (9\d|100)% of the values looked at in model\.embed_tokens\.weight are"):
        pk.load_adapter(model, good)
    still.check()
    pk.load_adapter(model, good, another_base=True)
    assert adapter_layers(model)
    near = tiny_llama()
    with torch.no_grad():
        near.model.embed_tokens.weight.mul_(1 + 0.05 * torch.randn(96, 64, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(CheckpointError, match="are other ones"):
        pk.load_adapter(near, good)


def test_the_same_base_in_another_precision_place_or_size(good, saved_llama, tmp_path):
    half = tiny_llama().half()
    half.save_pretrained(tmp_path / "moved")
    models = [tiny_llama().bfloat16(), half, tiny_llama().double(), quantized_llama(saved_llama), type(half).from_pretrained(tmp_path / "moved")]
    grown = tiny_llama()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grown.resize_token_embeddings(104)
    attached(adapted := tiny_llama(), pk.LoRA(r=2, target_modules=["embed_tokens", "q_proj"]), adapter="other")
    for model in [*models, grown, adapted]:
        quantized = hasattr(model.config, "quantization_config")
        with pytest.warns(UserWarning, match="was not quantised in training and is in nf4 here") if quantized else nullcontext():
            pk.load_adapter(model, good)


def test_the_name_alone_warns(tmp_path):
    """A mirror has another name and the same weights, so it is no proof; without our card it is all there is."""
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "theirs")
    config(base_model_name_or_path="someone/llama")(tmp_path / "theirs")
    model = tiny_llama()
    model.name_or_path = "other/llama"
    with pytest.warns(UserWarning, match="was trained on someone/llama, and this model is other/llama; its shapes fit, which does not make it the same base"):
        pk.load_adapter(model, tmp_path / "theirs")
    assert adapter_layers(model)
    for name in ("someone/llama", "", str(tmp_path)):  # the same, none, and a folder, which may hold anything
        model = tiny_llama()
        model.name_or_path = name
        pk.load_adapter(model, tmp_path / "theirs")
    ours = tiny_llama()
    ours.name_or_path = "someone/llama"
    pk.save_adapter(attached(ours), tmp_path / "ours")
    mirror = tiny_llama()
    mirror.name_or_path = "other/llama"
    pk.load_adapter(mirror, tmp_path / "ours")


def test_a_model_without_an_embedding_is_told_by_its_first_matrix(tmp_path):
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))

    pk.save_adapter(attached(make(0), pk.LoRA(r=2, target_modules=["2"])), tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    assert card["weights"]["name"] == "0.weight" and len(card["weights"]["values"]) == 64
    pk.load_adapter(make(0), tmp_path)
    with pytest.raises(CheckpointError, match=r"of the values looked at in 0\.weight are other ones"):
        pk.load_adapter(make(1), tmp_path)


# -------------------------------------------------------------------------------------------------------------- writing


def test_the_card(good):
    card = json.loads((good / CARD_FILE).read_text())
    assert set(card) == {"methods", "base", "revision", "weights", "stored", "versions", "sha256"} and len(card["sha256"]) == 64
    assert card["weights"]["name"] == "model.embed_tokens.weight" and card["weights"]["shape"] == [96, 64]


def test_weights_that_are_not_finite_are_not_saved(good, tmp_path):
    model = attached(tiny_llama())
    with torch.no_grad():
        adapter_layers(model)["model.layers.1.mlp.up_proj"].b()[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"1 tensors of the adapter hold NaN or infinity, such as .*up_proj\.lora_B\.weight: training went astray"):
        pk.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_folder_that_peft_writes_over_loads_without_the_old_card(good, tmp_path, ids):
    """The old card describes the old file: it is said, and no harm is done."""
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    wake(theirs, seed=8)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"or another program wrote it; in that case remove peftkit\.json"):
        pk.load_adapter(tiny_llama(), tmp_path)
    (tmp_path / CARD_FILE).unlink()
    torch.testing.assert_close(logits(pk.load_adapter(tiny_llama(), tmp_path), ids), logits(theirs, ids), rtol=1e-5, atol=1e-6)
    pk.save_adapter(attached(tiny_llama()), tmp_path)
    pk.load_adapter(tiny_llama(), tmp_path)


def test_an_adapter_from_the_hub(monkeypatch, tmp_path, saved_llama, ids):
    """`owner/name` is downloaded; what looks like a path of this machine is not looked for there."""
    pk.save_adapter(model := attached(tiny_llama()), tmp_path / "adapter")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path / "adapter"))
    assert torch.equal(logits(pk.load_adapter(tiny_llama(), "someone/tools.v2"), ids), logits(model, ids))
    assert asked == [("someone/tools.v2", [ADAPTER_FILE, CONFIG_FILE, CARD_FILE])]
    monkeypatch.chdir(tmp_path)
    for path in ("adapter/nothing", "./someone/tools", str(tmp_path / "nothing"), "nothing"):
        with pytest.raises(ConfigError, match="is no adapter folder"):
            pk.load_adapter(tiny_llama(), path)
    assert len(asked) == 1


def test_an_adapter_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    still = Still(model := tiny_llama())
    with pytest.raises(
        ConfigError, match=r"no folder someone/tools, and the adapter of this name cannot be had from the Hugging Face hub: .*\n.*HF_HUB_OFFLINE"
    ):
        pk.load_adapter(model, "someone/tools")
    still.check()


LOST = {
    "a module": (dict(target_modules=["q_proj", "down_proj"]), "layers.0.self_attn.q_proj.", "model.layers.0.self_attn.q_proj"),
    "one that a regular expression names": (dict(target_modules=r".*\.(q|v)_proj"), "layers.1.self_attn.v_proj.", "model.layers.1.self_attn.v_proj"),
    "a whole module": (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), "lm_head.", "lm_head"),
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("ours", [True, False])
def test_a_file_that_lost_all_of_a_module(lost, ours, tmp_path):
    """Its shapes and keys fit what is left, and the config says what was there."""
    options, gone, named = LOST[lost]
    if ours:
        pk.save_adapter(attached(tiny_llama(), pk.LoRA(r=4, **options)), tmp_path)
        (tmp_path / CARD_FILE).unlink()
    else:
        get_peft_model(tiny_llama(), LoraConfig(r=4, **options)).save_pretrained(tmp_path)
    pk.load_adapter(tiny_llama(), tmp_path)  # as it is, it fits
    state = load_file(tmp_path / ADAPTER_FILE)
    save_file({key: tensor for key, tensor in state.items() if gone not in key}, tmp_path / ADAPTER_FILE)
    still = Still(model := tiny_llama())
    with pytest.raises(CheckpointError, match=re.escape(f"missing: all of {named}, which adapter_config.json names")):
        pk.load_adapter(model, tmp_path)
    still.check()


def test_8_bit_tensors_are_refused(tmp_path):
    pk.save_adapter(attached(tiny_llama()), tmp_path)
    (tmp_path / CARD_FILE).unlink()
    state = load_file(tmp_path / ADAPTER_FILE)
    key = next(iter(state))
    save_file(state | {key: state[key].to(torch.float8_e4m3fn)}, tmp_path / ADAPTER_FILE)
    with pytest.raises(CheckpointError, match=re.escape(f"{key} is in 8 bits (float8_e4m3fn)")):
        pk.load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("target_modules", 5, "target_modules: 5 is no list of names"),
        ("target_modules", ["q_proj", 5], "is no list of names"),
        ("target_modules", "q_proj(", "target_modules: 'q_proj(' is no regular expression"),
        ("modules_to_save", "lm_head", "modules_to_save: 'lm_head' is no list of names"),
    ],
)
def test_names_of_modules_that_are_none(field, value, says, tmp_path):
    pk.save_adapter(attached(tiny_llama()), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {field: value}))
    with pytest.raises(ConfigError, match=re.escape(says)):
        pk.load_adapter(tiny_llama(), tmp_path)
