"""Chat templates of the families, written after their public formats, and a byte-level tokenizer with the tokens each needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TOOLS_FIRST = """
{%- if tools %}
    {{- '<|im_start|>system\\nTools:' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}"""
TOOL_RESULT = """
    {%- if m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"""
TOOL_CALLS = """
        {%- for call in m.tool_calls or [] %}
            {{- '\\n' if text or not loop.first }}
            {{- '<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '\\n</tool_call>' }}
        {%- endfor %}"""
CHATML = f"""{TOOLS_FIRST}
{{%- for m in messages %}}{TOOL_RESULT}
    {{%- else %}}
        {{%- set text = m.content or '' %}}
        {{{{- '<|im_start|>' + m.role + '\\n' + text }}}}{TOOL_CALLS}
        {{{{- '<|im_end|>\\n' }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{%- endif %}}"""
QWEN3 = f"""{TOOLS_FIRST}
{{%- set ns = namespace(query=-1) %}}
{{%- for m in messages %}}{{%- if m.role == 'user' %}}{{%- set ns.query = loop.index0 %}}{{%- endif %}}{{%- endfor %}}
{{%- for m in messages %}}{TOOL_RESULT}
    {{%- else %}}
        {{%- set text = m.content or '' %}}
        {{%- set thought = '' %}}
        {{%- if '</think>' in text %}}
            {{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}}
            {{%- set text = text.split('</think>')[-1].strip() %}}
        {{%- endif %}}
        {{{{- '<|im_start|>' + m.role + '\\n' }}}}
        {{%- if m.role == 'assistant' and loop.index0 > ns.query and (loop.last or thought) %}}
            {{{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}}}
        {{%- endif %}}
        {{{{- text }}}}{TOOL_CALLS}
        {{{{- '<|im_end|>\\n' }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{%- endif %}}"""
LLAMA3 = """{{- bos_token }}
{%- if tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nTools:' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' }}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
MISTRAL = """
{%- set ns = namespace(query=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}{%- endfor %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and loop.index0 == ns.query %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- elif m.tool_calls is defined and m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
            {{- ', ' if not loop.first }}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- else %}
        {{- raise_exception('no such role') }}
    {%- endif %}
{%- endfor %}"""
GEMMA = """{{- bos_token }}
{%- for m in messages %}
    {%- if m.role not in ('user', 'assistant') %}{{- raise_exception(m.role + ' is no role here') }}{%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
PHI3 = """
{%- for m in messages %}
    {%- if m.role in ('system', 'user', 'assistant') %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endif %}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""


@dataclass(frozen=True)
class Family:
    template: str | None
    eos: str
    pad: str
    bos: str | None = None
    adds_bos: bool = False
    """The tokenizer itself puts BOS first, as the template does too."""
    others: list[str] = field(default_factory=list)


FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", "<|endoftext|>", others=["<|im_start|>"]),
    "qwen3": Family(QWEN3, "<|im_end|>", "<|endoftext|>", others=["<|im_start|>"]),
    "llama3": Family(LLAMA3, "<|eot_id|>", "<|pad|>", "<|begin_of_text|>", True, ["<|start_header_id|>", "<|end_header_id|>"]),
    "mistral": Family(
        MISTRAL, "</s>", "<unk>", "<s>", True,
        ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"],
    ),
    "gemma": Family(GEMMA, "<eos>", "<pad>", "<bos>", True, ["<start_of_turn>", "<end_of_turn>"]),
    "phi3": Family(PHI3, "<|endoftext|>", "<unk>", "<s>", False, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "base": Family(None, "</s>", "<unk>", "<s>", True),
}  # fmt: skip


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the family's special tokens and template."""
    family = FAMILIES[name]
    special = [token for token in (family.pad, family.bos, family.eos, *family.others) if token]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if family.adds_bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[(family.bos, names.index(family.bos))])
    options = {"bos_token": family.bos} if family.bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=family.others, chat_template=family.template, eos_token=family.eos, pad_token=family.pad,
        clean_up_tokenization_spaces=False, **options,
    )  # fmt: skip
