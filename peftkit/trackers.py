"""Experiment trackers, through accelerate: which package each needs, and what is told to them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",), "mlflow": ("mlflow",)}  # any one of them


def missing(names: Sequence[str]) -> str | None:
    """What to install for the first tracker whose package is not there; None where all are."""
    for name in names:
        if not any(find_spec(package) for package in PACKAGES[name]):
            return f"{name} is not installed; `pip install {PACKAGES[name][0]}`, or leave it out"
    return None


def flat(structure: Any, at: str = "") -> dict[str, int | float | str | bool]:
    """A nested recipe as "train.learning_rate" -> value, in types that every tracker takes."""
    if isinstance(structure, dict):
        return {key: value for name, inner in structure.items() for key, value in flat(inner, f"{at}.{name}" if at else str(name)).items()}
    if isinstance(structure, list):
        return {key: value for i, inner in enumerate(structure) for key, value in flat(inner, f"{at}.{i}").items()}
    return {at: structure if isinstance(structure, (int, float, str, bool)) else str(structure)}
