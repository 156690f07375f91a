"""The forecast: exact for what can be counted by hand or by autograd, right about what fits, and no weights in it."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from transformers import Gemma2Config, MixtralConfig

import peftkit as pk
from peftkit import quant
from peftkit.amounts import parse_bytes
from peftkit.attention import attend_within_documents
from peftkit.config import ConfigError
from peftkit.data import Example, Examples, Rows
from peftkit.forecast import (
    Budget,
    Forecast,
    Plan,
    Row,
    Sizes,
    Skeleton,
    Workload,
    forecast,
    largest_micro_batch,
    of_micro_batch,
    of_recipe,
    sizes_of,
    with_micro_batch,
    worst,
)
from peftkit.forecast.fit import budget, by_tokens
from peftkit.loss import TokenLoss
from peftkit.memory import count_saved
from peftkit.model import load_config
from peftkit.recipe import load_recipe
from peftkit.train import enable_checkpointing

ROWS, TOKENS = 3, 24


def recipe(methods: list, name: str = "builtin:tiny", quantize: str | None = None, **train):
    model = {"name": name, "dtype": "float32"} | ({"quantize": quantize} if quantize else {})
    data = {"train": "builtin:copy/train", "max_length": TOKENS}
    return load_recipe({"model": model, "methods": methods, "data": data, "train": {"batch_size": ROWS} | train, "output_dir": "unused"})


def skeleton(methods: list, config=None, **options) -> Skeleton:
    return Skeleton(recipe(methods, **options), config or load_config("builtin:tiny"), gpu=False)


def kept_for_backward(model) -> int:
    """Bytes that autograd keeps of one forward of a real model, each storage once; its own tensors left out."""
    ids = torch.randint(3, 90, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, : TOKENS // 2] = -100
    mask[0, -2:] = 0
    loss = TokenLoss(model.train())
    loss.gathers = True
    with count_saved(model) as kept:
        total, _ = loss(labels, input_ids=ids, attention_mask=mask, position_ids=torch.arange(TOKENS).repeat(ROWS, 1))
    total.backward()
    return sum(kept.values())


METHODS = [
    {"lora": {"r": 4, "alpha": 8}},
    {"lora": {"r": 4, "alpha": 8, "dropout": 0.3}},
    {"lora": {"r": 4, "alpha": 8, "init": "pissa"}},
    {"dora": {"r": 4, "alpha": 8}},
    {"lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}},
]


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_activations_are_what_autograd_keeps_of_the_real_model(model, method):
    real = model()
    if model is tiny_gpt2:
        method = {name: {key: value for key, value in options.items() if key != "target_modules"} for name, options in method.items()}
    config = real.config
    pk.attach(real, recipe([method]).build_methods())
    attend_within_documents(real)
    found = forecast(skeleton([method], config), Workload(ROWS, TOKENS, ROWS * TOKENS // 2), accumulates=False)
    assert found.activations == pytest.approx(kept_for_backward(real), rel=0.03)


def test_a_forecast_leaves_nothing_without_data_behind():
    """Trap: constants that were cached while tensors had no data would reach the run that follows in the same process."""
    real = tiny_llama()
    pk.attach(real, pk.DoRA(r=4))
    forecast(skeleton([{"dora": {"r": 4}}], real.config), Workload(ROWS, TOKENS, 8), accumulates=False)
    assert type(real(torch.ones(1, 4, dtype=torch.long)).logits) is torch.Tensor


def test_checkpointing_keeps_what_is_between_the_layers():
    real = tiny_llama()
    pk.attach(real, pk.LoRA(r=4))
    enable_checkpointing(real)
    workload = Workload(ROWS, TOKENS, ROWS * TOKENS // 2)
    plain = forecast(skeleton([{"lora": {"r": 4}}], real.config), workload, False)
    less = forecast(skeleton([{"lora": {"r": 4}}], real.config, gradient_checkpointing=True), workload, False)
    assert less.activations < 0.4 * plain.activations and less.backward > plain.backward and less.total < plain.total
    hidden = ROWS * TOKENS * 64 * 4
    assert less.activations >= 3 * hidden
    selective = forecast(skeleton([{"lora": {"r": 4}}], real.config, gradient_checkpointing="selective"), workload, False)
    assert plain.activations > selective.activations >= less.activations + 2 * hidden, "of both layers the output of attention"


def test_what_is_stored_is_exact():
    real, _ = pk.load("builtin:tiny", dtype="float32")
    pk.attach(real, pk.LoRA(r=8))
    trained = sum(parameter.nbytes for parameter in real.parameters() if parameter.requires_grad)
    found = forecast(skeleton([{"lora": {"r": 8}}]), Workload(1, 8, 4), accumulates=True)
    base = sum(parameter.nbytes for parameter in real.parameters() if not parameter.requires_grad)
    assert found.gradients == trained and 0 <= found.adapters - trained < 64 and found.optimizer == 2 * trained
    assert 0 <= found.weights - base < 4096, "the parameters, and buffers of the rotary embedding"
    assert forecast(skeleton([{"lora": {"r": 8}}]), Workload(1, 8, 4), accumulates=False).gradients == 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_counted_as_it_is_stored(kind):
    real, _ = pk.load("builtin:tiny", quantize=kind, dtype="float32")
    states = [module.weight.quant_state for module in real.modules() if quant.is_4bit(module)]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes + state.state2.code.nbytes + state.code.nbytes for state in states)
    scales += sum(4 * module.out_features for module in real.modules() if quant.is_8bit(module))
    assert skeleton([{"lora": {}}], quantize=kind).weights == pytest.approx(real.get_memory_footprint() + scales, rel=0.01)
    plain = forecast(skeleton([{"lora": {}}]), Workload(1, 8, 4), False)
    packed = forecast(skeleton([{"lora": {}}], quantize=kind), Workload(1, 8, 4), False)
    largest = 512 * 192 * 4
    assert packed.activations == plain.activations and packed.backward >= plain.backward + largest / 2, "a dequantised weight at a time"


def test_full_finetuning_pays_for_every_parameter():
    found = forecast(skeleton([], full_finetuning=True), Workload(2, 16, 8), False)
    assert found.optimizer == pytest.approx(2 * found.weights, rel=0.01) and found.backward + found.activations > found.weights


def test_experts_and_methods_that_ask_for_values():
    config = MixtralConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=96, num_attention_heads=4, num_key_value_heads=2)
    plain = forecast(skeleton([{"lora": {"r": 2}}], config), Workload(2, 16, 8), False)
    packed = forecast(skeleton([{"lora": {"r": 2}}], config, quantize="nf4"), Workload(2, 16, 8), False)
    assert plain.activations > 0 and packed.weights < 0.4 * plain.weights
    noisy = forecast(skeleton([{"lora": {"r": 2, "dropout": 0.1}}, {"neftune": {}}]), Workload(2, 16, 8, documents=3, packed=True), False)
    assert noisy.activations > 0


def test_a_model_that_caps_its_logits_pays_for_all_of_them():
    """Trap: the loss cannot gather before such a head, and a forecast that thinks so is short of rows x tokens x vocabulary."""
    options = dict(num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=4000, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    capped, free = (Gemma2Config(final_logit_softcapping=cap, **options) for cap in (30.0, None))
    workload = Workload(2, 32, 4)
    whole, gathered = (forecast(skeleton([{"lora": {}}], config), workload, False) for config in (capped, free))
    assert whole.training > gathered.training + 2 * 32 * 4000 * 4


def test_the_worst_batch_is_the_longest_rows():
    listed = [Row(10, 5), Row(40, 2), Row(30, 20), Row(5, 1)]
    rows = Sizes.of(listed)
    assert worst(rows, 2) == Workload(2, 40, 25, 1, False, True)
    assert worst(rows, 1) == Workload(1, 40, 20, 1, False, False)
    assert worst(Sizes.of(listed[:2]), 8).rows == 2


def test_the_largest_micro_batch_by_tokens_need_not_hold_the_longest_row():
    """Trap: 550 tokens are a micro-batch by themselves, two rows of 500 are a larger one, and a forecast of the longest row misses it."""
    rows = Sizes.of([Row(550, 50), *[Row(500, 40)] * 3, *[Row(100, 10)] * 4])
    largest, longest = by_tokens(rows, 8)
    assert largest == Workload(2, 512, 80, 1, False, True) and longest == Workload(1, 550, 50, 1, False, False)
    assert by_tokens(rows, 1)[0] == longest, "no more rows than the batch has"
    plan = Plan(Sizes.of([Row(550, 50), *[Row(500, 50)] * 3]))
    bones = skeleton([{"lora": {"r": 4}}])
    rows_at_a_time, found = of_recipe(bones, plan)
    assert rows_at_a_time == 2 and found.activations > 1.5 * of_micro_batch(bones, plan, 1).activations


def test_sizes_are_counted_without_reading_tokens():
    examples = Examples.of([Example([1] * n, [False] + [True] * (n - 1), f"row {n}") for n in (5, 3, 4, 2)])
    for rows in (examples, Rows(examples, [[0, 2], [1, 3]])):
        found = sizes_of(rows)
        counted = [row if isinstance(row, list) else [row] for row in rows]
        assert found.tokens.tolist() == [sum(len(each.input_ids) for each in row) for row in counted]
        assert found.supervised.tolist() == [sum(sum(each.trained) for each in row) for row in counted]
        assert found.documents.tolist() == [len(row) for row in counted]
    assert len(sizes_of(Examples.of([]))) == 0


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    """Trap 18: out of memory forty steps in, at the first long batch."""
    found = Skeleton(recipe([{"lora": {}}], batch_size=12), load_config("builtin:tiny"), gpu=True)
    plan = Plan(Sizes.of([Row(100, 50)] * 3 + [Row(10, 5)] * 20))
    need = [of_micro_batch(found, plan, count).total for count in (1, 5, 6, 12)]
    assert need == sorted(need)
    there = Budget(0, "here", gpu=True)
    assert largest_micro_batch(found, plan, Budget(need[1] + there.reserve(of_micro_batch(found, plan, 5)), "here", True)) == 5
    assert largest_micro_batch(found, plan, Budget(10**12, "here", True)) == 12
    assert largest_micro_batch(found, plan, Budget(need[0], "here", True)) == 0


def test_auto_becomes_a_number_or_an_error_that_says_what_to_do(monkeypatch):
    plan = Plan(Sizes.of([Row(20, 10)] * 8))
    asked = recipe([{"lora": {}}], batch_size=8, micro_batch_size="auto")
    decided, said = with_micro_batch(asked, load_config("builtin:tiny"), plan)
    assert decided.train.micro_batch_size == 8 and "8 rows at a time" in said and asked.train.micro_batch_size == "auto"
    monkeypatch.setattr("peftkit.forecast.fit.budget", lambda: Budget(10**6, "free in this test", False))
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        with_micro_batch(asked, load_config("builtin:tiny"), plan)


def test_run_takes_the_micro_batch_from_the_forecast(tmp_path):
    options = {"batch_size": 4, "max_steps": 2, "learning_rate": 1.0e-3}
    result = pk.run({
        "model": {"name": "builtin:tiny"}, "methods": [{"lora": {"r": 2}}], "data": {"train": "builtin:copy/train", "train_rows": 8},
        "train": options | {"micro_batch_size": "auto"}, "output_dir": str(tmp_path / "run"),
    })  # fmt: skip
    assert result.train["steps"] == 2 and result.recipe["train"]["micro_batch_size"] == "auto"
    assert "micro_batch_size: auto" in (tmp_path / "run" / "recipe.yaml").read_text()


def auto_recipe(folder, **train):
    """Steps with dropout and noise, so that a generator moved by anything would show."""
    return {
        "model": {"name": "builtin:tiny"}, "methods": [{"dora": {"r": 2, "dropout": 0.1}}, {"neftune": {"alpha": 5}}],
        "data": {"train": "builtin:copy/train", "train_rows": 8},
        "train": {"batch_size": 4, "max_steps": 4, "learning_rate": 1.0e-3, "micro_batch_size": "auto", "save_every": 2, **train}, "output_dir": str(folder),
    }  # fmt: skip


def adapter_of(folder):
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def test_trying_the_micro_batch_first_changes_nothing_of_the_run(tmp_path):
    pk.run(auto_recipe(tmp_path / "auto"))
    pk.run(auto_recipe(tmp_path / "told", micro_batch_size=4))
    assert adapter_of(tmp_path / "auto") == adapter_of(tmp_path / "told")


def test_a_micro_batch_that_the_memory_does_not_hold_is_halved(tmp_path, monkeypatch):
    """The forecast may be wrong, so the longest rows go first: before a step is taken, and not hours into the run."""
    forward, tried = TokenLoss.forward, []

    def short_of_memory(self, labels, **inputs):
        if torch.is_grad_enabled():
            tried.append(len(labels))
            if len(labels) > 2:
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return forward(self, labels, **inputs)

    monkeypatch.setattr("peftkit.forecast.with_micro_batch", lambda recipe, *_: (recipe.with_micro_batch(4), "four"))
    monkeypatch.setattr(TokenLoss, "forward", short_of_memory)
    pk.run(auto_recipe(tmp_path / "auto"))
    assert tried == [4] + [2, 2] + 4 * [2, 2]  # beside the gradients of an earlier micro-batch, as in the steps
    assert (tmp_path / "auto/micro_batch_size.json").read_text().strip() == "2"
    pk.run(auto_recipe(tmp_path / "told", micro_batch_size=2))
    assert adapter_of(tmp_path / "auto") == adapter_of(tmp_path / "told")
    monkeypatch.setattr(TokenLoss, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(ConfigError, match="longest row alone"):
        pk.run(auto_recipe(tmp_path / "none") | {"eval": {"before": False}})
    assert not (tmp_path / "none").exists()


def test_a_resumed_run_keeps_the_micro_batch_that_it_began_with(tmp_path, monkeypatch):
    """Another size sums the losses in another order: the bits would differ, and nobody would know why."""
    pk.run(auto_recipe(tmp_path / "run"))
    whole = adapter_of(tmp_path / "run")
    for late in ("result.json", "adapter/adapter_model.safetensors"):
        (tmp_path / "run" / late).unlink()
    monkeypatch.setattr("peftkit.forecast.with_micro_batch", lambda *_: pytest.fail("asked again"))
    pk.run(auto_recipe(tmp_path / "run"), resume=True)
    assert adapter_of(tmp_path / "run") == whole


def test_sizes_of_memory():
    assert parse_bytes("24GB") == 24 * 10**9 and parse_bytes(" 1.5 gib") == 1.5 * 2**30 and parse_bytes("512KB") == 512_000
    for wrong in ("24", "lots", "0GB", "24 Gb/s", "-1GB", "1e3GB"):
        with pytest.raises(ConfigError, match=r"--gpu: .* is no amount of memory; write it as 24GB"):
            budget(wrong)
    assert budget("80GB").gpu and budget().bytes > 10**8


def test_parts_add_up():
    found = Forecast(weights=1, adapters=2, optimizer=4, gradients=8, activations=16, backward=32, evaluation=100)
    assert found.total == 107 and found.to_json()["total"] == 107
    assert json.loads(json.dumps(found.to_json())) == found.to_json()


def test_a_large_model_takes_no_memory_to_forecast():
    """Seven billion parameters: weights that were really made would not fit here."""
    from transformers import LlamaConfig

    found = forecast(skeleton([{"lora": {}}], LlamaConfig(num_hidden_layers=4, vocab_size=128000), quantize="nf4"), Workload(1, 2048, 1000), False)
    assert found.weights > 2**31 and found.activations > 2**30
