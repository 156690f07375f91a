"""What one does with trained adapters: answer, score, average. The adapter's run folder says what base it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2.exceptions import TemplateError
from rich.console import Console

from peftkit import evaluate
from peftkit.adapter_file import CARD_FILE, CONFIG_FILE, local_folder, read_json
from peftkit.average import AverageReport, average
from peftkit.checkpoint import load_adapter
from peftkit.config import ConfigError, read_yaml, suggest, validate
from peftkit.loss import TokenLoss
from peftkit.methods import adapters_disabled
from peftkit.model import load, reads_with_encoder
from peftkit.recipe import Recipe, load_recipe, recipe_of_run
from peftkit.run import Scorer, load_sets

QUANTIZATIONS = ("nf4", "fp4", "int8")


class Origin(NamedTuple):
    """An adapter folder (None where only a base is meant) and the base it belongs to."""

    adapter: Path | None
    model: str
    quantize: str | None
    dtype: str
    revision: str | None = None
    attention: str = "auto"


def find_origin(adapter: str | None, model: str | None = None, quantize: str | None = None) -> Origin:
    """The adapter and base that a user means by a run folder or adapter folder, and by options that go before it."""
    folder = local_folder(adapter) if adapter else None
    found, stored, dtype, revision, attention = model, None, "auto", None, "auto"
    if folder is not None:
        run_folder = folder.parent if folder.name == "adapter" else folder
        if not folder.is_dir():
            near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise ConfigError(f"--adapter: there is no folder {folder}{suggest(folder.name, near)}")
        if (run_folder / "recipe.yaml").exists():
            recipe = validate(Recipe, read_yaml(run_folder / "recipe.yaml"))  # not load_recipe: it would ask for the machine it was trained on
            found, stored, dtype = model or recipe.model.name, recipe.quantize, recipe.model.dtype
            revision, attention = None if model else recipe.model.revision, recipe.model.attention
        folder = folder / "adapter" if (folder / "adapter" / CONFIG_FILE).exists() else folder
        if not (folder / CONFIG_FILE).exists() and (run_folder / "model").is_dir():
            raise ConfigError(
                f"{folder} was finetuned in full and has no adapter; its model is {run_folder / 'model'}, a plain one already: nothing to merge or export, and "
                "`generate` and `chat` take it as --model"
            )
        if not (folder / CONFIG_FILE).exists():
            raise ConfigError(f"--adapter: {folder} holds no {CONFIG_FILE}: it is neither a run folder with an adapter nor an adapter folder")
        written = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
        if not (run_folder / "recipe.yaml").exists() and (folder / CARD_FILE).exists():  # an adapter that was taken out of its run
            card = read_json(folder / CARD_FILE)
            kind, revision = (card.get("stored") or {}).get("quantization"), None if model else card.get("revision")
            stored = kind if kind in QUANTIZATIONS else None
            trained = (card.get("recipe") or {}).get("model") or {}
            dtype, attention = trained.get("dtype", "auto"), trained.get("attention", "auto")
            if str(trained.get("name")).startswith("builtin:"):  # what the config names is where it lay on the machine of the training
                written = trained["name"]
        found = found or written
    if found is None:
        raise ConfigError("neither --adapter nor --model says which base is meant")
    if attention == "flash_attention_2" and not torch.cuda.is_available():
        attention = "auto"  # a GPU's; the same numbers up to rounding
    return Origin(folder, found, quantization(quantize, stored), dtype, revision, attention)


def quantization(option: str | None, stored: str | None) -> str | None:
    """How the base is to be stored: as --quantize says, else as it was. Raises ConfigError."""
    if option not in (None, "none", *QUANTIZATIONS):
        raise ConfigError(f"--quantize: unknown {option!r}{suggest(str(option), (*QUANTIZATIONS, 'none'))} (there are: nf4, fp4, int8, none)")
    return None if option == "none" else option or stored


def load_adapted(origin: Origin, another_base: bool = False) -> tuple[Any, Any]:
    """(model in eval mode with its adapter, tokenizer). another_base: see `load_adapter`."""
    model, tokenizer = load(origin.model, origin.quantize, origin.dtype, attention=origin.attention, revision=origin.revision)  # type: ignore[arg-type]
    if origin.adapter is not None:
        load_adapter(model, origin.adapter, another_base=another_base, tokenizer=tokenizer)
    return model.eval(), tokenizer


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """A user's message through the chat template, or the text as it is where there is none."""
    if tokenizer is None:
        raise ConfigError("the base has no tokenizer, so it cannot read a prompt")
    if tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    return template_ids([{"role": "user", "content": prompt}], tokenizer)


def template_ids(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """The conversation through the chat template, up to where the assistant's answer begins. Raises ConfigError where the template refuses it."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ConfigError(f"the chat template refuses this conversation ({', '.join(turn['role'] for turn in messages)}): {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def room(model: Any, prompt: list[int], wanted: int) -> int:
    """The tokens that an answer may have, `wanted` or what the model's positions leave of it. Raises ConfigError where they leave none, and for no prompt."""
    if not prompt:
        raise ConfigError("the prompt is empty, and there is no chat template to make one of it")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return wanted
    before = 0 if reads_with_encoder(model.config) else len(prompt)  # an encoder's prompt has positions of its own
    if len(prompt) > longest or before >= longest:
        raise ConfigError(f"the prompt has {len(prompt)} tokens and the model reads {longest}")
    return min(wanted, longest - before)


def answers(
    prompt: str, adapter: str | None, model: str | None, quantize: str | None, max_new_tokens: int, write: Callable[[str], None] | None = None
) -> dict[str, str]:  # fmt: skip
    """The greedy answer of the base and, where there is an adapter, with it. `write` gets the texts as they are made."""
    origin = find_origin(adapter, model, quantize)
    adapted, tokenizer = load_adapted(origin)
    ids = prompt_ids(prompt, tokenizer)
    max_new_tokens = room(adapted, ids, max_new_tokens)

    def answer(who: str) -> str:
        if write is None:
            return evaluate.generate_answers(adapted, tokenizer, [ids], max_new_tokens, 1)[0]
        write(f"{who}: ")
        text = evaluate.stream_answer(adapted, tokenizer, ids, max_new_tokens, write)
        write("\n")
        return text

    with nullcontext() if origin.adapter is None else adapters_disabled(adapted):
        found = {"base": answer("base")}
    if origin.adapter is not None:
        found["with adapter"] = answer("with adapter")
    return found


def score(recipe: str, overrides: list[str], adapter: str | None, console: Console, quantize: str | None = None) -> dict[str, Any]:
    """The recipe's metrics for the adapter of a run folder, another adapter, or the base (adapter "none")."""
    config, adapted, tokenizer = load_for(recipe, overrides, adapter, quantize)
    return Scorer(config, adapted, tokenizer, TokenLoss(adapted), load_sets(config, tokenizer, console, ["eval"]), console).score("of", None)


def score_tasks(recipe: str, overrides: list[str], adapter: str | None, quantize: str | None = None, **options: Any) -> dict[str, float]:
    """Tasks of lm-evaluation-harness for the same models as `score`; options are those of `evaluate.harness_scores`."""
    for override in overrides:
        if override.startswith(("data.", "eval.")) and not override.startswith("eval.batch_size="):
            raise ConfigError(f"{override}: --tasks brings data and metrics of its own; of these sections it takes eval.batch_size alone")
    config, adapted, tokenizer = load_for(recipe, overrides, adapter, quantize)
    return evaluate.harness_scores(adapted, tokenizer, batch_size=config.eval.batch_size, **options)


def load_for(recipe: str, overrides: list[str], adapter: str | None, quantize: str | None = None) -> tuple[Recipe, Any, Any]:
    """(recipe, model in eval mode, tokenizer) for a run folder, the adapter in it, or a recipe, and an adapter that goes before its own.

    quantize: how the base is stored, "none" for not at all; by default as the recipe says.
    """
    folder = Path(recipe)
    if folder.name == "adapter" and not (folder / "recipe.yaml").exists() and (folder.parent / "recipe.yaml").exists():
        adapter, folder = adapter or recipe, folder.parent
    config = recipe_of_run(folder, overrides) if folder.is_dir() else load_recipe(folder, overrides)
    if adapter is None:
        adapter = recipe if folder.is_dir() else config.output_dir
    stored = quantization(quantize, config.quantize)
    dtype = "float32" if config.train.full_finetuning else config.model.dtype  # as the run loads it
    if config.train.full_finetuning and adapter != "none":
        if not (Path(adapter) / "model").is_dir():
            raise ConfigError(f"{adapter} holds no folder model, where a run that trains all parameters saves them: it has not ended, or is another run")
        adapted, tokenizer = load(str(Path(adapter) / "model"), stored, dtype, attention=config.model.attention)  # type: ignore[arg-type]
        return config, adapted.eval(), tokenizer
    if adapter == "none":
        return config, *load_adapted(Origin(None, config.model.name, stored, dtype, config.model.revision, config.model.attention))
    base = {"model": config.model.name, "quantize": stored, "dtype": dtype, "revision": config.model.revision, "attention": config.model.attention}
    return config, *load_adapted(find_origin(adapter)._replace(**base))  # type: ignore[arg-type]


def average_to(adapters: list[str], output: str, options: dict[str, Any], console: Console) -> AverageReport:
    """Averages adapters with the options as the command line has them: weights are a text such as "0.5,-1"."""
    text, weights = options.get("weights"), None
    if text is not None:
        try:
            weights = [float(part) for part in text.split(",")]
        except ValueError as error:
            raise ConfigError(f"--weights: {text!r} is no list of numbers such as 0.5,0.3,0.2") from error
    return average(adapters, weights, output, console=console, **{name: value for name, value in options.items() if name != "weights"})
