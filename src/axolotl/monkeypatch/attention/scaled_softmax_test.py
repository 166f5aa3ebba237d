"""SSMax against its definition: one softmax per query, over scores times `s log n + b`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AttentionInterface

from axolotl.exceptions import ConfigError
from axolotl.monkeypatch.attention import varlen
from axolotl.monkeypatch.attention.documents import add_document_hook, register_masks
from axolotl.monkeypatch.attention.scaled_softmax import apply_scaling_softmax, query_scale
from tests.tiny import make_tiny_model


def scaled_copy(base, name, factor=0.43, bias=0.2):
    model = copy.deepcopy(base)
    model.set_attn_implementation(name)
    apply_scaling_softmax(model, factor, bias)
    apply_scaling_softmax(model, factor, bias)
    add_document_hook(model, varlen=name == varlen.NAME)
    return model


@pytest.fixture(autouse=True)
def functions(monkeypatch):
    """The attention functions of transformers, which come back afterwards."""
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    varlen.register()
    register_masks()


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("name", ["sdpa", varlen.NAME])
def test_it_is_the_softmax_of_its_definition(architecture, name, tmp_path):
    base = make_tiny_model(tmp_path, architecture)
    ids = torch.arange(5, 29)[None]
    seen = {}

    def definition(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        out = torch.empty_like(query)
        for t in range(query.shape[2]):
            first = max(0, t + 1 - sliding_window) if sliding_window else 0
            number = t + 1 - first
            row = scores[:, :, t, first : t + 1] * (0.43 * math.log(number) + 0.2)
            out[:, :, t] = (row.softmax(-1).unsqueeze(2) @ value[:, :, first : t + 1]).squeeze(2)
        seen[module.layer_idx] = True
        return out.transpose(1, 2), None

    AttentionInterface.register("definition", definition)
    expected = copy.deepcopy(base)
    expected.set_attn_implementation("definition")
    with torch.no_grad():
        wanted = expected(ids).logits
        got = scaled_copy(base, name)(ids).logits
        plain = base(ids).logits
    assert len(seen) == 2
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sdpa", varlen.NAME])
def test_packed_documents_count_from_their_own_start(name, tmp_path):
    model = scaled_copy(make_tiny_model(tmp_path), name)
    parts = [torch.arange(5, 16), torch.arange(40, 57)]
    packed = torch.cat(parts)[None]
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    with torch.no_grad():
        together = model(packed, position_ids=positions, use_cache=False).logits[0]
        apart = torch.cat([model(part[None]).logits[0] for part in parts])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_a_cache_changes_nothing(tmp_path):
    model = scaled_copy(make_tiny_model(tmp_path), "sdpa")
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :10], use_cache=True)
        rest = model(ids[:, 10:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 10:], rtol=1e-4, atol=1e-4)


def test_other_models_keep_their_softmax(tmp_path):
    base = make_tiny_model(tmp_path)
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        before = base(ids).logits
        scaled_copy(base, "sdpa")
        assert torch.equal(base(ids).logits, before)


def test_an_attention_that_cannot_be_reached_is_refused(tmp_path):
    model = make_tiny_model(tmp_path)
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="its attention `eager`"):
        apply_scaling_softmax(model, None, None)


def test_the_window_bounds_the_number_of_keys():
    positions = torch.tensor([[0, 1, 9, 0]])
    expected = [[0.0, math.log(2), math.log(4), 0.0]]
    torch.testing.assert_close(query_scale(positions, 1.0, 0.0, 4), torch.tensor(expected))
