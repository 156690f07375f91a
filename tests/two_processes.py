"""Trains one step of a tiny model on unequal rows and writes its gradients: run by test_devices.py, in one process or in two."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import tiny_llama
from loops import examples, inputs

import peftkit as pk
from peftkit.loss import TokenLoss
from peftkit.optim import build_optimizer
from peftkit.train import TrainConfig, train

if __name__ == "__main__":
    folder, micro = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    torch.manual_seed(0)
    pk.attach(model, [pk.DoRA(r=4), pk.LoRAPlus(ratio=4)])
    optimizer = build_optimizer(model, 1e-2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: list[dict[str, torch.Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append({names[id(p)]: p.grad.clone() for group in optimizer.param_groups for p in group["params"]})
    )
    losses: list[float] = []
    config = TrainConfig(learning_rate=1e-2, max_steps=3, batch_size=8, micro_batch_size=micro, max_grad_norm=1e9)
    train(
        TokenLoss(model), model, optimizer, examples(20), inputs, lambda row: len(row[0].input_ids), lambda row: sum(row[0].trained[1:]),
        config, accelerator, folder, {}, lambda step, metrics: losses.append(metrics["loss"]),
    )  # fmt: skip
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    result = {"gradients": seen, "losses": losses, "parameters": parameters, "processes": accelerator.num_processes}
    torch.save(result, folder / f"rank-{accelerator.process_index}.pt")
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()
