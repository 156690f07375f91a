"""Renders rows with the chat template into token ids, and marks the tokens that are trained.

The marks come from the template's own spans. A template with `{% generation %}` markers says what the assistant wrote.
For any other, the span of an assistant turn is what the template adds when that turn follows its generation prompt; where it
writes a turn otherwise once later ones follow (without its thinking, say), the span is looked for behind the turn before.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from peftkit.config import ConfigError
from peftkit.data.config import DataConfig
from peftkit.data.encode import Encoder, last_run, mark, marked_runs
from peftkit.data.examples import Example
from peftkit.data.formats import Row, Turn, find_format, normalise
from peftkit.data.read import BadRow, Record

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "Qx7placeholder7xQ"  # stands for the content of a turn, to see where a template puts it
CHUNK = 1000  # rows tokenised at once: enough to keep the tokenizer busy, little enough to fit in memory


@dataclass
class Draft:
    """A row on its way to an Example: text with character spans to train, then its tokens with their marks."""

    row: Row
    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    prompt: str = ""
    answer: str = ""
    marked: bool = False
    """The spans are those of the template's `{% generation %}` markers; prompt and answer follow."""
    encoding: Encoding | None = None
    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)


def render(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: DataConfig, where: str = "row") -> Example:
    """One row, in any of the known formats, as an Example. Raises ConfigError where it cannot be used."""
    record = Record(where, row)
    example = Renderer(tokenizer, config)([normalise(record, find_format([record], config, where), config)])[0]
    if isinstance(example, BadRow):
        raise ConfigError(f"{example.where}: {example.reason}")
    return example


class Renderer:
    """Rows to Examples for one tokenizer, counting on the way what a user should know of.

    Raises ConfigError for a tokenizer that cannot tell where in the text a token stands, and for chats where it has no
    chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig):
        if not tokenizer.is_fast:
            raise ConfigError(f"{type(tokenizer).__name__} is a slow tokenizer: it cannot tell which characters a token covers; use a fast one")
        self.tokenizer, self.config = tokenizer, config
        self.template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        with_tools = tokenizer.get_chat_template(None, [{}]) if tokenizer.chat_template else ""  # some have a template of its own for rows with tools
        self.has_markers = {bool(tools): bool(re.search(r"\{%-?\s*generation\s*-?%\}", text)) for tools, text in ((0, self.template), (1, with_tools))}
        self.takes_tools = bool(re.search(r"\btools\b", with_tools))
        self.takes_calls = {bool(tools): bool(re.search(r"\btool_calls\b", text)) for tools, text in ((0, self.template), (1, with_tools))}
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.adds_bos = self.bos is not None and tokenizer("")["input_ids"][:1] == [self.bos]
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids, self.special_texts = set(special), tuple(special.values())
        self.encode = Encoder(tokenizer)
        self.truncated = 0
        self.counts: Counter[str] = Counter()
        self.endings: Counter[int | None] = Counter()  # the last trained token of each whole row; None: not a special one

    def __call__(self, rows: Sequence[Row | BadRow]) -> list[Example | BadRow]:
        """The rows in their order, each as an Example or with what is wrong with it."""
        return [done for start in range(0, len(rows), CHUNK) for done in self.chunk(rows[start : start + CHUNK])]

    def chunk(self, rows: Sequence[Row | BadRow]) -> list[Example | BadRow]:
        """As many rows as are tokenised at once; preference pairs with both their answers."""
        done = list(self.one_answer(rows))
        pairs = [(i, row) for i, row in enumerate(rows) if isinstance(row, Row) and row.rejected is not None]
        if pairs:
            second = Renderer(self.tokenizer, self.config)  # what it counts is not of trained rows
            others = second.one_answer([replace(row, messages=row.rejected or []) for _, row in pairs])
            for (i, row), other in zip(pairs, others, strict=True):
                chosen = done[i]
                if not isinstance(chosen, Example):
                    continue
                self.counts["preference pairs: the chosen answer is trained, the rejected one only read; the preference objective comes later"] += 1
                self.counts["preference pairs whose two answers are the same"] += row.messages == row.rejected
                if isinstance(other, Example):
                    done[i] = replace(chosen, rejected=other)
                else:
                    self.counts[f"preference pairs whose rejected answer cannot be used ({'too long' if other.too_long else other.reason})"] += 1
        return done

    def one_answer(self, rows: Sequence[Row | BadRow]) -> Iterator[Example | BadRow]:
        drafts: list[Draft | BadRow] = [row if isinstance(row, BadRow) else self.told(row.where, self.draft, row) for row in rows]
        good = [draft for draft in drafts if isinstance(draft, Draft)]
        for draft, encoding in zip(good, self.encode([draft.text for draft in good]), strict=True):
            draft.encoding, draft.ids = encoding, encoding.ids
        drafts = [draft if isinstance(draft, BadRow) else self.told(draft.row.where, self.mark, draft) for draft in drafts]
        good = [draft for draft in drafts if isinstance(draft, Draft)]
        prompts = iter(self.encode.prompts([(draft.prompt, draft.text, draft.encoding, draft.ids) for draft in good]))
        for each in drafts:
            yield each if isinstance(each, BadRow) else self.finish(each, next(prompts))

    def told(self, where: str, make: Callable[[Any], Draft], what: Any) -> Draft | BadRow:
        """make(what), or why it cannot be made."""
        try:
            return make(what)
        except (TemplateError, TypeError) as error:
            return BadRow(where, f"the chat template refuses the row: {error}")
        except ValueError as error:
            return BadRow(where, str(error))

    # From rows to text and spans

    def draft(self, row: Row) -> Draft:
        """Raises ValueError, and what templates raise, for a row that cannot be used."""
        if not row.messages:
            return Draft(row, row.text, [(0, len(row.text))])
        if not self.template:
            return self.draft_plain(row)
        tools = self.tools(row)
        if (spoken := self.spoken(row.messages, bool(tools))) is not row.messages:
            row = replace(row, messages=spoken)
        if not self.has_markers[bool(tools)]:
            return self.draft_by_spans(row, tools)
        shown = [{key: value for key, value in turn.items() if value is not None} for turn in row.messages]  # as apply_chat_template does
        options: dict[str, Any] = {
            "chat_template": self.tokenizer.get_chat_template(None, tools),
            "return_assistant_tokens_mask": True,
            **self.tokenizer.special_tokens_map,
        }
        texts: Any = render_jinja_template([shown], tools=tools, **options)
        return Draft(row, texts[0][0], texts[1][0], marked=True)

    def mark(self, draft: Draft) -> Draft:
        """The draft with its tokens marked."""
        assert draft.encoding is not None
        if draft.marked:
            self.mark_by_markers(draft, draft.encoding)
        else:
            draft.trained = mark(draft.encoding, len(draft.ids), draft.spans)
        return draft

    def draft_plain(self, row: Row) -> Draft:
        """`{prompt}\\n{completion}{eos}`; instructions have the headings Instruction, Input and Response."""
        if row.plain_prompt is None:
            raise ConfigError(
                f"{row.where}: rows of chat turns need a chat template, and this tokenizer has none: use the instruction-tuned form "
                "of the model, set tokenizer.chat_template, or give the rows as prompt and completion"
            )
        answer = row.messages[-1]["content"] or ""
        start = 0 if self.config.loss_on == "all" else len(row.plain_prompt)
        text = row.plain_prompt + answer
        return Draft(row, text, [(start, len(text))], row.plain_prompt, answer.strip())

    def mark_by_markers(self, draft: Draft, encoding: Encoding) -> None:
        """Marks by the template's `{% generation %}` markers, and what goes with them."""
        row, ids, messages = draft.row, draft.ids, draft.row.messages
        turns, spans = answers(messages), marked_runs(encoding, len(ids), draft.spans)
        # Neighbouring assistant turns may run into one another; fewer spans than that means that some were not found.
        expected = sum(turn - 1 not in turns for turn in turns if messages[turn]["content"])
        if self.config.loss_on != "all" and len(spans) < expected:
            raise ValueError(f"the chat template's generation markers cover {len(spans)} of {expected} assistant turns; use another template")
        learned = self.learned(row, turns)
        if self.config.loss_on == "all":
            draft.trained, spans = [True] * len(ids), []
        else:
            draft.trained = [False] * len(ids)
            if learned != turns:
                separate = sum(turn - 1 not in learned for turn in learned)
                spans = spans[len(spans) - separate :]
        for start, end in spans:
            # A last character of several bytes has a token for each; transformers marks the first.
            while end < len(ids) and encoding.token_to_chars(end) == encoding.token_to_chars(end - 1):
                end += 1
            # A template may close the markers before the end-of-turn token, which is to be learned all the same.
            if end < len(ids) and ids[end - 1] not in self.special_ids and ids[end] in self.special_ids:
                end += 1
            draft.trained[start:end] = [True] * (end - start)
        last = turns[-1] if turns else 0
        draft.prompt = self.chat(messages[:last], self.tools(row, told=True), prompt=True) if last else ""
        if any(message["role"] not in ("user", "assistant") for message in messages):
            self.look_for(messages, draft.text)
        calls = spans and (messages[last].get("tool_calls") or not messages[last]["content"])
        written = str(self.tokenizer.decode(ids[slice(*spans[-1])])) if calls else ""
        draft.answer = self.answer(messages, turns, written)

    def draft_by_spans(self, row: Row, tools: list[Any] | None) -> Draft:
        """The spans of the turns in the text that the template makes of all of them."""
        messages, turns = row.messages, answers(row.messages)
        text, spans, prompt = self.chat(messages, tools), [], ""
        self.look_for(messages, text)
        if self.config.loss_on == "all":
            prompt = self.chat(messages[: turns[-1]], tools, prompt=True) if turns and turns[-1] else ""
            return Draft(row, text, [(0, len(text))], prompt, self.answer(messages, turns, ""))
        rewritten = False
        for turn in self.learned(row, turns):
            if turn == 0:
                raise ValueError("the first turn is the assistant's, and only a template with {% generation %} markers can tell where it begins")
            before = self.chat(messages[:turn], tools, prompt=True)
            after = self.chat(messages[: turn + 1], tools) if turn + 1 < len(messages) else text
            written = after[len(before) :] if after.startswith(before) else ""
            if written and before == self.chat(messages[:turn], tools):
                # The template has no generation prompt: the header of the turn is what it writes before any content.
                shown = self.chat([*messages[:turn], messages[turn] | {"content": PLACEHOLDER}], tools)
                at = shown.find(PLACEHOLDER, len(before))
                header = shown[len(before) : at] if at >= 0 and after.startswith(shown[:at]) else ""
                before, written = (before + header, written[len(header) :]) if header.strip() else (before, written)
            written = self.to_its_end(written)
            start = len(before)
            if not text.startswith(before + written) or not written:
                found = self.span_in_history(messages, tools, turn, text, written)
                if found is None:
                    other = "set loss_on: last, or " if self.config.loss_on == "assistant" and len(turns) > 1 else ""
                    raise ValueError(
                        f"turn {turn}: the chat template writes something else before the answer than before the turn is there, or changes the turn once "
                        f"later ones follow, so its tokens cannot be told; {other}use a template with {{% generation %}} markers"
                    )
                start, shown = found
                rewritten, written = rewritten or shown != written, shown
            spans.append((start, start + len(written)))
            prompt = before if turn == turns[-1] else prompt
        self.counts["earlier answers are trained as the chat template writes them in a history, otherwise than as a last answer"] += rewritten
        return Draft(row, text, spans, prompt, self.answer(messages, turns, text[slice(*spans[-1])] if spans else ""))

    def span_in_history(self, messages: list[Turn], tools: list[Any] | None, turn: int, text: str, written: str) -> tuple[int, str] | None:
        """(start, text) of the turn where the template writes it otherwise, once others follow, than as the last one (`written`).

        It begins behind what follows the content of the turn before, which a placeholder shows, and ends with the token
        that ends it as the last one. None where that cannot be told.
        """
        endings = [special for special in self.special_texts if written.endswith(special)]
        if not endings or not (messages[turn - 1].get("content") or "").strip() or PLACEHOLDER in text:
            return None
        shown = [*messages[: turn - 1], messages[turn - 1] | {"content": PLACEHOLDER}, *messages[turn:]]
        header, rest = (part.split(PLACEHOLDER) for part in (self.chat(shown[:turn], tools, prompt=True), self.chat(shown, tools)))
        if len(header) != 2 or len(rest) != 2 or not rest[1].startswith(header[1]):
            return None
        behind = rest[1][len(header[1]) :]
        end = behind.find(max(endings, key=len))
        found = behind[: end + len(max(endings, key=len))]
        said = [(messages[turn]["content"] or "").split("</think>")[-1].strip(), *(call["function"]["name"] for call in messages[turn].get("tool_calls", []))]
        if end < 0 or not text.endswith(behind) or not all(part in found for part in said):
            return None
        return len(text) - len(behind), found

    def look_for(self, messages: list[Turn], text: str) -> None:
        """Counts turns whose content is not in the text of the row; templates skip what they do not know."""
        for turn in messages:
            said = (turn["content"] or "").split("</think>")[-1].strip()
            if not any(form in text for form in (said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])):
                article = "an" if turn["role"] == "assistant" else "a"
                self.counts[f"the chat template leaves out what {article} {turn['role']} turn says"] += 1

    def to_its_end(self, written: str) -> str:
        """Without what the template adds after the first token that ends the turn (a line break, an end of text): generation has stopped by then."""
        found = written.rstrip()
        if not found.endswith(self.special_texts):
            return written
        while True:
            ending = max((special for special in self.special_texts if found.endswith(special)), key=len)
            shorter = found.removesuffix(ending).rstrip()
            if not shorter.endswith(self.special_texts):
                return found
            found = shorter

    def learned(self, row: Row, turns: list[int]) -> list[int]:
        """The assistant turns that are trained."""
        own = [turn for turn in turns if turn >= row.given]
        return own[-1:] if self.config.loss_on == "last" else own

    def spoken(self, messages: list[Turn], tools: bool) -> list[Turn]:
        """Tool calls as the content of their turn, where the template of rows with tools, or of those without, does not know them."""
        if self.takes_calls[tools] or not any(turn.get("tool_calls") for turn in messages):
            return messages
        self.counts["the chat template does not know tool calls: they are written as JSON"] += 1
        return [{**turn, "content": "\n".join(filter(None, (turn["content"], call_text(turn))))} if turn.get("tool_calls") else turn for turn in messages]

    def answer(self, messages: list[Turn], turns: list[int], written: str) -> str:
        """The text of the last answer; of one that calls tools, all of it as the template writes it (`written`)."""
        if not turns:
            return ""
        content = (messages[turns[-1]]["content"] or "").strip()
        if content and not (messages[turns[-1]].get("tool_calls") and written):
            return str(content)
        for special in self.special_texts:
            written = written.replace(special, "")
        return written.strip()

    def chat(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False))

    def tools(self, row: Row, told: bool = False) -> list[Any] | None:
        """The row's tools, where the template knows what to do with them; told: that it does not was counted already."""
        if not row.tools:
            return None
        if not self.takes_tools:
            self.counts["the chat template does not write the row's tools"] += not told
            return None
        try:
            tools = json.loads(row.tools) if isinstance(row.tools, str) else row.tools
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is not JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(tools, list):
            raise ValueError("'tools' must be a list of tool descriptions")
        # Templates are written for OpenAI's shape; ShareGPT has the bare functions.
        bare = [isinstance(tool, dict) and "name" in tool and "function" not in tool for tool in tools]
        return [{"type": "function", "function": tool} if alone else tool for tool, alone in zip(tools, bare, strict=True)] or None

    # From text and spans to examples

    def finish(self, draft: Draft, prompt_ids: list[int]) -> Example | BadRow:
        row, ids, trained, longest = draft.row, draft.ids, draft.trained, self.config.max_length
        if not (row.messages and self.template):  # nothing but the text so far: the tokenizer's own first token, and an end
            first = [self.bos] if self.adds_bos else []
            last = [self.eos] if self.eos is not None and ids[-1:] != [self.eos] else []
            ids, trained = first + ids + last, [self.config.loss_on == "all"] * len(first) + trained + [True] * len(last)
            prompt_ids = first + prompt_ids if row.messages else []
        if self.bos is not None and ids[:2] == [self.bos, self.bos]:
            self.counts["BOS stood twice at the start and was kept once"] += 1
            while ids[:2] == [self.bos, self.bos]:
                ids, trained = ids[1:], trained[1:]
            while prompt_ids[:2] == [self.bos, self.bos]:
                prompt_ids = prompt_ids[1:]
        trained[:1] = [False]  # nothing comes before the first token to predict it from
        supervised = trained.count(True)
        if not supervised:
            return BadRow(row.where, "no token of it would be trained")
        if len(ids) > longest:
            if self.config.truncation == "drop":
                return BadRow(row.where, f"{len(ids)} tokens, and max_length is {longest}", too_long=True)
            if True not in trained[:longest]:
                return BadRow(row.where, f"all {supervised} trained tokens lie beyond max_length {longest} (the row has {len(ids)})")
            self.truncated += 1
            ids, trained = ids[:longest], trained[:longest]
        elif self.config.loss_on != "all":
            start, end = last_run(trained)
            self.endings[ids[end - 1] if ids[end - 1] in self.special_ids | {self.eos} else None] += 1
            if row.messages and prompt_ids != ids[:start]:
                self.counts["the tokens generation starts from are not those before the last answer in training"] += 1
        return Example(ids, trained, row.where, prompt_ids, draft.answer)

    def notes(self) -> list[str]:
        """What was seen on the way, in sentences."""
        notes = [f"{count} rows: {what}" for what, count in self.counts.items() if count]
        for ending, count in self.endings.most_common():
            if ending is None:
                notes.append(f"{count} rows end with no special token: what is trained on them may not learn to stop")
            elif ending != self.eos:
                names = [repr(token and self.tokenizer.convert_ids_to_tokens(token)) for token in (ending, self.eos)]
                notes.append(f"{count} rows end with {names[0]}, which is trained; the tokenizer's eos is {names[1]}: generation must stop at both")
        if "strftime_now" in self.template:
            notes.append("the chat template writes today's date into the rows: those of another day, or of a run resumed then, may differ")
        if self.eos is not None and self.eos == self.tokenizer.pad_token_id:
            notes.append("pad is the same token as eos; eos is trained all the same, because padding is told by its place, not by its id")
        return notes


def render_text(text: str, source: str, tokenizer: PreTrainedTokenizerBase, max_length: int, holdout: float, held: bool) -> list[Example]:
    """One long text, tokenised once, in blocks of `max_length` tokens: those of its last share `holdout` where `held`,
    the others where not."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    cut = len(ids) - round(len(ids) * holdout)
    first, stop = (cut, len(ids)) if held else (0, cut)
    blocks = [(start, min(start + max_length, stop)) for start in range(first, stop, max_length)]
    return [Example(ids[start:end], [False] + [True] * (end - start - 1), f"{source} tokens {start}:{end}") for start, end in blocks if end - start > 1]


def answers(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def call_text(turn: Turn) -> str:
    """The tool calls of a turn as JSON, one a line."""
    return "\n".join(json.dumps({key: call["function"].get(key) for key in ("name", "arguments")}, ensure_ascii=False) for call in turn["tool_calls"])
