"""check(recipe): everything that can be known before training, without training and without loading weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from peftkit import data, methods
from peftkit.amounts import human
from peftkit.config import ConfigError
from peftkit.evaluate import GENERATING, must_have_answers, must_have_words
from peftkit.folder import must_have_room, open_folder
from peftkit.forecast import Budget, Forecast, Plan, Row, Sizes, Skeleton, budget, largest_micro_batch, of_micro_batch, of_recipe, plan_of
from peftkit.model import load_config, load_tokenizer, reads_with_encoder
from peftkit.recipe import Recipe, load_recipe

SHOWN = 2  # rows printed with their trained tokens marked
BARS, WIDTH = 8, 40  # of the histogram of lengths
UNREACHED = {"ConnectionError", "TimeoutError", "Timeout", "TransportError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}
"""Errors by name, whichever client the hub's library is built on."""


@dataclass
class CheckReport:
    """Titles with their lines; the first rows, coloured, and as text with [[trained]] spans; the same facts for scripts."""

    recipe: Recipe
    sections: dict[str, list[str]] = field(default_factory=dict)
    rows: list[tuple[Text, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints; docs/check.md tells the keys."""
        empty = {key: None for key in ("model", "data", "memory", "seconds_per_step")}
        return empty | {"conflicts": []} | self.facts | {"recipe": self.recipe.model_dump(), "rows": [marked for _, marked in self.rows]}


def check(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), gpu: str | None = None, resume: bool = False) -> CheckReport:
    """Validates the recipe, reads and renders its data, and rehearses a step without data or weights to see what it needs.

    gpu: memory of the GPU that the run is for, such as "24GB"; by default this machine is meant. resume: the run is to go on
    where it stopped, as with `run --resume`. Hub models and data that
    are not on this machine and cannot be reached are told as unknown, not as errors: the recipe itself is then all that was
    checked. Raises ConfigError for everything that would stop `run`.
    """
    there = budget(gpu)
    recipe = load_recipe(recipe, overrides, elsewhere=gpu is not None)
    folder = open_folder(recipe, resume)
    report = CheckReport(recipe, {"recipe": _recipe_lines(recipe)})
    try:
        config, tokenizer = load_config(recipe.model.name, recipe.model.revision), load_tokenizer(recipe.model.name, recipe.model.revision)
    except ConfigError as error:
        if _is_local(recipe.model.name) or not unreached(error):
            raise
        report.sections["model"] = [f"{recipe.model.name} is not on this machine and the hub was not reached: model and data stay unchecked"]
        report.sections["model"] += [str(error).splitlines()[0]]
        return report
    skeleton = Skeleton(recipe, config, there.gpu)
    _tell_model(report, skeleton)
    plan = None
    try:
        plan = _tell_data(report, tokenizer, reads_with_encoder(config))
    except data.HubError as error:
        if not unreached(error):
            raise
        report.sections["data"] = [f"unchecked: {error}"]
    if not resume:
        steps = recipe.train.steps(len(plan.rows)) if plan else recipe.train.max_steps or 2
        must_have_room(folder, recipe.train, steps, skeleton.gradients, skeleton.gradients + skeleton.optimizer)
    _tell_memory(report, skeleton, plan or Plan(_full_rows(recipe, reads_with_encoder(config))), there, known=plan is not None)
    _tell_time(report)
    report.facts["conflicts"] = conflicts(report, config, plan)
    if report.facts["conflicts"]:
        report.sections["look again"] = report.facts["conflicts"]
    return report


def unreached(error: BaseException) -> bool:
    """Whether an error is for want of the network, rather than of what was looked for: a name that the hub does not have, a licence not accepted."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(kind.__name__ in UNREACHED for each in causes for kind in type(each).__mro__)


def _is_local(name: str) -> bool:
    return name.startswith("builtin:") or Path(name).expanduser().is_dir()


def _recipe_lines(recipe: Recipe) -> list[str]:
    train = recipe.train
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.num_epochs or 1:g} epochs"
    what = "all parameters" if train.full_finetuning else " + ".join(methods.method_name(method) for method in recipe.build_methods())
    return [f"{what}, {length} of {train.batch_size} rows, learning rate {train.learning_rate:g}, results in {recipe.output_dir}"]


# ---------------------------------------------------------------------------------------------------------------- model, data


def _tell_model(report: CheckReport, skeleton: Skeleton) -> None:
    """What the model is, what would be adapted and what its weights take."""
    recipe, dtype = report.recipe, str(skeleton.dtype).removeprefix("torch.")
    trained = sum(parameter.numel() for parameter in skeleton.trained.values())
    lines = [
        f"{recipe.model.name}: {type(skeleton.model).__name__}, {skeleton.parameters:,} parameters, "
        f"{human(skeleton.weights)} of weights ({recipe.quantize or 'not quantised'}, {dtype})"
    ]
    for name, adapted in skeleton.adapted.items():
        lines.append(f"{name} adapts {sum(adapted.values())} linears: " + ", ".join(f"{ending} x{count}" for ending, count in adapted.items()))
    lines += [f"{name} trains as a whole" for name in skeleton.whole] + [f"{count} rows of {name} train" for name, count in skeleton.rows.items()]
    lines.append(f"{trained:,} parameters train ({trained / skeleton.parameters:.2%} of so many); saved they take {human(skeleton.gradients)}")
    report.sections["model"] = lines
    report.facts["model"] = {
        "class": type(skeleton.model).__name__, "parameters": skeleton.parameters, "trained_parameters": trained, "dtype": dtype,
        "quantize": recipe.quantize, "adapted": skeleton.adapted, "adapter_bytes": skeleton.gradients,
    }  # fmt: skip


def _tell_data(report: CheckReport, tokenizer: Any, pairs: bool) -> Plan:
    """What becomes of the rows, and what of them counts for memory."""
    recipe = report.recipe
    if tokenizer is None:
        raise ConfigError(f"model: {recipe.model.name} holds no tokenizer, and training needs one")
    examples, found = data.load_examples(recipe.data, tokenizer, "train", pairs)
    report.rows = [(data.colour_row(example, tokenizer), data.marked_row(example, tokenizer)) for example in examples[:SHOWN]]
    evaluated, eval_found = data.load_examples(recipe.data, tokenizer, "eval", pairs)
    plan = plan_of(recipe, tokenizer, data.make_rows(examples, recipe.data), evaluated, pairs)
    rows = plan.rows
    del examples
    sets = {"eval": evaluated} | {
        name: data.load_examples(recipe.data.alone(name, recipe.eval.retained_rows), tokenizer, "train", pairs)[0] for name in recipe.eval.retained
    }
    generating = [metric for metric in recipe.eval.metrics if metric in GENERATING]
    for name in recipe.eval.retained + (["eval"] if generating else []):
        must_have_answers(generating, name, sets[name])
    if "rouge" in generating:
        must_have_words([example.answer for example in evaluated])
    choices = data.load_choices(recipe.data, tokenizer, recipe.eval.choices, pairs)[1] if "choice_accuracy" in recipe.eval.metrics else []
    filled = found.tokens / (len(rows) * recipe.data.max_length) if recipe.data.packing else None
    special = [f"{name} {getattr(tokenizer, f'{name}_token')!r} ({getattr(tokenizer, f'{name}_token_id')})" for name in ("bos", "eos", "pad")]
    lines = found.lines() + histogram(found.lengths) + eval_found.lines() + choices
    lines.append(f"special tokens: {', '.join(special)}; chat template: {'yes' if tokenizer.chat_template else 'none'}")
    lines.append(f"{recipe.train.steps(len(rows))} steps over {len(rows)} {'packed ' if recipe.data.packing else ''}rows")
    if filled is not None:
        lines.append(f"packing fills {filled:.1%} of the rows of {recipe.data.max_length} tokens")
    report.sections["data"] = lines
    report.facts["data"] = {
        "train": _counts(found),
        "eval": _counts(eval_found),
        "steps": recipe.train.steps(len(rows)),
        "rows_after_packing": len(rows),
        "filled": filled,
    }
    return plan


def _counts(found: data.DataReport) -> dict[str, Any]:
    return {
        "source": found.source, "format": found.format, "rows": found.rows, "kept": found.kept, "left_out": len(found.dropped),
        "too_long": sum(row.too_long for row in found.dropped), "truncated": found.truncated, "tokens": found.tokens,
        "supervised_tokens": found.supervised_tokens, "longest": found.longest, "notes": list(found.notes),
    }  # fmt: skip


def histogram(lengths: Sequence[int]) -> list[str]:
    """Lengths in tokens by equal steps up to the longest, a line each, with a bar for the share of rows."""
    found = np.asarray(lengths)
    if not found.size or found.min() == found.max():
        return []
    longest = int(found.max())
    step = -(-longest // BARS)
    counts = np.bincount((found - 1) // step, minlength=BARS).tolist()
    shown = [(i, count) for i, count in enumerate(counts) if i * step < longest]
    wide = len(str(longest))
    return [
        f"    {i * step + 1:>{wide}} to {min((i + 1) * step, longest):>{wide}} tokens {'#' * -(-count * WIDTH // max(counts)):<{WIDTH}} {count}"
        for i, count in shown
    ]


# --------------------------------------------------------------------------------------------------------------- memory, time


def _full_rows(recipe: Recipe, pairs: bool) -> Sizes:
    """A batch of rows as long as rows can be, all of them trained (half of each, where an encoder reads the rest): for data that could not be read."""
    longest = recipe.data.max_length
    return replace(Sizes.of([Row(longest, longest // 2 if pairs else longest)] * recipe.train.batch_size), pairs=pairs)


def _tell_memory(report: CheckReport, skeleton: Skeleton, plan: Plan, there: Budget, known: bool) -> None:
    """The forecast with its parts, whether it fits, and how many rows at a time would."""
    most = largest_micro_batch(skeleton, plan, there)
    micro, found = of_recipe(skeleton, plan)
    if report.recipe.train.micro_batch_size == "auto":
        micro, found = max(most, 1), of_micro_batch(skeleton, plan, max(most, 1))
    fits, reserve = there.holds(found), there.reserve(found)
    longest = int(plan.rows.tokens.max())
    lines = [f"peak {human(found.total)} with {micro} rows at a time, the longest {longest} tokens{'' if known else ' (max_length: the data is unknown)'}"]
    lines += [f"  {name:<46}{human(size):>12}" for name, size in parts(found).items()]
    lines.append(
        f"{human(there.bytes)} {there.where}; {human(reserve)} of that {'no tensor can have' if there.gpu else 'the C library may hold beyond the tensors'}"
    )
    if fits:
        lines.append(f"fits; the largest micro-batch that does: {most}{' (the whole batch)' if most >= report.recipe.train.batch_size else ''}")
    elif most:
        lines.append(f"DOES NOT FIT; the largest micro-batch that does is {most}: set train.micro_batch_size: {most}, or auto")
    else:
        lines.append("DOES NOT FIT, not even one row at a time: shorten data.max_length, set train.gradient_checkpointing: true, or quantize the model")
    report.sections["memory"] = lines
    report.facts["memory"] = found.to_json() | {
        "micro_batch_size": micro, "longest": longest, "reserve": reserve, "available": there.bytes, "where": there.where, "fits": fits,
        "largest_micro_batch": most,
    }  # fmt: skip


def parts(found: Forecast) -> dict[str, int]:
    """The parts of a forecast under the names that people read."""
    return {
        "weights": found.weights, "adapters": found.adapters, "optimizer states": found.optimizer, "gradients of earlier micro-batches": found.gradients,
        "activations kept for backward": found.activations, "backward beyond them": found.backward, "evaluation, in place of the last three": found.evaluation,
    }  # fmt: skip


def _tell_time(report: CheckReport) -> None:
    """Seconds per step where the run folder holds a run of the same work; nothing where it does not."""
    recipe, path = report.recipe, Path(report.recipe.output_dir) / "result.json"
    if not path.is_file():
        return
    try:
        result = json.loads(path.read_text())
        before, train = result["recipe"], result["train"]
        same = all(before[key] == recipe.model_dump()[key] for key in ("model", "methods", "data"))
        same = same and all(
            before["train"][key] == getattr(recipe.train, key) for key in ("batch_size", "micro_batch_size", "gradient_checkpointing", "optimizer")
        )
    except (ValueError, KeyError, TypeError) as error:
        report.sections["time"] = [f"unknown: {path} is no result of a run ({type(error).__name__}: {error})"]
        return
    if same and train["steps"]:
        seconds = train["seconds"] / train["steps"]
        report.sections["time"] = [
            f"{seconds:.3g} s per step, as the run in {recipe.output_dir} took on {result['machine'].get('gpu') or result['machine']['processor']}"
        ]
        report.facts["seconds_per_step"] = seconds


# ------------------------------------------------------------------------------------------------------------------ conflicts


def conflicts(report: CheckReport, config: Any, plan: Plan | None) -> list[str]:
    """Options that are each allowed and do not go together, or do nothing here."""
    recipe, memory = report.recipe, report.facts["memory"]
    train, found = recipe.train, []
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most and memory["longest"] > most:
        found.append(f"data.max_length: rows of up to {memory['longest']} tokens, and the model was made for {most}")
    if plan is not None and len(plan.rows) < train.batch_size:
        found.append(f"train.batch_size: {train.batch_size} rows a step, and there are {len(plan.rows)}: every step repeats rows")
    if isinstance(train.micro_batch_size, int) and train.micro_batch_size > train.batch_size:
        found.append(f"train.micro_batch_size: {train.micro_batch_size} is more than train.batch_size: {train.batch_size}, and does nothing")
    if train.gradient_checkpointing and memory["fits"] and memory["largest_micro_batch"] >= train.batch_size:
        found.append("train.gradient_checkpointing: even the whole batch fits with it; without it steps are faster, if that fits too")
    if recipe.data.packing and plan is not None and plan.rows.documents.max() == 1:
        found.append("data.packing: no two rows fit into one, so it does nothing")
    dropped = report.facts["data"]["train"]["too_long"] if report.facts.get("data") else 0
    if dropped and dropped > 0.05 * report.facts["data"]["train"]["rows"]:
        found.append(
            f"data.max_length: {dropped} of {report.facts['data']['train']['rows']} rows are left out as too long; raise it, or set data.truncation: right"
        )
    if "gpu" in memory["where"].lower() and recipe.train.optimizer == "adamw" and any(method.paged_optimizer for method in recipe.build_methods()):
        found.append("train.optimizer: adamw, where qlora would take the paged 8-bit one (auto)")
    return found
