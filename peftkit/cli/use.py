"""peftkit eval, generate, chat, merge, export: what one does with a trained adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

Adapter = Annotated[str | None, typer.Option("--adapter", help="A run folder, an adapter folder or a hub id.")]
Model = Annotated[str | None, typer.Option("--model", help="The base (hub id, folder, builtin:tiny); by default what the adapter was trained on.")]
Quantize = Annotated[str | None, typer.Option("--quantize", help="nf4, fp4, int8 or none; by default what the run used.")]


def evaluate(recipe: Annotated[str, typer.Argument(help="A recipe or a run folder.")],
             overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
             adapter: Adapter = None, quantize: Quantize = None,
             tasks: Annotated[str | None, typer.Option(rich_help_panel="lm-evaluation-harness", help="Its tasks instead of the recipe's metrics: "
                                                       "arc_easy,hellaswag.")] = None,
             limit: Annotated[int | None, typer.Option(rich_help_panel="lm-evaluation-harness", min=1, help="Examples of each task.")] = None,
             few_shot: Annotated[int | None, typer.Option(rich_help_panel="lm-evaluation-harness", min=0, help="Examples in the prompt.")] = None,
             chat_template: Annotated[bool, typer.Option("--chat-template", rich_help_panel="lm-evaluation-harness",
                                                         help="Prompts go through the chat template.")] = False,
             task_folder: Annotated[str | None, typer.Option(rich_help_panel="lm-evaluation-harness", help="Of further tasks, as YAML files.")] = None,
             json_: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False) -> None:  # fmt: skip
    """Score a run's adapter, another adapter, or (--adapter none) the base, on the recipe's evaluation data."""
    import json

    from rich.markup import escape

    from peftkit.cli.common import quiet_libraries, recipe_path, stderr, stdout
    from peftkit.config import ConfigError
    from peftkit.console import table
    from peftkit.use import score, score_tasks

    quiet_libraries()
    recipe = recipe_path(recipe)
    if tasks is None and (limit is not None or few_shot is not None or chat_template or task_folder is not None):
        raise ConfigError("--limit, --few-shot, --chat-template and --task-folder belong to --tasks")
    if tasks is None:
        values = score(recipe, overrides or [], adapter, stderr(), quantize)
        if not values:
            raise ConfigError(f"{recipe} names nothing to evaluate on: give data.eval=..., such as data.eval=test.jsonl")
    else:
        values = score_tasks(recipe, overrides or [], adapter, quantize, tasks=tasks.split(","), limit=limit, few_shot=few_shot, chat_template=chat_template,
                             folder=task_folder)  # fmt: skip
    if json_:
        print(json.dumps(values))
        return
    rows: list[list[Any]] = [[name, value] for name, value in values.items() if name != "retained"]
    retained: Any = values.get("retained", {})
    rows += [[f"  {name}", value] for name, value in retained.items()]
    stdout().print(table(escape(f"{adapter or recipe}"), ["", "score"], [[escape(name), value] for name, value in rows]))


def generate(prompt: Annotated[str, typer.Argument(help="The user's message (or the start of a text, for a base without chat template).")],
             adapter: Adapter = None, model: Model = None, quantize: Quantize = None,
             max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
             stream: Annotated[bool, typer.Option("--stream", help="Show the words as they come.")] = False) -> None:  # fmt: skip
    """Answer a prompt, with the adapter and without it."""
    from rich.text import Text

    from peftkit.cli.common import quiet_libraries, stdout
    from peftkit.use import answers

    quiet_libraries()
    if stream:
        answers(prompt, adapter, model, quantize, max_new_tokens, _write)
        return
    console = stdout()
    for who, answer in answers(prompt, adapter, model, quantize, max_new_tokens).items():
        console.print(Text(f"{who}:", style="bold"), Text(answer), soft_wrap=True)


def chat(adapter: Adapter = None, model: Model = None, quantize: Quantize = None,
         max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
         temperature: Annotated[float, typer.Option(min=0, max=5, help="0 takes the likeliest token; above, answers are drawn.")] = 0.0,
         seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0) -> None:  # fmt: skip
    """Talk to a model, with its adapter, without it (/adapter off) or both side by side (/adapter both). Reads lines where there is no terminal."""
    import torch

    from peftkit.chat import Chat
    from peftkit.cli.common import quiet_libraries
    from peftkit.use import find_origin, load_adapted

    quiet_libraries()
    origin = find_origin(adapter, model, quantize)
    adapted, tokenizer = load_adapted(origin)
    torch.manual_seed(seed)
    talk = Chat(adapted, tokenizer, origin.adapter is not None, _write, max_new_tokens, temperature)
    talk.hello(origin.model)
    talk.lines(_typed() if sys.stdin and sys.stdin.isatty() else sys.stdin or [])  # it is None where a shell closed it


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _typed() -> Iterator[str]:
    """Lines as a person types them, until the end of the input; Ctrl-C at the prompt takes the line back."""
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def merge(adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER", help="Run folders or adapter folders.")],
          output: Annotated[str | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
          model: Model = None, quantize: Quantize = None,
          onto: Annotated[str | None, typer.Option(help="trained (the default: the weights it was trained on, dequantised), original "
                                                        "(the unquantised weights) or requantised (loses most of the update; says how much).")] = None,
          max_kl: Annotated[float | None, typer.Option(min=0, help="Fails where the mean KL divergence from the adapted model is above this many nats; "
                                                                   "by default 0.01.")] = None,
          dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default what the run used.")] = None,
          weights: Annotated[str | None, typer.Option(rich_help_panel="Averaging", help="One number each: 0.5,0.3,0.2 or 1,-1; by default 1/n.")] = None,
          rank: Annotated[int | None, typer.Option(rich_help_panel="Averaging", min=1, help="Of the result; by default the sum of the ranks.")] = None,
          method: Annotated[str | None, typer.Option(rich_help_panel="Averaging", help="linear (the default), ties or dare.")] = None,
          density: Annotated[float | None, typer.Option(rich_help_panel="Averaging", help="Share of entries that ties (0.2) or dare (0.5) keeps.")] = None,
          seed: Annotated[int | None, typer.Option(rich_help_panel="Averaging", help="Of what dare drops; by default 0.")] = None,
          ) -> None:  # fmt: skip
    """Fold one adapter into its base, or average several into one adapter.

    peftkit merge ADAPTER OUTPUT, or ADAPTER --output OUTPUT: a plain model folder, checked against the adapted model.

    peftkit merge ADAPTER ADAPTER... --output OUTPUT: an adapter folder whose update is the weighted sum of the updates. One adapter with any of
    the averaging options is scaled or brought to a lower rank.
    """
    from peftkit.cli.common import quiet_libraries, stderr, stdout
    from peftkit.config import ConfigError
    from peftkit.fold import MAX_KL, fold
    from peftkit.use import average_to

    options = {"weights": weights, "rank": rank, "method": method, "density": density, "seed": seed}
    averaging = {name: value for name, value in options.items() if value is not None}
    if output is None and len(adapters) == 2 and not averaging:
        [*adapters, output] = adapters
    if output is None:
        raise ConfigError("no folder to write: give --output FOLDER")
    average = len(adapters) > 1 or bool(averaging)
    for name, value in {"--model": model, "--quantize": quantize, "--onto": onto, "--max-kl": max_kl, "--dtype": dtype}.items():
        if average and value is not None:
            raise ConfigError(f"{name} belongs to merging one adapter into its base; averaging needs no base")
    quiet_libraries()
    done = (
        average_to(adapters, output, averaging, stderr())
        if average
        else fold(adapters[0], output, model, quantize, onto or "trained", MAX_KL if max_kl is None else max_kl, dtype)
    )
    stdout().print(f"{done}\n{'averaged adapter' if average else 'merged model'}: {output}", highlight=False, markup=False, soft_wrap=True)


def export(adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A run folder, an adapter folder or a hub id.")],
           output: Annotated[str | None, typer.Argument(metavar="[FOLDER]", help="The folder to write; without it, only tell what servers take.")] = None,
           for_: Annotated[str | None, typer.Option("--for", help="peft, vllm, sglang, tgi or llama.cpp.")] = None,
           form: Annotated[str, typer.Option(help="auto, adapter (as it is), plain (LoRA of one rank, the same update), merged, or approximation "
                                                  "(of DoRA by plain LoRA, its error printed).")] = "auto",
           rank: Annotated[int | None, typer.Option(min=1, help="Of an approximation; by default twice the adapter's.")] = None,
           model: Model = None, quantize: Quantize = None,
           dtype: Annotated[str | None, typer.Option(help="Of a merged model; by default what the run used.")] = None) -> None:  # fmt: skip
    """Say which servers take an adapter as it is, and why others do not; write it in the form that one of them takes."""
    from rich.markup import escape

    from peftkit.cli.common import quiet_libraries, stdout
    from peftkit.config import ConfigError
    from peftkit.console import table
    from peftkit.export import export as export_to
    from peftkit.export import servers_for

    quiet_libraries()
    if (output is None) != (for_ is None):
        raise ConfigError("give both a FOLDER and --for SERVER to write, or none of them to see what servers take")
    if output is None or for_ is None:
        options = {"--form": form != "auto", "--rank": rank, "--model": model, "--quantize": quantize, "--dtype": dtype}
        if given := [name for name, value in options.items() if value]:
            raise ConfigError(f"{', '.join(given)}: of what is written; give a FOLDER and --for SERVER, or leave {'it' if len(given) == 1 else 'them'} out")
        stdout().print(table(escape(adapter), ["server", "takes", "because"], [[escape(cell) for cell in row] for row in servers_for(adapter)]))
        return
    stdout().print(str(export_to(adapter, output, for_, form, rank, model, quantize, dtype)), highlight=False, markup=False, soft_wrap=True)
