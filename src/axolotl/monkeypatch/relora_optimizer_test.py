"""How much of each moment survives a restart, and which part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl.monkeypatch.relora_optimizer import prune_optimizer_state


def trained(optimizer_class, size: int = 5000, **keywords):
    """An optimizer after two steps, its pruned parameter and another one."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size // 50, 50)), nn.Parameter(torch.randn(size))]
    optimizer = optimizer_class(parameters, lr=1e-3, **keywords)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer, parameters


@pytest.mark.parametrize(
    ("method", "ratio", "kept"), [("magnitude", 0.9, 500), ("random", 0.5, 2500), ("reset", 1.0, 0)]
)
def test_a_share_of_each_moment_stays(method: str, ratio: float, kept: int) -> None:
    optimizer, (parameter, other) = trained(torch.optim.AdamW)
    before = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    untouched = optimizer.state[other]["exp_avg"].clone()
    prune_optimizer_state(optimizer, [parameter], method, ratio, seed=1)
    for name in ("exp_avg", "exp_avg_sq"):
        after = optimizer.state[parameter][name]
        left = after != 0
        assert int(left.sum()) == kept
        assert torch.equal(after[left], before[name][left])
        if method == "magnitude":
            assert before[name][left].abs().min() >= before[name][~left].abs().max()
    assert optimizer.state[parameter]["step"] == 2
    assert torch.equal(optimizer.state[other]["exp_avg"], untouched)


def test_the_random_choice_follows_from_the_seed() -> None:
    kept = []
    for seed in (1, 1, 2):
        optimizer, (parameter, _) = trained(torch.optim.AdamW)
        prune_optimizer_state(optimizer, [parameter], "random", 0.9, seed=seed)
        kept.append(optimizer.state[parameter]["exp_avg"] != 0)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_moments_in_eight_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer, (parameter, _) = trained(bitsandbytes.optim.AdamW8bit)
    before = optimizer.state[parameter]["state1"].clone()
    assert before.dtype == torch.uint8
    prune_optimizer_state(optimizer, [parameter], "magnitude", 0.9, seed=1)
    state = optimizer.state[parameter]
    assert int((state["qmap1"][state["state1"].long()] != 0).sum()) <= 500
    left = state["qmap1"][state["state1"].long()] != 0
    assert torch.equal(state["state1"][left], before[left])


def test_an_unknown_method_is_named() -> None:
    optimizer, parameters = trained(torch.optim.AdamW)
    with pytest.raises(ValueError, match="magnitude, random, reset"):
        prune_optimizer_state(optimizer, parameters, "half", 0.5, seed=1)
