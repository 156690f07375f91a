"""The data stage: read rows, normalise them, render them with the chat template, mask, truncate, mix, pack, order, collate.

`load_examples` is the way from a config to examples; `make_rows` packs them or not, `DataOrder` says which of them make a
step, `collate` makes a batch of them.
"""

from __future__ import annotations

from peftkit.data.choices import Question, load_choices
from peftkit.data.config import DataConfig, Part
from peftkit.data.examples import Example, Examples, Rows
from peftkit.data.formats import FORMATS
from peftkit.data.isolate import check_isolation
from peftkit.data.load import load_examples
from peftkit.data.order import DataOrder
from peftkit.data.pack import batch_width, collate, make_rows, pack
from peftkit.data.pairs import collate_pairs
from peftkit.data.read import BadRow, HubError, local_file
from peftkit.data.render import render
from peftkit.data.report import DataReport, bad_lines
from peftkit.data.show import colour_row, marked_row

__all__ = [
    "FORMATS",
    "BadRow",
    "DataConfig",
    "DataOrder",
    "DataReport",
    "Example",
    "Examples",
    "HubError",
    "Part",
    "Question",
    "Rows",
    "bad_lines",
    "batch_width",
    "check_isolation",
    "collate",
    "collate_pairs",
    "colour_row",
    "load_choices",
    "load_examples",
    "local_file",
    "make_rows",
    "marked_row",
    "pack",
    "render",
]
