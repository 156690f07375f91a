"""The order of the rows: a function of seed and epoch, with rows of similar length in a batch."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from peftkit.data import DataOrder
from peftkit.run import run


@settings(max_examples=80, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 99), min_size=1, max_size=50), batch_size=st.integers(1, 17), seed=st.integers(0, 9))
def test_grouped_every_row_comes_once_an_epoch_and_any_step_can_be_asked_for(lengths, batch_size, seed):
    order, rows = DataOrder(len(lengths), batch_size, seed, lengths), len(lengths)
    course = [order[step] for step in range(3 * rows)]
    seen = [row for batch in course for row in batch]
    for epoch in range(len(seen) // rows):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    for step in (2 * rows, 0, rows):
        assert DataOrder(rows, batch_size, seed, lengths)[step] == course[step] == order[step]


def padding(order: DataOrder, lengths: list[int], steps: int) -> float:
    """Share of padding where every row of a batch is filled up to its longest."""
    batches = [[lengths[row] for row in order[step]] for step in range(steps)]
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)


def test_grouping_takes_most_of_the_padding_away_and_stays_random():
    draw = random.Random(0)
    lengths = [round(draw.lognormvariate(4.6, 0.8)) for _ in range(1003)]
    grouped, plain = DataOrder(1003, 16, 5, lengths), DataOrder(1003, 16, 5)
    assert padding(plain, lengths, 190) > 0.5 and padding(grouped, lengths, 190) < 0.12  # three epochs, their seams included
    longest = [max(lengths[row] for row in grouped[step]) for step in range(62)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert [grouped[step] for step in range(62)] != [grouped[step] for step in range(63, 125)], "another order each epoch"
    assert grouped[0] != DataOrder(1003, 16, 6, lengths)[0]
    for step in range(1, 62):
        batch = [lengths[row] for row in grouped[step]]
        assert batch == sorted(batch, reverse=True), "longest first, so that micro-batches are of similar length too"


def test_without_lengths_the_order_is_what_it_was():
    assert DataOrder(10, 4, 3)[0] == DataOrder(10, 4, 3, None)[0]
    with pytest.raises(ValueError, match="3 rows, 2 lengths"):
        DataOrder(3, 2, 0, [1, 2])
    with pytest.raises(ValueError, match="an order needs rows"):
        DataOrder(0, 2, 0)


@pytest.mark.parametrize("options, grouped", [({}, True), ({"group_by_length": False}, False), ({"packing": True}, False)])
def test_a_run_groups_its_rows_unless_they_are_packed_or_it_is_told_not_to(tmp_path, monkeypatch, options, grouped):
    asked = []

    class Watched(DataOrder):
        def __init__(self, rows, batch_size, seed, lengths=None):
            asked.append(lengths)
            super().__init__(rows, batch_size, seed, lengths)

    monkeypatch.setattr("peftkit.train.DataOrder", Watched)
    rows = [{"text": "word " * (1 + i % 7)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "model": {"name": "builtin:tiny"},
        "methods": [{"lora": {"r": 2}}],
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64, **options},
        "train": {"max_steps": 1, "batch_size": 4},
        "output_dir": str(tmp_path / "out"),
    }
    run(recipe, console=Console(quiet=True))
    [lengths] = asked
    assert (lengths is not None) == grouped and (not grouped or (len(lengths) == 12 and len(set(lengths)) == 7))
