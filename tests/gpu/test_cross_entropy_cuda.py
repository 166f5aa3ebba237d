"""The fused output head and loss on CUDA against fp64 on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from axolotl.kernels.cross_entropy import linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (30.0, 0.5)])
def test_loss_and_gradients(dtype, tolerance, softcap, scale):
    torch.manual_seed(0)
    hidden = torch.randn(513, 192, dtype=torch.float64) * 0.5
    weight = torch.randn(1009, 192, dtype=torch.float64) * 0.1
    labels = torch.randint(0, 1009, (513,))
    labels[::3] = -100

    def reference(h, w):
        logits = h @ w.T * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, labels, reduction="sum")

    h64, w64 = hidden.to(dtype).double().requires_grad_(), weight.to(dtype).double().requires_grad_()
    reference(h64, w64).backward()
    h, w = hidden.to("cuda", dtype).requires_grad_(), weight.to("cuda", dtype).requires_grad_()
    loss = linear_cross_entropy(h, w, labels.cuda(), softcap=softcap, logit_scale=scale, chunk_elements=1009 * 100)
    loss.backward()
    assert loss.item() == pytest.approx(reference(h64, w64).item(), rel=tolerance)
    for got, wanted in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert (got.double().cpu() - wanted).norm() / wanted.norm() < tolerance
