from __future__ import annotations

import pytest
from transformers import LlamaConfig

from axolotl.monkeypatch.gradient_checkpointing import choose
from axolotl.monkeypatch.gradient_checkpointing.choose import why_not_offloaded_by_default
from axolotl.utils.dict import DictDefault

CFG = {"gradient_checkpointing": True, "micro_batch_size": 2, "sequence_len": 64}


@pytest.mark.parametrize(
    ("keys", "num_processes", "reason"),
    [
        ({}, 1, None),
        ({}, 2, "share the way"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1, "another kind"),
        ({"selective_checkpointing": {"save": ["attention"]}}, 1, "another kind"),
        ({"torch_compile": False}, 1, "not compiled"),
        ({"load_in_8bit": True}, 1, "not compiled"),
        ({"torch_compile": True, "torch_compile_mode": "reduce-overhead"}, 1, "in a way of their own"),
        ({"micro_batch_size": 10**12}, 1, "host memory"),
    ],
)
def test_when_inputs_of_layers_wait_in_host_memory(keys, num_processes, reason):
    config = LlamaConfig(hidden_size=choose.MIN_HIDDEN_SIZE)
    found = why_not_offloaded_by_default(
        DictDefault({**CFG, **keys}), config, has_gpu=True, num_processes=num_processes, free_host_bytes=2**34
    )
    assert found is None if reason is None else reason in found


def test_narrow_layers_and_machines_without_a_gpu_keep_their_inputs():
    narrow, wide = LlamaConfig(hidden_size=choose.MIN_HIDDEN_SIZE // 2), LlamaConfig(hidden_size=choose.MIN_HIDDEN_SIZE)
    machine = {"num_processes": 1, "free_host_bytes": 2**34}
    assert "as long as" in why_not_offloaded_by_default(DictDefault(CFG), narrow, has_gpu=True, **machine)
    assert "no GPU" in why_not_offloaded_by_default(DictDefault(CFG), wide, has_gpu=False, **machine)
