"""What every named chat template writes, to be read and compared with what the publishers of the models say.

`tests/chat_template_renders/<name>.txt` holds the text of each conversation, up to the sign ¶. After a change that is meant:
`python -m tests.integration.test_chat_template_renders` writes the files anew; read what git shows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.utils.chat_templates import chat_template_names, get_chat_template
from tests.tiny_tokenizers import make_tokenizer_of_kind

FOLDER = Path(__file__).resolve().parents[1] / "chat_template_renders"
TOKENIZER = make_tokenizer_of_kind("byte level")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "A city."},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["place"],
            },
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi!"}]
WHY = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"place": "Bern"}}}
WEATHER = [
    {"role": "user", "content": "Weather in Bern?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
]
THOUGHTS = [
    turn | ({"reasoning_content": "They greet."} if turn["role"] == "assistant" else {}) for turn in HELLO + WHY
]
PICTURE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]

NO_SYSTEM = {"gemma", "inst"}
WITH_TOOLS = {
    "command_a_tool_use",
    "deepseek_v3",
    "exaone4",
    "gemma4",
    "gemma4_unified",
    "jamba",
    "llama3_2_vision",
    "llama4",
    "mistral_v2v3",
    "mistral_v3_tekken",
    "mistral_v7_tekken",
    "nemotron_h",
    "qwen3",
    "qwen3_5",
    "qwen_25",
}
WITH_THOUGHTS = {"exaone4", "gemma4", "gemma4_unified", "nemotron_h", "qwen3", "qwen3_5"}
WITH_PICTURES = {
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "llama3_2_vision",
    "llama4",
    "llava",
    "mistral_v7_tekken",
    "pixtral",
    "qwen2_vl",
    "qwen3_5",
}

PLAN: dict[str, Any] = WEATHER[1] | {"tool_plan": "I will look."}
OWN_CASES: dict[str, dict[str, dict[str, Any]]] = {
    "command_a_rag": {
        "documents": {
            "conversation": [SYSTEM, *HELLO],
            "documents": [{"url": "a", "snippet": "A"}, {"url": "b", "snippet": "B"}],
            "enable_citations": True,
        },
        "calls": {"conversation": [WEATHER[0], PLAN, *WEATHER[2:]]},
    },
    "command_a_tool_use": {
        "plans and two answers": {
            "conversation": [WEATHER[0], PLAN | {"tool_calls": [CALL, CALL | {"id": "call00002"}]}]
            + [WEATHER[2], WEATHER[2] | {"tool_call_id": "call00002", "content": {"sky": "clear"}}, WEATHER[3]],
            "tools": TOOLS,
        },
        "documents and tools": {
            "conversation": HELLO,
            "documents": [{"url": "a", "snippet": "A"}],
            "tools": TOOLS,
            "enable_citations": True,
        },
    },
    "exaone4": {"thoughts that are written": {"conversation": THOUGHTS, "skip_think": False}},
    "llama4": {
        "tools in the system text": {
            "conversation": [SYSTEM, *WEATHER],
            "tools": TOOLS,
            "tools_in_user_message": False,
        }
    },
}
"""Name of a template -> cases of what only it writes."""


def cases_of(name: str) -> dict[str, dict[str, Any]]:
    """Name of a case -> arguments of `apply_chat_template`."""
    start = [] if name in NO_SYSTEM else [SYSTEM]
    cases: dict[str, dict[str, Any]] = {
        "conversation": {"conversation": [*start, *HELLO, *WHY]},
        "question": {"conversation": [*start, *HELLO, WHY[0]], "add_generation_prompt": True},
    }
    if start:
        cases["no system text"] = {"conversation": HELLO}
    if name in WITH_TOOLS:
        cases["tools"] = {"conversation": [SYSTEM, *WEATHER], "tools": TOOLS}
        cases["question with tools"] = {"conversation": WEATHER[:3], "tools": TOOLS, "add_generation_prompt": True}
    if name in WITH_THOUGHTS:
        cases["thoughts"] = {"conversation": THOUGHTS}
        cases["question, not to be thought about"] = {
            "conversation": HELLO[:1],
            "add_generation_prompt": True,
            "enable_thinking": False,
        }
    if name in WITH_PICTURES:
        cases["picture"] = {"conversation": PICTURE, "add_generation_prompt": True}
    return cases | OWN_CASES.get(name, {})


def render(template: str, **case: Any) -> str:
    return str(TOKENIZER.apply_chat_template(chat_template=template, tokenize=False, **case))


def write(name: str) -> str:
    """The text of the file of a template."""
    template = get_chat_template(name)
    return "".join(f"=== {case} ===\n{render(template, **given)}¶\n" for case, given in cases_of(name).items())


@pytest.mark.parametrize("name", chat_template_names())
def test_what_a_template_writes(name):
    kept = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    expected = dict(re.findall(r"^=== (.+?) ===\n(.*?)¶\n", kept, flags=re.M | re.S))
    assert list(expected) == list(cases_of(name))
    for case, given_case in cases_of(name).items():
        assert render(get_chat_template(name), **given_case) == expected[case], case


def test_there_is_a_file_for_each_template():
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == chat_template_names()


# TRL recognizes models by the templates that they were published with, and holds those as files. Transformers holds one.

PUBLISHED = {
    "aya": "cohere",
    "cohere": "cohere",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "gemma4": "gemma4_v5",
    "llama3": "llama3",
    "llama4": "llama4",
    "nemotron_h": "nemotron_3_nano",
    "phi_35": "phi3_5",
    "qwen2_vl": "qwen2_5_vl",
    "qwen3": "qwen3",
    "qwen3_5": "qwen3_5_think",
    "qwen_25": "qwen2_5",
}
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            *("", "  sp ", "a\n\nb", "<think>x</think>y", "\n<think>\nq\n</think>\n\nz", "{{ x }}"),
            *("<tool_response>k</tool_response>", "<|channel>thought\nq<channel|>a"),
        ]
    ),
)
MORE_TOOLS = [
    *TOOLS,
    {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
    {
        "type": "function",
        "function": {
            "name": "all",
            "description": " d ",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "l": {"type": "array", "items": {"type": "string", "minItems": 3}, "nullable": True},
                    "o": {"type": "object", "properties": {"k": {"type": "number"}}, "required": ["k"]},
                },
            },
        },
    },
]
ARGUMENTS = [{"a": 1, "s": "p", "n": None, "b": True, "l": [1, "x", {"y": 2}]}, {}]


@st.composite
def conversations(draw, with_tools: bool) -> list[dict[str, Any]]:
    turns = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for index in range(draw(st.integers(1, 5))):
        role = ("user", "assistant")[index % 2]
        if with_tools:
            role = draw(st.sampled_from(["user", "assistant", "assistant", "tool"]))
        turn: dict[str, Any] = {"role": role, "content": draw(TEXTS)}
        if with_tools and role == "assistant":
            if draw(st.booleans()):
                turn["reasoning_content"] = draw(TEXTS)
            for number in range(draw(st.integers(0, 2))):
                call = {"name": "weather", "arguments": draw(st.sampled_from(ARGUMENTS))}
                turn.setdefault("tool_calls", []).append({"id": f"c{number}", "type": "function", "function": call})
        if role == "tool" and draw(st.booleans()):
            turn[draw(st.sampled_from(["name", "tool_call_id"]))] = f"c{draw(st.integers(0, 2))}"
        turns.append(turn)
    return turns


def published(name: str) -> str:
    """The text of a template as its publisher gives it; skips the test where nothing that is installed holds it."""
    if name == "llama4":
        return pytest.importorskip("transformers.models.llama4.processing_llama4").chat_template
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of TRL has no {path.name}")
    return path.read_text(encoding="utf-8")


def outcome(template: str, **case: Any) -> str | type:
    """What a template writes, or that it refuses."""
    try:
        return render(template, **case)
    except (jinja2.TemplateError, TypeError) as error:
        return type(error)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_template_writes_what_the_published_one_does(name, data):
    theirs = published(PUBLISHED[name])
    with_tools = name in WITH_TOOLS
    case: dict[str, Any] = {
        "conversation": data.draw(conversations(with_tools)),
        "add_generation_prompt": data.draw(st.booleans()),
    }
    if with_tools and data.draw(st.booleans()):
        case["tools"] = MORE_TOOLS[: data.draw(st.integers(1, 3))]
    if name in WITH_THOUGHTS and data.draw(st.booleans()):
        case["enable_thinking"] = data.draw(st.booleans())
    assert outcome(get_chat_template(name), **case) == outcome(theirs, **case)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_mistral_v3_tekken_is_what_mistral_common_writes(tools):
    package = pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    file = Path(package.__file__).parent / "data" / "tekken_240718.json"
    result = WEATHER[2] | {"content": '{"sky": "clear"}'}
    conversation = [SYSTEM, *HELLO, *([*WEATHER[:2], result, WEATHER[3]] if tools else WHY)]
    request = ChatCompletionRequest(messages=conversation, tools=tools)
    tokenizer = MistralTokenizer.from_file(str(file), mode=ValidationMode.finetuning)
    tokens = tokenizer.encode_chat_completion(request).tokens
    written = tokenizer.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)
    assert render(get_chat_template("mistral_v3_tekken"), conversation=conversation, tools=tools) == written


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for template_name in chat_template_names():
        (FOLDER / f"{template_name}.txt").write_text(write(template_name), encoding="utf-8")
