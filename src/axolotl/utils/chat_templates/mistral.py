"""Conversations as mistral-common writes them.

That package has no templates: it makes tokens at once, with control tokens that no text of a message can spell. So the
borders of the turns are read from the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from axolotl.exceptions import DatasetError, TokenizerError
from axolotl.utils.chat_templates.messages import Turn

if TYPE_CHECKING:
    from transformers import MistralCommonBackend

BORDERS = {
    "user": ("[INST]", "[/INST]"),
    "tool": ("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    "system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "": ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
}
"""Role -> what stands before and after its messages. The assistant writes what follows, up to EOS."""


class Block(NamedTuple):
    """What one role says: the tokens from `first` up to `end`, where the token stands that ends it."""

    role: str
    first: int
    end: int


class MistralConversations:
    """Writes conversations with the tokenizer of mistral-common.

    Args:
        tokenizer: tokenizer whose files are read; its own mode allows either answers at the end or questions.

    Raises:
        TokenizerError: the tokenizer is of version 1, which has no control tokens.
    """

    def __init__(self, tokenizer: MistralCommonBackend):
        path = tokenizer.tokenizer.instruct_tokenizer.tokenizer.file_path
        self.training = type(tokenizer)(tokenizer_path=path, mode="finetuning")
        self.inference = type(tokenizer)(tokenizer_path=path, mode="test")
        self.eos_token_id: int = tokenizer.eos_token_id
        self._openers = {token_id(tokenizer, opener): role for role, (opener, _) in BORDERS.items()}
        self._closers = {token_id(tokenizer, closer) for _, closer in BORDERS.values()}
        if token_id(tokenizer, "[INST]") is None:
            raise TokenizerError(
                "`tokenizer_use_mistral_common: true`: this tokenizer is of version 1, which has no control tokens, so the turns "
                "cannot be told apart. Leave the key out and write `chat_template: mistral_v1`."
            )

    def encode(self, turns: Sequence[Turn], tools: list | None = None) -> list[int]:
        """The tokens of a conversation.

        Raises:
            DatasetError: mistral-common refuses it.
        """
        from mistral_common.exceptions import MistralCommonException

        writer = self.training if turns[-1].get("role") == "assistant" else self.inference
        try:
            return list(writer.apply_chat_template(list(turns), tools=tools, tokenize=True, return_dict=False))
        except (MistralCommonException, ValueError) as error:
            raise DatasetError(
                f"mistral-common refuses the conversation: {error} Correct the row or leave it out."
            ) from error

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, control tokens too."""
        return str(self.training.decode(ids, skip_special_tokens=False)).replace("▁", " ")

    def blocks(self, ids: Sequence[int]) -> list[Block]:
        """Who says what in the tokens of a conversation."""
        blocks, role, first = [], "assistant", 1
        for place, token in enumerate(ids):
            if token in self._openers:
                role, first = self._openers[token], place + 1
            elif token in self._closers or (token == self.eos_token_id and role == "assistant"):
                if role:
                    blocks.append(Block(role, first, place))
                role, first = "assistant", place + 1
        return blocks


def token_id(tokenizer: MistralCommonBackend, token: str) -> int | None:
    """The id of a control token; None when the tokenizer has no such token."""
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found == tokenizer.unk_token_id else found


def merged_turns(turns: Sequence[Turn], role: str) -> list[list[int]]:
    """The indices of the turns that become one block: those of one role in a row, but for tools and system texts."""
    groups: list[list[int]] = []
    for index, turn in enumerate(turns):
        if turn["role"] != role:
            continue
        if groups and groups[-1][-1] == index - 1 and role in ("user", "assistant"):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
