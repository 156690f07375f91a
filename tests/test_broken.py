"""The corpus of broken recipes and data under tests/broken: each gives exit 2 and one message with place and remedy, and nothing is touched.

`expected.yaml` says for each file what its message must hold. The files that cannot be kept small are made here: model folders with a tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from peftkit.cli import main
from peftkit.model import BUILTIN

BROKEN = Path(__file__).parent / "broken"
EXPECTED = yaml.safe_load((BROKEN / "expected.yaml").read_text())
RECIPES, DATA = EXPECTED["recipes"], EXPECTED["data"]
STRICT = """\
{%- for tool in tools or [] %}{{ tool['name'] }}{% endfor %}
{%- for message in messages %}
{%- if message['role'] == 'user' and loop.previtem is defined and loop.previtem['role'] == 'user' %}{{ raise_exception('two user turns in a row') }}{% endif %}
{{- message['role'] + ': ' + (message['content'] or '') }}{% if message['role'] == 'assistant' %}<|end|>{% endif %}
{%- endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """The corpus with its model folders: one without weights, one with half of them, one whose template takes tools and is strict about turns."""
    folder = tmp_path_factory.mktemp("originals") / "broken"
    shutil.copytree(BROKEN, folder)
    for name in ("no-weights", "cut-weights", "strict"):
        shutil.copytree(BUILTIN / "tiny", folder / "models" / name, ignore=shutil.ignore_patterns("*.safetensors", "scores.json"))
    weights = (BUILTIN / "tiny" / "model.safetensors").read_bytes()
    (folder / "models" / "cut-weights" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "models" / "strict" / "chat_template.jinja").write_text(STRICT)
    for name in ("broken-config", "unknown-type"):  # they are refused for their config, not for want of a tokenizer
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BUILTIN / "tiny" / file, folder / "models" / name)
    return folder


@pytest.fixture
def corpus(originals, tmp_path, monkeypatch) -> Path:
    """A copy of its own for each test, which is the current directory: recipes name their files from there."""
    shutil.copytree(originals, tmp_path / "corpus")
    monkeypatch.chdir(tmp_path / "corpus")
    return tmp_path / "corpus"


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below, the files with their hash."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in sorted(folder.rglob("*"))}


def call(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command in this process; an exception that would be a traceback comes through."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code or 0, " ".join(capsys.readouterr().err.split())


def refused(capsys, corpus: Path, commands: list[str], recipe: str, arguments: list[str], says: list[str]) -> None:
    before = contents(corpus)
    for command in commands:
        code, told = call(capsys, command.split()[0], recipe, *arguments, *command.split()[1:])
        assert code == 2, f"{command} exits {code}: {told}"
        assert told.count("error: ") == 1 and "Traceback" not in told, told
        missing = [part for part in says if part not in told]
        assert not missing, f"{command} does not say {missing}: {told}"
        after = contents(corpus)
        assert after == before, f"{command} touched {[name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]}"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, corpus, capsys):
    case = RECIPES[name]
    if case.get("without_gpu") and torch.cuda.is_available():
        pytest.skip("right where there is a GPU")
    refused(capsys, corpus, case.get("commands", ["check", "run"]), f"recipes/{case.get('file', name)}.yaml", case.get("arguments", []), case["says"])


@pytest.mark.parametrize("name", DATA)
def test_data(name, corpus, capsys):
    case = DATA[name]
    recipe = (corpus / "recipes" / "overridden.yaml").read_text().replace("builtin:tiny", case.get("model", "builtin:tiny"))
    Path("recipe.yaml").write_text(recipe)
    refused(capsys, corpus, ["check", "run"], "recipe.yaml", [f"data.train=data/{name}", *case.get("arguments", [])], case["says"])


def test_the_corpus_is_whole():
    assert len(RECIPES) + len(DATA) >= 60
    assert {case.get("file", name) for name, case in RECIPES.items()} == {path.stem for path in (BROKEN / "recipes").iterdir()}
    assert DATA.keys() == {path.name for path in (BROKEN / "data").iterdir()} - {"good.jsonl", "good.txt", "rows.xml"}
    for name, case in {**RECIPES, **DATA}.items():
        assert len(case["says"]) >= 2, f"{name}: place and remedy"


def test_what_is_not_broken_passes(corpus, capsys):
    """The same recipe with good data: what the others are refused for is what is broken in them."""
    code, told = call(capsys, "check", "recipes/overridden.yaml")
    assert code == 0, told
    for data in ("data/good.jsonl", "data/two-users.jsonl"):
        code, told = call(capsys, "check", "recipes/overridden.yaml", f"data.train={data}")
        assert code == 0, told
    assert json.loads((corpus / "data" / "good.jsonl").read_text().splitlines()[0])["prompt"]
