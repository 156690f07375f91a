"""Rehearsals: every recipe goes the whole way offline, on its own architecture; what was stood in for is told; what is wrong is found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from peftkit import rehearse as rehearsing
from peftkit.checkpoint import CheckpointError
from peftkit.cli import app
from peftkit.config import ConfigError
from peftkit.model import load_tokenizer, model_class
from peftkit.recipe import load_recipe
from peftkit.rehearse import LENGTH, rehearse, shrink

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
KEPT = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "configs").glob("*.json"))}
OWN_WORDS = """\
model: {name: builtin:tiny}
methods: [lora: {r: 2}]
data: {train: rows.jsonl}
train: {max_steps: 2}
output_dir: run
"""


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_the_whole_way(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = rehearse(RECIPES[name])
    recipe, result = load_recipe(RECIPES[name]), report.result
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert result.train["steps"] == 3 and result.train["supervised_tokens"] > 0
    assert result.recipe["methods"] == recipe.methods and result.recipe["model"]["quantize"] == recipe.model.quantize
    assert result.recipe["data"]["packing"] == recipe.data.packing and result.recipe["data"]["max_length"] <= LENGTH
    assert bool(recipe.train.micro_batch_size) == bool(result.recipe["train"]["micro_batch_size"])
    told = "\n".join(report.stood_in)
    if not recipe.model.name.startswith("builtin:"):
        assert f"config of {recipe.model.name}: the sizes kept in" in told and f"tokenizer of {recipe.model.name}: that of builtin:tiny" in told
        model_type = KEPT[recipe.model.name.rsplit("/", 1)[-1]]["config"]["model_type"]
        config = transformers.AutoConfig.for_model(model_type)
        kind = model_class(config)._model_mapping[type(config)]
        assert f"architecture: {kind.__name__}" in "\n".join(report.real)
        assert f"data.train, {recipe.data.train}: " in told and "rows in its columns from" in told
    assert "random ones" in told and "read back" in report.did[-1]
    assert ("with the same scores" in report.did[-1]) == bool(recipe.data.eval or recipe.data.holdout)


def test_only_recipes_that_are_there_have_configs_and_rows():
    named = {load_recipe(path).model.name.rsplit("/", 1)[-1] for path in RECIPES.values()}
    assert KEPT.keys() == {name for name in named if not name.startswith("builtin:")}
    specs = [spec for path in RECIPES.values() for spec in (load_recipe(path).data.train, load_recipe(path).data.eval) if spec]
    wanted = {spec.split(":")[0].replace("/", "--") for spec in specs if not spec.startswith("builtin:")}
    kept = {path.name.removesuffix(".jsonl") if "--" in path.name else path.name for path in (FOLDER / "rows").iterdir()}
    assert kept - {"pairs.jsonl"} == wanted - {"pairs.jsonl"}


# ---------------------------------------------------------------------------------------------------------- small models


@pytest.mark.parametrize("name", KEPT)
def test_a_shrunken_model_is_the_same_but_for_its_sizes(name):
    config = transformers.AutoConfig.for_model(**KEPT[name]["config"])
    small = shrink(config, load_tokenizer("builtin:tiny"), rank=64)
    with torch.device("meta"):
        big, little = (model_class(each).from_config(each) for each in (config, small))
    assert type(big) is type(little) and little.num_parameters() < 5e6
    names = [{re.sub(r"\.\d+", "", key) for key, _ in model.named_modules()} for model in (big, little)]
    assert names[0] == names[1], "targets have the same names"
    old, new = config.to_dict(), small.to_dict()
    switches = {key for key, value in old.items() if isinstance(value, (bool, str)) or (isinstance(value, float) and "rope" not in key)}
    assert {key: new[key] for key in switches} == {key: old[key] for key in switches}
    assert set(new.get("layer_types") or []) == set(old.get("layer_types") or [])
    heads = [getattr(each, "num_key_value_heads", None) for each in (config, small)]
    shared = [head and head < each.num_attention_heads for head, each in zip(heads, (config, small), strict=True)]
    assert shared[0] == shared[1] and (heads[0] == 1) == (heads[1] == 1)


def test_long_rope_and_chosen_layers_fit_the_small_sizes(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 10000.0, "original_max_position_embeddings": 4096}
    values = KEPT["Phi-3-mini-4k-instruct"]["config"] | {"max_position_embeddings": 131072, "rope_parameters": rope}
    small = shrink(transformers.AutoConfig.for_model(**values), load_tokenizer("builtin:tiny"), all_layers=True)
    assert small.num_hidden_layers == 32 and len(small.rope_parameters["short_factor"]) == 128 // 4 // 2
    model = transformers.AutoModelForCausalLM.from_config(small)
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()
    recipe = write(tmp_path, OWN_WORDS.replace("{r: 2}", "{r: 2, layers_to_transform: [5]}"))
    assert rehearse(recipe).result.adapter["modules"] == 7


def write(folder: Path, recipe: str, rows: list[dict] | None = None) -> Path:
    (folder / "recipe.yaml").write_text(recipe.replace("rows.jsonl", str(folder / "rows.jsonl")))
    rows = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(8)] if rows is None else rows
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "recipe.yaml"


# ------------------------------------------------------------------------------------------------------- what is wrong


def test_what_a_run_would_stop_at_stops_the_rehearsal(tmp_path):
    recipe = write(tmp_path, OWN_WORDS.replace("{r: 2}", "{r: 2, target_modules: [q_pro]}"))
    with pytest.raises(ConfigError, match=r"q_pro.*q_proj"):
        rehearse(recipe)
    recipe = write(tmp_path, OWN_WORDS, [{"prompt": "a", "completion": ""}])
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: the answer is empty"):
        rehearse(recipe)
    recipe.write_text(recipe.read_text().replace("rows.jsonl", "row.jsonl"))
    with pytest.raises(ConfigError, match="no such file"):
        rehearse(recipe)
    with pytest.raises(ConfigError, match="give 1 or more"):
        rehearse(write(tmp_path, OWN_WORDS), steps=0)


def test_long_rows_are_judged_at_the_recipes_length_and_cut_for_the_steps(tmp_path):
    long = [{"prompt": "word " * 600, "completion": "yes"}, {"prompt": "a", "completion": "b"}]
    report = rehearse(write(tmp_path, OWN_WORDS.replace("rows.jsonl", "rows.jsonl, max_length: 2048"), long))
    assert "2 of 2 rows kept" in "\n".join(report.real) and "max_length 2048 -> 256" in report.stood_in[-1]
    report = rehearse(write(tmp_path, OWN_WORDS.replace("rows.jsonl", "rows.jsonl, max_length: 2048"), long[:1]))
    assert "max_length" not in report.stood_in[-1], "cut rows would leave nothing to train"
    report = rehearse(write(tmp_path, OWN_WORDS, long))
    assert re.search(r"left out: .*rows\.jsonl:1: \d+ tokens, and max_length is 512", "\n".join(report.real))


def test_a_model_that_is_nowhere_names_the_file_to_keep(tmp_path):
    recipe = write(tmp_path, OWN_WORDS.replace("builtin:tiny", "nobody/nothing"))
    with pytest.raises(ConfigError, match=rf"nobody/nothing.*\n.*\n.*keep a config in {re.escape(str(tmp_path))}/configs/nothing.json"):
        rehearse(recipe)
    (tmp_path / "configs").mkdir()
    kept = {"chat_template": False, "config": KEPT["TinyLlama-1.1B-Chat-v1.0"]["config"]}
    (tmp_path / "configs" / "nothing.json").write_text(json.dumps(kept))
    report = rehearse(recipe)
    assert any("no chat template" in line for line in report.stood_in)


def test_evaluations_between_and_sets_of_the_hub_are_rehearsed(tmp_path):
    """The log then has lines without a training loss; what a recipe forgets is measured on rows that stand in."""
    rows = "train: {max_steps: 2, eval_every: 1}\neval: {metrics: [loss], retained: [nobody/rows]}"
    recipe = write(tmp_path, OWN_WORDS.replace("rows.jsonl", "rows.jsonl, holdout: 0.3").replace("train: {max_steps: 2}", rows))
    report = rehearse(recipe)
    assert "3 steps, loss" in report.did[0]
    assert any(line.startswith("eval.retained, nobody/rows: not on this machine") for line in report.stood_in)


def test_trackers_are_told_nothing(tmp_path):
    pytest.importorskip("tensorboard")
    report = rehearse(write(tmp_path, OWN_WORDS.replace("max_steps: 2", "max_steps: 2, report_to: [tensorboard]")))
    assert "trackers: tensorboard is told nothing" in report.stood_in and report.result.recipe["train"]["report_to"] == []


def test_rows_are_made_up_in_the_columns_that_the_recipe_names(tmp_path):
    recipe = write(tmp_path, OWN_WORDS.replace("rows.jsonl", "nobody/rows:train, columns: {instruction: ask, output: tell}, holdout: 0.1"))
    recipe.write_text(recipe.read_text().replace(str(tmp_path) + "/", ""))
    report = rehearse(recipe)
    assert any("made-up rows with the columns ask, tell" in line for line in report.stood_in)
    assert report.result.after["loss"] > 0


def test_the_trap_a_saved_adapter_that_is_not_the_trained_one(tmp_path, monkeypatch):
    recipe = write(tmp_path, OWN_WORDS.replace("rows.jsonl", "rows.jsonl, holdout: 0.3"))
    assert "with the same scores" in rehearse(recipe).did[-1]
    real = rehearsing.score

    def emptied(folder, *rest):
        from safetensors.torch import load_file, save_file

        path = Path(folder) / "adapter" / "adapter_model.safetensors"
        save_file({key: tensor * 40 + 1 for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
        (path.parent / "peftkit.json").unlink()  # it would tell by its checksum
        return real(folder, *rest)

    monkeypatch.setattr(rehearsing, "score", emptied)
    with pytest.raises(CheckpointError, match="what was saved is not what was trained"):
        rehearse(recipe)


def test_the_command(tmp_path):
    recipe = write(tmp_path, OWN_WORDS)
    done = CliRunner().invoke(app, ["rehearse", str(recipe), "methods.0.lora.r=4", "--steps", "2"])
    assert done.exit_code == 0, done.output
    assert re.search(r"real\n.*stood in for\n.*random ones.*done\n  2 steps.*ok", done.stdout, re.DOTALL), done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "rows.jsonl"}
