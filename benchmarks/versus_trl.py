"""Finetuning by peftkit and by trl's SFTTrainer: speed, memory, and the loss both reach, from interleaved runs.

    python benchmarks/versus_trl.py --data alpaca.json                                    # the table in the terminal
    python benchmarks/versus_trl.py --data alpaca.json --output benchmarks/results/versus_trl.json

The work: a Llama of 60M parameters (8 layers x 768) with random weights in NF4 with double quantisation, a byte-level BPE of
4,096 tokens made of the data, Alpaca rows as prompt and completion, LoRA of rank 16 on all linears, at most 512 tokens,
12 steps. Each side runs twice: at its own defaults, and "tuned": packed rows of 512 tokens, four to a step, nothing
computed twice. Every run is a process of its own, and a seed's runs come one after the other.

- supervised tokens per second: from the end of the first step to the end of the last, of the tokens that are trained.
- peak: of the resident memory during training, over that of the process with model, adapters and data loaded.
- loss: of all held-out rows after training, by one function for both sides.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, LENGTH, RANK, RATE, HELD_OUT = 12, 512, 16, 1e-3, 64
SIDES = [("trl", "default"), ("peftkit", "default"), ("trl", "tuned"), ("peftkit", "tuned")]
BOUNDS = {"default": (3.5, 0.75), "tuned": (2.0, 0.6)}  # times faster than trl at least; peak over trl's at most


# ----------------------------------------------------------------------------------------------------------- material


def prompt(row: dict[str, str]) -> str:
    given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n"


def prepare(data: Path, folder: Path) -> None:
    """The base, its tokenizer, and the rows as prompt and completion: the last ones held out."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from benchmarks.adapters import CONFIG

    rows = [{"prompt": prompt(row), "completion": row["output"]} for row in json.loads(data.read_text()) if row["output"].strip()]
    for name, part in (("train", rows[:-HELD_OUT]), ("eval", rows[-HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    made = ByteLevelBPETokenizer()
    made.train_from_iterator((row["prompt"] + row["completion"] for row in rows), vocab_size=CONFIG["vocab_size"], special_tokens=["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, pad_token_id=0, eos_token_id=1, bos_token_id=None)).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


# ---------------------------------------------------------------------------------------------------------- measuring


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def start_peak() -> int:
    """Bytes resident now; from here on VmHWM counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def held_out_loss(model: Any, tokenizer: Any, folder: Path) -> float:
    """Nats per token of the held-out completions and their ends, one row at a time."""
    import torch
    import torch.nn.functional as F

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for line in (folder / "eval.jsonl").read_text().splitlines():
            row = json.loads(line)
            given, answer = tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([(given + answer)[:LENGTH]])
            logits, targets = model(input_ids=ids).logits[0, len(given) - 1 : -1].float(), ids[0, len(given) :]
            total, count = total + F.cross_entropy(logits, targets, reduction="sum").item(), count + len(targets)
    return total / count


def with_trl(folder: Path, settings: str, seed: int) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from peftkit.quant import quantization_config

    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.bfloat16, quantization_config=quantization_config("nf4", torch.bfloat16), device_map={"": "cpu"}
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tuned = dict(per_device_train_batch_size=4, packing=True, gradient_checkpointing=False) if settings == "tuned" else {}
    config = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=STEPS, max_length=LENGTH, learning_rate=RATE, seed=seed, data_seed=seed,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **tuned,
    )  # fmt: skip
    ends: list[float] = []
    supervised: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train", cache_dir=str(folder / "cache"))
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora, callbacks=[Clock()])
    collate = trainer.data_collator

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        supervised.append(int((batch["labels"] != -100).sum()))
        return batch

    trainer.data_collator = counted
    loaded = start_peak()
    trainer.train()
    peak = memory("VmHWM")
    return {
        "tokens_per_second": sum(supervised[1:STEPS]) / (ends[-1] - ends[0]),
        "supervised_tokens": sum(supervised[:STEPS]),
        "peak_bytes": peak - loaded,
        "loss": held_out_loss(trainer.model, tokenizer, folder),
    }


def with_peftkit(folder: Path, settings: str, seed: int) -> dict[str, Any]:
    import peftkit as pk

    runner: Any = importlib.import_module("peftkit.run")  # the package offers the function under this name
    tuned = {"data": {"packing": True}, "train": {"batch_size": 4}} if settings == "tuned" else {"data": {}, "train": {}}
    recipe = {
        "model": {"name": str(folder / "base"), "quantize": "nf4", "dtype": "bfloat16"},
        "methods": [{"qlora": {"r": RANK, "alpha": 2 * RANK}}],
        "data": {"train": str(folder / "train.jsonl"), "max_length": LENGTH, "truncation": "right", **tuned["data"]},
        "train": {"max_steps": STEPS, "learning_rate": RATE, "warmup_ratio": 0.0, "seed": seed, "log_every": 1, **tuned["train"]},
        "eval": {"before": False},
        "output_dir": str(folder / f"peftkit-{settings}-{seed}"),
    }
    found = {}
    train = runner.train

    def measured(*args: Any, **kwargs: Any) -> Any:
        loaded = start_peak()
        stats = train(*args, **kwargs)
        found["peak_bytes"] = memory("VmHWM") - loaded
        return stats

    runner.train = measured  # only this stage of the run is measured
    pk.run(recipe)
    steps = [json.loads(line) for line in (Path(recipe["output_dir"]) / "metrics.jsonl").read_text().splitlines()]
    first, last = steps[0], steps[-1]
    model, tokenizer = pk.load(str(folder / "base"), quantize="nf4", dtype="bfloat16")
    pk.load_adapter(model, Path(recipe["output_dir"]) / "adapter")
    return {
        "tokens_per_second": (last["supervised_tokens"] - first["supervised_tokens"]) / (last["seconds"] - first["seconds"]),
        "supervised_tokens": last["supervised_tokens"],
        "loss": held_out_loss(model, tokenizer, folder),
        **found,
    }


def in_a_process(folder: Path, who: str, settings: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps([str(folder), who, settings, seed])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{who}, {settings}, seed {seed} failed:\n{done.stderr[-3000:]}")
    return {"who": who, "settings": settings, "seed": seed, **json.loads(done.stdout.strip().splitlines()[-1])}


# ------------------------------------------------------------------------------------------------------------ results


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For either settings: medians of both sides, and their ratios by seed."""
    found = []
    for settings, (faster, peak) in BOUNDS.items():
        mine, theirs = ([row for row in rows if (row["who"], row["settings"]) == (who, settings)] for who in ("peftkit", "trl"))
        if not mine or not theirs:
            continue
        record: dict[str, Any] = {"settings": settings, "bound": {"faster": faster, "peak": peak}}
        for who, side in (("peftkit", mine), ("trl", theirs)):
            record[who] = {key: statistics.median(row[key] for row in side) for key in ("tokens_per_second", "peak_bytes", "supervised_tokens")}
            record[who]["losses"] = [row["loss"] for row in side]
        record["faster"] = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(mine, theirs, strict=True))
        record["peak"] = statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in zip(mine, theirs, strict=True))
        found.append(record)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a JSON array of rows with instruction, input, output")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the results to this JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        folder, who, settings, seed = json.loads(args.one)
        print(json.dumps({"trl": with_trl, "peftkit": with_peftkit}[who](Path(folder), settings, seed)))
        return
    if args.data is None:
        parser.error("give --data: the rows to train on")
    from rich.console import Console

    from benchmarks.adapters import commit
    from peftkit.console import table
    from peftkit.result import machine, versions, write_json

    with tempfile.TemporaryDirectory() as folder:
        prepare(args.data, Path(folder))
        rows = []
        for seed in range(args.seeds):
            for who, settings in SIDES:
                rows.append(in_a_process(Path(folder), who, settings, seed))
                print(f"seed {seed}, {who}, {settings}: {rows[-1]['tokens_per_second']:.0f} supervised tokens/s", file=sys.stderr)
    records = summarise(rows)
    cells = [
        [record["settings"], who, f"{record[who]['tokens_per_second']:.0f}", f"{record[who]['peak_bytes'] / 2**20:.0f}",
         " ".join(f"{loss:.3f}" for loss in record[who]["losses"]), *([f"{record[key]:.2f}" for key in ("faster", "peak")] if who == "peftkit" else ["", ""])]
        for record in records for who in ("trl", "peftkit")
    ]  # fmt: skip
    columns = ["settings", "who", "supervised tokens/s", "peak MiB", "held-out loss by seed", "times faster", "peak / trl's"]
    Console(width=130).print(table(f"QLoRA r = {RANK}, {STEPS} steps, {args.seeds} seeds", columns, cells))
    if args.output:
        from importlib.metadata import version

        where = {"machine": machine(), "versions": versions() | {"trl": version("trl")}, "commit": commit()}
        write_json(args.output, {"rows": records, "runs": rows, **where, "date": datetime.now(UTC).isoformat(timespec="seconds")})


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
