"""The operators around FlashAttention-4, with its two functions computed in PyTorch. The kernels themselves: tests/gpu."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from axolotl.monkeypatch.attention import flash4, table, varlen
from axolotl.utils.dict import DictDefault


def _scores(q, k, scale, causal, left, right):
    """(B, H, T, T) fp32, with what a query does not see at minus infinity."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * scale
    ahead = torch.arange(q.shape[1])[None, :] - torch.arange(q.shape[1])[:, None]
    right = 0 if causal else right
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if right is not None:
        hidden |= ahead > right
    if left is not None:
        hidden |= ahead < -left
    return scores.masked_fill(hidden, -math.inf)


def _forward(
    q, k, v, *, softmax_scale, causal, window_size_left, window_size_right, return_lse, cu_seqlens_q=None, **_
):
    assert return_lse
    if cu_seqlens_q is not None:
        outs, lses = [], []
        for start, stop in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
            parts = (x[None, start:stop] for x in (q, k, v))
            out, lse = _forward(
                *parts, softmax_scale=softmax_scale, causal=causal, window_size_left=window_size_left,
                window_size_right=window_size_right, return_lse=True,
            )[:2]  # fmt: skip
            outs.append(out[0])
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, dim=1), None, None, None
    scores = _scores(q, k, softmax_scale, causal, window_size_left, window_size_right)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.float())
    return out.to(q.dtype), scores.logsumexp(-1), None, None, None


def _backward(
    q, k, v, out, dout, lse, *, softmax_scale, causal, window_size_left, window_size_right, deterministic, **packed
):
    """Written out, as operators run below autograd: dS = P (dP - rowsum(dO O))."""
    if (borders := packed.get("cu_seqlens_q")) is not None:
        grads = [
            _backward(
                *(x[None, start:stop] for x in (q, k, v, out, dout)), lse[None, :, start:stop], softmax_scale=softmax_scale,
                causal=causal, window_size_left=window_size_left, window_size_right=window_size_right, deterministic=False,
            )
            for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
        ]  # fmt: skip
        return tuple(torch.cat([grad[0] for grad in each]) for each in zip(*grads, strict=True))
    groups = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    weights = (_scores(q, k, softmax_scale, causal, window_size_left, window_size_right) - lse[..., None]).exp()
    grad_weights = torch.einsum("bthd,bshd->bhts", dout, wide_v)
    grad_scores = weights * (grad_weights - (dout * out).sum(-1).transpose(1, 2)[..., None]) * softmax_scale
    grad_q = torch.einsum("bhts,bshd->bthd", grad_scores, wide_k)
    grad_k = torch.einsum("bhts,bthd->bshd", grad_scores, q)
    grad_v = torch.einsum("bhts,bthd->bshd", weights, dout)
    return grad_q, *(x.unflatten(2, (-1, groups)).sum(3) for x in (grad_k, grad_v))


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(
        flash4, "_kernels", lambda: SimpleNamespace(_flash_attn_fwd=_forward, _flash_attn_bwd=_backward)
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None)])
def test_dense_rows_equal_sdpa(causal, window, compiled):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    weights = torch.randn(2, 7, 4, 8)

    def attend(q, k, v):
        return flash4.attend(q, k, v, scaling=0.3, causal=causal, window=window)

    run = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    got = torch.autograd.grad((run(q, k, v) * weights).sum(), (q, k, v))
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if causal else None
    if window:
        mask = mask & ~torch.ones(7, 7, dtype=torch.bool).tril(-window)
    plain = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    wanted = torch.autograd.grad((plain * weights).sum(), (q, k, v))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_documents_do_not_see_each_other(compiled):
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    weights, borders = torch.randn(12, 4, 8), [0, 5, 5, 6, 12]

    def attend(q, k, v, borders):
        return flash4.attend(q, k, v, scaling=0.3, causal=True, window=None, borders=borders, longest=6)

    run = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    out = run(q, k, v, torch.tensor(borders, dtype=torch.int32))
    alone = [
        flash4.attend(*(x[None, a:b] for x in (q, k, v)), scaling=0.3, causal=True, window=None)[0]
        for a, b in itertools.pairwise(borders)
    ]
    got, wanted = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (out, torch.cat(alone)))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_used_where_the_package_and_the_gpu_are_there(monkeypatch):
    """What a Hopper machine with the package resolves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(head_dim=128)
    assert table.resolve_attention(DictDefault(), config, LlamaForCausalLM) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash4, "is_usable", lambda device: True)
    for keys in ({}, {"attn_implementation": "flash_attention_2"}, {"attn_implementation": "flash_attention_4"}):
        cfg = DictDefault(keys)
        assert table.resolve_attention(cfg, config, LlamaForCausalLM) == varlen.NAME
        assert "flash-attn-4" in cfg.resolution[-1]["reason"]
    assert table.resolve_attention(DictDefault(attn_implementation="sdpa"), config, LlamaForCausalLM) == "sdpa"
    assert table.resolve_attention(DictDefault(), config, LlamaForCausalLM, inference=True) is None
    assert table.resolve_attention(DictDefault(), LlamaConfig(head_dim=80), LlamaForCausalLM) is None


@pytest.mark.parametrize("broken", ["import", "other functions"])
def test_a_package_that_cannot_be_loaded_is_not_used(broken, monkeypatch, caplog):
    monkeypatch.undo()  # the kernels of this file
    flash4._kernels.cache_clear()

    def load(name):
        if broken == "import":
            raise ImportError("No module named 'cutlass'")
        return SimpleNamespace()

    monkeypatch.setattr(flash4, "is_installed", lambda: True)
    monkeypatch.setattr(flash4.importlib, "import_module", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not flash4.is_usable(torch.device("cuda"))
    assert "flash-attn-4 is installed and not used" in caplog.text
    flash4._kernels.cache_clear()


def test_half_precision_of_other_shapes_keeps_its_kernel():
    wide = torch.randn(1, 4, 2, 8)
    assert not flash4.serves(wide, wide, wide)
