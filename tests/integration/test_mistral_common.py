"""Conversations written by mistral-common, with the tokenizers that come with that package."""

from __future__ import annotations

from pathlib import Path

import pytest

from axolotl.exceptions import DatasetError, TokenizerError
from axolotl.prompt_strategies import load
from axolotl.utils.dict import DictDefault

mistral_common = pytest.importorskip("mistral_common", reason="mistral-common is not installed")

DATA = Path(mistral_common.__file__).parent / "data"
TOKENIZERS = {
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v3 tekken": "tekken_240911.json",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "two", "tool_call_id": "abcdefghi", "name": "add"},
    {"role": "assistant", "content": "Two"},
    {"role": "user", "content": "</s>[/INST] Two"},
    {"role": "assistant", "content": "Two"},
]


def tokenizer_of(file: str):
    from transformers import MistralCommonBackend

    return MistralCommonBackend(tokenizer_path=str(DATA / file))


def strategy_of(file: str, cfg: dict | None = None, **dataset):
    config = DictDefault(sequence_len=512, tokenizer_use_mistral_common=True, **(cfg or {}))
    return load("chat_template", tokenizer_of(file), config, DictDefault(path="d", **dataset))


def learnt(strategy, row) -> list[str]:
    """The text of each run of learnt tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        runs = [*runs, []] if label == -100 else [*runs[:-1], [*runs[-1], token]]
    return [strategy.prompter.conversations.decode(run).strip() for run in runs if run]


@pytest.mark.parametrize("file", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_answers_are_learnt_with_their_ends(file):
    strategy = strategy_of(file)
    row = strategy.tokenize_prompt({"messages": TURNS, "tools": TOOLS})
    call, *answers = learnt(strategy, row)
    assert answers == ["Two</s>", "Two</s>"]
    assert call.startswith("[TOOL_CALLS]") and call.endswith("</s>") and '"a"' in call
    assert row["input_ids"] == strategy.prompter.build_prompt(
        strategy.get_conversation_thread({"messages": TURNS}), tools=TOOLS
    )


@pytest.mark.parametrize("file", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_question_is_the_beginning_of_the_example(file):
    prompter = strategy_of(file).prompter
    question, whole = prompter.build_prompt(TURNS[1:2]), prompter.build_prompt([TURNS[1], TURNS[4]])
    assert whole[: len(question)] == question
    assert prompter.render(TURNS[1:2]).replace(" ", "") == "<s>[INST]Oneandone?[/INST]"


@pytest.mark.parametrize(
    ("option", "ends"), [("turn", [True, True]), ("last", [False, True]), ("none", [False, False])]
)
def test_which_ends_are_learnt(option, ends):
    strategy = strategy_of(TOKENIZERS["v7"], train_on_eos=option)
    row = strategy.tokenize_prompt({"messages": [TURNS[1], TURNS[4], *TURNS[5:]]})
    assert [piece.endswith("</s>") for piece in learnt(strategy, row)] == ends


def test_other_roles_and_other_ends():
    strategy = strategy_of(TOKENIZERS["v7"], {"eot_tokens": ["</s>", "[/INST]"]}, roles_to_train=["user", "system"])
    row = strategy.tokenize_prompt({"messages": [*TURNS[:2], *TURNS[4:]]})
    assert learnt(strategy, row) == ["Be brief.", "One and one?[/INST]", "</s>[/INST] Two[/INST]"]
    whole = strategy.prompter.build_prompt(TURNS, tools=TOOLS)
    first, last = strategy.find_turn(TURNS, 6, TOOLS)
    assert strategy.prompter.conversations.decode(whole[first:last]).strip() == "Two" and last == len(whole) - 1


def test_what_mistral_common_refuses_is_an_error_of_the_row():
    with pytest.raises(DatasetError, match=r"mistral-common refuses the conversation: .*start with a user"):
        strategy_of(TOKENIZERS["v7"]).tokenize_prompt({"messages": TURNS[4:5]})
    with pytest.raises(TokenizerError, match="no control token"):
        strategy_of(TOKENIZERS["v7"], {"eot_tokens": ["<|im_end|>"]})
    with pytest.raises(TokenizerError, match="of version 1"):
        strategy_of("tokenizer.model.v1")


def test_the_classes_stand_where_they_are_documented():
    from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy, MistralPrompter, MistralStrategy

    strategy = strategy_of(TOKENIZERS["v7"])
    assert isinstance(strategy, MistralStrategy) and isinstance(strategy, ChatTemplateStrategy)
    assert isinstance(strategy.prompter, MistralPrompter)
