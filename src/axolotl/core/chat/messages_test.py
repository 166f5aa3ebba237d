from __future__ import annotations

import pytest
from datasets import Dataset

from axolotl.core.chat.format import chatml, llama3x
from axolotl.core.chat.messages import (
    ChatFormattedChats,
    Chats,
    MessageContents,
    PreferenceChats,
    SpecialToken,
    Tool,
    ToolCallContents,
    ToolResponseContents,
)
from axolotl.core.datasets.chat import TokenizedChatDataset
from axolotl.core.datasets.transforms.chat_builder import chat_message_transform_builder
from axolotl.exceptions import ConfigError, DatasetError
from axolotl.prompt_strategies import load
from axolotl.utils.dict import DictDefault
from tests.tiny import CHATML, make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHATML)


CONVERSATION = [
    {"role": "system", "content": [{"type": "text", "value": "Be brief."}]},
    {"role": "user", "content": "What does Apple cost?"},
    {
        "role": "assistant",
        "weight": 1,
        "content": [
            {"type": "tool_call", "value": {"name": "date", "arguments": {}}},
            {"type": "tool_call", "value": {"name": "price", "arguments": {"of": "AAPL"}}},
        ],
    },
    {"role": "tool", "content": [{"type": "tool_response", "value": {"name": "price", "content": {"usd": 1.5}}}]},
    {
        "role": "assistant",
        "weight": 1,
        "content": [
            {"type": "text", "value": "It costs $2.\n", "weight": 0},
            {"type": "text", "value": "No: it costs $1.50."},
        ],
    },
]

CHATML_TEXT = """<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
What does Apple cost?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "date", "arguments": {}}
</tool_call>
<tool_call>
{"name": "price", "arguments": {"of": "AAPL"}}
</tool_call>
<|im_end|>
<|im_start|>tool
<tool_response>
{"name": "price", "content": {"usd": 1.5}}
</tool_response>
<|im_end|>
<|im_start|>assistant
It costs $2.
No: it costs $1.50.<|im_end|>
"""

LLAMA3_TEXT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat does Apple cost?<|eot_id|>"
    '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "date", "arguments": {}}'
    '{"name": "price", "arguments": {"of": "AAPL"}}<|eom_id|>'
    '<|start_header_id|>ipython<|end_header_id|>\n\n{"name": "price", "content": {"usd": 1.5}}<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\nIt costs $2.\nNo: it costs $1.50.<|eot_id|>"
)


@pytest.mark.parametrize("module, text", [(chatml, CHATML_TEXT), (llama3x, LLAMA3_TEXT)])
def test_formats(module, text):
    chats = Chats(conversation=CONVERSATION)
    formatted = ChatFormattedChats(**chats.model_dump(), formatter=module.format_message)
    assert str(formatted) == text
    again = ChatFormattedChats(**formatted.model_dump())
    assert str(again) == text


def trained_text(tokenizer, tokens) -> str:
    return tokenizer.decode([label for label in tokens["labels"] if label != -100])


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_trained_is_what_has_weight(tokenizer, train_on_inputs):
    formatted = ChatFormattedChats(
        conversation=CONVERSATION, formatter=chatml.format_message, train_on_inputs=train_on_inputs
    )
    tokens = formatted.tokenized(tokenizer)
    assert tokens["input_ids"] == tokenizer(CHATML_TEXT, add_special_tokens=False)["input_ids"]
    trained = trained_text(tokenizer, tokens)
    calls = CHATML_TEXT.partition("assistant\n")[2].partition("\n<|im_start|>")[0]
    answer = "No: it costs $1.50.<|im_end|>"
    if train_on_inputs:
        response = CHATML_TEXT.partition("<|im_start|>tool\n")[2].partition("\n<|im_start|>")[0]
        assert trained == f"Be brief.<|im_end|>What does Apple cost?<|im_end|>{calls}{response}{answer}"
    else:
        assert trained == calls + answer
    assert tokens["attention_mask"] == [1] * len(tokens["input_ids"])


def test_a_message_alone_and_another_ignored_label(tokenizer):
    formatted = ChatFormattedChats(conversation=CONVERSATION[:2], formatter=chatml.format_message)
    tokens = formatted.conversation[0].tokenized(tokenizer, ignore_index=-7)
    assert set(tokens["labels"]) == {-7}
    assert tokenizer.decode(tokens["input_ids"]) == "<|im_start|>system\nBe brief.<|im_end|>\n"


def test_an_untrained_end_is_not_trained(tokenizer):
    last = {
        "role": "assistant",
        "content": [{"type": "text", "value": "a"}, {"type": "text", "value": "b", "weight": 0}],
    }
    formatted = ChatFormattedChats(conversation=[last], formatter=chatml.format_message)
    assert trained_text(tokenizer, formatted.tokenized(tokenizer)) == "a"


def test_special_tokens(tokenizer):
    conversation = [
        {
            "role": "assistant",
            "content": [
                {"type": "special_token", "value": "bos_token", "weight": 0},
                {"type": "text", "value": "hi", "has_newline": True},
                {"type": "special_token", "value": "eos_token"},
            ],
        }
    ]
    tokens = Chats(conversation=conversation).tokenized(tokenizer)
    assert tokenizer.decode(tokens["input_ids"]) == "<s>hi\n</s>"
    assert trained_text(tokenizer, tokens) == "hi\n</s>"
    assert str(MessageContents(type="special_token", value=SpecialToken.eos_token)) == ""


def test_tools_as_text():
    call = ToolCallContents(name="price", arguments={"of": "AAPL"})
    assert str(call) == '{"name": "price", "arguments": {"of": "AAPL"}}'
    response = ToolResponseContents(name="price", content="1.5", id="7")
    assert str(response) == '{"name": "price", "content": "1.5", "id": "7"}'
    assert Tool(function={"name": "price"}, parameters={"type": "object"}).description is None


def test_preferences():
    chats = PreferenceChats(
        prompt=[{"role": "user", "content": "q"}],
        chosen={"role": "assistant", "content": "a"},
        rejected={"role": "assistant", "content": "b"},
    )
    assert (str(chats.chosen), str(chats.rejected)) == ("a", "b")


def test_images_are_refused(tokenizer):
    chats = Chats(conversation=[{"role": "user", "content": [{"type": "image", "value": "a.png"}]}])
    with pytest.raises(DatasetError, match="image"):
        chats.tokenized(tokenizer)


@pytest.mark.parametrize(
    "arguments, row, expected",
    [
        ({}, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, [0, 1]),
        ({"train_on_inputs": True}, {"messages": [{"role": "user", "content": "q"}]}, [1]),
        (
            {"conversations_field": "conversations"},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]},
            [0, 0],
        ),
        (
            {"message_field_role": "who", "message_field_content": ["says"], "message_field_training": "learn"},
            {"messages": [{"who": "user", "says": "q", "learn": True}]},
            [1],
        ),
        ({}, {"messages": '[{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]'}, [1]),
    ],
)
def test_chat_message_transform_builder(arguments, row, expected):
    chats = Chats(**chat_message_transform_builder(**arguments)(row))
    assert [message.weight for message in chats.conversation] == expected
    assert {str(message) for message in chats.conversation} <= {"q", "a"}
    assert {message.role for message in chats.conversation} <= {"user", "assistant"}


def test_tool_calls_of_the_openai_form():
    call = {"id": "7", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    (message,) = Chats(**chat_message_transform_builder()(row)).conversation
    assert str(message) == '{"name": "f", "arguments": {"x": 1}, "id": "7"}'


@pytest.mark.parametrize(
    "messages, problem",
    [
        ([], "must be a list of messages"),
        ([{"content": "a"}], "message 0 has no role"),
        ([{"role": "user", "content": None}], "message 0 has no content"),
        ([{"role": "user", "content": 7}], "must be text or a list of parts"),
        ("{", "no JSON"),
        ([{"role": "user", "content": [{"type": "tool_call", "value": {"arguments": {}}}]}], "name"),
    ],
)
def test_bad_rows_are_named(tokenizer, messages, problem):
    strategy = load("messages.chat", tokenizer, DictDefault(sequence_len=64), DictDefault())
    with pytest.raises(DatasetError, match=problem):
        strategy.tokenize_prompt({"messages": messages})


def test_dataset_names_the_row(tokenizer):
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "q"}]}, {"messages": []}])
    with pytest.raises(DatasetError, match="Row 1"):
        TokenizedChatDataset(rows, tokenizer, message_transform=chat_message_transform_builder())


def upper(row):
    return {"messages": [{**message, "content": message["content"].upper()} for message in row["talk"]]}


def test_type_messages_chat(tokenizer):
    rows = Dataset.from_list([{"talk": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    entry = DictDefault(type="messages.chat", input_transform=f"{__name__}.upper", chat_template="chatml")
    strategy = load("messages.chat", tokenizer, DictDefault(sequence_len=64), entry)
    (row,) = strategy.wrap_dataset(rows, process_count=1)
    assert tokenizer.decode(row["input_ids"]) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert trained_text(tokenizer, row) == "A<|im_end|>"
    whole = tokenizer.apply_chat_template(upper(rows[0])["messages"], tokenize=True, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole


@pytest.mark.parametrize(
    "entry, problem",
    [({"chat_template": "gemma"}, "type: chat_template"), ({"input_transform": "a.b"}, "names no function")],
)
def test_what_messages_chat_cannot_do(tokenizer, entry, problem):
    with pytest.raises(ConfigError, match=problem):
        load("messages.chat", tokenizer, DictDefault(sequence_len=64), DictDefault(entry))
