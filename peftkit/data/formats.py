"""Brings every known shape of row into one: `Row`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.config import ConfigError, suggest
from peftkit.data.read import BadRow, Record, kind

if TYPE_CHECKING:
    from peftkit.data.config import DataConfig

FORMATS: dict[str, tuple[str, ...]] = {  # the columns each needs; a row is of the first format that it has all columns of
    "prompt/chosen/rejected": ("prompt", "chosen", "rejected"),
    "conversations/chosen/rejected": ("conversations", "chosen", "rejected"),
    "messages/chosen/rejected": ("messages", "chosen", "rejected"),
    "chosen/rejected": ("chosen", "rejected"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
    "text": ("text",),
}
NEEDED = {name for needed in FORMATS.values() for name in needed}
OPTIONAL = {"input", "system", "tools"}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}

Turn = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row in its one normal shape: chat messages, or text."""

    where: str
    messages: list[Turn]
    """`role` and `content` each, `tool_calls` in OpenAI's shape with the arguments as objects, and what else the turn had; empty for a text row."""

    plain_prompt: str | None = None
    """How the prompt reads to a model without a chat template; None for text and for chats, which need one."""

    text: str = ""
    tools: Any = None
    """The tools column as it was read: a list, or its JSON."""

    given: int = 0
    """How many of the messages are the prompt: answers among them are read, not trained."""

    rejected: list[Turn] | None = None
    """Of a preference pair: all messages with the answer that was rejected."""


def find_format(records: Sequence[Record | BadRow], config: DataConfig, source: str) -> str:
    """The format of the first record that has one. Raises ConfigError naming columns found, expected and nearest."""
    columns = config.columns or {}
    rows = [record.columns for record in records if isinstance(record, Record)]
    found = list(dict.fromkeys(name for row in rows for name in row))
    for standard, name in columns.items():
        if name not in found:
            raise ConfigError(f"{source}: data.columns reads {standard!r} from {name!r}, which no row has{suggest(name, found)} ({listing(found)})")
    # A mapped column says which format is meant, even where the rows would also pass for another.
    meant = set(columns) & NEEDED
    for row in rows:
        for form, needed in FORMATS.items():
            if meant <= set(needed) and all(columns.get(name, name) in row for name in needed):
                return form
    if not rows:
        return "unknown"  # every line is a BadRow, and says why
    near = "".join(f"\n  {name!r}{hint}" for name in found if name not in NEEDED and (hint := suggest(name, sorted(NEEDED))))
    raise ConfigError(
        f"{source}: no known row format ({listing(found)}). Known are: {'; '.join(' + '.join(needed) for needed in FORMATS.values())}."
        f" Name the columns in data.columns, as in {{prompt: question, completion: answer}}.{near}"
    )


def listing(found: Sequence[str]) -> str:
    return f"columns found: {', '.join(map(str, found)) or 'none'}"


def normalise(record: Record | BadRow, form: str, config: DataConfig) -> Row | BadRow:
    """The record as a Row, or what is wrong with it."""
    if isinstance(record, BadRow):
        return record
    where, columns, names = record.where, record.columns, config.columns or {}
    needed = [names.get(name, name) for name in FORMATS[form]]
    missing = [name for name in needed if name not in columns]
    if missing:
        near = suggest(missing[0], [name for name in columns if name not in needed])
        return BadRow(where, f"no {', '.join(map(repr, missing))} ({listing(list(columns))}; expected: {', '.join(needed)}{near})")

    def cell(standard: str) -> Any:
        return columns.get(names.get(standard, standard))

    def text(standard: str) -> str:
        return as_text(cell(standard), names.get(standard, standard))

    def turns(standard: str, role: str) -> list[Turn]:
        """The cell as turns: as they are, one alone, or plain text said by `role`."""
        value, name = cell(standard), names.get(standard, standard)
        if isinstance(value, list | dict):
            return as_messages(value if isinstance(value, list) else [value], name)
        return [{"role": role, "content": as_text(value, name)}]

    try:
        if form == "text":
            if not text("text").strip():
                raise ValueError("the text is empty")
            return Row(where, [], text=text("text"))
        prompt_name, *answer_names = FORMATS[form] if form != "chosen/rejected" else ("", "chosen", "rejected")
        plain = None
        if not answer_names:
            prompt, answers = [], [as_messages(cell(form), names.get(form, form))]
        else:
            prompt = turns(prompt_name, "user") if prompt_name else []
            if prompt_name and not isinstance(cell(prompt_name), list | dict):
                plain = text(prompt_name) + "\n"
            answers = [turns(name, "assistant") for name in answer_names]
            opens = [answer[0]["role"] in ("system", "developer", "user") and any(turn["role"] == "assistant" for turn in answer) for answer in answers]
            whole = [begins and answer[: len(prompt)] != prompt for begins, answer in zip(opens, answers, strict=True)]
            if not prompt or (len(answers) > 1 and all(whole)):  # whole conversations bring their own prompt
                prompt, plain = shared_start(*answers), None if prompt else plain
            elif any(whole):
                raise ValueError(f"{answer_names[whole.index(True)]!r} begins with another prompt than {prompt_name!r}")
            answers = [answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer for answer in answers]
        if form == "instruction/output":
            given, instruction = text("input") if cell("input") not in (None, "") else "", text("instruction")
            parts = (("Instruction", instruction), ("Input", given))
            plain = "".join(f"{title}:\n{part}\n\n" for title, part in parts if part) + "Response:\n"
            prompt = [{"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction}]
        system = cell("system") or config.system
        if system and [*prompt, *answers[0]][0]["role"] not in ("system", "developer"):
            prompt = [{"role": "system", "content": as_text(system, "system")}, *prompt]
            plain = f"{system}\n\n{plain}" if plain is not None else None
        if config.loss_on != "all" or len(answers) > 1:
            for answer, name in zip(answers, answer_names or [form], strict=True):
                check_answer(answer, f" of {names.get(name, name)!r}" if len(answers) > 1 else "")
    except (ValueError, TypeError) as error:
        return BadRow(where, str(error))
    given_turns = len(prompt) if answer_names else 0
    rejected = [*prompt, *answers[1]] if len(answers) > 1 else None
    # A model without a chat template can be told one prompt and one answer.
    plain = plain if len(answers[0]) == 1 and answers[0][0]["content"] is not None else None
    return Row(where, [*prompt, *answers[0]], plain, tools=cell("tools"), given=given_turns, rejected=rejected)


def shared_start(first: list[Turn], second: list[Turn]) -> list[Turn]:
    """The prompt of two conversations that differ in their answers."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    # Equal throughout: what follows the last turn that is not the assistant's is the answer all the same.
    while same and first[same - 1]["role"] == "assistant":
        same -= 1
    if not same:
        raise ValueError("'chosen' and 'rejected' do not start with the same turns, and there is no 'prompt'")
    return first[:same]


def as_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):  # JSON knows no NaN, Python's reader does
        raise ValueError(f"{name!r} must be text, found {value}: an empty cell of a table? fill it or leave the row out")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{name!r} must be text, found {kind(value)}")


def as_messages(value: Any, name: str) -> list[Turn]:
    """Turns of `role` and `content`, or of ShareGPT's `from` and `value`, with the roles chat templates know."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} must be a list of turns, found {'an empty one' if value == [] else kind(value)}")
    messages: list[Turn] = []
    calls: list[Turn] = []  # the tools called last, whose results follow
    for number, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} of {name!r} must be an object, found {kind(turn)}")
        keys = ("role", "content") if "role" in turn else ("from", "value")
        if keys[0] not in turn or (keys[1] not in turn and not turn.get("tool_calls")):
            raise ValueError(f"turn {number} of {name!r} needs 'role' and 'content', or 'from' and 'value'; its keys: {', '.join(turn)}")
        role, content = SHAREGPT_ROLES.get(turn[keys[0]], turn[keys[0]]), turn.get(keys[1])
        if role not in ROLES:
            raise ValueError(f"turn {number} of {name!r} has the unknown role {role!r}{suggest(str(role), [*ROLES, *SHAREGPT_ROLES])}")
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise ValueError(f"turn {number} of {name!r}: the {keys[1]} must be text, found {kind(content)}")
        rest = {key: value for key, value in turn.items() if key not in keys and value is not None}
        if turn[keys[0]] == "function_call":
            rest["tool_calls"] = sharegpt_calls(content or "", len(messages))
            content = None if rest["tool_calls"] else content
        if rest.get("tool_calls"):
            rest["tool_calls"] = calls = [with_arguments(call) for call in rest["tool_calls"]]
        elif role == "tool" and calls:  # some templates look for them
            called = rest.get("tool_call_id")
            named = [each for each in calls if each.get("id") == called] if called is not None and any("id" in each for each in calls) else calls
            call = named[0] if named else None
            calls = [each for each in calls if each is not call]
            rest = rest if call is None else {"name": call["function"]["name"]} | ({"tool_call_id": call["id"]} if "id" in call else {}) | rest
        messages.append({"role": role, "content": content, **{key: value for key, value in rest.items() if key != "tool_calls" or value}})
    return messages


def sharegpt_calls(text: str, turn: int) -> list[Turn]:
    """OpenAI's tool calls for ShareGPT's `{"name": ..., "arguments": ...}`, one or a list of them; none where the text is something else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return []
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call for call in calls):
        return []
    # Mistral's templates take ids of nine letters and digits only.
    return [{"id": f"call{turn:03d}{i:02d}"[:9], "type": "function", "function": call} for i, call in enumerate(calls)]


def with_arguments(call: Any) -> Turn:
    """The call with its arguments as an object: templates write them as JSON, and would quote them twice where they are JSON already."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call needs a 'function' with a 'name'")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"the arguments of the call of {function['name']!r} are not JSON ({error.msg}, column {error.colno})") from error
    return call | {"function": function | {"arguments": arguments}}


def check_answer(messages: list[Turn], of: str = "") -> None:
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    if not answers:
        raise ValueError(f"no assistant turn{of} to learn from (roles: {', '.join(turn['role'] for turn in messages)})")
    if not (answers[-1]["content"] or "").strip() and not answers[-1].get("tool_calls"):
        raise ValueError(f"the answer{of} is empty")
