"""Module for plain input/output prompt pairs

A row is a list of `segments`, each with a text and a label that says whether it is learnt. The texts are tokenized one by
one, as they stand: no special token is added.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

from axolotl.exceptions import DatasetError
from axolotl.prompt_tokenizers import (
    IGNORE_INDEX,
    PromptTokenizingStrategy,
    Tokenized,
    TokenizedRows,
    is_batch,
    join_rows,
    split_rows,
)
from axolotl.prompters import Prompter
from axolotl.utils.chat_templates.messages import read_flag


class RawInputOutputPrompter(Prompter):
    """prompter for raw i/o data"""

    def build_prompt(self, source: Iterable[Mapping[str, Any]]) -> Generator[tuple[bool, str], None, None]:
        """Label and text of each segment."""
        for segment in source:
            yield segment["label"], segment["text"]


class RawInputOutputStrategy(PromptTokenizingStrategy):
    """Prompt Strategy class for input/output pairs

    Args:
        eos_token: the tokenizer's when None.
    """

    def __init__(self, *args, eos_token: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eos_token = eos_token or self.tokenizer.eos_token

    @property
    def supports_batched(self) -> bool:
        return type(self).tokenize_prompt is RawInputOutputStrategy.tokenize_prompt

    def tokenize_prompt(self, prompt: dict[str, Any]) -> Tokenized | TokenizedRows:
        """Tokenize a row, or many."""
        segments = prompt["segments"]
        if is_batch(prompt) and not any(isinstance(segment, Mapping) for segment in segments):
            return join_rows(self._tokenize_rows(split_rows(prompt)))
        return self._tokenize_rows([prompt])[0]

    def _tokenize_rows(self, rows: list[dict[str, Any]]) -> list[Tokenized]:
        segments = [list(self._segments(row)) for row in rows]
        texts = [text for row in segments for _, text in row if text]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        tokenized = []
        for row in segments:
            input_ids: list[int] = []
            labels: list[int] = []
            for label, text in row:
                tokens = next(ids) if text else []
                input_ids += tokens
                labels += tokens if label or self.train_on_inputs else [IGNORE_INDEX] * len(tokens)
            tokenized.append({"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels})
        return tokenized

    def _segments(self, row: dict[str, Any]) -> Generator[tuple[bool, str], None, None]:
        found = row["segments"] or ()
        if isinstance(found, str) or not all(isinstance(segment, Mapping) for segment in found):
            raise DatasetError("`segments` must be a list of mappings, each with a `label` and a `text`.")
        for number, (label, text) in enumerate(self.prompter.build_prompt(found)):
            if not isinstance(text, str):
                raise DatasetError(f"`segments[{number}].text` is {type(text).__name__}, but it must be text.")
            yield label is not None and read_flag(label, f"`segments[{number}].label`"), text


def load(tokenizer, cfg) -> RawInputOutputStrategy:
    return RawInputOutputStrategy(RawInputOutputPrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)
