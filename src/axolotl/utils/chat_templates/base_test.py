"""Choosing a chat template."""

from __future__ import annotations

import pytest

from axolotl.exceptions import AxolotlError
from axolotl.utils.chat_templates import (
    chat_template_names,
    extract_chat_template_args,
    get_chat_template,
    get_chat_template_from_config,
    register_chat_template,
)
from axolotl.utils.chat_templates.base import _CHAT_TEMPLATES
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import ChatTemplate

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
RENDERED = {
    "alpaca": "<s>### Instruction:\nHi\n\n### Response:\nYo</s>",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n",
    "cohere": "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Yo<|END_OF_TURN_TOKEN|>",
    "gemma": "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n",
    "gemma3": "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>",
    "mistral_v1": "<s> [INST] Hi [/INST] Yo</s>",
    "mistral_v2v3": "<s>[INST] Hi[/INST] Yo</s>",
    "phi_3": "<s><|user|>\nHi<|end|>\n<|assistant|>\nYo<|end|>\n",
    "phi_35": "<|user|>\nHi<|end|>\n<|assistant|>\nYo<|end|>\n</s>",
    "phi_4": "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>Yo<|im_end|>",
    "qwen_25": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n",
    "qwen3": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nYo<|im_end|>\n",
}


# Nemotron thinks unless it is told not to, and writes an answer without reasoning in another way. The larger models of
# Gemma 4 answer after an empty thought, which is not written into the answers of a conversation.
AS_IN_HISTORY = {"nemotron_h": {"enable_thinking": False}, "gemma4_unified": {"empty_thought": False}}


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_what_a_template_writes(name, tiny_tokenizer):
    template = get_chat_template(name)
    assert tiny_tokenizer.apply_chat_template(TURNS, chat_template=template, tokenize=False) == RENDERED[name]


@pytest.mark.parametrize("name", chat_template_names())
def test_the_prompt_of_inference_begins_the_conversation(name, tiny_tokenizer):
    template = get_chat_template(name)
    whole = tiny_tokenizer.apply_chat_template(TURNS, chat_template=template, tokenize=False)
    prompt = tiny_tokenizer.apply_chat_template(
        TURNS[:1], chat_template=template, tokenize=False, add_generation_prompt=True, **AS_IN_HISTORY.get(name, {})
    )
    assert whole.startswith(prompt) and "Yo" in whole[len(prompt) :]


@pytest.mark.parametrize("name", ["mistral_v2v3", "mistral_v3_tekken", "pixtral"])
def test_the_system_text_stays_when_the_last_turn_is_an_answer(name, tiny_tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    text = tiny_tokenizer.apply_chat_template(turns, chat_template=get_chat_template(name), tokenize=False)
    assert "Be brief.\n\nHi" in text


def test_tokenizer_default_and_fallback(tiny_tokenizer):
    with pytest.raises(ValueError, match="tokenizer's chat_template is null"):
        get_chat_template("tokenizer_default", tokenizer=tiny_tokenizer)
    assert get_chat_template("tokenizer_default_fallback_chatml", tokenizer=tiny_tokenizer) == get_chat_template(
        "chatml"
    )
    tiny_tokenizer.chat_template = "own"
    assert get_chat_template("tokenizer_default", tokenizer=tiny_tokenizer) == "own"
    assert get_chat_template("tokenizer_default_fallback_chatml", tokenizer=tiny_tokenizer) == "own"


def test_jinja_as_text_or_file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }}")
    assert get_chat_template("jinja", jinja_template=str(path)) == "{{ messages }}"
    assert get_chat_template("jinja", jinja_template="{{ bos_token }}") == "{{ bos_token }}"
    with pytest.raises(AxolotlError, match="none at that path"):
        get_chat_template("jinja", jinja_template=str(tmp_path / "other.jinja"))
    with pytest.raises(ValueError, match="chat_template_jinja"):
        get_chat_template("jinja")


def test_an_unknown_name_names_near_ones():
    with pytest.raises(ValueError, match=r"Template 'chatlm' not found.*`chatml`"):
        get_chat_template("chatlm")


def test_every_documented_name_has_a_template():
    assert set(ChatTemplate) == {*chat_template_names(), "jinja", "tokenizer_default"}


def test_register():
    register_chat_template("of_a_plugin", "{{ 1 }}")
    try:
        assert get_chat_template("of_a_plugin") == "{{ 1 }}"
        with pytest.raises(ValueError, match="already exists"):
            register_chat_template("of_a_plugin", "{{ 2 }}")
    finally:
        del _CHAT_TEMPLATES["of_a_plugin"]


def test_the_template_of_the_dataset_goes_first():
    cfg = DictDefault(chat_template="jinja", chat_template_jinja="{{ 1 }}")
    assert extract_chat_template_args(cfg, DictDefault(chat_template="chatml")) == ("chatml", None)
    assert extract_chat_template_args(cfg, DictDefault()) == ("jinja", "{{ 1 }}")
    assert extract_chat_template_args(DictDefault()) == ("tokenizer_default", None)
    assert get_chat_template_from_config(cfg) == "{{ 1 }}"
