"""Suites: one recipe, several methods, several seeds; and the cells they unfold into, addressed by their content."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

import peftkit
from peftkit.config import Config, ConfigError, Source, read_yaml, validate

PACKAGE = Path(__file__).parents[1]
NOT_IN_KEY = ("bench", "cli")  # folders of the package that cannot change what a cell measures
OWNED = (("train", "seed"), ("output_dir",))  # what the harness sets in a recipe
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]  # becomes part of a folder's name


class Suite(Config):
    """What to compare: every method times every seed is one cell."""

    name: Name
    """Name of the suite, and of its folder."""
    recipe: dict[str, Any] | str
    """What all cells share: a recipe without output_dir, or the path of a recipe file, relative to the suite's file."""
    methods: dict[Name, dict[str, Any]] = Field(min_length=1)
    """Row name -> changes to the recipe, merged deep: mappings merge, everything else replaces. Differences are told to the first row."""
    seeds: list[int] = Field(min_length=1)
    """Each becomes train.seed of one cell per method."""
    metric: Literal["exact_match"] = "exact_match"
    """What is compared."""
    target: float | None = Field(None, ge=0, le=1)
    """A value of the metric; the report counts the seeds that reached it."""

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed stands twice in {seeds}: equal runs would pass for independent ones")
        return seeds


@dataclass(frozen=True)
class Cell:
    """One run of a suite."""

    method: str
    seed: int
    recipe: dict[str, Any]
    """The whole recipe but output_dir."""
    key: str
    """Hash of all that decides the outcome: recipe, local input files, code, versions."""

    @property
    def folder(self) -> str:
        return f"{self.method}-seed{self.seed}-{self.key}"


def load_suite(path: str | Path) -> Suite:
    """The suite in a YAML file, its recipe read in. Raises ConfigError for whatever is wrong with it, cells included."""
    source = read_yaml(path)
    suite = validate(Suite, source)
    for method, changes in suite.methods.items():
        for keys in OWNED:
            if _has(changes, keys):
                hint = "list the seeds under 'seeds'" if "seed" in keys else "each cell gets a folder of its own"
                raise ConfigError(source.problem(("methods", method, *keys), f"is set by the harness: {hint}"))
    recipe = suite.recipe if isinstance(suite.recipe, dict) else read_yaml(Path(path).parent / suite.recipe).data
    suite = suite.model_copy(update={"recipe": recipe})
    _check(suite, source)
    return suite


def cells(suite: Suite) -> list[Cell]:
    """All cells, method by method; `suite.recipe` must be the recipe itself, as `load_suite` leaves it."""
    if not isinstance(suite.recipe, dict):
        raise TypeError("suite.recipe is a path: read the suite with load_suite")
    code = code_hash()
    found = []
    for method in suite.methods:
        for seed in suite.seeds:
            recipe = merge(_recipe_of(suite, method), {"train": {"seed": seed}})
            content = json.dumps([recipe, _inputs(recipe), code, _versions()], sort_keys=True, default=str)
            found.append(Cell(method, seed, recipe, hashlib.sha256(content.encode()).hexdigest()[:12]))
    return found


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, as a new dict: mappings merge deep, everything else (lists too) replaces."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else copy.deepcopy(value)
    return merged


def _has(changes: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(changes, dict) and keys[0] in changes and (len(keys) == 1 or _has(changes[keys[0]], keys[1:]))


def _recipe_of(suite: Suite, method: str) -> dict[str, Any]:
    assert isinstance(suite.recipe, dict)
    recipe = merge(suite.recipe, suite.methods[method])
    recipe.pop("output_dir", None)
    return recipe


def _check(suite: Suite, source: Source) -> None:
    """Validates the recipe of every method now, rather than as one crashed cell after the other."""
    from peftkit.recipe import load_recipe  # imports torch, which readers of results do not need

    problems = []
    for method in suite.methods:
        try:
            recipe = load_recipe(_recipe_of(suite, method) | {"output_dir": "cell"})
        except ConfigError as error:
            problems.append(source.problem(("methods", method), str(error)))
            continue
        if suite.metric not in recipe.eval.metrics:
            problems.append(source.problem(("methods", method), f"its recipe does not measure {suite.metric}: add it to eval.metrics"))
    if problems:
        raise ConfigError("\n".join(problems))


# --- what a key is made of ----------------------------------------------------------------------------------------------------


def code_hash() -> str:
    """Hash of the package's files, embedded model included, that can change an outcome."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        parts = path.relative_to(PACKAGE).parts
        if path.is_file() and "__pycache__" not in parts and parts[0] not in NOT_IN_KEY:
            digest.update(f"{'/'.join(parts)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"peftkit": peftkit.__version__}
    for package in ("torch", "transformers", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _inputs(recipe: dict[str, Any]) -> dict[str, Any]:
    """Data files by content and model folders by the names, sizes and times of their files: a changed input is another cell."""
    data, evaluation = recipe.get("data", {}), recipe.get("eval", {})
    found: dict[str, Any] = {}
    mixed = [part.get("source") for part in [data.get("replay") or {}, *(data.get("mix") or [])]]
    for name in [data.get("train"), data.get("eval"), *mixed, *evaluation.get("retained", [])]:
        for path in sorted(Path(name).rglob("*")) if name and Path(name).is_dir() else [Path(name or "")]:
            if path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    model = Path(recipe.get("model", {}).get("name", "")).expanduser()
    if model.name and model.is_dir():
        found["model"] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(model.iterdir()) if path.is_file()]
    return found
