"""The notebook of the documentation runs from its first cell to its last, offline, and its committed outputs are what it gives.

Made anew with `jupyter nbconvert --to notebook --execute --inplace docs/wrap_a_model.ipynb`.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "wrap_a_model.ipynb"


def told(cell) -> str:
    """What a cell printed and gave, numbers left out: they are the machine's."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs if output.get("name") != "stderr"]
    return re.sub(r"\d+(\.\d+)?", "#", "".join(texts)).strip()


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_committed_outputs_are_whole(committed):
    nbformat.validate(committed)
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "executed from the first to the last"
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert not re.search(r"/(tmp|home|root|work)/", "".join(map(str, outputs))), "no path of the machine it was made on"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_notebook_gives_its_committed_outputs(committed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    executed = copy.deepcopy(committed)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(executed, timeout=250, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for new, old in zip(executed.cells, committed.cells, strict=True):
        if new.cell_type == "code" and not old.metadata.get("peftkit", {}).get("varies"):
            assert told(new) == told(old), new.source
    assert list(tmp_path.glob("*.json")) == [], "nothing is written beside it"
