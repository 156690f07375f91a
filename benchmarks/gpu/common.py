"""What the GPU benchmarks share: where a result comes from, and the refusal to call a CPU's numbers a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapters import commit
from peftkit.result import machine, versions, write_json

RESULTS = Path(__file__).resolve().parents[1] / "results"


def provenance() -> dict[str, Any]:
    """Machine, versions and commit of a result."""
    found = versions() | {"cuda": torch.version.cuda or "none"}
    for package in ("triton", "unsloth"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {"machine": machine(), "versions": found, "commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}


def check(device: str, output: Path | None) -> None:
    """Ends the program where the device is missing, or where results of a CPU are to be kept."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU and finds none; --shape tiny --device cpu rehearses its code")
    if not device.startswith("cuda") and output is not None:
        raise SystemExit(f"refused to write {output}: files of this benchmark hold a GPU's numbers, and this ran on {device}")


def write(output: Path, device: str, content: dict[str, Any]) -> None:
    check(device, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, content | provenance())
    print(f"written: {output}")


def synchronized(device: str) -> Callable[[], None]:
    """Waits for the device, as far as there is something to wait for."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None
