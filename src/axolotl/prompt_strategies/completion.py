"""Basic completion text

Raw text: tokenized with EOS, cut into pieces of `sequence_len`, all of it learnt. A row may become several rows.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from axolotl.prompt_tokenizers import (
    InstructionPromptTokenizingStrategy,
    Tokenized,
    TokenizedRows,
    is_batch,
    learnt_text,
    split_rows,
)
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

MAX_PIECES = 64
"""How many pieces of `sequence_len` are made of one text."""


class CompletionPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for Completion prompts.

    Args:
        max_length: text beyond this many tokens is cut off (with a warning).
    """

    def __init__(self, *args, max_length: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._field = "text"
        if max_length is not None:
            self.max_length = max_length

    @property
    def supports_batched(self) -> bool:
        return True

    @property
    def field(self) -> str:
        """The column that holds the text."""
        return self._field

    @field.setter
    def field(self, new_field: str) -> None:
        self._field = new_field

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt[self.field], "", ""

    def tokenize_prompt(self, prompt: dict[str, Any]) -> TokenizedRows:
        """Tokenize a row, or many; always a dict of lists of pieces."""
        rows = split_rows(prompt) if is_batch(prompt) else [prompt]
        texts = [self._build_text(row) for row in rows]
        pieces: TokenizedRows = {"input_ids": [], "attention_mask": [], "labels": []}
        for tokenized in self._tokenize_many(texts):
            if len(tokenized["input_ids"]) > self.max_length:
                LOG.warning_once(
                    f"A text of a completion dataset is longer than {self.max_length} tokens; what follows is not "
                    "learnt. Split such texts into several rows."
                )
            for key, values in tokenized.items():
                starts = range(0, min(len(values), self.max_length), self.sequence_len)
                pieces[key] += [values[i : min(i + self.sequence_len, self.max_length)] for i in starts]
        return pieces

    def _tokenize_many(self, texts: list[str]) -> list[Tokenized]:
        if type(self)._tokenize is not InstructionPromptTokenizingStrategy._tokenize:
            return [dict(self._tokenize(text)) for text in texts]
        return self._tokenize_texts(texts)

    def _build_text(self, row: dict[str, Any]) -> str:
        text, _, _ = self.parse_instruction_fields(row)
        return self._build_full_prompt(learnt_text(row, text), None, None)

    def _build_full_prompt(self, instruction: str, input: str | None, response: str | None) -> str:
        return next(iter(self.prompter.build_prompt(instruction, input, response)))


class CompletionPrompter:
    """Prompter for completion"""

    def build_prompt(
        self, instruction: str, input: str | None = None, output: str | None = None
    ) -> Generator[str, None, None]:
        yield instruction


def load(tokenizer, cfg, ds_cfg: dict[str, Any] | None = None) -> CompletionPromptTokenizingStrategy:
    strategy = CompletionPromptTokenizingStrategy(
        CompletionPrompter(),
        tokenizer,
        cfg.train_on_inputs,
        cfg.sequence_len,
        max_length=cfg.sequence_len * MAX_PIECES,
    )
    if ds_cfg and ds_cfg.get("field"):
        strategy.field = ds_cfg["field"]
    return strategy
