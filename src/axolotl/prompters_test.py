"""The exact text of each style."""

from __future__ import annotations

import pytest

from axolotl.exceptions import ConfigError
from axolotl.prompters import (
    AlpacaPrompter,
    MultipleChoiceConcisePrompter,
    PromptStyle,
    ReflectAlpacaPrompter,
    SummarizeTLDRPrompter,
    UnpromptedPrompter,
)

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
NO_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def text(prompter, *args):
    return next(prompter.build_prompt(*args))


@pytest.mark.parametrize(
    ("style", "with_input", "no_input"),
    [
        (
            "instruct",
            f"{WITH_INPUT}\n\n### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n",
            f"{NO_INPUT}\n\n### Instruction:\nI\n\n### Response:\n",
        ),
        ("chat", f"SYSTEM: {WITH_INPUT}\nUSER: I\nX\nASSISTANT:", f"SYSTEM: {NO_INPUT}\nUSER: I\nASSISTANT:"),
        (
            "chatml",
            f"<|im_start|>system\n{WITH_INPUT}<|im_end|>\n<|im_start|>user\nI\nX<|im_end|>\n<|im_start|>assistant\n",
            f"<|im_start|>system\n{NO_INPUT}<|im_end|>\n<|im_start|>user\nI<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "phi",
            f"<|system|>\n{WITH_INPUT}<|end|>\n<|user|>\nI<|end|>X<|assistant|>",
            f"<|system|>\n{NO_INPUT}<|end|>\n<|user|>\nI<|end|>\n<|assistant|>",
        ),
    ],
)
def test_alpaca_styles(style, with_input, no_input):
    for prompter in (AlpacaPrompter(style), AlpacaPrompter(PromptStyle(style))):
        assert text(prompter, "I", "X") == with_input
        assert text(prompter, "I") == text(prompter, "I", "") == no_input
        assert text(prompter, "I", "", "answer") == no_input + "answer"


def test_no_style_is_instruct():
    assert text(AlpacaPrompter(None), "I") == text(AlpacaPrompter("instruct"), "I")


def test_an_unknown_style_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"chatlm.*chatml"):
        AlpacaPrompter("chatlm")


def test_braces_in_the_data_stay():
    assert "{x} {}" in text(AlpacaPrompter(), "{x} {}", "{input}")


def test_prompters_without_preamble():
    assert text(UnpromptedPrompter("chat"), "I") == "USER: I\nASSISTANT:"
    assert text(SummarizeTLDRPrompter(), "A") == "USER: Summarize the following article as a TL;DR.\nA\nASSISTANT:"


def test_multiple_choice():
    assert text(MultipleChoiceConcisePrompter(), "Q", '- "a"') == (
        'Choose the answer that best answers the question. Be concise in your response.\n\nUSER: Q\n- "a"\nASSISTANT:'
    )


def test_reflection_ends_with_the_corrected_answer():
    assert text(ReflectAlpacaPrompter(), "I", "", "o", "r", "c").endswith(
        "### Response:\n### Thought:\no\n\n### Agent Reflection:\nr\n\n### Final Response:\nc"
    )


def test_a_subclass_may_set_its_own_formats():
    class Mine(AlpacaPrompter):
        system_prompt = system_no_input_prompt = "sys"

        def match_prompt_style(self):
            self.system_format = "<{system}>"
            self.turn_format = "({instruction}|{input})"
            self.turn_no_input_format = "({instruction})"

    assert text(Mine(), "I", "X", "o") == "<sys>(I|X)o"
    assert text(Mine(), "I") == "<sys>(I)"
