"""The fused loss against torch's cross-entropy of full logits: values and all gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from axolotl.kernels.cross_entropy import linear_cross_entropy


def reference(
    hidden,
    weight,
    labels,
    bias=None,
    softcap=None,
    logit_scale=1.0,
    label_smoothing=0.0,
    z_loss=0.0,
    token_scaling=False,
    entropy_top_k=0,
    entropy_alpha=1.0,
):
    logits = F.linear(hidden, weight, bias).float() * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * logits.logsumexp(-1).square() * (labels != -100)
    if token_scaling:
        losses = losses * torch.exp(-F.cross_entropy(logits, labels, reduction="none")).detach()
    if entropy_top_k:
        top = logits.detach().softmax(-1).topk(min(entropy_top_k, logits.shape[-1]), dim=-1).values
        entropy = torch.distributions.Categorical(probs=top).entropy() / math.log(top.shape[-1])
        losses = losses * entropy**entropy_alpha
    return losses.sum()


def make(seed=0, batch=3, time=7, hidden=16, vocab=50, masked=0.4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, time, hidden, generator=generator, dtype=dtype)
    w = torch.randn(vocab, hidden, generator=generator, dtype=dtype)
    b = torch.randn(vocab, generator=generator, dtype=dtype)
    y = torch.randint(0, vocab, (batch, time), generator=generator)
    y[torch.rand(batch, time, generator=generator) < masked] = -100
    return x, w, b, y


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 170, 2**26])
def test_value_and_gradients_equal_the_plain_loss(softcap, logit_scale, with_bias, chunk_elements):
    x, w, b, y = make()
    grads = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        bias = leaves[2] if with_bias else None
        if fused:
            loss = linear_cross_entropy(
                leaves[0],
                leaves[1],
                y,
                bias_V=bias,
                softcap=softcap,
                logit_scale=logit_scale,
                chunk_elements=chunk_elements,
            )
        else:
            loss = reference(leaves[0], leaves[1], y, bias, softcap, logit_scale)
        (loss / 7).backward()
        grads.append((loss.detach(), *(leaf.grad for leaf in leaves[: 3 if with_bias else 2])))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    "kind",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"token_scaling": True},
        {"entropy_top_k": 5, "entropy_alpha": 2.0},
        {"entropy_top_k": 99, "entropy_alpha": 0.5, "token_scaling": True},
        {"entropy_top_k": 5, "entropy_alpha": 0.0},
        {"label_smoothing": 0.3, "z_loss": 1e-2, "token_scaling": True},
    ],
)
def test_smoothed_regularised_and_weighted_losses(kind, softcap):
    x, w, b, y = make()
    grads = []
    for function in (linear_cross_entropy, reference):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        bias = {"bias_V" if function is linear_cross_entropy else "bias": leaves[2]}
        loss = function(leaves[0], leaves[1], y, softcap=softcap, logit_scale=0.5, **bias, **kind)
        loss.backward()
        grads.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient_and_the_hidden_states_the_same_one():
    x, w, _, y = make()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    linear_cross_entropy(ours, w, y).backward()
    reference(theirs, w, y).backward()
    assert w.grad is None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_without_supervised_rows_loss_and_gradients_are_zero():
    x, w, _, y = make()
    x.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(x, w, torch.full_like(y, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()
    assert not w.grad.any()


def test_under_autocast_it_computes_what_the_plain_path_computes():
    x, w, _, y = make(hidden=64)
    results = []
    for function in (linear_cross_entropy, reference):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(*leaves, y)
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_evaluation_makes_no_gradients():
    x, w, _, y = make()
    w.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, y)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(x, w, y).detach())


def test_no_more_logits_than_asked_for_exist_at_once(monkeypatch):
    from axolotl.kernels import cross_entropy

    sizes = []
    take_loss = cross_entropy._loss_and_gradient

    def spy(logits_CV, *args):
        sizes.append(logits_CV.numel())
        return take_loss(logits_CV, *args)

    monkeypatch.setattr(cross_entropy, "_loss_and_gradient", spy)
    x, w, _, y = make(batch=8, time=32)
    linear_cross_entropy(x, w, y, chunk_elements=500)
    assert max(sizes) <= 500
    assert sum(sizes) == int((y != -100).sum()) * w.shape[0]
