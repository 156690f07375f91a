"""Averaging adapters: the update written is the combination of the updates, against dense fp64 sums and against peft."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, wake
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.merge_utils import dare_linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import peftkit as pk
from peftkit.average import AverageReport, average
from peftkit.average.algebra import dare, factored_norm, ties, truncate, truncate_factors
from peftkit.checkpoint import CheckpointError
from peftkit.cli import main
from peftkit.config import ConfigError

WEIGHTS = [0.5, 0.3, -0.4]


def adapter(folder: Path, model: nn.Module, seed: int = 0, **config) -> Path:
    """An adapter with a trained update, written by peft."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on options that are meant here
        adapted = get_peft_model(model, LoraConfig(**config))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def llama_adapter(folder: Path, seed: int = 0, **config) -> Path:
    return adapter(folder, tiny_llama(), seed, **{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **config})


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """Three adapters of other ranks and scales on the same modules."""
    return [
        llama_adapter(tmp_path / "first", 1, r=2, lora_alpha=3),
        llama_adapter(tmp_path / "second", 2, r=8, lora_alpha=4, use_rslora=True),
        llama_adapter(tmp_path / "third", 3, r=4, lora_alpha=12),
    ]


def deltas(folder: Path) -> dict[str, Tensor]:
    """Module -> s B A in fp64, read by no code of peftkit: plain linears, one rank for all or by full names."""
    config, state = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in state:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            a, b = state[key].double(), state[f"{name}.lora_B.weight"].double()
            alpha = config["alpha_pattern"].get(name.removeprefix("base_model.model."), config["lora_alpha"])
            found[name] = alpha / (len(a) ** 0.5 if config["use_rslora"] else len(a)) * (b @ a)
    return found


def weighted(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    each = [deltas(folder) for folder in folders]
    return {name: sum(w * delta[name] for w, delta in zip(weights, each, strict=True) if name in delta) for name in set().union(*each)}


def merged(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The weights of `model` with the adapter merged by peft."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()
    assert not any("missing" in str(warning.message).lower() for warning in said)
    return state


def assert_close(ours: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-6) -> None:
    assert ours.keys() == wanted.keys() and wanted
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name].to(ours[name].dtype), rtol=bound, atol=bound * wanted[name].abs().max().item(), msg=name)


# ----------------------------------------------------------------------------------------------------------------- linear


def test_the_exact_sum_by_concatenation(three, tmp_path):
    report = average(three, WEIGHTS, tmp_path / "sum")
    assert_close(deltas(tmp_path / "sum"), weighted(three, WEIGHTS))
    assert set(report.ranks.values()) == {14} and report.error < 1e-7 and "exact" in str(report)
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (14, 14, False), "the scales are in the factors"
    assert {tensor.dtype for tensor in load_file(tmp_path / "sum" / "adapter_model.safetensors").values()} == {torch.float32}
    card = json.loads((tmp_path / "sum" / "peftkit.json").read_text())
    assert [part["weight"] for part in card["average"]["of"]] == WEIGHTS


def test_equal_weights_are_the_default(three, tmp_path):
    assert average(three, None, tmp_path / "mean").weights == [1 / 3] * 3
    assert_close(deltas(tmp_path / "mean"), weighted(three, [1 / 3] * 3))


def test_it_loads_in_peft_and_here_and_is_the_averaged_model(three, tmp_path, ids):
    average(three, WEIGHTS, tmp_path / "sum")
    plain = tiny_llama()
    with torch.no_grad():
        for name, delta in weighted(three, WEIGHTS).items():
            plain.get_submodule(name.removeprefix("base_model.model.")).weight += delta.float()
        wanted, base = plain.eval()(input_ids=ids).logits, tiny_llama().eval()(input_ids=ids).logits
        peft_model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "sum")).eval()
        ours = pk.load_adapter(tiny_llama(), tmp_path / "sum").eval()
        assert (wanted - base).abs().max() > 0.05
        torch.testing.assert_close(peft_model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_peftkit_can_be_averaged(three, tmp_path, ids):
    model = tiny_llama()
    pk.attach(model, pk.LoRA(r=3, alpha=6, target_modules=["q_proj", "down_proj"]))
    wake(model)
    pk.save_adapter(model, tmp_path / "ours")
    average([tmp_path / "ours", three[0]], [1, 1], tmp_path / "sum")
    assert_close(deltas(tmp_path / "sum"), weighted([tmp_path / "ours", three[0]], [1, 1]))


def peft_combination(folders: list[Path], weights: list[float], kind: str, **options) -> dict[str, Tensor]:
    """Module -> update of peft's own combination of the adapters."""
    model = PeftModel.from_pretrained(tiny_llama(), str(folders[0]), adapter_name="0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(i))
    model.add_weighted_adapter([str(i) for i in range(len(folders))], weights, "all", combination_type=kind, **options)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: layer.get_delta_weight("all").double() for name, layer in layers.items()}


@pytest.mark.parametrize("rank", [None, 5, 14])
def test_against_pefts_cat_and_svd(three, tmp_path, rank):
    average(three, WEIGHTS, tmp_path / "sum", rank=rank)
    wanted = peft_combination(three, WEIGHTS, "cat") if rank is None else peft_combination(three, WEIGHTS, "svd", svd_rank=rank)
    assert_close(deltas(tmp_path / "sum"), wanted, 1e-4)


def test_averaging_a_and_b_apart_is_another_model(tmp_path):
    """peft's combination_type linear, the usual way: with equal ranks it mixes A of one adapter with B of the other."""
    two = [llama_adapter(tmp_path / "one", 1), llama_adapter(tmp_path / "two", 2)]
    average(two, None, tmp_path / "mean")
    right, apart = deltas(tmp_path / "mean"), peft_combination(two, [0.5, 0.5], "linear")
    for name, delta in right.items():
        assert (apart[name] - delta).norm() > 0.5 * delta.norm()


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_truncation_is_the_best_there_is_and_its_error_is_told(three, tmp_path, rank):
    report = average(three, WEIGHTS, tmp_path / "short", rank=rank)
    wanted, ours, lost, whole = weighted(three, WEIGHTS), deltas(tmp_path / "short"), 0.0, 0.0
    for name, delta in wanted.items():
        values = torch.linalg.svdvals(delta)
        assert torch.linalg.matrix_rank(ours[name], rtol=1e-5) == rank
        best = values[rank:].norm() / values.norm()
        assert report.errors[name.removeprefix("base_model.model.")] == pytest.approx(best.item(), rel=1e-4)
        assert ((ours[name] - delta).norm() / delta.norm()).item() == pytest.approx(best.item(), rel=1e-4)
        lost, whole = lost + values[rank:].square().sum().item(), whole + values.square().sum().item()
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    worst = max(report.errors, key=lambda name: report.errors[name])
    assert f"{report.errors[worst]:.3%} in {worst}" in str(report) and f"{report.error:.3%} overall" in str(report)


def test_averages_can_be_averaged(three, tmp_path):
    average(three[:2], [0.5, 0.25], tmp_path / "part")
    average([tmp_path / "part", three[2]], [2, -0.5], tmp_path / "whole")
    assert_close(deltas(tmp_path / "whole"), weighted(three, [1.0, 0.5, -0.5]))


def test_one_adapter_is_scaled_or_shortened(three, tmp_path):
    report = average(three[1:2], [-2], tmp_path / "scaled", rank=8)
    assert report.error < 1e-6 and "exact" in str(report)
    assert_close(deltas(tmp_path / "scaled"), weighted(three[1:2], [-2]))


def test_updates_that_cancel_out_are_said(three, tmp_path):
    report = average([three[1], three[1]], [1, -1], tmp_path / "nothing")
    assert report.error == 0 and set(report.errors.values()) == {0.0} and "4 modules cancel out or are zero" in str(report)
    assert all(delta.abs().max() < 1e-7 for delta in deltas(tmp_path / "nothing").values())


def test_the_update_is_never_built(tmp_path):
    """300,000 x 300,000 in fp64 would be 720 GB."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        state = {f"base_model.model.wide.lora_{side}.weight": torch.randn(shape) for side, shape in {"A": (2, 300_000), "B": (300_000, 2)}.items()}
        save_file(state, tmp_path / name / "adapter_model.safetensors")
        LoraConfig(r=2, lora_alpha=2, target_modules=["wide"]).save_pretrained(str(tmp_path / name))
    report = average([tmp_path / "one", tmp_path / "two"], None, tmp_path / "mean", rank=3)
    assert report.ranks == {"wide": 3} and 0.1 < report.error < 0.7


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31))
def test_best_approximations_of_any_shape(inputs, outputs, inner, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, inner, inputs), (2, outputs, inner)))
    b[0, : outputs // 2] = 0
    delta = b @ a
    rank = min(rank, inputs, outputs)
    assert factored_norm(a, b) == pytest.approx(delta.norm().item(), rel=1e-9)
    values = torch.linalg.svdvals(delta)[:, rank:].square().sum().sqrt().item()
    for short_a, short_b in (truncate_factors(a, b, rank), truncate(delta, rank)):
        assert short_a.shape[1] <= rank and short_a.shape[2] == inputs and short_b.shape[1] == outputs
        assert (short_b @ short_a - delta).norm().item() == pytest.approx(values, rel=1e-6, abs=1e-7 * delta.norm().item())


# ---------------------------------------------------------------------------------------------------------- ties and dare


def test_ties_by_hand():
    first, second = torch.tensor([4.0, -3, 1, 2]).double(), torch.tensor([-2.0, -5, 1, 0.5]).double()
    # Half are kept: (4, -3, 0, 0) and (-2, -5, 0, 0); signs +, -; means of those that agree: 4 and -4.
    found = ties(torch.stack([first, second]), torch.tensor([0.5, 0.5]).double(), 0.5, 1.0)
    assert found.tolist() == [4, -4, 0, 0]
    # A negative weight turns its update round: (4, -3) and (2, 5) with |weights| 0.5 and 1: +(2 + 2) / 1.5, +5 / 1.
    found = ties(torch.stack([first, second]), torch.tensor([0.5, -1]).double(), 0.5, 1.5)
    assert found.tolist() == [4, 7.5, 0, 0]


def test_ties_without_conflict_or_trimming_is_the_weighted_sum():
    same = torch.rand(3, 5, 7, dtype=torch.float64) + 0.1
    weights = torch.tensor([0.5, 0.2, 0.9]).double()
    torch.testing.assert_close(ties(same, weights, 1.0, 1.6), torch.tensordot(weights, same, 1))


def ties_of_the_paper(each: list[Tensor], density: float) -> Tensor:
    """Algorithm 1 entry by entry, with lambda = 1."""
    trimmed = []
    for values in (delta.flatten().tolist() for delta in each):
        kept = set(sorted(range(len(values)), key=lambda i: -abs(values[i]))[: round(density * len(values))])
        trimmed.append([value if i in kept else 0.0 for i, value in enumerate(values)])
    out = []
    for values in zip(*trimmed, strict=True):
        sign = 1 if sum(values) > 0 else -1
        agree = [value for value in values if value * sign > 0]
        out.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(out, dtype=torch.float64).view(each[0].shape)


def test_ties_is_the_papers(three, tmp_path):
    report = average(three, None, tmp_path / "ties", rank=64, method="ties", density=0.25)
    each = [deltas(folder) for folder in three]
    wanted = {name: ties_of_the_paper([delta[name] for delta in each], 0.25) for name in each[0]}
    assert_close(deltas(tmp_path / "ties"), wanted, 1e-6)  # at full rank nothing is truncated
    assert report.error < 1e-6


@pytest.mark.parametrize("rank", [None, 6])
def test_ties_against_pefts_ties_svd(three, tmp_path, rank):
    """peft weighs after the mean: its weights 1 are the paper's lambda 1, which are our 1/n."""
    report = average(three, None, tmp_path / "ties", rank=rank, method="ties", density=0.5)
    wanted = peft_combination(three, [1.0, 1.0, 1.0], "ties_svd", density=0.5, svd_rank=rank or 14)
    assert_close(deltas(tmp_path / "ties"), wanted, 2e-3)
    assert set(report.ranks.values()) == {rank or 14} and 0.01 < report.error < 1 and "relative error of the update" in str(report)


def test_dare_against_pefts_dare_linear():
    """The masks come from torch in the same order."""
    each, weights = torch.randn(3, 8, 11), torch.tensor([0.7, -0.4, 1.1])
    torch.manual_seed(9)
    wanted = dare_linear(list(each), weights, density=0.25)
    torch.testing.assert_close(dare(each.double(), weights.double(), 0.25, torch.Generator().manual_seed(9)).float(), wanted)


def test_dare_drops_and_rescales(tmp_path):
    folder = llama_adapter(tmp_path / "one", 1)
    average([folder], [0.5], tmp_path / "dare", rank=64, method="dare", density=0.3)
    for name, delta in deltas(folder).items():
        found = deltas(tmp_path / "dare")[name]
        kept = found.abs() > 1e-5 * delta.abs().max()
        torch.testing.assert_close(found[kept], (0.5 * delta / 0.3)[kept], rtol=1e-3, atol=1e-5)
        assert kept.double().mean().item() == pytest.approx(0.3, abs=0.05)


def test_dare_is_the_weighted_sum_on_average():
    generator = torch.Generator().manual_seed(0)
    each, weights = torch.randn(2, 6, 7, generator=generator).double(), torch.tensor([0.5, -1]).double()
    wanted = torch.tensordot(weights, each, 1)
    draws = torch.stack([dare(each, weights, 0.5, generator) for _ in range(400)])
    assert (draws.mean(0) - wanted).norm() < 0.1 * wanted.norm() < (draws[0] - wanted).norm()


def test_dare_is_its_seed(three, tmp_path):
    for name, seed in {"a": 1, "b": 1, "c": 2, "d": None, "e": 0}.items():
        average(three, None, tmp_path / name, method="dare", seed=seed)
    a, b, c, d, e = (deltas(tmp_path / name) for name in "abcde")
    assert all(torch.equal(a[name], b[name]) and torch.equal(d[name], e[name]) and not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_a_density_of_one_drops_nothing(three, tmp_path, method):
    average(three, [1, 0, 0], tmp_path / "all", method=method, density=1)
    assert_close(deltas(tmp_path / "all"), weighted(three, [1, 0, 0]), 1e-5)


# --------------------------------------------------------------------------------------- everything that peft's files hold


class Net(nn.Module):
    """A module of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv, self.point = nn.Embedding(12, 6), nn.Conv2d(3, 5, 3), nn.Conv1d(4, 6, 1)
        self.linear, self.head = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(self.embed(x)))


def mixtral(layers: int = 1) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4
        )
    )


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"0.self_attn.k_proj": 1}}
KINDS = {
    "patterns": (tiny_llama, {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"], **PATTERNS}),
    "embedding": (Net, {"r": 2, "target_modules": ["embed", "linear"]}),
    "convolutions": (Net, {"r": 2, "target_modules": ["conv", "point", "linear"]}),
    "biases": (Net, {"r": 2, "target_modules": ["linear"], "bias": "all"}),
    "modules_to_save": (Net, {"r": 2, "target_modules": ["linear"], "modules_to_save": ["head"]}),
    "tokens": (tiny_llama, {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 3]}}),
    "experts": (mixtral, {"r": 2, **EXPERTS}),
}  # fmt: skip


def best(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of a weight's update, of each expert's by itself."""
    matrices = delta if delta.ndim == 3 and len(delta) == 4 else delta.flatten(1)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :]).view(delta.shape)


@pytest.mark.parametrize("kind,rank", [*((kind, None) for kind in KINDS), ("embedding", 3), ("convolutions", 3), ("experts", 3)])
def test_every_kind_against_pefts_merged_weights(kind, rank, tmp_path):
    """W + sum w_i (W_i - W), where peft merged each adapter, is W with the average merged."""
    build, config = KINDS[kind]
    folders = [adapter(tmp_path / str(seed), build(), seed, **config) for seed in (1, 2)]
    base, (first, second) = build().state_dict(), (merged(build(), folder) for folder in folders)
    report = average(folders, [0.75, 0.25], tmp_path / "mean", rank=rank)
    ours, here = merged(build(), tmp_path / "mean"), pk.merge(pk.load_adapter(build(), tmp_path / "mean")).state_dict()
    assert_close(here, ours)
    assert sum(not torch.equal(first[name], base[name]) for name in base) >= 2
    for name, weight in base.items():
        delta = 0.75 * (first[name] - weight) + 0.25 * (second[name] - weight)
        torch.testing.assert_close(ours[name], weight + (delta if rank is None or delta.ndim < 2 else best(delta, rank)), rtol=1e-4, atol=1e-5, msg=name)
    assert (report.error < 1e-6) == (rank is None)
    assert ("held in full are averaged plainly" in str(report)) == (kind in ("biases", "modules_to_save", "tokens"))


def test_experts_that_one_adapter_lacks_in_a_layer(tmp_path):
    """A file gives its experts one rank: where a sum is of fewer, zeros fill it up."""
    one, two = (adapter(tmp_path / str(seed), mixtral(2), seed, r=2, **EXPERTS) for seed in (1, 2))
    base, first, second = mixtral(2).state_dict(), merged(mixtral(2), one), merged(mixtral(2), two)
    rewrite(two, lambda state: {key: tensor for key, tensor in state.items() if "layers.1.mlp.experts" not in key})
    report = average([one, two], [1, 1], tmp_path / "sum")
    assert set(report.ranks.values()) == {4} and "has no update of 2 of the 6 modules" in str(report)
    ours = merged(mixtral(2), tmp_path / "sum")
    for name, weight in base.items():
        other = weight if "layers.1.mlp.experts" in name else second[name]
        torch.testing.assert_close(ours[name], first[name] + other - weight, rtol=1e-4, atol=1e-5, msg=name)


def test_modules_that_one_adapter_lacks_count_as_zero(tmp_path, ids):
    one = llama_adapter(tmp_path / "one", 1, r=2, target_modules=["q_proj", "down_proj"])
    two = llama_adapter(tmp_path / "two", 2, r=4, target_modules=["q_proj"], layers_to_transform=[0])
    report = average([one, two], [0.5, -1], tmp_path / "sum")
    assert_close(deltas(tmp_path / "sum"), weighted([one, two], [0.5, -1]))
    assert f"{two} has no update of 3 of the 4 modules; it counts as zero there: model.layers.0.mlp.down_proj" in str(report)
    assert sorted(report.ranks.values()) == [2, 2, 2, 6] and "modules of rank 2 to 6" in str(report)
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.self_attn.q_proj": 6} and config["r"] == 2
    ours, wanted = merged(tiny_llama(), tmp_path / "sum"), tiny_llama().state_dict()
    for name, delta in weighted([one, two], [0.5, -1]).items():
        wanted[name.removeprefix("base_model.model.") + ".weight"] += delta.float()
    assert_close(ours, wanted, 1e-5)


def test_adapters_of_other_modules_are_put_together(tmp_path):
    one = llama_adapter(tmp_path / "one", 1, target_modules=["q_proj"], layers_to_transform=[1])
    two = llama_adapter(tmp_path / "two", 2, target_modules=".*up_proj", exclude_modules=["layers.1.mlp.up_proj"])
    report = average([one, two], [1, 1], tmp_path / "sum")
    assert report.ranks == {"model.layers.0.mlp.up_proj": 4, "model.layers.1.self_attn.q_proj": 4}
    wanted = merged(tiny_llama(), one)
    wanted["model.layers.0.mlp.up_proj.weight"] = merged(tiny_llama(), two)["model.layers.0.mlp.up_proj.weight"]
    assert_close(merged(tiny_llama(), tmp_path / "sum"), wanted, 1e-5)
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(report.ranks) and config["layers_to_transform"] is config["exclude_modules"] is None


def test_a_rank_is_lowered_where_a_module_allows_no_more(three, tmp_path):
    wide = llama_adapter(tmp_path / "wide", 4, r=20, target_modules=["q_proj"])
    report = average([three[0], wide], None, tmp_path / "sum", rank=10)
    assert {name.rsplit(".", 1)[-1]: rank for name, rank in report.ranks.items()} == {"q_proj": 10, "down_proj": 2}


def test_pefts_copy_of_a_frozen_embedding_stays(tmp_path):
    folders = [adapter(tmp_path / str(seed), Net(), seed, r=2, target_modules=["embed"]) for seed in (1, 2)]
    key = "base_model.model.embed.base_layer.weight"
    for folder in folders:
        rewrite(folder, lambda state: state | {key: Net().embed.weight.detach()})
    average(folders, [1, 1], tmp_path / "sum")
    assert torch.equal(load_file(tmp_path / "sum" / "adapter_model.safetensors")[key], Net().embed.weight)
    rewrite(folders[1], lambda state: state | {key: state[key] + 1})
    with pytest.raises(CheckpointError, match=r"embed\.base_layer\.weight, a frozen weight of the base, differs"):
        average(folders, [1, 1], tmp_path / "no")


# --------------------------------------------------------------------------------------------------------------- refusals


def rewrite(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(file)).items()}, file)


def configure(folder: Path, **changed) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def put(part: str, tensor: Tensor):
    """A change of the files: the tensor under a key of the first q_proj, or under another key."""
    key = part if part.startswith(("q.", "base_model")) else f"base_model.model.model.layers.0.self_attn.q_proj.{part}"
    return lambda folder: rewrite(folder, lambda state: state | {key: tensor})


def drop(part: str):
    return lambda folder: rewrite(folder, lambda state: {key: tensor for key, tensor in state.items() if not key.endswith(part)})


def say(**changed):
    return lambda folder: configure(folder, **changed)


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "nan": (put("lora_A.weight", torch.full((8, 64), float("nan"))), CheckpointError, r"q_proj\.lora_A\.weight holds NaN"),
    "no b": (drop("q_proj.lora_B.weight"), CheckpointError, "q_proj has no B beside its A"),
    "no a": (drop("q_proj.lora_A.weight"), CheckpointError, "q_proj has no A beside its B"),
    "rank": (say(r=3), CheckpointError, "are no factors of rank 3"),
    "shape": (put("lora_A.weight", torch.ones(8, 5)), CheckpointError, r"\(64, 64\).*\(64, 5\)"),
    "sides": (put("lora_B.weight", torch.ones(64, 7)), CheckpointError, r"A \(8, 64\), B \(64, 7\) are no factors"),
    "bias": (put("lora_B.bias", torch.ones(64)), CheckpointError, r"lora_B\.bias cannot be averaged"),
    "whole numbers": (put("lora_A.weight", torch.ones(8, 64, dtype=torch.int32)), CheckpointError, "holds int32 numbers"),
    "key": (put("lora_C.weight", torch.ones(1)), CheckpointError, r"lora_C\.weight cannot be averaged"),
    "prefix": (put("q.lora_A.weight", torch.ones(1)), CheckpointError, "does not start with base_model"),
    "plain": (put("base_model.model.score.weight", torch.ones(1)), CheckpointError, r"score.weight is held in full by .*second and is not in .*first"),
    "empty": (lambda folder: rewrite(folder, lambda _: {}), CheckpointError, "holds no tensors"),
    "truncated": (cut, CheckpointError, r"second/adapter_model\.safetensors cannot be read"),
    "no json": (lambda folder: (folder / "adapter_config.json").write_text("{"), CheckpointError, "adapter_config.json cannot be read as JSON"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), CheckpointError, "holds no JSON object"),
    "base": (say(base_model_name_or_path="org/other"), ConfigError, "'org/base'.*'org/other': updates of different bases"),
    "revision": (say(revision="v2"), ConfigError, "revision: .*'v1'.*'v2'"),
    "tokens": (say(trainable_token_indices=[2, 1]), ConfigError, r"trainable_token_indices: .*\[1, 2\].*\[2, 1\]: they must be the same"),
    "dora": (say(use_dora=True), ConfigError, "a DoRA adapter: .*peftkit merge .*second OUTPUT"),
    "pissa": (say(init_lora_weights="pissa"), ConfigError, "init_lora_weights: 'pissa' changed the base"),
    "ia3": (say(peft_type="IA3"), ConfigError, "peft_type 'IA3' is not LoRA"),
    "kasa": (say(kasa_config={"x": 1}), ConfigError, "kasa_config: .* is not supported"),
    "alpha": (say(lora_alpha="16"), ConfigError, "lora_alpha a finite number"),
    "pattern": (say(rank_pattern={"q_proj": 0}), ConfigError, "r must be a whole number above 0"),
    "expert": (say(rank_pattern={"experts.up": 2}, target_parameters=["experts.up"]), ConfigError, "the parameter 'experts.up'"),
    "pickle": (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), ConfigError, "second holds its weights as a pickle"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), ConfigError, "second is no adapter folder: it holds no adapter_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_averaged_is_refused_and_nothing_is_written(damage, three, tmp_path):
    configure(three[0], base_model_name_or_path="org/base", revision="v1", trainable_token_indices=[1, 2])
    harm, error, text = DAMAGES[damage]
    harm(three[1])
    with pytest.raises(error, match=text):
        average(three[:2], None, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "third"]


USAGES = {
    "count": ({"weights": [1, 2]}, "weights: 2 for 3 adapters"),
    "nan": ({"weights": [1, 2, float("nan")]}, "weights: 1, 2, nan: each must be a finite number"),
    "rank": ({"rank": 15}, "rank: 15 is more than the combination of any module can have, which is 14"),
    "rank of ties": ({"rank": 65, "method": "ties"}, "rank: 65 is more than .* 64"),
    "no rank": ({"rank": 0}, "rank: 0"),
    "method": ({"method": "tie"}, "unknown 'tie'; did you mean 'ties'"),
    "density": ({"density": 0.5}, "density: linear keeps every entry"),
    "no density": ({"method": "ties", "density": 0.0}, "density: 0 is no share"),
    "percent": ({"method": "dare", "density": 20}, "density: 20 is no share"),
    "seed": ({"method": "ties", "seed": 1}, "seed: ties draws nothing"),
}


@pytest.mark.parametrize("usage", USAGES)
def test_wrong_usage_is_refused(usage, three, tmp_path):
    options, text = USAGES[usage]
    with pytest.raises(ConfigError, match=text):
        average(three, output=tmp_path / "out", **{"weights": None} | options)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_there_or_not_free(three, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no folder .*frist; did you mean 'first'"):
        average([tmp_path / "frist", three[1]], None, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        average(three, None, three[2])
    with pytest.raises(ConfigError, match="no adapter to average"):
        average([], None, tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert average(three, None, tmp_path / "out").folder == tmp_path / "out", "an empty folder is free"


def test_what_peftkit_wrote_beside_the_adapters_is_heeded(tmp_path):
    """The card: a file that was changed since, and bases of one name that are not the same."""
    for name, seed in {"one": 0, "two": 0, "other": 1}.items():
        model = tiny_llama(seed)
        model.name_or_path = "llama"
        pk.attach(model, pk.LoRA(r=2, target_modules=["q_proj"]))
        wake(model)
        pk.save_adapter(model, tmp_path / name)
    average([tmp_path / "one", tmp_path / "two"], None, tmp_path / "mean")
    card = json.loads((tmp_path / "mean" / "peftkit.json").read_text())
    assert card["base"] == "llama" and card["weights"] == json.loads((tmp_path / "one" / "peftkit.json").read_text())["weights"]
    with pytest.raises(CheckpointError, match="trained on another base"):
        pk.load_adapter(tiny_llama(1), tmp_path / "mean")
    with pytest.raises(ConfigError, match=r"one and .*other were trained on bases of one name whose model\.embed_tokens\.weight differ"):
        average([tmp_path / "one", tmp_path / "other"], None, tmp_path / "no")
    for folder in (tmp_path / "two", tmp_path / "mean"):
        rewrite(folder, lambda state: {key: tensor + 1 for key, tensor in state.items()})
        with pytest.raises(CheckpointError, match="SHA-256 differs"):
            average([tmp_path / "one", folder], None, tmp_path / "no")


def test_too_large_for_fp32_leaves_nothing(three, tmp_path):
    with pytest.raises(CheckpointError, match="too large for fp32"):
        average(three, [1e39, 1, 1], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "third"]


def test_weights_held_in_full_need_weights_that_sum_to_one(tmp_path):
    folders = [adapter(tmp_path / str(seed), Net(), seed, r=2, target_modules=["linear"], modules_to_save=["head"]) for seed in (1, 2)]
    with pytest.raises(ConfigError, match=r"head\.bias is held in full.*sum to 1, not to 2"):
        average(folders, [1, 1], tmp_path / "out")


def test_one_folder_under_two_names_is_one_base(three, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    configure(three[0], base_model_name_or_path=str(tmp_path / "base"))
    configure(three[1], base_model_name_or_path=str(tmp_path / "link"))
    assert average(three[:2], None, tmp_path / "out").error < 1e-6
    configure(three[0], base_model_name_or_path="/a/site-packages/peftkit/builtin/tiny")
    configure(three[1], base_model_name_or_path="/b/site-packages/peftkit/builtin/tiny")
    assert average(three[:2], None, tmp_path / "tiny").error < 1e-6


# --------------------------------------------------------------------------------------------------------------- terminal


@pytest.fixture
def peftkit(capsys):
    def call(*arguments: object) -> subprocess.CompletedProcess:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, stopped.value.code or 0, out, err)

    return call


def test_the_command_averages(peftkit, three, tmp_path):
    done = peftkit("merge", *three, "--weights", "-0.5,0.3,0.2", "--output", tmp_path / "out", "--rank", 5)
    assert done.returncode == 0 and "at worst" in done.stdout and f"averaged adapter: {tmp_path / 'out'}" in done.stdout, done.stderr
    average(three, [-0.5, 0.3, 0.2], tmp_path / "again", rank=5)
    assert_close(deltas(tmp_path / "out"), deltas(tmp_path / "again"), 1e-12)
    done = peftkit("merge", three[0], three[1], "--output", tmp_path / "dare", "--method", "dare", "--density", 0.4, "--seed", 3)
    assert done.returncode == 0, done.stderr
    average(three[:2], None, tmp_path / "same", method="dare", density=0.4, seed=3)
    assert_close(deltas(tmp_path / "dare"), deltas(tmp_path / "same"), 1e-12)


def test_the_command_takes_run_folders(peftkit, three, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.move(three[0], tmp_path / "run" / "adapter")
    done = peftkit("merge", tmp_path / "run", three[1], "--weights=1,1", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert_close(deltas(tmp_path / "out"), weighted([tmp_path / "run" / "adapter", three[1]], [1, 1]))


def test_one_adapter_without_weights_goes_into_its_base(peftkit, saved_llama, three, tmp_path):
    for output in ([tmp_path / "merged"], ["--output", tmp_path / "same"]):
        done = peftkit("merge", three[0], *output, "--model", saved_llama)
        assert done.returncode == 0 and "top-1 agreement" in done.stdout and "merged model" in done.stdout, done.stderr
    one, same = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "same"))
    assert one.keys() == same.keys() and all(torch.equal(one[key], same[key]) for key in one)
    done = peftkit("merge", three[0], "--weights", 2, "--output", tmp_path / "scaled")
    assert done.returncode == 0 and "averaged adapter" in done.stdout
    assert_close(deltas(tmp_path / "scaled"), weighted(three[:1], [2]))


MISUSES = {
    "no output": (["first", "second", "third"], "--output"),
    "one folder": (["first"], "--output"),
    "two without --output": (["first", "second"], "to average adapters, name the output with --output"),
    "not a number": (["first", "second", "--weights", "a,b", "--output", "out"], "'a,b' is no list of numbers"),
    "too few": (["first", "second", "--weights", "1", "--output", "out"], "weights: 1 for 2 adapters"),
    "too many folders": (["first", "second", "--weights", "1", "-2", "--output", "out"], "-2"),
    "model": (["first", "second", "--model", "x", "--output", "out"], "--model belongs to merging one adapter"),
    "near": (["first", "secnod", "--output", "out"], "did you mean 'second'"),
    "method": (["first", "second", "--method", "dair", "--output", "out"], "did you mean 'dare'"),
    "rank": (["first", "second", "--rank", "0", "--output", "out"], "--rank"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_wrong_commands_exit_2_with_one_message(misuse, peftkit, three, tmp_path, monkeypatch):
    arguments, text = MISUSES[misuse]
    monkeypatch.chdir(tmp_path)
    done = peftkit("merge", *arguments)
    assert done.returncode == 2 and text in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_damaged_files_exit_1(peftkit, three, tmp_path):
    DAMAGES["truncated"][0](three[1])
    done = peftkit("merge", *three, "--output", tmp_path / "out")
    assert done.returncode == 1 and "failed:" in done.stderr and "cannot be read" in done.stderr


def test_the_report_reads_well():
    report = AverageReport(Path("out"), "linear", [0.5, -1], {"a": 3, "b": 4}, {"a": 0.25, "b": 0.5}, 0.4, ["said"])
    assert str(report) == "linear, weights 0.5, -1: 2 modules of rank 3 to 4\nrelative error of the update: 40.000% overall, at worst 50.000% in b\nsaid"
