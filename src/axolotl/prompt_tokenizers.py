"""Tokenizing strategies: from a row to `input_ids`, `attention_mask` and `labels` (-100 where nothing is learnt).

A strategy overrides `parse_instruction_fields` to say which fields of its rows are instruction, input and answer. The
prompt is tokenized as the tokenizer does by default (with its BOS), the answer on its own without BOS and with EOS.

A strategy works on one row (a dict of values) or, when `supports_batched`, on many (a dict of lists).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from tokenizers import Tokenizer
from transformers import TokenizersBackend
from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase, TruncationStrategy
from transformers.utils import PaddingStrategy

from axolotl.exceptions import DatasetError
from axolotl.prompters import IGNORE_TOKEN_ID, Prompter
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from axolotl.utils.chat_templates.properties import NamedProperties

LOG = get_logger(__name__)

IGNORE_INDEX = IGNORE_TOKEN_ID
LLAMA_DEFAULT_PAD_TOKEN = "<pad>"
LLAMA_DEFAULT_EOS_TOKEN = "</s>"
LLAMA_DEFAULT_BOS_TOKEN = "<s>"
LLAMA_DEFAULT_UNK_TOKEN = "<unk>"

Tokenized = dict[str, list[int]]
TokenizedRows = dict[str, list[list[int]]]
RowName = Callable[[int], str]
"""What messages call a row of a dataset, from its index."""


def name_row(index: int) -> str:
    """The `RowName` of a dataset whose rows are those of its source."""
    return f"row {index}"


class InvalidDataException(Exception):
    """Exception raised when the data is invalid"""


class DatasetWrappingStrategy(abc.ABC):
    """Abstract class for wrapping datasets for Chat Messages"""

    @abc.abstractmethod
    def wrap_dataset(
        self, dataset, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs
    ) -> Any:
        """The dataset, tokenized."""


class PromptTokenizingStrategy(abc.ABC):
    """Abstract class for tokenizing strategies

    Args:
        prompter: builds the text of a row.
        tokenizer: any transformers tokenizer.
        train_on_inputs: whether the prompt is learnt too.
        sequence_len: rows longer than this are for the length policy.
    """

    filter_rows: Callable | None = None
    row_offset: int = 0
    """Index of the first row given to `tokenize_prompt`, for messages. Whoever walks a dataset sets it."""
    name_row: RowName = staticmethod(name_row)
    """What messages call a row. Whoever walks a part of a dataset sets it."""
    named_properties: NamedProperties | None = None
    """The properties of messages that the config names. Whoever reads a dataset looks whether any message has them."""

    def __init__(
        self,
        prompter: Prompter,
        tokenizer: PreTrainedTokenizerBase,
        train_on_inputs: bool = False,
        sequence_len: int = 2048,
    ):
        self.prompter = prompter
        self.tokenizer = tokenizer
        self.train_on_inputs = bool(train_on_inputs)
        self.sequence_len = sequence_len
        self.max_length = sequence_len

    @abc.abstractmethod
    def tokenize_prompt(self, prompt: Any) -> Any:
        """`input_ids`, `attention_mask` and `labels` of a row."""

    @property
    def supports_batched(self) -> bool:
        """Whether `tokenize_prompt` also takes a dict of lists."""
        return False

    def _tokenize(self, prompt: str, add_eos_token: bool = True, strip_bos_token: bool = False) -> BatchEncoding:
        """Tokenize one text; see `_tokenize_texts`."""
        return BatchEncoding(self._tokenize_texts([prompt], add_eos_token, strip_bos_token)[0])

    def _tokenize_texts(
        self, texts: Sequence[str], add_eos_token: bool = True, strip_bos_token: bool = False
    ) -> list[Tokenized]:
        """Tokenize many texts at once. One that is longer than `max_length` stays longer, also without its BOS, so that the length
        policy sees it; what is cut off comes two tokens later.

        Args:
            texts: an empty text gives empty lists.
            add_eos_token: append EOS where it is missing and there is room.
            strip_bos_token: drop the BOS that the tokenizer puts first.

        Returns:
            For each text, `input_ids`, `attention_mask` and `labels` (a copy of the ids).
        """
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}
            for ids in self._token_ids(texts, add_eos_token, strip_bos_token)
        ]

    def _token_ids(
        self, texts: Sequence[str], add_eos_token: bool = True, strip_bos_token: bool = False
    ) -> list[list[int]]:
        """The ids alone; see `_tokenize_texts`."""
        full = [text for text in texts if text]
        encoded = iter(encode_texts(self.tokenizer, full, self.max_length + 2) if full else ())
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        rows: list[list[int]] = []
        for text in texts:
            ids = next(encoded) if text else []
            if not ids:
                LOG.warning_once("Empty text requested for tokenization: nothing is learnt from it.")
            elif add_eos_token and eos is not None and ids[-1] != eos and len(ids) < self.max_length:
                ids.append(eos)
            if ids and strip_bos_token and ids[0] == bos:
                del ids[0]
            rows.append(ids)
        return rows


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> list[list[int]]:
    """The ids that `tokenizer(texts)` gives, special tokens included, truncated at `max_length`.

    A tokenizer that calls the backend as transformers does is asked for ids without offsets, which take up to a third of the time.
    """
    backend = plain_backend(tokenizer, max_length)
    if backend is not None:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts)]
    encoded: Any = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return encoded["input_ids"]


def plain_backend(tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Tokenizer | None:
    """The backend of a tokenizer that only hands texts on to it, set up as for a call; None for one that does more.

    Args:
        tokenizer: any tokenizer.
        max_length: where texts are truncated; nowhere when None.
    """
    if not _calls_backend_plainly(tokenizer):
        return None
    tokenizer.set_truncation_and_padding(
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.DO_NOT_TRUNCATE
        if max_length is None
        else TruncationStrategy.LONGEST_FIRST,
        max_length=max_length,
        stride=0,
        pad_to_multiple_of=None,
        padding_side=None,
    )
    backend = tokenizer.backend_tokenizer
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _calls_backend_plainly(tokenizer: PreTrainedTokenizerBase) -> TypeGuard[TokenizersBackend]:
    """Whether a tokenizer hands texts to the backend without doing anything of its own to them or to the ids."""
    names = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding", "_switch_to_input_mode")
    return isinstance(tokenizer, TokenizersBackend) and all(
        getattr(type(tokenizer), name, None) is getattr(TokenizersBackend, name, None) and name not in vars(tokenizer)
        for name in names
    )


def is_batch(prompt: dict[str, Any]) -> bool:
    """Whether a dict holds many rows (a list per field) of a strategy whose fields are not lists themselves."""
    return bool(prompt) and all(isinstance(values, list) for values in prompt.values())


def split_rows(batch: dict[str, list]) -> list[dict[str, Any]]:
    """The rows of a dict of lists."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def check_text(row: dict[str, Any], *values: Any) -> None:
    """Refuse what is not text, instead of teaching the model the word None.

    Raises:
        DatasetError: names the field of `row` that holds the value.
    """
    for value in values:
        if not isinstance(value, str):
            fields = " or ".join(f"`{name}`" for name, held in row.items() if held is value) or "a field"
            raise DatasetError(
                f"{fields} is {'null' if value is None else type(value).__name__}, but it must be text. "
                "Fill it in, convert it, or leave the row out."
            )


def learnt_text(row: dict[str, Any], value: Any) -> str:
    """An answer or another text that is learnt. Null is an empty one: nothing is learnt from it, as from any empty text.

    Raises:
        DatasetError: it is neither text nor null.
    """
    if value is None:
        return ""
    check_text(row, value)
    return value


def join_rows(rows: Iterable[dict[str, Any]]) -> dict[str, list]:
    """A dict of lists from rows that have the same fields."""
    joined: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        for key, value in row.items():
            joined.setdefault(key, []).append(value)
    return joined


class InstructionPromptTokenizingStrategy(PromptTokenizingStrategy):
    """Tokenizing strategy for instruction-based prompts."""

    @property
    def supports_batched(self) -> bool:
        """True unless a subclass tokenizes single rows in its own way."""
        return not any(
            _is_overridden(self, name) for name in ("tokenize_prompt", "_tokenize", "_tokenize_texts", "_join")
        )

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, ...]:
        """Instruction, input and answer of a row."""
        raise NotImplementedError(f"{type(self).__name__} does not define parse_instruction_fields")

    def _build_texts(self, prompt: dict[str, Any]) -> tuple[str, str]:
        """The text before the answer, and the answer."""
        instruction, input_text, response = self.parse_instruction_fields(prompt)
        check_text(prompt, instruction)
        return next(iter(self.prompter.build_prompt(instruction, input_text))), learnt_text(prompt, response)

    def tokenize_prompt(self, prompt: dict[str, Any]) -> Tokenized | TokenizedRows:
        """Tokenize a row, or many."""
        if is_batch(prompt):
            texts = [self._build_texts(row) for row in split_rows(prompt)]
            starts = self._token_ids([start for start, _ in texts], add_eos_token=False)
            answers = self._token_ids([answer for _, answer in texts], strip_bos_token=True)
            return {
                "input_ids": [start + answer for start, answer in zip(starts, answers, strict=True)],
                "attention_mask": [
                    [1] * (len(start) + len(answer)) for start, answer in zip(starts, answers, strict=True)
                ],
                "labels": [
                    (start if self.train_on_inputs else [IGNORE_INDEX] * len(start)) + answer
                    for start, answer in zip(starts, answers, strict=True)
                ],
            }
        start, answer = self._build_texts(prompt)
        return self._join(
            self._tokenize(start, add_eos_token=False),
            self._tokenize(answer, strip_bos_token=True, add_eos_token=True),
        )

    def _join(self, start: Any, answer: Any) -> Tokenized:
        start_labels = list(start["input_ids"]) if self.train_on_inputs else [IGNORE_INDEX] * len(start["input_ids"])
        return {
            "input_ids": list(start["input_ids"]) + list(answer["input_ids"]),
            "attention_mask": list(start["attention_mask"]) + list(answer["attention_mask"]),
            "labels": start_labels + list(answer["input_ids"]),
        }

    def _build_full_prompt(self, instruction: str, input: str, response: str) -> str:
        return next(iter(self.prompter.build_prompt(instruction, input, response)))


def _is_overridden(strategy: InstructionPromptTokenizingStrategy, name: str) -> bool:
    ours = getattr(InstructionPromptTokenizingStrategy, name)
    return name in vars(strategy) or getattr(type(strategy), name) is not ours


class AlpacaPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for Alpaca prompts."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["instruction"], prompt.get("input") or "", prompt["output"]


class AlpacaMultipleChoicePromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for Alpaca Multiple Choice prompts."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        choices = "\n".join(f'- "{choice}"' for choice in prompt["choices"])
        answer = prompt["solution"] if prompt.get("solution") is not None else prompt["explanation"]
        return prompt["question"], choices, answer


class JeopardyPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for Jeopardy prompts."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["question"], prompt["category"], "what is " + prompt["answer"]


class OpenAssistantPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for OpenAssistant prompts."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["INSTRUCTION"], "", prompt["RESPONSE"]


class SummarizeTLDRPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for SummarizeTLDR prompts."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["article"], "", prompt["summary"]


class GPTeacherPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for GPTeacher prompts."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["instruction"], prompt.get("input") or "", prompt["response"]


class NomicGPT4AllPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for NomicGPT4All prompts."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["prompt"], "", prompt["response"]


class ReflectionPromptTokenizingStrategy(PromptTokenizingStrategy):
    """Tokenizing strategy for Reflection prompts."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str, str, str]:
        """Instruction, input, thought, reflection and corrected answer of a row."""
        raise NotImplementedError(f"{type(self).__name__} does not define parse_instruction_fields")

    def tokenize_prompt(self, prompt: dict[str, Any]) -> Tokenized:
        instruction, input_text, output, reflection, corrected = self.parse_instruction_fields(prompt)
        full = self._tokenize(self._build_full_prompt(instruction, input_text, output, reflection, corrected))
        row = {key: list(full[key]) for key in ("input_ids", "attention_mask", "labels")}
        if not self.train_on_inputs:
            start = self._tokenize(next(iter(self.prompter.build_prompt(instruction, input_text))), add_eos_token=False)
            masked = min(len(start["input_ids"]), len(row["labels"]))
            row["labels"][:masked] = [IGNORE_INDEX] * masked
        return row

    def _build_full_prompt(self, instruction: str, input: str, output: str, reflection: str, corrected: str) -> str:
        return next(iter(self.prompter.build_prompt(instruction, input, output, reflection, corrected)))


class AlpacaReflectionPTStrategy(ReflectionPromptTokenizingStrategy):
    """Tokenizing strategy for Alpaca Reflection prompts."""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str, str, str]:
        return (
            prompt["instruction"],
            prompt.get("input") or "",
            prompt["output"],
            prompt["reflection"],
            prompt["corrected"],
        )


def tokenize_prompt_default() -> tuple[Tokenized, int]:
    """Returns the default values for the tokenize prompt function"""
    return {"input_ids": [], "attention_mask": [], "labels": []}, 0


def parse_tokenized_to_result(
    result: Tokenized,
    current_len: int,
    res: dict[str, list[int]],
    labels: list[int],
    pad_token_id: int | None = None,
) -> tuple[Tokenized, int]:
    """Parses the tokenized prompt and append the tokenized input_ids, attention_mask and labels to the result

    Args:
        result: the lists to append to.
        current_len: their length.
        res: tokenized text, with `input_ids`.
        labels: its labels.
        pad_token_id: the id that gets attention 0.
    """
    ids = res["input_ids"]
    result["input_ids"] += ids
    result["attention_mask"] += [0 if token == pad_token_id else 1 for token in ids]
    result["labels"] += labels
    return result, current_len + len(ids)
