"""The built-in data sets: `builtin:<task>/train` and `/test`, made from a seed, the same on every machine.

Train and test rows never share content: a hash of a row's content (its list, passage, record or, for the unseen
families, its answer) decides on which side it falls, and training of `builtin:tiny` used the train side alone.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import zlib
from collections.abc import Iterator

from peftkit.builtin.families import FAMILIES, Row
from peftkit.builtin.unseen import UNSEEN

TASKS = {**FAMILIES, **UNSEEN}
SIZES = {"train": 2000, "test": 200}
UNSEEN_TRAIN = 5000  # rows to finetune on: enough that 400 steps of 16 hardly see one twice
TEST_SHARE = 10  # one content in ten is a test content


def is_test(content: str) -> bool:
    """Whether rows with this content belong to the test side."""
    return hashlib.sha256(content.encode()).digest()[0] % TEST_SHARE == 0


def stream(task: str, split: str, seed: int, turns: int = 1) -> Iterator[Row]:
    """Endless rows of `task` on one side of the split."""
    family = TASKS[task]
    rng = random.Random(zlib.crc32(f"{task}/{split}/{seed}".encode()))
    while True:
        row = family(rng, turns)
        if is_test(row.content) == (split == "test"):
            yield row


def messages(row: Row) -> list[dict[str, str]]:
    """The row as chat messages."""
    return [{"role": role, "content": content} for user, assistant in row.turns for role, content in (("user", user), ("assistant", assistant))]


def builtin_rows(task: str, split: str, count: int | None = None, seed: int = 0) -> list[dict]:
    """The rows of `builtin:<task>/<split>` as `{"messages": [...], "task": task}`, no two with the same messages.

    Raises ValueError for an unknown task or split, naming the nearest one.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown built-in task {task!r}{hint} (there are: {', '.join(sorted(TASKS))})")
    if split not in SIZES:
        raise ValueError(f"unknown split {split!r} of builtin:{task}; there are 'train' and 'test'")
    count = count or (UNSEEN_TRAIN if split == "train" and task in UNSEEN else SIZES[split])
    found: dict[tuple, dict] = {}
    for tried, row in enumerate(stream(task, split, seed)):
        found.setdefault(tuple(row.turns), {"messages": messages(row), "task": task})
        if len(found) == count:
            return list(found.values())
        if tried > 200 * count:
            raise ValueError(f"builtin:{task}/{split} has only {len(found)} different rows, {count} were asked for")
    raise AssertionError("stream() is endless")
