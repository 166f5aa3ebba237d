"""Showing tokens and labels."""

from __future__ import annotations

from axolotl.utils.tokenization import (
    check_dataset_labels,
    check_example_labels,
    color_token_for_rl_debug,
    process_tokens_for_rl_debug,
    render_rows_html,
)


def row_of(tokenizer, text="Hello 😀", masked=2):
    ids = tokenizer(text)["input_ids"]
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:], "attention_mask": [1] * len(ids)}


def test_tokens_are_coloured_by_label(tiny_tokenizer):
    row = row_of(tiny_tokenizer)
    row["labels"][-1] = 0
    shown = check_example_labels(row, tiny_tokenizer, text_only=True)
    assert "\033[31m<s>\033[0m" in shown and "\033[32m" in shown and "\033[33m" in shown
    assert f"({row['labels'][0]}, 1, {row['input_ids'][0]})" in check_example_labels(row, tiny_tokenizer)
    check_dataset_labels([row] * 3, tiny_tokenizer, num_examples=2)


def test_preference_rows(tiny_tokenizer):
    ids = tiny_tokenizer("Hello")["input_ids"]
    check_dataset_labels([{"prompt": "p", "chosen": "c", "rejected": ids}], tiny_tokenizer, rl_mode=True)
    assert color_token_for_rl_debug("x", 7, "green", True) == "\033[32mx\033[0m"
    assert "(7)" in color_token_for_rl_debug("x", 7, "green", False)
    assert len(process_tokens_for_rl_debug(ids, "red", tiny_tokenizer, True)) == len(ids)


def test_the_page_stands_alone_and_escapes(tiny_tokenizer):
    page = render_rows_html([row_of(tiny_tokenizer, "<b>Hi</b> 😀")], tiny_tokenizer, title="<rows>")
    assert "&lt;rows&gt;" in page and "😀" in page and "<b>" not in page
    assert "http" not in page and page.count('class="t"') > 1 and page.count('class="m"') == 3
