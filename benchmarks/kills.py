"""Kills a small run with SIGKILL many times, goes on with it each time, and compares the adapter's bytes with those of a run left alone.

    python benchmarks/kills.py --kills 100 --output benchmarks/results/kills.json

Half of the kills are aimed at random moments, half into the writing of a checkpoint: the killer waits until a half-written one is seen, then a
random part of the time that writing takes. What a kill really hit is read from what it left. Exit code 1 where any run ends otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  with what follows imported for the forked processes, which then need not
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch
import transformers
import transformers.models.llama.modeling_llama
from rich.console import Console

from peftkit.checkpoint import checkpoints
from peftkit.result import MetricsLog, machine, versions, write_json
from peftkit.run import run

STEPS = 8
LATE = 120.0  # seconds after which a run that should have ended is taken to hang
WRITING = 0.02  # seconds that writing one checkpoint of this size takes, at most


def recipe(folder: Path) -> dict[str, Any]:
    """Everything that a resumed run has to restore: LoRA+ groups, dropout, NEFTune's generator, packing, accumulation, the best evaluation."""
    return {
        "model": {"name": "builtin:tiny", "dtype": "float32"},
        "methods": [{"lora": {"r": 4, "dropout": 0.1}}, {"loraplus": {"ratio": 4.0}}, {"neftune": {"alpha": 5.0}}],
        "data": {
            "train": "builtin:tool-calls/train", "eval": "builtin:tool-calls/test", "max_length": 128, "packing": True, "train_rows": 48, "eval_rows": 4,
        },
        "train": {"learning_rate": 2.0e-3, "max_steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "log_every": 1, "save_every": 1, "eval_every": 3},
        "output_dir": str(folder),
    }  # fmt: skip


def start(folder: Path, resume: bool) -> int:
    """The id of a process that does the run. It is forked: all is imported already, which leaves the time to what is tested."""
    child = os.fork()
    if child:
        return child
    try:
        run(recipe(folder), resume=resume, console=Console(quiet=True))
    except BaseException as error:
        print(f"{folder.name}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def running(process: int) -> bool:
    """Whether it has not ended yet; its exit code stays to be had."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait(process: int) -> int:
    """The exit code of a process, negative for the signal that ended it."""
    deadline = time.monotonic() + LATE
    while running(process):
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(process: int, folder: Path, aim: str, chance: random.Random, seconds: float) -> str:
    """Kills a run that was just started, and says what it was doing. Raises RuntimeError where it ended by itself with an error."""
    while running(process) and not (folder / "recipe.yaml").exists():  # before, there is nothing to go on with
        time.sleep(0.001)
    if aim == "writing":
        until = chance.randrange(STEPS - 1)
        while running(process) and not half_written(folder, until):
            pass  # as often as can be: a checkpoint is written within milliseconds
        time.sleep(chance.random() * WRITING)
    else:
        time.sleep(chance.random() * seconds)
    os.kill(process, signal.SIGKILL)
    code = wait(process)
    if code == 0:
        return "after the end"
    if code != -signal.SIGKILL:
        raise RuntimeError(f"{folder} ended with {code}")
    return "writing a checkpoint" if half_written(folder, 0) else "before the first checkpoint" if not checkpoints(folder / "checkpoints") else "elsewhere"


def half_written(folder: Path, after: int) -> bool:
    return any(int(path.name.rsplit("-", 1)[1]) > after for path in (folder / "checkpoints").glob(".writing-*"))


def same(folder: Path, whole: Path) -> bool:
    """Whether two runs ended alike: the adapter's bytes, every loss, the scores."""
    adapters = [(f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (folder, whole)]
    losses = [[(line["step"], line.get("loss"), line.get("eval_loss")) for line in MetricsLog.read(f / "metrics.jsonl")] for f in (folder, whole)]
    scores = [json.loads((f / "result.json").read_text())["after"] for f in (folder, whole)]
    return adapters[0] == adapters[1] and losses[0] == losses[1] and scores[0] == scores[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write what was found, as JSON")
    options = parser.parse_args(arguments)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # no thread of torch's own may be there when a process is forked
    chance, hit, different = random.Random(options.seed), Counter[str](), list[int]()
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        if wait(start(whole, resume=False)) != 0:
            print("the run that nothing disturbs failed", file=sys.stderr)
            return 1
        seconds = time.time() - (whole / "recipe.yaml").stat().st_mtime  # of training, and what comes after it
        for number in range(options.kills):
            doing, tries = "after the end", 0
            while doing == "after the end":  # one that was faster than the kill: it does not count
                folder, tries = Path(place) / f"kill-{number}-{tries}", tries + 1
                doing = kill(start(folder, resume=False), folder, "writing" if number % 2 else "any", chance, seconds)
            hit[doing] += 1
            if wait(start(folder, resume=True)) != 0 or not same(folder, whole):
                different.append(number)
            print(f"{number + 1}/{options.kills}: killed {doing}; {'another adapter' if number in different else 'the same adapter'}", flush=True)
    found = {
        "kills": options.kills, "seed": options.seed, "hit": dict(sorted(hit.items())), "same_bytes": options.kills - len(different), "different": different,
        "recipe": recipe(Path("run")), "versions": versions(), "machine": machine(),
    }  # fmt: skip
    if options.output:
        write_json(options.output, found)
    print(f"{found['same_bytes']} of {options.kills} runs ended with the bytes of the run left alone; killed: {found['hit']}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
