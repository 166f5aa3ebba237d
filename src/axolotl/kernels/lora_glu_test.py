from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from axolotl.kernels.lora_glu import lora_gated_backward, lora_gated_forward

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("ranks", [(3, 2, 4), (1, 0, 5), (0, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("write_h", [False, True])
def test_gradients_are_those_of_autograd(act, ranks, write_h):
    torch.manual_seed(0)
    rows, size, room = 6, 7, 3
    rank_gate, rank_up, rank_down = ranks
    gul = torch.randn(rows, 2 * size + rank_gate + rank_up + room, dtype=torch.float64)
    used = gul.shape[1] - room
    gul[:, used:] = torch.nan
    b_gate, b_up = (torch.randn(size, rank, dtype=torch.float64) for rank in ranks[:2])
    a = torch.randn(rank_down, size, dtype=torch.float64)
    grad, grad_low = torch.randn(rows, size, dtype=torch.float64), torch.randn(rows, rank_down, dtype=torch.float64)

    leaves = [tensor.clone().requires_grad_() for tensor in (gul, b_gate, b_up, a)]
    gate, up, low_gate, low_up, _ = leaves[0].split([size, size, rank_gate, rank_up, room], dim=1)
    h = ACTIVATIONS[act](gate + low_gate @ leaves[1].t()) * (up + low_up @ leaves[2].t())
    # What follows: `h W^T` gives the first term, `(h a^T) B^T` the second.
    loss = (h * grad).sum() + (h @ leaves[3].t() * grad_low).sum()
    wanted_gul, wanted_gate, wanted_up, wanted_a = torch.autograd.grad(loss, leaves)

    torch.testing.assert_close(lora_gated_forward(gul, b_gate, b_up, act), h.detach())
    got = lora_gated_backward(grad, gul, b_gate, b_up, grad_low, a, act, write_h=write_h)
    torch.testing.assert_close(got.gul[:, :used], wanted_gul[:, :used])
    assert not got.gul[:, used:].any()
    torch.testing.assert_close(got.b_gate, wanted_gate)
    torch.testing.assert_close(got.b_up, wanted_up)
    torch.testing.assert_close(got.a, wanted_a)
    if write_h:
        torch.testing.assert_close(grad, h.detach())
