from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl.monkeypatch.attention.shifted import group_borders, shifted_attention_forward
from axolotl.monkeypatch.attention.varlen import varlen_attention_forward


def dense(query, key, value, lengths):
    """The same attention with a mask written out from the definition, in float64."""
    heads, total = query.shape[1], query.shape[0] * query.shape[2]
    flat = [x.transpose(1, 2).reshape(total, x.shape[1], -1).double() for x in (query, key, value)]
    q, k, v = flat[0], *(x.repeat_interleave(heads // x.shape[1], dim=1) for x in flat[1:])
    allowed = torch.zeros(heads, total, total, dtype=torch.bool)
    start = 0
    for length in lengths:
        size = -(-length // 4)
        for head in range(heads):
            shift = size // 2 if head >= heads // 2 else 0
            group = [0 if shift and t < shift else 1 + (t - shift) // size for t in range(length)]
            for i in range(length):
                for j in range(i + 1):
                    allowed[head, start + i, start + j] = group[i] == group[j]
        start += length
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).reshape(query.shape[0], -1, heads, v.shape[-1])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("rows", "lengths"), [(1, [16]), (2, [13, 13]), (1, [3, 1, 17, 8, 2])])
def test_it_is_the_attention_of_its_definition(rows, lengths, kv_heads):
    torch.manual_seed(0)
    total = sum(lengths) // rows
    query, key, value = (torch.randn(rows, heads, total, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    borders = None
    if rows == 1:
        borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    module = nn.Module().train()
    got, _ = shifted_attention_forward(
        module, query, key, value, None, cu_seq_lens_q=borders, max_length_q=None if borders is None else max(lengths)
    )
    expected = dense(query, key, value, lengths)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    got_grads = torch.autograd.grad(got.square().sum(), (query, key, value))
    for one, other in zip(got_grads, torch.autograd.grad(expected.square().sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


def test_evaluation_attends_in_full():
    query, key, value = (torch.randn(1, 4, 12, 8) for _ in range(3))
    module = nn.Module().eval()
    got, _ = shifted_attention_forward(module, query, key, value, None)
    assert torch.equal(got, varlen_attention_forward(module, query, key, value, None)[0])


def test_groups_never_reach_over_a_document():
    borders = torch.tensor([0, 1, 4, 20, 20 + 1000], dtype=torch.int32)
    for groups in group_borders(borders):
        assert set(borders.tolist()) <= set(groups.tolist())
        assert (groups.diff() > 0).all() and int(groups.diff().max()) == 250
