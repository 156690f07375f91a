"""Tripwires: each test first reproduces the trap, by letting the tripwire only warn, then sees it stop the run with cause and remedy."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import quantized_llama, tiny_llama
from loops import Loop, examples, inputs
from torch.utils.checkpoint import checkpoint

import peftkit as pk
from peftkit import cli
from peftkit.checkpoint import checkpoints, load_checkpoint
from peftkit.config import ConfigError
from peftkit.layers import adapter_layers
from peftkit.recipe import load_recipe
from peftkit.tripwires import NAMES, TrainingStopped, Tripwires, checksums


def masked_rows():
    """The rows of the second step have their answers masked."""
    rows = examples(8)
    from peftkit.data import DataOrder

    second = DataOrder(8, 4, 0)[1]
    masked = examples(8, supervised=False)
    return [masked[i] if i in second else rows[i] for i in range(8)], [masked[i][0].where for i in second]


def test_a_step_that_teaches_nothing(tmp_path):
    rows, places = masked_rows()
    trap = Loop(rows=rows, max_steps=2, warn_only=["no_supervised_tokens"])
    trap.run(tmp_path)
    assert trap.losses[1] == 0 and "no supervised token" in trap.warnings[0], "the trap: a loss of 0 looks like success"
    with pytest.raises(TrainingStopped, match=r"step 2 has no supervised token.*peftkit check.*raise data.max_length") as stopped:
        Loop(rows=rows, max_steps=2).run(tmp_path)
    assert all(place in str(stopped.value) for place in places)


def reentrant(model):
    """Gradient checkpointing as it was by default for years: over frozen inputs no gradient comes back."""
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("method", [pk.LoRA, pk.DoRA])
def test_adapters_that_do_not_move(method, tmp_path):
    targets = ["q_proj", "down_proj", "lm_head"]
    trap = Loop(method(r=4, target_modules=targets), max_steps=8, warn_only=["adapter_not_moving"])
    reentrant(trap.model)
    trap.run(tmp_path)
    assert trap.losses[-1] < trap.losses[0], "the trap: the head's adapter learns, the loss falls"
    layers = adapter_layers(trap.model)
    assert not layers["model.layers.0.self_attn.q_proj"].b().any() and layers["lm_head"].b().any(), "and no other one does"
    stuck = Loop(method(r=4, target_modules=targets), max_steps=8)
    reentrant(stuck.model)
    with pytest.raises(TrainingStopped, match=r"after 5 steps 4 of 5 adapters have not moved.*model\.layers\.0\.self_attn\.q_proj.*reentrant"):
        stuck.run(tmp_path)
    assert len(stuck.losses) == 5


def test_a_module_that_no_token_passes_through(tmp_path):
    loop = Loop(max_steps=2)
    loop.model.model.layers[1].mlp.forward = lambda hidden: hidden * 0.5
    with pytest.raises(TrainingStopped, match=r"after 2 steps 3 of 14 adapters.*layers\.1\.mlp\.down_proj.*exclude_modules"):
        loop.run(tmp_path)


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"dropout": 0.5}, {"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_that_move_are_let_be(options, tmp_path):
    loop = Loop(pk.LoRA(r=4, **options))
    loop.run(tmp_path)
    assert not loop.warnings and len(loop.losses) == 3


def poisoned_rows(first_step: int):
    """One row of a later step has a token whose embedding is not a number."""
    from peftkit.data import DataOrder

    rows = examples(20)
    index = DataOrder(20, 4, 0)[first_step - 1][2]
    rows[index][0].input_ids[1] = 95
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[95] = math.nan
    return rows, rows[index][0].where, model


def test_a_loss_that_is_no_number(tmp_path):
    rows, place, model = poisoned_rows(3)
    good = Loop(rows=rows, model=model, max_steps=2, save_every=1)
    good.run(tmp_path / "good")
    before = good.trained()
    loop = Loop(rows=rows, model=poisoned_rows(3)[2], max_steps=4, save_every=1, micro_batch_size=1)
    with pytest.raises(TrainingStopped, match=rf"non-finite loss \(nan\).*at step 3, rows: {place}\. Lower train.learning_rate.*--resume"):
        loop.run(tmp_path / "run")
    found = checkpoints(tmp_path / "run")
    assert [path.name for path in found] == ["step-000001", "step-000002"]
    for name, tensor in load_checkpoint(found[-1])[0].items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-3, atol=1e-4)
    assert all(torch.isfinite(parameter).all() for parameter in loop.trained().values()), "the step was not taken"


def test_a_loss_that_is_no_number_can_be_stepped_over(tmp_path):
    rows, place, model = poisoned_rows(2)
    loop = Loop(rows=rows, model=model, max_steps=3, warn_only=["not_finite"])
    loop.run(tmp_path)
    assert [math.isfinite(loss) for loss in loop.losses] == [True, False, True] and place in loop.warnings[0]
    assert all(torch.isfinite(parameter).all() for parameter in loop.trained().values())


def test_a_gradient_that_is_no_number_names_the_step_s_rows(tmp_path):
    loop = Loop(max_steps=1)
    next(iter(adapter_layers(loop.model).values())).b().register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingStopped, match=r"non-finite loss \([\d.]+\) or gradient norm \(inf\) at step 1, rows: rows\.jsonl:\d+, rows"):
        loop.run(tmp_path)


def test_a_loss_that_runs_away(tmp_path):
    options = {"learning_rate": 3.0, "max_steps": 40, "lr_scheduler": "constant"}
    method = pk.LoRA(r=4, target_modules=["q_proj", "down_proj", "lm_head"])  # random hidden states are normed: without the head the loss stays bounded
    trap = Loop(method, **options, warn_only=["loss_rising"])
    trap.run(tmp_path)
    assert trap.losses[-1] > 2 * trap.losses[0] and len(trap.losses) == 40 and len(trap.warnings) == 1, "the trap: it goes on to the end"
    stopped = Loop(method, **options)
    with pytest.raises(TrainingStopped, match=r"the loss diverges: .* median of the last 10 steps.*Lower train.learning_rate"):
        stopped.run(tmp_path)
    assert len(stopped.losses) < 40


def test_a_loss_that_only_wavers_is_let_be():
    tripwires = Tripwires(tiny_llama(), {}, [], print)
    for step in range(200):
        tripwires.rising(1.0 + (step % 7) * 0.3, step)
    for step in range(10):
        tripwires.rising(40.0 if step < 4 else 0.5, step)  # a few bad batches
    tripwires.rising(40.0, 10)
    again = Tripwires(tiny_llama(), {}, [], print)
    again.load_state_dict(tripwires.state_dict())
    for tripped in (tripwires, again):
        with pytest.raises(TrainingStopped, match=r"20\.2 is the median of the last 10 steps up to step 303, 1 the lowest of the first 5"):
            for step in range(300, 306):
                tripped.rising(40.0, step)


def test_noise_of_neftune_and_dropout_in_evaluation(tmp_path):
    methods = [pk.LoRA(r=4, dropout=0.3), pk.NEFTune(alpha=50)]
    trap = Loop(*methods, eval_every=2, warn_only=["noise_in_evaluation"])

    def careless() -> float:  # the model is in training mode, and gradients are on
        return float(trap.loss(**inputs(trap.rows))[0].detach())

    trap.run(tmp_path, evaluate=careless)
    assert careless() != careless(), "the trap: every evaluation finds something else"
    loop = Loop(*methods, eval_every=2)
    with pytest.raises(TrainingStopped, match=r"noise is active in evaluation \(at step 2\).*torch, NEFTune") as stopped:
        loop.run(tmp_path, evaluate=lambda: float(loop.loss(**inputs(loop.rows))[0].detach()))
    assert "in eval mode" in str(stopped.value)
    quiet = Loop(*methods, eval_every=2)
    quiet.run(tmp_path, evaluate=quiet.evaluate)
    assert [step for step, _ in quiet.evaluations] == [2, 3]


def test_dropout_that_does_not_know_of_evaluation(tmp_path):
    loop = Loop(eval_every=1)
    loop.model.model.embed_tokens.register_forward_hook(lambda module, args, output: F.dropout(output, 0.1, training=True))
    assert loop.evaluate() != loop.evaluate(), "the trap"
    with pytest.raises(TrainingStopped, match=r"noise is active.*functional dropout with training=self.training"):
        loop.run(tmp_path, evaluate=loop.evaluate)


@pytest.mark.parametrize("when", ["checkpoint", "end"])
def test_a_base_that_changed(when, tmp_path):
    def write(model):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.base_layer.weight[3] += 0.5  # one row of one frozen weight

    options = {"save_every": 2} if when == "checkpoint" else {}
    trap = Loop(**options, warn_only=["base_changed"])
    trap.run(tmp_path / "trap", on_step=lambda step: write(trap.model))
    pk.save_adapter(trap.model, tmp_path / "adapter")
    fresh = Loop()
    pk.load_adapter(fresh.model, tmp_path / "adapter", another_base=True)
    assert abs(fresh.evaluate() - trap.evaluate()) > 1e-3, "the trap: on the base as it was, the adapter is another model"
    loop = Loop(**options)
    cause = r"1 frozen weights of the base changed.*up to step 2.*layers\.1\.mlp\.up_proj" if when == "checkpoint" else r"1 frozen weights.*at the end"
    with pytest.raises(TrainingStopped, match=cause):
        loop.run(tmp_path / "run", on_step=lambda step: write(loop.model))
    assert not checkpoints(tmp_path / "run")


def test_the_sum_of_bits_sees_one_value_of_any_dtype(saved_llama):
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.float64):
        for size in (1, 7, 64):
            whole = torch.arange(size + 1).to(dtype)
            for view in (whole[1:], whole[1:].reshape(-1, 1).expand(size, 2)):
                before = checksums({"a": view})
                whole[size] += 1
                assert checksums({"a": view}) != before
    four_bits = quantized_llama(saved_llama)
    weight = dict(four_bits.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    before = checksums({"w": weight})
    weight.data.view(-1)[5] ^= 1
    assert checksums({"w": weight}) != before


def test_a_quantised_base_stays(saved_llama, tmp_path):
    loop = Loop(pk.LoRA(r=4), model=quantized_llama(saved_llama), eval_every=1, save_every=1)
    loop.run(tmp_path, evaluate=loop.evaluate)
    assert not loop.warnings and len(loop.losses) == 3


def test_each_can_be_named_in_a_recipe_and_no_other():
    recipe = {"model": {"name": "builtin:tiny"}, "methods": ["lora"], "data": {"train": "builtin:copy/train"}, "output_dir": "run"}
    assert load_recipe(recipe | {"train": {"warn_only": list(NAMES)}}).train.warn_only == list(NAMES)
    with pytest.raises(ConfigError, match="loss_raising"):
        load_recipe(recipe | {"train": {"warn_only": ["loss_raising"]}})


def test_the_command_ends_with_1_and_the_cause(tmp_path, capsys):
    made = {
        "model": {"name": "builtin:tiny", "dtype": "float32"},
        "methods": ["lora"],
        "data": {"train": "builtin:tool-calls/train", "train_rows": 32},
        "train": {"learning_rate": 300.0, "max_steps": 60, "batch_size": 2, "lr_scheduler": "constant", "max_grad_norm": 1e9},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.json").write_text(json.dumps(made))
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(tmp_path / "recipe.json")])
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in told and "\x1b" not in told
    assert "failed:" in told and "Lower train.learning_rate" in " ".join(told.split()) and "warn_only: [no_gradient]" in told


def test_a_model_whose_logits_stand_still_is_no_training():
    """The trap: it diverged until every logit is the same, whose loss is below that of the start, and no gradient comes back."""
    wires = Tripwires(torch.nn.Linear(2, 2), {}, [], print)
    for step in range(1, 5):
        wires.learning(7.6, 0.0, step)
    wires.learning(7.6, 0.1, 5)  # it came back
    for step in range(6, 11):
        wires.learning(0.0, 0.0, step)  # all learnt
    for step in range(11, 15):
        wires.learning(7.6, 0.0, step)
    again = Tripwires(torch.nn.Linear(2, 2), {}, [], print)
    again.load_state_dict(wires.state_dict())
    with pytest.raises(TrainingStopped, match=r"zero in the last 5 steps up to step 15, at a loss of 7.6.*Lower train\.learning_rate"):
        again.learning(7.6, 0.0, 15)
