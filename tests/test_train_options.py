"""What train's options do: which activations are kept, 8-bit optimizers, trackers, progress; and how often the host waits."""

from __future__ import annotations

import gc
import io
import json
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from conftest import tiny_llama
from loops import Loop
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import peftkit as pk
from peftkit import trackers
from peftkit.activations import enable_checkpointing
from peftkit.config import ConfigError
from peftkit.console import Bar, bar
from peftkit.loss import TokenLoss
from peftkit.recipe import load_recipe
from peftkit.result import MetricsLog, plot_loss
from peftkit.trackers import flat
from peftkit.train import MICRO_TOKENS, micro_batches_of


class Count(TorchDispatchMode):
    """Counts operators by a part of their name."""

    def __init__(self, part: str):
        super().__init__()
        self.part, self.found = part, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.found += self.part in str(operator)
        return operator(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------------- checkpointing


def tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) is torch.Tensor and each.device.type == "cpu":
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


def long_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, 96), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def cost(kind) -> tuple[float, int, int, int, dict[str, torch.Tensor]]:
    """(loss, bytes kept for backward, times that attention and linears are computed, gradients)."""
    model = tiny_llama()
    torch.manual_seed(0)
    pk.attach(model, pk.LoRA(r=4))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    enable_checkpointing(model, kind)
    model.train()
    loss, batch = TokenLoss(model), long_batch()
    loss.gathers = True  # not the trial of the first batch
    before = tensor_bytes()
    with Count("scaled_dot_product") as attention, Count("aten.addmm") as linears:
        total, _ = loss(**batch)
        kept = tensor_bytes() - before
        total.backward()
    return float(total.detach()), kept, attention.found, linears.found, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_selective_checkpointing_keeps_attention_and_computes_the_rest_again():
    none, full, selective = cost(False), cost(True), cost("selective")
    assert none[0] == pytest.approx(full[0], rel=1e-6) == pytest.approx(selective[0], rel=1e-6)
    for name, gradient in none[4].items():
        torch.testing.assert_close(full[4][name], gradient, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(selective[4][name], gradient, rtol=1e-5, atol=1e-6)
    forward_and_backward = none[2]  # attention's backward has "scaled_dot_product" in its name too
    assert full[2] == forward_and_backward + 2, "both layers' attention is computed again"
    assert selective[2] == forward_and_backward, "and here it is not"
    assert full[3] == selective[3] > none[3], "linears are"
    assert full[1] < selective[1] < none[1]
    output = 2 * 96 * 64 * 4  # rows x tokens x width, fp32
    assert 2 * output <= selective[1] - full[1] <= 4 * output, "one output and its normalisers a layer"


def test_a_run_with_selective_checkpointing_and_dropout_is_that_without(tmp_path):
    losses = []
    for kind in (False, True, "selective"):
        loop = Loop(pk.LoRA(r=4, dropout=0.3), max_steps=3)
        enable_checkpointing(loop.model, kind)
        loop.run(tmp_path / str(kind))
        losses.append(loop.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def made(**train) -> dict[str, Any]:
    return {
        "model": {"name": "builtin:tiny", "dtype": "float32"},
        "methods": [{"lora": {"r": 4}}],
        "data": {"train": "builtin:tool-calls/train", "eval": "builtin:tool-calls/test", "train_rows": 16, "eval_rows": 4},
        "train": {"max_steps": 2, "batch_size": 4, "log_every": 1} | train,
        "output_dir": "run",
    }


def test_selective_needs_fused_attention():
    recipe = made(gradient_checkpointing="selective")
    assert load_recipe(recipe).train.gradient_checkpointing == "selective"
    recipe["model"]["attention"] = "eager"
    with pytest.raises(ConfigError, match=r"selective keeps the output of fused attention, and eager has none"):
        load_recipe(recipe)
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        load_recipe(made(gradient_checkpointing="some"))


# ------------------------------------------------------------------------------------------------- optimizers


def test_adamw_with_8_bit_states(tmp_path):
    model = tiny_llama(hidden_size=128, intermediate_size=512)
    loop = Loop(pk.LoRA(r=32), pk.LoRAPlus(ratio=4), model=model, optimizer="adamw_8bit", max_steps=4, save_every=2)
    assert type(loop.optimizer).__name__ == "AdamW8bit" and {group["lr"] for group in loop.optimizer.param_groups} == {0.01, 0.04}
    loop.run(tmp_path)
    kinds = {state["state1"].dtype for state in loop.optimizer.state.values()}
    assert torch.uint8 in kinds and len(set(loop.losses)) == 4
    again = Loop(
        pk.LoRA(r=32), pk.LoRAPlus(ratio=4), model=tiny_llama(hidden_size=128, intermediate_size=512), optimizer="adamw_8bit", max_steps=4, save_every=2
    )
    again.run(tmp_path, resume=True)
    assert again.losses == loop.losses[2:]


# ------------------------------------------------------------------------------------------------------ waits of the host


class Unasking(torch.nn.Module):
    """A loss that asks nothing of the device: transformers' masks do, once a forward, which is not the loop's doing."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, labels, **inputs):
        return sum(p.sum() for p in self.model.parameters() if p.requires_grad), (labels != -100).sum()


def test_the_host_waits_as_often_for_many_micro_batches_as_for_one(tmp_path):
    counts = []
    for micro in (4, 1):
        loop = Loop(max_steps=1, micro_batch_size=micro)
        loop.loss = Unasking(loop.model)
        with Count("_local_scalar_dense") as count:
            loop.run(tmp_path / str(micro))
        counts.append(count.found)
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------------------------------- watching


class Notebook(GeneralTracker):
    """A tracker that only remembers."""

    name, requires_logging_directory = "trackio", False
    started: list[str] = []
    config: dict[str, Any] = {}
    lines: list[tuple[int, dict]] = []
    finished = 0

    def __init__(self, run_name: str, **options):
        super().__init__()
        Notebook.started.append(run_name)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values: dict):
        Notebook.config = values

    def log(self, values: dict, step: int | None, **options):
        Notebook.lines.append((step, values))

    def finish(self):
        Notebook.finished += 1


def test_trackers_are_told_what_the_log_is_told(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name == "trackio")
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType.TRACKIO])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Notebook)
    result = pk.run(made(report_to=["trackio"], eval_every=1))
    assert Notebook.started == ["peftkit"] and Notebook.finished == 1
    assert Notebook.config["train.report_to.0"] == "trackio" and Notebook.config["methods.0.lora.r"] == 4
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in Notebook.lines[:-1]] == lines and [line["step"] for line in lines] == [1, 1, 2, 2]
    assert Notebook.lines[-1] == (2, {"after/loss": result.after["loss"]})


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_tracker_that_is_not_installed_is_told_before_anything(name, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"train.report_to: {name} is not installed; `pip install {name}`"):
        load_recipe(made(report_to=[name]))
    with pytest.raises(ConfigError, match="report_to"):
        load_recipe(made(report_to=["visdom"]))


def test_a_recipe_for_trackers():
    assert flat({"a": {"b": [1, {"c": None}], "d": True}, "e": "x"}) == {"a.b.0": 1, "a.b.1.c": "None", "a.d": True, "e": "x"}


def test_progress_in_a_log_file_has_the_time_left_and_no_escape_codes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("peftkit.console.time.monotonic", lambda: now[0])
    file = io.StringIO()
    with bar(Console(file=file), "training", 110, done=10) as shown:
        assert isinstance(shown, Bar) and shown.progress is None
        for step in range(20):
            now[0] += 10.0
            shown.advance(1, f"loss {step}")
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue() and lines[0].split("  ") == ["training 12/110", "loss 1", "16 min left"]
    assert lines[-1].startswith("training 30/110") and 5 < len(lines) < 15


def test_the_picture_shows_evaluations_on_the_way(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2):
        log.write({"step": step, "loss": 2.0})
        log.write({"step": step, "eval_loss": 3.0})
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", 4.0, 3.0)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_micro_batches_by_tokens():
    """Where the recipe names no size: as many rows as make so many tokens with their padding, rows of like length together, each once."""
    rows = [3, 450, 40, 1050, 500, 41, 5, 512]
    parts = micro_batches_of(rows, None, lambda row: row)
    assert parts == [[1050], [512, 500], [450, 41], [40, 5, 3]] and MICRO_TOKENS == 1024
    assert micro_batches_of(rows, 3, lambda row: row) == [[3, 450, 40], [1050, 500, 41], [5, 512]]
    assert micro_batches_of([], None, lambda row: row) == []
