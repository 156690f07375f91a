"""Step time and saved activations of LoRA on experts, ours and peft's `target_parameters`, from one interleaved run.

    python benchmarks/experts.py                                  # the table in the terminal
    python benchmarks/experts.py --output benchmarks/results/experts.json

The work: tiny Mixtrals of 2 layers with 8 experts, 2 of them for each token, random weights, fp32, rank 16 on both
parameters of every layer's experts and on nothing else. A step is forward, loss and backward, gradients flowing to the input
embeddings: for the frozen base that is what no adapter can beat. peft runs with both ways in which transformers computes
experts: grouped_mm, its default, and eager. How much faster ours is depends on the work: peft's step pays for every weight of
the experts, ours for the rows that the router sends to them, so the table has several sizes and numbers of tokens.

Every round runs one step of every variant. Times are CPU seconds of one thread: what else the machine does falls on them
less than on the clock on the wall. Ratios are medians of the rounds' ratios. Saved bytes: what autograd keeps for backward,
each storage once, parameters and buffers left out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from adapters import commit, forward, ratio, saved_bytes
from rich.console import Console
from transformers import MixtralConfig, MixtralForCausalLM

import peftkit as pk
from peftkit.console import bar, table
from peftkit.layers import quantize_experts
from peftkit.result import machine, versions, write_json

LAYERS, EXPERTS, EACH, RANK = 2, 8, 2, 16
SIZES = [(256, 512, 1, 32), (256, 512, 1, 128), (256, 512, 4, 256), (512, 1024, 1, 32), (512, 1024, 1, 128), (512, 1024, 2, 256)]
"""(hidden, intermediate, rows, tokens in a row)"""
FASTER, PER_PARAMETER = 3.0, 0.6  # at least so much faster than peft; at most so many bytes per parameter in 4 bits


def base_model(hidden: int, intermediate: int) -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=EXPERTS, num_experts_per_tok=EACH,
    )  # fmt: skip
    return MixtralForCausalLM(config).requires_grad_(False).train()


def ours(base: Any) -> Any:
    model = copy.deepcopy(base)
    pk.attach(model, pk.LoRA(r=RANK, alpha=2 * RANK, target_modules=["experts"]))
    return model


def theirs(base: Any, implementation: str) -> Any:
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(base)
    model.set_experts_implementation(implementation)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=parameters))


def in_4_bits(base: Any) -> tuple[Any, float]:
    """(the model with experts in NF4, bytes of the experts for each of their parameters)"""
    model = copy.deepcopy(base)
    before = model.get_memory_footprint()
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "experts" in name)
    quantize_experts(model, "nf4")
    return model, (model.get_memory_footprint() - (before - 4 * weights)) / weights


def seconds_of(model: Any, ids: torch.Tensor) -> float:
    start = time.process_time()
    forward(model, ids).backward()
    taken = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return taken


def measure(size: tuple[int, int, int, int], rounds: int, console: Console) -> dict[str, Any]:
    """The record of one size."""
    hidden, intermediate, rows, tokens = size
    base = base_model(hidden, intermediate)
    packed, per_parameter = in_4_bits(base)
    models = {
        "base": base, "peftkit": ours(base), "peft grouped_mm": theirs(base, "grouped_mm"), "peft eager": theirs(base, "eager"),
        "base nf4": packed, "peftkit nf4": ours(packed),
    }  # fmt: skip
    ids = torch.randint(1024, (rows, tokens), generator=torch.Generator().manual_seed(1))
    saved = {name: saved_bytes(model, ids) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with bar(console, f"{hidden} x {intermediate}, {rows} x {tokens} tokens", rounds) as progress:
        for turn in range(rounds + 2):
            for name, model in models.items():
                taken = seconds_of(model, ids)
                if turn >= 2:  # the first rounds fill caches
                    seconds[name].append(taken)
            if turn >= 2:
                progress.advance()
    return {
        "hidden": hidden, "intermediate": intermediate, "rows": rows, "tokens": tokens,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "time_over_base": {name: ratio(seconds, name, "base nf4" if "nf4" in name else "base") for name in seconds},
        "faster_than_peft": {name: ratio(seconds, name, "peftkit") for name in seconds if name.startswith("peft ")},
        "saved_bytes": saved,
        "saved_over_base": {name: found / saved["base nf4" if "nf4" in name else "base"] for name, found in saved.items()},
        "bytes_per_expert_parameter_nf4": per_parameter,
        "seconds": seconds,
    }  # fmt: skip


def show(records: list[dict[str, Any]], title: str, console: Console) -> None:
    columns = [
        "hidden x inner", "tokens", "time / base", "peft grouped", "peft eager", "faster than grouped", "than eager", "saved / base", "peft grouped's",
        "nf4: time / base", "bytes / parameter",
    ]  # fmt: skip
    rows = []
    for record in records:
        over, faster, saved = record["time_over_base"], record["faster_than_peft"], record["saved_over_base"]
        rows.append([
            f"{record['hidden']} x {record['intermediate']}", f"{record['rows']} x {record['tokens']}", f"{over['peftkit']:.2f}",
            f"{over['peft grouped_mm']:.2f}", f"{over['peft eager']:.2f}", f"{faster['peft grouped_mm']:.2f}", f"{faster['peft eager']:.2f}",
            f"{saved['peftkit']:.2f}", f"{saved['peft grouped_mm']:.2f}", f"{over['peftkit nf4']:.2f}", f"{record['bytes_per_expert_parameter_nf4']:.3f}",
        ])  # fmt: skip
    console.print(table(title, columns, rows))
    reached = [f"{record['hidden']} x {record['intermediate']}" for record in records if min(record["faster_than_peft"].values()) >= FASTER]
    worst = max(record["bytes_per_expert_parameter_nf4"] for record in records)
    print(f"at least {FASTER:g} times faster than peft either way in {len(reached)} of {len(records)} rows; 4 bits: at most {worst:.3f} bytes per parameter")
    assert worst <= PER_PARAMETER, f"experts in 4 bits take {worst:.3f} bytes per parameter"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes to run, from the smallest")
    parser.add_argument("--output", type=Path, help="write the results to this JSON")
    parser.add_argument("--note", default="", help="what the reader of the results should know, such as other work on the machine")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = [measure(size, args.rounds, Console(stderr=True)) for size in SIZES[: args.sizes]]
    title = f"Mixtral of {LAYERS} layers, {EACH} of {EXPERTS} experts, r = {RANK}, float32, {args.rounds} rounds, commit {commit()}"
    show(records, title, Console(width=170))
    if args.output:
        content = {
            "layers": LAYERS, "experts": EXPERTS, "experts_per_token": EACH, "r": RANK, "dtype": "float32", "threads": 1, "rounds": args.rounds,
            "clock": "CPU seconds of the process", "note": args.note, "rows": records, "machine": machine(), "versions": versions(), "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(args.output, content)


if __name__ == "__main__":
    main()
