"""What only a GPU shows: skipped without one."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama, wake

import peftkit as pk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("method", [pk.LoRA(r=4, dropout=0.1), pk.DoRA(r=4, dropout=0.1)], ids=["lora", "dora"])
def test_gradients_equal_those_of_the_cpu(method):
    """Without dropout in play (eval mode) both devices compute the same."""
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    grads = []
    for device in ("cpu", "cuda"):
        model = tiny_llama()
        torch.manual_seed(0)
        pk.attach(model, method)
        wake(model)
        model = model.to(device).eval()
        model(input_ids=ids.to(device)).logits.square().sum().backward()
        grads.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item(), msg=name)


def test_qlora_trains_with_the_paged_optimizer(tmp_path):
    pytest.importorskip("bitsandbytes")
    result = pk.run({
        "model": {"name": "builtin:tiny"},
        "methods": [{"qlora": {"r": 8}}, {"loraplus": {"ratio": 4.0}}, {"neftune": {"alpha": 1.0}}],
        "data": {"train": "builtin:tool-calls/train", "eval": "builtin:tool-calls/test", "eval_rows": 20, "train_rows": 200},
        "train": {"learning_rate": 5.0e-3, "max_steps": 30},
        "eval": {"metrics": ["loss", "exact_match"]},
        "output_dir": str(tmp_path / "run"),
    })  # fmt: skip
    assert result.after["loss"] < result.before["loss"] / 2
    assert result.machine["gpu"] and 0 < result.train["peak_memory_bytes"] < 8 * 2**30
