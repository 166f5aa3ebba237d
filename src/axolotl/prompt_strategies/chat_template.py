"""HF Chat Templates prompt strategy

A conversation is rendered once as text, with the template that inference uses, and tokenized once. Which tokens belong to
which turn is read from the text (`utils.chat_templates.spans`); a token that reaches into a turn belongs to it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from axolotl._lazy import lazy_names
from axolotl.exceptions import ConfigError, DatasetError, TokenizerError
from axolotl.prompt_tokenizers import (
    IGNORE_INDEX,
    PromptTokenizingStrategy,
    Tokenized,
    join_rows,
    plain_backend,
    split_rows,
)
from axolotl.prompters import Prompter
from axolotl.utils.chat_templates.base import get_chat_template_from_config
from axolotl.utils.chat_templates.end_tokens import END_TOKEN_REACH, end_tokens_of
from axolotl.utils.chat_templates.labels import EndTokens, TurnLabels
from axolotl.utils.chat_templates.messages import (
    DEFAULT_ROLES,
    THINKING_DETAIL,
    TRAINING,
    TRAINING_DETAIL,
    Turn,
    describe_value,
    for_template,
    join_parts,
    names_read_by,
    read_details,
    read_flag,
    read_messages,
    read_tools,
    read_turn,
    split_thinking,
    variables_read_by,
)
from axolotl.utils.chat_templates.properties import NamedProperties
from axolotl.utils.chat_templates.spans import RENDER_ERRORS, Borders, Tokens, TurnSpans, common_prefix
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

LOG = get_logger(__name__)

_MISTRAL = "axolotl.prompt_strategies.mistral_chat"  # which is built upon this module
__getattr__, __dir__ = lazy_names(__name__, {"MistralPrompter": _MISTRAL, "MistralStrategy": _MISTRAL})

IGNORE_TOKEN_ID = IGNORE_INDEX
NAMES_OF_COLUMNS = ("field_system", "field_tools")
NAMES_OF_PROPERTIES = ("message_field_training", "message_field_training_detail", "field_thinking")
TRAIN_ON_END = ("all", "turn", "last", "none", None)


class ChatTemplatePrompter(Prompter):
    """Prompter for HF chat templates

    Args:
        tokenizer: tokenizes what the template writes.
        chat_template: the text of the template.
        processor: the processor of a multimodal model, for rows with images.
        max_length: `sequence_len`; longer conversations are left whole here.
        message_property_mappings: key that the template reads -> key of the messages.
        message_field_training: key of a message that says whether it is learnt.
        message_field_training_detail: key of a message that says which of its characters are learnt.
        field_messages: column with the messages.
        field_system: column with a system prompt, used where the messages have none.
        field_tools: column with the tools.
        field_thinking: key of a message with its reasoning.
        roles: role that the template knows -> the role, or the roles, of the messages that become it.
        template_thinking_key: key under which the template reads the reasoning.
        chat_template_kwargs: further variables for the template.
        drop_system_message: leave out the system message of the row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str,
        processor: ProcessorMixin | None = None,
        max_length: int = 2048,
        message_property_mappings: Mapping[str, str] | None = None,
        message_field_training: str | None = None,
        message_field_training_detail: str | None = None,
        field_messages: str = "messages",
        field_system: str = "system",
        field_tools: str = "tools",
        field_thinking: str = "reasoning_content",
        roles: Mapping[str, str | Sequence[str]] | None = None,
        template_thinking_key: str | None = "reasoning_content",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        drop_system_message: bool = False,
    ):
        self.roles = (
            {
                source: target
                for target, sources in roles.items()
                for source in ([sources] if isinstance(sources, str) else sources)
            }
            if roles
            else DEFAULT_ROLES
        )
        self.message_property_mappings = dict(message_property_mappings or {"role": "role", "content": "content"})
        if template_thinking_key and field_thinking:
            self.message_property_mappings.setdefault(template_thinking_key, field_thinking)
        self.message_field_training = message_field_training
        self.message_field_training_detail = message_field_training_detail
        self.field_messages = field_messages
        self.field_system = field_system
        self.field_tools = field_tools
        self.field_thinking = field_thinking
        self.template_thinking_key = template_thinking_key
        self.tokenizer = tokenizer
        self.processor = processor
        self.chat_template = chat_template
        self.tool_template = chat_template
        """The text of the template of conversations with tools."""
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.max_length = max_length
        self.drop_system_message = drop_system_message

    @property
    def chat_template_msg_variables(self) -> frozenset[str]:
        """The names that the template reads, with tools or without."""
        return names_read_by(self.chat_template, self.tool_template)

    @property
    def writes_tools(self) -> bool:
        """Whether the template reads the tools of a conversation."""
        return "tools" in variables_read_by(self.tool_template)

    def render(
        self, conversation: Sequence[Turn], tools: list | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation."""
        text = self.tokenizer.apply_chat_template(
            for_template(conversation),
            tools=tools,
            chat_template=self.chat_template if tools is None else self.tool_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.chat_template_kwargs,
        )
        return str(text)

    def build_prompt(
        self,
        conversation: Sequence[Turn],
        add_generation_prompt: bool = False,
        images: list | None = None,
        tools: list | None = None,
    ) -> Any:
        """Build a prompt from a conversation.

        Args:
            conversation: the turns.
            add_generation_prompt: end with the header of an assistant turn.
            images: images of the conversation; needs a processor.
            tools: the tools the conversation may call.

        Returns:
            The token ids; with images, what the processor returns for them.
        """
        if images and self.processor is not None:
            text = self.processor.apply_chat_template(
                for_template(conversation),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.chat_template_kwargs,
            )
            batch = self.processor(text=text, images=images, return_tensors="pt")
            return {
                key: value.tolist() if key == "pixel_values" else value.squeeze(0).tolist()
                for key, value in batch.items()
            }
        text = self.render(conversation, tools=tools, add_generation_prompt=add_generation_prompt)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class _Row(NamedTuple):
    turns: list[Turn]
    tools: list | None


class ChatTemplateStrategy(PromptTokenizingStrategy):
    """Tokenizing strategy for instruction-based prompts.

    Args:
        prompter: renders the conversations.
        tokenizer: the same tokenizer as the prompter's.
        train_on_inputs: learn every turn.
        sequence_len: longer conversations are left whole here.
        roles_to_train: the roles that are learnt.
        train_on_eos: which EOS tokens are learnt: `all`, those of learnt turns (`turn`), the `last`, or `none`.
        train_on_eot: the same for end-of-turn tokens; `train_on_eos` when None.
        eot_tokens: the end-of-turn tokens; EOS when None.
        split_thinking: move reasoning between tags to the key that the template reads.

    When roles, end tokens and keys of messages are all left open, only the last turn is learnt.

    Raises:
        ConfigError: `train_on_eos` and `train_on_eot` contradict each other, or one has an unknown value.
        TokenizerError: an end-of-turn token is not one token.
    """

    def __init__(
        self,
        prompter: ChatTemplatePrompter,
        tokenizer: PreTrainedTokenizerBase,
        train_on_inputs: bool,
        sequence_len: int,
        roles_to_train: Sequence[str] | None = None,
        train_on_eos: str | None = None,
        train_on_eot: str | None = None,
        eot_tokens: Sequence[str] | None = None,
        split_thinking: bool | None = False,
    ):
        super().__init__(prompter, tokenizer, train_on_inputs, sequence_len)
        self.prompter: ChatTemplatePrompter = prompter
        self.roles_to_train = [prompter.roles.get(role, role) for role in roles_to_train or ()]
        self.train_on_eos = train_on_eos
        self.train_on_eot = train_on_eot if train_on_eot is not None else train_on_eos
        self.split_thinking = bool(split_thinking)
        eos = str(tokenizer.eos_token) if tokenizer.eos_token else None
        self.eos_token_id: int | None = tokenizer.convert_tokens_to_ids(eos) if eos else None
        self.eot_tokens = list(eot_tokens) if eot_tokens else [eos] if eos else []
        self._check_end_tokens()
        self._eot_ids = frozenset(self._token_id(token) for token in self.eot_tokens)
        self._eos_ids = frozenset(() if self.eos_token_id is None else (self.eos_token_id,))
        self._control_ids = self._find_control_ids()
        self._spans = TurnSpans(prompter.render)
        ends = EndTokens(self._eot_ids, self._eos_ids, self.train_on_eot, self.train_on_eos)
        thinking_key = prompter.template_thinking_key or "reasoning_content"
        self._turn_labels = TurnLabels(self._spans, ends, self._control_ids, thinking_key)
        self._said: set[str] = set()
        self.dataset_name: str | None = None
        """The dataset as the user wrote it, for messages."""

    @property
    def supports_batched(self) -> bool:
        return True

    @property
    def learns_last_turn_only(self) -> bool:
        """Whether nothing says what to learn, so that the last turn is the answer and all before it the prompt."""
        return not (
            self.roles_to_train
            or self.train_on_eos
            or self.train_on_eot
            or self.prompter.message_field_training
            or self.prompter.message_field_training_detail
        )

    # tokens

    def _check_end_tokens(self) -> None:
        for key, value in (("train_on_eos", self.train_on_eos), ("train_on_eot", self.train_on_eot)):
            if value not in TRAIN_ON_END:
                raise ConfigError(f"`{key}: {value}` is not known. Write `all`, `turn`, `last` or `none`.")
        eos = str(self.tokenizer.eos_token) if self.tokenizer.eos_token else None
        if eos in self.eot_tokens and self.train_on_eos != self.train_on_eot:
            raise ConfigError(
                "Conflict between train_on_eos and train_on_eot. eos_token is in eot_tokens and train_on_eos != "
                f"train_on_eot (eos_token: {eos}, eot_tokens: {self.eot_tokens}, train_on_eos: {self.train_on_eos}, "
                f"train_on_eot: {self.train_on_eot}). Write the same value for both, or leave {eos} out of `eot_tokens`."
            )
        self._warn_of_absent_ends(eos)

    def _warn_of_absent_ends(self, eos: str | None) -> None:
        """Warn of tokens that the template does not hold; those that are no token at all are left out, as none can follow a turn."""
        template = self.prompter.chat_template + self.prompter.tool_template
        for token in [token for token in self.eot_tokens if token != eos and token not in template]:
            LOG.warning(
                f"EOT token '{token}' not found in chat_template. Please check if your template/EOT token is correct."
            )
            if len(self.tokenizer.encode(token, add_special_tokens=False)) != 1:
                self.eot_tokens.remove(token)
        learns_eos = self.train_on_eos not in (None, "none") and self.eot_tokens == [eos]
        if learns_eos and eos and eos not in template and "eos_token" not in template:
            LOG.warning(
                f"EOS token '{eos}' not found in chat_template. Please check if your template/EOS token is correct."
            )

    def _find_control_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}

    def _token_id(self, token: str) -> int:
        if token == self.tokenizer.eos_token and self.eos_token_id is not None:
            return self.eos_token_id
        try:
            ids = self.tokenizer.encode(token, add_special_tokens=False)
        except (ValueError, TypeError, UnicodeError) as error:
            raise TokenizerError(f"EOT token encoding failed for EOT token '{token}'. Error: {error}") from error
        if not ids:
            raise TokenizerError(
                f"EOT token encoding failed. Please check if the token is valid and can be encoded: '{token}' gives no token."
            )
        if len(ids) > 1:
            raise TokenizerError(
                f"EOT token '{token}' is encoded as multiple tokens: {ids}. Please add it under `tokens: ` in the config, "
                "or (recommended) override unused added_tokens via `added_tokens_overrides: `."
            )
        return ids[0]

    def _encode(self, texts: list[str]) -> list[Tokens]:
        backend = plain_backend(self.tokenizer)
        if backend is not None:
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            return [Tokens(encoding.ids, Borders(encoding, 0), Borders(encoding, 1)) for encoding in encodings]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )
        if encoded.encodings:
            pairs = zip(encoded["input_ids"], encoded.encodings, strict=True)
            return [Tokens(ids, Borders(encoding, 0), Borders(encoding, 1)) for ids, encoding in pairs]
        return [self._aligned(text, ids) for text, ids in zip(texts, encoded["input_ids"], strict=True)]

    def _aligned(self, text: str, ids: list[int]) -> Tokens:
        """Offsets for a tokenizer that keeps none: how much text the first k tokens decode to.

        Raises:
            TokenizerError: the tokens do not decode to the text, so that nobody can say where they stand.
        """
        pieces = [self.tokenizer.decode([token], skip_special_tokens=False) for token in ids]
        if "".join(pieces) == text:
            ends = list(accumulate(len(piece) for piece in pieces))
        elif self.tokenizer.decode(ids, skip_special_tokens=False) == text:
            # Characters that are several tokens: only together they decode to text.
            heads = (self.tokenizer.decode(ids[: k + 1], skip_special_tokens=False) for k in range(len(ids)))
            ends = [common_prefix(head, text) for head in heads]
        else:
            raise TokenizerError(
                f"The tokenizer {type(self.tokenizer).__name__} does not say where its tokens stand in a text, and they do not decode "
                "to it either. Use a fast tokenizer: `tokenizer_use_fast: true`."
            )
        return Tokens(ids, [0, *ends[:-1]], ends)

    def find_first_eot_token(self, input_ids: Sequence[int], start_idx: int) -> int:
        """Find the first EOT token in the input_ids starting from start_idx."""
        return _first_of(self._eot_ids, input_ids, start_idx)

    def find_first_eos_token(self, input_ids: Sequence[int], start_idx: int) -> int:
        """Find the first EOS token in the input_ids starting from start_idx."""
        return _first_of(self._eos_ids, input_ids, start_idx)

    def find_turn(self, turns: Sequence[Turn], turn_idx: int, tools: list | None = None) -> tuple[int, int]:
        """Locate the starting and ending indices of the specified turn in a conversation.

        Returns:
            A half-open range of the tokens of the whole conversation; (-1, -1) when the turn has none of its own.
        """
        if turn_idx >= len(turns):
            raise ValueError(f"Turn index {turn_idx} out of range")
        text = self.prompter.render(turns, tools=tools)
        (span,) = self._spans.find(text, for_template(turns), tools, [turn_idx])
        if span is None:
            self._warn_once("turn", f"Could not find content start/end boundary for turn {turn_idx}")
            return -1, -1
        return self._encode([text])[0].within(span, self._control_ids, text)

    # rows

    def tokenize_prompt(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Public method that can handle either a single prompt or a batch of prompts."""
        if not self.is_prompt_batched(prompt):
            return self._tokenize_rows([prompt])[0]
        return join_rows(self._tokenize_rows(split_rows(prompt)))

    def is_prompt_batched(self, prompt: Mapping[str, Any]) -> bool:
        """Whether a dict holds many rows: a list per column, and that of the messages is no list of messages."""
        messages = prompt.get(self.prompter.field_messages)
        if not isinstance(messages, list) or not messages:
            return False
        return all(isinstance(column, list) for column in prompt.values()) and not all(
            isinstance(item, Mapping) for item in messages
        )

    def _tokenize_rows(self, prompts: list[dict[str, Any]]) -> list[Tokenized]:
        rows = [_Row(self.get_conversation_thread(prompt), self._get_tools(prompt)) for prompt in prompts]
        texts = [self._render_row(row) for row in rows]
        encoded = self._encode(texts)
        tokenized = []
        for index, (row, text, tokens) in enumerate(zip(rows, texts, encoded, strict=True)):
            if self.learns_last_turn_only:
                labels = self._label_last_turn(row, text, tokens)
            else:
                labels = self._label_turns(row, text, tokens, self.row_offset + index)
            tokenized.append({"input_ids": tokens.ids, "attention_mask": [1] * len(tokens.ids), "labels": labels})
        return tokenized

    def _render_row(self, row: _Row) -> str:
        try:
            return self.prompter.render(row.turns, tools=row.tools)
        except RENDER_ERRORS as error:
            odd = [
                f"message {index} (`{turn['role']}`) has {describe_value(turn.get('content'))} as its content"
                for index, turn in enumerate(row.turns)
                if not isinstance(turn.get("content"), str)
            ]
            where = f" Of its messages, {odd[0]}." if odd else ""
            mapping = " If it stands under another key, say so in `message_property_mappings`." if odd else ""
            raise DatasetError(
                f"The chat template cannot render the row: {error}.{where}{mapping} Correct the row or leave it out."
            ) from error

    def get_conversation_thread(self, prompt: Mapping[str, Any]) -> list[Turn]:
        """The turns of a row, as the template reads them, with the keys that decide on their labels."""
        prompter = self.prompter
        messages = read_messages(prompt, prompter.field_messages)
        turns = [self.transform_message(message) for message in messages]
        if turns[0].get("role") != "system":
            system = self._get_system(prompt)
            turns[:0] = [] if system is None else [{"role": "system", "content": system}]
        if prompter.drop_system_message and turns[0].get("role") == "system":
            turns = turns[1:]
        if not turns:
            raise DatasetError(
                "The row holds a system message only, and `drop_system_message: true` leaves nothing of it."
            )
        return turns

    def transform_message(self, message: Mapping[str, Any]) -> Turn:
        """A message of a row as a turn, with the keys that decide on its labels."""
        prompter = self.prompter
        turn = read_turn(
            message, prompter.message_property_mappings, prompter.roles, prompter.chat_template_msg_variables
        )
        if "role" not in turn:
            raise DatasetError(
                f"A message has no `{prompter.message_property_mappings.get('role', 'role')}`; its keys are "
                f"{', '.join(f'`{key}`' for key in message)}. Say which key holds the role: "
                "`message_property_mappings: {role: ..., content: ...}`."
            )
        self._check_role(turn["role"])
        learnt = self._learns_role(turn["role"])
        thinking_key = prompter.template_thinking_key or "reasoning_content"
        details = {}
        for key, detail_key in (("content", TRAINING_DETAIL), (thinking_key, THINKING_DETAIL)):
            if isinstance(turn.get(key), list):
                joined = join_parts(turn[key], learnt)
                if joined is not None:
                    turn[key], details[detail_key] = joined
        if any(detail is not None for detail in details.values()):
            turn.update({key: detail for key, detail in details.items() if detail is not None})
            for key, detail_key in (("content", TRAINING_DETAIL), (thinking_key, THINKING_DETAIL)):
                if detail_key not in turn and isinstance(turn.get(key), str) and turn[key]:
                    turn[detail_key] = [{"begin_offset": 0, "end_offset": len(turn[key]) - 1, "train": learnt}]
        for key, source, read in (
            (TRAINING, prompter.message_field_training, read_flag),
            (TRAINING_DETAIL, prompter.message_field_training_detail, read_details),
        ):
            if source and message.get(source) is not None:
                turn[key] = read(message[source], f"`{source}` of a message")
        if self.split_thinking and turn["role"] == "assistant":
            split_thinking(turn, thinking_key)
        for key, value in (("tool_calls", message.get("tool_calls")), (thinking_key, turn.get(thinking_key))):
            if value and key not in prompter.chat_template_msg_variables:
                self._warn_once(key, f"The messages have `{key}`, but the chat template does not write them.")
        return turn

    def _check_role(self, role: Any) -> None:
        if not isinstance(role, str):
            raise DatasetError(f"The role of a message is {describe_value(role)}, but it must be text.")
        known = {*self.prompter.roles.values(), *self.roles_to_train}
        if role not in known and role not in self.prompter.chat_template_msg_variables:
            self._warn_once(
                f"role {role}",
                f"The messages have the role `{role}`, which is none of {', '.join(sorted(known))}. The chat template gets it "
                f"as it is. If it stands for one of them, say so in the dataset, such as `roles: {{assistant: [{role}]}}`.",
            )

    def _get_system(self, prompt: Mapping[str, Any]) -> str | None:
        """The system text of a row that has its own field for it: text, or a list of parts."""
        system = prompt.get(self.prompter.field_system)
        if system is None or isinstance(system, str):
            return system
        joined = join_parts(system, False) if isinstance(system, list) else None
        if joined is None:
            raise DatasetError(
                f"The field `{self.prompter.field_system}` is {describe_value(system)}, but it must be text. If it is no system text, "
                "rename it."
            )
        return joined[0]

    def _get_tools(self, prompt: Mapping[str, Any]) -> list | None:
        tools = read_tools(prompt, self.prompter.field_tools)
        if tools and not self.prompter.writes_tools:
            self._warn_once(
                "tools",
                f"The rows have tools (`{self.prompter.field_tools}`), but the chat template does not write them.",
            )
        return tools

    # labels

    def _learns_role(self, role: str) -> bool:
        return self.train_on_inputs or role in self.roles_to_train

    def _learns(self, turn: Turn) -> bool:
        if turn.get(TRAINING) is not None:
            return turn[TRAINING]
        details = [*(turn.get(TRAINING_DETAIL) or ()), *(turn.get(THINKING_DETAIL) or ())]
        if details:
            return any(detail["train"] for detail in details)
        return self._learns_role(turn["role"])

    def _label_last_turn(self, row: _Row, text: str, tokens: Tokens) -> list[int]:
        if self.train_on_inputs:
            return list(tokens.ids)
        boundary = 0
        if len(row.turns) > 1:
            prompt = self.prompter.render(row.turns[:-1], tools=row.tools, add_generation_prompt=True)
            boundary = len(prompt) if text.startswith(prompt) else common_prefix(text, prompt)
        masked = bisect_right(tokens.ends, boundary)
        return [IGNORE_TOKEN_ID] * masked + tokens.ids[masked:]

    def _label_turns(self, row: _Row, text: str, tokens: Tokens, row_index: int) -> list[int]:
        learnt = [self._learns(turn) for turn in row.turns]
        labels, missing = self._turn_labels.label(text, tokens, row.turns, row.tools, learnt)
        for index, what in missing:
            if what == "end":
                self._warn_no_end(row.turns[index], row_index, index)
            else:
                self._warn_not_learnt(row.turns[index], row_index, index, text)
        return labels

    def _warn_not_learnt(self, turn: Turn, row_index: int, turn_index: int, text: str) -> None:
        """Say that nothing of a turn is learnt, in the words under which the FAQ explains it."""
        if not text:
            kind, why = "no text", f"Empty template generated for turn {turn_index}"
        elif not str(turn.get("content") or "").strip() and not turn.get("tool_calls"):
            kind = "empty"
            why = f"Content end boundary is the same as start boundary for turn {turn_index}. This is likely an empty turn"
        else:
            kind = "not written"
            why = (
                f"Could not find content start/end boundary for turn {turn_index}: the template does not write the content, or "
                "changes it"
            )
        self._warn_once(
            kind,
            f"{self._place(turn, row_index, turn_index)} should be learnt, but nothing of it is: {why}. "
            "Further turns like this one are not reported.",
        )

    def _warn_no_end(self, turn: Turn, row_index: int, turn_index: int) -> None:
        self._warn_once(
            "no end",
            f"{self._place(turn, row_index, turn_index)} is learnt, but not how it ends: none of "
            f"{', '.join(f'`{token}`' for token in self.eot_tokens)} follows within {END_TOKEN_REACH} tokens. Name the token that the "
            "template writes there under `eot_tokens:`. Further turns like this one are not reported.",
        )

    def _place(self, turn: Turn, row_index: int, turn_index: int) -> str:
        of = f" of `{self.dataset_name}`" if self.dataset_name else ""
        row = self.name_row(row_index)
        return f"{row[0].upper()}{row[1:]}{of}, turn {turn_index} ({turn['role']})"

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            LOG.warning(message)


def _first_of(wanted: Iterable[int], ids: Sequence[int], start: int) -> int:
    return next((place for place in range(max(start, 0), len(ids)) if ids[place] in wanted), -1)


class StrategyLoader:
    """Load chat template strategy based on configuration."""

    def _get_strategy_cls(self, cfg) -> type[ChatTemplateStrategy]:
        if cfg.tokenizer_use_mistral_common:
            from axolotl.prompt_strategies.mistral_chat import MistralStrategy

            return MistralStrategy
        return ChatTemplateStrategy

    def _get_prompter_cls(self, cfg) -> type[ChatTemplatePrompter]:
        if cfg.tokenizer_use_mistral_common:
            from axolotl.prompt_strategies.mistral_chat import MistralPrompter

            return MistralPrompter
        return ChatTemplatePrompter

    def _get_strategy_params(self, cfg, ds_cfg: Mapping[str, Any]) -> dict[str, Any]:
        roles, eos = ds_cfg.get("roles_to_train"), ds_cfg.get("train_on_eos")
        return {
            "train_on_inputs": cfg.train_on_inputs,
            "sequence_len": cfg.sequence_len,
            "roles_to_train": ["assistant"] if roles is None else roles,
            "train_on_eos": "turn" if eos is None else eos,
            "train_on_eot": ds_cfg.get("train_on_eot"),
            "eot_tokens": cfg.get("eot_tokens"),
            "split_thinking": ds_cfg.get("split_thinking"),
        }

    def __call__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cfg,
        ds_cfg: Mapping[str, Any] | None = None,
        processor: ProcessorMixin | None = None,
    ) -> ChatTemplateStrategy:
        """The strategy of a dataset of type `chat_template`.

        Args:
            tokenizer: the tokenizer of the model.
            cfg: the whole config.
            ds_cfg: the config of the dataset.
            processor: the processor of a multimodal model.
        """
        dataset = dict(ds_cfg.items()) if isinstance(ds_cfg, Mapping) else ds_cfg.model_dump() if ds_cfg else {}
        has_template = not cfg.tokenizer_use_mistral_common
        template = get_chat_template_from_config(cfg, dataset, tokenizer) if has_template else ""
        prompter = self._get_prompter_cls(cfg)(
            tokenizer,
            chat_template=template,
            processor=processor,
            max_length=cfg.sequence_len,
            message_property_mappings=_mappings(dataset),
            message_field_training=dataset.get("message_field_training"),
            message_field_training_detail=dataset.get("message_field_training_detail"),
            field_messages=dataset.get("field_messages") or "messages",
            field_system=dataset.get("field_system") or "system",
            field_tools=dataset.get("field_tools") or "tools",
            field_thinking=dataset.get("field_thinking") or "reasoning_content",
            roles=dataset.get("roles"),
            template_thinking_key=dataset.get("template_thinking_key") or "reasoning_content",
            chat_template_kwargs=cfg.get("chat_template_kwargs"),
            drop_system_message=bool(dataset.get("drop_system_message")),
        )
        renders = [prompter.render]
        if has_template:
            prompter.tool_template = get_chat_template_from_config(cfg, dataset, tokenizer, with_tools=True)
            if prompter.tool_template != template:
                # Also a list without a tool in it chooses the template of conversations with tools.
                renders.append(partial(prompter.render, tools=[]))
        params = self._get_strategy_params(cfg, dataset)
        eos_rule, eot_rule = params["train_on_eos"], params["train_on_eot"]
        open_end = not params["eot_tokens"] and not {eos_rule, eot_rule} <= {"none", None}
        if has_template and open_end:
            params["eot_tokens"] = end_tokens_of(tokenizer, renders, cfg, with_eos=eot_rule in (None, eos_rule))
        strategy = self._get_strategy_cls(cfg)(prompter, tokenizer=tokenizer, **params)
        strategy.dataset_name = dataset.get("path")
        strategy.named_properties = NamedProperties(
            _mappings(dataset) or {},
            {key: dataset[key] for key in NAMES_OF_PROPERTIES if dataset.get(key)},
            prompter.field_messages,
            {key: dataset[key] for key in NAMES_OF_COLUMNS if dataset.get(key)},
        )
        return strategy


load = StrategyLoader()


def _mappings(dataset: Mapping[str, Any]) -> dict[str, str] | None:
    """The mapping of message keys, with the older `message_field_role` and `message_field_content`."""
    mappings = dict(dataset.get("message_property_mappings") or {})
    for key in ("role", "content"):
        if dataset.get(f"message_field_{key}"):
            mappings.setdefault(key, dataset[f"message_field_{key}"])
    return mappings or None
