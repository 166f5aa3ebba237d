"""What must hold for every conversation: the tokens are those of inference, and exactly the learnt turns have labels.

The formats below are written down a second time, by hand, as the text between the contents. From them follows for each
token whether it is learnt: when it reaches into the content of a learnt turn, or when it is the token that ends one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.datasets import TokenizedPromptDataset
from axolotl.prompt_strategies import load
from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy
from axolotl.utils.chat_templates import chat_template_names, get_chat_template
from axolotl.utils.dict import DictDefault
from tests.tiny_tokenizers import KINDS, make_tokenizer_of_kind

CONTROL_TOKENS = tuple(
    """<|im_start|> <|im_end|> <|im_sep|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|header_start|> <|header_end|>
    <|eot|> <start_of_turn> <end_of_turn> <|turn> <turn|> <|tool_call> <tool_call|> <|tool_response> <tool_response|>
    <|user|> <|assistant|> <|system|> <|model|> <|end|> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [|user|]
    [|assistant|] [|system|] [|endofturn|] <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>
    <|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_THINKING|> <|END_THINKING|> <|START_ACTION|> <|END_ACTION|>
    <|START_TOOL_RESULT|> <|END_TOOL_RESULT|> [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]
    <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <|bom|> <|eom|> <think> </think> <tool_call>
    </tool_call>""".split()  # noqa: SIM905
)
SEQUENCE_LEN = 4096


def as_it_is(text: str) -> str:
    return text


@dataclass(frozen=True)
class Format:
    """A chat format as the text around the contents.

    Attributes:
        before: role -> what stands before a content.
        end: role -> what ends the turn; for the assistant, the end-of-turn token first.
        start: what begins the conversation.
        no_system: what follows where there is no system text.
        close: what ends it.
        written: what the format makes of a content.
        alternates: the roles must alternate, beginning with the user; a system text has no turn of its own.
    """

    before: dict[str, str]
    end: dict[str, str]
    eot: str
    start: str = ""
    no_system: str = ""
    close: str = ""
    written: Callable[[str], str] = as_it_is
    alternates: bool = False

    def pieces(self, turns: list[dict[str, str]]) -> list[tuple[str, int | None]]:
        """Text, and the turn whose content it is."""
        pieces: list[tuple[str, int | None]] = [(self.start, None)]
        if turns[0]["role"] != "system":
            pieces.append((self.no_system, None))
        for index, turn in enumerate(turns):
            pieces += [
                (self.before[turn["role"]], None),
                (self.written(turn["content"]), index),
                (self.end[turn["role"]], None),
            ]
        return [*pieces, (self.close, None)]


def alike(before: str, end: str, roles: str = "system user assistant", **names: str) -> dict[str, dict[str, str]]:
    """Every role is written in the same way; `names` are other names of roles."""
    return {
        "before": {role: before.format(names.get(role, role)) for role in roles.split()},
        "end": dict.fromkeys(roles.split(), end),
    }


INST = {"before": {"user": "[INST] ", "assistant": " "}, "end": {"user": "[/INST]", "assistant": "</s>"}}
COHERE = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>"
FORMATS: dict[str, Format] = {
    "chatml": Format(**alike("<|im_start|>{}\n", "<|im_end|>\n"), eot="<|im_end|>"),
    "falcon_h1": Format(**alike("<|im_start|>{}\n", "<|im_end|>\n"), eot="<|im_end|>", start="<s>"),
    "llama3": Format(
        **alike("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
        eot="<|eot_id|>",
        start="<s>",
        written=str.strip,
    ),
    "llama4": Format(
        **alike("<|header_start|>{}<|header_end|>\n\n", "<|eot|>", "user assistant"), eot="<|eot|>", start="<s>"
    ),
    "gemma": Format(
        **alike("<start_of_turn>{}\n", "<end_of_turn>\n", "user assistant", assistant="model"),
        eot="<end_of_turn>",
        start="<s>",
        written=str.strip,
        alternates=True,
    ),
    "gemma3": Format(
        **alike("<start_of_turn>{}\n", "<end_of_turn>\n", "user assistant", assistant="model"),
        eot="<end_of_turn>",
        start="<s>",
        written=str.strip,
        alternates=True,
    ),
    "phi_3": Format(
        before={"system": "<|system|>\n", "user": "<|user|>\n", "assistant": ""},
        end={"system": "<|end|>\n", "user": "<|end|>\n<|assistant|>\n", "assistant": "<|end|>\n"},
        eot="<|end|>",
        start="<s>",
    ),
    "phi_35": Format(**alike("<|{}|>\n", "<|end|>\n", "user assistant"), eot="<|end|>", close="</s>"),
    "phi_4": Format(**alike("<|im_start|>{}<|im_sep|>", "<|im_end|>"), eot="<|im_end|>"),
    "mistral_v1": Format(
        before={"user": " [INST] ", "assistant": " "},
        end={"user": " [/INST]", "assistant": "</s>"},
        eot="</s>",
        start="<s>",
        alternates=True,
    ),
    "mistral_v3_tekken": Format(
        before={"user": "[INST]", "assistant": ""},
        end={"user": "[/INST]", "assistant": "</s>"},
        eot="</s>",
        start="<s>",
        alternates=True,
    ),
    "mistral_v7_tekken": Format(
        before={"system": "[SYSTEM_PROMPT]", "user": "[INST]", "assistant": ""},
        end={"system": "[/SYSTEM_PROMPT]", "user": "[/INST]", "assistant": "</s>"},
        eot="</s>",
        start="<s>",
    ),
    "inst": Format(
        before={"user": "[INST] ", "assistant": ""},
        end={"user": " [/INST]", "assistant": "</s>"},
        eot="</s>",
        start="<s>",
        alternates=True,
    ),
    "cohere": Format(
        before={"user": COHERE.format("USER"), "assistant": COHERE.format("CHATBOT")},
        end=dict.fromkeys(("user", "assistant"), "<|END_OF_TURN_TOKEN|>"),
        eot="<|END_OF_TURN_TOKEN|>",
        start="<s>",
        written=str.strip,
        alternates=True,
    ),
    "command_a": Format(
        before={"user": COHERE.format("USER"), "assistant": COHERE.format("CHATBOT") + "<|START_RESPONSE|>"},
        end={"user": "<|END_OF_TURN_TOKEN|>", "assistant": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"},
        eot="<|END_RESPONSE|>",
        start="<s>",
        no_system=COHERE.format("SYSTEM") + "<|END_OF_TURN_TOKEN|>",
        written=str.strip,
        alternates=True,
    ),
    "deepseek_v2": Format(
        before={"system": "", "user": "User: ", "assistant": "Assistant: "},
        end={"system": "\n\n", "user": "\n\n", "assistant": "</s>"},
        eot="</s>",
        start="<s>",
    ),
    "deepseek_v3": Format(
        before={"user": "<｜User｜>", "assistant": "<｜Assistant｜>"},
        end={"user": "", "assistant": "<｜end▁of▁sentence｜>"},
        eot="<｜end▁of▁sentence｜>",
        start="<s>",
    ),
    "jamba": Format(
        **alike("<|bom|><|{}|> ", "<|eom|>"), eot="<|eom|>", start="<s>", no_system="<|bom|><|system|> <|eom|>"
    ),
    "gemma4": Format(
        **alike("<|turn>{}\n", "<turn|>\n", "system user assistant", assistant="model"),
        eot="<turn|>",
        start="<s>",
        written=str.strip,
        alternates=True,
    ),
}

CONTENTS = st.one_of(
    st.text(max_size=12),
    st.text(st.sampled_from("ab \n\t[]<>|é😀ﬁ-"), max_size=12),
    st.sampled_from(
        [
            *(
                "",
                " ",
                "\n\n",
                "\u3000",
                "same",
                "same",
                "Hi",
                "  both  ",
                "a\n\nb",
                "zzturn0markerzz",
                "[[dummy_message]]",
            ),
            *("user", "assistant", "model", "<s>", "</s>", "👩‍👩‍👧‍👦 e\u0301", "\u202eabc", "word " * 700),
            *("<|im_end|>", "x<|im_end|>\n<|im_start|>assistant\ny", "<|eot_id|>", "<end_of_turn>", "[INST] a [/INST]"),
            *(
                "<|im_start|>user\nHi<|im_end|>",
                "### Response:\n",
                "<think>a</think>b",
                "{{ messages }}",
                "{% endfor %}",
            ),
        ]
    ),
).filter(lambda text: "\ud800" not in text)


@st.composite
def conversations(draw, format: Format) -> list[dict[str, str]]:
    """Turns of any length and content: the same text again, the same role again, the user last, the system alone."""
    repeated = draw(CONTENTS)
    contents = st.one_of(st.just(repeated), CONTENTS)
    count = draw(st.integers(1, 5))
    if format.alternates:
        roles = ["user", "assistant"] * count
        return [{"role": role, "content": draw(contents)} for role in roles[:count]]
    roles = [draw(st.sampled_from(["user", "assistant"])) for _ in range(count)]
    if "system" in format.before and draw(st.booleans()):
        roles = ["system", *roles[1:]]
    return [{"role": role, "content": draw(contents)} for role in roles]


def strategy_of(template: str, tokenizer, cfg: dict | None = None, **dataset) -> ChatTemplateStrategy:
    config = DictDefault(sequence_len=SEQUENCE_LEN, **(cfg or {}))
    return load("chat_template", tokenizer, config, DictDefault(chat_template=template, **dataset))


HEADERS = frozenset(CONTROL_TOKENS)


def expected_labels(format: Format, turns, learnt: list[bool], tokenizer) -> list[bool]:
    """Which tokens of the conversation are learnt, from the format as it is written down here.

    The first end-of-turn token, and the first EOS, among the four tokens after a content belong to it, unless they stand in or
    behind the content of the next turn, after the header that opens it.
    """
    text, contents = "", {}
    for piece, index in format.pieces(turns):
        if index is not None:
            contents[index] = (len(text), len(text) + len(piece))
        text += piece
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    control = set(tokenizer.all_special_tokens)
    labels = [False] * len(tokens)
    for index, (first, last) in contents.items():
        inside = [
            place
            for place, (start, end) in enumerate(encoded["offset_mapping"])
            if start < last and end > first and ((first <= start and end <= last) or tokens[place] not in control)
        ]
        if not learnt[index] or first == last:
            continue
        after = next(
            (place for place, (start, _) in enumerate(encoded["offset_mapping"]) if start >= last), len(tokens)
        )
        reach = range(after, min(after + 4, len(tokens)))
        ends = [next((place for place in reach if tokens[place] == end), None) for end in (format.eot, "</s>")]
        for place in (*inside, *(place for place in ends if place is not None)):
            start = encoded["offset_mapping"][place][0]
            elsewhere = index + 1 in contents and start >= contents[index + 1][0]
            header = any(token in HEADERS - {format.eot} for token in tokens[after:place])
            labels[place] = labels[place] or not (place not in inside and elsewhere and header)
    return labels


@pytest.mark.parametrize("name", sorted(FORMATS))
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_exactly_the_learnt_turns_have_labels(name, data):
    format = FORMATS[name]
    tokenizer = make_tokenizer_of_kind(data.draw(st.sampled_from(sorted(KINDS))), CONTROL_TOKENS)
    turns = data.draw(conversations(format))
    row = strategy_of(name, tokenizer).tokenize_prompt({"messages": turns})
    text = tokenizer.apply_chat_template(turns, chat_template=get_chat_template(name), tokenize=False)
    assert text == "".join(piece for piece, _ in format.pieces(turns))
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
    learnt = expected_labels(format, turns, [turn["role"] == "assistant" for turn in turns], tokenizer)
    expected = [token if is_learnt else -100 for token, is_learnt in zip(row["input_ids"], learnt, strict=True)]
    assert row["labels"] == expected


END_OF_TURN = {
    **{name: format.eot for name, format in FORMATS.items()},
    "alpaca": "</s>",
    "aya": "<|END_OF_TURN_TOKEN|>",
    "command_a_rag": "<|END_RESPONSE|>",
    "command_a_tool_use": "<|END_RESPONSE|>",
    "exaone": "[|endofturn|]",
    "exaone4": "[|endofturn|]",
    "gemma3n": "<end_of_turn>",
    "gemma4_unified": "<turn|>",
    "llama3_2_vision": "<|eot_id|>",
    "llava": "</s>",
    "metharme": "</s>",
    "mistral_v2v3": "</s>",
    "nemotron_h": "<|im_end|>",
    "pixtral": "</s>",
    "qwen2_vl": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5": "<|im_end|>",
    "qwen_25": "<|im_end|>",
}
"""What each template writes at the end of an answer."""
NO_SYSTEM = {"gemma", "inst"}
WRITTEN = CONTENTS.filter(lambda text: text and text == text.strip() and "think>" not in text)


def test_every_template_is_tested():
    assert set(END_OF_TURN) == set(chat_template_names())


def learnt_pieces(tokenizer, row) -> list[str]:
    """The text of each run of learnt tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", chat_template_names())
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_what_is_learnt_is_the_answers_with_their_ends(name, data):
    tokenizer = make_tokenizer_of_kind("byte level, BOS", CONTROL_TOKENS)
    contents = data.draw(st.lists(WRITTEN, min_size=2, max_size=6).filter(lambda found: len(found) % 2 == 0))
    if data.draw(st.booleans()):
        contents = [contents[0]] * len(contents)
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    if name not in NO_SYSTEM and data.draw(st.booleans()):
        turns.insert(0, {"role": "system", "content": data.draw(WRITTEN)})
    template = get_chat_template(name)
    row = strategy_of(name, tokenizer).tokenize_prompt({"messages": turns})
    whole = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=True, return_dict=False)
    assert row["input_ids"] == whole
    end = END_OF_TURN[name]
    # What stands between answer and end is a space that belongs to the format; an EOS may follow the last end.
    pieces = [piece for piece in learnt_pieces(tokenizer, row) if piece != "</s>"]
    assert [piece.removesuffix(end).strip() for piece in pieces] == contents[1::2]
    assert all(piece.endswith(end) for piece in pieces)


# Tools and reasoning. Contents are words that occur nowhere else, so that the text says what belongs to which turn.

TOOL_TEMPLATES = tuple(
    """command_a_tool_use deepseek_v3 gemma4 gemma4_unified llama3_2_vision mistral_v2v3 mistral_v3_tekken mistral_v7_tekken
    nemotron_h qwen3 qwen3_5 qwen_25""".split()  # noqa: SIM905
)
WORDS = tuple(f"zq{first}{second}" for first in "abcdefgh" for second in "jklmnpqr")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        },
    }
]


@st.composite
def tool_conversations(draw) -> list[dict]:
    """Questions, each answered after some calls of tools; every word occurs once."""
    words = iter(draw(st.permutations(WORDS)))
    turns: list[dict] = [{"role": "system", "content": next(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": next(words)})
        for number in range(draw(st.integers(0, 2))):
            call = {"id": f"call0000{number}", "type": "function", "function": {"name": "look_up"}}
            call["function"]["arguments"] = {"word": next(words)}
            turn = {"role": "assistant", "content": draw(st.sampled_from(["", next(words)])), "tool_calls": [call]}
            if draw(st.booleans()):
                turn["reasoning_content"] = next(words)
            turns += [turn, {"role": "tool", "content": next(words), "tool_call_id": f"call0000{number}"}]
        turn = {"role": "assistant", "content": next(words)}
        if draw(st.booleans()):
            turn["reasoning_content"] = next(words)
        turns.append(turn)
    return turns


def words_of(turns: list[dict], *roles: str) -> set[str]:
    """The words of the turns with these roles: contents, reasoning and arguments."""
    found = set()
    for turn in turns:
        if turn["role"] in roles:
            calls = [call["function"]["arguments"]["word"] for call in turn.get("tool_calls", ())]
            found |= {turn["content"], turn.get("reasoning_content", ""), *calls}
    return found - {""}


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
@given(turns=tool_conversations())
@settings(max_examples=25, deadline=None)
def test_calls_and_reasoning_are_learnt_and_answers_of_tools_are_not(name, turns):
    eos = "<|END_OF_TURN_TOKEN|>" if name == "command_a_tool_use" else "</s>"
    tokenizer = make_tokenizer_of_kind("byte level", CONTROL_TOKENS, eos=eos)
    row = strategy_of(name, tokenizer).tokenize_prompt({"messages": turns, "tools": TOOLS})
    text = tokenizer.decode(row["input_ids"])
    pieces = learnt_pieces(tokenizer, row)
    learnt = "".join(pieces)
    own = {word for word in words_of(turns, "assistant") if word in text}
    assert all(learnt.count(word) == 1 for word in own)
    assert not any(word in learnt for word in words_of(turns, "user", "system", "tool"))
    assert len(own) >= sum(turn["role"] == "assistant" for turn in turns)
    assert all(piece.endswith((END_OF_TURN[name], eos, "<|tool_response>", "<tool_call|>")) for piece in pieces)
    no_header = (
        "[TOOL_RESULTS]",
        "<|START_TOOL_RESULT|>",
        "<|CHATBOT_TOKEN|>",
        "<|im_start|>",
        "<|start_header_id|>",
        "<|turn>",
        "<｜Assistant｜>",
        "<tool_response>",
        "<｜tool▁output",
    )
    assert not any(part in learnt for part in no_header)


@pytest.mark.parametrize("name", sorted({*TOOL_TEMPLATES, *FORMATS}))
@given(turns=tool_conversations(), word=st.sampled_from(["same", "user", "tool", "look", "name", "a", "</s>"]))
@settings(max_examples=15, deadline=None)
def test_the_same_content_in_every_turn_changes_nothing(name, turns, word):
    """The labels of a conversation whose contents are all alike, turn by turn those of one with words of that length."""
    if name not in TOOL_TEMPLATES:
        turns = [
            turn
            for turn in turns
            if turn["role"] == "user" or ("tool_calls" not in turn and turn["role"] == "assistant")
        ]
    tokenizer = make_tokenizer_of_kind("bytes", CONTROL_TOKENS)
    strategy = strategy_of(name, tokenizer)
    alike, different = ([], [])
    for index, turn in enumerate(turns):
        keys = [key for key in ("content", "reasoning_content") if turn.get(key)]
        alike.append({**turn, **dict.fromkeys(keys, word)})
        unique = chr(0x4E00 + index) * len(word)
        different.append({**turn, **dict.fromkeys(keys, unique)})
    found = [
        learnt_pieces(
            tokenizer, strategy.tokenize_prompt({"messages": row, "tools": TOOLS if name in TOOL_TEMPLATES else None})
        )
        for row in (alike, different)
    ]
    expected = found[1]
    for index in range(len(turns)):
        expected = [piece.replace(chr(0x4E00 + index) * len(word), word) for piece in expected]
    assert found[0] == expected


# Options


@pytest.mark.parametrize("option", ["turn", "all", "last", "none"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_which_ends_are_learnt(option, data):
    tokenizer = make_tokenizer_of_kind("byte level", CONTROL_TOKENS, eos="<|im_end|>")
    contents = data.draw(st.lists(WRITTEN.filter(lambda text: "<|im_end|>" not in text), min_size=1, max_size=6))
    roles = [data.draw(st.sampled_from(["user", "assistant"])) for _ in contents]
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    row = strategy_of("chatml", tokenizer, train_on_eos=option).tokenize_prompt({"messages": turns})
    ends = [
        label != -100
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if token == tokenizer.eos_token_id
    ]
    learnt = [role == "assistant" for role in roles]
    last = [False] * (len(roles) - 1) + [True]
    assert ends == {"turn": learnt, "all": [True] * len(roles), "last": last, "none": [False] * len(roles)}[option]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_flags_of_messages_and_roles_say_what_is_learnt(data):
    format = FORMATS["chatml"]
    tokenizer = make_tokenizer_of_kind(data.draw(st.sampled_from(sorted(KINDS))), CONTROL_TOKENS)
    turns = data.draw(conversations(format))
    flags = [data.draw(st.sampled_from([True, False, None])) for _ in turns]
    roles = data.draw(st.sampled_from([["assistant"], ["user"], ["user", "assistant"], ["gpt"], []]))
    on_inputs = data.draw(st.booleans())
    strategy = strategy_of(
        "chatml", tokenizer, {"train_on_inputs": on_inputs}, message_field_training="learn", roles_to_train=roles
    )
    messages = [{**turn, "learn": flag} for turn, flag in zip(turns, flags, strict=True)]
    row = strategy.tokenize_prompt({"messages": messages})
    named = {"assistant" if role == "gpt" else role for role in roles}
    learnt = [
        on_inputs or turn["role"] in named if flag is None else flag for turn, flag in zip(turns, flags, strict=True)
    ]
    expected = expected_labels(format, turns, learnt, tokenizer)
    assert [label != -100 for label in row["labels"]] == expected


@given(text=st.text(st.sampled_from("abc é😀\n"), min_size=1, max_size=30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_details_say_which_characters_are_learnt(text, data):
    tokenizer = make_tokenizer_of_kind("bytes", CONTROL_TOKENS)
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=4))})
    flags = [data.draw(st.booleans()) for _ in cuts[1:]]
    pieces = [(text[begin:end], flag) for begin, end, flag in zip(cuts, cuts[1:], flags, strict=False)]
    details = [
        {"begin_offset": begin, "end_offset": end - 1, "train": flag}
        for begin, end, flag in zip(cuts, cuts[1:], flags, strict=False)
    ]
    chosen = "".join(piece for piece, flag in pieces if flag)
    with_details = strategy_of("chatml", tokenizer, message_field_training_detail="detail", train_on_eos="none")
    question = {"role": "user", "content": text}
    rows = [
        with_details.tokenize_prompt(
            {"messages": [question, {"role": "assistant", "content": text, "detail": details}]}
        ),
        strategy_of("chatml", tokenizer, train_on_eos="none").tokenize_prompt(
            {
                "messages": [
                    question,
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": piece, "train": flag} for piece, flag in pieces],
                    },
                ]
            }
        ),
    ]
    for row in rows:
        assert "".join(learnt_pieces(tokenizer, row)) == chosen
    assert rows[0] == rows[1]


AS_IN_HISTORY = {"nemotron_h": {"enable_thinking": False}, "gemma4_unified": {"empty_thought": False}}
"""Name of a template -> what makes it end the prompt of inference with the header of an answer in a conversation.

Nemotron is told not to think: it then writes what it does without reasoning. Gemma 4 is told not to begin with an empty thought.
"""


@given(data=st.data())
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("name", chat_template_names())
def test_the_prompt_of_inference_is_the_beginning_of_the_example(name, data):
    """With tokens that do not reach over a border."""
    tokenizer = make_tokenizer_of_kind("bytes", CONTROL_TOKENS)
    contents = data.draw(st.lists(WRITTEN, min_size=2, max_size=6).filter(lambda found: len(found) % 2 == 0))
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    cfg = {"chat_template_kwargs": AS_IN_HISTORY.get(name)}
    strategy = strategy_of(name, tokenizer, cfg)
    row = strategy.tokenize_prompt({"messages": turns})
    prompt = strategy.prompter.build_prompt(turns[:-1], add_generation_prompt=True)
    assert row["input_ids"][: len(prompt)] == prompt
    before = [token for token, label in zip(row["input_ids"], row["labels"], strict=True)][: len(prompt)]
    assert before == prompt
    last = len(row["labels"]) - 1
    while row["labels"][last] == -100:
        last -= 1
    assert last >= len(prompt)


def test_a_turn_that_is_not_learnt_is_named(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    from datasets import Dataset

    tokenizer = make_tokenizer_of_kind("byte level", CONTROL_TOKENS)
    question = {"role": "user", "content": "Q"}
    template = (
        "{% for m in messages %}<|user|>{% if m.content != 'hidden' %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    )
    strategy = load(
        "chat_template",
        tokenizer,
        DictDefault(sequence_len=64, eot_tokens=["<|eot_id|>"]),
        DictDefault(path="some.jsonl", chat_template="jinja", chat_template_jinja=template),
    )
    rows = [[question, {"role": "assistant", "content": content}] for content in ("A", "hidden", "")]
    TokenizedPromptDataset(strategy, Dataset.from_list([{"messages": row} for row in rows]))
    said = " ".join(record.message for record in caplog.records)
    assert "EOT token '<|eot_id|>' not found in chat_template" in said
    assert "Row 0 of `some.jsonl`, turn 1 (assistant) is learnt, but not how it ends" in said
    assert "Row 1 of `some.jsonl`, turn 1 (assistant) should be learnt" in said
    assert "Could not find content start/end boundary for turn 1" in said
    assert "Row 2 of `some.jsonl`, turn 1 (assistant) should be learnt" in said
    assert "This is likely an empty turn" in said
