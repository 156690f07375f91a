"""Forecast of peak memory against the measured one, each setting in a process of its own.

    python benchmarks/memory.py                                            # the table in the terminal
    python benchmarks/memory.py --output benchmarks/results/memory.json

A setting is a random Llama, a method, a batch of random tokens, and whether activations are computed again. Its process imports
the libraries and trains a model of one such layer first; what it then occupies is left out of the measurement, so that code,
thread pools and what libraries keep for each shape of product (20 to 30 MiB were seen) do not count. The model is loaded from a
file, adapted, and copied off the file's mapping, whose pages the system may drop. Then the system's peak is reset, and three
optimizer steps run, with clipping, and an evaluation of the loss. Measured is the peak of resident memory in that time, less
what the process occupied before the model was loaded; the weights are part of both numbers. On a GPU it is the peak of
torch's allocator.

glibc keeps freed memory that is smaller than a threshold which grows to 32 MiB while a program runs, so that resident memory
depends on the order of earlier allocations too. `--return-freed` fixes the threshold at 128 KiB: freed tensors then go back to
the system at once. The table says which of the two was measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BOUND = 0.10  # the error that a forecast may have
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    method: str
    width: int
    layers: int
    rows: int
    tokens: int
    vocabulary: int = 4096
    quantize: str | None = None
    dropout: float = 0.0
    checkpointing: bool = False
    accumulation: int = 1
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        facts = [
            self.method, self.quantize, f"{self.layers} x {self.width}", f"batch {self.rows} x {self.tokens}",
            f"dropout {self.dropout}" if self.dropout else None, "checkpointing" if self.checkpointing else None,
            f"accumulation {self.accumulation}" if self.accumulation > 1 else None, "float32" if self.dtype == "float32" else None,
            f"vocabulary {self.vocabulary}" if self.vocabulary != 4096 else None,
        ]  # fmt: skip
        return ", ".join(fact for fact in facts if fact)


SETTINGS = [
    Setting("lora", 512, 6, 4, 256),
    Setting("lora", 768, 8, 4, 512),
    Setting("lora", 768, 8, 4, 512, checkpointing=True),
    Setting("lora", 512, 6, 8, 256, dropout=0.05),
    Setting("lora", 512, 6, 4, 256, dtype="float32"),
    Setting("lora", 512, 6, 2, 256, accumulation=4),
    Setting("lora", 512, 2, 4, 512, vocabulary=32768),
    Setting("dora", 512, 6, 4, 256),
    Setting("dora", 768, 8, 4, 512),
    Setting("dora", 768, 8, 4, 512, checkpointing=True),
    Setting("dora", 512, 6, 4, 256, dropout=0.05),
    Setting("lora", 768, 8, 4, 512, quantize="nf4"),
    Setting("lora", 768, 8, 4, 512, quantize="nf4", checkpointing=True),
    Setting("dora", 512, 6, 8, 256, quantize="nf4"),
    Setting("lora", 1024, 4, 1, 1024, quantize="nf4"),
    Setting("lora", 512, 6, 4, 256, quantize="int8"),
    Setting("full", 512, 6, 4, 256),
]


def config(setting: Setting) -> Any:
    from transformers import LlamaConfig

    heads = setting.width // 64
    return LlamaConfig(
        hidden_size=setting.width, intermediate_size=setting.width * 8 // 3 // 64 * 64, num_hidden_layers=setting.layers, num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1) if heads % 4 == 0 else heads, vocab_size=setting.vocabulary, max_position_embeddings=2048,
    )  # fmt: skip


def recipe(setting: Setting, model: str) -> dict[str, Any]:
    full = setting.method == "full"
    return {
        "model": {"name": model, "dtype": setting.dtype} | ({"quantize": setting.quantize} if setting.quantize else {}),
        "methods": [] if full else [{setting.method: {"r": 16, "alpha": 32, "dropout": setting.dropout}}],
        "data": {"train": "builtin:copy/train", "max_length": setting.tokens},
        "train": {
            "batch_size": setting.rows * setting.accumulation, "micro_batch_size": setting.rows, "full_finetuning": full,
            "gradient_checkpointing": setting.checkpointing, "optimizer": "adamw",
        },
        "output_dir": "unused",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the process of one setting


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def settle() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def train(model: Any, rows: int, tokens: int, accumulation: int, autocast: bool, full: bool) -> None:
    """Three steps as the training loop does them, and an evaluation. Half of the tokens are supervised, and one row is short."""
    import torch

    from peftkit.loss import TokenLoss
    from peftkit.optim import build_optimizer

    device = model.device
    loss, optimizer = TokenLoss(model), build_optimizer(model, optimizer="adamw")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), generator=generator).to(device)
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(tokens, device=device).repeat(rows, 1)}
    batch["attention_mask"] = torch.ones_like(ids)
    if rows > 1:
        batch["attention_mask"][0, -3:] = 0
    model.train()
    for _ in range(3):
        for _ in range(accumulation):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                value, count = loss(**batch)
            (value / count).backward()
            del value
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        loss(**batch)


def build(setting: Setting, folder: str, device: str) -> Any:
    import peftkit as pk
    from peftkit.attention import attend_within_documents
    from peftkit.model import load
    from peftkit.recipe import load_recipe
    from peftkit.train import enable_checkpointing

    found = load_recipe(recipe(setting, folder))
    model, _ = load(folder, found.quantize, "float32" if setting.method == "full" else setting.dtype, device=device)
    if found.attends_within_documents:
        attend_within_documents(model)
    if setting.method == "full":
        model.requires_grad_(True)
    else:
        pk.attach(model, found.build_methods())
    if setting.checkpointing:
        enable_checkpointing(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # off the file's mapping
    return model


def save(setting: Setting, folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(setting), dtype=torch.float32 if setting.method == "full" else getattr(torch, setting.dtype)).save_pretrained(
        folder
    )


def measure(setting: Setting, folder: str) -> dict[str, int]:
    """Peak bytes of training over the process before the model, and over the loaded one. The model lies in `folder`."""
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    autocast = setting.method == "full" and setting.dtype == "bfloat16"
    small = replace(setting, layers=1)
    with tempfile.TemporaryDirectory() as warm:
        save(small, warm)
        train(build(small, warm, device), small.rows, small.tokens, small.accumulation, autocast, setting.method == "full")
    settle()
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    model = build(setting, folder, device)
    settle()
    loaded = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    train(model, setting.rows, setting.tokens, setting.accumulation, autocast, setting.method == "full")
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return {"measured": peak - before, "over_loaded": peak - loaded}


def foretell(setting: Setting, folder: str) -> dict[str, int]:
    import torch

    from peftkit.forecast import Skeleton, Workload, forecast
    from peftkit.recipe import load_recipe

    skeleton = Skeleton(load_recipe(recipe(setting, folder)), config(setting), gpu=torch.cuda.is_available())
    workload = Workload(setting.rows, setting.tokens, setting.rows * (setting.tokens - setting.tokens // 2), padded=setting.rows > 1)
    return forecast(skeleton, workload, setting.accumulation > 1, evaluation=workload).to_json()


def child(index: int, folder: str) -> None:
    import transformers

    transformers.logging.disable_progress_bar()
    setting = SETTINGS[index]
    measured = measure(setting, folder)
    print(json.dumps(asdict(setting) | {"name": setting.name} | measured | {"forecast": foretell(setting, folder)}))


# ------------------------------------------------------------------------------------------------------------------ all of them


def run_all(chosen: list[int], return_freed: bool) -> list[dict[str, Any]]:
    rows = []
    for index in chosen:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"MALLOC_MMAP_THRESHOLD_": "131072"} if return_freed else {})
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--save", str(index), folder], env=environment, check=True)
            done = subprocess.run([sys.executable, __file__, "--child", str(index), folder], env=environment, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        row["error"] = row["forecast"]["total"] / row["measured"] - 1
        rows.append(row)
        print(f"{row['name']:70}  measured {row['measured'] / MIB:7.0f} MiB  forecast {row['forecast']['total'] / MIB:7.0f} MiB  {row['error']:+.1%}"
              f"  (over the loaded process {row['over_loaded'] / MIB:.0f})", flush=True)  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings, from 0")
    parser.add_argument("--return-freed", action="store_true", help="have glibc return freed tensors to the system at once")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.save:
        save(SETTINGS[int(args.save[0])], args.save[1])
        return 0
    if args.child:
        child(int(args.child[0]), args.child[1])
        return 0
    rows = run_all(args.only if args.only is not None else list(range(len(SETTINGS))), args.return_freed)
    if args.output:
        from peftkit.result import machine, versions, write_json

        facts = {
            "bound": BOUND,
            "return_freed": args.return_freed,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
        }
        write_json(args.output, facts | {"rows": rows})
    return int(any(abs(row["error"]) > BOUND for row in rows))


if __name__ == "__main__":
    sys.exit(main())
