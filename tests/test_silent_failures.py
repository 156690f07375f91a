"""The table of silent failures: every test that it names is there. And two rows that are about the code itself: unread options, patched libraries."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftkit.config import Config
from peftkit.data import DataConfig
from peftkit.evaluate import EvalConfig
from peftkit.methods import REGISTRY
from peftkit.model import ModelConfig
from peftkit.recipe import Recipe
from peftkit.train import TrainConfig

ROOT = Path(__file__).parents[1]
SOURCES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "peftkit").rglob("*.py"))}
ROWS = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (ROOT / "docs" / "silent-failures.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]

# ------------------------------------------------------------------------------------------------------------ the table


def names_in(file: str) -> set[str]:
    path = ROOT / "tests" / file
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)} if path.exists() else set()


def test_every_row_names_tests_that_are_there():
    assert [int(row[0]) for row in ROWS] == list(range(1, 26))
    for number, failure, seen, what, tests in ROWS:
        assert failure.strip() and re.search(r"\w/\w[\w.-]*#\d+", seen) and len(what.strip()) > 10, number
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert named or "*open:*" in what, f"row {number} is neither closed by a test nor open"
        assert len(named) == tests.count("::"), f"row {number} names a test in another form"
        for file, name in named:
            assert name in names_in(file), f"row {number}: there is no {name} in tests/{file}"


# --------------------------------------------------------------------------------------------- row 21: options are read


def attributes_read(trees: list[ast.AST]) -> set[str]:
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def unread(config: type[Config], trees: list[ast.AST]) -> list[str]:
    """The keys of a config that no code asks for by name."""
    return [name for name in config.model_fields if name not in attributes_read(trees)]


def test_the_trap_an_option_that_nothing_reads():
    class Options(Config):
        used: int = 1
        ignored: int = 2

    assert unread(Options, [ast.parse("def act(options):\n    options.ignored = 3\n    return options.used")]) == ["ignored"]


@pytest.mark.parametrize("config", [Recipe, ModelConfig, DataConfig, TrainConfig, EvalConfig, *REGISTRY.values()], ids=lambda config: config.__name__)
def test_every_key_is_read(config):
    assert unread(config, list(SOURCES.values())) == []


# ----------------------------------------------------------------------------------------- row 23: libraries stay as they are


def foreign_names(tree: ast.AST) -> set[str]:
    """Names by which a file has modules, classes and functions of other packages."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names if alias.name.split(".")[0] != "peftkit"}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] != "peftkit":
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def replaced(tree: ast.AST) -> Iterator[int]:
    """Lines that set or delete an attribute or an item of something that another package owns."""
    foreign = foreign_names(tree)

    def is_foreign(node: ast.AST) -> bool:
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            if ast.unparse(node) == "sys.modules[__name__]":  # the module itself
                return False
            node = node.value
        return isinstance(node, ast.Name) and node.id in foreign

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "warnings.formatwarning":  # Python's own place for a program's wording of warnings
            continue
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)) and is_foreign(node):
            yield node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr") and is_foreign(node.args[0]):
            yield node.lineno


PATCHES = [
    "import torch\ntorch.nn.Linear.forward = None",
    "import transformers.models.llama as llama\nllama.LlamaAttention = None",
    "from transformers import Trainer\nsetattr(Trainer, 'train', None)",
    "from peft import LoraConfig as C\nC.__init__ = None",
    "from peft.tuners import lora\ndel lora.Linear",
    "import sys\nsys.modules['peft'] = None",
]


@pytest.mark.parametrize("code", PATCHES)
def test_the_trap_a_patched_library(code):
    assert list(replaced(ast.parse(code))) == [2]
    assert list(replaced(ast.parse("import os\nfrom torch import nn\n\ndef f(model):\n    model.layer = nn.Linear(1, 1)\n    x = os.environ['A']"))) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "peftkit")))
def test_nothing_of_another_library_is_replaced(path):
    assert list(replaced(SOURCES[path])) == []
