"""Trains `builtin:tiny` from scratch: tokenizer, Llama of three million parameters, chat template, scores.

    python benchmarks/pretrain_tiny.py --output peftkit/builtin/tiny

Everything is made from a seed by `peftkit.builtin.families`; nothing is downloaded. About 80 minutes on two cores. A
checkpoint is written every few minutes; run the same line again to go on from it. The scores of the finished model
(greedy exact match on 200 test rows of every family) are written to `scores.json` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftkit.builtin.families import FAMILIES, Row
from peftkit.builtin.tasks import TASKS, stream

SPECIAL = ["<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# A word has one token form wherever it stands: spaces are never glued to it, so that copying a word into JSON or to
# the start of an answer is the same act as copying it in running text. Words that are never copied carry their space.
GLUE = "a an and are as at by do does for from has have i in is it me much my of on one that the this to was we what which who with you"
WORD_SPLIT = rf" (?:{'|'.join(GLUE.split())})(?= )|[A-Za-z]+|\d|[^A-Za-z\d]+"

# How often each family is drawn; those that teach in-context look-up and extraction more often than the others.
WEIGHTS = dict.fromkeys(FAMILIES, 1.0) | {
    "lookup": 3.0, "passage": 2.0, "slots": 3.0, "json-write": 2.5, "json-read": 1.5, "fill": 1.5, "edit": 1.5,
    "number-words": 1.5, "times": 1.5, "add": 1.5, "count": 1.5,
}  # fmt: skip


def train_tokenizer(vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the text of the training families."""
    texts = [
        text for task in FAMILIES for _, row in zip(range(3000), stream(task, "train", seed + 1, 2), strict=False)
        for turn in row.turns for text in turn
    ]  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


class Encoder:
    """Rows to token ids with the answers marked; the same ids that the chat template gives."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.backend = tokenizer.backend_tokenizer
        self.ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}

    def __call__(self, rows: list[Row]) -> list[tuple[list[int], list[bool]]]:
        texts = [text for row in rows for turn in row.turns for text in turn]
        encoded = iter(self.backend.encode_batch_fast(texts, add_special_tokens=False))
        found = []
        for row in rows:
            ids, answer = [self.ids["<s>"]], [False]
            for _ in row.turns:
                user, assistant = next(encoded).ids, next(encoded).ids
                ids += [self.ids["<|user|>"], *user, self.ids["<|end|>"], self.ids["<|assistant|>"]]
                answer += [False] * (len(user) + 3)
                ids += [*assistant, self.ids["<|end|>"]]
                answer += [True] * (len(assistant) + 1)
            found.append((ids, answer))
        return found


def collate(rows: list[tuple[list[int], list[bool]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (rows, length) and the mask of positions whose *next* token is trained (rows, length)."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad)
    target = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (tokens, answer) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        target[i, : len(tokens) - 1] = torch.tensor(answer[1:])
    return ids, target


def batches(encoder: Encoder, tokens_per_batch: int, seed: int, skip_buffers: int = 0) -> Iterator[tuple[int, list]]:
    """Endless (buffer number, rows) of similar length, about `tokens_per_batch` tokens each."""
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    buffer = skip_buffers
    while True:
        rng = random.Random(f"{seed}/{buffer}")
        streams = {task: stream(task, "train", rng.randrange(2**31), rng.randint(3, 6)) for task in names}
        rows = encoder([next(streams[task]) for task in rng.choices(names, weights, k=4096)])
        rows.sort(key=lambda row: len(row[0]) + rng.random() * 8)
        cut, start = [], 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or len(rows[end][0]) * (end + 1 - start) > tokens_per_batch:
                cut.append(rows[start:end])
                start = end
        rng.shuffle(cut)
        for batch in cut:
            yield buffer, batch
        buffer += 1


def answer_logits(model: LlamaForCausalLM, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Logits (trained positions, vocabulary): lm_head sees only the rows that carry loss. Right padding needs no mask."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (rows, length, dim)
    return model.lm_head(hidden[target]).float()


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, encoder: Encoder, task: str, count: int) -> float:
    """Share of test rows whose every answer token is the model's first choice given the right ones before it.

    That is the same event as greedy generation giving exactly the answer.
    """
    rows = encoder([row for _, row in zip(range(count), stream(task, "test", 0), strict=False)])
    ids, target = collate(rows, 0)
    with torch.autocast("cpu", torch.bfloat16):
        right = answer_logits(model, ids, target).argmax(-1) == ids.roll(-1, 1)[target]
    per_row = torch.ones(len(rows), dtype=torch.bool).scatter_reduce(0, target.nonzero()[:, 0], right, "amin")
    return per_row.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain_tiny"), help="checkpoints and log")
    parser.add_argument("--steps", type=int, default=5600)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the steps over which the rate falls to zero")
    parser.add_argument("--tokens-per-batch", type=int, default=6144)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(2048, args.seed)
    encoder = Encoder(tokenizer)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "eager"  # on CPUs the fused attention is slower than plain products for rows this short
    model = LlamaForCausalLM(config)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    if args.optimizer == "muon":
        optimizers = [
            torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
        ]
    else:
        optimizers = [torch.optim.AdamW(matrices + others, lr=args.learning_rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True)]

    def rate(step: int) -> float:
        return min((step + 1) / 100, 1.0, (args.steps - step) / (args.decay * args.steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    checkpoint, step, tokens, seconds, buffer, last_buffer = args.work / "checkpoint.pt", 0, 0, 0.0, 0, -1
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for part, saved in zip(optimizers + schedules, state["parts"], strict=True):
            part.load_state_dict(saved)
        step, tokens, seconds, buffer = state["step"], state["tokens"], state["seconds"], state["buffer"]
        last_buffer = buffer - 1
        print(f"going on from step {step}", flush=True)

    started, losses = time.perf_counter(), []
    stream_ = batches(encoder, args.tokens_per_batch, args.seed, buffer)
    while step < args.steps:
        buffer, rows = next(stream_)
        if buffer != last_buffer and buffer % 8 == 0 and last_buffer >= 0:
            # A checkpoint stands at the start of a buffer, so that the data goes on exactly where it was.
            parts = [part.state_dict() for part in optimizers + schedules]
            spent = seconds + time.perf_counter() - started
            state = {"model": model.state_dict(), "parts": parts, "step": step, "tokens": tokens, "seconds": spent, "buffer": buffer}
            torch.save(state, f"{checkpoint}.new")
            os.replace(f"{checkpoint}.new", checkpoint)
        last_buffer = buffer
        ids, target = collate(rows, 0)
        with torch.autocast("cpu", torch.bfloat16):
            logits = answer_logits(model, ids, target)
        loss = torch.nn.functional.cross_entropy(logits, ids.roll(-1, 1)[target])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in optimizers + schedules:
            part.step()
        model.zero_grad()
        step, tokens = step + 1, tokens + ids.numel()
        losses.append(loss.item())
        if step % 50 == 0:
            spent = seconds + time.perf_counter() - started
            print(f"step {step}  loss {sum(losses) / len(losses):.4f}  tokens {tokens / 1e6:.2f}M  {spent:.0f} s", flush=True)
            losses = []
        if step % 500 == 0:
            scores = {task: exact_match(model, encoder, task, 40) for task in TASKS}
            own = sum(scores[task] for task in FAMILIES) / len(FAMILIES)
            print(f"own {own:.3f}  " + " ".join(f"{t} {s:.2f}" for t, s in scores.items()), flush=True)

    seconds += time.perf_counter() - started
    scores = {task: exact_match(model, encoder, task, 200) for task in TASKS}
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    own = sum(scores[task] for task in FAMILIES) / len(FAMILIES)
    record = {"own_exact_match": own, "exact_match": scores, "steps": step, "tokens": tokens, "seconds": seconds,
              "parameters": model.num_parameters(), "torch": torch.__version__, "seed": args.seed}  # fmt: skip
    (args.output / "scores.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
