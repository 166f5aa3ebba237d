"""Flex attention is compiled as `flex_attn_compile_kwargs` says."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations import flex_attention as theirs

from axolotl.exceptions import ConfigError
from axolotl.monkeypatch.attention.flex import apply_flex_compile_kwargs


@pytest.fixture(autouse=True)
def their_class(monkeypatch):
    monkeypatch.setattr(theirs, "WrappedFlexAttention", theirs.WrappedFlexAttention)


def test_transformers_runs_what_was_compiled_with_the_arguments():
    used = []

    def backend(graph, inputs):
        used.append(len(inputs))
        return graph.forward

    apply_flex_compile_kwargs({"backend": backend, "dynamic": False})
    query, key, value = (torch.randn(1, 2, 16, 8) for _ in range(3))
    with torch.no_grad():
        for training in (True, False, True):
            got = theirs.compile_friendly_flex_attention(query, key, value, training=training)
    torch.testing.assert_close(got, torch.nn.functional.scaled_dot_product_attention(query, key, value))
    assert len(used) == 1


@pytest.mark.parametrize("kwargs", [{"modee": "default"}, {"mode": "fastest"}])
def test_what_torch_compile_does_not_take_is_said(kwargs):
    with pytest.raises(ConfigError, match=r"torch\.compile does not take them"):
        apply_flex_compile_kwargs(kwargs)
