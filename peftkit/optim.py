"""Optimizer and schedule: parameter groups by role, honoured by every method."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from peftkit import quant
from peftkit.methods import Group, find_attachment, parameter_groups

Schedule = Callable[[int], float]


def optimizer_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[Group]:
    """One group per adapter and role of what trains, as the attached methods want them; every group has the weight decay."""
    groups: list[Group] = []
    taken: set[int] = set()
    # A model that holds an adapted one (the language model of a vision model, say) is asked after it, for the rest.
    for holder in [*(each for each in model.modules() if each is not model and find_attachment(each) is not None), model]:
        for group in parameter_groups(holder, find_attachment(holder), learning_rate, weight_decay):
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
            taken.update(map(id, group["params"]))
            groups += [group] if group["params"] else []
    if not groups:
        raise ValueError("nothing trains in this model; call peftkit.attach first, or unfreeze what is to train")
    return groups


def build_optimizer(
    model: nn.Module, learning_rate: float = 2e-4, weight_decay: float = 0.0, optimizer: str = "auto", betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """AdamW over all that trains, with the learning rates that the attached methods ask for (LoRA+).

    optimizer: "adamw"; "adamw_8bit" (bitsandbytes); "paged_adamw_8bit" (bitsandbytes, GPU only); "auto" takes the paged one where a method prefers
    it and the model is on a GPU. Raises ValueError where nothing trains.
    """
    groups = optimizer_groups(model, learning_rate, weight_decay)
    methods = [method for each in model.modules() if (record := find_attachment(each)) is not None for method in record.methods]
    on_gpu = groups[0]["params"][0].is_cuda
    if optimizer == "auto":
        optimizer = "paged_adamw_8bit" if on_gpu and any(method.paged_optimizer for method in methods) else "adamw"
    if optimizer == "paged_adamw_8bit":
        if not on_gpu:
            raise ValueError("paged_adamw_8bit needs the model on a GPU; use adamw here")
        return quant.paged_adamw_8bit(groups, betas=betas)
    if optimizer == "adamw_8bit":
        return quant.adamw_8bit(groups, betas=betas)
    if optimizer != "adamw":
        raise ValueError(f"unknown optimizer {optimizer!r} (there are: auto, adamw, adamw_8bit, paged_adamw_8bit)")
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def schedule(kind: str, steps: int, warmup_ratio: float) -> Schedule:
    """Learning-rate factor by step: linear warm-up over the first share of the steps, then constant, linear or cosine to 0."""
    warmup = math.ceil(warmup_ratio * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(steps - warmup, 1)
        if kind == "constant":
            return 1.0
        if kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return max(0.0, 1 - progress)

    return factor
