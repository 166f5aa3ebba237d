"""Sums of gradients over micro-batches: the bits of autograd's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl.core.trainers.gradient_sums import adds_gradients_at_once


def make_model() -> nn.ModuleList:
    """Two small trained layers of different dtypes and one that is used now and then, over a large frozen one."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 1), nn.Linear(64, 1).bfloat16(), nn.Linear(64, 1)])
    layers[0].requires_grad_(requires_grad=False)
    return layers


def loss_of(layers: nn.ModuleList, seed: int) -> torch.Tensor:
    hidden = layers[0](torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)))
    loss = layers[1](hidden).square().mean() + layers[2](hidden.bfloat16()).float().square().mean()
    return loss + layers[3](hidden).mean() if seed % 2 else loss


def gradients(layers: nn.ModuleList) -> list[torch.Tensor | None]:
    return [parameter.grad for parameter in layers.parameters()]


def test_the_sums_are_those_of_autograd():
    ours, theirs = make_model(), make_model()
    for seed in range(5):
        with adds_gradients_at_once(ours):
            loss_of(ours, seed).backward()
            held = [id(grad) for grad in gradients(ours) if grad is not None]
        loss_of(theirs, seed).backward()
        for mine, wanted in zip(gradients(ours), gradients(theirs), strict=True):
            assert (mine is None) == (wanted is None)
            if mine is not None and wanted is not None:
                assert torch.equal(mine, wanted) and mine.dtype == wanted.dtype
        if seed > 1:
            assert not {id(grad) for grad in gradients(ours)} & set(held)  # it was not autograd that added


def test_gradients_survive_a_backward_that_fails():
    layers = make_model()
    loss_of(layers, 1).backward()
    wanted = [None if grad is None else grad.clone() for grad in gradients(layers)]
    with pytest.raises(RuntimeError, match="interrupted"), adds_gradients_at_once(layers):
        raise RuntimeError("interrupted")
    for mine, grad in zip(gradients(layers), wanted, strict=True):
        assert mine is None if grad is None else torch.equal(mine, grad)


@pytest.mark.parametrize("kind", ["tensor", "sum", "all weights"])
def test_who_could_see_the_difference_sees_none(kind):
    layers = make_model()
    seen = []
    if kind == "tensor":
        layers[1].weight.register_hook(lambda grad: seen.append(layers[1].weight.grad))
    elif kind == "sum":
        layers[1].weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
    else:
        layers[0].requires_grad_()
    loss_of(layers, 0).backward()
    before = layers[1].weight.grad
    seen.clear()
    with adds_gradients_at_once(layers):
        assert layers[1].weight.grad is before
        loss_of(layers, 2).backward()
    assert layers[1].weight.grad is before
    assert all(grad is before for grad in seen)
