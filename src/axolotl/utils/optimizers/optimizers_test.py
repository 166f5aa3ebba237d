"""Param groups, names, options and states of optimizers."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.exceptions import ConfigError, MissingExtraError
from axolotl.utils.dict import DictDefault
from axolotl.utils.optimizers.adopt import ADOPT
from axolotl.utils.optimizers.groups import build_param_groups
from axolotl.utils.optimizers.state import keep_loaded_dtypes
from axolotl.utils.optimizers.table import OPTIMIZERS, read_optim_args, read_optimizer, read_optimizer_args
from tests.tiny import make_tiny_model


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


def test_a_group_without_weights_is_said(monkeypatch):
    said = []
    monkeypatch.setattr("axolotl.utils.optimizers.groups.LOG.warning", said.append)
    lr_groups = [{"name": "out", "modules": ["o_proj"], "lr": 5e-3}, {"name": "none", "modules": ["nope"], "lr": 1.0}]
    build_param_groups(parameters(), decay_names=set(), learning_rate=1e-3, weight_decay=0.1, lr_groups=lr_groups)
    assert len(said) == 1 and "`none` is empty" in said[0]


def test_frozen_parameters_are_left_out():
    named = parameters()
    named[1][1].requires_grad_(False)
    groups = build_param_groups(named, decay_names=set(), learning_rate=1.0, weight_decay=0.0)
    assert sum(len(group["params"]) for group in groups) == len(named) - 1


def test_optimizer_kwargs_of_the_training_arguments_reach_the_optimizer(tmp_path):
    args = AxolotlTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        optim="adamw_torch",
        optimizer_kwargs={"amsgrad": True},
    )
    trainer = AxolotlTrainer(model=make_tiny_model(tmp_path, "llama", num_hidden_layers=1), args=args)
    assert trainer.create_optimizer().defaults["amsgrad"] is True

    cfg = DictDefault(optimizer="muon", learning_rate=1e-3, optim_args={"momentum": 0.5, "ns_steps": 3})
    args.optimizer_kwargs = {"momentum": 0.7}
    matrix = read_optimizer(cfg, args)[1]["matrix_kwargs"]
    assert (matrix["momentum"], matrix["ns_steps"]) == (0.7, 3)
    args.optimizer_kwargs = {"momentun": 0.7}
    with pytest.raises(ConfigError, match="momentun"):
        read_optimizer(cfg, args)


def test_apollo_scales_by_channel_only_along_the_longer_side():
    pytest.importorskip("apollo_torch")
    cfg = DictDefault(optimizer="apollo_adamw", optim_args={"proj_type": "left"}, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="scale_type: tensor"):
        read_optimizer(cfg, None)
    cfg.optim_args = {"proj_type": "left", "scale_type": "tensor"}
    assert read_optimizer(cfg, None)[1]["projection"]["proj_type"] == "left"


def test_optim_args_as_text_and_as_a_mapping():
    assert read_optim_args(DictDefault(optim_args="rank=8, scale=0.5,foreach=false,proj=std")) == {
        "rank": 8,
        "scale": 0.5,
        "foreach": False,
        "proj": "std",
    }
    assert read_optim_args(DictDefault(optim_args={"rank": 8, "eps": "1e-6", "betas": [0.9, 0.95]})) == {
        "rank": 8,
        "eps": 1e-6,
        "betas": (0.9, 0.95),
    }
    assert read_optim_args(DictDefault(optim_args="betas=(0.9, 0.95),eps=1e-6,t=None")) == {
        "betas": (0.9, 0.95),
        "eps": 1e-6,
        "t": None,
    }
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


def read(optimizer, **keys):
    return read_optimizer(DictDefault(optimizer=optimizer, learning_rate=1e-3, weight_decay=0.1, **keys), None)


def test_optim_args_in_the_place_of_a_setting_are_said():
    cfg = DictDefault(
        optimizer="sgd", learning_rate=1e-3, weight_decay=0.1, optim_args={"lr": 0.5, "weight_decay": 0.1}
    )
    assert read_optimizer(cfg, None)[1]["lr"] == 0.5
    assert [(entry["key"], entry["value"]) for entry in cfg.resolution] == [("learning_rate", 0.5)]


def test_settings_become_arguments():
    assert read("adamw_torch_fused", adam_beta2=0.95, adam_epsilon=1e-6) == (
        torch.optim.AdamW,
        {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-6, "fused": True},
    )
    assert read("sgd", optim_args={"momentum": 0.9, "weight_decay": 0.0})[1] == {
        "lr": 1e-3,
        "weight_decay": 0.0,
        "momentum": 0.9,
    }
    assert read("adamw_torch", optim_args="beta1=0.8,amsgrad=true")[1]["betas"] == (0.8, 0.999)
    assert read("adafactor", optim_args={"relative_step": True})[1]["relative_step"] is True


def test_muon_and_adamw_have_settings_of_their_own():
    kwargs = read("muon", adam_beta1=0.8, optim_args={"momentum": 0.9})[1]
    assert kwargs["matrix_cls"] is torch.optim.Muon
    assert kwargs["matrix_kwargs"] == {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.9}
    assert kwargs["adamw_kwargs"] == {"betas": (0.8, 0.999), "eps": 1e-8}


def test_the_rate_of_dion_is_said():
    cfg = DictDefault(optimizer="dion", learning_rate=1e-3)
    assert read_optimizer(cfg, None)[1]["matrix_lr"] == 0.01
    assert [entry["key"] for entry in cfg.resolution] == ["dion_lr"]
    assert read("dion", dion_lr=0.1, dion_rank_fraction=0.25)[1]["matrix_kwargs"] == {"rank_fraction": 0.25}


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("adamw_torch", {"amsgradd": True}, "Did you mean `amsgrad`"),
        ("adamw_torch", {"amsgrad": 1}, "must be true or false"),
        ("adamw_torch", {"beta3": 0.9}, "no option"),
        ("adamw_torch", {"betas": [0.9]}, "2 numbers"),
        ("sgd", {"momentum": "much"}, "must be a number"),
        ("muon", {"adjust_lr_fn": "double"}, "one of original, match_rms_adamw"),
        ("galore_adamw", {"rank": "low"}, "must be a number"),
        ("sinkgd", {"iters": 5}, "sinkhorn_iters"),
    ],
)
def test_options_that_cannot_be(name, given, said):
    with pytest.raises(ConfigError, match=said):
        read(name, optim_args=given)


def test_all_wrong_options_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        read("adamw_torch", optim_args="a=1,b=2")
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    "name", {row.path.partition(".")[0]: name for name, row in OPTIMIZERS.items() if row.extra}.values()
)
def test_a_missing_package_names_its_extra(name, monkeypatch):
    row = OPTIMIZERS[name]
    package = row.path.partition(":")[0].partition(".")[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtraError, match=rf"`optimizer: {name}` needs the package `{package}`.*axolotl\[{row.extra}\]"
    ):
        read(name, optim_target_modules="all_linear")


def test_anyprecision_takes_dtypes_and_needs_no_path():
    cls, kwargs = read("adamw_anyprecision", torchdistx_path="/nowhere", optim_args="momentum_dtype=bfloat16")
    assert cls.__name__ == "AnyPrecisionAdamW"
    assert kwargs["momentum_dtype"] is torch.bfloat16
    with pytest.raises(ConfigError, match="a dtype of torch"):
        read("adamw_anyprecision", optim_args="momentum_dtype=float33")


def test_loaded_states_keep_their_dtypes():
    def make():
        weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([weight], momentum=0.9)
        keep_loaded_dtypes(optimizer)
        return weight, optimizer

    weight, optimizer = make()
    fine, counts = torch.tensor([1 / 3, 1 / 7, 1 / 9]), torch.tensor([1, 2, 255], dtype=torch.uint8)
    optimizer.state[weight].update(momentum_buffer=fine, counts=counts)
    again, loaded = make()
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(loaded.state[again]["momentum_buffer"], fine)
    assert loaded.state[again]["counts"].dtype == torch.uint8
