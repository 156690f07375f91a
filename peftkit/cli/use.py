"""peftkit eval, generate, merge: what one does with a trained adapter."""

from __future__ import annotations

from typing import Annotated

import typer

Adapter = Annotated[str | None, typer.Option("--adapter", help="A run folder or an adapter folder.")]
Model = Annotated[str | None, typer.Option("--model", help="The base (hub id, folder, builtin:tiny); by default what the adapter was trained on.")]
Quantize = Annotated[str | None, typer.Option("--quantize", help="nf4, fp4, int8 or none; by default what the run used.")]


def evaluate(recipe: Annotated[str, typer.Argument(help="A recipe or a run folder.")],
             overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
             adapter: Adapter = None) -> None:  # fmt: skip
    """Score a run's adapter, another adapter, or (--adapter none) the base, on the recipe's evaluation data."""
    from peftkit.cli.common import quiet_libraries, stderr, stdout
    from peftkit.console import table
    from peftkit.use import score

    quiet_libraries()
    values = score(recipe, overrides or [], adapter, stderr())
    stdout().print(table(f"{adapter or recipe}", ["", "score"], [[name, value] for name, value in values.items() if name != "retained"]))


def generate(prompt: Annotated[str, typer.Argument(help="The user's message (or the start of a text, for a base without chat template).")],
             adapter: Adapter = None, model: Model = None, quantize: Quantize = None,
             max_new_tokens: Annotated[int, typer.Option(min=1)] = 128) -> None:  # fmt: skip
    """Answer a prompt, with the adapter and without it."""
    from rich.text import Text

    from peftkit.cli.common import quiet_libraries, stdout
    from peftkit.use import answers

    quiet_libraries()
    console = stdout()
    for who, answer in answers(prompt, adapter, model, quantize, max_new_tokens).items():
        console.print(Text(f"{who}:", style="bold"), Text(answer), soft_wrap=True)


def merge(adapter: Annotated[str, typer.Argument(help="A run folder or an adapter folder.")],
          output: Annotated[str, typer.Argument(help="The folder for the merged model.")],
          model: Model = None, quantize: Quantize = None,
          onto: Annotated[str, typer.Option(help="trained: the weights it was trained on, dequantised; original: the unquantised weights.")] = "trained",
          ) -> None:  # fmt: skip
    """Fold an adapter into its base: a plain model folder, checked against the adapted model."""
    from peftkit.cli.common import quiet_libraries, stdout
    from peftkit.use import merge_to

    quiet_libraries()
    check = merge_to(adapter, output, model, quantize, onto)
    stdout().print(f"{check}\nmerged model: {output}", highlight=False, soft_wrap=True)
