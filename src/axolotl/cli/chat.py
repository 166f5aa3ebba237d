"""The conversation of `axolotl inference --chat`.

A line that starts with `/` is a command of the table `COMMANDS`; anything else is the next turn. A line that ends with a
backslash goes on in the next. What a model writes between `<think>` and `</think>` is folded unless `/expand` is on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from axolotl.cli.answering import GENERATION_DEFAULTS, Message
from axolotl.cli.utils.errors import Terminated
from axolotl.exceptions import AxolotlError

OPEN, CLOSE = "<think>", "</think>"
OPTION_TYPES: dict[str, type] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_new_tokens": int,
    "repetition_penalty": float, "seed": int,
}  # fmt: skip


class Answers(Protocol):
    """What a conversation needs of `Answerer`."""

    options: dict[str, Any]
    format: Any

    def answer(
        self, messages: list[Message], receive: Callable[[str], None], template_kwargs: dict[str, Any] | None = None
    ) -> str: ...


class ThinkFolder:
    """Shows a growing text, and in place of its thinking a single line while `collapsed`."""

    def __init__(self, show: Callable[[str], None], collapsed: bool):
        self._show, self._collapsed = show, collapsed
        self._held = ""
        self._inside = False
        self._after_fold = False

    def __call__(self, piece: str) -> None:
        self._held += piece
        while True:
            mark = CLOSE if self._inside else OPEN
            before, found, after = self._held.partition(mark)
            if not found:
                break
            self._put(before)
            self._inside = not self._inside
            if self._collapsed:
                self._show("[thinking ... " if self._inside else "/expand shows it]\n")
            else:
                self._show(mark)
            self._after_fold = self._collapsed and not self._inside
            self._held = after
        keep = next((n for n in range(len(mark) - 1, 0, -1) if self._held.endswith(mark[:n])), 0)
        self._put(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]

    def close(self) -> None:
        """The text is over: what could have been the start of a mark is text."""
        self._put(self._held)
        self._held = ""
        if self._inside and self._collapsed:
            self._show("unfinished]")

    def _put(self, text: str) -> None:
        if self._after_fold:  # the fold ends its own line
            text = text.lstrip("\n")
        if text and not (self._inside and self._collapsed):
            self._after_fold = False
            self._show(text)


@dataclass
class ChatSession:
    """A conversation and its settings."""

    answerer: Answers
    show: Callable[[str], None] = lambda text: print(text, end="", flush=True)
    read: Callable[[str], str] = input
    messages: list[Message] = field(default_factory=list)
    system: str | None = None
    collapsed: bool = True
    thinking: bool | None = None
    over: bool = False

    def run(self) -> None:
        """Read and answer until `/quit`, Ctrl-D, or Ctrl-C at the prompt."""
        self.show("A conversation with the model. /help lists the commands, /quit ends it.\n")
        if not self.answerer.format.is_chat:
            self.show(f"This run was trained with {self.answerer.format.name}, which knows single turns only: the model "
                      "reads each turn by itself.\n")  # fmt: skip
        while not self.over:
            try:
                line = self._read_turn()
            except Terminated:
                raise
            except (EOFError, KeyboardInterrupt):
                self.show("\n")
                return
            self.take(line)

    def take(self, line: str) -> None:
        """One line of the person: a command or a turn."""
        if not line.strip():
            return
        if line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            if name in COMMANDS:
                COMMANDS[name][0](self, argument.strip())
            else:
                self.show(f"/{name} is not a command. /help lists them.\n")
            return
        self.messages.append({"role": "user", "content": line})
        self._answer()

    def _read_turn(self) -> str:
        lines = [self.read("\n> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self.read(". "))
        return "\n".join(lines)

    def _answer(self) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        folder = ThinkFolder(self.show, self.collapsed)
        kwargs = {} if self.thinking is None else {"enable_thinking": self.thinking}
        try:
            text = self.answerer.answer([*system, *self.messages], folder, kwargs)
        except Terminated:
            raise
        except KeyboardInterrupt:
            self.messages.pop()
            self.show("\n(stopped; the turn is taken back)\n")
            return
        except AxolotlError as error:
            self.messages.pop()
            self.show(f"{error}\n")
            return
        folder.close()
        self.show("\n")
        self.messages.append({"role": "assistant", "content": text})

    # commands

    def help(self, _: str) -> None:
        for name, (_method, text) in COMMANDS.items():
            self.show(f"  /{name:<10} {text}\n")

    def new(self, _: str) -> None:
        self.messages.clear()
        self.show("A new conversation.\n")

    def set_system(self, text: str) -> None:
        self.system = text or None
        self.messages.clear()
        self.show("System message set; a new conversation.\n" if text else "No system message; a new conversation.\n")

    def set_option(self, argument: str) -> None:
        name, _, value = argument.replace("=", " ").partition(" ")
        if name not in OPTION_TYPES or not value.strip():
            self.show(f"Write /set NAME VALUE, with one of: {', '.join(OPTION_TYPES)}. `default` takes a value back.\n")
            return
        value = value.strip()
        if value in ("default", "none"):
            self.answerer.options[name] = GENERATION_DEFAULTS.get(name)
        else:
            try:
                self.answerer.options[name] = _checked(name, OPTION_TYPES[name](value))
            except ValueError as error:
                self.show(f"{name} cannot be {value}: {error}.\n")
                return
        self.show(f"{name} = {self.answerer.options[name]}\n")

    def status(self, _: str) -> None:
        self.show(f"  format: {self.answerer.format.name}\n  system: {self.system}\n  turns: {len(self.messages)}\n")
        self.show(f"  thinking: {'as the template has it' if self.thinking is None else self.thinking}, ")
        self.show(f"{'collapsed' if self.collapsed else 'expanded'}\n")
        for name in OPTION_TYPES:
            self.show(f"  {name}: {self.answerer.options.get(name)}\n")

    def history(self, _: str) -> None:
        for message in self.messages:
            self.show(f"{message['role']}: ")
            folder = ThinkFolder(self.show, self.collapsed)
            folder(message["content"])
            folder.close()
            self.show("\n")

    def retry(self, _: str) -> None:
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if self.messages:
            self._answer()
        else:
            self.show("Nothing to try again.\n")

    def undo(self, _: str) -> None:
        while self.messages and self.messages.pop()["role"] != "user":
            pass
        self.show(f"Taken back; {len(self.messages)} turns are left.\n")

    def save(self, path: str) -> None:
        if not path:
            self.show("Write /save FILE.\n")
            return
        system = [{"role": "system", "content": self.system}] if self.system else []
        record = json.dumps({"messages": [*system, *self.messages]}, ensure_ascii=False)
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(record + "\n")
        except OSError as error:
            self.show(f"{path} cannot be written: {error.strerror}.\n")
            return
        self.show(f"Added to {path}, one conversation a line, as a `type: chat_template` dataset reads it.\n")

    def think(self, argument: str) -> None:
        choices = {"on": True, "off": False, "": None if self.thinking else True, "default": None}
        if argument not in choices:
            self.show("Write /think on, /think off or /think default.\n")
            return
        self.thinking = choices[argument]
        self.show(f"Thinking: {'as the template has it' if self.thinking is None else argument or 'on'}.\n")

    def collapse(self, _: str) -> None:
        self.collapsed = True
        self.show("Thinking is folded.\n")

    def expand(self, _: str) -> None:
        self.collapsed = False
        if self.messages and OPEN in self.messages[-1]["content"]:
            self.show(self.messages[-1]["content"] + "\n")
        else:
            self.show("Thinking is shown.\n")

    def quit(self, _: str) -> None:
        self.over = True


def _checked(name: str, value: float) -> float:
    upper = {"top_p": 1.0, "min_p": 1.0}.get(name)
    if value < 0 or (name in ("max_new_tokens", "repetition_penalty") and value <= 0):
        raise ValueError("it must be positive")
    if upper is not None and value > upper:
        raise ValueError(f"it is at most {upper}")
    return value


COMMANDS: dict[str, tuple[Callable[[ChatSession, str], None], str]] = {
    "help": (ChatSession.help, "this list"),
    "new": (ChatSession.new, "start a new conversation"),
    "system": (ChatSession.set_system, "TEXT: set the system message"),
    "set": (ChatSession.set_option, f"NAME VALUE: {', '.join(OPTION_TYPES)}"),
    "status": (ChatSession.status, "show the settings"),
    "history": (ChatSession.history, "show the conversation"),
    "retry": (ChatSession.retry, "answer the last turn again"),
    "undo": (ChatSession.undo, "take the last turn and its answer back"),
    "save": (ChatSession.save, "FILE: add the conversation to a JSONL file"),
    "think": (ChatSession.think, "on, off or default: ask the template for thinking"),
    "collapse": (ChatSession.collapse, "fold what the model thinks"),
    "expand": (ChatSession.expand, "show what the model thinks"),
    "quit": (ChatSession.quit, "end"),
}
