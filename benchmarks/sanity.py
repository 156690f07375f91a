"""Runs the suite `sanity` and holds the harness's verdicts against what is known to be so.

    python benchmarks/sanity.py --jobs 2 --output benchmarks/results/sanity.json

LoRA against itself under other seeds must not be told apart. Rank 1 against rank 16, a learning rate 30 times too low, and an adapter that is
attached but does not train must be. Trained on answers that belong to other questions, accuracy must be at chance. Exit code 1 where one is not so.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from peftkit.bench.cells import Record, Results, load_results, run_suite
from peftkit.bench.records import write_whole
from peftkit.bench.statistics import accuracy, difference
from peftkit.bench.suite import load_suite
from peftkit.builtin.tasks import builtin_rows

SUITE = Path(__file__).parent / "suites" / "sanity.yaml"
SHUFFLED = Path("runs/sanity/shuffled.jsonl")  # as the suite names it
TASK = "tool-calls"
PAIRS = {  # (method, other) -> whether they are to be told apart
    ("lora-again", "lora"): False,
    ("lora-r16", "lora-r1"): True,
    ("lora", "lora-rate-30x"): True,
    ("lora", "frozen"): True,
    ("lora", "shuffled"): True,
}
CHANCE = 0.02  # accuracy of answers that belong to other questions: two of the rows may share an answer, hardly more


def shuffled_rows(seed: int = 0) -> list[dict[str, Any]]:
    """The training rows with each answer moved to another row."""
    rows = builtin_rows(TASK, "train")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    moved = {order[i]: order[i - 1] for i in range(len(order))}  # one cycle through all: none keeps its own
    return [{"messages": [*row["messages"][:-1], rows[moved[i]]["messages"][-1]]} for i, row in enumerate(rows)]


def verdicts(results: Results) -> list[dict[str, Any]]:
    """One line for each thing that is known: what the harness says of it, and whether that is so."""
    found = []
    for (method, other), apart in PAIRS.items():
        line: dict[str, Any] = {"what": f"{method} and {other} are {'' if apart else 'not '}told apart"}
        try:
            seen = difference(outcomes(results.methods[method]), outcomes(results.methods[other]))
        except (KeyError, ValueError) as error:
            found.append(line | {"says": f"cannot be compared: {error}", "holds": False})
            continue
        told = seen.told_apart and (not apart or seen.mean > 0)
        found.append(line | {"says": seen.words(method, other), "holds": told == apart, "difference": asdict(seen)})
    records = [record for record in results.methods.get("shuffled", []) if record.status == "done"]
    interval = accuracy([record.outcomes for record in records]) if records else None
    says = "no seed is done" if interval is None else f"accuracy {interval.mean:.1%}"
    holds = interval is not None and interval.mean <= CHANCE
    found.append({"what": f"on shuffled answers accuracy is at chance, at most {CHANCE:.0%}", "says": says, "holds": holds})
    return found


def outcomes(records: Sequence[Record]) -> dict[int, list[int]]:
    return {record.seed: record.outcomes for record in records if record.status == "done"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", default="runs/bench")
    parser.add_argument("--output", type=Path, help="write the verdicts to this JSON")
    args = parser.parse_args(arguments)
    write_whole(SHUFFLED, "".join(json.dumps(row) + "\n" for row in shuffled_rows()))
    suite = load_suite(SUITE)
    run_suite(suite, args.folder, args.jobs, console=Console(stderr=True))
    results = load_results(Path(args.folder) / suite.name)
    lines = verdicts(results)
    for line in lines:
        print(f"{'ok ' if line['holds'] else 'NOT'} {line['what']}: {line['says']}")
    if args.output:
        means = {name: accuracy(list(outcomes(records).values())).mean for name, records in results.methods.items() if outcomes(records)}
        origin = results.model_dump(include={"commit", "dirty", "created", "machine", "versions"})
        write_whole(args.output, json.dumps({"verdicts": lines, "accuracy": means, **origin}, indent=2) + "\n")
    if not all(line["holds"] for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
