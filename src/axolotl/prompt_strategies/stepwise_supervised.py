"""Module for stepwise datasets, typically including a prompt and reasoning traces, and (optionally) per-step, or
per-prompt-trace labels for reward modelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.exceptions import DatasetError
from axolotl.prompt_tokenizers import IGNORE_INDEX, Tokenized


class StepwiseSupervisedPromptTokenizingStrategy:
    """Tokenizing strategy for supervised stepwise datasets, typically used for COT-reasoning.

    These datasets should include the following columns:
    - prompt: the prompt text
    - completions: a list of n completion steps
    - labels: a list of n labels indicating the "correctness" of each step

    The last token of a step, which is that of the separator, has the step's label; all others are masked.

    Args:
        tokenizer: any transformers tokenizer.
        sequence_len: rows are truncated to this many tokens.
        step_separator: text after each step.
        max_completion_length: the steps of a row are truncated to this many tokens together.
        train_on_last_step_only: only the last step has a label.
    """

    filter_rows = None
    row_offset = 0
    supports_batched = False

    def __init__(
        self,
        tokenizer,
        sequence_len: int = 2048,
        step_separator: str = "\n",
        max_completion_length: int | None = None,
        train_on_last_step_only: bool = False,
    ):
        self.tokenizer = tokenizer
        self.sequence_len = sequence_len
        self.step_separator = step_separator
        self.max_completion_length = max_completion_length
        self.train_on_last_step_only = train_on_last_step_only

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> Tokenized:
        """`input_ids`, `attention_mask` and `labels` (0, 1 or -100) of a row."""
        completions, step_labels = prompt["completions"], [_as_int(label) for label in prompt["labels"]]
        if len(completions) != len(step_labels):
            raise DatasetError(
                f"There are {len(completions)} `completions` but {len(step_labels)} `labels`; each step needs one label."
            )
        prompt_ids = self._ids(prompt["prompt"])
        if self.tokenizer.bos_token_id is not None:
            prompt_ids = [self.tokenizer.bos_token_id, *prompt_ids]
        separator_ids = self._ids(self.step_separator)
        input_ids: list[int] = []
        labels: list[int] = []
        for number, (completion, label) in enumerate(zip(completions, step_labels, strict=True)):
            step = self._ids(completion) + separator_ids
            masked = self.train_on_last_step_only and number + 1 < len(completions)
            if step:
                input_ids += step
                labels += [IGNORE_INDEX] * (len(step) - 1) + [IGNORE_INDEX if masked else label]
        input_ids = prompt_ids + input_ids[: self.max_completion_length]
        labels = [IGNORE_INDEX] * len(prompt_ids) + labels[: self.max_completion_length]
        input_ids, labels = input_ids[: self.sequence_len], labels[: self.sequence_len]
        return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _as_int(label: Any) -> int:
    if not isinstance(label, bool | int):
        raise DatasetError(f"One of the `labels` is {label!r}, but each must be true or false, or 0 or 1.")
    return int(label)


def load(tokenizer, cfg, ds_cfg: Mapping[str, Any] | None = None) -> StepwiseSupervisedPromptTokenizingStrategy:
    settings = ds_cfg or {}
    return StepwiseSupervisedPromptTokenizingStrategy(
        tokenizer,
        cfg.sequence_len,
        step_separator="\n" if settings.get("step_separator") is None else settings["step_separator"],
        max_completion_length=settings.get("max_completion_length"),
        train_on_last_step_only=bool(settings.get("train_on_last_step_only")),
    )
