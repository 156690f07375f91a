"""Every architecture of the list, adapted by all-linear: trained, exchanged with peft, detached, merged; peft is the oracle.

The table in docs/architectures.md is of these figures: `python benchmarks/architectures.py` runs this file and writes it.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture
from conftest import wake
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftkit as pk
from peftkit.config import ConfigError
from peftkit.layers import SavedModule, adapter_layers, input_embedding, output_head, trainable_parameters
from peftkit.methods import Method

METHODS: dict[str, Method] = {"lora": pk.LoRA(r=4, alpha=8), "dora": pk.DoRA(r=4, alpha=8)}
TABLE = Path(__file__).parent.parent / "benchmarks" / "results" / "architectures.json"
LASTING = ("adapted", "whole", "trains", "checkpointing")  # figures that are the same on every machine

_seen: dict[tuple[str, str], dict[str, Any]] = {}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its successor is younger than the oldest transformers here
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.row)
def test_architecture(architecture: Architecture, method: str, record_property, tmp_path):
    base, batch = architecture.build(), architecture.batch()
    logits = outputs(base, batch)
    model = attached(architecture, base, METHODS[method])
    adapted, whole = adapted_modules(model)
    assert linears(base) <= adapted | {name for name in linears(base) if name.startswith(tuple(whole))}
    rounding = 1e-5 if method == "dora" else 1e-6 if architecture.passed_by else 0
    assert relative(outputs(model, batch), logits) <= rounding, "before training it is the base"
    trained = list(trainable_parameters(model))
    figures: dict[str, Any] = {
        "adapted": dict(Counter(name.rsplit(".", 1)[-1] for name in sorted(adapted))),
        "whole": sorted(whole),
        "trains": sum(parameter.numel() for _, _, parameter in trained),
    }

    without = [name for name, gradient in gradients(model, batch).items() if not gradient.any()]
    assert without == [name for name, role, _ in trained if role == "A"], "B is zero, and so A's gradient; no other"
    figures["loss"] = losses = train(model, batch, steps=3)
    assert losses[-1] < losses[0]
    plain = gradients(model, batch)
    assert [name for name, gradient in plain.items() if not gradient.any()] == []
    assert_same_state(base_state(model), base.state_dict())
    learnt = outputs(model, batch)
    assert relative(learnt, logits) > 1e-3

    pk.save_adapter(model, tmp_path / "ours")
    again = pk.load_adapter(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(outputs(again, batch), learnt)
    if architecture.refused_by_peft:
        with pytest.raises(ValueError, match=architecture.refused_by_peft):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    else:
        figures |= exchange_with_peft(architecture, base, again, tmp_path)
    pk.detach(again)
    assert_same_state(again.state_dict(), base.state_dict())
    assert torch.equal(outputs(again, batch), logits)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in base.parameters()]

    figures["checkpointing"] = kinds = checkpointing(model)
    for kind in kinds:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        checkpointed = gradients(model, batch)
        assert [name for name in plain if relative(checkpointed[name], plain[name]) > 1e-5] == [], kind

    pk.merge(model)
    merged = outputs(model, batch)
    figures["merged"] = relative(merged, learnt)
    assert figures["merged"] <= 1e-5
    model.save_pretrained(tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged")
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert loaded.state_dict().keys() == base.state_dict().keys()
    assert relative(outputs(loaded, batch), merged) <= 1e-6

    _seen[architecture.row, method] = figures
    record_property("figures", (architecture, method, figures))


def attached(architecture: Architecture, base: nn.Module, method: Method) -> Any:
    """A copy of the model with the method on all linears; without the experts, where the method refuses these."""
    model = copy.deepcopy(base)
    torch.manual_seed(1)
    if architecture.experts and isinstance(method, pk.DoRA):
        with pytest.raises(ValueError, match=r"DoRA has no form for experts .*exclude_modules=\['experts'\]"):
            pk.attach(model, method)
        method = method.model_copy(update={"exclude_modules": ["experts"]})
    pk.attach(model, method)
    return model


def checkpointing(model: Any) -> list[str]:
    """The kinds of gradient checkpointing that transformers offers for the model, made ready for both."""
    if not model.supports_gradient_checkpointing:
        return []
    if input_embedding(model) is None:  # the reentrant kind needs inputs that carry a gradient
        return ["non-reentrant"]
    model.enable_input_require_grads()
    return ["non-reentrant", "reentrant"]


def exchange_with_peft(architecture: Architecture, base: nn.Module, ours: Any, folder: Path) -> dict[str, float]:
    """Our adapter into peft, and another one of peft's into ours: how far outputs and gradients are apart, relatively."""

    def peft_outputs() -> Tensor:
        return outputs(copy.deepcopy(theirs).merge_and_unload() if architecture.passed_by else theirs, batch)

    batch = architecture.batch()
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours", is_trainable=True)
    first, apart = outputs(ours, batch), {}
    to_peft = relative(first, peft_outputs())
    if not architecture.passed_by:  # peft's layers have no gradient there
        wanted = {name.removeprefix("base_model.model."): gradient for name, gradient in gradients(theirs, batch).items()}
        found = gradients(ours, batch)
        assert found.keys() == wanted.keys()
        apart["gradients"] = max(relative(found[name], wanted[name]) for name in wanted)
        assert apart["gradients"] <= 1e-4
    wake(theirs)
    (folder / "theirs").mkdir()
    theirs.peft_config["default"].save_pretrained(folder / "theirs")
    save_file(get_peft_model_state_dict(theirs), folder / "theirs" / "adapter_model.safetensors")
    second = outputs(pk.load_adapter(ours, folder / "theirs"), batch)
    assert relative(second, first) > 1e-3, "another adapter"
    apart["exchanged"] = max(to_peft, relative(second, peft_outputs()))
    assert apart["exchanged"] <= 1e-5
    return apart


def test_linears_that_transformers_does_not_quantise_are_an_error(tmp_path):
    falcon = next(architecture for architecture in ARCHITECTURES if architecture.name == "Falcon").build()
    falcon.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="its linears are FalconLinear"):
        pk.load(str(tmp_path), quantize="int8", device="cpu")


# --------------------------------------------------------------------------------------------------------------- tools


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits in evaluation."""
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def linears(model: nn.Module) -> set[str]:
    """Every linear but the output head and those inside of torch's attention, which are never called."""
    others = [output_head(model), *(module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention))]
    return {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and not any(module is other for other in others)}


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One backward of the loss in training mode: the gradient of everything that trains, zero where none arrived."""
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, _, p in trainable_parameters(model)}


def train(model: nn.Module, batch: dict[str, Tensor], steps: int) -> list[float]:
    """The loss before each step."""
    optimizer = pk.build_optimizer(model, learning_rate=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 4))
    return losses


def adapted_modules(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the modules (or parameters, of experts) with low-rank updates, and of those that train as a whole."""
    layers = adapter_layers(model)
    whole = {name for name, layer in layers.items() if isinstance(layer, SavedModule)}
    return {layer.target(name) for name, layer in layers.items() if name not in whole}, whole


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """What the base of an adapted model stores, by the base's own names."""
    own = {f"{name}.{trained.name}" for name, layer in adapter_layers(model).items() for adapter in layer.specs for trained in layer.role_parameters(adapter)}
    return {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if name not in own}


def assert_same_state(ours: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    assert ours.keys() == base.keys()
    assert [name for name in base if not torch.equal(ours[name], base[name])] == []


# --------------------------------------------------------------------------------------------------------------- table


def test_no_row_is_missing():
    assert list(json.loads(TABLE.read_text())["rows"]) == [architecture.row for architecture in ARCHITECTURES]


def test_the_table_is_that_of_this_run():
    written = json.loads(TABLE.read_text())
    if written["versions"]["transformers"] != transformers.__version__:
        pytest.skip("the table is of another version of transformers, where modules may have other names")
    for (row, method), figures in _seen.items():
        for name in LASTING:
            assert written["rows"][row][method][name] == figures[name], f"{row}, {method}, {name}: run benchmarks/architectures.py"
