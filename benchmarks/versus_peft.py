"""Adapters by peft and by peftkit in one training loop: the accuracy both reach, their step time and their memory.

    python benchmarks/versus_peft.py                                                    # the table in the terminal
    python benchmarks/versus_peft.py --output benchmarks/results/versus_peft.json
    python benchmarks/versus_peft.py --seeds 1 --steps 10 --only "lora;dora"            # a try

The work is that of the suite `ci`: the embedded base, its data, steps and learning rate. Model, data, batches, loss, optimizer, loop and evaluation are
peftkit's on both sides; what differs is the layer that stands where a linear stood: the one of `peftkit.attach`, or the one of `peft.get_peft_model`,
which is given the same A. (PiSSA's A and B come from the base, by each side's own decomposition.)

- accuracy: of greedy answers after training, every seed a process of its own, several at a time. The two are compared paired by seed and example
  (peftkit.bench.statistics). The check is that they cannot be told apart; exit code 1 where any can.
- step time: forward, loss, backward and optimizer of one step of the recipe, one process, every round a step of either on the same batch, the order
  alternating; medians, and the median of the rounds' ratios.
- saved bytes: what autograd keeps for the backward of the first micro-batch, each storage once, parameters and buffers left out; exact on any machine.
- peak: of the resident memory while training, over that of the process with model, adapters and data loaded.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "benchmarks" / "suites" / "ci.yaml"
WHO = ("peft", "peftkit")
PRELOADED = ["bitsandbytes", "peft", "peftkit.run", "transformers.models.llama.modeling_llama"]  # imported once, for all processes

_PAIR = {"r": 8, "alpha": 16}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"methods": [{"lora": _PAIR}]},
    "lora, dropout": {"methods": [{"lora": _PAIR | {"dropout": 0.05}}]},
    "rslora": {"methods": [{"lora": _PAIR | {"rslora": True}}]},
    "pissa": {"methods": [{"lora": _PAIR | {"init": "pissa"}}]},
    "dora": {"methods": [{"dora": _PAIR}]},
    "dora, dropout": {"methods": [{"dora": _PAIR | {"dropout": 0.05}}]},
    "qlora": {"methods": [{"qlora": _PAIR}]},
    "qdora": {"model": {"quantize": "nf4"}, "methods": [{"dora": _PAIR}]},
}  # fmt: skip
"""Row -> changes to the suite's recipe; peft's configuration follows from the method."""


@dataclass
class Side:
    """One adapted model with what trains and scores it."""

    recipe: Any
    model: Any
    tokenizer: Any
    loss: Any
    optimizer: Any
    sets: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ the sides


def recipe_of(method: str, seed: int, steps: int | None, folder: Path) -> Any:
    """The suite's recipe with a row's changes, without the sets whose forgetting it measures. Raises ConfigError."""
    from peftkit.bench.suite import merge
    from peftkit.config import read_yaml
    from peftkit.recipe import load_recipe

    train = {"seed": seed} | ({} if steps is None else {"max_steps": steps})
    changes = {"train": train, "eval": {"retained": [], "before": False}, "output_dir": str(folder)}
    return load_recipe(merge(merge(read_yaml(SUITE).data["recipe"], METHODS[method]), changes))


def peft_config(method: Any) -> Any:
    """What peft calls the same method."""
    from peft import LoraConfig

    return LoraConfig(
        r=method.r, lora_alpha=method.alpha, lora_dropout=method.dropout, use_rslora=method.rslora, use_dora=method.dora,
        init_lora_weights={"kaiming": True}.get(method.init, method.init), target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip


def to_peft(model: Any, method: Any) -> Any:
    """The adapters that `peftkit.attach` put on `model` replaced by peft's, which start from the same A."""
    from peft import get_peft_model

    import peftkit as pk
    from peftkit.layers import adapter_layers

    starts = {name: layer.a().detach().clone() for name, layer in adapter_layers(model).items()}  # type: ignore[attr-defined]
    pk.detach(model)
    inner = get_peft_model(model, peft_config(method)).get_base_model()
    theirs = {name: module for name, module in inner.named_modules() if hasattr(module, "lora_A")}
    if theirs.keys() != starts.keys():
        raise ValueError(f"peft and peftkit adapt other modules: {sorted(theirs.keys() ^ starts.keys())}")
    for name, module in theirs.items():
        if method.init == "kaiming":
            module.lora_A["default"].weight.data.copy_(starts[name])
    return inner


def build(method: str, who: str, seed: int, steps: int | None, folder: Path) -> Side:
    """A side as `peftkit.run` would have it before its first step."""
    from accelerate.utils import set_seed
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    import peftkit as pk
    from peftkit.loss import TokenLoss
    from peftkit.model import load, load_tokenizer, resolve_dtype
    from peftkit.optim import build_optimizer

    runner: Any = importlib.import_module("peftkit.run")  # the package offers the function under this name
    disable_progress_bar()  # of loading, in the middle of this script's own
    recipe = recipe_of(method, seed, steps, folder)
    tokenizer = load_tokenizer(recipe.model.name)
    sets = runner.load_sets(recipe, tokenizer, Console(quiet=True))
    set_seed(seed)
    model, _ = load(recipe.model.name, recipe.quantize, resolve_dtype(recipe.model.dtype), device="cpu", attention=recipe.model.attention)
    [swapping] = recipe.build_methods()
    pk.attach(model, swapping)
    if who == "peft":
        model = to_peft(model, swapping)
    optimizer = build_optimizer(model, recipe.train.learning_rate, recipe.train.weight_decay, recipe.train.optimizer)
    return Side(recipe, model, tokenizer, TokenLoss(model), optimizer, sets)


# ---------------------------------------------------------------------------------------------------------- measuring


def train(method: str, who: str, seed: int, steps: int | None, threads: int) -> dict[str, Any]:
    """One training with its answers, alone in its process."""
    import torch
    from accelerate.utils import set_seed
    from rich.console import Console

    from benchmarks.versus_trl import memory, start_peak
    from peftkit.tripwires import Tripwires

    runner: Any = importlib.import_module("peftkit.run")
    torch.set_num_threads(threads)
    quiet = Console(quiet=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        side = build(method, who, seed, steps, folder)
        scores = runner.Scorer(side.recipe, side.model, side.tokenizer, side.loss, side.sets, quiet)
        tripwires = Tripwires(side.model, {}, side.recipe.train.warn_only, lambda text: print(text, file=sys.stderr))
        set_seed(seed)  # dropout: what was drawn until here differs
        loaded = start_peak()
        runner.train(
            side.recipe, side.loss, side.model, side.optimizer, side.sets, runner.one_accelerator(side.recipe), folder, {}, quiet, False, scores, tripwires
        )
        peak = memory("VmHWM") - loaded
        values = scores.score("after", folder / "predictions.jsonl")
        answers = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "method": method, "who": who, "seed": seed, "first_loss": losses[0], "last_loss": losses[-1], "loss": values["loss"],
        "exact_match": values["exact_match"], "outcomes": [int(answer["correct"]) for answer in answers], "peak_bytes": peak,
    }  # fmt: skip


def measure(method: str, rounds: int, threads: int) -> dict[str, Any]:
    """Step times of both sides, interleaved in this process, and what they keep for backward."""
    import torch

    from peftkit import data
    from peftkit.memory import count_saved
    from peftkit.train import micro_batches_of

    runner: Any = importlib.import_module("peftkit.run")
    torch.set_num_threads(threads)
    sides = {who: build(method, who, 0, None, Path("unused")) for who in WHO}
    ours = sides["peftkit"]
    config, rows = ours.recipe.train, data.make_rows(ours.sets["train"], ours.recipe.data)
    order = data.DataOrder(len(rows), config.batch_size, 0)

    def batches(step: int) -> list[dict[str, Any]]:
        chosen = [rows[i] for i in order[step]]
        parts = micro_batches_of(chosen, config.micro_batch_size, lambda row: sum(len(example.input_ids) for example in row))
        return [runner.to_batch(part, ours.loss) for part in parts]

    saved = {}
    for who, side in sides.items():
        side.model.train()
        side.loss(**batches(0)[0])  # tries once whether hidden states may be gathered, and takes DoRA's norm
        with count_saved(side.model) as kept:
            side.loss(**batches(0)[0])
        saved[who] = sum(kept.values())
    seconds: dict[str, list[float]] = {who: [] for who in WHO}
    gc.disable()
    for turn in range(rounds + 2):  # the first two warm up, one in either order
        work = batches(turn)
        for who in WHO if turn % 2 else WHO[::-1]:
            side, started = sides[who], time.perf_counter()
            for batch in work:
                total, tokens = side.loss(**batch)
                (total / tokens).backward()
            side.optimizer.step()
            side.optimizer.zero_grad(set_to_none=True)
            if turn >= 2:
                seconds[who].append(time.perf_counter() - started)
        gc.collect()
    gc.enable()
    return {"method": method, "seconds": seconds, "saved_bytes": saved, "dtype": str(ours.model.dtype).removeprefix("torch.")}


# ------------------------------------------------------------------------------------------------------------ results


def summarise(runs: list[dict[str, Any]], timings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for every row of the table, in the order of METHODS.

    `difference` is ours minus peft's, as fractions: mean, low, high (95%), and whether they are told apart. `times_faster`: peft's step over ours.
    """
    from peftkit.bench.statistics import accuracy, difference

    records = []
    for timing in timings:
        record: dict[str, Any] = {"method": timing["method"]}
        by_who = {who: [run for run in runs if (run["method"], run["who"]) == (timing["method"], who)] for who in WHO}
        for who, own in by_who.items():
            found = accuracy([run["outcomes"] for run in own])
            record[who] = {
                "exact_match": found.mean, "low": found.low, "high": found.high, "seconds": statistics.median(timing["seconds"][who]),
                "saved_bytes": timing["saved_bytes"][who], "peak_bytes": statistics.median(run["peak_bytes"] for run in own),
                "losses": [run["loss"] for run in own], "first_losses": [run["first_loss"] for run in own],
            }  # fmt: skip
        outcomes = {who: {run["seed"]: run["outcomes"] for run in own} for who, own in by_who.items()}
        apart = difference(outcomes["peftkit"], outcomes["peft"])
        record["difference"] = {"mean": apart.mean, "low": apart.low, "high": apart.high, "seeds": apart.seeds, "told_apart": apart.told_apart}
        pairs = zip(timing["seconds"]["peft"], timing["seconds"]["peftkit"], strict=True)
        record["times_faster"] = statistics.median(theirs / ours for theirs, ours in pairs)
        record["saved_over_peft"] = record["peftkit"]["saved_bytes"] / record["peft"]["saved_bytes"]
        records.append(record)
    return records


def cells(record: dict[str, Any]) -> list[str]:
    """A record as a row of COLUMNS."""
    theirs, ours, apart = record["peft"], record["peftkit"], record["difference"]
    verdict = "told apart" if apart["told_apart"] else "cannot be told apart"
    return [
        record["method"], f"{theirs['exact_match']:.1%}", f"{ours['exact_match']:.1%}",
        f"{100 * apart['mean']:+.1f} ({100 * apart['low']:+.1f} to {100 * apart['high']:+.1f}): {verdict}",
        f"{1000 * theirs['seconds']:.0f}", f"{1000 * ours['seconds']:.0f}", f"{record['times_faster']:.2f}",
        *(f"{side['saved_bytes'] / 2**20:.1f}" for side in (theirs, ours)), f"{record['saved_over_peft']:.2f}",
        *(f"{side['peak_bytes'] / 2**20:.0f}" for side in (theirs, ours)),
    ]  # fmt: skip


COLUMNS = [
    "method", "accuracy, peft", "peftkit", "difference, points (95% interval)", "step, ms, peft", "peftkit", "times faster", "saved for backward, MiB, peft",
    "peftkit", "over peft's", "peak, MiB, peft", "peftkit",
]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="training steps; by default those of the suite")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of either side")
    parser.add_argument("--only", help="rows, with ';' between them: lora;dora, dropout")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time; the timed steps run alone")
    parser.add_argument("--output", type=Path, help="write the results to this JSON")
    args = parser.parse_args(arguments)
    wanted = args.only.split(";") if args.only else list(METHODS)
    if unknown := [method for method in wanted if method not in METHODS]:
        parser.error(f"no row {unknown[0]!r} (there are: {'; '.join(METHODS)})")
    if min(args.seeds, args.rounds, args.jobs, args.steps or 1) < 1:
        parser.error("--seeds, --steps, --rounds and --jobs count from 1")
    from rich.console import Console

    from benchmarks.adapters import commit
    from peftkit.console import bar, table
    from peftkit.result import machine, versions, write_json

    cores, progress = os.cpu_count() or 1, Console(stderr=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    todo = [(method, who, seed) for method in wanted for seed in range(args.seeds) for who in WHO]
    runs, timings = [], []
    alone = functools.partial(ProcessPoolExecutor, mp_context=context, max_tasks_per_child=1)
    with alone(args.jobs) as pool, bar(progress, "trainings", len(todo)) as shown:
        waiting = [pool.submit(train, *each, args.steps, max(cores // args.jobs, 1)) for each in todo]
        for future in waiting:
            runs.append(future.result())
            shown.advance(1, f"{runs[-1]['method']}, {runs[-1]['who']}: {runs[-1]['exact_match']:.1%}")
    progress.print(f"trained; the clock starts at {datetime.now():%H:%M:%S}", highlight=False)
    with alone(1) as pool, bar(progress, "timed steps", len(wanted)) as shown:
        for method in wanted:
            timings.append(pool.submit(measure, method, args.rounds, cores).result())
            shown.advance(1, method)
    records = summarise(runs, timings)
    title = f"suite ci, {args.steps or recipe_of('lora', 0, None, Path('unused')).train.max_steps} steps, {args.seeds} seeds, {timings[0]['dtype']}"
    Console(width=200).print(table(f"{title}, commit {commit()}", COLUMNS, [cells(record) for record in records]))
    apart = [record["method"] for record in records if record["difference"]["told_apart"]]
    print(f"told apart: {'; '.join(apart)}" if apart else f"accuracy: peft and peftkit cannot be told apart in any of {len(records)} rows")
    if args.output:
        setting = {"suite": "ci", "steps": args.steps, "seeds": args.seeds, "rounds": args.rounds, "dtype": timings[0]["dtype"], "threads": cores}
        where = {"machine": machine(), "versions": versions(), "commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(args.output, {**setting, "rows": records, "timings": timings, "runs": runs, **where})
    return int(bool(apart))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
