"""run(recipe) -> Result: the whole way on one screen, and the only place that knows the order of the stages."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object, set_seed
from rich.console import Console

from peftkit import data, evaluate, forecast, methods
from peftkit import train as training
from peftkit.amounts import human
from peftkit.attention import attend_within_documents
from peftkit.checkpoint import checkpoints, save_adapter
from peftkit.compiling import compile_blocks, uncompiled
from peftkit.config import ConfigError
from peftkit.console import bar
from peftkit.energy import energy_joules, energy_used
from peftkit.folder import MICRO_BATCH_FILE, must_have_room, must_not_replace, open_folder, start_folder
from peftkit.interrupts import Interrupted
from peftkit.loss import TokenLoss
from peftkit.memory import forget_peak, keep_few_kernels
from peftkit.model import load, load_config, load_tokenizer, reads_with_encoder, resolve_dtype
from peftkit.optim import build_optimizer
from peftkit.recipe import Recipe, load_recipe
from peftkit.result import MetricsLog, Result, machine, plot_loss, versions, write_json
from peftkit.save_model import write_verified
from peftkit.trackers import flat
from peftkit.tripwires import Tripwires


def run(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), resume: bool = False, console: Console | None = None) -> Result:
    """Trains and evaluates as `recipe` (a YAML file, a dict or a Recipe) says; everything lands in its `output_dir`.

    overrides: "train.max_steps=50", ... With resume, goes on from the newest checkpoint in `output_dir`, to the same
    result as a run that was never stopped; one that has ended gives its result. Raises ConfigError for a wrong recipe or data, TrainingStopped where training
    went wrong, CheckpointError where its state cannot be written or read, Interrupted after SIGTERM or SIGINT.
    """
    given, recipe = recipe, load_recipe(recipe, overrides)
    console = console or Console(stderr=True)
    accelerator = one_accelerator(recipe)
    console.quiet = console.quiet or not accelerator.is_main_process
    folder = open_folder(recipe, resume)
    if resume and (ended := Result.read(folder)) is not None:
        console.print(f"the run in {folder} has ended: there is nothing to resume, and this is its result", highlight=False)
        return ended
    if not resume:
        must_not_replace(folder, recipe)
    forget_peak()
    keep_few_kernels()

    tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
    sets = load_sets(recipe, tokenizer, console)
    asked, recipe = recipe, fitted(recipe, tokenizer, sets, accelerator, console, folder / MICRO_BATCH_FILE if resume else None)
    set_seed(recipe.train.seed)
    model, _ = load(
        recipe.model.name, recipe.quantize, "float32" if recipe.train.full_finetuning else resolve_dtype(recipe.model.dtype),
        device=accelerator.device, attention=recipe.model.attention, revision=recipe.model.revision,
    )  # fmt: skip
    if recipe.attends_within_documents:
        attend_within_documents(model)
    if recipe.data.packing:
        data.check_isolation(model)
    handles = {}
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}  # by design, such as Marian's positions
    if not recipe.train.full_finetuning or recipe.methods:
        try:
            summary = methods.attach(model, recipe.build_methods())
        except ValueError as error:  # a target that matches nothing, say
            raise ConfigError(f"methods: {error}") from error
        handles = methods.attachment(model).handles
        console.print(str(summary), highlight=False, markup=False, soft_wrap=True)
        if recipe.train.optimizer == "auto" and accelerator.device.type != "cuda" and any(m.paged_optimizer for m in recipe.build_methods()):
            console.print("no GPU: AdamW runs instead of the paged 8-bit AdamW that qlora would take", highlight=False)
    if recipe.train.full_finetuning:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in fixed)
    training.enable_checkpointing(model, recipe.train.gradient_checkpointing)
    if recipe.train.compile:
        try:
            console.print(f"compiles {compile_blocks(model)} blocks in the first steps", highlight=False)
        except ValueError as error:
            raise ConfigError(f"train.compile: {error}; leave it out") from error
    loss = TokenLoss(model)
    optimizer = build_optimizer(model, recipe.train.learning_rate, recipe.train.weight_decay, recipe.train.optimizer)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    eight_bit = not isinstance(optimizer, torch.optim.AdamW)
    saved, states = sum(p.nbytes for p in trained), sum(forecast.state_bytes(p, eight_bit) for p in trained)
    if not resume:
        if asked.train.micro_batch_size == "auto":
            recipe = confirmed(recipe, loss, sets["rows"], states, accelerator, handles, console)
        must_have_room(folder, recipe.train, recipe.train.steps(len(sets["rows"])), saved, saved + states)
        if accelerator.is_main_process:
            start_folder(folder, asked)
            if recipe is not asked:
                write_json(folder / MICRO_BATCH_FILE, recipe.train.micro_batch_size)
    accelerator.wait_for_everyone()
    tripwires = Tripwires(
        model, handles, recipe.train.warn_only, lambda text: console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True),
        lambda flags: accelerator.reduce(flags, "sum"),
    )  # fmt: skip
    scores = Scorer(recipe, model, tokenizer, loss, sets, console, accelerator.is_main_process, tripwires.quiet)
    before = scores.before(folder, resume) if recipe.eval.before else {}
    if accelerator.num_processes > 1:  # after what all must start from alike: each drops out its own units
        torch.manual_seed(recipe.train.seed + accelerator.process_index)
        for handle in handles.values():
            handle.on_process(accelerator.process_index)
    accelerator.init_trackers("peftkit", flat(recipe.model_dump()))
    energy = None if resume else energy_joules()  # of a resumed run only its last part would be counted
    try:
        stats = train(recipe, loss, model, optimizer, sets, accelerator, folder, handles, console, resume, scores, tripwires)
    except Interrupted as interrupted:
        interrupted.add_note(f"go on with: {resume_line(given, overrides, accelerator.num_processes, accelerator.device.type)}")
        raise
    used = energy_used(energy)
    accelerator.wait_for_everyone()
    adapter = save(model, tokenizer, recipe, folder) if accelerator.is_main_process else {}  # before anything else can fail
    after = scores.score("after", folder / "predictions.jsonl")
    accelerator.log({f"after/{key}": value for key, value in after.items() if isinstance(value, (int, float))}, step=stats.steps)
    for tracker in accelerator.trackers:  # not accelerator.end_training(), which would also end the processes' group under a notebook's next run
        tracker.finish()
    result = Result(before, after, stats.summary() | used, adapter, asked.model_dump(), versions(), machine(), str(folder))
    if accelerator.is_main_process:
        plot_loss(folder / "metrics.jsonl", folder / "loss.png", before.get("loss"), after.get("loss"))
        write_json(folder / "result.json", result.to_json())  # from here on the run has ended
        if not recipe.train.keeps_checkpoints:  # but the one that a stop during the last evaluation would have gone on from
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


# ------------------------------------------------------------------------------------------------- the steps of the way


def one_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate for processes and devices alone: precision and accumulation are the recipe's. Raises ConfigError."""
    if split := [name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"]:
        raise ConfigError(
            f"accelerate is set to {split[0]}, which splits the parameters: adapters and checkpoints of split models are not written here yet; launch on "
            "several devices without it (accelerate launch --multi_gpu), or train in your own loop with peftkit.attach"
        )
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), log_with=list(recipe.train.report_to) or None, project_dir=recipe.output_dir
    )
    if not accelerator.is_main_process:
        logging.getLogger("peftkit").setLevel(logging.ERROR)
    asked = "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    if asked and accelerator.num_processes == 1:  # what `accelerate launch` leaves in the environment of the one process it starts then
        raise ConfigError(
            "accelerate launch was asked for several processes and started one, as it does where it sees no second GPU: on CPUs launch with "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m peftkit run ...`, on GPUs look at CUDA_VISIBLE_DEVICES"
        )
    if accelerator.mixed_precision != "no":
        raise ConfigError(f"accelerate is set to {accelerator.mixed_precision}; model.dtype sets the precision here: launch with --mixed_precision no")
    if recipe.train.batch_size < accelerator.num_processes:
        raise ConfigError(f"train.batch_size: {recipe.train.batch_size} rows cannot be shared by {accelerator.num_processes} processes")
    return accelerator


def resume_line(recipe: Any, overrides: Sequence[str], processes: int, device: str) -> str:
    """What a person types to go on with an interrupted run."""
    if not isinstance(recipe, (str, Path)):
        return "peftkit.run(recipe, resume=True)"
    several = {"cpu": "ACCELERATE_USE_CPU=true torchrun --nproc_per_node"}.get(device, "accelerate launch --num_processes")
    launch = f"{several} {processes} -m peftkit" if processes > 1 else "peftkit"
    return f"{launch} run {shlex.join([str(recipe), *overrides])} --resume"


def load_sets(recipe: Recipe, tokenizer: Any, console: Console, splits: Sequence[Literal["train", "eval"]] = ("train", "eval")) -> dict[str, Any]:
    """The examples of these splits and of every retained set, "rows" as training puts its examples together, and "choices" where they are asked for.

    Raises ConfigError where there is nothing to train on.
    """
    if tokenizer is None:
        raise ConfigError(f"model: {recipe.model.name} holds no tokenizer, and training needs one")
    sets: dict[str, Any] = {}
    pairs = reads_with_encoder(load_config(recipe.model.name, recipe.model.revision))
    for split in splits:
        sets[split], report = data.load_examples(recipe.data, tokenizer, split, pairs)
        for line in report.lines():
            console.print(line, highlight=False, markup=False)
    if "train" in sets:
        sets["rows"] = data.make_rows(sets["train"], recipe.data)
    for name in recipe.eval.retained:
        sets[name], _ = data.load_examples(recipe.data.alone(name, recipe.eval.retained_rows), tokenizer, "train", pairs)
    generating = [metric for metric in recipe.eval.metrics if metric in evaluate.GENERATING]
    for name in recipe.eval.retained + (["eval"] if generating else []):
        evaluate.must_have_answers(generating, name, sets[name])
    if "rouge" in generating:
        evaluate.must_have_words([example.answer for example in sets["eval"]])
    if "choice_accuracy" in recipe.eval.metrics:
        questions, notes = data.load_choices(recipe.data, tokenizer, recipe.eval.choices, pairs)
        sets["choices"] = [evaluate.ChoiceRow(q.where, q.candidates, q.correct) for q in questions]
        for line in notes:
            console.print(line, highlight=False, markup=False)
    return sets


def fitted(recipe: Recipe, tokenizer: Any, sets: dict[str, Any], accelerator: Accelerator, console: Console, recorded: Path | None = None) -> Recipe:
    """The recipe with a number for `micro_batch_size: auto`: the recorded one, else the most rows that the forecast says fit. Raises ConfigError."""
    if recipe.train.micro_batch_size != "auto":
        return recipe
    if recorded is not None and recorded.exists():
        count = json.loads(recorded.read_text())
        console.print(f"micro_batch_size auto: {count} rows at a time, as before", highlight=False, markup=False)
        return recipe.with_micro_batch(count)
    config, problem = load_config(recipe.model.name, recipe.model.revision), None
    plan = forecast.plan_of(recipe, tokenizer, sets["rows"], sets["eval"], reads_with_encoder(config))
    try:
        recipe, said = forecast.with_micro_batch(recipe, config, plan, accelerator.num_processes)
        console.print(said, highlight=False, markup=False)
    except ConfigError as error:
        problem = str(error)
    together(problem)
    return recipe


def confirmed(
    recipe: Recipe, loss: TokenLoss, rows: data.Rows, states: int, accelerator: Accelerator, handles: dict[str, methods.Handle], console: Console
) -> Recipe:  # fmt: skip
    """The recipe with the forecast's micro-batch tried, forward and backward, on the longest rows: half as many rows for as long as memory is short.

    It is tried beside `states` bytes, which the optimizer will take, and where micro-batches accumulate beside gradients. Leaves no trace in parameters and
    generators. Raises ConfigError where not even one row fits, on all devices alike.
    """
    count, longest = int(recipe.train.micro_batch_size or 1), forecast.sizes_of(rows).tokens.argsort(kind="stable")[::-1]
    before = training.randomness(handles)
    loss.train()
    while True:
        short, beside = None, torch.empty(0)
        try:
            beside = torch.empty(states, dtype=torch.uint8, device=accelerator.device)
            for _ in range(1 + (recipe.train.batch_size > count * accelerator.num_processes)):
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=autocasts(recipe)):
                    loss(**to_batch([rows[int(i)] for i in longest[:count]], loss))[0].backward()
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
                raise
            short = str(error).splitlines()[0]
        del beside
        for parameter in loss.parameters():
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if short is None or count == 1:
            break
        count //= 2
        console.print(f"micro_batch_size auto: the longest rows need more than is there ({short}); {count} at a time", highlight=False, markup=False)
    training.set_randomness(before, handles)
    together(short and f"train.micro_batch_size: the longest row alone is too much ({short}): shorten data.max_length, set train.gradient_checkpointing")
    return recipe.with_micro_batch(min(gather_object([count])))  # of all devices


def together(problem: str | None) -> None:
    """Raises ConfigError on every device where one has a problem: alone it would leave the others waiting for it."""
    if found := [text for text in gather_object([problem]) if text]:
        raise ConfigError(found[0])


def autocasts(recipe: Recipe) -> bool:
    """Whether the forward runs in bfloat16 over weights of higher precision."""
    return recipe.train.full_finetuning and resolve_dtype(recipe.model.dtype) == torch.bfloat16


def train(
    recipe: Recipe, loss: TokenLoss, model: Any, optimizer: Any, sets: dict[str, Any], accelerator: Accelerator, folder: Path,
    handles: dict[str, methods.Handle], console: Console, resume: bool, scores: Scorer, tripwires: Tripwires,
) -> training.TrainStats:  # fmt: skip
    """The training stage with its rows packed or not, its progress bar, metrics.jsonl and trackers."""
    rows = sets["rows"]
    grouped = recipe.data.group_by_length and not recipe.data.packing
    steps = recipe.train.steps(len(rows))
    found = checkpoints(folder / "checkpoints") if resume else []
    start = int(found[-1].name.removeprefix("step-")) if found else 0
    log = MetricsLog(folder / "metrics.jsonl", start) if accelerator.is_main_process else None
    latest = ""  # evaluation loss, for the progress bar
    with bar(console, "training", steps, start) as shown:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            memory = human(metrics["peak_memory_bytes"])
            shown.advance(1, f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s  {memory}{latest}")
            if step % recipe.train.log_every == 0 or step in (1, steps):
                report(step, {key: value for key, value in metrics.items() if key != "steps"})

        def on_evaluation(step: int, value: float) -> None:
            nonlocal latest
            latest = f"  eval loss {value:.4f}"
            report(step, {"eval_loss": value})

        def report(step: int, values: dict[str, float]) -> None:
            if log is not None:
                log.write({"step": step, **values})
            accelerator.log(values, step=step)

        return training.train(
            loss, model, optimizer, rows, lambda part: to_batch(part, loss),
            lambda row: sum(len(example.input_ids) for example in row),
            lambda row: sum(sum(example.trained[1:]) for example in row),
            recipe.train, accelerator, folder / "checkpoints", handles, on_step, resume,
            autocast=autocasts(recipe),
            lengths=sets["train"].lengths if grouped else None, rows_id=sets["train"].checksum,
            where=lambda row: [example.where for example in row],
            evaluate=scores.loss_now if sets["eval"] else None, on_evaluation=on_evaluation, tripwires=tripwires,
            saves_last=recipe.train.keeps_checkpoints or not recipe.train.full_finetuning,  # of all weights it would be thrice the model
        )  # fmt: skip


def to_batch(rows: Sequence[Sequence[data.Example]], loss: TokenLoss) -> dict[str, Any]:
    """The loss's input for packed or single rows, on the model's device."""
    model: Any = loss.model
    pad = getattr(model.config, "pad_token_id", None) or getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    batch = data.collate_pairs([example for row in rows for example in row], pad) if reads_with_encoder(model.config) else data.collate(rows, pad, widths=True)
    return {key: value.to(model.device) for key, value in batch.items() if key != "document_lengths"}


class Scorer:
    """Evaluates before and after training, with progress and the single answers kept."""

    def __init__(self, recipe: Recipe, model: Any, tokenizer: Any, loss: TokenLoss, sets: dict[str, Any], console: Console, writes: bool = True,
                 guard: Callable[[str], AbstractContextManager[Any]] = nullcontext):  # fmt: skip
        self.guard = guard
        self.recipe, self.model, self.tokenizer, self.loss, self.console, self.writes = recipe, model, tokenizer, loss, console, writes
        self.main = evaluate.EvalSet("eval", sets["eval"], sets.get("choices", ())) if sets["eval"] else None
        self.retained = [evaluate.EvalSet(name, sets[name]) for name in recipe.eval.retained]

    def before(self, folder: Path, resume: bool) -> dict[str, Any]:
        """The scores of the base; a resumed run keeps the ones it took at its start."""
        kept = folder / "before.json"
        if resume and kept.exists():
            return json.loads(kept.read_text())
        values = self.score("before", None)
        if self.writes:
            write_json(kept, values)
        return values

    def score(self, when: str, predictions: Path | None) -> dict[str, Any]:
        total = evaluate.steps(self.main, self.retained, self.recipe.eval)
        if not total:
            return {}
        with bar(self.console, f"evaluation {when} training", total) as shown, self.guard(f"{when} training"), uncompiled():
            found = evaluate.evaluate(
                self.model, self.tokenizer, self.loss, self.main, self.retained, self.recipe.eval,
                lambda examples: to_batch([[example] for example in examples], self.loss), lambda count: shown.advance(count),
            )  # fmt: skip
        if predictions is not None and self.writes:
            lines = [
                json.dumps({
                    "set": name, "index": i, "correct": p.correct, "prompt": prompt, "prediction": p.prediction, "answer": p.answer,
                }, ensure_ascii=False)
                for name, answers in found.predictions.items() for i, (p, prompt) in enumerate(zip(answers, self._prompts(name), strict=True))
            ]  # fmt: skip
            predictions.write_text("".join(line + "\n" for line in lines))
        return found.values

    def _prompts(self, name: str) -> list[str]:
        """The prompts of a set of predictions as text, without the template's special tokens."""
        by_set: dict[str, Any] = {each.name: each.examples for each in self.retained}
        if self.main is not None:  # of the rows of "eval", some may have no choices
            by_set |= {"eval": self.main.examples, "choices": [question.candidates[0] for question in self.main.choices]}
        return [self.tokenizer.decode(example.prompt_ids, skip_special_tokens=True).strip() for example in by_set[name]]

    def loss_now(self) -> float:
        """The loss on the evaluation set, in the middle of training."""
        config = self.recipe.eval.model_copy(update={"metrics": ["loss"]})
        with uncompiled():
            found = evaluate.evaluate(
                self.model, self.tokenizer, self.loss, self.main, [], config, lambda examples: to_batch([[example] for example in examples], self.loss)
            )
        return found.values["loss"]


def save(model: Any, tokenizer: Any, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Writes the adapter (or the whole model, after full finetuning) and says how large it is."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    modules = sum(methods.describe(model).modules.values()) if recipe.methods else 0
    target = folder / ("model" if recipe.train.full_finetuning else "adapter")
    if recipe.train.full_finetuning:
        if recipe.methods:
            methods.detach(model)
        with uncompiled():
            write_verified(model, tokenizer, target, keep=True)
    else:
        writing = folder / ".writing-adapter"  # renamed once it is whole
        shutil.rmtree(writing, ignore_errors=True)
        save_adapter(model, writing, tokenizer=tokenizer, recipe=recipe.model_dump())
        shutil.rmtree(target, ignore_errors=True)
        os.rename(writing, target)
    return {"trainable_parameters": trained, "bytes": sum(f.stat().st_size for f in target.glob("*.safetensors")), "modules": modules}
