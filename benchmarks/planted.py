"""Plants faults in a copy of the package and asserts that the gate sees them: the scale of LoRA halved in its forward, an adapter 10% slower.

    python benchmarks/planted.py --output benchmarks/results/planted.json

The LoRA cells of the ci suite run with the package as it is and become the baseline; then with each fault, from a copy of the package in a
temporary folder, in processes whose PYTHONPATH names it. The slow adapter waits in every forward of a layer, a tenth of a step in all. The
gate must pass equal code that was measured anew, and exit with 1 for each fault, for the reason that was planted. On a quiet machine: 15 minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from peftkit.bench.baseline import load_baseline
from peftkit.bench.cells import Results, load_results
from peftkit.bench.gate import gate
from peftkit.result import machine, versions, write_json

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    name: str
    check: str
    """Where the gate must see it."""
    edits: tuple[tuple[str, str, str], ...]
    """(file of the package, text that stands there once, text in its place)."""

    def plant(self, package: Path) -> None:
        """Raises SystemExit where the package no longer has the text."""
        for file, old, new in self.edits:
            text = (package / file).read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{file} holds {old!r} {text.count(old)} times, not once: mend the fault {self.name!r} in {__file__}")
            (package / file).write_text(text.replace(old, new))


HALVED = Fault(
    "scale halved",
    "accuracy",
    (
        ("kernels/lowrank.py", "y.addmm_(h, b.to(y.dtype).T, alpha=scale)", "y.addmm_(h, b.to(y.dtype).T, alpha=scale / 2)"),
        ("kernels/lowrank.py", "y.add_((h @ b.to(y.dtype).T).mul_(scale))", "y.add_((h @ b.to(y.dtype).T).mul_(scale / 2))"),
    ),
)


def slowed(seconds: float) -> Fault:
    """Every forward of an adapted linear waits in a busy loop."""
    wait = f"import time\n        until = time.perf_counter() + {seconds!r}\n        while time.perf_counter() < until:\n            pass\n        "
    return Fault("adapter 10% slower", "step time", (("layers/linear.py", "dtype = compute_dtype(base, x)\n", wait + "dtype = compute_dtype(base, x)\n"),))


def measured(suite: Path, package: Path, place: Path) -> Results:
    """The results of a suite, run with the package in a folder."""
    place.mkdir(parents=True)
    command = [sys.executable, "-m", "peftkit", "bench", "run", str(suite), "--folder", "runs"]
    subprocess.run(command, cwd=place, env=os.environ | {"PYTHONPATH": str(package)}, check=True)
    return load_results(place / "runs" / yaml.safe_load(suite.read_text())["name"])


def gated(results: Path, baseline: Path) -> int:
    """The exit code of the gate, as a CI job sees it."""
    command = [sys.executable, "-m", "peftkit", "bench", "gate", str(results), "--baseline", str(baseline)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="of every run")
    parser.add_argument("--output", type=Path, help="where to write what was found, as JSON")
    options = parser.parse_args(arguments)
    ci = yaml.safe_load((ROOT / "benchmarks" / "suites" / "ci.yaml").read_text())
    ci |= {"name": "planted", "methods": {"lora": ci["methods"]["lora"]}, "seeds": list(range(options.seeds)), "timing": {"rounds": 15}}
    ci["recipe"]["eval"].pop("retained", None)
    ci["recipe"]["eval"].pop("retained_rows", None)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        suite, timing, baseline = place / "planted.yaml", place / "timing.yaml", place / "baseline.json"
        suite.write_text(yaml.safe_dump(ci))
        timing.write_text(yaml.safe_dump(ci | {"seeds": [0]}))  # for what only step times show
        healthy = measured(suite, ROOT, place / "healthy")
        command = [sys.executable, "-m", "peftkit", "bench", "accept", str(place / "healthy" / "runs" / "planted"), "--output", str(baseline)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        (record,) = [cell for cell in healthy.cells if cell.stage == "timing"]
        modules = next(cell.adapter["modules"] for cell in healthy.cells if cell.stage == "final")
        wait = 0.1 * record.timing["seconds"] / modules
        for fault, run in ((None, timing), (HALVED, suite), (slowed(wait), timing)):
            name = fault.name if fault else "none"
            package = place / name.replace(" ", "-").replace("%", "")
            shutil.copytree(ROOT / "peftkit", package / "peftkit", ignore=shutil.ignore_patterns("__pycache__"))
            if fault:
                fault.plant(package / "peftkit")
            results = measured(run, package, package / "work")
            code = gated(package / "work" / "runs" / "planted", baseline)
            verdicts = gate(results, load_baseline(baseline))
            failing = [verdict.check for verdict in verdicts if not verdict.passed]
            good = code == (1 if fault else 0) and (fault is None or fault.check in failing)
            found.append({"fault": name, "exit_code": code, "failing": failing, "as_it_must": good, "gate": {v.check: v.words for v in verdicts}})
            print(f"{name}: exit code {code}, failing {failing}: {'as it must be' if good else 'WRONG'}", flush=True)
    if options.output:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(options.output, {"seeds": options.seeds, "faults": found, "machine": machine(), "versions": versions(), "created": created})
    return 0 if all(each["as_it_must"] for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
