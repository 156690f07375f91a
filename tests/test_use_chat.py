"""Chat and streamed answers: the same texts as without streaming, several turns, the adapter on, off and side by side, from lines of a file."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch
from conftest import wake

import peftkit as pk
from peftkit.chat import Chat
from peftkit.config import ConfigError
from peftkit.evaluate import generate_answers, stream_answer
from peftkit.use import answers, find_origin, load_adapted, prompt_ids, room, score_tasks, template_ids

QUESTION = "Copy these words: red seven home"


@pytest.fixture(scope="module")
def adapted():
    model, tokenizer = pk.load("builtin:tiny", dtype="float32")
    pk.attach(model, pk.LoRA(r=4, alpha=32))
    wake(model)
    return model.eval(), tokenizer


@pytest.fixture
def chat(adapted):
    said: list[str] = []
    made = Chat(*adapted, True, said.append, max_new_tokens=12)
    made.said = said
    return made


def shown(chat: Chat) -> str:
    text = "".join(chat.said)
    chat.said.clear()
    return text


def answer(adapted, ids: list[int], on: bool) -> str:
    model, tokenizer = adapted
    with pk.adapters_disabled(model) if not on else torch.no_grad():
        return generate_answers(model, tokenizer, [ids], 12, 1)[0]


def test_a_streamed_answer_is_the_answer_and_comes_in_pieces(adapted):
    model, tokenizer = adapted
    pieces: list[str] = []
    ids = prompt_ids(QUESTION, tokenizer)
    with pk.adapters_disabled(model):
        assert stream_answer(model, tokenizer, ids, 12, pieces.append) == answer(adapted, ids, False) == "".join(pieces).strip()
    assert len(pieces) > 1


def test_side_by_side_gives_what_each_gives_alone(chat, adapted):
    ids = prompt_ids(QUESTION, adapted[1])
    chat.line("/adapter both")
    found = chat.say(QUESTION)
    assert found == {"base": answer(adapted, ids, False), "with adapter": answer(adapted, ids, True)}
    assert found["base"] != found["with adapter"], "the adapter does something"
    assert f"base: {found['base']}" in shown(chat)


def test_turns_are_remembered_and_reset_forgets(chat, adapted):
    chat.line("/adapter off")
    first = chat.say(QUESTION)["base"]
    second = chat.say("And these: blue")["base"]
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first}, {"role": "user", "content": "And these: blue"}]
    assert second == answer(adapted, template_ids(turns, adapted[1]), False)
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant", "user", "assistant"]
    chat.line("/reset")
    assert chat.messages == [] and chat.say(QUESTION)["base"] == first


def test_a_system_message_stays_over_a_reset(chat):
    chat.line("/system Answer in one word.")
    chat.say(QUESTION)
    chat.line("/reset")
    assert chat.messages == [{"role": "system", "content": "Answer in one word."}]
    chat.line("/system")
    assert chat.messages == []


def test_commands_that_are_none_and_bad_arguments(chat, adapted):
    chat.line("/rest")
    assert "no command /rest; did you mean '/reset'?" in shown(chat)
    chat.line("/adapter maybe")
    assert "/adapter on, off or both" in shown(chat) and chat.adapter == "on"
    chat.line("")
    assert shown(chat) == "" and chat.line("/quit") is False
    plain = Chat(*adapted, False, chat.said.append)
    plain.line("/adapter both")
    assert "has no adapter" in shown(chat) and plain.adapter == "off"
    with pytest.raises(ConfigError, match="no tokenizer"):
        Chat(adapted[0], None, True, print)


def test_a_conversation_that_is_too_long_is_said_and_answers_fit(chat, adapted):
    longest = adapted[0].config.max_position_embeddings
    assert chat.say("word " * longest) == {} and f"the model reads {longest}: /reset" in shown(chat)
    assert chat.messages == []


def test_ctrl_c_stops_the_answer_and_not_the_chat(chat, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("peftkit.chat.stream_answer", stopped)
    chat.lines(iter([QUESTION, "/help", "/quit", "never read"]))
    told = shown(chat)
    assert "stopped" in told and "/adapter on|off|both" in told and chat.messages == []


def test_a_temperature_draws_and_a_seed_repeats(adapted):
    model, tokenizer = adapted
    ids = prompt_ids(QUESTION, tokenizer)

    def drawn(seed: int) -> str:
        torch.manual_seed(seed)
        return stream_answer(model, tokenizer, ids, 12, lambda text: None, temperature=2.0)

    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in range(4)}) > 1


def test_the_command_reads_lines_where_there_is_no_terminal(tmp_path, adapted):
    """A process of its own with a pipe for a terminal: commands and messages in, a transcript without escape codes out."""
    pk.save_adapter(adapted[0], tmp_path / "adapter")
    lines = f"{QUESTION}\n/adapter both\n{QUESTION}\n"
    command = [sys.executable, "-m", "peftkit", "chat", "--adapter", str(tmp_path / "adapter"), "--model", "builtin:tiny", "--max-new-tokens", "4"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("builtin:tiny with its adapter; /help")
    assert done.stdout.count("with adapter: ") == 2 and done.stdout.count("base: ") == 1
    assert "\x1b[" not in done.stdout and "Traceback" not in done.stderr


def test_typed_lines_end_with_the_input(monkeypatch):
    from peftkit.cli.use import _typed

    lines = iter(["one", KeyboardInterrupt, "two", EOFError])

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert list(_typed()) == ["one", "two"]


# --- one answer ---------------------------------------------------------------------------------------------------------------


def test_an_answer_ends_where_the_models_positions_do(adapted):
    """Beyond them GPT-2 has no row for a position, and a rotary model makes noise: neither is left to the library."""
    model, _ = adapted
    longest = model.config.max_position_embeddings
    assert room(model, [1] * 10, 5) == 5 and room(model, [1] * (longest - 3), 128) == 3
    with pytest.raises(ConfigError, match=f"the prompt has {longest} tokens and the model reads {longest}"):
        room(model, [1] * longest, 1)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        room(model, [], 1)
    with pytest.raises(ConfigError, match="the model reads"):
        answers("word " * longest, None, "builtin:tiny", None, 8)


def test_the_base_and_attention_of_an_adapter_are_those_it_was_trained_with(tmp_path):
    """Taken out of its run: the config names where builtin:tiny lay on that machine."""
    rows = {"train": "builtin:copy/train", "train_rows": 8}
    made = {"model": {"name": "builtin:tiny", "attention": "eager"}, "methods": ["lora"], "data": rows, "train": {"max_steps": 1, "batch_size": 2}}
    pk.run(made | {"output_dir": str(tmp_path / "run")})
    assert find_origin(str(tmp_path / "run")).attention == "eager"
    moved = (tmp_path / "run" / "adapter").rename(tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/another/machine/peftkit/builtin/tiny"}))
    origin = find_origin(str(moved))
    assert (origin.model, origin.attention) == ("builtin:tiny", "eager")
    assert load_adapted(origin)[0].config._attn_implementation == "eager"


def test_options_of_data_are_refused_where_the_harness_brings_its_own(tmp_path):
    with pytest.raises(ConfigError, match=r"data.eval=x: --tasks brings data"):
        score_tasks("quickstart", ["data.eval=x"], None, tasks=["arc_easy"])


def test_a_closed_input_is_an_empty_one():
    command = f"{sys.executable} -m peftkit chat --model builtin:tiny <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "/help lists the commands" in done.stdout, done.stderr
