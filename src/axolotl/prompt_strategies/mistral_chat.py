"""Conversations for models whose tokenizer is mistral-common's (`tokenizer_use_mistral_common: true`).

Rows are read as `chat_template` reads them. mistral-common writes the tokens, and refuses what its models never see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from axolotl.exceptions import TokenizerError
from axolotl.prompt_strategies.chat_template import IGNORE_TOKEN_ID, ChatTemplatePrompter, ChatTemplateStrategy
from axolotl.prompt_tokenizers import Tokenized
from axolotl.utils.chat_templates.messages import Turn, for_template
from axolotl.utils.chat_templates.mistral import Block, MistralConversations, merged_turns, token_id


class MistralPrompter(ChatTemplatePrompter):
    """Mistral prompter for chat template.

    Takes the arguments of `ChatTemplatePrompter`; the tokenizer is one of mistral-common, which needs no template.
    """

    def __init__(self, tokenizer: Any, chat_template: str = "", *args: Any, **kwargs: Any):
        super().__init__(tokenizer, chat_template, *args, **kwargs)
        self.conversations = MistralConversations(tokenizer)

    @property
    def chat_template_msg_variables(self) -> frozenset[str]:
        return frozenset({"tool_calls", "tool_call_id", "name", "reasoning_content"})

    @property
    def writes_tools(self) -> bool:
        return True

    def render(
        self, conversation: Sequence[Turn], tools: list | None = None, add_generation_prompt: bool = False
    ) -> str:
        return self.conversations.decode(self.build_prompt(conversation, tools=tools))

    def build_prompt(
        self,
        conversation: Sequence[Turn],
        add_generation_prompt: bool = False,
        images: list | None = None,
        tools: list | None = None,
    ) -> list[int]:
        """The token ids of a conversation. After a question the model answers, so there is no generation prompt to add."""
        return self.conversations.encode(for_template(conversation), tools)


class MistralStrategy(ChatTemplateStrategy):
    """Mistral strategy for chat template."""

    prompter: MistralPrompter

    def _find_control_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    def _token_id(self, token: str) -> int:
        found = token_id(self.tokenizer, token)
        if found is None:
            raise TokenizerError(
                f"`eot_tokens: {token}` is no control token of this tokenizer, and mistral-common takes no further ones. Leave it out."
            )
        return found

    def _warn_of_absent_ends(self, eos: str | None) -> None:
        """There is no template in which an end could be absent."""

    def find_first_eot_token(self, input_ids: Sequence[int], start_idx: int) -> int:
        """Find the first EOT token in the input_ids starting from start_idx."""
        return super().find_first_eot_token(input_ids, start_idx)

    def find_turn(self, turns: Sequence[Turn], turn_idx: int, tools: list | None = None) -> tuple[int, int]:
        if turn_idx >= len(turns):
            raise ValueError(f"Turn index {turn_idx} out of range")
        for group, block in self._blocks(turns, self.prompter.build_prompt(turns, tools=tools)):
            if turn_idx in group:
                return block.first, block.end
        return -1, -1

    def _blocks(self, turns: Sequence[Turn], ids: Sequence[int]) -> list[tuple[list[int], Block]]:
        """Each block of the tokens with the indices of its turns. A role with another number of blocks than turns is left out."""
        found = []
        blocks = self.prompter.conversations.blocks(ids)
        for role in dict.fromkeys(turn["role"] for turn in turns):
            own = [block for block in blocks if block.role == role]
            groups = merged_turns(turns, role)
            if len(own) == len(groups):
                found += zip(groups, own, strict=True)
        return sorted(found, key=lambda pair: pair[1].first)

    def _tokenize_rows(self, prompts: list[dict[str, Any]]) -> list[Tokenized]:
        tokenized = []
        for index, prompt in enumerate(prompts):
            turns = self.get_conversation_thread(prompt)
            ids = self.prompter.build_prompt(turns, tools=self._get_tools(prompt))
            labels = self._label_blocks(turns, ids, self.row_offset + index)
            tokenized.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        return tokenized

    def _label_blocks(self, turns: Sequence[Turn], ids: list[int], row_index: int) -> list[int]:
        labels = [IGNORE_TOKEN_ID] * len(ids)
        learnt = [self._learns(turn) for turn in turns]
        pairs = self._blocks(turns, ids)
        for index in set(range(len(turns))) - {index for group, _ in pairs for index in group}:
            if learnt[index]:
                self._warn_not_learnt(turns[index], row_index, index, self.prompter.conversations.decode(ids))
        last_end: dict[int, int] = {}
        for group, (_, first, end) in pairs:
            learns = any(learnt[index] for index in group)
            if learns:
                labels[first:end] = ids[first:end]
            option = self.train_on_eos if ids[end] in self._eos_ids else self.train_on_eot
            if ids[end] not in self._eos_ids | self._eot_ids:
                continue
            last_end[ids[end]] = end
            if option == "all" or (option == "turn" and learns):
                labels[end] = ids[end]
        for token, end in last_end.items():
            if (self.train_on_eos if token in self._eos_ids else self.train_on_eot) == "last":
                labels[end] = token
        return labels
