"""Writes what the documentation takes from elsewhere between its markers: option tables, scores, results.

    python benchmarks/write_docs.py            # write
    python benchmarks/write_docs.py --check    # change nothing; exit 1 where a page would change

Option tables come from the configs of the package, the scores of `builtin:tiny` from the file that its training wrote, the results from the files in
benchmarks/results/ (benchmarks/results_page.py says which and how).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from peftkit.amounts import human
from peftkit.builtin.families import FAMILIES
from peftkit.config import Config, defaults_table
from peftkit.data import DataConfig
from peftkit.evaluate import EvalConfig
from peftkit.forecast import Skeleton
from peftkit.methods import REGISTRY
from peftkit.model import BUILTIN, ModelConfig, load_config
from peftkit.recipe import load_recipe
from peftkit.rehearse import kept_config
from peftkit.train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this script may be called from anywhere

from benchmarks.results_page import BLOCKS, block, brief, table  # noqa: E402

SCORES, ARCHITECTURES = BUILTIN / "tiny" / "scores.json", ROOT / "benchmarks" / "results" / "architectures.json"
SECTIONS: dict[str, type[Config]] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "eval": EvalConfig}


def fill(page: str, name: str, text: str) -> str:
    """`page` with `text` between the markers of `name`. Raises ValueError where the page has no such markers, or more than one pair."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"expected one {begin} and one {end} after it")
    before, after = page.split(begin)[0], page.split(end)[1]
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def options(config: type[Config]) -> str:
    """The keys of a config with their types, defaults and descriptions."""
    rows = [[f"`{key}`", kind, f"`{default}`", text] for key, kind, default, text in defaults_table(config)]
    return table(["key", "type", "default", "what it does"], rows)


def scores(path: Path) -> str:
    """The exact match of every task, those of training first."""
    found = json.loads(path.read_text())
    rows = [
        [task, "trained" if task in FAMILIES else "never seen", f"{100 * score:.1f}%"]
        for task, score in sorted(found["exact_match"].items(), key=lambda item: item[0] not in FAMILIES)
    ]
    facts = (
        f"{found['parameters']:,} parameters, {found['steps']:,} steps, {found['tokens'] / 1e6:.1f}M tokens (padding included), "
        f"{found['seconds'] / 60:.0f} minutes, torch {found['torch']}, seed {found['seed']}. "
        f"Mean exact match over the families of training: **{100 * found['own_exact_match']:.1f}%**."
    )
    return f"{facts}\n\n{table(['task', 'in training', 'exact match, 200 test rows'], rows)}"


def architectures(path: Path) -> str:
    """What was adapted, trained, exchanged and merged on each architecture."""
    found = json.loads(path.read_text())

    def both(row: dict[str, Any], figure: str) -> str:
        values = [row[method].get(figure) for method in ("lora", "dora")]
        return " / ".join("" if value is None else "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-") for value in values).strip(" /")

    rows = []
    for row in found["rows"].values():
        remarks = ["reads weights itself: compared with peft's merged model"] * (row["passed_by"] and not row["refused_by_peft"])
        remarks += ["DoRA: without the experts"] * row["experts"]
        remarks += [f"peft refuses it: {row['refused_by_peft']}"] * (row["refused_by_peft"] is not None)
        rows.append([
            f"{row['name']} (`{row['model']}`)", row["head"],
            ", ".join(f"{name} ×{count}" for name, count in row["lora"]["adapted"].items())
            + "".join(f"; {name} as a whole" for name in row["lora"]["whole"]),
            "; ".join(" ".join(f"{loss:.2f}" for loss in row[method]["loss"]) for method in ("lora", "dora")),
            both(row, "gradients"), both(row, "exchanged"), both(row, "merged"), ", ".join(row["lora"]["checkpointing"]), "; ".join(remarks),
        ])  # fmt: skip
    columns = ["model", "trained for", "adapted", "loss, LoRA; DoRA", "gradients", "peft", "merged", "checkpointing", "remarks"]
    return f"With {', '.join(f'{package} {version}' for package, version in found['versions'].items())}.\n\n{table(columns, rows)}"


def recipes(folder: Path) -> str:
    """Every recipe with what it is of; the bytes of its weights are those of the config kept beside it."""
    rows = []
    for path in sorted(folder.glob("*.yaml"), key=lambda path: (not load_recipe(path).model.name.startswith("builtin:"), path.name)):
        recipe, kept = load_recipe(path), kept_config(folder, load_recipe(path).model.name)
        config = AutoConfig.for_model(**json.loads(kept.read_text())["config"]) if kept.exists() else load_config(recipe.model.name)
        skeleton = Skeleton(recipe, config, gpu=True)
        source = next((line.removeprefix("# Source: ") for line in path.read_text().splitlines() if line.startswith("# Source: ")), "ours")
        rows.append([
            f"[{path.name}]({path.name})", f"{recipe.model.name}, {skeleton.parameters / 1e9:.2g} B" if kept.exists() else recipe.model.name,
            " + ".join(next(iter(method)) for method in recipe.methods) or "none: every parameter trains",
            recipe.quantize or str(skeleton.dtype).removeprefix("torch."), human(skeleton.weights), recipe.data.train, source,
        ])  # fmt: skip
    return table(["file", "base", "methods", "stored in", "weights", "data", "where its hyperparameters are from"], rows)


def blocks() -> dict[Path, dict[str, str]]:
    """Page -> marker -> content, for every block whose source is there."""
    docs = ROOT / "docs"
    found: dict[Path, dict[str, str]] = {
        docs / "methods.md": {f"options:{name}": options(method) for name, method in REGISTRY.items()},
        docs / "recipes.md": {f"options:{name}": options(config) for name, config in SECTIONS.items()},
        docs / "model-card.md": {},
        docs / "architectures.md": {},
        ROOT / "recipes" / "README.md": {"recipes": recipes(ROOT / "recipes")},
    }
    if SCORES.exists():
        found[docs / "model-card.md"]["scores"] = scores(SCORES)
    if ARCHITECTURES.exists():
        found[docs / "architectures.md"]["architectures"] = architectures(ARCHITECTURES)
    shown = {
        docs / "benchmarks.md": [marker for marker in BLOCKS if marker != "builtin"],
        docs / "findings.md": ["builtin"],
        docs / "bench-gate.md": ["gate_rates"],
        docs / "adapters.md": ["adapters", "gpu"],
        docs / "methods.md": ["experts"],
        docs / "check.md": ["memory", "memory:gpu"],
        ROOT / "README.md": ["results", "adapters", "versus_peft"],
    }
    for page, markers in shown.items():
        found[page] = found.get(page, {}) | {marker: block(marker) for marker in markers}
    found[ROOT / "README.md"]["results"] = brief(block("results"))
    return found


def stale(write: bool) -> list[Path]:
    """The pages that are not as their sources say, brought up to date where `write`."""
    changed = []
    for path, content in blocks().items():
        old = new = path.read_text()
        for name, text in content.items():
            try:
                new = fill(new, name, text)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        if new != old:
            changed.append(path)
            if write:
                path.write_text(new)
    return changed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page would change")
    args = parser.parse_args(arguments)
    changed = stale(write=not args.check)
    for path in changed:
        print(f"{path.relative_to(ROOT)}: {'not up to date; run benchmarks/write_docs.py' if args.check else 'written'}")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
