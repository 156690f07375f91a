"""A chat with a model: several turns, the adapter on, off or side by side with its base; on a terminal or from lines of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch

from peftkit.config import ConfigError, suggest
from peftkit.evaluate import stream_answer
from peftkit.methods import adapters_disabled
from peftkit.use import room, template_ids

COMMANDS = {
    "/adapter on|off|both": "answer with the adapter, without it, or both, one below the other",
    "/system TEXT": "begin anew with this system message",
    "/reset": "begin anew",
    "/help": "this list",
    "/quit": "leave (or end the input)",
}


class Chat:
    """The conversation so far, and how to go on with it. `write` gets every piece of text in the order in which it is to be shown."""

    def __init__(self, model: Any, tokenizer: Any, has_adapter: bool, write: Callable[[str], None], max_new_tokens: int = 512, temperature: float = 0.0):
        if tokenizer is None:
            raise ConfigError("the base has no tokenizer, so one cannot chat with it")
        self.model, self.tokenizer, self.has_adapter, self.write = model, tokenizer, has_adapter, write
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.adapter = "on" if has_adapter else "off"
        self.messages: list[dict[str, str]] = []

    def hello(self, name: str) -> None:
        """Says whom one talks to, by the name of the base."""
        self.write(f"{name} {'with its adapter' if self.has_adapter else 'without an adapter'}; /help lists the commands\n")
        if not self.tokenizer.chat_template:
            self.write("this tokenizer has no chat template: each line is continued as a text, by itself\n")

    def lines(self, lines: Iterable[str]) -> None:
        """Goes on until the lines end or one of them is /quit. Ctrl-C stops one answer, not the chat."""
        for line in lines:
            try:
                if not self.line(line.strip()):
                    return
            except ConfigError as error:
                self.write(f"{error}\n(the turn is forgotten; /system alone takes a system message back)\n")
            except KeyboardInterrupt:
                self.write("\n(stopped; the turn is forgotten)\n")

    def line(self, line: str) -> bool:
        """Obeys a command or answers a message; False where the chat ends."""
        if line == "/quit":
            return False
        if line.startswith("/"):
            self.obey(*line.split(maxsplit=1))
        elif line:
            self.say(line)
        return True

    def obey(self, command: str, argument: str = "") -> None:
        if command == "/help":
            self.write("".join(f"{name:<22} {what}\n" for name, what in COMMANDS.items()))
        elif command == "/reset":
            self.messages = self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []
            self.write("begun anew\n")
        elif command == "/system" and argument and not self.tokenizer.chat_template:
            self.write("this tokenizer has no chat template, so there is no place for a system message\n")
        elif command == "/system":
            self.messages = [{"role": "system", "content": argument}] if argument else []
            self.write(f"begun anew, {'with this' if argument else 'without a'} system message\n")
        elif command == "/adapter":
            self.switch(argument)
        else:
            known = [name.split()[0] for name in COMMANDS]
            self.write(f"there is no command {command}{suggest(command, known)} (there are: {', '.join(known)})\n")

    def switch(self, wanted: str) -> None:
        if wanted not in ("on", "off", "both"):
            self.write(f"the adapter is {self.adapter}; /adapter on, off or both\n")
        elif wanted != "off" and not self.has_adapter:
            self.write("this model has no adapter; start with --adapter RUN\n")
        else:
            self.adapter = wanted
            self.write(f"adapter {wanted}\n")

    def say(self, text: str) -> dict[str, str]:
        """The answers by who gave them, in the way of `adapter`; where both answer, the adapter's is what the conversation goes on from."""
        templated = bool(self.tokenizer.chat_template)
        turns = [*self.messages, {"role": "user", "content": text}]
        ids = template_ids(turns, self.tokenizer) if templated else self.tokenizer(text)["input_ids"]
        try:
            most = room(self.model, ids, self.max_new_tokens)
        except ConfigError as error:
            self.write(f"{error}: /reset begins anew\n")
            return {}
        found = {}
        for who in {"on": ["with adapter"], "off": ["base"], "both": ["base", "with adapter"]}[self.adapter]:
            self.write(f"{who}: ")
            with adapters_disabled(self.model) if who == "base" and self.has_adapter else nullcontext(), torch.no_grad():
                found[who] = stream_answer(self.model, self.tokenizer, ids, most, self.write, self.temperature)
            self.write("\n")
        if templated:
            self.messages = [*turns, {"role": "assistant", "content": list(found.values())[-1]}]
        return found
