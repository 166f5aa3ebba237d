"""Chat templates: the ids are those of inference, the labels those of the turns that are learnt."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.conftest import make_tokenizer
from axolotl.datasets import TokenizedPromptDataset
from axolotl.exceptions import AxolotlError, ConfigError, DatasetError, TokenizerError
from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy, load
from axolotl.utils.chat_templates import chat_template_names, get_chat_template
from axolotl.utils.dict import DictDefault

TOKENIZER = make_tokenizer()
NO_SYSTEM = {"gemma", "inst"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def strategy_of(template="chatml", cfg=None, tokenizer=TOKENIZER, **ds_cfg):
    return load(tokenizer, DictDefault(sequence_len=512, **(cfg or {})), DictDefault(chat_template=template, **ds_cfg))


def chat(*contents, system=None):
    turns = [{"role": "system", "content": system}] if system is not None else []
    return turns + [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)
    ]


def learnt(tokenized, tokenizer=TOKENIZER):
    """The learnt pieces of text, in order."""
    pieces, current = [], []
    for token, label in zip([*tokenized["input_ids"], None], [*tokenized["labels"], -100], strict=True):
        if label != -100:
            assert label == token
            current.append(token)
        elif current:
            pieces.append(tokenizer.decode(current))
            current = []
    return pieces


CONTENT = st.text(st.sampled_from("abz Hello[]\n<>|é😀 im_end"), min_size=1, max_size=12)
WRITTEN = CONTENT.filter(lambda text: text.strip() == text)


@pytest.mark.parametrize("name", chat_template_names())
@given(contents=st.lists(CONTENT, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0), system=CONTENT)
@settings(max_examples=8, deadline=None)
def test_ids_are_those_of_apply_chat_template(name, contents, system):
    turns = chat(*contents, system=None if name in NO_SYSTEM else system)
    template = get_chat_template(name)
    expected = TOKENIZER.apply_chat_template(turns, chat_template=template, tokenize=True, return_dict=False)
    assert strategy_of(name).tokenize_prompt({"messages": turns})["input_ids"] == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral_v1", "phi_35", "qwen3", "alpaca"])
@given(contents=st.lists(WRITTEN, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
@settings(max_examples=25, deadline=None)
def test_what_is_learnt_is_the_answers(name, contents):
    strategy = strategy_of(name, train_on_eos="none")
    turns = chat(*contents)
    assert [piece.strip() for piece in learnt(strategy.tokenize_prompt({"messages": turns}))] == contents[1::2]


@given(st.lists(st.lists(CONTENT, min_size=2, max_size=4), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_a_batch_equals_its_rows(conversations):
    strategy = strategy_of()
    rows = [chat(*contents) for contents in conversations]
    batch = strategy.tokenize_prompt({"messages": rows})
    for index, row in enumerate(rows):
        assert {key: values[index] for key, values in batch.items()} == strategy.tokenize_prompt({"messages": row})


def test_the_end_token_that_the_template_writes_is_learnt():
    cfg = DictDefault(sequence_len=512)
    strategy = load(TOKENIZER, cfg, DictDefault(chat_template="chatml"))
    assert learnt(strategy.tokenize_prompt({"messages": chat("Hi", "Yo", "A", "B")})) == ["Yo<|im_end|>", "B<|im_end|>"]
    assert cfg.resolution[0].key == "eot_tokens" and cfg.resolution[0].value == ["</s>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("eos", "eot", "expected"),
    [
        (None, "turn", ["Yo<|end|>", "B<|end|>", "</s>"]),
        ("all", "all", ["<|end|>", "Yo<|end|>", "<|end|>", "B<|end|>", "</s>"]),
        ("last", "turn", ["Yo<|end|>", "B<|end|>", "</s>"]),
        ("none", "turn", ["Yo<|end|>", "B<|end|>"]),
        ("turn", "none", ["Yo", "B", "</s>"]),
        ("none", "none", ["Yo", "B"]),
    ],
)
def test_a_rule_for_end_of_turn_tokens_is_for_those_that_the_template_writes(eos, eot, expected):
    strategy = strategy_of("phi_35", train_on_eos=eos, train_on_eot=eot)
    assert learnt(strategy.tokenize_prompt({"messages": chat("Hi", "Yo", "A", "B")})) == expected


def test_where_the_template_writes_eos_nothing_is_chosen():
    cfg = DictDefault(sequence_len=512)
    strategy = load(TOKENIZER, cfg, DictDefault(chat_template="mistral_v1"))
    assert cfg.resolution is None and strategy.eot_tokens == ["</s>"]
    assert [p.strip() for p in learnt(strategy.tokenize_prompt({"messages": chat("Hi", "Yo", "A", "B")}))] == [
        "Yo</s>",
        "B</s>",
    ]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("turn", ["Yo<|im_end|>", "B<|im_end|>"]),
        ("all", ["<|im_end|>", "Yo<|im_end|>", "<|im_end|>", "B<|im_end|>"]),
        ("last", ["Yo", "B<|im_end|>"]),
        ("none", ["Yo", "B"]),
    ],
)
def test_train_on_eot(option, expected):
    strategy = strategy_of(cfg={"eot_tokens": ["<|im_end|>"]}, train_on_eot=option)
    assert learnt(strategy.tokenize_prompt({"messages": chat("Hi", "Yo", "A", "B")})) == expected


def test_an_eot_token_that_neither_template_nor_tokenizer_knows_is_left_out(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    strategy = strategy_of(cfg={"eot_tokens": ["not one", "<|im_end|>", "[/SYSTEM_PROMPT]"]})
    assert learnt(strategy.tokenize_prompt({"messages": chat("Hi", "Yo")})) == ["Yo<|im_end|>"]
    assert "EOT token 'not one' not found in chat_template" in caplog.text
    assert "EOT token '[/SYSTEM_PROMPT]' not found in chat_template" in caplog.text


@pytest.mark.parametrize("option", ["turn", "all", "last", "none"])
def test_eos_a_few_tokens_after_the_turn_belongs_to_it(option):
    strategy = strategy_of("phi_35", cfg={"eot_tokens": ["<|end|>"]}, train_on_eos=option, train_on_eot="none")
    pieces = learnt(strategy.tokenize_prompt({"messages": chat("Hi", "Yo")}))
    assert pieces == (["Yo"] if option == "none" else ["Yo", "</s>"])


def test_eot_tokens_are_followed_to_the_letter():
    strategy = strategy_of(cfg={"eot_tokens": ["<|end|>"]})
    assert learnt(strategy.tokenize_prompt({"messages": chat("Hi", "Yo")})) == ["Yo"]
    with pytest.raises(TokenizerError, match="EOT token 'im_end' is encoded as multiple tokens"):
        strategy_of(cfg={"eot_tokens": ["im_end"]})
    with pytest.raises(ConfigError, match="Conflict between train_on_eos and train_on_eot"):
        strategy_of(cfg={"eot_tokens": ["</s>"]}, train_on_eos="turn", train_on_eot="all")
    with pytest.raises(ConfigError, match="train_on_eos: sometimes"):
        strategy_of(train_on_eos="sometimes")


def test_roles():
    messages = [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yo"}, {"role": "bot", "content": "Z"}]
    strategy = strategy_of(train_on_eos="none", roles_to_train=["human", "bot"])
    assert learnt(strategy.tokenize_prompt({"messages": messages})) == ["Hi", "Z"]
    strategy = strategy_of(train_on_eos="none", roles={"assistant": ["bot"], "user": ["human", "gpt"]})
    assert [turn["role"] for turn in strategy.get_conversation_thread({"messages": messages})] == [
        "user",
        "user",
        "assistant",
    ]
    assert learnt(strategy.tokenize_prompt({"messages": messages})) == ["Z"]
    strategy = strategy_of(train_on_eos="none", roles={"assistant": "bot", "user": "human"})
    assert [turn["role"] for turn in strategy.get_conversation_thread({"messages": messages})] == [
        "user",
        "gpt",
        "assistant",
    ]


def test_train_on_inputs_learns_every_turn():
    strategy = strategy_of(cfg={"train_on_inputs": True}, train_on_eos="none")
    assert learnt(strategy.tokenize_prompt({"messages": chat("Hi", "Yo", system="S")})) == ["S", "Hi", "Yo"]


def test_other_names_of_fields():
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "sys": "S"}
    strategy = strategy_of(
        field_messages="conversations",
        field_system="sys",
        message_property_mappings={"role": "from", "content": "value"},
    )
    expected = strategy_of().tokenize_prompt({"messages": chat("Hi", "Yo", system="S")})
    assert strategy.tokenize_prompt(row) == expected
    older = strategy_of(
        field_messages="conversations", field_system="sys", message_field_role="from", message_field_content="value"
    )
    assert older.tokenize_prompt(row) == expected
    assert strategy_of().tokenize_prompt({"messages": json.dumps(chat("Hi", "Yo", system="S"))}) == expected


def test_a_system_field_is_text_or_parts():
    expected = strategy_of().tokenize_prompt({"messages": chat("Hi", "Yo", system="So be it.")})
    parts = [{"type": "text", "text": "So "}, "be it."]
    assert strategy_of().tokenize_prompt({"messages": chat("Hi", "Yo"), "system": parts}) == expected
    for system, what in (
        (3, "a number"),
        ([{"type": "image"}], "a list"),
        ([None], "a list"),
        ({"text": "S"}, "a mapping"),
    ):
        with pytest.raises(DatasetError, match=f"The field `system` is {what}, but it must be text"):
            strategy_of().tokenize_prompt({"messages": chat("Hi", "Yo"), "system": system})


def test_drop_system_message():
    row = {"messages": chat("Hi", "Yo", system="S")}
    assert strategy_of(drop_system_message=True).tokenize_prompt(row) == strategy_of().tokenize_prompt(
        {"messages": chat("Hi", "Yo")}
    )
    with pytest.raises(DatasetError, match="drop_system_message"):
        strategy_of(drop_system_message=True).tokenize_prompt({"messages": row["messages"][:1]})


def test_flags_of_messages_go_before_roles():
    messages = [
        {"role": "user", "content": "Hi", "learn": True},
        {"role": "assistant", "content": "Yo", "learn": False},
        {"role": "assistant", "content": "Z", "learn": None},
    ]
    strategy = strategy_of(message_field_training="learn", train_on_eos="turn")
    assert learnt(strategy.tokenize_prompt({"messages": messages})) == ["Hi<|im_end|>", "Z<|im_end|>"]
    messages[1]["learn"] = "false"
    with pytest.raises(DatasetError, match="`learn` of a message is text, but it must be true or false"):
        strategy.tokenize_prompt({"messages": messages})


def test_details_of_messages_choose_characters():
    text = "Hello, how are you?"
    details = [
        {"begin_offset": 0, "end_offset": 5, "train": True},
        {"begin_offset": 6, "end_offset": 18, "train": False},
    ]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text, "detail": details}]
    for template in ("chatml", "llama3"):
        strategy = strategy_of(template, message_field_training_detail="detail", train_on_eos="none")
        assert learnt(strategy.tokenize_prompt({"messages": messages})) == ["Hello,"]
    strategy = strategy_of("llama3", message_field_training_detail="detail", train_on_eos="none")
    messages[1]["content"] = "  " + text
    messages[1]["detail"] = [{"begin_offset": 2, "end_offset": 7, "train": True}]
    assert learnt(strategy.tokenize_prompt({"messages": messages})) == ["Hello,"]


DETAIL = {"begin_offset": 0, "end_offset": 1, "train": True}


@pytest.mark.parametrize(
    ("details", "says"),
    [
        ("all", "`detail` of a message is text, but it must be a list"),
        ([3], "`detail` of a message is a list that holds a number, but it must be a list of"),
        ([{"begin_offset": 0, "end_offset": 1}], "`train` in `detail` of a message is null"),
        ([{**DETAIL, "train": "no"}], "`train` in `detail` of a message is text"),
        ([DETAIL, {**DETAIL, "begin_offset": "0"}], "`begin_offset` in `detail` of a message is text"),
        ([{**DETAIL, "end_offset": -1}], "`end_offset` in `detail` of a message is -1"),
    ],
)
def test_details_that_are_none(details, says):
    messages = [{"role": "assistant", "content": "Yo", "detail": details}]
    with pytest.raises(DatasetError, match=says):
        strategy_of(message_field_training_detail="detail").tokenize_prompt({"messages": messages})


def test_parts_of_content():
    parts = [
        {"type": "text", "text": "Hello,", "train": False},
        {"type": "text", "value": " how are", "weight": 1},
        {"type": "text", "content": " you?"},
    ]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": parts}]
    strategy = strategy_of(train_on_eos="none")
    tokenized = strategy.tokenize_prompt({"messages": messages})
    assert (
        tokenized["input_ids"] == strategy.tokenize_prompt({"messages": chat("Hi", "Hello, how are you?")})["input_ids"]
    )
    assert learnt(tokenized) == [" how are you?"]
    parts[0]["train"] = "false"
    with pytest.raises(DatasetError, match="`train` of a part is text, but it must be true or false"):
        strategy.tokenize_prompt({"messages": messages})


def test_reasoning_is_learnt_with_its_tags():
    think = "<think>\nbecause\n</think>\n\nYo"
    strategy = strategy_of("qwen3", split_thinking=True, train_on_eos="none")
    row = {"messages": chat("Hi", "<think>because</think>Yo")}
    turn = strategy.get_conversation_thread(row)[1]
    assert (turn["reasoning_content"], turn["content"]) == ("because", "Yo")
    assert learnt(strategy.tokenize_prompt(row)) == [think]
    named = strategy_of("qwen3", field_thinking="why", train_on_eos="none")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "why": "because"}]
    assert learnt(named.tokenize_prompt({"messages": messages})) == [think]
    assert learnt(strategy_of("qwen3", train_on_eos="none").tokenize_prompt({"messages": chat("Hi", "Yo")})) == ["Yo"]


def test_details_follow_the_reasoning_out_of_the_content():
    strategy = strategy_of("qwen3", split_thinking=True, message_field_training_detail="detail", train_on_eos="none")
    text = "<think> because of</think> So it is. "

    def pieces(*wanted, content=text, earlier=False):
        details = [
            {"begin_offset": content.index(piece), "end_offset": content.index(piece) + len(piece) - 1, "train": train}
            for piece, train in wanted
        ]
        answer = {"role": "assistant", "content": content, "detail": details}
        messages = [{"role": "user", "content": "Hi"}, answer, *(chat("More", "") if earlier else ())]
        return learnt(strategy.tokenize_prompt({"messages": messages}))

    assert pieces(("because", True), (" of", False), ("it is", True)) == ["because", "it is"]
    assert pieces((text, True)) == ["because of", "So it is. "]
    assert pieces(("it is", True)) == ["it is"]
    assert pieces(("of", True)) == ["of"]
    assert pieces(("<think>", True)) == []
    assert pieces(("because", False), ("it is", True), earlier=True) == ["it is"]
    solution = "<|begin_of_thought|>hm<|end_of_thought|> <|begin_of_solution|> It is 4. <|end_of_solution|>"
    assert pieces(("hm", False), ("It", True), content=solution) == ["It"]
    parts = [
        {"type": "text", "text": "<think>hm</think>", "train": False},
        {"type": "text", "text": "4", "train": True},
    ]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": parts}]
    assert learnt(strategy.tokenize_prompt({"messages": messages})) == ["4"]


def test_reasoning_that_the_template_drops_from_earlier_turns():
    messages = chat("Hi", "Yo", "A", "B")
    messages[1]["reasoning_content"] = "because"
    assert learnt(strategy_of("qwen3", train_on_eos="none").tokenize_prompt({"messages": messages})) == ["Yo", "B"]


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_tool_calls_are_learnt(arguments):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    row = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "add", "arguments": arguments}}],
            },
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Two"},
        ],
        "my_tools": json.dumps(TOOLS),
    }
    strategy = strategy_of("qwen_25", field_tools="my_tools", train_on_eos="none")
    tokenized = strategy.tokenize_prompt(row)
    assert [piece.strip() for piece in learnt(tokenized)] == [call, "Two"]
    assert "<tools>" in TOKENIZER.decode(tokenized["input_ids"])
    with pytest.raises(DatasetError, match="Error parsing tool_calls arguments as JSON"):
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] = "{a: 1"
        strategy.tokenize_prompt(row)


def test_only_the_last_turn_when_nothing_says_what_to_learn():
    strategy = ChatTemplateStrategy(
        ChatTemplatePrompter(TOKENIZER, get_chat_template("chatml")), TOKENIZER, train_on_inputs=False, sequence_len=512
    )
    assert learnt(strategy.tokenize_prompt({"messages": chat("Hi", "Yo", "A", "B")})) == ["B<|im_end|>\n"]


def test_find_turn_and_first_eot():
    strategy = strategy_of()
    turns = strategy.get_conversation_thread({"messages": chat("Hi", "Yo", "A", "B", system="S")})
    ids = strategy.prompter.build_prompt(turns)
    for index, text in enumerate(["S", "Hi", "Yo", "A", "B"]):
        start, end = strategy.find_turn(turns=turns, turn_idx=index)
        assert TOKENIZER.decode(ids[start:end]) == text
        assert strategy.find_first_eot_token(ids, start_idx=start) == end
    assert strategy.find_first_eot_token(ids[:2], start_idx=0) == -1
    with pytest.raises(ValueError, match="out of range"):
        strategy.find_turn(turns=turns, turn_idx=5)
    prompt = strategy.prompter.build_prompt(turns[:2], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt


def test_absent_keys_that_arrow_fills_with_null(tiny_tokenizer):
    messages = [*chat("Hi", "Yo"), {"role": "tool", "content": "x", "name": "n"}]
    from datasets import Dataset

    rows = Dataset.from_list([{"messages": messages}])
    strategy = strategy_of()
    assert TokenizedPromptDataset(strategy, rows)[0] == strategy.tokenize_prompt({"messages": messages})


def test_an_empty_answer_is_reported_once_with_its_place(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    from datasets import Dataset

    rows = Dataset.from_list(
        [{"messages": chat("Hi", "Yo")}, {"messages": chat("Hi", "")}, {"messages": chat("A", "")}]
    )
    dataset = TokenizedPromptDataset(strategy_of(path="chats.jsonl"), rows)
    assert set(dataset[1]["labels"]) == {-100}
    assert [r.message for r in caplog.records if "nothing of it is" in r.message] == [
        "Row 1 of `chats.jsonl`, turn 1 (assistant) should be learnt, but nothing of it is: Content end boundary is the same "
        "as start boundary for turn 1. This is likely an empty turn. Further turns like this one are not reported."
    ]


def test_what_the_template_does_not_write_is_said(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    answer = {"role": "assistant", "content": "Yo", "tool_calls": [call], "reasoning_content": "why"}
    row = {"messages": [{"role": "user", "content": "Hi"}, answer], "tools": TOOLS}
    strategy_of("qwen3").tokenize_prompt(row)
    assert "does not write" not in caplog.text
    strategy_of("chatml").tokenize_prompt(row)
    said = [record.message for record in caplog.records if "does not write" in record.message]
    assert [message.partition(", but")[0] for message in said] == [
        "The messages have `tool_calls`",
        "The messages have `reasoning_content`",
        "The rows have tools (`tools`)",
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"conversations": [], "tools": [], "id": 3}, "no field `messages`.*Write `field_messages: conversations`"),
        ({"chosen": [], "rejected": []}, "no field `messages`.*the right one as `field_messages`"),
        ({"messages": None}, "Messages is null. Please check `field_messages`"),
        ({"messages": 3}, "Unknown messages format"),
        ({"messages": []}, "holds no message"),
        ({"messages": "{oops"}, "is text, but not JSON"),
        ({"messages": [{"content": "x"}]}, "A message has no `role`.*message_property_mappings"),
        ({"messages": chat("a", "b"), "tools": "x"}, "`tools` is text, but not JSON"),
    ],
)
def test_bad_rows(row, says):
    with pytest.raises(DatasetError, match=says):
        strategy_of().tokenize_prompt(row)


def test_a_message_without_content_is_an_error_that_names_row_and_key():
    from datasets import Dataset

    rows = Dataset.from_list([{"messages": chat("Hi", "Yo")}, {"messages": [{"role": "user", "text": "x"}]}])
    with pytest.raises(
        DatasetError, match=r"Row 1.*'dict object' has no attribute 'content'.*message 0 \(`user`\) has null"
    ):
        TokenizedPromptDataset(strategy_of(), rows)


def test_a_tokenizer_without_template():
    with pytest.raises(
        AxolotlError, match="chat_template choice is tokenizer_default but tokenizer's chat_template is null"
    ):
        load(TOKENIZER, DictDefault(sequence_len=8), DictDefault())


PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
WITH_TOOLS = (
    "{{ tools | length }} tools {% for m in messages %}[{{ m.role }}]{{ m.plan }}{{ m.content }}</s>{% endfor %}"
)


def several_templates():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": WITH_TOOLS, "rag": "rag {{ messages[1].content }}"}
    return tokenizer


@pytest.mark.parametrize("choice", ["tokenizer_default", "tokenizer_default_fallback_chatml"])
def test_rows_with_tools_take_the_template_for_them_as_transformers_does(choice, caplog):
    tokenizer = several_templates()
    strategy = strategy_of(choice, tokenizer=tokenizer)
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "plan": "P"}]
    for tools, pieces in ((None, ["A<|im_end|>"]), ([], ["A<|im_end|>"]), (TOOLS, ["PA</s>"])):
        row = strategy.tokenize_prompt({"messages": turns, "tools": tools})
        expected = tokenizer.apply_chat_template(turns, tools=tools or None, return_dict=False)
        assert row["input_ids"] == expected
        assert learnt(row, tokenizer) == pieces
        assert strategy.prompter.build_prompt(turns, tools=tools or None) == expected
    assert strategy.eot_tokens == ["</s>", "<|im_end|>"]
    assert "tools" not in caplog.text


def test_one_of_several_templates_is_chosen_by_its_name():
    tokenizer = several_templates()
    for name, text in (
        ("rag", "rag A"),
        ("default", "<|im_start|>user\nQ<|im_end|><|im_start|>assistant\nA<|im_end|>"),
    ):
        strategy = strategy_of(f"tokenizer_default:{name}", tokenizer=tokenizer, cfg={"eot_tokens": ["</s>"]})
        for tools in (None, TOOLS):
            row = strategy.tokenize_prompt({"messages": chat("Q", "A"), "tools": tools})
            assert tokenizer.decode(row["input_ids"]) == text


def test_a_name_that_the_tokenizer_does_not_have():
    with pytest.raises(
        TokenizerError, match=r"no chat template of the name `tools`. Its templates are default, rag, tool_use"
    ):
        strategy_of("tokenizer_default:tools", tokenizer=several_templates())
    with pytest.raises(TokenizerError, match="It has none"):
        strategy_of("tokenizer_default:rag")
    tokenizer = several_templates()
    del tokenizer.chat_template["default"]
    with pytest.raises(TokenizerError, match=r"none is named `default`.*`chat_template: tokenizer_default:rag`"):
        strategy_of("tokenizer_default", tokenizer=tokenizer)


def test_the_strategy_travels_to_other_processes():
    import pickle

    strategy = strategy_of()
    row = {"messages": chat("Hi", "Yo")}
    assert pickle.loads(pickle.dumps(strategy)).tokenize_prompt(row) == strategy.tokenize_prompt(row)


def test_a_control_token_that_swallows_white_space_is_no_part_of_the_turn():
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("<|reply|>", rstrip=True, special=True), AddedToken("<|stop|>", lstrip=True, special=True)]
    )
    template = "{% for m in messages %}<|reply|>{{ m.content }}<|stop|>{% endfor %}"
    strategy = strategy_of("jinja", tokenizer=tokenizer, chat_template_jinja=template, train_on_eos="none")
    tokenized = strategy.tokenize_prompt({"messages": [{"role": "assistant", "content": "  Hello  "}]})
    assert learnt(tokenized, tokenizer) == ["Hello"]


def test_a_python_tokenizer_that_keeps_no_offsets():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    for answer in ("Yo", " é😀 x ", "<|im_end|>Hi"):
        row = strategy_of(tokenizer=tokenizer).tokenize_prompt({"messages": chat("Hé 😀", answer, "Hi", "Hi")})
        assert learnt(row, tokenizer) == [f"{answer}<|im_end|>", "Hi<|im_end|>"]


def test_a_template_that_writes_nothing(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    strategy = strategy_of("jinja", chat_template_jinja="{% for m in messages %}{% endfor %}")
    assert strategy.tokenize_prompt({"messages": chat("Hi", "Yo")})["input_ids"] == []
    assert "Empty template generated for turn 1" in caplog.text


@pytest.mark.parametrize(
    "attack",
    ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}", "{% include '/etc/hosts' %}"],
)
def test_templates_run_in_a_sandbox(attack):
    with pytest.raises(AxolotlError):
        strategy_of("jinja", chat_template_jinja=attack + "{{ messages[0].content }}").tokenize_prompt(
            {"messages": chat("Hi", "Yo")}
        )
