"""Prompt Strategy for finetuning Llama2 chat models

Use dataset type: "llama2_chat" in config.yml to use this prompt style. A row looks like

    {"conversations": [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "I am Vicuna"}, ...]}

Human and gpt alternate; the first message may be from "system" and replaces the usual system prompt. The format is that of
Llama 2 chat (https://github.com/facebookresearch/llama, `generation.py`). Rows are padded to `sequence_len`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from axolotl.exceptions import DatasetError, TokenizerError
from axolotl.prompt_tokenizers import IGNORE_INDEX, PromptTokenizingStrategy, Tokenized

SYSTEM_FORMAT = "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n"
DEFAULT_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. Your "
    "answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure "
    "that your responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not "
    "factually coherent, explain why instead of answering something not correct. If you don't know the answer to a "
    "question, please don't share false information."
)


@dataclass
class Llama2ChatConversation:
    """A conversation and the text it is written as."""

    name: str = "llama2"
    system: str = SYSTEM_FORMAT.format(system=DEFAULT_SYSTEM)
    roles: tuple[str, str] = ("[INST]", "[/INST]")
    messages: list[list[str]] = field(default_factory=list)
    offset: int = 0
    sep = " "
    sep2 = " </s><s>"
    stop_token_ids = (2,)

    def pieces(self) -> Generator[tuple[str, bool], None, None]:
        """The text in pieces, each with whether it is an answer (with the end of sequence after it)."""
        for index, (role, message) in enumerate(self.messages):
            if index == 0:
                yield self.system + message.strip(), False
            elif role == self.roles[1]:
                yield f" {role} ", False
                yield message.strip() + self.sep2, True
            else:
                yield f"{role} {message.strip()}", False

    def get_prompt(self) -> str:
        """Get the prompt for generation."""
        return "".join(text for text, _ in self.pieces())

    def append_message(self, role: str, message: str) -> None:
        """Append a new message."""
        self.messages.append([role, message])


class Llama2ChatPrompter:
    """A prompter that generates prompts for Llama2 models."""

    system_prompt = SYSTEM_FORMAT

    def build_prompt(self, source: Mapping[str, Any]) -> Generator[Llama2ChatConversation, None, None]:
        """Yield the conversation of a row.

        Raises:
            DatasetError: the messages do not alternate between human and gpt.
        """
        messages = list(source["conversations"])
        conversation = Llama2ChatConversation()
        if messages and messages[0]["from"] == "system":
            conversation.system = self.system_prompt.format(system=messages[0]["value"])
            messages = messages[1:]
        roles = {"human": conversation.roles[0], "gpt": conversation.roles[1]}
        for index, message in enumerate(messages):
            if roles.get(message["from"]) != conversation.roles[index % 2]:
                raise DatasetError(
                    f"`conversations` must alternate between `human` and `gpt`, but message {index} is from "
                    f"`{message['from']}`."
                )
            conversation.append_message(roles[message["from"]], message["value"])
        if len(messages) < 2:
            raise DatasetError("`conversations` must hold at least one message from `human` and one from `gpt`.")
        yield conversation


class LLama2ChatTokenizingStrategy(PromptTokenizingStrategy):
    """Tokenizing strategy for Llama2 prompts.

    Raises:
        TokenizerError: the tokenizer has no pad token.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.tokenizer.pad_token_id is None:
            raise TokenizerError(
                "`type: llama2_chat` pads its rows, but the tokenizer has no pad token. Write one as "
                "`special_tokens: {pad_token: ...}`."
            )

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> Tokenized:
        """Tokenize a row: the answers are learnt, each with its end of sequence; all of it with `train_on_inputs`."""
        pieces = list(next(self.prompter.build_prompt(prompt)).pieces())
        encoded = self.tokenizer("".join(text for text, _ in pieces), return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        starts, ends = zip(*encoded["offset_mapping"], strict=True)
        labels = [IGNORE_INDEX] * len(ids)
        position = 0
        for text, is_answer in pieces:
            if is_answer:
                end = position + len(text) - len("<s>")
                first, last = bisect_right(ends, position), bisect_left(starts, end)
                labels[first:last] = ids[first:last]
            position += len(text)
        if self.train_on_inputs:
            labels = list(ids)
        padding = max(self.sequence_len - len(ids), 0)
        return {
            "input_ids": ids + [self.tokenizer.pad_token_id] * padding,
            "attention_mask": [1] * len(ids) + [0] * padding,
            "labels": labels + [IGNORE_INDEX] * padding,
        }


def load(tokenizer, cfg) -> LLama2ChatTokenizingStrategy:
    return LLama2ChatTokenizingStrategy(Llama2ChatPrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)
