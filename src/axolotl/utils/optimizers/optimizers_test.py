"""Param groups, names, and ADOPT."""

from __future__ import annotations

import copy

import pytest
import torch

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault
from axolotl.utils.optimizers.adopt import ADOPT
from axolotl.utils.optimizers.groups import build_param_groups
from axolotl.utils.optimizers.table import read_optim_args, read_optimizer_args


def parameters():
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.q_proj.weight",
        "model.layers.0.o_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    return [(name, torch.nn.Parameter(torch.ones(2, 2))) for name in names]


def test_each_parameter_is_in_one_group_with_its_rate():
    named = parameters()
    groups = build_param_groups(
        named,
        decay_names={name for name, _ in named if "norm" not in name},
        learning_rate=1e-3,
        weight_decay=0.1,
        embedding_lr_scale=0.5,
        lr_groups=[{"name": "out", "modules": ["o_proj"], "lr": 5e-3}],
    )
    by_name = {name: next(g for g in groups if any(p is q for q in g["params"])) for name, p in named}
    assert sum(len(group["params"]) for group in groups) == len(named)
    assert by_name["model.embed_tokens.weight"]["lr"] == by_name["lm_head.weight"]["lr"] == 5e-4
    assert by_name["lm_head.weight"]["weight_decay"] == 0.0
    assert (by_name["model.layers.0.o_proj.weight"]["lr"], by_name["model.layers.0.o_proj.weight"]["weight_decay"]) == (
        5e-3,
        0.1,
    )
    assert by_name["model.layers.0.q_proj.weight"]["lr"] == 1e-3
    assert by_name["model.norm.weight"]["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out():
    named = parameters()
    named[1][1].requires_grad_(False)
    groups = build_param_groups(named, decay_names=set(), learning_rate=1.0, weight_decay=0.0)
    assert sum(len(group["params"]) for group in groups) == len(named) - 1


def test_optim_args_as_text_and_as_a_mapping():
    assert read_optim_args(DictDefault(optim_args="rank=8, scale=0.5,foreach=false,proj=std")) == {
        "rank": 8,
        "scale": 0.5,
        "foreach": False,
        "proj": "std",
    }
    assert read_optim_args(DictDefault(optim_args={"rank": 8})) == {"rank": 8}
    with pytest.raises(ConfigError, match="key=value"):
        read_optim_args(DictDefault(optim_args="rank"))


def test_names():
    assert read_optimizer_args(DictDefault(optimizer="adamw_hf")) == {"optim": "adamw_torch"}
    assert read_optimizer_args(DictDefault())["optim"] == "adamw_torch_fused"
    assert read_optimizer_args(DictDefault(optimizer="adopt_adamw"))["alternate_optimizer"] == "adopt_adamw"
    with pytest.raises(ConfigError, match="adamw_torch"):
        read_optimizer_args(DictDefault(optimizer="adamw_torchh"))


def test_adopt_finds_a_minimum_and_resumes():
    def make():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(8))
        return weight, ADOPT([weight], lr=0.05, weight_decay=0.01, decouple=True)

    def go(weight, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            ((weight - 1.5) ** 2).sum().backward()
            optimizer.step()

    weight, optimizer = make()
    go(weight, optimizer, 1)
    torch.manual_seed(0)
    assert torch.equal(weight.detach(), torch.randn(8))  # the first step only takes the scale of the gradient
    go(weight, optimizer, 400)
    assert (weight - 1.5).abs().max() < 0.1

    again, restored = make()
    go(again, restored, 3)
    third, fresh = make()
    with torch.no_grad():
        third.copy_(again)
    fresh.load_state_dict(copy.deepcopy(restored.state_dict()))
    go(again, restored, 3)
    go(third, fresh, 3)
    assert torch.equal(again, third)
