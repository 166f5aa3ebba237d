from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from axolotl.exceptions import ModelError
from axolotl.loaders.adapter_base import check_fits_base, read_trained_config


def write_adapter(folder, base_name):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base_name}))
    return folder


@pytest.mark.parametrize(
    "name", ["./base", "../base", "base", "models/base", "~/base", "/nowhere/base", "a/b/c", "-", None]
)
def test_however_the_base_is_written_what_lies_beside_the_adapter_tells(tmp_path, name):
    adapter = write_adapter(tmp_path / "adapter", name)
    assert read_trained_config(adapter) is None
    LlamaConfig(hidden_size=8, num_attention_heads=2).save_pretrained(adapter)
    config, place = read_trained_config(adapter)
    assert (config["hidden_size"], place) == (8, str(adapter / "config.json"))


def test_the_folder_that_the_adapter_names_tells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = write_adapter(tmp_path / "adapter", "./base")
    LlamaConfig(hidden_size=8, num_attention_heads=2).save_pretrained("base")
    check_fits_base(
        adapter, LlamaConfig(hidden_size=8, num_attention_heads=2), key="lora_model_dir", base_name="./base"
    )
    with pytest.raises(ModelError, match=r"`lora_model_dir: .*`hidden_size` is 8 in base/config.json, but"):
        check_fits_base(
            adapter, LlamaConfig(hidden_size=16, num_attention_heads=2), key="lora_model_dir", base_name="./other"
        )
