"""What `attn_implementation` becomes on this machine, and that the choice is told with its reason."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from axolotl.exceptions import ConfigError
from axolotl.monkeypatch.attention import table, varlen
from axolotl.monkeypatch.attention.table import ATTENTION, resolve_attention
from axolotl.utils.dict import DictDefault

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU machine resolves")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"attn_implementation": "sdpa"}, "sdpa"),
        ({"attn_implementation": "eager", "sample_packing": True}, "eager"),
        ({"attn_implementation": "flash_attention_2"}, varlen.NAME),
        ({"attn_implementation": "flash_attention_3"}, varlen.NAME),
        ({"attn_implementation": "flash_attention_torch"}, varlen.NAME),
        ({"attn_implementation": "xformers"}, varlen.NAME),
        ({"attn_implementation": "flex_attention"}, varlen.NAME),
        ({"sample_packing": True}, varlen.NAME),
        ({"attn_implementation": "sdpa", "sample_packing": True}, varlen.NAME),
        ({"attn_implementation": "sdpa", "sample_packing": True, "sdpa_varlen": False}, "sdpa"),
        ({"attn_implementation": "kernels-community/flash-attn3"}, "kernels-community/flash-attn3"),
    ],
)
def test_choices_for_a_llama(keys: dict, expected: str | None) -> None:
    cfg = DictDefault(keys)
    assert resolve_attention(cfg, LlamaConfig(), LlamaForCausalLM) == expected
    if expected not in (None, keys.get("attn_implementation")):
        assert [(choice.key, choice.value) for choice in cfg.resolution] == [("attn_implementation", expected)]
        assert cfg.resolution[0]["reason"]


def test_generation_takes_sdpa() -> None:
    cfg = DictDefault(attn_implementation="flash_attention_2", sample_packing=True)
    assert resolve_attention(cfg, LlamaConfig(), LlamaForCausalLM, inference=True) == "sdpa"


def test_a_model_with_capped_scores_never_takes_sdpa() -> None:
    """Some releases of transformers let gemma2 have sdpa, which drops its soft cap without a word."""
    for cfg in (DictDefault(attn_implementation="sdpa"), DictDefault()):
        assert resolve_attention(cfg, Gemma2Config(), Gemma2ForCausalLM) == varlen.NAME


def test_a_model_that_hides_keywords_from_its_layers_takes_masks() -> None:
    cfg = DictDefault(attn_implementation="flash_attention_2")
    assert resolve_attention(cfg, BloomConfig(), BloomForCausalLM) in ("sdpa", "eager")
    assert "keywords" in cfg.resolution[0]["reason"] or "sdpa" in cfg.resolution[0]["reason"]


def test_chunked_attention_takes_masks_where_a_row_is_longer_than_a_chunk() -> None:
    config = Llama4TextConfig(attention_chunk_size=128)
    for sequence_len, expected in ((256, "sdpa"), (64, varlen.NAME)):
        cfg = DictDefault(attn_implementation="flash_attention_2", sequence_len=sequence_len)
        assert resolve_attention(cfg, config, Llama4ForCausalLM) == expected


@pytest.mark.parametrize("name", [name for name, backend in ATTENTION.items() if backend.refused] + ["nonsense"])
def test_what_is_refused_names_what_to_write(name: str) -> None:
    with pytest.raises(ConfigError, match="Write"):
        resolve_attention(DictDefault(attn_implementation=name), LlamaConfig(), LlamaForCausalLM)


def test_shifted_attention_is_chosen_for_training_only():
    cfg = DictDefault(s2_attention=True, attn_implementation="flash_attention_2", sequence_len=64)
    config = LlamaConfig(num_attention_heads=4, hidden_size=32)
    assert resolve_attention(cfg, config, LlamaForCausalLM) == "axolotl_shifted"
    assert resolve_attention(cfg, config, LlamaForCausalLM, inference=True) == "sdpa"
    odd = LlamaConfig(num_attention_heads=3, hidden_size=48)
    with pytest.raises(ConfigError, match="odd number of heads"):
        resolve_attention(cfg, odd, LlamaForCausalLM)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(head_dim=96), "flash_attention_4"),
        (LlamaConfig(head_dim=96, attention_dropout=0.1), "flash_attention_2"),  # the others have none
        (LlamaConfig(head_dim=512), varlen.NAME),
        (Gemma4TextConfig(num_hidden_layers=6), varlen.NAME),
    ],
    ids=["96", "dropout", "512", "512 in some layers"],
)
def test_heads_wider_than_256_pass_the_flash_packages_by(config, expected, monkeypatch) -> None:
    monkeypatch.setattr(table.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(table, "_package_present", lambda name: True)
    monkeypatch.setattr(table.flash4, "is_usable", lambda device: True)
    cfg = DictDefault(attn_implementation="flash_attention_2")
    assert resolve_attention(cfg, config, LlamaForCausalLM) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), varlen.NAME),
        (LlamaConfig(attention_dropout=0.1), "flash_attention_2"),  # which the built-in kernel does not have
    ],
    ids=["plain", "dropout"],
)
def test_the_built_in_kernel_stands_for_flash_attn_2(config, expected, monkeypatch) -> None:
    monkeypatch.setattr(table.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(table, "_package_present", lambda name: name == "flash_attn")
    cfg = DictDefault(attn_implementation="flash_attention_2", sample_packing=True)
    assert resolve_attention(cfg, config, LlamaForCausalLM) == expected
