"""Every recipe is whole: it validates, `check` takes it offline, the tables name it; the documentation's own examples work too."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from peftkit.check import check
from peftkit.cli import app
from peftkit.cli.common import shipped_recipes
from peftkit.config import ConfigError
from peftkit.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").rglob("*.yaml"))}
OWN_FILE = {"text": "book.txt", "prompt-completion": "pairs.jsonl", "chat": "chats.json"}
HUB = [name for name, path in RECIPES.items() if not yaml.safe_load(path.read_text())["model"]["name"].startswith("builtin:")]
BUILTIN = [name for name in RECIPES if name not in HUB and name not in OWN_FILE]

CHAT = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A very small model."}]
PAIRS = [{"question": f"What is {i} plus 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(60)]
ROWS = {
    "text": "\n".join(f"Chapter {i}. The wind blew over the grey fields, and nobody came to the house." for i in range(200)),
    "prompt-completion": "\n".join(map(json.dumps, PAIRS)),
    "chat": json.dumps([{"conversations": CHAT * (1 + i % 3)} for i in range(60)]),
}
TRAINED = {  # the first row as `check` marks it
    "text": r"C\w*\[\[[^\[]+\]\]",  # all but the first token
    "prompt-completion": r".+\[\[0 \+ 1 = 1\n#### 1<\|end\|>\]\]",
    "chat": r".+\[\[A very small model\.<\|end\|>\]\]",
}


def test_every_kind_of_recipe_is_there():
    assert OWN_FILE.keys() <= RECIPES.keys() and {"quickstart", "dora", "qdora", "full"} <= set(BUILTIN)
    assert {"llama-3.2-1b-qlora", "mistral-7b-qlora", "gemma-2-2b-qlora", "tinyllama-1.1b-qlora", "mixtral-8x7b-qlora", "qwen3-0.6b-lora"} <= set(HUB)
    assert {"guanaco-7b", "dora-commonsense-8b", "lora-gpt2-e2e", "neftune-alpaca-7b"} <= set(HUB), "the published settings"
    assert shipped_recipes().keys() == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_validates_and_says_what_it_is(name):
    recipe = load_recipe(RECIPES[name])
    assert recipe.output_dir == f"runs/{name}"
    description = RECIPES[name].read_text().splitlines()[0]
    assert re.fullmatch(r"# \S.{20,150}", description), "the first line is what `peftkit recipes` shows"


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_recipe_passes_check(name):
    report = check(RECIPES[name])
    assert report.sections.keys() >= {"recipe", "model", "data", "memory"}
    marked = report.rows[0][1]
    assert re.search(r"\[\[.+<\|end\|>\]\]", marked), "the answer and its end are trained"


@pytest.mark.parametrize("name", OWN_FILE)
def test_recipe_for_a_file_of_ones_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"no such file: {re.escape(OWN_FILE[name])}"):
        check(RECIPES[name])
    own = tmp_path / ("mine" + Path(OWN_FILE[name]).suffix)
    own.write_text(ROWS[name])
    report = check(RECIPES[name], [f"data.train={own}"])
    marked = report.rows[0][1]
    assert re.fullmatch(TRAINED[name], marked, re.DOTALL), marked


@pytest.mark.parametrize("name", HUB)
def test_hub_recipe_is_checked_without_network(name, monkeypatch):
    recipe = load_recipe(RECIPES[name])
    assert re.search(r"^# Source: \S.{40,}$", RECIPES[name].read_text(), re.MULTILINE), "where its hyperparameters are from"
    assert recipe.quantize == ("nf4" if any("qlora" in method for method in recipe.methods) else None)
    done = CliRunner().invoke(app, ["check", str(RECIPES[name])])
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert f"{recipe.model.name} is not on this machine" in told and "model and data stay unchecked" in told


def test_table_names_every_recipe():
    table = (ROOT / "recipes" / "README.md").read_text()
    assert set(re.findall(r"^\| \[([\w.-]+\.yaml)\]\(\1\) \|", table, re.MULTILINE)) == {path.name for path in RECIPES.values()}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_documented_recipe_validates(page, tmp_path):
    [text] = blocks(page, "yaml")
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").quantize == "nf4"


def test_documented_suite_validates(tmp_path):
    from peftkit.bench.suite import load_suite

    [text] = blocks("docs/benchmarks.md", "yaml")
    (tmp_path / "suite.yaml").write_text(text)
    assert load_suite(tmp_path / "suite.yaml").seeds == [0, 1, 2]


def test_notebook_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours, adopting = blocks("README.md", "python")
    names: dict = {}
    exec(ours, names)
    assert "42 linears" in capsys.readouterr().out and (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert {group["role"]: group["lr"] for group in names["optimizer"].param_groups} == pytest.approx({"A": 2e-4, "B": 16 * 2e-4})
    for model in (names["model"], names["fresh"]):
        assert not any("lora" in name for name, _ in model.named_parameters())
    exec(adopting, names)
    assert "adopted    42 layers" in capsys.readouterr().out


def test_file_map_of_the_readme_is_the_tree():
    """Every library file is named, by itself or within the line of its folder, and nothing that is not there."""
    rows = re.findall(r"^\| `(peftkit/[^`]+)` \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    named: set[str] = set()
    for path, what in rows:
        inside = re.findall(r"`([\w.]+\.py)`", what)
        found = [f"{path}{file}" for file in inside] if path.endswith("/") else [path]
        if path.endswith("/") and not inside:  # a folder told as a whole
            found = [str(file.relative_to(ROOT)) for file in (ROOT / path).glob("*.py")]
        named |= set(found)
    tree = {str(file.relative_to(ROOT)) for file in (ROOT / "peftkit").rglob("*.py")}
    folders = {path for path in tree if path.endswith("__init__.py") and path != "peftkit/__init__.py"}
    assert tree - named - folders == set() and named - tree == set()


def test_generated_tables_are_up_to_date(capsys):
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "benchmarks" / "write_docs.py")
    write_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_docs)
    assert write_docs.main(["--check"]) == 0, capsys.readouterr().out
    with pytest.raises(ValueError, match="expected one <!-- scores:begin -->"):
        write_docs.fill("no markers", "scores", "text")
    once = write_docs.fill("a <!-- x:begin -->old<!-- x:end --> b", "x", "new")
    assert once == "a <!-- x:begin -->\nnew\n<!-- x:end --> b" == write_docs.fill(once, "x", "new")


def test_overrides_of_a_method_that_is_named_alone(tmp_path):
    made = {"model": {"name": "builtin:tiny"}, "methods": ["lora"], "data": {"train": "builtin:copy/train"}, "output_dir": str(tmp_path)}
    assert load_recipe(made, ["methods.0.lora.r=4"]).methods[0]["lora"]["r"] == 4 and made["methods"] == ["lora"]
