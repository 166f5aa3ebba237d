"""Which token ends a turn, when the config does not say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from axolotl.utils.chat_templates.spans import RENDER_ERRORS, Render
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = get_logger(__name__)

END_TOKEN_REACH = 3
"""An end token at most this many tokens after a turn belongs to it."""


def end_tokens_of(
    tokenizer: PreTrainedTokenizerBase, renders: Iterable[Render], cfg: DictDefault, *, with_eos: bool = True
) -> list[str] | None:
    """EOS, and the tokens that templates write after an assistant turn where those are others; None when none is.

    Args:
        tokenizer: the tokenizer that reads what is rendered.
        renders: one for each template.
        cfg: where the choice is noted.
        with_eos: EOS is one of them; it is not where it follows a rule of its own.
    """
    found = dict.fromkeys(token for render in renders if (token := _token_after_answer(tokenizer, render)))
    others = [token for token in found if token != tokenizer.eos_token]
    if not others:
        return None
    tokens = [*([tokenizer.eos_token] if with_eos and tokenizer.eos_token else []), *others]
    written = " or ".join(others)
    note_choice(cfg, "eot_tokens", tokens, f"the chat template ends assistant turns with {written}, not only with EOS")
    return tokens


def _token_after_answer(tokenizer: PreTrainedTokenizerBase, render: Render) -> str | None:
    """The first control token that a template writes after an assistant turn."""
    mark = "zzanswerzz"
    try:
        text = render([{"role": "user", "content": "zzquestionzz"}, {"role": "assistant", "content": mark}])
    except RENDER_ERRORS as error:
        LOG.warning(
            f"The chat template refuses a question and an answer ({error}), so the end-of-turn token is taken to be EOS. "
            "Name others under `eot_tokens:`."
        )
        return None
    tail = text.partition(mark)[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"][: END_TOKEN_REACH + 1]
    white_space = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if not token.content.strip()}
    control = (set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)) - white_space
    written = next((token for token in ids if token in control), None)
    if written is None:
        LOG.warning(
            "The chat template writes no end-of-turn token after an assistant turn, so the model does not learn to stop. "
            f"After the answer it writes {tail!r}. If that is an end-of-turn token, add it under `tokens:`."
        )
        return None
    return str(tokenizer.convert_ids_to_tokens(written))
