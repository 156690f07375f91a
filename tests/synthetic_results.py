"""Results as a whole suite would leave them, made up: tasks, searched learning rates, timing cells, failures, published rows, answers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from peftkit.bench.records import Record, Results

METHODS = {"lora": 0.80, "dora": 0.81, "qlora": 0.79, "lora-loraplus": 0.88, "lora-r1": 0.55, "full": 0.82}
TASKS = {"sql": 0.0, "tool-calls": -0.1, "units": 0.05}
RATES = (1e-3, 3e-3, 1e-2)
MEMORY = {"qlora": 400, "full": 1400}
STEPS = {"lora": 1.08, "dora": 1.31, "qlora": 1.45, "lora-loraplus": 1.08, "lora-r1": 1.05, "full": 1.6}
SUITE = """name: mine
recipe:
  model: {name: builtin:tiny}
  methods: [{lora: {r: 2}}]
  data: {train: builtin:copy/train, eval: builtin:copy/test}
  train: {max_steps: 100}
  eval: {metrics: [exact_match]}
methods:
  lora: {}
  dora: {methods: [{dora: {r: 2}}]}
seeds: [0, 1]
"""
"""Two methods on two seeds, for tests of suites."""
HOSTILE = "<script>document.title = 'hacked'</script>"


def record(method: str, task: str, seed: int, accuracy: float, rate: float, steps: int = 120, stage: str = "final", examples: int = 60) -> Record:
    draw = random.Random(f"{method}/{task}/{seed}/{rate}/{stage}/{steps}")
    hard = [random.Random(f"{task}/{i}").random() for i in range(examples)]  # the same examples are hard for all methods
    outcomes = [int(0.6 * h + 0.4 * draw.random() < accuracy) for h in hard]
    curve = [[step, 3.0 * math.exp(-step / 25) + 0.3 * (1.1 - accuracy) + 0.05 * draw.random(), step * 0.1] for step in range(1, steps + 1)]
    share = sum(outcomes) / examples
    retained = {f"builtin:{name}/test": value for name, value in (("copy", 0.4 + 0.1 * draw.random()), ("dates", 0.9), ("lookup", 0.1))}
    return Record(
        method=method, seed=seed, key=f"{draw.randrange(16**12):012x}", status="done", wall_seconds=30.0 + draw.random(), log=f"runs/{method}/log.txt",
        recipe={
            "model": {"name": "builtin:tiny"}, "methods": [{"lora": {"r": 1 if method == "lora-r1" else 8}}], "data": {"train": f"builtin:{task}/train"},
            "train": {"learning_rate": rate, "max_steps": steps, "batch_size": 16, "seed": seed},
        },
        before={"exact_match": 0.02, "loss": 9.0, "retained_exact_match": 0.93, "retained": dict.fromkeys(retained, 0.93)},
        after={"exact_match": share, "loss": 0.2, "retained_exact_match": 0.45, "retained": retained},
        train={
            "seconds": 20.0 + draw.random(), "steps": steps, "tokens": 90_000, "tokens_per_second": 4500.0 + 100 * draw.random(),
            "peak_memory_bytes": MEMORY.get(method, 900) * 2**20 + draw.randrange(2**20),
        },
        adapter={"trainable_parameters": 175_104, "bytes": 710_000, "modules": 48}, machine={"cores": 2}, versions={"torch": "2.13.0"},
        outcomes=outcomes, examples=f"hash-{task}", wrong={str(i): f"wrong {i}" for i, right in enumerate(outcomes) if not right},
        task=task, stage=stage, learning_rate=rate, curve=curve,  # type: ignore[arg-type]
    )  # fmt: skip


def timing(method: str, task: str) -> Record:
    rounds = [STEPS[method] + 0.01 * ((i * 7) % 5 - 2) for i in range(15)]
    timed = {
        "rounds": rounds,
        "over_base": STEPS[method],
        "seconds": 0.1 * STEPS[method],
        "base_seconds": 0.1,
        "saved_bytes": 10**8,
        "base_saved_bytes": 9 * 10**7,
    }
    return Record(method=method, seed=0, key="t", status="done", wall_seconds=9.0, log="log.txt", task=task, stage="timing", timing=timed)


def failed(method: str, task: str, seed: int, kind: str, text: str) -> Record:
    return Record(
        method=method, seed=seed, key="f", status="failed", wall_seconds=5.0, log="runs/x/log.txt", exit_code=1, kind=kind,  # type: ignore[arg-type]
        traceback=f"Traceback (most recent call last):\n  File \"train.py\", line 7\nRuntimeError: {text}", task=task,
    )  # fmt: skip


def synthetic(hostile: bool = False, **changes: Any) -> Results:
    """A suite of three tasks, six methods, three seeds and three learning rates, with a failure of each kind.

    hostile: every text that comes from data tries to be a script.
    """
    evil = HOSTILE if hostile else ""
    cells = []
    for task, shift in TASKS.items():
        for method, level in METHODS.items():
            accuracy = level + shift
            for steps in (40, 120):
                for i, rate in enumerate(RATES if steps == 40 else RATES[1:]):
                    cells.append(
                        record(method, task, 100, accuracy * (0.5, 0.75, 0.6)[i if steps == 40 else i + 1] * (1 if steps == 40 else 1.2), rate, steps, "search")
                    )
            cells += [record(method, task, seed, accuracy + 0.01 * seed, RATES[1]) for seed in range(3)]
    cells += [timing(method, "sql") for method in METHODS]
    cells.append(failed("diverging" + evil, "sql", 0, "divergence", f"non-finite loss {evil}"))
    cells.append(failed("qlora", "units", 3, "out_of_memory", f"CUDA out of memory {evil}"))
    if hostile:
        cells = [each.model_copy(update={"wrong": {key: evil for key in each.wrong}, "task": each.task + evil}) for each in cells]
    examples = {
        task + evil: [{"prompt": f"Question {i} of {task}: {evil} what is {i} + {i}?", "answer": f"{2 * i} {evil}"} for i in range(60)] for task in TASKS
    }
    values: dict[str, Any] = {
        "suite": "synthetic", "metric": "exact_match", "target": 0.8, "commit": "abcdef0123456789", "dirty": False, "created": "2026-01-01T00:00:00+00:00",
        "machine": {"processor": f"Test{evil}", "cores": 2}, "versions": {"torch": "2.13.0"}, "examples": examples, "cells": cells,
        "published": [{"method": f"LoRA{evil}", "task": "sql" + evil, "metric": "exact_match", "value": 0.77, "source": f"A paper, table 2{evil}"}],
    }  # fmt: skip
    return Results(**(values | changes))


def with_curves(results: Results) -> Results:
    """Results of a suite, each cell with a loss curve."""
    return results.model_copy(
        update={"cells": [each.model_copy(update={"curve": [[step, 2 / step, 0.1 * step] for step in range(1, 151)]}) for each in results.cells]}
    )


def write(results: Results, path: Path) -> Path:
    path.write_text(json.dumps(results.model_dump()))
    return path
