"""Step time and saved activations of adapters over the frozen base, ours and peft's, from one interleaved run.

    python benchmarks/adapters.py                                   # the table in the terminal
    python benchmarks/adapters.py --output benchmarks/results/adapters.json --plot docs/adapters.png

The work: a Llama of 8 layers x 768 (12 heads, 4 key-value heads, intermediate 2048, vocabulary 4096) with random weights,
batch 4 x 256, rank 16 on every linear but the head. A step is forward, loss and backward, gradients flowing to the input
embeddings: for the frozen base that is what no adapter can beat. Between the steps, off the clock, the optimizer moves
the adapters, so DoRA's norm is taken anew in each of them.

Every round runs one step of every variant, so that what else the machine does falls on all alike; ratios are medians of
the rounds' ratios. Saved bytes are counted, in bf16: what autograd keeps for backward, each storage once, parameters and
buffers left out. Times are in bf16 where the machine multiplies it natively, else in fp32 (the results say which).
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftkit as pk
from peftkit.console import bar, table
from peftkit.layers import LoRALinear
from peftkit.memory import count_saved
from peftkit.model import best_dtype
from peftkit.quant import quantization_config
from peftkit.result import machine, versions, write_json

ROOT = Path(__file__).resolve().parents[1]
ROWS, TOKENS, RANK, DROPOUT = 4, 256, 16, 0.05
CONFIG = dict(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=4, vocab_size=4096, max_position_embeddings=512
)  # fmt: skip


Wanted = Callable[[str, str], bool]  # (row, who) -> whether to measure it


@dataclass(frozen=True)
class Bound:
    """What a row of the table is to hold: step time over the frozen base, times faster than peft, bytes over the frozen base's."""

    time: float
    against_peft: float
    saved: float


BOUNDS = {
    "lora": Bound(1.10, 1.25, 1.30),
    "lora, dropout": Bound(1.15, 1.7, 1.35),
    "dora": Bound(1.15, 1.65, 1.50),
    "dora, dropout": Bound(1.20, 4.0, 1.55),
    "qlora": Bound(1.10, 1.25, 1.30),
    "qdora": Bound(1.15, 1.6, 1.50),
    "qdora, dropout": Bound(1.20, 3.5, 1.55),
}


# ------------------------------------------------------------------------------------------------------------- variants


def base_model(dtype: torch.dtype, device: str, quantize: bool, config: dict[str, Any]) -> Any:
    """The frozen base, the same weights every time; in NF4 with double quantisation where `quantize`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(dtype)
    if quantize:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization_config("nf4", dtype), device_map={"": device})
    return model.to(device).requires_grad_(False).train()


def ours(model: Any, dora: bool, dropout: float) -> Any:
    pk.attach(model, (pk.DoRA if dora else pk.LoRA)(r=RANK, alpha=2 * RANK, dropout=dropout))
    return model


def theirs(model: Any, dora: bool, dropout: float) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def adopted(model: Any, dora: bool, dropout: float) -> Any:
    model = theirs(model, dora, dropout)
    pk.adopt(model)
    return model


def variants() -> Iterator[tuple[str, str, bool, Callable[[Any], Any]]]:
    """(row, who, on a quantised base, how to adapt the base)."""
    yield "frozen", "base", False, lambda model: model
    yield "frozen nf4", "base", True, lambda model: model
    for row in BOUNDS:
        quantized, dora, dropout = row.startswith("q"), "dora" in row, DROPOUT if "dropout" in row else 0.0
        makers = {"peftkit": ours, "peft": theirs} | ({} if quantized or dropout else {"adopted": adopted})
        for who, make in makers.items():
            yield row, who, quantized, lambda model, make=make, dora=dora, dropout=dropout: make(model, dora, dropout)


# ------------------------------------------------------------------------------------------------------------ measuring


def forward(model: Any, ids: Tensor) -> Tensor:
    """The loss, with gradients flowing to the input embeddings."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    return model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss


def step(model: Any, ids: Tensor) -> None:
    forward(model, ids).backward()
    if ids.is_cuda:
        torch.cuda.synchronize()


def saved_bytes(model: Any, ids: Tensor) -> int:
    with count_saved(model) as kept:
        forward(model, ids)
    return sum(kept.values())


def build(make: Callable[[Any], Any], base: Any) -> tuple[Any, torch.optim.Optimizer | None]:
    """The adapted copy of a base and the optimizer that moves its adapters."""
    model = make(copy.deepcopy(base)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None


def measure_time(dtype: torch.dtype, device: str, rounds: int, config: dict[str, Any], wanted: Wanted, console: Console) -> dict[str, list[float]]:
    """Seconds of every round's step, by "row|who"."""
    ids = torch.randint(config["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    models = {}
    for quantized in (False, True):
        base = base_model(dtype, device, quantized, config)
        for row, who, on_quantized, make in variants():
            if on_quantized == quantized and wanted(row, who):
                models[f"{row}|{who}"] = build(make, base)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    gc.disable()
    with bar(console, "rounds", rounds + 1) as progress:
        for round_ in range(rounds + 1):  # the first warms up
            for name, (model, optimizer) in models.items():
                started = time.perf_counter()
                step(model, ids)
                elapsed = time.perf_counter() - started
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()
                    if ids.is_cuda:
                        torch.cuda.synchronize()  # the next step's clock starts at rest
                if round_:
                    seconds[name].append(elapsed)
            gc.collect()
            progress.advance()
    gc.enable()
    return seconds


def measure_bytes(device: str, config: dict[str, Any], wanted: Wanted) -> dict[str, int]:
    """Bytes kept for backward in bf16, by "row|who"."""
    ids = torch.randint(config["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    found = {}
    for quantized in (False, True):
        base = base_model(torch.bfloat16, device, quantized, config)
        for row, who, on_quantized, make in variants():
            if on_quantized == quantized and wanted(row, who):
                found[f"{row}|{who}"] = saved_bytes(build(make, base)[0], ids)
    return found


@torch.no_grad()
def measure_inference(dtype: torch.dtype, device: str, rounds: int, config: dict[str, Any]) -> dict[str, Any]:
    """Evaluation of DoRA over that of LoRA, the adapters at rest: whole rows, and one token after 256 with a cache.

    Beside the median ratios, the bytes that DoRA keeps beyond the parameters and buffers of LoRA after the first forward.
    """
    ids = torch.randint(config["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    base = base_model(dtype, device, False, config)
    models = {name: ours(copy.deepcopy(base), name == "dora", 0.0).eval() for name in ("lora", "dora")}
    caches = {name: model(input_ids=ids).past_key_values for name, model in models.items()}
    seconds: dict[str, list[float]] = {f"{kind} {name}": [] for kind in ("rows", "token") for name in models}
    for round_ in range(rounds + 1):
        for name, model in models.items():
            for kind in ("rows", "token"):
                started = time.perf_counter()
                if kind == "rows":
                    model(input_ids=ids, use_cache=False)
                else:
                    model(input_ids=ids[:, :1], past_key_values=caches[name])
                if ids.is_cuda:
                    torch.cuda.synchronize()
                if round_:
                    seconds[f"{kind} {name}"].append(time.perf_counter() - started)
    layers = [module for module in models["dora"].modules() if isinstance(module, LoRALinear)]
    kept = sum(layer.magnitude().nbytes + (layer._squares[1].nbytes if layer._squares else 0) + layer._gain[1].factor.nbytes for layer in layers)
    return {
        "dora_over_lora_rows": ratio(seconds, "rows dora", "rows lora"),
        "dora_over_lora_token": ratio(seconds, "token dora", "token lora"),
        "dora_keeps_bytes": kept,
        "outputs": sum(layer.out_features for layer in layers),
    }


# -------------------------------------------------------------------------------------------------------------- results


def ratio(seconds: dict[str, list[float]], name: str, over: str) -> float:
    """Median over the rounds of one variant's time over another's of the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[over], strict=True))


def summarise(seconds: dict[str, list[float]], saved: dict[str, int]) -> list[dict[str, Any]]:
    """One record for every row of the table."""
    records = []
    for row, bound in BOUNDS.items():
        if f"{row}|peftkit" not in seconds:
            continue
        base = "frozen nf4|base" if row.startswith("q") else "frozen|base"
        record: dict[str, Any] = {"method": row, "bound": vars(bound) | {}}
        for who in ("peftkit", "peft", "adopted"):
            name = f"{row}|{who}"
            if name in seconds:
                record[who] = {
                    "time_over_base": ratio(seconds, name, base),
                    "median_seconds": statistics.median(seconds[name]),
                    "saved_over_base": saved[name] / saved[base] if saved else math.nan,
                    "saved_bytes": saved.get(name),
                }
        record["faster_than_peft"] = ratio(seconds, f"{row}|peft", f"{row}|peftkit")
        ours = record["peftkit"]
        record["holds"] = {
            "time": ours["time_over_base"] <= bound.time,
            "against_peft": record["faster_than_peft"] >= bound.against_peft,
            "saved": not ours["saved_over_base"] > bound.saved,
        }
        records.append(record)
    return records


def show(records: list[dict[str, Any]], title: str, console: Console) -> None:
    rows = []
    for record in records:
        bound, holds, ours = record["bound"], record["holds"], record["peftkit"]

        def cell(value: float, name: str, sign: str, bound: dict = bound, holds: dict = holds) -> str:
            return f"{value:.2f} ({sign}{bound[name]:g}{'' if holds[name] else ', missed'})"

        rows.append([
            record["method"], cell(ours["time_over_base"], "time", "<="), f"{record['peft']['time_over_base']:.2f}",
            f"{record['adopted']['time_over_base']:.2f}" if "adopted" in record else "",
            cell(record["faster_than_peft"], "against_peft", ">="), cell(ours["saved_over_base"], "saved", "<="), f"{record['peft']['saved_over_base']:.2f}",
        ])  # fmt: skip
    columns = ["method", "time / base", "peft", "adopted", "faster than peft", "saved / base", "peft's saved"]
    console.print(table(title, columns, rows))


def plot(records: list[dict[str, Any]], path: Path, dtype: str) -> None:
    """Bars of step time and of saved bytes over the frozen base, ours beside peft's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [record["method"] for record in records]
    titles = {"time_over_base": f"step time over the frozen base ({dtype})", "saved_over_base": "bytes saved for backward over the frozen base (bf16)"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for shift, who in ((-0.2, "peft"), (0.2, "peftkit")):
            bars = axis.barh([i + shift for i in range(len(names))], [record[who][key] for record in records], height=0.38, label=who)
            axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1, color="gray", linewidth=1)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(title, fontsize=10)
    axes[1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def commit() -> str:
    """The commit of this repository, marked where the tree differs from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the timed steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--only", help="rows to run, with ';' between them: lora;dora, dropout")
    parser.add_argument("--who", default="peftkit,peft,adopted", help="whose adapters to run")
    parser.add_argument("--no-bytes", action="store_true", help="leave the saved bytes out")
    parser.add_argument("--output", type=Path, help="write the results to this JSON")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG")
    args = parser.parse_args(arguments)
    dtype = best_dtype() if args.dtype == "auto" else getattr(torch, args.dtype)
    config, console = CONFIG | {"num_hidden_layers": args.layers}, Console(stderr=True)
    rows, whose = args.only.split(";") if args.only else list(BOUNDS), args.who.split(",")

    def wanted(row: str, who: str) -> bool:
        return who == "base" or (row in rows and who in whose)

    saved = {} if args.no_bytes else measure_bytes(args.device, config, wanted)
    console.print(f"bytes counted; the clock starts at {datetime.now():%H:%M:%S}", highlight=False)
    seconds = measure_time(dtype, args.device, args.rounds, config, wanted, console)
    records = summarise(seconds, saved)
    name = str(dtype).removeprefix("torch.")
    show(records, f"{args.layers} layers x 768, batch {ROWS} x {TOKENS}, r = {RANK}, {name}, {args.rounds} rounds, commit {commit()}", Console(width=150))
    inference = measure_inference(dtype, args.device, args.rounds, config)
    print(
        f"DoRA's inference over LoRA's: {inference['dora_over_lora_rows']:.3f} for rows of {TOKENS}, {inference['dora_over_lora_token']:.3f} for one token; "
        f"m and its quotient by the norm take {inference['dora_keeps_bytes'] / inference['outputs']:.0f} bytes for each output"
    )
    if args.output:
        frozen = {name: statistics.median(times) for name, times in seconds.items() if name.endswith("|base")}
        content = {
            "dtype": name,
            "device": args.device,
            "rounds": args.rounds,
            "config": config,
            "frozen_median_seconds": frozen,
            "rows": records,
            "inference": inference,
        }
        content |= {
            "seconds": seconds,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(args.output, content)
    if args.plot:
        plot(records, args.plot, name)


if __name__ == "__main__":
    main()
