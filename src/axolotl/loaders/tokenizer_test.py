"""Tokenizers are loaded with the config's tokens, in the documented order, and fail in the user's words."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from axolotl.exceptions import ConfigError, ModelError, TokenizerError
from axolotl.loaders.tokenizer import load_tokenizer, modify_tokenizer_files
from axolotl.utils.dict import DictDefault
from tests.tiny import CHATML, make_tiny_base, make_tiny_llama, make_tiny_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_base(tmp_path / "base", chat_template=None)


def config(base: Path, **keys) -> DictDefault:
    return DictDefault(base_model=str(base), output_dir=str(base.parent / "out"), **keys)


def test_ids_follow_the_order_special_tokens_then_tokens_then_additional(base: Path) -> None:
    cfg = config(
        base,
        tokens=["<t1>", "<t2>"],
        special_tokens={"eos_token": "<eos>", "pad_token": "<pd>", "additional_special_tokens": ["<a>"]},
    )
    tokenizer = load_tokenizer(cfg)
    added = ["<eos>", "<pd>", "<t1>", "<t2>", "<a>"]
    assert tokenizer.convert_tokens_to_ids(added) == list(range(384, 389))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pd>")
    assert tokenizer.tokenize("x<t1>y<a>", add_special_tokens=False) == ["x", "<t1>", "y", "<a>"]
    assert tokenizer.decode(tokenizer("<t1><a>")["input_ids"], skip_special_tokens=True) == "<t1>"


def test_additional_special_tokens_join_those_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer(tmp_path / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path / "base")
    cfg = config(tmp_path / "base", special_tokens={"additional_special_tokens": ["<new>", "<|im_start|>"]})
    assert {"<|im_start|>", "<new>"} <= set(load_tokenizer(cfg).all_special_tokens)


def test_pad_falls_back_to_eos_and_says_so(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path / "base", pad=None)
    cfg = config(tmp_path / "base")
    assert load_tokenizer(cfg).pad_token == "</s>"
    assert [choice.key for choice in cfg.resolution] == ["special_tokens.pad_token"]


def test_no_pad_and_no_end_token_is_an_error(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path / "base", pad=None, eos=None)
    with pytest.raises(TokenizerError, match="special_tokens"):
        load_tokenizer(config(tmp_path / "base"))


@pytest.mark.parametrize("keys", [{"special_tokens": {"eos_token": "<new>"}}, {"tokens": ["<new>"]}])
def test_new_tokens_under_an_adapter_must_be_trained(base: Path, keys: dict) -> None:
    with pytest.raises(ConfigError, match=r"set `lora_modules_to_save` to \[embed_tokens, lm_head\]"):
        load_tokenizer(config(base, adapter="lora", **keys))
    assert (
        len(load_tokenizer(config(base, adapter="lora", lora_modules_to_save=["embed_tokens", "lm_head"], **keys)))
        == 385
    )
    assert len(load_tokenizer(config(base, adapter="lora", peft_trainable_token_indices=[384], **keys))) == 385


def test_a_tied_model_needs_its_input_embedding_only(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", tie_word_embeddings=True)
    load_tokenizer(config(base, adapter="lora", tokens=["<new>"], lora_modules_to_save=["embed_tokens"]))


def test_known_tokens_and_pad_tokens_need_no_training(base: Path) -> None:
    cfg = config(base, adapter="lora", special_tokens={"eos_token": "<|im_end|>", "pad_token": "<new pad>"})
    assert load_tokenizer(cfg).eos_token_id == 4


def test_chat_template_is_stored_and_default_system_message_replaces_that_of_chatml(base: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    cfg = config(base, chat_template="chatml", default_system_message="Be brief.")
    tokenizer = load_tokenizer(cfg)
    tokenizer.save_pretrained(base.parent / "saved")
    text = AutoTokenizer.from_pretrained(base.parent / "saved").apply_chat_template(messages, tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in text
    assert "You are a helpful assistant" not in text


def test_the_template_of_the_tokenizer_stays_when_none_is_chosen(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path / "base", chat_template=CHATML)
    assert load_tokenizer(config(tmp_path / "base")).chat_template == CHATML


@pytest.mark.parametrize(
    ("choice", "stored"),
    [
        (None, {"default": CHATML, "tool_use": "T"}),
        ("tokenizer_default", {"default": CHATML, "tool_use": "T"}),
        ("tokenizer_default_fallback_llama3", {"default": CHATML, "tool_use": "T"}),
        ("tokenizer_default:tool_use", {"default": "T", "tool_use": "T"}),
        ("jinja", "J"),
    ],
)
def test_of_several_templates_the_chosen_one_becomes_the_default(tmp_path: Path, choice, stored) -> None:
    make_tiny_tokenizer(tmp_path / "base", chat_template={"default": CHATML, "tool_use": "T"})
    cfg = config(tmp_path / "base", chat_template=choice, chat_template_jinja="J" if choice == "jinja" else None)
    tokenizer = load_tokenizer(cfg)
    assert tokenizer.chat_template == stored
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == stored


def test_mistral_with_flash_attention_pads_left(base: Path) -> None:
    keys = {"is_mistral_derived_model": True, "attn_implementation": "flash_attention_2"}
    assert load_tokenizer(config(base, **keys)).padding_side == "left"
    assert load_tokenizer(config(base, sample_packing=True, **keys)).padding_side == "right"


def test_reserved_tokens_are_renamed_in_every_file(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path / "base")
    cfg = config(tmp_path / "base", added_tokens_overrides={3: "<think>", 1: "<end>"})
    tokenizer = load_tokenizer(cfg)
    assert tokenizer.convert_ids_to_tokens([1, 3]) == ["<end>", "<think>"]
    assert tokenizer.eos_token == "<end>"
    assert len(tokenizer) == 384
    assert tokenizer.tokenize("a<think>b", add_special_tokens=False) == ["a", "<think>", "b"]
    assert tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"] != [3]
    again = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert again.get_vocab() == tokenizer.get_vocab()


def test_renaming_two_tokens_into_each_other(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path / "base")
    folder = modify_tokenizer_files(str(tmp_path / "base"), {3: "<|im_end|>", 4: "<|im_start|>"}, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens([3, 4]) == ["<|im_end|>", "<|im_start|>"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({300: "<x>"}, "Token ID 300 not found in added_tokens_decoder"), ({3: "</s>"}, "is already the token 1")],
)
def test_what_cannot_be_renamed(tmp_path: Path, overrides: dict, message: str) -> None:
    make_tiny_tokenizer(tmp_path / "base")
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(config(tmp_path / "base", added_tokens_overrides=overrides))


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`base_model: .*nowhere` does not exist"):
        load_tokenizer(config(tmp_path / "nowhere"))
    make_tiny_llama(tmp_path / "model")
    with pytest.raises(ModelError, match=r"`tokenizer_config: .*model` "):
        load_tokenizer(config(tmp_path / "base", tokenizer_config=str(tmp_path / "model")))


def test_unknown_tokenizer_class(base: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer_type: NoSuchTokenizer"):
        load_tokenizer(config(base, tokenizer_type="NoSuchTokenizer"))
