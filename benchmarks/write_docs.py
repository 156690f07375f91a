"""Writes what the documentation takes from elsewhere between its markers: option tables, scores, results.

    python benchmarks/write_docs.py            # write
    python benchmarks/write_docs.py --check    # change nothing; exit 1 where a page would change

Option tables come from the configs of the package, the scores of `builtin:tiny` from the file that its training wrote, the
results from `benchmarks/results/ci.json`. A block whose source does not exist yet is left as it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from peftkit.bench.cells import load_results
from peftkit.bench.report import markdown
from peftkit.builtin.families import FAMILIES
from peftkit.config import Config, defaults_table
from peftkit.data import DataConfig
from peftkit.evaluate import EvalConfig
from peftkit.forecast import Skeleton
from peftkit.memory import human
from peftkit.methods import REGISTRY
from peftkit.model import BUILTIN, ModelConfig, load_config
from peftkit.recipe import load_recipe
from peftkit.rehearse import kept_config
from peftkit.train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
SCORES, RESULTS = BUILTIN / "tiny" / "scores.json", ROOT / "benchmarks" / "results" / "ci.json"
ADAPTERS, ARCHITECTURES, MEMORY = (ROOT / "benchmarks" / "results" / name for name in ("adapters.json", "architectures.json", "memory.json"))
GPU_MODEL, GPU_KERNELS, GPU_ADAPTERS, GPU_MEMORY = (
    ROOT / "benchmarks" / "results" / f"gpu_{name}.json" for name in ("llama8b", "kernels", "adapters", "memory")
)
SECTIONS: dict[str, type[Config]] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "eval": EvalConfig}


def fill(page: str, name: str, block: str) -> str:
    """`page` with `block` between the markers of `name`. Raises ValueError where the page has no such markers, or more than one pair."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"expected one {begin} and one {end} after it")
    before, after = page.split(begin)[0], page.split(end)[1]
    return f"{before}{begin}\n{block.strip()}\n{end}{after}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the cells' own bars and line breaks cannot break it."""
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def adapters(path: Path) -> str:
    """What adapters cost over the frozen base, ours beside peft's, with what was aimed at."""
    found = json.loads(path.read_text())
    rows = []
    for row in found["rows"]:
        ours, theirs, bound, holds = row["peftkit"], row["peft"], row["bound"], row["holds"]
        wrong = {name: "" if kept else ", missed" for name, kept in holds.items()}
        rows.append([
            row["method"], f"{ours['time_over_base']:.2f} (at most {bound['time']:.2f}{wrong['time']})", f"{theirs['time_over_base']:.2f}",
            f"{row['faster_than_peft']:.2f} (at least {bound['against_peft']:.2f}{wrong['against_peft']})",
            f"{row['adopted']['time_over_base']:.2f}" if "adopted" in row else "",
            f"{ours['saved_over_base']:.3f} (at most {bound['saved']:.2f}{wrong['saved']})", f"{theirs['saved_over_base']:.2f}",
        ])  # fmt: skip
    columns = ["method", "step time / frozen base", "peft's", "times faster than peft", "peft adopted", "saved bytes / frozen base", "peft's"]
    machine, inference = found["machine"], found["inference"]
    facts = (
        f"Times in {found['dtype']}, {found['rounds']} rounds on {machine['processor']}, {machine['threads']} threads; torch {found['versions']['torch']}, "
        f"peft {found['versions']['peft']}, transformers {found['versions']['transformers']}; commit {found['commit']}; the frozen base takes "
        f"{found['frozen_median_seconds']['frozen|base']:.2f} s a step, in 4 bits {found['frozen_median_seconds']['frozen nf4|base']:.2f} s. "
        f"DoRA's inference takes {inference['dora_over_lora_rows']:.2f} times LoRA's for rows of 256 tokens, "
        f"{inference['dora_over_lora_token']:.2f} times for one token."
    )
    note = "The bounds are meant for bfloat16 on a machine that multiplies it natively." if found["dtype"] != "bfloat16" else ""
    return f"{facts} {note}\n\n{table(columns, rows)}"


def gpu(model: Path, kernels: Path, small: Path) -> str:
    """A step of an 8B model, the Triton kernels by themselves, and the small model of the CPU's table, on a GPU."""
    found, parts, little = (json.loads(path.read_text()) for path in (model, kernels, small))
    rows = [
        ["QDoRA" if row["dora"] else "QLoRA", "yes" if row["checkpointing"] else "no", row["who"], f"{row['median_seconds']:.3f}",
         f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 2**30:.1f}"]
        for row in sorted(found["rows"], key=lambda row: (row["dora"], row["checkpointing"], row["who"]))
    ]  # fmt: skip
    by_kernel: dict[str, list[float]] = {}
    for row in parts["rows"]:
        by_kernel.setdefault(row["kernel"], []).append(row["times_faster"])
    faster = [[name, f"{min(times):.1f}", f"{statistics.median(times):.1f}", f"{max(times):.1f}"] for name, times in by_kernel.items()]
    launched = [
        [f"{shape['config']['num_hidden_layers']} x {shape['config']['hidden_size']}", row["method"]]
        + [f"{ratio:.2f}" for ratio in (row["peftkit"]["time_over_base"], row["peft"]["time_over_base"], row["faster_than_peft"])]
        + [f"{row[who]['saved_over_base']:.2f}" for who in ("peftkit", "peft")]
        for shape in little["tables"].values()
        for row in shape["rows"]
    ]
    versions = found["versions"]
    return "\n\n".join([
        f"{found['machine']['gpu']}, bfloat16; torch {versions['torch']}, CUDA {versions['cuda']}, triton {versions['triton']}, peft {versions['peft']}, "
        f"bitsandbytes {versions['bitsandbytes']}, transformers {versions['transformers']}; commit {found['commit']}.",
        f"**A step of an 8B-shaped Llama** (random weights, NF4 with double quantisation, r = {found['r']}, {found['tokens']:,} tokens, batch 1, AdamW):",
        table(["method", "checkpointing", "who", "seconds", "tokens/s", "peak GiB"], rows),
        "**The Triton kernels against plain torch**, times faster, over the linears of that model and 512 to 8,192 tokens:",
        table(["kernel", "least", "median", "most"], faster),
        f"**Small work**: few layers on {little['batch'][0]} x {little['batch'][1]} tokens have so little to compute that a step is the launching of "
        "kernels; what counts there is the number of launches and Python's time for each, no adapter is near the base, and ours are not faster "
        "than peft's LoRA:",
        table(["model", "method", "step time / frozen base", "peft's", "times faster than peft", "saved bytes / frozen base", "peft's"], launched),
    ])  # fmt: skip


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


def memory(path: Path) -> str:
    """Forecast and measured peaks, a row for each setting."""
    found = json.loads(path.read_text())
    rows = []
    for row in found["rows"]:
        parts = row["forecast"]
        mib = [f"{size / 2**20:,.0f}" for size in (row["measured"], parts["total"], row["measured"] - row["over_loaded"], parts["weights"] + parts["adapters"])]
        missed = "" if abs(row["error"]) <= found["bound"] else ", missed"
        rows.append([row["name"], mib[0], mib[1], f"{100 * row['error']:+.1f}%{missed}", mib[2], mib[3]])
    columns = ["setting", "peak, MiB", "forecast", f"error (at most {found['bound']:.0%})", "loaded model, MiB", "forecast"]
    machine, kept = found["machine"], "; freed memory goes back to the system at once" if found["return_freed"] else "; freed memory is kept as glibc does"
    where = machine.get("gpu") or f"{machine['processor']}, 1 thread"
    facts = (
        f"On {where}; torch {found['versions']['torch']}, transformers {found['versions']['transformers']}, "
        f"bitsandbytes {found['versions']['bitsandbytes']}{'' if machine.get('gpu') else kept}."
    )
    return f"{facts}\n\n{table(columns, rows)}"


def blocks() -> dict[Path, dict[str, str]]:
    """Page -> marker -> content, for every block whose source is there."""
    docs = ROOT / "docs"
    found: dict[Path, dict[str, str]] = {
        docs / "methods.md": {f"options:{name}": options(method) for name, method in REGISTRY.items()},
        docs / "recipes.md": {f"options:{name}": options(config) for name, config in SECTIONS.items()},
        docs / "model-card.md": {},
        docs / "benchmarks.md": {},
        docs / "adapters.md": {},
        docs / "architectures.md": {},
        docs / "check.md": {},
        ROOT / "README.md": {},
        ROOT / "recipes" / "README.md": {"recipes": recipes(ROOT / "recipes")},
    }
    if SCORES.exists():
        found[docs / "model-card.md"]["scores"] = scores(SCORES)
    if RESULTS.exists():
        report = markdown(load_results(RESULTS))
        found[docs / "benchmarks.md"]["results"] = report
        found[ROOT / "README.md"]["results"] = report
    if ADAPTERS.exists():
        found[docs / "adapters.md"]["adapters"] = adapters(ADAPTERS)
        found[ROOT / "README.md"]["adapters"] = adapters(ADAPTERS)
    if GPU_MODEL.exists() and GPU_KERNELS.exists() and GPU_ADAPTERS.exists():
        found[docs / "adapters.md"]["gpu"] = gpu(GPU_MODEL, GPU_KERNELS, GPU_ADAPTERS)
    if ARCHITECTURES.exists():
        found[docs / "architectures.md"]["architectures"] = architectures(ARCHITECTURES)
    if MEMORY.exists():
        found[docs / "check.md"]["memory"] = memory(MEMORY)
    if GPU_MEMORY.exists():
        found[docs / "check.md"]["memory:gpu"] = memory(GPU_MEMORY)
    return found


def stale(write: bool) -> list[Path]:
    """The pages that are not as their sources say, brought up to date where `write`."""
    changed = []
    for path, content in blocks().items():
        old = new = path.read_text()
        for name, block in content.items():
            try:
                new = fill(new, name, block)
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
