"""Module for tokenization utilities

Shows people what the model will learn: tokens coloured by their label, in the terminal and as a page of HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

IGNORE_TOKEN_ID = -100
MASKED, TRAINED, MISMATCH = "red", "green", "yellow"

_CODES = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35", "cyan": "36", "white": "37"}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --trained: #cdeccf; --masked: transparent; --ink: #1b1b1b; --quiet: #8a8a8a; --line: #ddd; }}
@media (prefers-color-scheme: dark) {{ :root {{ --trained: #1f4d2a; --ink: #ececec; --quiet: #8c8c8c; --line: #3a3a3a; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  font: 13px/1.7 ui-monospace, monospace; }}
.t {{ background: var(--trained); border-radius: 3px; }}
.m {{ color: var(--quiet); }}
.x {{ background: #d9a400; color: #000; border-radius: 3px; }}
small {{ color: var(--quiet); }}
</style></head><body>
<h1>{title}</h1>
<p><span class="t">learnt</span> · <span class="m">masked</span> · <span class="x">label is another token</span>;
point at a token for its id. {summary}</p>
{rows}
</body></html>
"""


def embedding_rows(present: int, num_tokens: int, *, to_32x: bool = False, shrinks: bool = False) -> int:
    """Rows that an embedding gets so that every token has one.

    Args:
        present: rows that it has.
        num_tokens: tokens of the tokenizer.
        to_32x: round up to a multiple of 32 where rows are added or cut (`resize_token_embeddings_to_32x`).
        shrinks: cut rows that no token has (`shrink_embeddings`).
    """
    wanted = math.ceil(num_tokens / 32) * 32 if to_32x else num_tokens
    return wanted if shrinks else max(present, wanted)


def check_dataset_labels(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer,
    num_examples: int = 5,
    text_only: bool = False,
    rl_mode: bool = False,
) -> None:
    """Log the first rows of a dataset, coloured.

    Args:
        dataset: tokenized rows.
        tokenizer: decodes them.
        num_examples: how many rows to show.
        text_only: leave out ids and labels.
        rl_mode: the rows are of a preference dataset.
    """
    check = check_rl_example_labels if rl_mode else check_example_labels
    shown = dataset.select(range(min(num_examples, len(dataset)))) if hasattr(dataset, "select") else dataset
    for _, row in zip(range(num_examples), shown, strict=False):
        check(row, tokenizer, text_only)


def check_example_labels(example: Mapping[str, Any], tokenizer, text_only: bool = False) -> str:
    """Log one tokenized row: green is learnt, red is masked, yellow has a label that is another token.

    Returns:
        What was logged.
    """
    input_ids, labels = list(example["input_ids"]), list(example["labels"])
    mask = list(example.get("attention_mask") or [1] * len(input_ids))
    pieces, mismatches = [], 0
    for token, text, label, attended in zip(input_ids, _token_texts(tokenizer, input_ids), labels, mask, strict=True):
        color = _color_of(token, label)
        mismatches += color == MISMATCH
        if text_only:
            pieces.append(_colored(text, color))
        else:
            pieces.append(_colored(text, color) + _colored(f"({label}, {attended}, {token})", "white"))
    delimiter = "" if text_only else " "
    text = delimiter.join(pieces)
    LOG.info(text)
    LOG.info(f"Tokens: {len(input_ids)}, learnt: {sum(label != IGNORE_TOKEN_ID for label in labels)}\n\n")
    if mismatches:
        LOG.warning(f"{mismatches} labels are other tokens than the inputs at the same place.")
    return text


def check_rl_example_labels(example: Mapping[str, Any], tokenizer, text_only: bool = False) -> str:
    """Log one row of a preference dataset: prompt yellow, chosen green, rejected red.

    Returns:
        What was logged.
    """
    parts = []
    for field, color in (("prompt", "yellow"), ("chosen", "green"), ("completion", "green"), ("rejected", "red")):
        value = example.get(f"{field}_input_ids", example.get(f"{field}_ids", example.get(field)))
        if value is None:
            continue
        if isinstance(value, str):
            shown = _colored(value, color)
        elif value and isinstance(value[0], Mapping):
            shown = _colored("\n".join(f"{m.get('role')}: {m.get('content')}" for m in value), color)
        else:
            shown = ("" if text_only else " ").join(process_tokens_for_rl_debug(value, color, tokenizer, text_only))
        parts.append(f"{field.upper()}: {shown}")
    text = "\n".join(parts)
    LOG.info(text)
    return text


def color_token_for_rl_debug(decoded_token: str, encoded_token: int, color: str, text_only: bool) -> str:
    """Helper function to color tokens based on their type."""
    colored = _colored(decoded_token, color)
    return colored if text_only else f"{colored}{_colored(f'({encoded_token})', 'white')}"


def process_tokens_for_rl_debug(tokens: Sequence[int], color: str, tokenizer, text_only: bool) -> list[str]:
    """Helper function to process and color tokens."""
    texts = (tokenizer.decode(token) for token in tokens)
    return [color_token_for_rl_debug(text, token, color, text_only) for text, token in zip(texts, tokens, strict=True)]


def render_rows_html(rows: Iterable[Mapping[str, Any]], tokenizer, title: str) -> str:
    """Tokenized rows as a self-contained page: what is learnt stands on colour, what is masked is grey.

    Args:
        rows: each with `input_ids` and `labels`.
        tokenizer: decodes them.
        title: the heading.
    """
    sections, total, trained_total = [], 0, 0
    for number, row in enumerate(rows):
        ids, labels = list(row["input_ids"]), list(row["labels"])
        trained = sum(label != IGNORE_TOKEN_ID for label in labels)
        total, trained_total = total + len(ids), trained_total + trained
        spans = "".join(
            f'<span class="{ {MASKED: "m", TRAINED: "t", MISMATCH: "x"}[_color_of(token, label)] }" '
            f'title="{token}">{html.escape(text)}</span>'
            for token, label, text in zip(ids, labels, _token_texts(tokenizer, ids), strict=True)
        )
        sections.append(f"<h2>Row {number} <small>{len(ids)} tokens, {trained} learnt</small></h2>\n<pre>{spans}</pre>")
    summary = f"{len(sections)} rows, {total} tokens, {trained_total} of them learnt."
    return _PAGE.format(title=html.escape(title), summary=summary, rows="\n".join(sections))


def _token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text. Tokens that are parts of one character show it at the last of them."""
    texts: list[str] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode([*pending], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(pending) < 8:
            texts.append("")
            continue
        raw = tokenizer.convert_ids_to_tokens(pending[0]) or ""
        space = " " if raw.startswith("▁") and not text.startswith(" ") else ""
        texts.append(space + text)
        pending = []
    if pending:
        texts[-1] = tokenizer.decode(pending, skip_special_tokens=False)
    return texts


def _color_of(token: int, label: int) -> str:
    if label == IGNORE_TOKEN_ID:
        return MASKED
    return TRAINED if label == token else MISMATCH


def _colored(text: str, color: str) -> str:
    return f"\033[{_CODES.get(color, '0')}m{text}\033[0m"
