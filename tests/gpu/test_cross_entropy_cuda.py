"""The fused output head and loss on CUDA against fp64 on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from axolotl.kernels.cross_entropy import linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (30.0, 0.5)])
@pytest.mark.parametrize("smoothing, z_loss, weighed", [(0.0, 0.0, False), (0.1, 1e-3, False), (0.1, 1e-3, True)])
def test_loss_and_gradients(dtype, tolerance, softcap, scale, smoothing, z_loss, weighed):
    torch.manual_seed(0)
    hidden = torch.randn(513, 192, dtype=torch.float64) * 0.5
    weight = torch.randn(1009, 192, dtype=torch.float64) * 0.1
    labels = torch.randint(0, 1009, (513,))
    labels[::3] = -100

    def reference(h, w):
        logits = h @ w.T * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        losses = losses + z_loss * logits.logsumexp(-1).square() * (labels != -100)
        if weighed:
            losses = losses * torch.exp(-F.cross_entropy(logits, labels, reduction="none")).detach()
        return losses.sum()

    h64, w64 = hidden.to(dtype).double().requires_grad_(), weight.to(dtype).double().requires_grad_()
    reference(h64, w64).backward()
    h, w = hidden.to("cuda", dtype).requires_grad_(), weight.to("cuda", dtype).requires_grad_()
    loss = linear_cross_entropy(
        h,
        w,
        labels.cuda(),
        softcap=softcap,
        logit_scale=scale,
        label_smoothing=smoothing,
        z_loss=z_loss,
        token_scaling=weighed,
        chunk_elements=1009 * 100,
    )
    loss.backward()
    assert loss.item() == pytest.approx(reference(h64, w64).item(), rel=tolerance)
    for got, wanted in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert (got.double().cpu() - wanted).norm() / wanted.norm() < tolerance


def test_weights_by_entropy_are_those_of_the_cpu():
    torch.manual_seed(0)
    hidden, weight = torch.randn(513, 192) * 0.5, torch.randn(1009, 192) * 0.1
    labels = torch.randint(0, 1009, (513,))
    labels[::3] = -100
    results = []
    for device in ("cuda", "cpu"):
        h, w = (x.detach().to(device).requires_grad_() for x in (hidden, weight))
        loss = linear_cross_entropy(
            h, w, labels.to(device), entropy_top_k=20, entropy_alpha=2.0, chunk_elements=1009 * 100
        )
        loss.backward()
        results.append([loss.detach().cpu(), h.grad.cpu(), w.grad.cpu()])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).norm() / wanted.norm() < 1e-3
