"""Module containing the PygmalionPromptTokenizingStrategy and PygmalionPrompter class"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

from axolotl.exceptions import DatasetError
from axolotl.prompt_tokenizers import (
    IGNORE_INDEX,
    PromptTokenizingStrategy,
    Tokenized,
    parse_tokenized_to_result,
    tokenize_prompt_default,
)

START = "\n<START>"


class PygmalionPromptTokenizingStrategy(PromptTokenizingStrategy):
    """Tokenizing strategy for Pygmalion.

    The persona keeps the BOS; each answer of the model is learnt with its EOS, without the prefix that announces it. With
    `train_on_inputs` everything is.
    """

    def __init__(self, prompter, tokenizer, *args, **kwargs):
        super().__init__(prompter, tokenizer, *args, **kwargs)
        prefix = self._tokenize("<|model|>", add_eos_token=False, strip_bos_token=True)
        self.bot_prefix_token_ids = list(prefix["input_ids"])

    def tokenize_prompt(self, prompt: dict[str, Any]) -> Tokenized:
        result, length = tokenize_prompt_default()
        for role, message in self.prompter.build_prompt(prompt["conversations"]):
            if role == "system":
                text = "<|system|>Persona: " + message.removesuffix(START).strip()
                part = self._tokenize(text, add_eos_token=False, strip_bos_token=False)
                learnt_from = len(part["input_ids"])
            elif role == "human":
                part = self._tokenize("<|user|> " + message.strip(), add_eos_token=False, strip_bos_token=True)
                learnt_from = len(part["input_ids"])
            elif role == "bot":
                part = self._tokenize("<|model|> " + message.strip(), add_eos_token=True, strip_bos_token=True)
                learnt_from = len(self.bot_prefix_token_ids)
            else:
                raise DatasetError(f"A message has the role `{role}`, but it must be `system`, `human` or `bot`.")
            ids = list(part["input_ids"])
            masked = 0 if self.train_on_inputs else learnt_from
            labels = ([IGNORE_INDEX] * masked + ids[masked:])[: len(ids)]
            result, length = parse_tokenized_to_result(result, length, {"input_ids": ids}, labels)
        return result


class PygmalionPrompter:
    """Prompter for Pygmalion."""

    def __init__(self, *args, **kwargs):
        """Takes the arguments of other prompters, and needs none."""

    def build_prompt(self, source: Iterable[Mapping[str, str]]) -> Generator[tuple[str, str], None, None]:
        """Role and text of each message."""
        for message in source:
            yield message["role"], message["value"]


def load(tokenizer, cfg) -> PygmalionPromptTokenizingStrategy:
    return PygmalionPromptTokenizingStrategy(PygmalionPrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)
