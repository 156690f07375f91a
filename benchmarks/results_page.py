"""The tables of the pages of results, each from a file under benchmarks/results/: what write_docs.py puts between their markers.

A file that is not there gives a line that says so and names the command that writes it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.versus_peft import COLUMNS, cells
from peftkit.bench.cells import load_results
from peftkit.bench.report import markdown

RESULTS = Path(__file__).resolve().parent / "results"
WHERE = ("machine", "versions", "commit", "dirty", "date", "created")  # keys of a results file that say where its numbers are from
SHOWN = 12  # numbers of a plain list that are written out; of a longer one their count is


def where(found: dict[str, Any], *packages: str) -> str:
    """Machine, versions, commit and day of a results file, as a sentence."""
    machine, versions, commit = found.get("machine", {}), found.get("versions", {}), found.get("commit") or ""
    named = [f"{package} {versions[package]}" for package in packages or ("torch", "transformers", "peft", "bitsandbytes") if package in versions]
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] != 1)}" if "threads" in machine else ""
    parts = [f"{machine.get('gpu') or machine.get('processor') or 'an unknown machine'}{threads}", ", ".join(named)]
    short = commit if len(commit) < 40 else commit[:12]  # of git describe, or a whole hash
    parts += [f"commit {short}{' with changes' * bool(found.get('dirty'))}"] if commit else []
    parts += [str(found.get("date") or found.get("created") or "")[:10]]
    return f"Measured on {'; '.join(part for part in parts if part)}."


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the cells' own bars and line breaks cannot break it."""
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def experts(path: Path) -> str:
    """LoRA on experts against both ways in which peft computes them."""
    found = json.loads(path.read_text())
    rows = []
    for row in found["rows"]:
        time, faster, saved = row["time_over_base"], row["faster_than_peft"], row["saved_over_base"]
        rows.append([
            f"{row['hidden']} x {row['intermediate']}, {row['rows'] * row['tokens']}", f"{time['peftkit']:.2f}",
            f"{time['peft grouped_mm']:.2f} / {time['peft eager']:.2f}", f"{faster['peft grouped_mm']:.2f} / {faster['peft eager']:.2f}",
            f"{saved['peftkit']:.2f}", f"{saved['peft grouped_mm']:.2f}", f"{time['peftkit nf4']:.2f}", f"{row['bytes_per_expert_parameter_nf4']:.3f}",
        ])  # fmt: skip
    columns = [
        "hidden x intermediate, tokens", "step time / frozen base", "peft's, grouped_mm / eager", "times faster than peft", "saved bytes / frozen base",
        "peft's", "in 4 bits: time / frozen base", "bytes a parameter",
    ]  # fmt: skip
    return f"{found['rounds']} rounds in {found['dtype']}. {where(found)}\n\n{table(columns, rows)}"


def gpu(model: Path, kernels: Path, small: Path) -> str:
    """A step of an 8B model, the Triton kernels by themselves, and the small model of the CPU's table, on a GPU."""
    found, parts, little = (json.loads(path.read_text()) for path in (model, kernels, small))
    rows = [
        ["QDoRA" if row["dora"] else "QLoRA", "yes" if row["checkpointing"] else "no", row["who"], f"{row['median_seconds']:.3f}",
         f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 2**30:.1f}", row.get("commit", found["commit"]).split()[0]]
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
        f"bitsandbytes {versions['bitsandbytes']}, transformers {versions['transformers']}.",
        f"**A step of an 8B-shaped Llama** (random weights, NF4 with double quantisation, r = {found['r']}, {found['tokens']:,} tokens, batch 1, AdamW):",
        table(["method", "checkpointing", "who", "seconds", "tokens/s", "peak GiB", "commit"], rows),
        f"**The Triton kernels against plain torch**, times faster, over the linears of that model, 512 to 8,192 tokens and "
        f"r = {', '.join(map(str, sorted({row['r'] for row in parts['rows']})))}:",
        table(["kernel", "least", "median", "most"], faster),
        f"**Small work**: few layers on {little['batch'][0]} x {little['batch'][1]} tokens have so little to compute that a step is the launching of "
        f"kernels (commit {little['commit']}). What counts there is the number of launches and Python's time for each; no adapter is near the base:",
        table(["model", "method", "step time / frozen base", "peft's", "times faster than peft", "saved bytes / frozen base", "peft's"], launched),
    ])  # fmt: skip


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


def versus_peft(path: Path) -> str:
    """Accuracy, step time and memory of the same training with peft's layers and with ours."""
    found = json.loads(path.read_text())
    rows = found["rows"]
    apart = [row["method"] for row in rows if row["difference"]["told_apart"]]
    verdict = f"**Told apart: {', '.join(apart)}.**" if apart else f"In none of the {len(rows)} rows can their accuracies be told apart."
    lowest, highest = (pick(row["times_faster"] for row in rows) for pick in (min, max))
    kept = [row["saved_over_peft"] for row in rows]
    facts = (
        f"{found['seeds']} seeds, {found['rounds']} timed rounds, {found['dtype']}. {verdict} A step is {lowest:.2f} to {highest:.2f} times as fast as peft's, "
        f"and keeps {min(kept):.2f} to {max(kept):.2f} of its bytes for backward. {where(found, 'torch', 'transformers', 'peft', 'bitsandbytes')}"
    )
    return f"{facts}\n\n{table(COLUMNS, [cells(row) for row in rows])}"


def versus_trl(path: Path) -> str:
    """Finetuning by `peftkit.run` and by trl's SFTTrainer."""
    found = json.loads(path.read_text())
    rows = []
    for row in found["rows"]:
        for who in ("trl", "peftkit"):
            side, bound, own = row[who], row["bound"], who == "peftkit"
            missed = {"faster": row["faster"] < bound["faster"], "peak": row["peak"] > bound["peak"]}
            rows.append([
                row["settings"], who, f"{side['tokens_per_second']:,.0f}", f"{side['peak_bytes'] / 2**20:,.0f}",
                " ".join(f"{loss:.3f}" for loss in side["losses"]),
                f"{row['faster']:.2f} (at least {bound['faster']:g}{', missed' * missed['faster']})" if own else "",
                f"{row['peak']:.2f} (at most {bound['peak']:g}{', missed' * missed['peak']})" if own else "",
            ])  # fmt: skip
    columns = ["settings", "who", "supervised tokens/s", "peak over the loaded model, MiB", "held-out loss by seed", "times faster", "peak / trl's"]
    return f"{where(found, 'torch', 'transformers', 'trl', 'peft')}\n\n{table(columns, rows)}"


def kills(path: Path) -> str:
    """What a hundred kills of one run hit, and how many ended with other bytes."""
    found = json.loads(path.read_text())
    hit = ", ".join(f"{count} {what}" for what, count in found["hit"].items())
    return f"{found['kills']} kills ({hit}): {found['same_bytes']} went on to the bytes of a run left alone, {len(found['different'])} did not. {where(found)}"


def gate_rates(path: Path) -> str:
    """How often the gate fails equal code, and how often it sees a drop."""
    found = json.loads(path.read_text())
    rows = [
        [
            *(str(row[key]) for key in ("methods", "seeds", "baseline_seeds", "examples", "outcomes")), f"{row['false_alarms']:.1%}",
            f"{row['sees_drop_of_one_method']:.1%}", f"{row['sees_drop_of_all_methods']:.1%}" if row["methods"] > 1 else "-",
        ]
        for row in found["accuracy"]
    ]  # fmt: skip
    drop = f"{100 * found['drop']:.0f} points"
    accuracy = table(["methods", "seeds", "seeds of the baseline", "examples", "outcomes", "false alarms", f"sees {drop} in one", f"{drop} in all"], rows)
    steps = [[f"{row[key]:.1%}" for key in ("of_round", "of_process", "false_alarms", "sees_ten_percent")] for row in found["step_time"]]
    times = table(["rounds scatter by", "processes by", "false alarms", "sees 10%"], steps)
    source, each = found["source"], f"{found['draws']} draws each"
    seeds = f"{source['seeds']} seeds of {source['method']} (accuracy {source['mean']:.1%})"
    return f"{where(found)} Accuracy, {each}, from {seeds}:\n\n{accuracy}\n\nStep times, simulated, {each}:\n\n{times}"


def suite(path: Path) -> str:
    """The report of a suite's results."""
    return markdown(load_results(path))


def suite_kills(path: Path) -> str:
    """How many killed suites ended, run again, with the results of one left alone."""
    found = json.loads(path.read_text())
    runs = found["kills"]
    after = [run["after_seconds"] for run in runs]
    return (
        f"{len(runs)} suites, {found['killed']} of them killed on their way (the others had ended before), after {min(after):.0f} to "
        f"{max(after):.0f} s of {found['suite_seconds']:.0f}: run again, {found['same']} had the results of the one left alone, "
        f"{len(runs) - found['same']} had not. {where(found)}"
    )


def sanity(path: Path) -> str:
    """The verdicts of the harness beside those that are known beforehand."""
    found = json.loads(path.read_text())
    rows = [[line["what"], line["says"], "yes" if line["holds"] else "**no**"] for line in found["verdicts"]]
    return f"{where(found)}\n\n{table(['what must be', 'what the harness says', 'as it must be'], rows)}"


def brief(report: str) -> str:
    """A suite's report without its notes but the last, which says where the numbers are from."""
    lines = report.strip().splitlines()
    notes = [line for line in lines if line.startswith("- ")]
    return "\n".join([line for line in lines if line not in notes] + notes[-1:])


def plain(path: Path) -> str:
    """Any results file: its numbers in a table, its lists of records in tables of their own."""
    found = json.loads(path.read_text())
    alone: list[list[str]] = []
    tables: list[str] = []
    for key, value in found.items():
        if key in WHERE or value is None:
            continue
        if isinstance(value, dict) and any(isinstance(entry, dict) for entry in value.values()):
            value = [{_words(key): name, **(entry if isinstance(entry, dict) else {"value": entry})} for name, entry in value.items()]
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            columns = list(dict.fromkeys(name for entry in value for name in entry))
            rows = [[_number(entry.get(name, "")) for name in columns] for entry in value]
            tables += [f"*{_words(key).capitalize()}*", table([_words(name) for name in columns], rows)]
        else:
            alone.append([_words(key), _number(value)])
    parts = [where(found), *([table(["what", "value"], alone)] if alone else []), *tables]
    return "\n\n".join(parts)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _number(value: Any) -> str:
    """A value of a results file as a cell shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{_words(name)} {_number(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_number, value)) if len(value) <= SHOWN else f"{len(value)} of them"
    return str(value)


BLOCKS: dict[str, tuple[tuple[str, ...], str, Callable[..., str]]] = {
    "results": (("ci",), "peftkit bench run benchmarks/suites/ci.yaml", suite),
    "builtin": (("builtin",), "peftkit bench run benchmarks/suites/builtin.yaml", suite),
    "versus_peft": (("versus_peft",), "python benchmarks/versus_peft.py --output benchmarks/results/versus_peft.json", versus_peft),
    "versus_trl": (("versus_trl",), "python benchmarks/versus_trl.py --data alpaca.json --output benchmarks/results/versus_trl.json", versus_trl),
    "adapters": (("adapters",), "python benchmarks/adapters.py", adapters),
    "experts": (("experts",), "python benchmarks/experts.py --output benchmarks/results/experts.json", experts),
    "gpu": (("gpu_llama8b", "gpu_kernels", "gpu_adapters"), "python -m benchmarks.gpu.llama8b", gpu),
    "memory": (("memory",), "python benchmarks/memory.py", memory),
    "memory:gpu": (("gpu_memory",), "python benchmarks/memory.py", memory),
    "sanity": (("sanity",), "python benchmarks/sanity.py --output benchmarks/results/sanity.json", sanity),
    "coverage": (("coverage",), "python benchmarks/coverage.py", plain),
    "gate_rates": (("gate_rates",), "python benchmarks/gate_rates.py benchmarks/results/lora-many.json", gate_rates),
    "planted": (("planted",), "python benchmarks/planted.py", plain),
    "kills": (("kills",), "python benchmarks/kills.py", kills),
    "suite_kills": (("suite_kills",), "python benchmarks/suite_kills.py --output benchmarks/results/suite_kills.json", suite_kills),
}
"""Marker -> the results files, the command that writes them, and what makes a block of them."""


def block(marker: str, folder: Path = RESULTS) -> str:
    """What stands between the markers: the tables, or that there is nothing to show yet. Raises KeyError for an unknown marker."""
    names, command, render = BLOCKS[marker]
    paths = [folder / f"{name}.json" for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        return f"Not measured yet: `{command}` writes {' and '.join(f'`benchmarks/results/{name}`' for name in missing)}."
    return render(*paths)
