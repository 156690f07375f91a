"""Step time and peak memory of an 8B-shaped Llama under QLoRA and QDoRA on one GPU: peftkit, peft, and unsloth if it is installed.

    python -m benchmarks.gpu.llama8b                             # writes benchmarks/results/gpu_llama8b.json
    python -m benchmarks.gpu.llama8b --shape tiny --device cpu   # a rehearsal, writes nothing

The model is that of Llama 3 8B (32 layers x 4096, intermediate 14336, 32 heads, 8 KV heads, vocabulary 128256) with
random weights, made on the device and put into NF4 with double quantisation one linear at a time: no 16-bit copy of the
whole ever exists. Rank 16 on all linears but the head, one row of 2048 tokens, bf16, fused AdamW; a step is forward,
loss, backward and optimizer. "peftkit" and "peft" take the loss of transformers, from full logits; "peftkit, own loss"
takes that of peftkit's recipes; unsloth brings its own. peft runs without `prepare_model_for_kbit_training`, which would
turn embeddings and head into fp32: that is to its advantage. Every variant has a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkit as pk
from benchmarks.gpu.common import RESULTS, check, synchronized, write
from peftkit.console import table
from peftkit.loss import TokenLoss
from peftkit.quant import quantization_config
from peftkit.train import enable_checkpointing

ROOT = Path(__file__).resolve().parents[2]
RANK, ALPHA, WARM_UP = 16, 32, 3
SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=8192, rope_theta=500000.0,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=300, max_position_embeddings=8192
    ),
}  # fmt: skip
WHO = ("peftkit", "peftkit, own loss", "peft", "unsloth")


# ---------------------------------------------------------------------------------------------------------------- models


def build_base(shape: str, device: str, dtype: torch.dtype) -> Any:
    """The random model in 4 bits on `device`. What is in memory beside it at any time is one linear in 16 bits."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], dtype=dtype))
    generator = torch.Generator(device).manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            small = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            weight = Params4bit(random(module.weight), requires_grad=False, compress_statistics=True, quant_type="nf4", module=small)
            small.weight = weight.to(device)  # quantises
            model.set_submodule(name, small)
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            module.weight = nn.Parameter(random(module.weight), requires_grad=False)
        elif name.endswith("norm"):
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=device), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # its buffers are computed, not stored
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"never given a value: {left}"
    model.config.quantization_config = quantization_config("nf4", dtype)
    model.is_quantized = model.is_loaded_in_4bit = True  # what transformers sets at loading and peft asks for
    return model.requires_grad_(False)


def save_base(model: Any, folder: Path) -> None:
    """The 4-bit model as transformers would load it, with some tokenizer: unsloth takes models from folders only."""
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "peftkit/builtin/tiny" / file, folder / file)


# Each way takes the function that makes the base, so that nobody else holds the base.


def with_peftkit(make_base: Callable[[], Any], dora: bool, checkpointing: bool) -> Any:
    model = make_base()
    pk.attach(model, (pk.DoRA if dora else pk.LoRA)(r=RANK, alpha=ALPHA))
    if checkpointing:
        enable_checkpointing(model)
    return model


def with_peft(make_base: Callable[[], Any], dora: bool, checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    model = make_base()
    if checkpointing:
        enable_checkpointing(model)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM"))


def with_unsloth(make_base: Callable[[], Any], dora: bool, checkpointing: bool) -> Any:
    if dora:
        raise RuntimeError("unsloth has no fused DoRA, it passes it on to peft")
    from unsloth import FastLanguageModel

    base = make_base()
    length = base.config.max_position_embeddings
    with tempfile.TemporaryDirectory() as folder:
        save_base(base, Path(folder))
        del base
        gc.collect()
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=targets, use_gradient_checkpointing="unsloth" if checkpointing else False
    )


# ------------------------------------------------------------------------------------------------------------- measuring


def losses(who: str, model: Any) -> Callable[[Tensor], Tensor]:
    """How `who` takes the loss of a row."""
    if who != "peftkit, own loss":
        return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss
    token_loss = TokenLoss(model)

    def own(ids: Tensor) -> Tensor:
        total, count = token_loss(ids, input_ids=ids)
        return total / count

    return own


def measure(shape: str, device: str, who: str, dora: bool, checkpointing: bool, tokens: int, steps: int) -> dict[str, Any]:
    """Seconds of every step, peak memory, and the losses of the first and the last step of one variant."""
    torch.manual_seed(0)
    on_gpu, wait = device.startswith("cuda"), synchronized(device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    makers = {"peftkit": with_peftkit, "peftkit, own loss": with_peftkit, "peft": with_peft, "unsloth": with_unsloth}
    model = makers[who](lambda: build_base(shape, device, dtype), dora, checkpointing).train()
    built = torch.cuda.max_memory_allocated() if on_gpu else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(SHAPES[shape]["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    loss_of, seconds, found = losses(who, model), [], []
    for step in range(WARM_UP + steps):
        if step == WARM_UP and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        wait()
        started = time.perf_counter()
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        seconds.append(time.perf_counter() - started)
        found.append(loss.item())
    return {
        "median_seconds": statistics.median(seconds[WARM_UP:]),
        "tokens_per_second": tokens / statistics.median(seconds[WARM_UP:]),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_bytes_of_building": built,
        "trained": sum(parameter.numel() for parameter in trained),
        "first_loss": found[0],
        "last_loss": found[-1],
        "seconds": seconds[WARM_UP:],
    }


def in_a_process(spec: dict[str, Any]) -> dict[str, Any]:
    """`measure(**spec)` in a process of its own; where it fails, the last line of what it said."""
    if spec["who"] == "unsloth" and importlib.util.find_spec("unsloth") is None:
        return {"error": "unsloth is not installed"}
    command = [sys.executable, "-m", "benchmarks.gpu.llama8b", "--one", json.dumps(spec)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


# --------------------------------------------------------------------------------------------------------------- results


def show(rows: list[dict[str, Any]], title: str) -> None:
    cells = []
    for row in rows:
        name = [row["who"], "QDoRA" if row["dora"] else "QLoRA", "yes" if row["checkpointing"] else "no"]
        if "error" in row:
            cells.append([*name, row["error"][:60], "", ""])
        else:
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
            cells.append([*name, f"{row['median_seconds']:.3f}", f"{row['tokens_per_second']:.0f}", peak])
    Console(width=140).print(table(title, ["who", "method", "checkpointing", "seconds a step", "tokens/s", "peak GiB"], cells))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--who", default=";".join(WHO), help="with ';' between them")
    parser.add_argument("--methods", default="qlora,qdora")
    parser.add_argument("--checkpointing", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_llama8b.json on a GPU, none elsewhere")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        print(json.dumps(measure(**json.loads(args.one))))
        return
    output = args.output or (RESULTS / "gpu_llama8b.json" if args.device == "cuda" else None)
    check(args.device, output)
    rows = []
    for method in args.methods.split(","):
        for checkpointing in {"no": [False], "yes": [True], "both": [False, True]}[args.checkpointing]:
            for who in args.who.split(";"):
                variant = {"who": who, "dora": {"qlora": False, "qdora": True}[method], "checkpointing": checkpointing}
                print(f"{method}, {'with' if checkpointing else 'without'} checkpointing, {who}", file=sys.stderr, flush=True)
                spec = variant | {"shape": args.shape, "device": args.device, "tokens": args.tokens, "steps": args.steps}
                rows.append(variant | in_a_process(spec))
    show(rows, f"{args.shape}, NF4, r = {RANK}, {args.tokens} tokens, {args.steps} steps on {args.device}")
    if output:
        content = {"shape": args.shape, "config": SHAPES[args.shape], "quantization": "nf4, doubly quantised", "r": RANK, "tokens": args.tokens, "batch": 1}
        write(output, args.device, content | {"rows": rows})


if __name__ == "__main__":
    main()
