"""Module containing the MetharmenPromptTokenizingStrategy and MetharmePrompter class"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy
from axolotl.prompters import AlpacaPrompter

NUM_EOS_TOKENS = 3


class MetharmePromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for the Metharme models: prompt and answer as they stand, then EOS three times."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["prompt"], "", prompt["generation"]

    def _token_ids(
        self, texts: Sequence[str], add_eos_token: bool = True, strip_bos_token: bool = False
    ) -> list[list[int]]:
        rows = super()._token_ids(texts, add_eos_token=False)
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        for ids in rows:
            if add_eos_token and ids:
                missing = NUM_EOS_TOKENS - (ids[-1] == eos)
                ids += [eos] * max(min(missing, self.max_length - len(ids)), 0)
            if strip_bos_token and ids and ids[0] == bos:
                del ids[0]
        return rows


class MetharmePrompter(AlpacaPrompter):
    """Prompter for the Metharme models."""

    system_prompt = ""
    system_no_input_prompt = ""
    system_format = ""
    turn_format = "{instruction}"
    turn_no_input_format = "{instruction}"

    def __init__(self, *args, **kwargs):
        """Takes the arguments of other prompters, and needs none."""

    def match_prompt_style(self) -> None:
        """There is one style."""


def load(tokenizer, cfg) -> MetharmePromptTokenizingStrategy:
    return MetharmePromptTokenizingStrategy(MetharmePrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)
