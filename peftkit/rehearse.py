"""rehearse(recipe): the whole way of a recipe in seconds, on a shrunken random model of the same architecture and the first rows of the data.

What cannot be had (weights always; config, tokenizer and data where there is no hub) is stood in for, and told:

    configs/<model>.json   beside the recipe: {"config": the published config.json's sizes, "chat_template": whether its tokenizer has one}
    rows/<owner>--<name>.* beside the recipe: a few rows in the data set's own columns; for a file of one's own, rows/<file>
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, set_seed

from peftkit import data, methods
from peftkit.amounts import human
from peftkit.check import unreached
from peftkit.checkpoint import CheckpointError
from peftkit.config import ConfigError
from peftkit.model import from_config, load_config, load_tokenizer, reads_with_encoder
from peftkit.recipe import Recipe, load_recipe
from peftkit.result import Result
from peftkit.run import run
from peftkit.use import score

ROWS, EVAL_ROWS, RETAINED_ROWS = 32, 8, 2  # enough for a few steps and an evaluation
LENGTH = 256  # tokens: the longest row of the few steps
BLOCK = 64  # input widths are multiples of it, so that all linears can be in 4 bits on any machine
LARGEST = 300e6  # parameters of a shrunken model; beyond that its config has sizes that `shrink` does not know


@dataclass
class Rehearsal:
    """What was taken as it is, what was stood in for, and what came of it."""

    recipe: Recipe
    real: list[str] = field(default_factory=list)
    stood_in: list[str] = field(default_factory=list)
    did: list[str] = field(default_factory=list)
    result: Result | None = None


def rehearse(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), steps: int = 3, console: Console | None = None) -> Rehearsal:
    """Loads, quantises, attaches, trains `steps` steps, evaluates, saves and reloads as the recipe says; keeps nothing.

    Raises what `run` raises; ConfigError for data that its own settings leave nothing of; CheckpointError where the model
    read back is not the trained one.
    """
    if steps < 1:
        raise ConfigError(f"--steps: {steps} is not a number of steps to train; give 1 or more")
    beside = Path(recipe).parent if isinstance(recipe, (str, Path)) else Path()
    recipe = load_recipe(recipe, overrides, elsewhere=True)
    report = Rehearsal(recipe)
    console = console or Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as place:
        work = Path(place)
        tokenizer = _stand_in_model(recipe, beside, work / "base", report)
        pairs = reads_with_encoder(load_config(str(work / "base")))
        small = _stand_in_recipe(recipe, tokenizer, pairs, beside, work, steps, report)
        result = report.result = run(small, console=console)
        saved = human(result.adapter["bytes"])
        logged = map(json.loads, (work / "run" / "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in logged if "loss" in line]
        report.did += [f"{result.train['steps']} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}", f"saved {saved}"]
        again = score(str(work / "run"), [], None, Console(quiet=True))
        report.did.append(_compare(again, result.after))
    return report


def _compare(again: dict[str, Any], before: dict[str, Any]) -> str:
    if not before:
        return "read back whole; the recipe names no evaluation set to compare it on"
    for name, value in before.items():
        if isinstance(value, float) and not math.isclose(again[name], value, rel_tol=1e-3, abs_tol=1e-3):
            raise CheckpointError(f"what was saved is not what was trained: {name} is {again[name]:g} after reading it back and {value:g} before")
    return "read back, with the same scores: " + ", ".join(f"{name} {value:.4f}" for name, value in again.items() if isinstance(value, float))


# ------------------------------------------------------------------------------------------------------------ the model


def kept_config(beside: Path, name: str) -> Path:
    """Where the config of the hub model `name` is kept for recipes in the folder `beside`."""
    return beside / "configs" / f"{name.rsplit('/', 1)[-1]}.json"


def _stand_in_model(recipe: Recipe, beside: Path, folder: Path, report: Rehearsal) -> Any:
    """Writes a random shrunken model with its tokenizer to `folder`; returns the tokenizer. Raises ConfigError where no config is to be had."""
    name, revision = recipe.model.name, recipe.model.revision
    local = name.startswith("builtin:") or Path(name).expanduser().is_dir()
    kept = kept_config(beside, name)
    note = json.loads(kept.read_text()) if kept.exists() else None
    try:
        config = load_config(name, revision)
        report.real.append(f"config of {name}: {config.model_type}")
    except ConfigError as error:
        if local or note is None:
            raise error if local else ConfigError(f"{error}\n  to rehearse without it, keep a config in {kept}") from error
        config = AutoConfig.for_model(**note["config"])
        report.stood_in.append(f"config of {name}: the sizes kept in {kept} ({config.model_type})")
    try:
        tokenizer = load_tokenizer(name, revision)
        report.real.append(f"tokenizer of {name}")
    except ConfigError:
        if local:
            raise
        tokenizer = load_tokenizer("builtin:tiny")
        chat = "chats in its format, a turn ending in <|end|>"
        if note is not None and not note["chat_template"]:
            assert tokenizer is not None
            tokenizer.chat_template, chat = None, "no chat template, as the model has none"
        report.stood_in.append(f"tokenizer of {name}: that of builtin:tiny, {chat}")
    if tokenizer is None:
        raise ConfigError(f"model: {name} holds no tokenizer, and training needs one")
    swapping = [method for method in recipe.build_methods() if isinstance(method, methods.LoRA)]
    rank = max([method.r for method in swapping], default=0)
    small = shrink(config, tokenizer, rank, all_layers=any(method.layers_to_transform is not None for method in swapping))
    set_seed(0)
    with torch.device("meta"):
        skeleton = from_config(small, name)
    if skeleton.num_parameters() > LARGEST:
        raise ConfigError(f"model: a config of type {config.model_type} has sizes that a rehearsal does not know how to shrink")
    model = from_config(small, name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report.real.append(f"architecture: {type(model).__name__}, {', '.join(_kinds(small))}")
    report.stood_in.append(f"weights: {model.num_parameters():,} random ones ({', '.join(_changes(config, small))})")
    return tokenizer


def shrink(config: Any, tokenizer: Any, rank: int = 0, all_layers: bool = False) -> Any:
    """A config of the same class and switches with small sizes: every kind of layer stays, heads are shared as before.

    rank: of the adapters; widths are no smaller, so that a start from the base's own weights finds enough of them.
    """
    unit = BLOCK * max(1, math.ceil(rank / BLOCK))
    values, names = config.to_dict(), dict(type(config).attribute_map)
    depth, heads = config.get_text_config().num_hidden_layers, getattr(config, "num_attention_heads", None)
    layers = depth if all_layers else min(depth, _layers(values.get("layer_types") or []))
    shared = getattr(config, "num_key_value_heads", None)
    sizes = {
        "hidden_size": 2 * unit,
        "word_embed_proj_dim": 2 * unit,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if shared in (None, heads) else 1 if shared == 1 else 2,
        "head_dim": unit // 2,
        "num_hidden_layers": layers,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": BLOCK,
        "max_window_layers": layers,
        "vocab_size": len(tokenizer),
        **{name: 3 * unit for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")},
        **{name: 4 for name in ("encoder_attention_heads", "decoder_attention_heads")},
        **{name: layers for name in ("num_decoder_layers", "encoder_layers", "decoder_layers")},
        **{name: unit for name in ("moe_intermediate_size", "shared_expert_intermediate_size")},
    }
    for name, size in sizes.items():
        own = names.get(name, name)
        if isinstance(values.get(own), int) and not isinstance(values[own], bool):
            values[own] = size if name == "vocab_size" else min(size, values[own])
    for name, value in values.items():
        if isinstance(value, list) and len(value) == depth:  # one entry for each layer
            values[name] = value[:layers]
    for rope in ("rope_parameters", "rope_scaling"):
        for name, value in (values.get(rope) or {}).items():
            if isinstance(value, list):  # factors of LongRoPE, one for each pair of a head's dimensions
                values[rope][name] = value[: unit // 4]
    special = {token: f"{token}_token_id" for token in ("pad", "bos", "eos")}
    if values.get("decoder_start_token_id") is not None:  # one of the others, T5's is pad
        same = [name for name in special.values() if values.get(name) == values["decoder_start_token_id"]]
        values["decoder_start_token_id"] = getattr(tokenizer, (same or ["pad_token_id"])[0])
    values |= {name: getattr(tokenizer, name) for name in special.values()}
    values.pop("model_type", None)
    small = type(config)(**values)
    for name, value in values.items():  # T5's config sets one switch by another
        if isinstance(value, bool) and getattr(small, name, value) is not value:
            setattr(small, name, value)
    return small


def _layers(kinds: list[str]) -> int:
    """The first layers that have every kind among them, two at least."""
    return max([2, *(kinds.index(kind) + 1 for kind in kinds)])


def _kinds(config: Any) -> list[str]:
    found = {"tied embeddings": config.tie_word_embeddings, "capped logits": getattr(config, "final_logit_softcapping", None)}
    found |= {"experts": getattr(config, "num_experts_per_tok", None), "a sliding window": getattr(config, "sliding_window", None)}
    return [f"{config.num_hidden_layers} layers", *(name for name, there in found.items() if there)]


def _changes(config: Any, small: Any) -> Iterator[str]:
    titles = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads", "vocabulary": "vocab_size"}
    for title, name in titles.items():
        old, new = getattr(config, name, None), getattr(small, name, None)
        yield f"{title} {old:,} -> {new:,}" if old != new else f"{title} {old:,}"


# ------------------------------------------------------------------------------------------------- the recipe and its rows


def _stand_in_recipe(recipe: Recipe, tokenizer: Any, pairs: bool, beside: Path, work: Path, steps: int, report: Rehearsal) -> Recipe:
    """The recipe with the small model, few rows and few steps, everything else as it was."""
    small, length = recipe.model_dump(), min(recipe.data.max_length, LENGTH)
    for split in ("train", "eval"):
        if small["data"][split] is not None:
            small["data"][split], fits = _stand_in_rows(recipe.data, split, tokenizer, pairs, beside, work, report)
            length = length if fits else recipe.data.max_length
    small["data"]["cache"] = False
    small["eval"]["retained"] = [
        _stand_in_rows(alone, "train", tokenizer, pairs, beside, work / f"retained-{number}", report, "eval.retained")[0]
        for number, alone in enumerate(recipe.data.alone(spec, RETAINED_ROWS) for spec in recipe.eval.retained)
    ]
    for number, part in enumerate(recipe.data.parts):
        own = small["data"]["replay"] if part is recipe.data.replay else small["data"]["mix"][number - bool(recipe.data.replay)]
        alone = recipe.data.alone(part.source, columns=part.columns)
        own["source"], _ = _stand_in_rows(alone, "train", tokenizer, pairs, beside, work / f"part-{number}", report)
    if length < recipe.data.max_length:
        small["data"] |= {"max_length": length, "truncation": "right", "on_bad_row": "skip"}
    for split, most in (("train", ROWS), ("eval", EVAL_ROWS)):  # rows that stand in are few already
        few = min(small["data"][f"{split}_rows"] or most, most)
        small["data"][f"{split}_rows"] = few if small["data"][split] == recipe.data.model_dump()[split] else None
    batch, micro = min(recipe.train.batch_size, 4), recipe.train.micro_batch_size
    if isinstance(micro, int):
        micro = min(micro, max(1, batch // 2) if micro < recipe.train.batch_size else batch)
    if small["train"]["report_to"]:
        report.stood_in.append(f"trackers: {', '.join(small['train']['report_to'])} is told nothing")
    small["train"] |= {"report_to": [], "max_steps": steps, "num_epochs": None, "batch_size": batch, "micro_batch_size": micro, "log_every": 1}
    small["eval"] |= {"batch_size": min(recipe.eval.batch_size, EVAL_ROWS), "retained_rows": RETAINED_ROWS, "max_new_tokens": 8}
    small["model"] |= {"name": str(work / "base"), "revision": None}
    if recipe.model.attention == "flash_attention_2" and not torch.cuda.is_available():
        small["model"]["attention"] = "auto"
        report.stood_in.append("attention: transformers' choice, since flash attention needs a GPU")
    if recipe.train.optimizer == "paged_adamw_8bit" and not torch.cuda.is_available():
        small["train"]["optimizer"] = "adamw"
        report.stood_in.append("optimizer: adamw, since the paged one needs a GPU")
    small["output_dir"] = str(work / "run")
    changes: list[tuple[str, Any, Any]] = [("max_length", recipe.data.max_length, length), ("batch_size", recipe.train.batch_size, batch)]
    changes.append(("micro_batch_size", recipe.train.micro_batch_size or batch, micro or batch))
    shorter = [f", {key} {old} -> {new}" for key, old, new in changes if old != new]
    report.stood_in.append(f"length of the run: {steps} steps{''.join(shorter)}")
    return load_recipe(small)


def _stand_in_rows(
    config: data.DataConfig, split: Any, tokenizer: Any, pairs: bool, beside: Path, work: Path, report: Rehearsal, named: str | None = None
) -> tuple[str, bool]:  # fmt: skip
    """Where the rows of a split are, and whether rows cut at LENGTH tokens leave something to train.

    The split itself where it can be had, checked as the recipe says; else a file of others in the same columns.
    """
    spec = config.train if split == "train" else config.eval
    assert spec is not None
    named = named or f"data.{split}"
    fewer = {"train_rows": min(config.train_rows or ROWS, ROWS), "eval_rows": min(config.eval_rows or EVAL_ROWS, EVAL_ROWS)}
    few = config.model_copy(update={"cache": False, "replay": None, "mix": [], **fewer})
    file = data.local_file(spec)
    name = spec.split(":")[0] if file is None else file.name
    kept = sorted((beside / "rows").glob(name.replace("/", "--") + ("" if file else ".*")))
    if file is None or file.exists() or not kept:  # a file that is not there and that nothing stands in for is an error
        try:
            examples, found = data.load_examples(few, tokenizer, split, pairs)
            report.real.append(f"{named}: the first rows of {found.lines()[0]}")
            report.real += [f"  left out: {line}" for line in data.bad_lines(found.dropped)]
            return spec, any(any(example.trained[:LENGTH]) for example in examples)
        except data.HubError as error:
            reason = "not on this machine, and the hub was not reached" if unreached(error) else str(error).splitlines()[0]
    else:
        reason = "your own file, not there"
    if kept:
        report.stood_in.append(f"{named}, {spec}: {reason}; rows in its columns from {kept[0]}")
        return str(kept[0]), True
    work.mkdir(exist_ok=True)
    made = work / f"{split}.jsonl"
    rows = list(_made_up(config.columns or {}))
    made.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.stood_in.append(f"{named}, {spec}: {reason}; made-up rows with the columns {', '.join(rows[0])}")
    return str(made), True


def _made_up(columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows with the columns that the recipe names; chats where it names none, since that is what most data sets hold."""
    for i in range(ROWS):
        question, answer = f"What is {i} plus {i + 1}?", f"{i} plus {i + 1} is {2 * i + 1}."
        turns = {"user": question, "assistant": answer}
        standard: dict[str, Any] = {
            **dict.fromkeys(("prompt", "instruction", "question"), question),
            **dict.fromkeys(("completion", "output", "answer", "chosen"), answer),
            "rejected": "I do not know.",
            "messages": [{"role": role, "content": text} for role, text in turns.items()],
            "conversations": [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in turns.items()],
            "text": f"{question} {answer}",
        }
        form = next((needed for needed in data.FORMATS.values() if set(columns) & set(needed)), ("messages",))
        yield {columns.get(name, name): standard[name] for name in form} | {own: "" for name, own in columns.items() if name not in form}
