"""The installed versions of what results and adapters depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import peftkit

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Package -> installed version, with those of Python and peftkit first."""
    found = {"python": platform.python_version(), "peftkit": peftkit.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
