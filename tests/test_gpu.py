"""What only a GPU shows: skipped without one."""

from __future__ import annotations

import json
import shutil

import kernel_checks as checks
import pytest
import torch
from conftest import tiny_llama, wake

import peftkit as pk
from peftkit import quant
from peftkit.kernels import base, dora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------------------- layers


def adapted(method, device: str, **options) -> torch.nn.Module:
    """The same model and the same awake adapters on either device."""
    model = tiny_llama(**options)
    torch.manual_seed(0)
    pk.attach(model, method)
    wake(model)
    return model.to(device)


def close(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=1e-3, atol=1e-3 * max(want.abs().max().item(), 1e-6), msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", [pk.LoRA(r=4, dropout=0.1), pk.DoRA(r=4, dropout=0.1)], ids=["lora", "dora"])
def test_gradients_equal_those_of_the_cpu(method, training):
    """Dropout off, by eval mode or by the method's own field: both devices compute the same."""
    method = method.model_copy(update={"dropout": 0.0}) if training else method
    grads = []
    for device in ("cpu", DEVICE):
        model = adapted(method, device).train(training)
        model(input_ids=IDS.to(device)).logits.square().sum().backward()
        grads.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        close(grads[1][name], grad, name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # the one name that all 5.x have
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("method", [pk.LoRA(r=4), pk.DoRA(r=4)], ids=["lora", "dora"])
def test_training_follows_the_cpu(method, checkpointing):
    """Five steps of fused AdamW, which writes without a trace, with two micro-batches each: DoRA's norm is never stale."""
    losses = []
    for device in ("cpu", DEVICE):
        model = adapted(method, device).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        losses.append([])
        for _ in range(5):
            for part in IDS.to(device).split(1):
                loss = model(input_ids=part, labels=part, use_cache=False).loss
                loss.backward()
                losses[-1].append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [pk.LoRA(r=4), pk.DoRA(r=4)], ids=["lora", "dora"])
def test_the_merged_model_computes_the_same(method, dtype):
    model = adapted(method, DEVICE).eval()
    model = model.to(dtype) if dtype != torch.float32 else model
    with torch.no_grad():
        before = model(input_ids=IDS.to(DEVICE)).logits.float()
        pk.merge(model)
        after = model(input_ids=IDS.to(DEVICE)).logits.float()
    bound = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert (after - before).abs().max() <= bound * before.abs().max()


@pytest.mark.parametrize("method", [pk.LoRA(r=4), pk.DoRA(r=4)], ids=["lora", "dora"])
def test_4bit_bases_train_and_merge(method, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(intermediate_size=128).save_pretrained(tmp_path)  # widths of whole blocks: for others bitsandbytes warns
    model, _ = pk.load(str(tmp_path), quantize="nf4")
    model = model.to(DEVICE)
    pk.attach(model, method)
    ids = IDS.to(DEVICE)
    optimizer = pk.build_optimizer(model, learning_rate=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits.float()
        pk.merge(model)
        after = model(input_ids=ids).logits.float()
    assert (after - before).abs().max() <= 0.1 * before.abs().max()


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


def test_a_stopped_run_with_the_paged_optimizer_goes_on(tmp_path, monkeypatch):
    """The traps: states read back lie on the GPU for good; dropout's and the noise's generators of the GPU are forgotten."""
    pytest.importorskip("bitsandbytes")
    made = {
        "model": {"name": "builtin:tiny"},
        "methods": [{"qlora": {"r": 640, "alpha": 160, "dropout": 0.1}}, {"loraplus": {"ratio": 4.0}}, {"neftune": {"alpha": 1.0}}],
        "data": {"train": "builtin:tool-calls/train", "eval": "builtin:tool-calls/test", "eval_rows": 8, "train_rows": 64},
        "train": {"learning_rate": 2.0e-3, "max_steps": 10, "batch_size": 8, "log_every": 1, "save_every": 5, "keep_last": 3},
        "eval": {"metrics": ["loss"]},
        "output_dir": str(tmp_path / "run"),
    }
    pk.run(made)
    whole = losses(tmp_path / "run")
    newest = max((tmp_path / "run/checkpoints").iterdir(), key=lambda folder: int(folder.name.rsplit("-", 1)[1]))
    for gone in (newest, tmp_path / "run/adapter"):
        shutil.rmtree(gone)
    (tmp_path / "run/result.json").unlink()
    states = []
    real = quant.page_again

    def watched(optimizer):
        real(optimizer)
        states.extend(state["state1"] for state in optimizer.state.values())

    monkeypatch.setattr(quant, "page_again", watched)
    pk.run(made, resume=True)
    large = [state for state in states if state.numel() >= 100_000]  # bitsandbytes pages from this size on
    assert large and all(state.is_paged for state in large)
    again = losses(tmp_path / "run")
    assert len(again) == len(whole) == 10
    assert again[:5] == whole[:5] and again == pytest.approx(whole, rel=2e-3)


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in json.loads(line)]


# -------------------------------------------------------------------------------------------------------- Triton kernels

SHAPES = [(1, 1, 1, 1), (300, 257, 190, 5), (1000, 1024, 768, 16), (33, 96, 2100, 64)]  # tokens, out, in, r
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def layer(request):
    (tokens, outputs, inputs, r), dtype = request.param
    layer = checks.Layer(DEVICE, dtype, tokens, outputs, inputs, r, tokens % 2 == 0, 0)
    assert dora.triton_serves(layer.y, r), "this GPU or this installation has no use for the Triton kernels"
    return layer


every_layer = pytest.mark.parametrize("layer", [(shape, dtype) for shape in SHAPES for dtype in DTYPES], indirect=True, ids=str)


@every_layer
def test_dora_kernels(layer):
    checks.check_compose(layer, dora)
    checks.check_compose_backward(layer, dora)
    checks.check_norm(layer, dora)
    checks.check_memory(layer, dora)
    checks.check_nan(layer, dora)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 4097, 3_000_000])
def test_dropout(dtype, size):
    checks.check_dropout(DEVICE, dtype, size)


def test_the_kernels_beside_plain_torch(monkeypatch):
    layer = checks.Layer(DEVICE, torch.bfloat16, 128, 256, 192, 16, True, 0)

    def composed():
        return dora.compose_(layer.y.clone(), layer.h, layer.b, 1.5, layer.magnitude, layer.norm, layer.bias)

    fused = composed()
    monkeypatch.setattr(base, "ENABLED", False)
    assert not dora.triton_serves(layer.y, 16)
    plain = composed()
    assert (fused - plain).norm() <= 1e-2 * plain.norm()  # one rounds once, the other three times


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_kernels_run_where_their_tensors_are():
    layer = checks.Layer("cuda:1", torch.float32, 33, 40, 50, 4, True, 0)
    checks.check_compose(layer, dora)
    checks.check_norm(layer, dora)
