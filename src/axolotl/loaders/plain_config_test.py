"""A plain config says what the class of the model says, and leads to the same tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from axolotl.loaders.plain_config import PLAIN_MODEL_TYPES, read_config_for_tokenizer, read_plain_config
from axolotl.loaders.tokenizer import load_tokenizer
from axolotl.utils.config.model_facts import resolve_model_facts
from axolotl.utils.data.fingerprint import tokenizer_fingerprint
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_base, make_tiny_tokenizer


def write_config(folder: Path, **fields) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.parametrize("model_type", sorted(PLAIN_MODEL_TYPES))
def test_a_plain_config_says_what_the_class_says(model_type: str, tmp_path: Path) -> None:
    whole = CONFIG_MAPPING[model_type]()
    whole.save_pretrained(tmp_path)
    plain = read_plain_config(str(tmp_path))
    assert plain is not None
    assert plain.model_type == plain.get_text_config().model_type == whole.model_type
    assert whole.get_text_config() is whole
    assert plain._name_or_path == AutoConfig.from_pretrained(tmp_path)._name_or_path
    assert not hasattr(whole, "model_name")


def test_facts_are_those_of_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny_base(tmp_path / "base")
    facts = []
    for is_preprocess in ("0", "1"):
        monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", is_preprocess)
        cfg = DictDefault(base_model=str(base))
        resolve_model_facts(cfg)
        facts.append(cfg.to_dict())
    assert facts[0] == facts[1]
    assert facts[0]["model_config_type"] == "llama"


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llava"},
        {"model_type": "llama", "text_config": {"model_type": "llama"}},
        {"model_type": "llama", "auto_map": {"AutoConfig": "own.Config"}},
        {"model_type": "mistral", "layer_types": []},
        {},
    ],
)
def test_other_models_are_left_to_their_class(fields: dict, tmp_path: Path) -> None:
    assert read_plain_config(write_config(tmp_path, **fields)) is None


@pytest.mark.parametrize("content", [None, "{"])
def test_what_cannot_be_read_is_left_to_the_class(content: str | None, tmp_path: Path) -> None:
    if content:
        (tmp_path / "config.json").write_text(content)
    assert read_plain_config(str(tmp_path)) is None


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "TokenizersBackend"]
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_moe", "phi3", "gpt2", "deepseek_v3"])
def test_the_tokenizer_is_the_same(model_type: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_tokenizer(tmp_path)
    write_config(tmp_path, model_type=model_type)
    place = tmp_path / "tokenizer_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "tokenizer_class": name}))
    monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", "1")
    assert read_config_for_tokenizer(str(tmp_path)) is not None
    light = load_tokenizer(DictDefault(base_model=str(tmp_path), tokenizer_config=str(tmp_path)))
    whole = AutoTokenizer.from_pretrained(tmp_path)
    assert type(light) is type(whole)
    assert tokenizer_fingerprint(light) == tokenizer_fingerprint(whole)


def test_a_tokenizer_that_names_no_class_or_brings_code_needs_the_class(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    write_config(tmp_path, model_type="llama")
    place = tmp_path / "tokenizer_config.json"
    said = json.loads(place.read_text())
    place.write_text(json.dumps({**said, "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}))
    assert read_config_for_tokenizer(str(tmp_path)) is None
    place.write_text(json.dumps({key: value for key, value in said.items() if key != "tokenizer_class"}))
    assert read_config_for_tokenizer(str(tmp_path)) is None


def test_preparing_does_not_import_the_compiler(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    code = (
        "import os, sys; os.environ['AXOLOTL_IS_PREPROCESS'] = '1'\n"
        "from axolotl.common.datasets import load_datasets\n"
        "from axolotl.loaders import load_tokenizer\n"
        "from axolotl.utils.config.model_facts import resolve_model_facts\n"
        "from axolotl.utils.dict import DictDefault\n"
        "cfg = DictDefault(base_model=sys.argv[1]); resolve_model_facts(cfg); load_tokenizer(cfg)\n"
        "print(sorted({'torch._dynamo', 'accelerate', 'peft'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(base)], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
