"""TokenLoss is the model's own loss without its logits."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, wake
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import peftkit as pk
from peftkit import loss as loss_module
from peftkit.layers import trainable_parameters
from peftkit.loss import TokenLoss


def tiny_gemma2() -> Gemma2ForCausalLM:
    """Its logits are capped after the head, here so low that it shows."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        final_logit_softcapping=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma2": tiny_gemma2}


def batch() -> dict[str, Tensor]:
    """Four rows, padded, with prompts that are not trained."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 96, (4, 23), generator=generator)
    mask = (torch.arange(23) < torch.tensor([23, 17, 9, 4])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def adapted(name: str) -> nn.Module:
    model = MODELS[name]()
    torch.manual_seed(0)
    pk.attach(model, pk.DoRA(r=3))
    wake(model)
    return model.train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, _, parameter in trainable_parameters(model)}
    model.zero_grad()
    return found


@pytest.mark.parametrize("chunk", [1024, 7, 1])
@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradients_are_the_models_own(name, chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    model, inputs = adapted(name), batch()
    count = int((inputs["labels"][:, 1:] != -100).sum())
    own = model(**inputs, use_cache=False).loss
    own.backward()
    wanted = gradients(model)
    token_loss = TokenLoss(model)
    total, tokens = token_loss(**inputs)
    assert tokens.item() == count == sum(n - 2 for n in (23, 17, 9, 4))
    (total / tokens).backward()
    torch.testing.assert_close(total / tokens, own, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-6)
    assert token_loss.gathers is (name != "gemma2")


def test_capped_logits_fall_back_to_the_models_forward_and_say_so_once(caplog):
    model, inputs = adapted("gemma2"), batch()
    token_loss = TokenLoss(model)
    with caplog.at_level(logging.WARNING, logger="peftkit.loss"):
        token_loss(**inputs), token_loss(**inputs)
    assert [record.message for record in caplog.records] == [
        "Gemma2ForCausalLM changes its logits after the head (scaling or capping): the loss is taken from full logits"
    ]
    hidden = model.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    assert model.lm_head(hidden).abs().max() > 0.5, "the cap was reached"


def test_a_model_of_one_piece_falls_back_too(caplog):
    class OnePiece(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()

        def forward(self, **inputs):
            return self.inner(**inputs)

    model, inputs = OnePiece(), batch()
    token_loss = TokenLoss(model)
    with caplog.at_level(logging.WARNING, logger="peftkit.loss"):
        total, tokens = token_loss(**inputs)
    assert "OnePiece does not separate its body from its head" in caplog.text
    torch.testing.assert_close(total / tokens, model(**inputs).loss)


def test_only_supervised_rows_reach_the_head():
    model, inputs = adapted("llama"), batch()
    seen: list[int] = []
    token_loss = TokenLoss(model)
    token_loss(**inputs)  # the first call tries the gathering on a whole row
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].numel() // args[0].shape[-1]))
    token_loss(**inputs)
    assert seen == [45]


def test_chunks_bound_the_logits_and_come_again_in_backward(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 10)
    model, inputs = adapted("llama"), batch()
    token_loss = TokenLoss(model)
    token_loss(**inputs)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    total, _ = token_loss(**inputs)
    assert seen == [10, 10, 10, 10, 5]
    total.backward()
    assert sorted(seen[5:]) == [5, 10, 10, 10, 10]


def test_without_grad_the_value_is_the_same(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 10)
    model, inputs = adapted("llama").eval(), batch()
    with_grad, _ = TokenLoss(model)(**inputs)
    with torch.no_grad():
        without, _ = TokenLoss(model)(**inputs)
    assert torch.equal(with_grad, without)


def test_the_first_look_changes_nothing_about_the_model():
    model, inputs = adapted("llama"), batch()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(0)
    TokenLoss(model)(**inputs)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_nothing_supervised_is_a_zero_that_can_go_backward():
    model, inputs = adapted("llama"), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    total, tokens = TokenLoss(model)(**inputs)
    assert total.item() == 0 and tokens.item() == 0
    total.backward()


def test_packed_documents_have_the_loss_of_separate_rows():
    model = adapted("llama")
    generator = torch.Generator().manual_seed(4)
    documents = [torch.randint(3, 96, (length,), generator=generator) for length in (9, 5, 14)]
    alone = sum(TokenLoss(model)(labels=document[None], input_ids=document[None])[0] for document in documents)
    labels = torch.cat([torch.cat([torch.tensor([-100]), document[1:]]) for document in documents])
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    packed, tokens = TokenLoss(model)(labels=labels[None], input_ids=torch.cat(documents)[None], position_ids=positions[None])
    assert tokens.item() == 8 + 4 + 13
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_eight_micro_batches_of_one_are_one_of_eight():
    """Sums over the step, divided once by its tokens: rows of very different lengths count by token, not by row."""
    model = adapted("llama")
    generator = torch.Generator().manual_seed(6)
    lengths = [3, 40, 7, 25, 4, 33, 12, 5]
    ids = torch.randint(3, 96, (8, 40), generator=generator)
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    token_loss, supervised = TokenLoss(model), sum(lengths) - 8

    total, tokens = token_loss(**inputs)
    assert tokens.item() == supervised
    (total / supervised).backward()
    together = gradients(model)
    for row in range(8):
        part, _ = token_loss(**{key: value[row : row + 1, : lengths[row]] for key, value in inputs.items()})
        (part / supervised).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, together[name], rtol=1e-4, atol=1e-7)
