"""Peak memory of training and of evaluation, traced on a skeleton."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from peftkit.forecast.skeleton import Skeleton
from peftkit.layers import LoRALinear, adapter_layers
from peftkit.model import reads_with_encoder


class Workload(NamedTuple):
    """A batch: rows of `tokens` tokens each, padding included, of which `supervised` in all are trained."""

    rows: int
    tokens: int
    supervised: int
    documents: int = 1
    """In a row, where rows are packed."""
    packed: bool = False
    padded: bool = True
    """Whether a row is shorter than the others, so that attention needs a mask."""
    answer: int = 0
    """Tokens that a decoder of its own writes in each row, where `tokens` are read by an encoder; else 0."""


class Generation(NamedTuple):
    """Answers to `rows` prompts at a time, `tokens` long with their prompts, of which `answer` are the room for the answer."""

    rows: int
    tokens: int
    answer: int = 0


@dataclass(frozen=True)
class Forecast:
    """Bytes of a run at its peak, by what they are for. Parts of training and of evaluation are not needed at one time."""

    weights: int
    """The base as it is stored, buffers included."""
    adapters: int
    """What the methods add: factors, magnitudes, copies of modules, DoRA's norms."""
    optimizer: int
    gradients: int
    """Those that wait while micro-batches accumulate; 0 where one micro-batch is the batch."""
    activations: int
    """Kept for backward at the end of a forward, the loss's included."""
    backward: int
    """Beyond them at the worst moment: new gradients, dequantised weights, what operations need while they run."""
    evaluation: int
    """At the worst moment of evaluation."""

    @property
    def stored(self) -> int:
        return self.weights + self.adapters + self.optimizer

    @property
    def training(self) -> int:
        return self.gradients + self.activations + self.backward

    @property
    def total(self) -> int:
        return self.stored + max(self.training, self.evaluation)

    def to_json(self) -> dict[str, int]:
        """Every part and the total, in bytes."""
        return asdict(self) | {"total": self.total}


def forecast(skeleton: Skeleton, workload: Workload, accumulates: bool, evaluation: Workload | None = None, generation: Generation | None = None) -> Forecast:
    """What the recipe will need with this micro-batch as its largest, and these batches of evaluation."""
    batch = evaluation or workload._replace(rows=1, supervised=workload.answer or workload.tokens)
    if (batch, generation) not in skeleton.evaluations:
        skeleton.evaluations[batch, generation] = max(_evaluation(skeleton, batch), _generation(skeleton, generation))
    evaluating = skeleton.evaluations[batch, generation]
    activations, backward = _training(skeleton, workload, accumulates)  # after evaluation, as in a run: the loss has tried by then whether it may gather
    gradients = skeleton.gradients if accumulates else 0
    return Forecast(skeleton.weights, skeleton.adapters + skeleton.kept, skeleton.optimizer, gradients, activations, backward, evaluating)


def _training(skeleton: Skeleton, workload: Workload, accumulates: bool) -> tuple[int, int]:
    """(activations, backward) in bytes."""
    trace = skeleton.trace
    for layer in adapter_layers(skeleton.model).values():
        if isinstance(layer, LoRALinear):
            layer.forget_norm()  # that of evaluation: training takes it anew after every step of the optimizer
    with _set(skeleton, workload):
        start = trace.live
        if accumulates:  # the gradients of micro-batches that came before
            for parameter in skeleton.trained.values():
                parameter.grad = torch.zeros_like(parameter)
        trace.restart_peak()
        resting = trace.live
        batch = _batch(workload)
        with torch.autocast("cpu", torch.bfloat16, enabled=skeleton.autocast):
            loss, _ = skeleton.loss(**batch)
        forward_peak, activations = trace.peak - resting, trace.live - resting
        loss.backward()
        backward = max(trace.peak - resting, forward_peak) - activations
        del loss, batch
        skeleton.model.zero_grad(set_to_none=True)
        skeleton.kept = max(skeleton.kept, trace.live - start)
    return activations, backward


def _evaluation(skeleton: Skeleton, workload: Workload) -> int:
    """The peak of the loss of one batch, and of trying on one row whether the loss may gather before the head."""
    trace = skeleton.trace
    with _set(skeleton, workload), torch.no_grad():
        skeleton.model.eval()
        trace.restart_peak()
        resting = trace.live
        skeleton.loss.gathers = None
        skeleton.loss(**_batch(workload))
        skeleton.model.train()
        return trace.peak - resting


def _generation(skeleton: Skeleton, generation: Generation | None) -> int:
    """The peak of prefilling the longest prompts, answers included, with the keys and values that stay, and of one more token."""
    if generation is None:
        return 0
    trace = skeleton.trace
    with trace.running(), torch.no_grad():
        skeleton.model.eval()
        trace.restart_peak()
        resting = trace.live
        if reads_with_encoder(skeleton.model.config):
            return _written(skeleton, generation) - resting
        mask = torch.ones(generation.rows, generation.tokens, dtype=torch.long)
        done = skeleton.model(input_ids=mask, attention_mask=mask, use_cache=True, logits_to_keep=1)
        logits = done.logits.float()
        one = torch.ones(generation.rows, 1, dtype=torch.long)
        more = torch.cat([mask, one], 1)
        skeleton.model(input_ids=one, attention_mask=more, past_key_values=done.past_key_values, use_cache=True)
        del logits, done
        skeleton.model.train()
        return trace.peak - resting


def _written(skeleton: Skeleton, generation: Generation) -> int:
    """The peak of answers by a decoder of its own: prompts read, all of the answer's keys and values, and one more token with its logits."""
    model = skeleton.model
    mask = torch.ones(generation.rows, generation.tokens - generation.answer, dtype=torch.long)
    read = model.get_encoder()(input_ids=mask, attention_mask=mask).last_hidden_state
    answer, one = (torch.ones(generation.rows, width, dtype=torch.long) for width in (generation.answer, 1))
    context = {"encoder_hidden_states": read, "encoder_attention_mask": mask, "use_cache": True}
    done = model.get_decoder()(input_ids=answer, **context)
    more = model.get_decoder()(input_ids=one, past_key_values=done.past_key_values, **context)
    model.get_output_embeddings()(more.last_hidden_state).float()
    model.train()
    return skeleton.trace.peak


def _set(skeleton: Skeleton, workload: Workload) -> Any:
    """The trace, running, with what it is to answer for this batch."""
    skeleton.trace.chosen = max(workload.supervised, 1)
    skeleton.trace.documents = workload.documents + 1  # padding counts as a document of its own
    return skeleton.trace.running()


def _batch(workload: Workload) -> dict[str, torch.Tensor]:
    ids = torch.ones(workload.rows, workload.tokens, dtype=torch.long)
    if workload.answer:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.new_ones(workload.rows, workload.answer)}
    batch = {"input_ids": ids, "labels": torch.ones_like(ids)}
    if workload.packed or workload.padded:
        batch["position_ids"] = torch.ones_like(ids)
    if workload.padded and not workload.packed:
        batch["attention_mask"] = torch.ones_like(ids)
    return batch
