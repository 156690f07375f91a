"""The architecture, read from the imports: they point down, only quant.py knows bitsandbytes, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from peftkit.bench.keys import NOT_IN_KEY

PACKAGE = Path(__file__).parent.parent / "peftkit"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top down. A unit may import what stands on a lower line, and within its line only itself, so there are no cycles.
LEVELS = [
    ["__main__"],
    ["cli"],
    ["export"],
    ["chat", "fold", "rehearse", "servers"],
    ["bench", "check", "doctor", "use"],
    ["run"],
    ["forecast", "folder", "save_model"],
    ["recipe", "result"],
    ["train", "evaluate", "average"],  # the loop saves checkpoints, follows a schedule and measures memory; averaging reads and writes adapters
    [
        "data",
        "model",
        "optim",
        "loss",
        "checkpoint",
        "merge",
        "adopt",
        "memory",
        "energy",
        "tripwires",
        "activations",
        "attention",
        "compiling",
        "interrupts",
        "trackers",
        "builtin.tasks",
    ],
    ["adapter_file", "provenance"],  # the format, which `checkpoint` writes and loads into models
    ["builtin"],  # the words and families of the embedded tasks
    ["methods"],
    ["layers"],
    ["kernels", "quant", "console"],
    ["amounts", "config", "versions"],
]
LEVEL = {unit: depth for depth, units in enumerate(LEVELS) for unit in units}
# `data` reads the embedded tasks; otherwise no stage imports another of its line.
ALLOWED = {("data", "builtin.tasks")}


def unit_of(module: str) -> str:
    """peftkit.data.read -> data; the package's own `__init__` is the empty name."""
    inner = module.removeprefix("peftkit").lstrip(".")
    return "builtin.tasks" if inner == "builtin.tasks" else inner.split(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in a file, those within functions too; relative ones made absolute."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                is_module = module.split(".")[0] == "peftkit" and exists(inner)
                found.append((node.lineno, inner if is_module else module))
    return found


def exists(module: str) -> bool:
    path = PACKAGE.parent / Path(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def edges() -> dict[tuple[str, str], str]:
    """(importing unit, imported unit) -> one place where it happens."""
    found: dict[tuple[str, str], str] = {}
    for path in FILES:
        source = unit_of(module_name(path))
        if not source:  # the lazy face of the package names everything and imports nothing
            continue
        for line, module in imports(path):
            target = unit_of(module)
            if module.split(".")[0] == "peftkit" and target and target != source:
                found.setdefault((source, target), f"{path.relative_to(PACKAGE)}:{line}")
    return found


def test_code_above_run_is_in_no_benchmark_key():
    """A change of what a run cannot import reruns no cell; of all else every cell depends on, but the files of one method (test_bench_runner)."""
    assert set(NOT_IN_KEY) == {unit for unit, level in LEVEL.items() if level < LEVEL["run"]}


def test_every_file_has_a_level():
    units = {unit_of(module_name(path)) for path in FILES} - {""}
    assert units == LEVEL.keys()


def test_imports_point_down_only():
    wrong = {f"{place}: {a} imports {b}" for (a, b), place in edges().items() if LEVEL[b] <= LEVEL[a] and (a, b) not in ALLOWED}
    assert not wrong
    assert len(edges()) > 30, "the imports were read"


def test_methods_know_no_stage_and_layers_know_no_method():
    below = edges()
    assert {b for a, b in below if a == "methods"} <= {"layers", "quant", "config"}
    assert {b for a, b in below if a == "layers"} <= {"kernels", "quant", "config"}
    assert not {b for a, b in below if a in ("kernels", "config", "quant")}


def test_only_the_runner_and_the_tools_put_stages_together():
    stages = {name for level in LEVELS if {"train", "data"} & {*level} for name in level}
    together = {a for a in LEVEL if len({b for source, b in edges() if source == a} & stages) > 1}
    assert together <= {
        "bench", "chat", "doctor", "export", "fold", "folder", "forecast", "rehearse", "run", "check", "use", "recipe", "save_model", "train", "cli",
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_file(path):
    modules = {module.split(".")[0] for _, module in imports(path)}
    assert not modules & {"benchmarks", "tests", "conftest"}
    assert "bitsandbytes" not in modules or path.name == "quant.py"
    assert not any(isinstance(node, ast.ImportFrom) and node.level > 1 for node in ast.walk(ast.parse(path.read_text())))
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert not lines or ast.get_docstring(ast.parse(path.read_text())), "a module says what it is"


@pytest.mark.parametrize("statement", ["import peftkit", "import peftkit.config", "import peftkit.cli"])
def test_starting_imports_nothing_heavy(statement):
    heavy = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "matplotlib")
    code = f"{statement}; import sys; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_had():
    import peftkit

    assert {
        "load",
        "attach",
        "detach",
        "merge",
        "save_adapter",
        "load_adapter",
        "adapters_disabled",
        "build_optimizer",
        "describe",
        "run",
    } < set(peftkit.__all__)
    assert {"LoRA", "DoRA", "QLoRA", "LoRAPlus", "NEFTune"} < set(peftkit.__all__)
    for name in peftkit.__all__:
        assert callable(getattr(peftkit, name)), name
        assert name in dir(peftkit)
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        peftkit.lora  # noqa: B018


def test_every_package_is_installed():
    """An editable install finds what pyproject.toml forgets, an ordinary one does not."""
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    assert there <= set(listed)
