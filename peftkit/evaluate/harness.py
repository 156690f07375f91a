"""Tasks of EleutherAI's lm-evaluation-harness, on a model as it stands here: adapters, 4 bits and all."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from peftkit.config import ConfigError, suggest


def harness_scores(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None = None, few_shot: int | None = None, batch_size: int = 8,
    chat_template: bool = False, folder: str | None = None,
) -> dict[str, float]:  # fmt: skip
    """`task metric` -> value, with its standard error beside it, as the harness computes them.

    limit: examples of each task. few_shot: examples in the prompt; None is the task's own number. chat_template: whether
    prompts go through it. folder: of further tasks, as YAML files. Raises ConfigError where the harness is not installed,
    where the model has no tokenizer, and for unknown tasks.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError('--tasks needs lm-evaluation-harness, which is not installed: pip install "peftkit[harness]"')
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer, and the harness needs one")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"--tasks: the harness has no task {unknown[0]!r}{suggest(unknown[0], manager.all_tasks)}")
    measured = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=_longest(model))
    done = simple_evaluate(
        model=measured, tasks=list(tasks), num_fewshot=few_shot, limit=limit, task_manager=manager, apply_chat_template=chat_template, log_samples=False
    )
    found = {}
    for task, values in (done or {"results": {}})["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and isinstance(value, float | int):
                found[f"{task} {metric}" + (f" ({kind})" if kind != "none" else "")] = float(value)
    return found


def _longest(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
