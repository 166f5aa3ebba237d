"""Which strategy a `type:` names."""

from __future__ import annotations

import sys
import textwrap

import pytest

from axolotl.exceptions import ConfigError
from axolotl.prompt_strategies import load
from axolotl.prompt_strategies.resolve import known_types
from axolotl.prompt_tokenizers import AlpacaPromptTokenizingStrategy
from axolotl.utils.dict import DictDefault

CFG = DictDefault(sequence_len=32, train_on_inputs=True)


@pytest.fixture
def user_package(tmp_path, monkeypatch):
    (tmp_path / "mine_pkg").mkdir()
    (tmp_path / "mine_pkg" / "__init__.py").touch()
    (tmp_path / "mine_pkg" / "types.py").write_text(
        textwrap.dedent("""
        def load(tokenizer, cfg): return ("load", cfg.sequence_len)
        def load_two(tokenizer, cfg, ds_cfg): return ("two", ds_cfg["path"])
        """)
    )
    (tmp_path / "mine_pkg_alone.py").write_text("def load_one(tokenizer, cfg): return 'one'")
    (tmp_path / "mine_pkg" / "broken.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "mine_pkg"
    for name in [name for name in sys.modules if name.startswith("mine_pkg")]:
        del sys.modules[name]


def test_a_module_of_the_user(user_package):
    assert load("mine_pkg.types", None, CFG, DictDefault(path="p")) == ("load", 32)
    assert load("mine_pkg.types.load_two", None, CFG, DictDefault(path="p")) == ("two", "p")
    assert load("mine_pkg_alone.load_one", None, CFG) == "one"
    with pytest.raises(ConfigError, match=r"no function `load_three`.*`load_two`"):
        load("mine_pkg.types.load_three", None, CFG)


def test_an_error_inside_a_module_of_the_user_is_not_hidden(user_package):
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        load("mine_pkg.broken", None, CFG)


def test_settings_of_the_config_reach_the_strategy(tiny_tokenizer):
    strategy = load("alpaca:chat", tiny_tokenizer, CFG)
    assert isinstance(strategy, AlpacaPromptTokenizingStrategy)
    assert strategy.train_on_inputs and strategy.max_length == 32 and strategy.prompter.prompt_style == "chat"


@pytest.mark.parametrize(("wrong", "near"), [("alpca", "alpaca"), ("chat_templates", "chat_template"), ("resolve", "")])
def test_an_unknown_type_names_near_ones(wrong, near, tiny_tokenizer):
    with pytest.raises(ConfigError, match=f"names no dataset type.*{near}"):
        load(wrong, tiny_tokenizer, CFG)


@pytest.mark.parametrize("name", known_types())
def test_every_type_that_ships_loads(name, tiny_tokenizer):
    ds_cfg = DictDefault(chat_template="chatml")
    if name == "user_defined":
        ds_cfg = DictDefault(field_output="answer")
    assert load(name, tiny_tokenizer, CFG, ds_cfg).tokenize_prompt


def test_a_mapping_is_user_defined(tiny_tokenizer):
    type_ = {
        "field_output": "answer",
        "format": "[INST] {instruction} {input} [/INST]",
        "no_input_format": "[INST] {instruction} [/INST]",
    }
    strategy = load(type_, tiny_tokenizer, DictDefault(sequence_len=32), None)
    tokenized = strategy.tokenize_prompt({"instruction": "hi", "answer": "yo"})
    assert tiny_tokenizer.decode(tokenized["input_ids"]) == "<s>[INST] hi [/INST]yo</s>"


def test_a_format_with_an_unknown_field_is_refused(tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"type\.format.*question"):
        load({"format": "{question}"}, tiny_tokenizer, CFG)
