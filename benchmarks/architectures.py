"""Runs the tests of every architecture and writes their figures to benchmarks/results/architectures.json, which the documentation shows.

    python benchmarks/architectures.py && python benchmarks/write_docs.py

Exits with 1, and writes nothing, where a row fails. The figures are what `tests/test_architectures.py` records with `record_property`.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS, RESULTS = ROOT / "tests" / "test_architectures.py", ROOT / "benchmarks" / "results" / "architectures.json"
FACTS = ("name", "head", "model", "passed_by", "experts", "refused_by_peft")


class Figures:
    """A pytest plugin that collects what the tests record: row -> its facts, and method -> figures."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, recorded in report.user_properties if report.when == "call" else ():
            if name == "figures":
                architecture, method, figures = recorded
                facts = {key: value for key, value in asdict(architecture).items() if key in FACTS}
                self.rows.setdefault(architecture.row, facts)[method] = figures


def main() -> int:
    found = Figures()
    status = pytest.main([f"{TESTS}::test_architecture", "-p", "no:cacheprovider"], plugins=[found])
    if status != 0:
        print("a row fails; nothing was written")
        return 1
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")}
    lines = ",\n".join(f"{json.dumps(row)}: {json.dumps(figures)}" for row, figures in found.rows.items())
    RESULTS.write_text(f'{{"versions": {json.dumps(versions)}, "rows": {{\n{lines}\n}}}}\n')
    print(f"{len(found.rows)} rows written to {RESULTS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
