"""train.compile: the same losses from compiled blocks, one graph for all of them, none for evaluation; refused where it does not work."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import tiny_llama
from torch import nn

import peftkit as pk
from peftkit.compiling import compile_blocks, uncompiled
from peftkit.config import ConfigError
from peftkit.loss import TokenLoss
from peftkit.recipe import load_recipe

# Dynamo looks at the .grad of the tensors that it traces, and torch warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

RECIPE = {
    "model": {"name": "builtin:tiny", "dtype": "float32"}, "methods": [{"lora": {"r": 4}}], "data": {"train": "builtin:copy/train", "train_rows": 8},
    "train": {"max_steps": 2, "batch_size": 2, "compile": True}, "output_dir": "unused",
}  # fmt: skip


class Graphs:
    """A backend for torch.compile that counts graphs and runs them as they are."""

    def __init__(self):
        self.made, self.calls = 0, 0

    def __call__(self, graph, inputs):
        self.made += 1

        def counted(*args):
            self.calls += 1
            return graph.forward(*args)

        return counted


def step(loss: TokenLoss, length: int) -> tuple[float, torch.Tensor]:
    """(loss, gradients) of two rows."""
    ids = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(length))
    total, _ = loss(ids, input_ids=ids, position_ids=torch.arange(length).repeat(2, 1), attention_mask=torch.ones_like(ids))
    total.backward()
    found = torch.cat([p.grad.flatten() for p in loss.model.parameters() if p.grad is not None])
    loss.model.zero_grad()
    return total.item(), found


def test_compiled_blocks_give_the_same_losses_from_few_graphs():
    model = tiny_llama(num_hidden_layers=3).train()
    pk.attach(model, pk.LoRA(r=4))
    loss, lengths = TokenLoss(model), (17, 23, 31)
    expected = [step(loss, length) for length in lengths]
    names = list(model.state_dict())
    torch.compiler.reset()
    graphs = Graphs()
    assert compile_blocks(model, graphs) == 3 and list(model.state_dict()) == names
    found = [step(loss, length) for length in lengths]
    for (total, gradients), (own, ours) in zip(expected, found, strict=True):
        assert own == pytest.approx(total, rel=1e-5)
        torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-5)
    assert graphs.made <= 2 and graphs.calls == 9, "the first block's input asks for no gradient, the others' do; lengths and layers make no more"
    with uncompiled(), torch.no_grad():
        model.eval()(input_ids=torch.ones(1, 5, dtype=torch.long))
    assert graphs.calls == 9, "evaluation runs uncompiled"
    torch.compiler.reset()


def test_run_compiles_where_the_recipe_says_so(tmp_path, monkeypatch):
    graphs = Graphs()
    monkeypatch.setattr(importlib.import_module("peftkit.run"), "compile_blocks", lambda model: compile_blocks(model, graphs))
    torch.compiler.reset()
    compiled = pk.run(RECIPE | {"output_dir": str(tmp_path / "compiled")})
    assert graphs.calls >= 12 and graphs.made <= 6, "with those of the trial of the loss; one for each layer and step would be many more"
    torch.compiler.reset()
    plain = pk.run(RECIPE | {"output_dir": str(tmp_path / "plain"), "train": RECIPE["train"] | {"compile": False}})
    both = [(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("compiled", "plain")]
    assert compiled.train["steps"] == plain.train["steps"] == 2 and both[0].exists() and both[1].exists()


def test_what_is_not_compiled_is_refused():
    with pytest.raises(ConfigError, match=r"train.compile.*a base in nf4 is not compiled"):
        load_recipe(RECIPE | {"methods": [{"qlora": {"r": 4}}]})
    with pytest.raises(ConfigError, match=r"train.compile.*gradient checkpointing"):
        load_recipe(RECIPE | {"train": RECIPE["train"] | {"gradient_checkpointing": True}})
    with pytest.raises(ValueError, match="Linear has no blocks"):
        compile_blocks(nn.Linear(2, 2))
