"""HF Chat Templates prompt strategy

A conversation is rendered once as text, with the template that inference uses, and tokenized once. Which tokens belong to
which turn is read from the text (`utils.chat_templates.spans`); a token that reaches into a turn belongs to it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from axolotl.exceptions import ConfigError, DatasetError, TokenizerError
from axolotl.prompt_tokenizers import IGNORE_INDEX, PromptTokenizingStrategy, Tokenized, join_rows, split_rows
from axolotl.prompters import Prompter
from axolotl.utils.chat_templates.base import get_chat_template_from_config
from axolotl.utils.chat_templates.end_tokens import END_TOKEN_REACH, end_tokens_of
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
    read_messages,
    read_tools,
    read_turn,
    split_thinking,
)
from axolotl.utils.chat_templates.spans import RENDER_ERRORS, Span, Tokens, TurnSpans, common_prefix
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

LOG = get_logger(__name__)

IGNORE_TOKEN_ID = IGNORE_INDEX
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
        roles: role that the template knows -> roles of the messages that become it.
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
        roles: Mapping[str, Sequence[str]] | None = None,
        template_thinking_key: str | None = "reasoning_content",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        drop_system_message: bool = False,
    ):
        self.roles = (
            {source: target for target, sources in roles.items() for source in sources} if roles else DEFAULT_ROLES
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
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.max_length = max_length
        self.drop_system_message = drop_system_message

    @property
    def chat_template_msg_variables(self) -> frozenset[str]:
        """The names that the template reads."""
        return names_read_by(self.chat_template)

    def render(
        self, conversation: Sequence[Turn], tools: list | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation."""
        text = self.tokenizer.apply_chat_template(
            for_template(conversation),
            tools=tools,
            chat_template=self.chat_template,
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
        self._control_ids = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._spans = TurnSpans(prompter.render)
        self._said: set[str] = set()

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
        template = self.prompter.chat_template
        for token in self.eot_tokens:
            self._token_id(token)
            if token != eos and token not in template:
                LOG.warning(
                    f"EOT token '{token}' not found in chat_template. Please check if your template/EOT token is correct."
                )
        learns_eos = self.train_on_eos not in (None, "none") and self.eot_tokens == [eos]
        if learns_eos and eos and eos not in template and "eos_token" not in template:
            LOG.warning(
                f"EOS token '{eos}' not found in chat_template. Please check if your template/EOS token is correct."
            )

    def _token_id(self, token: str) -> int:
        if token == self.tokenizer.eos_token and self.eos_token_id is not None:
            return self.eos_token_id
        try:
            ids = self.tokenizer.encode(token, add_special_tokens=False)
        except (ValueError, TypeError, UnicodeError) as error:
            raise TokenizerError(f"EOT token encoding failed for EOT token '{token}'. Error: {error}") from error
        if len(ids) != 1:
            raise TokenizerError(
                f"EOT token '{token}' is encoded as multiple tokens: {ids}. Please add it under `tokens: ` in the config, "
                "or (recommended) override unused added_tokens via `added_tokens_overrides: `."
            )
        return ids[0]

    def _encode(self, texts: list[str]) -> list[Tokens]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )
        if encoded.encodings:
            tokens = []
            for ids, encoding in zip(encoded["input_ids"], encoded.encodings, strict=True):
                offsets = encoding.offsets
                tokens.append(Tokens(ids, [o[0] for o in offsets], [o[1] for o in offsets]))
            return tokens
        return [self._aligned(text, ids) for text, ids in zip(texts, encoded["input_ids"], strict=True)]

    def _aligned(self, text: str, ids: list[int]) -> Tokens:
        """Offsets for a tokenizer that keeps none: how much text the first k tokens decode to."""
        ends = [
            min(len(self.tokenizer.decode(ids[: k + 1], skip_special_tokens=False)), len(text)) for k in range(len(ids))
        ]
        return Tokens(ids, [0, *ends[:-1]], ends)

    def find_first_eot_token(self, input_ids: Sequence[int], start_idx: int) -> int:
        """Find the first EOT token in the input_ids starting from start_idx."""
        return _first_of(self._eot_ids, input_ids, start_idx)

    def find_first_eos_token(self, input_ids: Sequence[int], start_idx: int) -> int:
        """Find the first EOS token in the input_ids starting from start_idx."""
        return _first_of(() if self.eos_token_id is None else (self.eos_token_id,), input_ids, start_idx)

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
        return self._encode([text])[0].within(span, self._control_ids)

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
            raise DatasetError(
                f"The chat template cannot render the row: {error}.{where} Correct the row or leave it out."
            ) from error

    def get_conversation_thread(self, prompt: Mapping[str, Any]) -> list[Turn]:
        """The turns of a row, as the template reads them, with the keys that decide on their labels."""
        prompter = self.prompter
        messages = read_messages(prompt, prompter.field_messages)
        turns = []
        for message in messages:
            turn = self.transform_message(message)
            for key, source in (
                (TRAINING, prompter.message_field_training),
                (TRAINING_DETAIL, prompter.message_field_training_detail),
            ):
                if source and message.get(source) is not None:
                    turn[key] = message[source]
            turns.append(turn)
        system = prompt.get(prompter.field_system)
        if isinstance(system, str) and turns[0].get("role") != "system":
            turns.insert(0, {"role": "system", "content": system})
        if prompter.drop_system_message and turns[0].get("role") == "system":
            turns = turns[1:]
        if not turns:
            raise DatasetError(
                "The row holds a system message only, and `drop_system_message: true` leaves nothing of it."
            )
        return turns

    def transform_message(self, message: Mapping[str, Any]) -> Turn:
        """A message of a row as a turn."""
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
        if self.split_thinking and turn["role"] == "assistant":
            split_thinking(turn, thinking_key)
        for key in ("tool_calls", thinking_key):
            if turn.get(key) and key not in prompter.chat_template_msg_variables:
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

    def _get_tools(self, prompt: Mapping[str, Any]) -> list | None:
        return read_tools(prompt, self.prompter.field_tools)

    # labels

    def _learns_role(self, role: str) -> bool:
        return self.train_on_inputs or role in self.roles_to_train

    def _learns(self, turn: Turn) -> bool:
        if turn.get(TRAINING) is not None:
            return bool(turn[TRAINING])
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
        turns, ids = row.turns, tokens.ids
        labels = [IGNORE_TOKEN_ID] * len(ids)
        learnt = [self._learns(turn) for turn in turns]
        ends_of_all = bool({self.train_on_eos, self.train_on_eot} & {"all", "last"})
        wanted = [index for index in range(len(turns)) if learnt[index] or ends_of_all]
        spans = self._spans.find(text, for_template(turns), row.tools, wanted)
        last_end: dict[str, int] = {}
        for index, span in zip(wanted, spans, strict=True):
            if span is None:
                if learnt[index]:
                    self._warn_not_learnt(turns[index], row_index, index)
                continue
            _, end = tokens.within(span, self._control_ids)
            if learnt[index]:
                for first, last in self._learnt_ranges(turns[index], text, tokens, span):
                    labels[first:last] = ids[first:last]
            for kind, find, option in (
                ("eot", self.find_first_eot_token, self.train_on_eot),
                ("eos", self.find_first_eos_token, self.train_on_eos),
            ):
                place = find(ids[: end + END_TOKEN_REACH + 1], start_idx=end)
                if place == -1:
                    continue
                last_end[kind] = place
                if option == "all" or (option == "turn" and learnt[index]):
                    labels[place] = ids[place]
        for kind, option in (("eot", self.train_on_eot), ("eos", self.train_on_eos)):
            if option == "last" and kind in last_end:
                labels[last_end[kind]] = ids[last_end[kind]]
        return labels

    def _learnt_ranges(self, turn: Turn, text: str, tokens: Tokens, span: Span) -> Iterable[tuple[int, int]]:
        """The ranges of tokens of a learnt turn that are learnt: all of it, or what the details of the turn say."""
        if not turn.get(TRAINING_DETAIL) and not turn.get(THINKING_DETAIL):
            return [tokens.within(span, self._control_ids)]
        thinking_key = self.prompter.template_thinking_key or "reasoning_content"
        ranges, begin = [], span[0]
        for key, detail_key in ((thinking_key, THINKING_DETAIL), ("content", TRAINING_DETAIL)):
            details = turn.get(detail_key)
            if not details or not isinstance(turn.get(key), str):
                continue
            written = turn[key].strip()
            place = text.find(written, begin, span[1])
            if place == -1:
                raise DatasetError(
                    f"The template changes the `{key}` of a {turn['role']} message, so the characters that its training "
                    "details name cannot be found in the text. Use a template that writes it as it is."
                )
            offset = place - turn[key].index(written)
            begin = place + len(written)
            for detail in details:
                if detail["train"]:
                    first = max(offset + detail["begin_offset"], place)
                    last = min(offset + detail["end_offset"] + 1, span[1])
                    if first < last:
                        ranges.append(tokens.within((first, last), self._control_ids))
        return ranges

    def _warn_not_learnt(self, turn: Turn, row_index: int, turn_index: int) -> None:
        why = (
            "is empty"
            if not str(turn.get("content") or "").strip()
            else "is not written, or is changed beyond recognition, by the template"
        )
        self._warn_once(
            "not learnt",
            f"Row {row_index}, turn {turn_index} ({turn['role']}) should be learnt, but it {why}: nothing of it is learnt. "
            "Further turns like this one are not reported.",
        )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            LOG.warning(message)


def _first_of(wanted: Iterable[int], ids: Sequence[int], start: int) -> int:
    return next((place for place in range(max(start, 0), len(ids)) if ids[place] in wanted), -1)


class StrategyLoader:
    """Load chat template strategy based on configuration."""

    def _get_strategy_cls(self, cfg) -> type[ChatTemplateStrategy]:
        return ChatTemplateStrategy

    def _get_prompter_cls(self, cfg) -> type[ChatTemplatePrompter]:
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
        template = get_chat_template_from_config(cfg=cfg, ds_cfg=dataset, tokenizer=tokenizer)
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
        params = self._get_strategy_params(cfg, dataset)
        if not params["eot_tokens"] and params["train_on_eot"] is None and params["train_on_eos"] != "none":
            params["eot_tokens"] = end_tokens_of(tokenizer, prompter.render, cfg)
        return self._get_strategy_cls(cfg)(prompter, tokenizer=tokenizer, **params)


load = StrategyLoader()


def _mappings(dataset: Mapping[str, Any]) -> dict[str, str] | None:
    """The mapping of message keys, with the older `message_field_role` and `message_field_content`."""
    mappings = dict(dataset.get("message_property_mappings") or {})
    for key in ("role", "content"):
        if dataset.get(f"message_field_{key}"):
            mappings.setdefault(key, dataset[f"message_field_{key}"])
    return mappings or None
