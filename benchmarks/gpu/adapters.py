"""The table of benchmarks/adapters.py on a GPU: step time and saved bytes over the frozen base, ours and peft's.

    python -m benchmarks.gpu.adapters                          # both shapes; writes benchmarks/results/gpu_adapters.json
    python -m benchmarks.gpu.adapters --shape tiny --device cpu --rounds 1        # a rehearsal, writes nothing

"table" is the shape of the CPU's table: on a large GPU most of such a step is the launching of kernels. "wide" has the
width of an 8B model in 4 layers. The run is interleaved, as there; all variants are in memory at once (about 40 GB).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import adapters
from benchmarks.gpu.common import RESULTS, check, write

SHAPES: dict[str, dict[str, Any]] = {
    "table": adapters.CONFIG,
    "wide": adapters.CONFIG | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8),
    "tiny": adapters.CONFIG | dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=128),
}


def measure(shape: str, device: str, dtype: torch.dtype, rounds: int, rows: list[str], whose: list[str]) -> dict[str, Any]:
    config, console = SHAPES[shape], Console(stderr=True)

    def wanted(row: str, who: str) -> bool:
        return who == "base" or (row in rows and who in whose)

    seconds = adapters.measure_time(dtype, device, rounds, config, wanted, console)
    saved = adapters.measure_bytes(device, config, wanted)
    records = adapters.summarise(seconds, saved)
    frozen = {name: statistics.median(times) for name, times in seconds.items() if name.endswith("|base")}
    title = f"{shape}: {config['num_hidden_layers']} layers x {config['hidden_size']}, batch {adapters.ROWS} x {adapters.TOKENS}, r = {adapters.RANK}"
    adapters.show(records, f"{title}, {dtype}, {rounds} rounds on {torch.cuda.get_device_name() if device == 'cuda' else device}", Console(width=150))
    return {"config": config, "frozen_median_seconds": frozen, "rows": records, "seconds": seconds}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="table,wide", help=f"one or more of {', '.join(SHAPES)}, with commas between them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", help="rows to run, with ';' between them: lora;dora, dropout")
    parser.add_argument("--who", default="peftkit,peft,adopted", help="whose adapters to run; peftkit and peft at least")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_adapters.json on a GPU, none elsewhere")
    args = parser.parse_args(arguments)
    output = args.output or (RESULTS / "gpu_adapters.json" if args.device == "cuda" else None)
    check(args.device, output)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows = args.only.split(";") if args.only else list(adapters.BOUNDS)
    tables = {shape: measure(shape, args.device, dtype, args.rounds, rows, args.who.split(",")) for shape in args.shape.split(",")}
    if output:
        work = {"dtype": "bfloat16", "rounds": args.rounds, "batch": [adapters.ROWS, adapters.TOKENS], "r": adapters.RANK}
        write(output, args.device, work | {"tables": tables})


if __name__ == "__main__":
    main()
