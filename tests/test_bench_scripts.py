"""The scripts that try the harness itself: benchmarks/sanity.py and benchmarks/suite_kills.py."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from peftkit.bench.cells import Record, Results
from peftkit.bench.suite import Suite, cells
from peftkit.builtin.tasks import builtin_rows


@pytest.fixture
def script(monkeypatch):
    """A benchmark by its name; the repository's root must be importable for it, whichever way pytest was started."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_shuffled_answers_belong_to_other_questions(script):
    rows, shuffled = builtin_rows("tool-calls", "train"), script("sanity").shuffled_rows()
    assert [row["messages"][0] for row in rows] == [row["messages"][0] for row in shuffled]
    assert sorted(row["messages"][-1]["content"] for row in rows) == sorted(row["messages"][-1]["content"] for row in shuffled)
    kept = sum(old["messages"][-1] == new["messages"][-1] for old, new in zip(rows, shuffled, strict=True))
    assert kept < 0.005 * len(rows)  # rows with equal answers may still meet
    assert shuffled == script("sanity").shuffled_rows()


def records(method: str, right: int, seeds) -> list[Record]:
    outcomes = [1] * right + [0] * (200 - right)
    return [Record(method=method, seed=s, key="k", status="done", wall_seconds=1.0, log="", outcomes=outcomes, examples="x") for s in seeds]


def known(verdicts, **changes) -> dict[str, bool]:
    """Verdicts on results that are as they must be, but for the changes: method -> right answers of 200."""
    right = {"lora": 150, "lora-again": 151, "lora-r1": 20, "lora-r16": 160, "lora-rate-30x": 30, "frozen": 0, "shuffled": 0} | changes
    made = [record for method, count in right.items() for record in records(method, count, (10, 11, 12) if method == "lora-again" else (0, 1, 2))]
    return {line["what"]: line["holds"] for line in verdicts(Results(suite="sanity", metric="exact_match", created="", cells=made))}


def test_the_sanity_verdicts_hold_what_is_known(script):
    sanity = script("sanity")
    assert len(known(sanity.verdicts)) == len(sanity.PAIRS) + 1 and all(known(sanity.verdicts).values())
    for change, broken in (
        ({"lora-again": 20}, "lora-again and lora are not told apart"),
        ({"lora-r1": 160}, "lora-r16 and lora-r1 are told apart"),
        ({"lora-r1": 200}, "lora-r16 and lora-r1 are told apart"),  # apart, but the wrong way round
        ({"frozen": 150}, "lora and frozen are told apart"),
        ({"shuffled": 30}, "on shuffled answers accuracy is at chance, at most 2%"),
    ):
        found = known(sanity.verdicts, **change)
        assert [what for what, holds in found.items() if not holds] == [broken]


def test_a_missing_method_is_no_pass(script):
    found = script("sanity").verdicts(Results(suite="sanity", metric="exact_match", created="", cells=records("lora", 150, (0, 1, 2))))
    assert not any(line["holds"] for line in found)


def test_kills_compare_all_but_times(tmp_path, script):
    kills = script("suite_kills")
    folder = tmp_path / "killed"
    (folder / "a" / "run" / "checkpoints" / "step-000002").mkdir(parents=True)
    (folder / "b").mkdir()
    (folder / "b" / "record.json").write_text("{}")
    (folder / "c" / "run").mkdir(parents=True)
    assert kills.state(tmp_path) == {"ended": 1, "with_checkpoint": 1, "without_checkpoint": 1}
    record = {"outcomes": [1], "wall_seconds": 2.0, "log": "x", "curve": [[1, 0.5, 9.0]], "train": {"seconds": 3.0, "steps": 1}}
    (folder / "results.json").write_text(json.dumps({"created": "now", "commit": "c", "dirty": False, "cells": [record]}))
    assert kills.without_times(tmp_path) == {"cells": [{"outcomes": [1], "curve": [[1, 0.5]], "train": {"steps": 1}}]}
    assert len(cells(Suite(**kills.SUITE))) == 2
