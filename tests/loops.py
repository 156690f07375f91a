"""The training loop on a tiny random model, for the tests of what happens in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from conftest import tiny_llama

import peftkit as pk
from peftkit.data import Example, collate
from peftkit.loss import TokenLoss
from peftkit.methods import attachment
from peftkit.optim import build_optimizer
from peftkit.train import TrainConfig, train
from peftkit.tripwires import Tripwires


def examples(count: int, supervised: bool = True) -> list[list[Example]]:
    """Rows of 5 to 11 tokens below 90, of which unequal numbers are supervised."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        length = 5 + i % 7
        ids = torch.randint(3, 90, (length,), generator=generator).tolist()
        trained = [supervised and j >= 2 + i % 3 for j in range(length)]
        rows.append([Example(input_ids=ids, trained=trained, where=f"rows.jsonl:{i + 1}", prompt_ids=[], answer="")])
    return rows


def inputs(part) -> dict[str, Any]:
    return {key: value for key, value in collate(part, 0).items() if key != "document_lengths"}


class Loop:
    """A model with adapters, ready to train: `run` trains it and gives what a loop of another seed or folder would."""

    def __init__(self, *methods, rows=None, model=None, **options):
        self.model = model or tiny_llama()
        torch.manual_seed(0)
        pk.attach(self.model, list(methods) or pk.LoRA(r=4))
        self.handles = attachment(self.model).handles
        self.rows = rows or examples(20)
        self.config = TrainConfig(**({"learning_rate": 1e-2, "max_steps": 3, "batch_size": 4} | options))
        self.loss, self.optimizer = TokenLoss(self.model), build_optimizer(self.model, self.config.learning_rate, optimizer=self.config.optimizer)
        self.losses: list[float] = []
        self.warnings: list[str] = []
        self.evaluations: list[tuple[int, float]] = []

    def run(self, folder: Path, resume: bool = False, evaluate=None, on_step=lambda step: None):
        def stepped(step: int, metrics: dict[str, float]) -> None:
            self.losses.append(metrics["loss"])
            on_step(step)

        return train(
            self.loss, self.model, self.optimizer, self.rows, inputs, lambda row: len(row[0].input_ids), lambda row: sum(row[0].trained[1:]),
            self.config, Accelerator(cpu=True), folder, self.handles, stepped, resume,
            where=lambda row: [example.where for example in row], evaluate=evaluate,
            on_evaluation=lambda step, loss: self.evaluations.append((step, loss)),
            tripwires=Tripwires(self.model, self.handles, self.config.warn_only, self.warnings.append),
        )  # fmt: skip

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss of the rows, in eval mode."""
        self.model.eval()
        total, tokens = self.loss(**inputs(self.rows))
        self.model.train()
        return float(total / tokens)

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters() if parameter.requires_grad}
