"""Prompt strategies loader for alpaca instruction datasets with system prompts"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy, check_text, learnt_text
from axolotl.prompters import AlpacaPrompter, PromptStyle


class InstructionWSystemPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for instruction-based prompts."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str, str]:
        """Instruction, input, answer and system text of a row."""
        return prompt["instruction"], prompt.get("input") or "", prompt["output"], prompt["system"]

    def _build_texts(self, prompt: dict[str, Any]) -> tuple[str, str]:
        instruction, input_text, response, system = self.parse_instruction_fields(prompt)
        check_text(prompt, instruction)
        text = next(iter(self.prompter.build_prompt_w_system(system, instruction, input_text)))
        return text, learnt_text(prompt, response)


class SystemDataPrompter(AlpacaPrompter):
    """Alpaca Style Prompter that uses system prompts from the dataset"""

    system_format: str = "### System:\n{system}\n\n"

    def match_prompt_style(self) -> None:
        super().match_prompt_style()
        if self.prompt_style == PromptStyle.INSTRUCT.value:
            self.system_format = "### System:\n{system}\n\n"

    def build_prompt_w_system(
        self,
        system: str | None,
        instruction: str,
        input: str | None = None,
        output: str | None = None,
    ) -> Generator[str, None, None]:
        """Yield the prompt after the system text of the row, followed by `output` when it is given."""
        text = self.system_format.format(system=system) if system and self.system_format else ""
        if input:
            text += self.turn_format.format(instruction=instruction, input=input)
        else:
            text += self.turn_no_input_format.format(instruction=instruction)
        yield f"{text}{output}" if output else text


class OpenOrcaSystemDataPrompter(SystemDataPrompter):
    """Alpaca Style Prompter that uses system prompts from the dataset, with OpenOrca prompts"""

    def match_prompt_style(self) -> None:
        super().match_prompt_style()
        if self.prompt_style == PromptStyle.INSTRUCT.value:
            self.system_format = "### System:\n{system}\n"
            self.turn_format = "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n"
            self.turn_no_input_format = "### Human:\n{instruction}\n### Assistant:\n"


class OpenOrcaPromptTokenizingStrategy(InstructionWSystemPromptTokenizingStrategy):
    """Tokenizing strategy for OpenOrca datasets"""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str, str]:
        return prompt["question"], "", prompt["response"], prompt["system_prompt"]


def load(tokenizer, cfg) -> InstructionWSystemPromptTokenizingStrategy:
    return load_chat(tokenizer, cfg)


def load_instruct(tokenizer, cfg) -> InstructionWSystemPromptTokenizingStrategy:
    return InstructionWSystemPromptTokenizingStrategy(
        SystemDataPrompter(PromptStyle.INSTRUCT.value), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )


def load_chat(tokenizer, cfg) -> InstructionWSystemPromptTokenizingStrategy:
    return InstructionWSystemPromptTokenizingStrategy(
        SystemDataPrompter(PromptStyle.CHAT.value), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )


def load_open_orca(tokenizer, cfg) -> OpenOrcaPromptTokenizingStrategy:
    return OpenOrcaPromptTokenizingStrategy(
        OpenOrcaSystemDataPrompter(PromptStyle.INSTRUCT.value), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )


def load_open_orca_chatml(tokenizer, cfg) -> OpenOrcaPromptTokenizingStrategy:
    return OpenOrcaPromptTokenizingStrategy(
        OpenOrcaSystemDataPrompter(PromptStyle.CHATML.value), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )
