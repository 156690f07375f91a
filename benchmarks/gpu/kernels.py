"""The Triton kernels beside plain torch, one by one, at the widths of an 8B Llama: which of them deserve their place.

    python -m benchmarks.gpu.kernels                                     # writes benchmarks/results/gpu_kernels.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu.kernels --shape tiny --device cpu       # a rehearsal, writes nothing

Milliseconds, medians, the caches cleared before each run on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu.common import RESULTS, check, write
from peftkit.console import table
from peftkit.kernels import base, dora

Case = tuple[str, Callable[[], Any], Callable[[], Any]]  # kernel, plain torch, Triton

SHAPES = {  # tokens, (out, in) of the linears
    "llama8b": ([512, 2048, 8192], [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]),
    "tiny": ([24], [(32, 64)]),
}


def cases(tokens: int, outputs: int, inputs: int, r: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    from peftkit.kernels import triton_dora

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    y, grad, h, weight = random(tokens, outputs), random(tokens, outputs), random(tokens, r), random(outputs, inputs)
    a, b = random(r, inputs, dtype=torch.float32), random(outputs, r, dtype=torch.float32)
    squares = weight.double().square().sum(1).float()
    magnitude = norm = squares.sqrt()

    compose = (y, h, b, 2.0, magnitude, norm, None)
    yield "compose", lambda: dora.compose_(*compose), lambda: triton_dora.compose_(*compose)

    def backward(kernels: Any) -> Callable[[], Any]:
        return lambda: kernels.compose_backward(grad, y, magnitude, norm, None, need_magnitude=True, need_bias=False)

    yield "compose backward", backward(dora), backward(triton_dora)

    factors = (weight, squares, a, b, 2.0)

    memory = triton_dora.norm_memory(weight, r)

    def anew() -> Any:
        memory.seen.zero_()
        return triton_dora.dora_norm(*factors, memory)

    yield "norm, taken anew", lambda: dora.dora_norm(*factors), anew
    yield "norm, kept", lambda: dora.dora_norm(*factors), lambda: triton_dora.dora_norm(*factors, memory)


def milliseconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=20, rep=100, return_mode="median")
    times = []
    for _ in range(2):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def measure(shape: str, device: str, dtype: torch.dtype, ranks: list[int], only: str) -> list[dict[str, Any]]:
    rows = []
    for tokens in SHAPES[shape][0]:
        for outputs, inputs in SHAPES[shape][1]:
            for r in ranks:
                for name, plain, fused in cases(tokens, outputs, inputs, r, dtype, device):
                    if not name.startswith(only):
                        continue
                    base.ENABLED = False
                    slow = milliseconds(plain, device)
                    base.ENABLED = True
                    row = {"kernel": name, "tokens": tokens, "out": outputs, "in": inputs, "r": r, "torch_ms": slow, "triton_ms": milliseconds(fused, device)}
                    rows.append(row | {"times_faster": slow / row["triton_ms"]})
    return sorted(rows, key=lambda row: row["kernel"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--only", default="", help="kernels whose name begins so")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_kernels.json on a GPU, none elsewhere")
    args = parser.parse_args(arguments)
    output = args.output or (RESULTS / "gpu_kernels.json" if args.device == "cuda" else None)
    check(args.device, output)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows = measure(args.shape, args.device, dtype, [int(r) for r in args.ranks.split(",")], args.only)
    cells = [
        [row["kernel"], str(row["tokens"]), f"{row['out']} x {row['in']}", str(row["r"]),
         f"{row['torch_ms']:.3f}", f"{row['triton_ms']:.3f}", f"{row['times_faster']:.2f}"]
        for row in rows
    ]  # fmt: skip
    Console(width=120).print(table(f"{dtype} on {args.device}", ["kernel", "tokens", "W", "r", "torch ms", "Triton ms", "times faster"], cells))
    if output:
        write(output, args.device, {"dtype": str(dtype).removeprefix("torch."), "rows": rows})


if __name__ == "__main__":
    main()
