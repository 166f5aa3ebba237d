"""The merged state dict computes what the adapted model computes, and the adapted model stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from axolotl.exceptions import ModelError
from axolotl.utils.lora import get_lora_merged_state_dict
from tests.tiny import make_tiny_llama

IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
        {"target_modules": ["v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2}},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_merged_weights_compute_what_the_adapter_computes(tmp_path: Path, options: dict) -> None:
    base = make_tiny_llama(tmp_path)
    names = set(base.state_dict())
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = adapted(input_ids=IDS).logits.detach()
    merged = get_lora_merged_state_dict(adapted)
    assert set(merged) == names
    plain = make_tiny_llama(tmp_path, seed=5)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapted(input_ids=IDS).logits, expected, rtol=0, atol=0)


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    adapted = get_peft_model(make_tiny_llama(tmp_path), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="only LoRA"):
        get_lora_merged_state_dict(adapted)
