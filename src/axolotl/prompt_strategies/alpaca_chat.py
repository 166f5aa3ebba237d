"""Module for Alpaca prompt strategy classes"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.prompt_tokenizers import AlpacaPromptTokenizingStrategy, InstructionPromptTokenizingStrategy
from axolotl.prompters import AlpacaPrompter, PromptStyle, UnpromptedPrompter


class AlpacaConcisePrompter(AlpacaPrompter):
    """Alpaca Prompter extending the system prompt to ask for concise chat-instruct answers"""

    system_prompt = (
        "Below is an instruction from a USER that describes a task, paired with an input that provides further context. "
        "The ASSISTANT writes a response that concisely and appropriately completes the request.\n\n"
    )
    system_no_input_prompt = (
        "Below is an instruction from a USER that describes a task. "
        "The ASSISTANT writes a response that appropriately and concisely completes the request.\n\n"
    )


class AlpacaChatPrompter(AlpacaPrompter):
    """Alpaca Chat Prompter extending the system prompt to for chat-instruct answers"""

    system_prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that concisely and appropriately completes the request.\n\n"
    )
    system_no_input_prompt = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately and concisely completes the request.\n\n"
    )

    def __init__(self) -> None:
        super().__init__(PromptStyle.CHAT.value)


class NoSystemPrompter(AlpacaPrompter):
    """Null Prompter with no system prompts"""

    system_prompt = ""
    system_no_input_prompt = ""
    turn_format = "{instruction} {input} "
    turn_no_input_format = "{instruction} "

    def __init__(self) -> None:
        super().__init__()

    def match_prompt_style(self) -> None:
        self.turn_format = type(self).turn_format
        self.turn_no_input_format = type(self).turn_no_input_format


class AlpacaQAPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for AlpacaQA"""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["question"], "", prompt["answer"]


class CamelAIPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for CamelAI datasets"""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["message_1"], "", prompt["message_2"]


def load(tokenizer, cfg, ds_cfg: Mapping[str, Any] | None = None) -> AlpacaPromptTokenizingStrategy:
    """The `conversation` key of the dataset names another style."""
    style = (ds_cfg or {}).get("conversation") or PromptStyle.CHAT.value
    return AlpacaPromptTokenizingStrategy(AlpacaPrompter(style), tokenizer, cfg.train_on_inputs, cfg.sequence_len)


def load_concise(tokenizer, cfg) -> AlpacaPromptTokenizingStrategy:
    return AlpacaPromptTokenizingStrategy(
        AlpacaConcisePrompter(PromptStyle.CHAT.value), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )


def load_qa(tokenizer, cfg) -> AlpacaQAPromptTokenizingStrategy:
    return AlpacaQAPromptTokenizingStrategy(AlpacaChatPrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)


def load_camel_ai(tokenizer, cfg) -> CamelAIPromptTokenizingStrategy:
    return CamelAIPromptTokenizingStrategy(AlpacaChatPrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)


def load_no_prompt(tokenizer, cfg) -> AlpacaPromptTokenizingStrategy:
    """Without the preamble."""
    return AlpacaPromptTokenizingStrategy(
        UnpromptedPrompter(PromptStyle.CHAT.value), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )
