"""The optimizer's groups, the schedules, and the order of the rows."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import quantized_llama, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import peftkit as pk
from peftkit.data import DataOrder
from peftkit.layers import adapter_layers, trainable_parameters
from peftkit.optim import optimizer_groups, schedule


def test_one_group_per_role():
    model = tiny_llama()
    pk.attach(model, pk.DoRA(r=2))
    optimizer = pk.build_optimizer(model, learning_rate=3e-4, weight_decay=0.01, betas=(0.8, 0.95))
    assert type(optimizer) is torch.optim.AdamW
    assert [group["role"] for group in optimizer.param_groups] == ["A", "B", "magnitude"]
    assert {(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups} == {(3e-4, 0.01, (0.8, 0.95))}
    listed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(listed) == len(set(listed)) == 14 * 3
    assert set(listed) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_a_model_without_adapters_trains_in_full():
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    [group] = pk.build_optimizer(model, learning_rate=1e-4).param_groups
    assert group["role"] == "full" and len(group["params"]) == len(list(model.parameters())) - 1


def test_what_is_unfrozen_beside_adapters_has_its_own_group():
    model = tiny_llama()
    pk.attach(model, [pk.LoRA(r=2), pk.LoRAPlus(ratio=4)])
    model.lm_head.requires_grad_(True)
    groups = {group["role"]: group for group in pk.build_optimizer(model, learning_rate=1e-3).param_groups}
    assert groups.keys() == {"A", "B", "full"} and groups["full"]["lr"] == 1e-3 and groups["B"]["lr"] == 4e-3
    assert groups["full"]["params"] == [model.lm_head.weight]


def test_weight_decay_shrinks_every_role():
    model = tiny_llama()
    pk.attach(model, [pk.DoRA(r=2, target_modules=["q_proj"]), pk.LoRAPlus(ratio=2)])
    for layer in adapter_layers(model).values():
        torch.nn.init.ones_(layer.b())
    before = {name: parameter.detach().clone() for name, _, parameter in trainable_parameters(model)}
    optimizer = pk.build_optimizer(model, learning_rate=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, role, parameter in trainable_parameters(model):
        torch.testing.assert_close(parameter, before[name] * (1 - 0.5 * (0.2 if role == "B" else 0.1)))


def test_nothing_to_train_is_an_error():
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing trains in this model; call peftkit\.attach first"):
        pk.build_optimizer(model)
    pk.attach(model, pk.NEFTune())
    with pytest.raises(ValueError, match="nothing trains"):
        optimizer_groups(model, 1e-3, 0.0)


def test_paged_optimizer_needs_a_gpu_and_names_are_known(saved_llama):
    model = quantized_llama(saved_llama)
    pk.attach(model, pk.QLoRA(r=2))
    with pytest.raises(ValueError, match="paged_adamw_8bit needs the model on a GPU; use adamw here"):
        pk.build_optimizer(model, optimizer="paged_adamw_8bit")
    with pytest.raises(ValueError, match=r"unknown optimizer 'adam' \(there are: auto, adamw, adamw_8bit, paged_adamw_8bit\)"):
        pk.build_optimizer(model, optimizer="adam")
    assert type(pk.build_optimizer(model)) is torch.optim.AdamW, "auto on a CPU"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_qlora_on_a_gpu_takes_the_paged_optimizer(saved_llama):
    model, _ = pk.load(str(saved_llama), quantize="nf4")
    pk.attach(model, pk.QLoRA(r=2))
    assert type(pk.build_optimizer(model)).__name__ == "PagedAdamW8bit"


# ----------------------------------------------------------------------------------------------------------- schedules


def values(kind: str, steps: int = 10, warmup_ratio: float = 0.2) -> list[float]:
    return [schedule(kind, steps, warmup_ratio)(step) for step in range(steps + 1)]


def test_schedules_by_hand():
    assert values("constant") == [0.5, 1.0] + [1.0] * 9
    assert values("linear") == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0])
    assert values("cosine") == pytest.approx([0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(9)])


def test_schedules_without_warm_up_and_with_nothing_else():
    assert values("linear", steps=4, warmup_ratio=0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert values("linear", steps=4, warmup_ratio=1)[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert values("cosine", steps=1, warmup_ratio=0.03)[0] == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(kind=st.sampled_from(["linear", "cosine", "constant"]), steps=st.integers(1, 300), warmup_ratio=st.floats(0, 1))
def test_every_step_of_a_schedule_trains_and_none_goes_above_the_peak(kind, steps, warmup_ratio):
    factor = schedule(kind, steps, warmup_ratio)
    course = [factor(step) for step in range(steps)]
    assert all(0 < value <= 1 for value in course) and max(course) == 1
    top = course.index(1)
    assert course[: top + 1] == sorted(course[: top + 1]) and course[top:] == sorted(course[top:], reverse=True)
    assert factor(steps + 5) >= 0


# ------------------------------------------------------------------------------------------------------- order of rows


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), batch_size=st.integers(1, 17), seed=st.integers(0, 99))
def test_every_row_comes_once_an_epoch(rows, batch_size, seed):
    order = DataOrder(rows, batch_size, seed)
    seen = [row for step in range(3 * rows) for row in order[step]]
    for epoch in range(len(seen) // rows):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_any_step_can_be_asked_for():
    order = DataOrder(50, 8, seed=3)
    course = [order[step] for step in range(20)]
    for step in (19, 0, 7, 6):
        assert DataOrder(50, 8, seed=3)[step] == course[step] == order[step]
    assert course != [DataOrder(50, 8, seed=4)[step] for step in range(20)]
    assert course[0] + course[1] != sorted(course[0] + course[1])
    flat = [row for batch in course for row in batch]
    assert flat[:50] != flat[50:100], "shuffled anew"
