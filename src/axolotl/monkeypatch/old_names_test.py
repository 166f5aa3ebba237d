"""Old names resolve, and say what replaced them."""

from __future__ import annotations

import importlib

import pytest
import torch

from axolotl._moved import MOVED
from axolotl.exceptions import NotBuiltError
from axolotl.monkeypatch.ledger import LEDGER, rows_for
from axolotl.utils.dict import DictDefault


@pytest.mark.parametrize("path", sorted(MOVED))
def test_each_old_name_imports_and_explains_itself(path: str) -> None:
    module = importlib.import_module(path)
    with pytest.raises(AttributeError, match="Today that is done by"):
        _ = module.replace_llama_attn
    for name, home in MOVED[path].names.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)


def test_stablelm_helpers() -> None:
    from axolotl.monkeypatch.stablelm_attn_hijack_flash import repeat_kv, rotate_half

    x = torch.arange(16.0).reshape(1, 2, 2, 4)
    assert torch.equal(repeat_kv(x, 3), torch.repeat_interleave(x, dim=1, repeats=3))
    assert rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-3.0, -4.0, 1.0, 2.0]


def test_flash_attention_inputs_are_cast_back() -> None:
    from axolotl.monkeypatch.transformers_fa_utils import fixed_fa_peft_integration_check

    full, half = torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)
    assert {x.dtype for x in fixed_fa_peft_integration_check(full, full, full, torch.float16)} == {torch.float16}
    assert {x.dtype for x in fixed_fa_peft_integration_check(full, full, full, None, torch.bfloat16)} == {
        torch.bfloat16
    }
    assert fixed_fa_peft_integration_check(half, half, half, torch.float16)[0] is half


def test_expanded_mask_keeps_documents_and_padding_apart() -> None:
    from axolotl.monkeypatch.llama_expand_mask import _expand_mask

    visible = _expand_mask(torch.tensor([[1, 1, 2, 0]]), torch.float32)[0, 0] == 0
    assert visible.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, False], [False] * 4]


def test_the_forward_for_shifted_attention_names_the_key() -> None:
    from axolotl.monkeypatch.llama_attn_hijack_flash import flashattn_forward_with_s2attn

    with pytest.raises(NotBuiltError, match="s2_attention: true"):
        flashattn_forward_with_s2attn(torch.nn.Identity(), torch.zeros(1, 1, 1))


def test_every_row_of_the_ledger_says_everything_and_applies_twice() -> None:
    cfg = DictDefault()
    for patch in LEDGER:
        assert all((patch.name, patch.what, patch.why, patch.until))
    for _ in range(2):
        for patch in rows_for(cfg):
            patch.apply(cfg, None)
