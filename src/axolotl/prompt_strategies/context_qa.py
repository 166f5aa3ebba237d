"""Module containing the classes for Context QA Prompt Tokenization Strategies"""

from __future__ import annotations

from typing import Any

from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy
from axolotl.prompters import AlpacaPrompter, PromptStyle

MISSING_INFO_ANSWER = (
    "The context provided does not contain any information about your inquiry. "
    "Therefore, I'm unable to answer your question based on the given context."
)


class AlpacaContextPrompter(AlpacaPrompter):
    """Customized system prompted for concise QA"""

    system_prompt = "Use the following contextual information to concisely answer the question.\n"
    system_no_input_prompt = system_prompt


class ContextV2Prompter(AlpacaPrompter):
    """Context and question as they stand, without a preamble"""

    system_prompt = ""
    system_no_input_prompt = ""

    def match_prompt_style(self) -> None:
        self.turn_format = "{instruction}\n{input}"
        self.turn_no_input_format = "{instruction}"
        self.system_format = "{system}"


class AlpacaContextPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenization Strategy to combine in-context article with a question and answer"""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["article"] + "\n===\n" + prompt["question"], "", prompt["answer"]


class ContextQaV2PromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenization Strategy to combine in-context article with a question and answer"""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return (
            "Context: " + prompt["context"] + "\nQuestion: " + prompt["question"] + "\n",
            "",
            "Answer: " + prompt["answer"],
        )


class AlpacaMissingInfoContextPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenization Strategy to combine in-context article with a question that can't be answered from the context"""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["article"] + "\n===\n" + prompt["unanswerable_question"], "", MISSING_INFO_ANSWER


def load(tokenizer, cfg) -> AlpacaContextPromptTokenizingStrategy:
    return AlpacaContextPromptTokenizingStrategy(
        AlpacaContextPrompter(PromptStyle.CHAT.value), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )


def load_v2(tokenizer, cfg) -> ContextQaV2PromptTokenizingStrategy:
    return ContextQaV2PromptTokenizingStrategy(ContextV2Prompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)


def load_404(tokenizer, cfg) -> AlpacaMissingInfoContextPromptTokenizingStrategy:
    return AlpacaMissingInfoContextPromptTokenizingStrategy(
        AlpacaContextPrompter(PromptStyle.CHAT.value), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )
