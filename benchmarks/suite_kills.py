"""Kills a small suite many times at random moments, runs it again to its end, and compares its results file with that of a suite left alone.

    python benchmarks/suite_kills.py --kills 30 --output benchmarks/results/suite_kills.json

Each kill is a SIGKILL to the whole process group, the harness and its cells at once, after a random part of the time that the suite takes. Compared
is results.json with times, memory and paths taken out: outcomes, losses by step, scores, chosen rates. Exit code 1 where any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from peftkit.bench.records import write_whole
from peftkit.config import dump_yaml
from peftkit.console import bar
from peftkit.folder import differences

SUITE: dict[str, Any] = {
    "name": "killed",
    "recipe": {
        "model": {"name": "builtin:tiny", "dtype": "float32"},
        "data": {"train": "builtin:tool-calls/train", "eval": "builtin:tool-calls/test", "train_rows": 64, "eval_rows": 8},
        "train": {"max_steps": 12, "batch_size": 4, "log_every": 1, "save_every": 2},
        "eval": {"metrics": ["loss", "exact_match"]},
    },
    "methods": {
        "lora": {"methods": [{"lora": {"r": 4, "dropout": 0.1}}, {"neftune": {"alpha": 5.0}}]},
        "dora": {"methods": [{"dora": {"r": 4}}, {"loraplus": {"ratio": 4.0}}]},
    },
    "learning_rates": {"lora": [1.0e-3, 4.0e-3], "dora": [2.0e-3]},
    "search": {"rungs": [4]},
    "seeds": [0],
}
TIMES = ("wall_seconds", "log", "created")
OF_TRAINING = ("seconds", "tokens_per_second", "peak_memory_bytes", "energy_joules")


def start(suite: Path, folder: Path, jobs: int) -> subprocess.Popen[bytes]:
    """The suite in a process group of its own."""
    command = [sys.executable, "-m", "peftkit", "bench", "run", str(suite), "--folder", str(folder), "--jobs", str(jobs)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment)


def without_times(folder: Path) -> dict[str, Any]:
    """results.json without what no two runs share."""
    content = json.loads((folder / SUITE["name"] / "results.json").read_text())
    for key in ("created", "commit", "dirty"):
        content.pop(key)
    for record in content["cells"]:
        for key in TIMES:
            record.pop(key, None)
        record["curve"] = [point[:2] for point in record.get("curve", [])]
        record["train"] = {key: value for key, value in record["train"].items() if key not in OF_TRAINING}
    return content


def state(folder: Path) -> dict[str, int]:
    """What a kill left: ended cells, begun ones with checkpoints, begun ones without."""
    places = [path for path in (folder / SUITE["name"]).glob("*") if path.is_dir()]
    open_ = [path for path in places if not (path / "record.json").exists()]
    saved = sum(any((path / "run" / "checkpoints").glob("step-*")) for path in open_)
    return {"ended": len(places) - len(open_), "with_checkpoint": saved, "without_checkpoint": len(open_) - saved}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the outcome to this JSON")
    args = parser.parse_args(arguments)
    rng, kills, console = random.Random(args.seed), [], Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        suite = Path(scratch) / "suite.yaml"
        suite.write_text(dump_yaml(SUITE))
        alone, began = Path(scratch) / "alone", time.monotonic()
        if code := start(suite, alone, args.jobs).wait():
            sys.exit(f"the suite left alone ended with exit code {code}:\n{(Path(scratch) / 'alone.log').read_text()}")
        whole, expected = time.monotonic() - began, without_times(alone)
        whole_results = json.loads((alone / SUITE["name"] / "results.json").read_text())
        with bar(console, "kills", args.kills) as progress:
            for i in range(args.kills):
                folder, after = Path(scratch) / f"kill-{i}", rng.uniform(0, whole)
                process = start(suite, folder, args.jobs)
                try:
                    process.wait(timeout=after)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
                left = state(folder)
                again = start(suite, folder, args.jobs).wait()
                found = without_times(folder) if again == 0 else None
                kills.append(
                    {"after_seconds": round(after, 2), "killed": code == -signal.SIGKILL, "left": left, "rerun_exit_code": again, "same": found == expected}
                )
                if not kills[-1]["same"]:
                    lines = "\n  ".join(differences(expected, found)) if found else (Path(scratch) / f"kill-{i}.log").read_text()
                    console.print(f"kill {i} after {after:.1f} s: other results\n  {lines}", highlight=False, markup=False)
                progress.advance()
    hits = [kill for kill in kills if kill["killed"]]
    print(f"{sum(kill['same'] for kill in kills)} of {len(kills)} suites ended with the results of the one left alone; {len(hits)} were killed on their way")
    if args.output:
        origin = {key: whole_results[key] for key in ("commit", "dirty", "machine", "versions")}
        content = {"suite_seconds": whole, "kills": kills, "same": sum(kill["same"] for kill in kills), "killed": len(hits), **origin}
        write_whole(args.output, json.dumps(content | {"created": datetime.now(UTC).isoformat(timespec="seconds")}, indent=1) + "\n")
    if not all(kill["same"] for kill in kills):
        sys.exit(1)


if __name__ == "__main__":
    main()
