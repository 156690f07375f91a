"""What a cell's address is made of: the recipe, the files it reads, the code it runs, the versions of what runs it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peftkit

PACKAGE = Path(__file__).parents[1]
NOT_IN_KEY = ("__main__", "bench", "chat", "check", "cli", "doctor", "export", "fold", "rehearse", "servers", "use")
"""Modules that stand above `run` and so cannot change what a run measures: imports point down only."""

STEPS = "bench/steps.py"  # but a timing cell is run by this file

OWN = {
    "methods/dora.py": "dora",
    "kernels/dora.py": "dora",
    "kernels/triton_dora.py": "dora",
    "methods/qlora.py": "qlora",
    "methods/loraplus.py": "loraplus",
    "methods/neftune.py": "neftune",
}
"""Files that run for one method alone: only cells with that method depend on them, on every other file all cells do. A test runs each
method and sees that no other method's file takes part."""


class Code:
    """The package's files, the embedded model included, each hashed once."""

    def __init__(self) -> None:
        self.files = {}
        for path in sorted(PACKAGE.rglob("*")):
            parts = path.relative_to(PACKAGE).parts
            if path.is_file() and "__pycache__" not in parts and (parts[0].removesuffix(".py") not in NOT_IN_KEY or "/".join(parts) == STEPS):
                self.files["/".join(parts)] = hashlib.sha256(path.read_bytes()).hexdigest()

    def of(self, recipe: dict[str, Any], timing: bool = False) -> str:
        """Hash of the files that can change what a cell with this recipe measures."""
        used = {name for entry in recipe.get("methods") or [] for name in ([entry] if isinstance(entry, str) else entry)}
        counts = {
            name: digest for name, digest in self.files.items() if (name not in OWN or OWN[name] in used) and (timing or name != STEPS)
        }  # fmt: skip
        return hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()


def key(recipe: dict[str, Any], code: Code, rounds: int | None = None, judged: dict[str, Any] | None = None) -> str:
    """The address of a cell; `rounds` are those of a timing cell, `judged` what else decides what is kept of a run."""
    content = [recipe, inputs(recipe), code.of(recipe, rounds is not None), versions(), *([rounds] if rounds else []), *([judged] if judged else [])]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    """The packages that decide what a run computes."""
    found = {"peftkit": peftkit.__version__}
    for package in ("torch", "transformers", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def inputs(recipe: dict[str, Any]) -> dict[str, Any]:
    """Data files by content and model folders by the names, sizes and times of their files: a changed input is another cell."""
    data, evaluation = recipe.get("data", {}), recipe.get("eval", {})
    found: dict[str, Any] = {}
    mixed = [part.get("source") for part in [data.get("replay") or {}, *(data.get("mix") or [])]]
    for name in [data.get("train"), data.get("eval"), *mixed, *evaluation.get("retained", [])]:
        place = Path(name or "").expanduser()
        for path in sorted(place.rglob("*")) if name and place.is_dir() else [place]:
            if path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    model = Path(recipe.get("model", {}).get("name", "")).expanduser()
    if model.name and model.is_dir():
        found["model"] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(model.iterdir()) if path.is_file()]
    return found
