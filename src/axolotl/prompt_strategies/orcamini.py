"""Prompt Strategy for finetuning Orca Mini (v2) models

see also https://huggingface.co/psmathur/orca_mini_v2_7b for more information

Use dataset type: orcamini in config.yml to use this prompt style. Compared to the alpaca_w_system.open_orca dataset type,
this one specifies the system prompt with "### System:". Made for rows of one turn.
"""

from __future__ import annotations

from collections.abc import Generator

from axolotl.prompt_strategies.alpaca_w_system import OpenOrcaPromptTokenizingStrategy, SystemDataPrompter


class OrcaMiniPrompter(SystemDataPrompter):
    """Adjusted Prompter for Orca Mini (v2) datasets"""

    def match_prompt_style(self) -> None:
        self.turn_no_input_format = "### System:\n{system}\n\n### User:\n{instruction}\n\n### Response:\n"

    def build_prompt_w_system(
        self,
        system: str | None,
        instruction: str,
        input: str | None = None,
        output: str | None = None,
    ) -> Generator[str, None, None]:
        text = self.turn_no_input_format.format(system=system or "", instruction=instruction)
        yield f"{text}{output}" if output else text


def load(tokenizer, cfg) -> OpenOrcaPromptTokenizingStrategy:
    return OpenOrcaPromptTokenizingStrategy(OrcaMiniPrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)
