"""Result: the record of one run, and the folder it lives in."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.config import ConfigError
from peftkit.versions import versions

__all__ = ["MetricsLog", "Result", "machine", "plot_loss", "versions", "write_json"]


@dataclass(frozen=True)
class Result:
    """What a run did: scores before and after, cost, adapter, and all it takes to do it again."""

    before: dict[str, Any]
    after: dict[str, Any]
    train: dict[str, Any]
    adapter: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    output_dir: str

    def to_json(self) -> dict[str, Any]:
        """The content of result.json."""
        found = asdict(self)
        del found["output_dir"]
        return found

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """What `to_json` has written in a run folder, None where its run has not ended. Raises ConfigError where it is not that."""
        path = folder / "result.json"
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text()), output_dir=str(folder))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"output_dir: {path} is no result of a run ({type(error).__name__}: {error}); remove the folder, or give another output_dir"
            ) from error


def machine() -> dict[str, Any]:
    """The hardware that matters for speed and memory."""
    found: dict[str, Any] = {"platform": platform.system(), "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory}
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux: the standard library's guess
        return platform.processor()
    return platform.processor() or platform.machine()


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


class MetricsLog:
    """metrics.jsonl: one line per logged step; a resumed run drops what the killed one wrote beyond its checkpoint."""

    def __init__(self, path: Path, start: int):
        self.path = path
        kept = [line for line in self.read(path) if line["step"] <= start] if start and path.exists() else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        lines = []
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a run that was killed while writing it
                break
        return lines


def plot_loss(metrics: Path, path: Path, before: float | None, after: float | None) -> None:
    """The training loss by step, and the evaluation loss at both ends, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    read = MetricsLog.read(metrics)
    lines, evaluations = [line for line in read if "loss" in line], [line for line in read if "eval_loss" in line]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label="training")
    points = [(line["step"], line["eval_loss"]) for line in evaluations]
    if before is not None and after is not None and lines:  # where the best parameters were put back, they are not those of the last step
        points = [(0, before), *points] if points else [(0, before), (lines[-1]["step"], after)]
    if points:
        axes.plot(*zip(*points, strict=True), "o", label="evaluation")
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
