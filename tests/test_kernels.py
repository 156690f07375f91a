"""What the fused layers must work under: shared inputs, norms that are kept, transforms, checkpointing, several processes."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from conftest import tiny_llama, wake, zeroed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import peftkit as pk
from peftkit.kernels import Gain, dora_gain, fingerprint
from peftkit.kernels.dora import column_gain, scale_columns
from peftkit.layers import LoRALinear, SharedInput, adapter_layers, dense_weight, is_linear, row_squares, trainable_parameters
from peftkit.layers.linear import _Last

METHODS = {"lora": pk.LoRA, "dora": pk.DoRA}


class Attention(nn.Module):
    """Three linears on one input, one after them, and one on another input."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x) + self.v_proj(x)))


def adapted(method: str = "lora", dtype: torch.dtype = torch.float64, shared: bool = True, **options) -> Attention:
    torch.manual_seed(0)
    model = Attention().to(dtype)
    pk.attach(model, METHODS[method](**{"r": 3, "alpha": 6} | options))
    wake(model)
    if not shared:
        for layer in adapter_layers(model).values():
            layer.shared = None
    return model.train()


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, y: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), [*inputs, *(p for _, _, p in trainable_parameters(model))]))


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------------- shared inputs


def products(model: nn.Module, x: Tensor) -> int:
    """How many nodes for a shared product stand in the graph."""
    seen, stack = set(), [model(x).grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return sum("SharedDown" in type(node).__name__ for node in seen)


@pytest.mark.parametrize("method", METHODS)
def test_one_product_for_layers_that_share_an_input_changes_nothing(method):
    together, apart = adapted(method), adapted(method, shared=False)
    x = tokens(2, 5, 16).requires_grad_()
    assert products(together, x) == 1 and products(apart, x) == 0
    assert_close([together(x), *gradients(together, together(x), x)], [apart(x), *gradients(apart, apart(x), x)])


def test_the_shared_input_keeps_nothing_after_its_layers_ran():
    model = adapted()
    x = tokens(3, 16).requires_grad_()
    model(x)
    shared = model.q_proj.shared
    assert isinstance(shared, SharedInput) and shared is model.k_proj.shared and _Last.here().taken is None
    assert model.o_proj.shared is None


@pytest.mark.parametrize("method", METHODS)
def test_threads_that_train_at_once_share_nothing(method):
    def losses(model: nn.Module, found: list[float]) -> None:
        x, optimizer = tokens(2, 5, 16), torch.optim.SGD([p for _, _, p in trainable_parameters(model)], lr=0.1)
        for _ in range(20):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            found.append(loss.item())

    models = [adapted(method) for _ in range(5)]
    alone: list[float] = []
    losses(models.pop(), alone)
    results: list[list[float]] = [[] for _ in models]
    threads = [threading.Thread(target=losses, args=pair) for pair in zip(models, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found == alone for found in results)


def test_a_shared_product_is_never_taken_for_another_input_or_other_factors():
    """The same tensor object with new content, new factors under the same input, after a backward, and out of order."""
    model, alone = adapted(), adapted(shared=False)
    x = tokens(3, 16)
    model.q_proj(x), alone.q_proj(x)
    x.mul_(2)  # in place: the same object
    torch.testing.assert_close(model.k_proj(x), alone.k_proj(x))
    for one in (model, alone):
        one.q_proj(x)
        with torch.no_grad():
            one.v_proj.a().mul_(3)
    torch.testing.assert_close(model.v_proj(x), alone.v_proj(x))
    for one in (model, alone):
        one.q_proj(x).sum().backward()
        one.v_proj.a().data.mul_(0.5)  # as an optimizer that leaves no trace
    torch.testing.assert_close(model.v_proj(x), alone.v_proj(x))
    for one in (model, alone):
        one.q_proj(x)
    torch.testing.assert_close(model.q_proj(x), alone.q_proj(x))


def test_layers_that_differ_do_not_share_what_differs():
    """One off, one in eval, one of another dropout: each computes what it computes alone."""
    model, alone = adapted(), adapted(shared=False)
    for one in (model, alone):
        one.k_proj.enable_adapters(False)
        one.v_proj.eval()
    x = tokens(3, 16).requires_grad_()
    assert_close([model(x), x], [alone(x), x])


def test_shared_masks_drop_the_same_elements_for_every_layer():
    model = adapted(dropout=0.5)
    x = torch.ones(400, 16, dtype=torch.float64)
    with torch.no_grad():
        for layer in (model.q_proj, model.k_proj):
            layer.base_layer.weight.zero_(), layer.base_layer.bias.zero_()
            layer.a().copy_(torch.ones(3, 16)), layer.b().copy_(torch.ones(16, 3))
    assert torch.equal(model.q_proj(x), model.k_proj(x))
    assert len(model.q_proj(x).unique()) > 5, "and not the same for every row"


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_of_their_own(how, tmp_path):
    model = adapted()
    x = tokens(3, 16)
    model.q_proj(x)  # leaves a product for k and v
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    assert copied.q_proj.shared is copied.k_proj.shared is not model.q_proj.shared
    assert copied.q_proj.shared.layers[0] is copied.q_proj
    torch.testing.assert_close(copied(x), model(x))
    with torch.no_grad():
        copied.q_proj.a().mul_(2)
    assert not torch.allclose(copied(x), model(x))


# -------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 0.95])
def test_dropout_has_its_rate_and_the_places_are_independent(p):
    n = 1_000_000
    dropped = zeroed(torch.ones(n), p, seed=3) == 0
    error = (p * (1 - p) / n) ** 0.5
    assert abs(dropped.double().mean().item() - p) <= 5 * error
    both = (dropped[1:] & dropped[:-1]).double().mean().item()
    assert abs(both - p * p) <= 5 * (p * p / n) ** 0.5 + 1e-9, "neighbours"
    halves = dropped.view(2, -1).double().mean(1)
    assert (halves - p).abs().max() <= 8 * error, "beginning and end"
    assert torch.equal(zeroed(torch.ones(n), p, seed=3) == 0, dropped) and not torch.equal(zeroed(torch.ones(n), p, seed=4) == 0, dropped)


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_dropout_of_next_to_nothing(size):
    rates = [zeroed(torch.ones(size), 0.5, seed).sum().item() for seed in range(400)]
    assert abs(sum(rates) / 400 - size / 2) <= 0.25 * size


# --------------------------------------------------------------------------------------------------- the norm that stays


def norm_is_right(layer: LoRALinear) -> bool:
    """Whether the layer's forward is that of the weight it would merge into."""
    x = tokens(7, 16, dtype=layer.base_layer.weight.dtype)
    with torch.no_grad():
        return torch.allclose(layer(x), nn.functional.linear(x, layer.merged_weight(), layer.bias), rtol=1e-5, atol=1e-6)


def step_with(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad()
    model(tokens(6, 16, dtype=torch.float32)).square().sum().backward()
    optimizer.step()


def _bitsandbytes(name: str):
    def make(parameters):
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(parameters, lr=0.05)

    return make


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True),
    "foreach sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, foreach=True),
    "bitsandbytes 8-bit": _bitsandbytes("AdamW8bit"),
    "bitsandbytes paged 8-bit": _bitsandbytes("PagedAdamW8bit"),
    "bitsandbytes 32-bit": _bitsandbytes("AdamW32bit"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_norm_follows_every_optimizer(name, training):
    model = adapted("dora", torch.float32).train(training)
    if "bitsandbytes" in name and not torch.cuda.is_available() and name != "bitsandbytes 32-bit":
        pytest.skip("bitsandbytes' 8-bit optimizers need a GPU")
    try:
        optimizer = OPTIMIZERS[name]([p for _, _, p in trainable_parameters(model)])
        step_with(optimizer, model)
    except (RuntimeError, NotImplementedError) as error:
        if "bitsandbytes" not in name:
            raise
        pytest.skip(f"bitsandbytes has no such optimizer on this device: {error}")
    before = model.q_proj.norm(dense_weight(model.q_proj.base_layer)).clone()
    step_with(optimizer, model)
    assert norm_is_right(model.q_proj) and norm_is_right(model.o_proj)
    assert not torch.equal(model.q_proj.norm(dense_weight(model.q_proj.base_layer)), before)


def by_data(layer):
    layer.b().data.mul_(2)


def by_storage(layer):
    layer.a().untyped_storage().copy_((layer.a().detach() * 2).untyped_storage())


def by_the_magnitude(layer):
    layer.magnitude().data.mul_(2)


def by_numpy(layer):
    layer.b().detach().numpy()[0, 0] += 3


def by_swapped_rows(layer):
    layer.a().data.copy_(layer.a().data.flip(0).clone())


def by_another_tensor(layer):
    layer.b().data = layer.b().data * 2


def by_state_dict(layer):
    layer.load_state_dict({name: tensor * 2 if "lora_B" in name else tensor for name, tensor in layer.state_dict().items()})


def by_one_bit(layer):
    layer.b().data.view(torch.int32)[0, 0] ^= 1 << 22


def by_the_base(layer):
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)


def by_a_new_base(layer):
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach() * 2, requires_grad=False)


WRITES = (by_data, by_storage, by_the_magnitude, by_numpy, by_swapped_rows, by_another_tensor, by_state_dict, by_one_bit, by_the_base, by_a_new_base)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_the_norm_follows_every_way_to_write(write, training):
    layer = adapted("dora", torch.float32).train(training).q_proj
    assert norm_is_right(layer)
    before = layer(tokens(3, 16, dtype=torch.float32))
    write(layer)
    assert norm_is_right(layer)
    assert not torch.equal(layer(tokens(3, 16, dtype=torch.float32)), before)


def test_the_norm_stays_while_nothing_changes(monkeypatch):
    """Accumulation, recomputation and evaluation take it once between two steps."""
    import peftkit.layers.linear as linear

    calls = []
    monkeypatch.setattr(linear, "dora_gain", lambda *args: calls.append(1) or dora_gain(*args))
    model = adapted("dora", torch.float32)
    x = tokens(3, 16, dtype=torch.float32).requires_grad_()
    optimizer = torch.optim.AdamW([p for _, _, p in trainable_parameters(model)], lr=0.01, fused=True)
    for _ in range(3):
        checkpoint(model, x, use_reentrant=False).sum().backward()
    model.eval()(x)
    assert len(calls) == 4, "once for each of the four layers"
    optimizer.step()
    model(x), model(x)
    assert len(calls) == 8


def test_evaluation_keeps_m_and_its_quotient_by_n_and_nothing_else():
    model = adapted("dora", torch.float32).eval()
    model(tokens(3, 16, dtype=torch.float32))
    for layer in adapter_layers(model).values():
        held = [value for value in vars(layer).values() if isinstance(value, tuple) and len(value) == 3]
        assert [tuple(gain.factor.shape) for _, gain, _ in held] == [(16,)] and layer.magnitude().shape == (16,)
        assert isinstance(held[0][1], Gain) and held[0][2].data_ptr() == layer.base_layer.weight.data_ptr()  # the frozen weight itself, no copy


@pytest.mark.parametrize("method", METHODS)
def test_a_few_tokens_of_half_precision_are_as_exact_as_many(method):
    """In evaluation they are multiplied with A and B as they are, which need not be cast then."""
    model = adapted(method, torch.bfloat16).eval()
    layer, x = model.q_proj, tokens(64, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = x.double() @ copy.deepcopy(layer).double().merged_weight().T
        few, many = torch.cat([layer(part) for part in x.split(4)]).double(), layer(x).double()
    assert not torch.equal(few, many)
    assert (few - exact).norm() <= (many - exact).norm()


def test_moving_a_model_to_bf16_does_not_round_the_norm():
    """`model.to(dtype)` reaches parameters and buffers; the row norms of W are neither."""
    model = adapted("dora", torch.float32).to(torch.bfloat16)
    layer = model.q_proj
    assert not list(layer.buffers()) and layer.squares().dtype == torch.float32
    exact = (dense_weight(layer.base_layer).double() + layer.delta().double()).norm(dim=1)
    torch.testing.assert_close(layer.norm(dense_weight(layer.base_layer)).double(), exact, rtol=2e-3, atol=0)


def test_fingerprints_tell_every_element_and_every_order():
    x = tokens(5, 7, dtype=torch.float32)
    seen = {fingerprint(x)}
    for i in range(x.numel()):
        changed = x.clone()
        changed.view(-1)[i] += 1e-6 * changed.view(-1)[i].abs() + 1e-30
        seen.add(fingerprint(changed))
    seen |= {fingerprint(x.flip(0)), fingerprint(x.flip(1)), fingerprint(x[[1, 0, 2, 3, 4]]), fingerprint(-x)}
    assert len(seen) == 1 + x.numel() + 4 and fingerprint(x.clone()) == fingerprint(x)
    assert fingerprint(torch.zeros(0)) == fingerprint(torch.zeros(0))


@pytest.mark.parametrize("spread", [0.01, 0.1, 3.0])
def test_scaling_bf16_columns_is_as_exact_as_fp32(spread):
    """In one pass where g is near 1 and in mixed precision elsewhere; a bf16 g would be far off."""
    y = tokens(64, 32, dtype=torch.float32).bfloat16()
    gain = 1 + spread * (2 * torch.rand(32, generator=torch.Generator().manual_seed(2)) - 1)
    exact = y.double() * gain.double()
    columns = column_gain(gain, torch.ones(32), y.dtype)
    error = ((scale_columns(y, columns).double() - exact).abs() / exact.abs()).max()
    assert error <= 2**-8 * 1.05  # half a unit in the last place of bf16 is 2^-9 of the value at worst twice
    assert torch.equal(scale_columns(y.clone(), columns, out=(z := y.clone())), z) and z.dtype == torch.bfloat16
    assert columns.excess == (spread <= 0.1)


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("method", METHODS)
def test_functional_call_and_its_gradient(method):
    model = adapted(method)
    x = tokens(4, 16)
    names = {name: p.detach().clone() * 1.5 for name, _, p in trainable_parameters(model)}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in names.items():
            other.get_parameter(name).copy_(tensor)
    wanted = torch.autograd.grad(other(x).square().sum(), [p for _, _, p in trainable_parameters(other)])
    plain = {name: tensor.clone().requires_grad_() for name, tensor in names.items()}
    assert_close(list(torch.autograd.grad(loss(plain), list(plain.values()))), list(wanted))
    assert_close(list(torch.func.grad(loss)(names).values()), list(wanted), 1e-9)
    per_sample = torch.func.vmap(lambda row: torch.func.functional_call(model, names, (row,)))(x.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(per_sample, other(x))


@pytest.mark.parametrize("method", METHODS)
def test_a_base_weight_given_by_functional_call_is_the_one_of_backward(method):
    model = adapted(method)
    base = {f"{name}.base_layer.weight": dense_weight(layer.base_layer) * 2 for name, layer in adapter_layers(model).items()}
    x = tokens(4, 16).requires_grad_()
    y = torch.func.functional_call(model, base, (x,))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in base.items():
            other.get_parameter(name).copy_(tensor)
    assert_close(gradients(model, y, x), gradients(other, other(x), x))


@pytest.mark.parametrize("method", METHODS)
def test_a_base_weight_that_trains_gets_its_gradient(method):
    model = adapted(method)
    weight = model.q_proj.base_layer.weight.requires_grad_()
    x = tokens(4, 16)
    model(x).square().sum().backward()
    delta = 1e-6 * tokens(16, 16, seed=9)

    def value() -> float:
        return model(x).square().sum().item()

    if method == "lora":  # DoRA's norm is a constant for the gradient, so differences do not show it
        with torch.no_grad():
            weight.add_(delta)
            above = value()
            weight.sub_(2 * delta)
            below = value()
        assert abs((above - below) / 2 - (weight.grad * delta).sum().item()) <= 1e-4 * abs(above - below)
    assert weight.grad.any()


def test_second_derivatives_are_refused_rather_than_wrong():
    model = adapted()
    x = tokens(4, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
@pytest.mark.parametrize("method", METHODS)
def test_torch_compile_gives_the_same(method):
    """Traced whole by the compiler's front; the code it would generate needs a C++ compiler, which a test must not."""
    model = adapted(method, torch.float32)
    x = tokens(4, 16, dtype=torch.float32).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(gradients(model, compiled(x), x), gradients(model, model(x), x), 1e-4)
    optimizer = torch.optim.SGD([p for _, _, p in trainable_parameters(model)], lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_with_shared_inputs_and_dropout(method, reentrant):
    found = []
    for recompute in (False, True):
        model = adapted(method, dropout=0.3)
        x = tokens(6, 16).requires_grad_()
        torch.manual_seed(2)
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for _, _, p in trainable_parameters(model))])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_fp16_and_bf16_stay_near_fp32(method):
    for dtype, tolerance in ((torch.float16, 3e-3), (torch.bfloat16, 3e-2)):
        model = adapted(method, torch.float32)
        x = tokens(6, 16, dtype=torch.float32)
        wanted, exact = model(x), gradients(model, model(x))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        y = model(x.to(dtype))
        assert y.dtype == dtype and (y.float() - wanted).norm() <= tolerance * wanted.norm()
        for mine, other in zip(gradients(model, y.float()), exact, strict=True):
            assert mine.dtype == torch.float32 and (mine - other).norm() <= 3 * tolerance * other.norm()


def test_a_batch_of_four_is_four_of_one(ids):
    model = tiny_llama()
    pk.attach(model, pk.DoRA(r=4))
    wake(model)
    model.train()
    rows = torch.cat([ids, ids[:1]])
    whole = torch.autograd.grad(model(input_ids=rows).logits.square().sum(), [p for _, _, p in trainable_parameters(model)])
    parts = [torch.autograd.grad(model(input_ids=row[None]).logits.square().sum(), [p for _, _, p in trainable_parameters(model)]) for row in rows]
    for together, *apart in zip(whole, *parts, strict=True):
        summed = torch.stack(apart).sum(0)
        assert (together - summed).norm() <= 1e-5 * summed.norm()


DDP = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from test_kernels import adapted, tokens
from peftkit.layers import trainable_parameters
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/rendezvous", rank=rank, world_size=2)
x = tokens(8, 16)
for method in ("lora", "dora"):
    model = adapted(method)
    wrapped = DistributedDataParallel(model)  # must outlive backward
    wrapped(x[rank * 4 : rank * 4 + 4]).square().sum().backward()
    if rank == 0:
        torch.save([p.grad * 2 for _, _, p in trainable_parameters(model)], f"{sys.argv[2]}/{method}.pt")
    dist.barrier()  # none leaves while the other still speaks to it
    del wrapped
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_one(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), os.path.dirname(__file__), str(tmp_path), str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    for method in METHODS:
        model = adapted(method)
        assert_close(torch.load(tmp_path / f"{method}.pt"), gradients(model, model(tokens(8, 16))))


def test_what_shares_an_input_in_a_real_model(ids):
    model = tiny_llama()
    pk.attach(model, pk.LoRA(r=2))
    groups = {id(layer.shared): layer.shared for layer in adapter_layers(model).values() if layer.shared is not None}
    assert sorted(len(shared.layers) for shared in groups.values()) == [2, 2, 3, 3] and all(isinstance(shared, SharedInput) for shared in groups.values())


def test_row_squares_are_taken_in_fp64():
    weight = tokens(3, 1000, dtype=torch.float32)
    assert torch.equal(row_squares(weight), weight.double().square().sum(1))


# ---------------------------------------------------------------------------------------------------------------- traps


def test_a_product_taken_without_gradients_is_not_taken_for_one_with():
    for mode in (torch.no_grad, torch.inference_mode):
        model = adapted()
        x = tokens(3, 16)
        with mode():
            model.q_proj(x)
        model.k_proj(x).sum().backward()
        assert model.k_proj.b().grad.any() and model.k_proj.a().grad.any()


def test_a_product_of_one_adapter_is_not_taken_for_another():
    model = adapted()
    for layer in adapter_layers(model).values():
        layer.add("other", layer.specs["default"])
        with torch.no_grad():
            for name in ("default", "other"):  # as many writes into the one as into the other
                layer.a(name).copy_(torch.randn_like(layer.a(name)))
            layer.a("other").add_(0)
            layer.b("other").normal_()
    x = tokens(3, 16)
    for chosen in ("other", ["default", "other"]):
        model.q_proj(x)
        for layer in adapter_layers(model).values():
            layer.set_adapter(chosen)
        ours = model.k_proj(x)
        torch.testing.assert_close(ours, nn.functional.linear(x, model.k_proj.merged_weight(), model.k_proj.bias))
        with torch.no_grad():
            model.v_proj.a("other").mul_(2)
        torch.testing.assert_close(model.v_proj(x), nn.functional.linear(x, model.v_proj.merged_weight(), model.v_proj.bias))


def test_a_forward_that_broke_off_keeps_its_graph_only_until_the_next():
    """Memory that an out-of-memory error between q and v left behind must not wait for the same layer to be reached again."""
    model, other = adapted(), adapted()
    left = tokens(3, 16).requires_grad_() * 2
    alive = weakref.ref(left)
    model.q_proj(left)
    del left
    other(tokens(3, 16))
    gc.collect()
    assert alive() is None


class Cross(nn.Module):
    """As in BLIP, whose text decoder sees images of another width."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(24, 16), nn.Linear(24, 16)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.query(x) + self.key(seen) + self.value(seen)


def test_layers_of_different_widths_do_not_share():
    model = Cross().double()
    pk.attach(model, pk.LoRA(r=2))
    x, seen = tokens(3, 16), tokens(3, 24)
    model.train()(x, seen).sum().backward()
    assert model.query.shared is None and model.key.shared is model.value.shared is not None


@pytest.mark.parametrize("method", METHODS)
def test_hooks_on_the_base_see_what_the_base_gives(method):
    model = adapted(method)
    base, x = model.o_proj.base_layer, tokens(2, 3, 16).requires_grad_()
    plain = model.o_proj(x).detach()
    steer = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    seen, backwards = [], []
    hooks = [
        base.register_forward_hook(lambda _, inputs, output: seen.append(output)),
        base.register_full_backward_hook(lambda *_: backwards.append(1)),
        base.register_forward_hook(lambda _, inputs, output: output + steer),
    ]
    y = model.o_proj(x)
    y.sum().backward()
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(seen[0], nn.functional.linear(x, base.weight, base.bias))
    assert backwards == [1] and steer.grad.any()
    for hook in hooks:
        hook.remove()


class Bounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.1, 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_with_a_forward_of_its_own_keeps_it(method):
    model = nn.Sequential(Bounded(4, 4), nn.Linear(4, 4)).double()
    x = tokens(9, 4).requires_grad_()
    wanted, slope = model(x), torch.autograd.grad(model(x).sum(), x)[0]
    pk.attach(model, METHODS[method](r=2))
    for training in (True, False):
        y = model.train(training)(x)
        assert_close([y, torch.autograd.grad(y.sum(), x)[0]], [wanted, slope])


def test_weights_below_16_bits_that_are_not_known_are_no_linears():
    """Their scales stand elsewhere: a product with the bare codes would be wrong in silence."""
    plain = nn.Linear(4, 4)
    assert is_linear(plain) and is_linear(plain.bfloat16())
    plain.weight = nn.Parameter(plain.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert not is_linear(plain)


def test_the_norm_follows_a_model_that_is_moved_and_back():
    """The weight may come back to the address where it was before, rounded on the way."""
    for _ in range(30):
        layer = adapted("dora", torch.float32).q_proj
        assert norm_is_right(layer)
        layer.base_layer.weight.data.mul_(3)  # what an allocation in between might leave there
        layer.to(torch.float32)
        assert norm_is_right(layer)


def flipped_in_odd_columns(x: Tensor) -> Tensor:
    return x * torch.tensor([1, -1]).repeat(x.shape[1] // 2)


CHANGES = {
    "negated": lambda x: -x, "doubled": lambda x: 2 * x, "halved": lambda x: x / 2, "times 2^64": lambda x: x * 2.0**64, "shifted": lambda x: x + 1,
    "rows swapped": lambda x: x.flip(0), "columns swapped": lambda x: x.flip(1), "odd columns negated": flipped_in_odd_columns,
    "one column negated": lambda x: torch.cat([x[:, :1], -x[:, 1:2], x[:, 2:]], 1),
    "one column doubled": lambda x: torch.cat([x[:, :1], 2 * x[:, 1:2], x[:, 2:]], 1),
    "one row negated": lambda x: torch.cat([-x[:1], x[1:]]), "neighbours swapped": lambda x: x.unflatten(1, (-1, 2)).flip(2).flatten(1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_fingerprints_tell_changes_of_many_elements(change, dtype):
    for width in range(2, 300, 2):
        for x in (tokens(4, width).to(dtype), tokens(4, width).abs().to(dtype), torch.arange(1, 4 * width + 1, dtype=dtype).view(4, width)):
            changed = CHANGES[change](x).to(dtype)
            assert torch.equal(x, changed) or fingerprint(changed) != fingerprint(x), width


def test_fingerprints_of_parts_of_a_larger_buffer():
    buffer = tokens(1, 49, dtype=torch.float32)[0]
    part = buffer[1:].view(3, 16)
    assert fingerprint(part) == fingerprint(part.clone()) == fingerprint(part.T.contiguous().T)
    layer = adapted("dora", torch.float32).q_proj
    layer.a().data = part
    assert norm_is_right(layer)


@pytest.mark.parametrize("p", [1e-300, 1e-20, 1e-17, 1e-16, 1e-12])
def test_rates_so_small_that_nothing_is_dropped(p):
    assert zeroed(torch.ones(1000), p, seed=1).all()


def replicate(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a module for each of its devices."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicate(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter * 1)
    return replica


@pytest.mark.parametrize("method", METHODS)
def test_replicas_of_data_parallel(method):
    model = adapted(method)
    x = tokens(4, 16).requires_grad_()
    replica = replicate(model)
    model.q_proj(x)
    assert_close([replica(x), *gradients(model, replica(x), x)], [model(x), *gradients(model, model(x), x)])
    assert products(model, x) == 1


def test_evaluation_in_inference_mode_and_training_afterwards():
    model, other = adapted("dora"), adapted("dora")
    x = tokens(4, 16).requires_grad_()
    with torch.inference_mode():
        model.eval()(x)
        model.train()(x)
    assert_close(gradients(model, model(x), x), gradients(other, other(x), x))


# ---------------------------------------------------------------------------------------------- where and how they are called


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (16,)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("base", [nn.Linear(16, 8), nn.Linear(16, 8, bias=False), Conv1D(8, 16)], ids=["linear", "no bias", "Conv1D"])
def test_the_model_may_write_into_what_a_layer_gives(base, method, shape, grad):
    """GPT-2's Conv1D, whose own output is a view, too."""
    model = nn.Sequential(copy.deepcopy(base)).double()
    pk.attach(model, METHODS[method](r=3, target_modules=["0"]))
    wake(model)
    x = tokens(*shape)
    with torch.set_grad_enabled(grad):
        y = model(x)
    kept = y.detach().clone()
    y.mul_(2)
    assert y.requires_grad == grad and torch.equal(y, 2 * kept)
    if grad:
        y.sum().backward()
        assert model[0].b().grad.any()


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_algorithms(method):
    model = adapted(method, torch.float32, dropout=0.3)
    torch.use_deterministic_algorithms(True)
    try:
        model(tokens(6, 16, dtype=torch.float32).requires_grad_()).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_reentrant_checkpoints_of_a_few_tokens_repeat_themselves(method, dropout):
    """Their first forward runs without gradients, and must still be that of training."""
    model = adapted(method, torch.bfloat16, dropout=dropout)
    x = tokens(10, 16, dtype=torch.bfloat16).requires_grad_()
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=True)):
        torch.manual_seed(7)
        found.append(run(x))
    assert torch.equal(*found)


@pytest.mark.parametrize("scale", [64.0, 1 / 64])
def test_the_scale_neither_overflows_nor_vanishes_in_fp16(scale):
    model = adapted(dtype=torch.float16, r=4, alpha=4 * scale)
    layer, x = model.o_proj, tokens(50, 16, dtype=torch.float16)
    grad = tokens(50, 16, seed=6).mul_(3000 if scale > 1 else 2e-6).half()
    layer(x).backward(grad)
    exact = scale * grad.double().T @ (x.double() @ layer.a().double().T)
    assert (layer.b().grad - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shared", [True, False])
def test_a_backward_within_autocast(method, shared):
    found = []
    for autocast in (False, True):
        model = adapted(method, torch.float32, shared=shared)
        x = tokens(6, 16, dtype=torch.float32).requires_grad_()
        y = model(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(gradients(model, y, x))
    assert_close(*found, tolerance=1e-6)
