"""What is trained under the chat templates of the families: multi-turn and tool chats against expectations written by hand."""

from __future__ import annotations

import json

import pytest
from chat_templates import FAMILIES, family_tokenizer

from peftkit.config import ConfigError
from peftkit.data import DataConfig, Example, load_examples, marked_row, render
from peftkit.data.encode import Encoder
from peftkit.data.formats import Row, as_messages
from peftkit.data.render import Renderer

CHAT = {"messages": [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yo"), ("user", "sum?"), ("assistant", "4 é"))]}
CALL = '{"name": "sky", "arguments": {"at": "Rome"}}'
TOOL = '{"type": "function", "function": {"name": "sky"}}'
TURNS = [("human", "w?"), ("function_call", CALL), ("observation", "sun"), ("gpt", "Sunny."), ("human", "ok"), ("gpt", "Bye.")]
TOOL_CHAT = {"conversations": [{"from": who, "value": text} for who, text in TURNS], "tools": '[{"name": "sky"}]'}

MULTI_TURN = {
    "chatml": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[yo<|im_end|>]]\n"
    "<|im_start|>user\nsum?<|im_end|>\n<|im_start|>assistant\n[[4 é<|im_end|>]]\n",
    "qwen3": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[yo<|im_end|>]]\n"
    "<|im_start|>user\nsum?<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\n4 é<|im_end|>]]\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[yo<|eot_id|>]]<|start_header_id|>user<|end_header_id|>\n\nsum?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[4 é<|eot_id|>]]",
    "mistral": "<s>[INST] hi[/INST][[ yo</s>]][INST] sum?[/INST][[ 4 é</s>]]",
    "gemma": "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n[[yo<end_of_turn>]]\n"
    "<start_of_turn>user\nsum?<end_of_turn>\n<start_of_turn>model\n[[4 é<end_of_turn>]]\n",
    "phi3": "<|user|>\nhi<|end|>\n<|assistant|>\n[[yo<|end|>]]\n<|user|>\nsum?<|end|>\n<|assistant|>\n[[4 é<|end|>]]\n<|endoftext|>",
}
WITH_TOOLS = {
    "chatml": f"<|im_start|>system\nTools:\n{TOOL}<|im_end|>\n<|im_start|>user\nw?<|im_end|>\n"
    f"<|im_start|>assistant\n[[<tool_call>\n{CALL}\n</tool_call><|im_end|>]]\n"
    "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>assistant\n[[Sunny.<|im_end|>]]\n"
    "<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n[[Bye.<|im_end|>]]\n",
    "qwen3": f"<|im_start|>system\nTools:\n{TOOL}<|im_end|>\n<|im_start|>user\nw?<|im_end|>\n"
    f"<|im_start|>assistant\n[[<tool_call>\n{CALL}\n</tool_call><|im_end|>]]\n"
    "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>assistant\n[[Sunny.<|im_end|>]]\n"
    "<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nBye.<|im_end|>]]\n",
    "llama3": f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nTools:\n{TOOL}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nw?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    '[[{"name": "sky", "parameters": {"at": "Rome"}}<|eot_id|>]]<|start_header_id|>ipython<|end_header_id|>\n\nsun<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Sunny.<|eot_id|>]]<|start_header_id|>user<|end_header_id|>\n\nok<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Bye.<|eot_id|>]]",
    "mistral": '<s>[INST] w?[/INST][[[TOOL_CALLS] [{"name": "sky", "arguments": {"at": "Rome"}, "id": "call00100"}]</s>]]'
    '[TOOL_RESULTS] {"content": sun, "call_id": "call00100"}[/TOOL_RESULTS][[ Sunny.</s>]]'
    f"[AVAILABLE_TOOLS] [{TOOL}][/AVAILABLE_TOOLS][INST] ok[/INST][[ Bye.</s>]]",
}


@pytest.mark.parametrize("family", MULTI_TURN)
def test_multi_turn_chats(family):
    chat = family_tokenizer(family)
    example = render(CHAT, chat, DataConfig(train="unused"))
    assert marked_row(example, chat) == MULTI_TURN[family]
    assert example.prompt_ids == example.input_ids[: len(example.prompt_ids)] and example.answer == "4 é"


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_tool_chats(family):
    chat = family_tokenizer(family)
    example = render(TOOL_CHAT, chat, DataConfig(train="unused"))
    assert marked_row(example, chat) == WITH_TOOLS[family]


@pytest.mark.parametrize("family", MULTI_TURN)
def test_only_the_last_answer_and_the_whole_row(family):
    chat = family_tokenizer(family)
    head, _, last = MULTI_TURN[family].rpartition("[[")
    assert marked_row(render(CHAT, chat, DataConfig(train="unused", loss_on="last")), chat) == head.replace("[[", "").replace("]]", "") + f"[[{last}"
    whole = render(CHAT, chat, DataConfig(train="unused", loss_on="all"))
    assert whole.trained == [False] + [True] * (len(whole.input_ids) - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_is_trained_and_bos_stands_once(family):
    chat = family_tokenizer(family)
    example = render({"prompt": "2+2", "completion": "4"}, chat, DataConfig(train="unused"))
    trained = [token for token, on in zip(example.input_ids, example.trained, strict=True) if on]
    ends = {"gemma": "<end_of_turn>", "phi3": "<|end|>"}
    assert chat.convert_ids_to_tokens(trained[-1]) == ends.get(family, FAMILIES[family].eos)
    assert example.input_ids.count(chat.bos_token_id) == (1 if FAMILIES[family].bos and family != "phi3" else 0)


def test_a_base_model_without_a_template():
    base = family_tokenizer("base")
    assert marked_row(render({"prompt": "2+2", "completion": "4"}, base, DataConfig(train="unused")), base) == "<s>2+2\n[[4</s>]]"
    for row in (CHAT, TOOL_CHAT):
        with pytest.raises(ConfigError, match="need a chat template"):
            render(row, base, DataConfig(train="unused"))


def test_thinking_is_trained_where_the_template_keeps_it():
    chat = family_tokenizer("qwen3")
    row = {"messages": [dict(turn) for turn in CHAT["messages"]]}
    row["messages"][1]["content"] = "<think>\na greeting\n</think>\n\nyo"
    row["messages"][3]["content"] = "<think>\n2 and 2\n</think>\n\n4 é"
    expected = MULTI_TURN["qwen3"].replace("<think>\n\n</think>", "<think>\n2 and 2\n</think>")
    assert marked_row(render(row, chat, DataConfig(train="unused")), chat) == expected


def report_on(rows, family: str, tmp_path, **options):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_examples(DataConfig(train=str(tmp_path / "rows.jsonl"), **options), family_tokenizer(family), "train")[1]


def test_the_report_says_what_a_template_does_to_the_rows(tmp_path):
    assert any("otherwise than as a last answer" in note for note in report_on([CHAT], "qwen3", tmp_path).notes)
    for family in ("chatml", "llama3", "mistral", "gemma", "phi3"):
        assert not any("otherwise" in note for note in report_on([CHAT], family, tmp_path).notes), family
    notes = report_on([TOOL_CHAT], "phi3", tmp_path).notes
    assert "1 rows: the chat template does not know tool calls: they are written as JSON" in notes
    assert "1 rows: the chat template does not write the row's tools" in notes
    assert "1 rows: the chat template leaves out what a tool turn says" in notes  # the trap: Phi-3's skips roles that it does not know
    assert not any("leaves out" in note for note in report_on([TOOL_CHAT], "mistral", tmp_path).notes)


def test_roles_that_a_template_refuses_are_listed(tmp_path):
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: the chat template refuses the row: tool is no role here"):
        report_on([TOOL_CHAT], "gemma", tmp_path)


def test_arguments_that_are_json_already_are_not_quoted_twice():
    call = {"id": "call00100", "type": "function", "function": {"name": "sky", "arguments": '{"at": "Rome"}'}}
    row = {"messages": [{"role": "user", "content": "w?"}, {"role": "assistant", "tool_calls": [call]}]}
    chat = family_tokenizer("chatml")
    example = render(row, chat, DataConfig(train="unused"))
    assert marked_row(example, chat).endswith(f"[[<tool_call>\n{CALL}\n</tool_call><|im_end|>]]\n")
    assert example.answer == f"<tool_call>\n{CALL}\n</tool_call>"
    call["function"]["arguments"] = "{at: Rome}"
    with pytest.raises(ConfigError, match="the arguments of the call of 'sky' are not JSON"):
        render(row, chat, DataConfig(train="unused"))


def test_a_template_that_writes_the_date_is_said(tmp_path):
    chat = family_tokenizer("chatml")
    chat.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + chat.chat_template
    (tmp_path / "rows.jsonl").write_text(json.dumps(CHAT))
    notes = load_examples(DataConfig(train=str(tmp_path / "rows.jsonl")), chat, "train")[1].notes
    assert any("today's date" in note for note in notes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_taken_from_its_row_is_the_prompt_tokenised_alone(family, monkeypatch):
    """The row's own ids up to its last special token and those of the rest are what the tokenizer makes of the whole prompt."""
    rows = [{"prompt": text, "completion": "4 é"} for text in ("hi", " sum?\n\n", "<|eot", "é" * 40, "<|im_end|> x </s>")]
    ours = [render(row, family_tokenizer(family), DataConfig(train="x", max_length=4000)) for row in rows]
    monkeypatch.setattr("peftkit.data.encode.Encoder._in_row", lambda *_: None)
    alone = [render(row, family_tokenizer(family), DataConfig(train="x", max_length=4000)) for row in rows]
    assert ours == alone and all(example.prompt_ids for example in ours)


def test_most_prompts_are_not_tokenised_a_second_time(monkeypatch):
    texts = []
    tokenizer = family_tokenizer("chatml")
    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, given: (texts.extend(given), encode(self, given))[1])
    load = Renderer(tokenizer, DataConfig(train="x"))
    done = load([Row(f"row {i}", [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "x"}]) for i in range(5)])
    assert len(done) == 5 and all(isinstance(each, Example) and each.prompt_ids for each in done)
    assert [text for text in texts if text] == [tokenizer.decode(each.input_ids) for each in done] + ["<|im_start|>assistant\n"]


@pytest.mark.parametrize("answer", ["A", "B", "SIS", "a T"])
def test_a_header_without_a_generation_prompt_is_no_part_of_the_answer(answer):
    """The trap: the header is looked for by the answer, and an answer that stands in the header cuts it there."""
    tokenizer = family_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content + '<|im_end|>' }}{% endfor %}"
    example = render({"prompt": "hi", "completion": answer}, tokenizer, DataConfig(train="x"))
    assert marked_row(example, tokenizer) == f"USER: hi<|im_end|>ASSISTANT: [[{answer}<|im_end|>]]"


@pytest.mark.parametrize("markers", [False, True])
def test_rows_with_tools_are_written_by_the_template_that_is_for_them(markers):
    """Some tokenizers have two templates, `default` and `tool_use`; a row without tools keeps the first."""
    chat = family_tokenizer("chatml")
    begin, end = ("{% generation %}", "{% endgeneration %}") if markers else ("", "")
    turn = "{{ m.role }}: {% if m.role == 'assistant' %}" + begin + "{{ m.content }}!{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}"
    turn = "{% for m in messages %}" + turn + "<|im_end|>" + end + "{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    turn += "{% if add_generation_prompt %}assistant: {% endif %}"
    chat.chat_template = {"default": turn.replace("!", ""), "tool_use": "{{ tools | length }} tools\n" + turn}
    call = {"type": "function", "function": {"name": "sky", "arguments": {}}}
    row = {"messages": [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "Look", "tool_calls": [call]}]}
    plain = render({"messages": [*row["messages"][:1], {"role": "assistant", "content": "Look"}]}, chat, DataConfig(train="unused"))
    assert marked_row(plain, chat) == "user: w?\nassistant: [[Look<|im_end|>]]\n" and plain.answer == "Look"
    example = render(row | {"tools": [{"name": "sky"}]}, chat, DataConfig(train="unused"))
    assert marked_row(example, chat) == "1 tools\nuser: w?\nassistant: [[Look!<sky><|im_end|>]]\n"
    assert example.answer == "Look!<sky>"  # what is asked for is the call too
    chat.chat_template["default"] = chat.chat_template["default"].replace("{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}", "")
    silent = [row["messages"][0], row["messages"][1] | {"content": None}]
    assert "sky" in render({"messages": silent}, chat, DataConfig(train="unused")).answer  # a call without its tools: by a template that knows no calls


def test_results_of_tools_belong_to_the_call_they_name():
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": {}}} for name in ("sun", "rain")]
    results = [{"role": "tool", "content": name, "tool_call_id": name} for name in ("rain", "sun", "snow")]
    turns = as_messages([{"role": "assistant", "content": None, "tool_calls": calls}, *results], "messages")
    assert [turn.get("name") for turn in turns[1:]] == ["rain", "sun", None]
    unnamed = as_messages([{"role": "assistant", "content": None, "tool_calls": calls}, *({"role": "tool", "content": "x"} for _ in calls)], "messages")
    assert [(turn["name"], turn["tool_call_id"]) for turn in unnamed[1:]] == [("sun", "sun"), ("rain", "rain")]
