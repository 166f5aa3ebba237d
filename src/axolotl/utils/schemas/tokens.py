"""Embeddings, tokens and chat template."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import StringConstraints

from axolotl.utils.schemas.enums import ChatTemplate
from axolotl.utils.schemas.fields import IGNORE_CASE, Int, Text, Words, key
from axolotl.utils.schemas.model import SpecialTokensConfig


class TokensConfig(Words):
    """Embeddings, tokens and chat template."""

    resize_token_embeddings_to_32x: bool | None = key("Round the number of embeddings up to a multiple of 32.")
    mean_resizing_embeddings: bool | None = key("Start new embeddings at the mean of the old ones.", False)
    shrink_embeddings: bool | None = key("Cut the embeddings to the tokenizer's size.")
    embeddings_skip_upcast: bool | None = key("Leave embeddings in their number format when training an adapter.")
    reinit_weights: bool | None = key("Start from random weights.")
    special_tokens: SpecialTokensConfig | None = key("Special tokens to set or add.")
    tokens: list[Text] | None = key("Tokens to add to the tokenizer.")
    added_tokens_overrides: dict[Int, str] | None = key("Token id: text that replaces this reserved token.")
    fix_untrained_tokens: bool | Int | list[Int] | None = key(
        "Give untrained embeddings (all zero) of tokens that occur in the data the mean of the others; or those of these ids."
    )
    chat_template: Annotated[
        ChatTemplate | Annotated[str, StringConstraints(pattern="^tokenizer_default(_fallback_|:)")] | None, IGNORE_CASE
    ] = key(
        "Chat template: a name, `tokenizer_default`, `tokenizer_default:<name>` for one of several that the tokenizer has, "
        "`tokenizer_default_fallback_<name>` or `jinja`."
    )
    chat_template_jinja: str | None = key("Jinja text of the chat template, or the path of a file with it.")
    chat_template_kwargs: dict[str, Any] | None = key("Arguments for the chat template.")
    eot_tokens: list[str] | None = key("Tokens that end a turn. Default: the tokenizer's `eos_token`.")
    default_system_message: str | None = key("System message of rows that have none (chatml only).")
