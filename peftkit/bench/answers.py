"""What results.json keeps of the answers themselves: each task's prompts and references once, of each cell the wrong answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEPT = 240  # characters of a text: enough to see what went wrong, and a thousand rows stay a few hundred KB


def read_answers(path: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a predictions.jsonl about the set `name`, in its order. Raises OSError, ValueError or KeyError."""
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]  # splitlines would split at U+2028 within a text
    return sorted((line for line in lines if line["set"] == name), key=lambda line: line["index"])


def wrong_answers(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Position -> answer, of the examples that were answered wrong."""
    return {str(i): _cut(row["prediction"]) for i, row in enumerate(rows) if not row["correct"]}


def shared_examples(cells: Iterable[tuple[str, Path]], name: str) -> dict[str, list[dict[str, str]]]:
    """task -> prompt and reference of every example of the set `name`, from the first of the task's (task, predictions.jsonl) that is still there.

    A run folder may have been cleared away since its record was written: the report then shows positions without texts.
    """
    found: dict[str, list[dict[str, str]]] = {}
    for task, path in cells:
        if task not in found and path.is_file():
            found[task] = [{"prompt": _cut(row.get("prompt", "")), "answer": _cut(row["answer"])} for row in read_answers(path, name)]
    return found


def _cut(text: str) -> str:
    return text if len(text) <= KEPT else text[: KEPT - 1] + "…"
