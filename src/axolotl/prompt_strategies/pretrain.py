"""Plain text for pretraining

A text is cut into windows of `sequence_len` tokens with EOS at the end of each; neighbours overlap, so that what stands at
a border is seen with what comes before it. All of it is learnt, and no text is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.prompt_tokenizers import PromptTokenizingStrategy, TokenizedRows, is_batch, learnt_text
from axolotl.prompters import Prompter

MAX_OVERLAP = 256
"""Tokens that neighbouring windows share, at most."""


class PretrainTokenizationStrategy(PromptTokenizingStrategy):
    """Windows of text.

    Args:
        text_column: column of the text.
        max_length: tokens of a window, EOS included; `sequence_len` by default.
        overlap: tokens that neighbouring windows share; at most 256 and less than half a window by default.
    """

    def __init__(
        self,
        *args,
        text_column: str = "text",
        max_length: int | None = None,
        overlap: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.text_column = text_column
        if max_length is not None:
            self.max_length = max_length
        self.overlap = min(MAX_OVERLAP, (self.max_length - 1) // 2) if overlap is None else overlap

    @property
    def supports_batched(self) -> bool:
        return True

    def tokenize_prompt(self, prompt: dict[str, Any]) -> TokenizedRows:
        """Tokenize a row, or many; always a dict of lists of windows."""
        texts = prompt[self.text_column]
        texts = texts if is_batch(prompt) else [texts]
        windows = self._windows([learnt_text({self.text_column: text}, text) for text in texts])
        return {
            "input_ids": windows,
            "attention_mask": [[1] * len(ids) for ids in windows],
            "labels": [list(ids) for ids in windows],
        }

    def _windows(self, texts: list[str]) -> list[list[int]]:
        """Windows of all texts, each with EOS. An empty text has none."""
        texts = [text for text in texts if text]
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        size = self.max_length - len(eos)
        prefix, suffix = self._special_tokens()
        room = size - len(prefix) - len(suffix)
        step = max(room - self.overlap, 1)
        windows = []
        for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []:
            last = max(len(ids) - self.overlap, 1)
            for start in range(0, last if len(ids) > room else 1, step):
                windows.append([*prefix, *ids[start : start + room], *suffix, *eos])
        return windows

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text, without an EOS that it adds itself."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                after = [token for token in whole[start + len(plain) :] if token != self.tokenizer.eos_token_id]
                return whole[:start], after
        return [], []


def load(tokenizer, cfg, ds_cfg: Mapping[str, Any] | None = None) -> PretrainTokenizationStrategy:
    column = (ds_cfg or {}).get("text_column") or (ds_cfg or {}).get("field") or "text"
    # Joined texts are told apart by a pad token, which takes the place of one token.
    max_length = cfg.sequence_len - 1 if cfg.pretraining_sample_concatenation else cfg.sequence_len
    return PretrainTokenizationStrategy(
        Prompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len, text_column=column, max_length=max_length
    )
