"""The run folder: whether a run may have it, and how one begins in it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from peftkit.amounts import human
from peftkit.checkpoint import checkpoints
from peftkit.config import ConfigError, read_yaml
from peftkit.recipe import Recipe, resolved
from peftkit.result import write_text
from peftkit.train import TrainConfig

MICRO_BATCH_FILE = "micro_batch_size.json"
"""What `micro_batch_size: auto` became, for a run that is resumed where there is more memory or less."""
EARLIER = ("adapter", "model", "checkpoints")
"""What a new run clears out of its folder."""


def open_folder(recipe: Recipe, resume: bool) -> Path:
    """The run folder, as it is. Refuses one that holds an unfinished run, unless that one is resumed, and one that is not a run's."""
    folder = Path(recipe.output_dir)
    written = folder / "recipe.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file, not a folder; give another output_dir")
    must_be_writable(folder)
    ended, kept = (folder / "result.json").exists(), checkpoints(folder / "checkpoints")
    trained = [folder / name for name in ("adapter", "model") if (folder / name).exists()]
    remedy = f"Score it with `peftkit eval {folder}`, remove the folder, or give another output_dir"
    if resume:
        if not written.exists():
            raise ConfigError(f"output_dir: nothing to resume in {folder}: it holds no recipe.yaml")
        changed = differences(read_yaml(written).data, recipe.model_dump())
        if changed:
            raise ConfigError(f"output_dir: {folder} holds a run of another recipe, which cannot be resumed with this one:\n  " + "\n  ".join(changed))
        if trained and not kept and not ended:
            raise ConfigError(f"output_dir: {trained[0]} was trained and no checkpoint is left of it: resuming would train it again from the start. {remedy}")
        return folder
    if kept and not ended:
        raise ConfigError(f"output_dir: {folder} holds an unfinished run with checkpoints; go on with --resume, remove the folder, or give another output_dir")
    if written.exists() and trained and not ended:
        raise ConfigError(f"output_dir: {trained[0]} was trained, and the run did not end after that; a new run would clear it away. {remedy}")
    if folder.exists() and any(folder.iterdir()) and not written.exists():
        raise ConfigError(f"output_dir: {folder} is not empty and holds no run of peftkit; give another output_dir")
    return folder


def must_not_replace(folder: Path, recipe: Recipe) -> None:
    """Raises ConfigError where a new run would clear away what a run of another recipe has trained."""
    written = folder / "recipe.yaml"
    if not written.exists() or not any((folder / name).exists() for name in ("adapter", "model")):
        return
    if changed := differences(read_yaml(written).data, recipe.model_dump()):
        raise ConfigError(
            f"output_dir: {folder} holds what a run of another recipe has trained; give another output_dir, or remove it:\n  " + "\n  ".join(changed)
        )


def must_be_writable(folder: Path) -> None:
    """Raises ConfigError where nothing can be written to `folder`, which need not exist yet: before hours of work that could not be saved."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"peftkit")
            probe.flush()
    except OSError as error:
        raise ConfigError(f"output_dir: nothing can be written to {there} ({error.strerror}); give another output_dir, or make it writable") from error


def must_have_room(folder: Path, train: TrainConfig, steps: int, saved: int, state: int) -> None:
    """Raises ConfigError where the disk of `folder`, which need not exist yet, cannot hold a new run there of so many steps.

    saved: bytes written at the end. state: bytes of one checkpoint, of which the kept ones and the one that is being written take room; one is written where
    the run is stopped, too. An earlier run in the folder gives its room up.
    """
    on_the_way = (steps - 1) // train.save_every if train.save_every else 0
    best = (steps - 1) // train.eval_every if train.eval_every and train.keep_best else 0
    kept = min(train.keep_last + min(train.keep_best, best) + 1, on_the_way + best + 1)  # and the last step's
    needed = saved + kept * state
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    earlier = sum(file.stat().st_size for old in EARLIER for file in (folder / old).rglob("*") if file.is_file())
    if (free := shutil.disk_usage(there).free + earlier) < needed:
        raise ConfigError(
            f"output_dir: the run writes {human(needed)} (what it trains, and {kept} checkpoints at most) and {human(free)} are free in {there}; make room, "
            "or give another output_dir"
        )


def start_folder(folder: Path, recipe: Recipe) -> None:
    """Clears an earlier run out of its folder and writes the recipe: only once data, model and targets are known to be good."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("result.json", "before.json", MICRO_BATCH_FILE, "metrics.jsonl", "predictions.jsonl", "loss.png"):
        (folder / old).unlink(missing_ok=True)  # the result first: while it is there, the run has ended
    for earlier in (*(folder / name for name in EARLIER), *folder.glob(".writing-*")):
        shutil.rmtree(earlier, ignore_errors=True)
    write_text(folder / "recipe.yaml", resolved(recipe))


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Lines "key: old -> new" for every leaf that differs between two plain structures."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{at}.{i}")]
    return [] if old == new else [f"{at}: {old!r} -> {new!r}"]
