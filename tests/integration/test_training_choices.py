"""Optimizers and schedules as the trainer sets them up."""

from __future__ import annotations

import math

import pytest

from axolotl.utils.optimizers.adopt import ADOPT
from tests.integration.training_runs import make_trainer, steps_of


def run(folder, **kwargs):
    trainer = make_trainer(folder, max_steps=4, per_device_train_batch_size=4, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_optimizers_of_transformers(tmp_path, optim):
    assert all(math.isfinite(value) for step in steps_of(run(tmp_path, optim=optim)) for value in step)


def test_rates_by_group(tmp_path):
    trainer = run(
        tmp_path, embedding_lr=5e-4, lr_groups=[{"name": "v", "modules": ["v_proj"], "lr": 2e-3}], weight_decay=0.1
    )
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"embeddings": 5e-4, "v": 2e-3, "parameters": 1e-3}
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups if group["name"] == "parameters"}
    assert decays == {0.0, 0.1}
    # What is logged is the rate of `learning_rate`, not that of a group.
    assert trainer.state.log_history[0]["learning_rate"] == 1e-3


def test_a_warmup_as_long_as_the_run_is_said(tmp_path, caplog):
    run(tmp_path, warmup_steps=50)
    assert "The warmup of 50 steps is as long as the run of 4" in caplog.text


def test_groups_of_one_name_keep_their_own_rates(tmp_path):
    groups = [
        {"name": "parameters", "modules": [f"{kind}_proj"], "lr": rate} for kind, rate in (("v", 2e-3), ("q", 3e-3))
    ]
    trainer = run(tmp_path, lr_groups=groups)
    sizes = {
        group["initial_lr"]: len(group["params"])
        for group in trainer.optimizer.param_groups
        if not group["weight_decay"]
    }
    assert sizes[2e-3] == sizes[3e-3] == 2


def test_lora_plus(tmp_path):
    trainer = run(tmp_path, lora={}, loraplus_lr_ratio=16.0)
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]} == {1e-3, 16e-3}


def rates_of(trainer) -> dict[str, float]:
    """The rate of each parameter, and 0.0 for those that do not train."""
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    return {name: rates.get(id(parameter), 0.0) for name, parameter in trainer.model.named_parameters()}


def test_lora_plus_beside_embeddings_of_their_own_rate(tmp_path):
    lora = {"modules_to_save": ["embed_tokens"], "use_dora": True}
    trainer = run(tmp_path, lora=lora, loraplus_lr_ratio=16.0, embedding_lr=1e-6, weight_decay=0.1)
    kinds = {"lora_A": 1e-3, "lora_B": 16e-3, "magnitude": 16e-3, "modules_to_save": 1e-6}
    for name, rate in rates_of(trainer).items():
        assert rate == next((rate for kind, rate in kinds.items() if kind in name), 0.0), name


def test_lora_plus_on_embeddings(tmp_path):
    trainer = run(tmp_path, lora={"target_modules": ["embed_tokens", "q_proj"]}, loraplus_lr_ratio=16.0)
    assert {rate for name, rate in rates_of(trainer).items() if "lora_embedding_" in name} == {1e-6}


def test_the_rate_of_embeddings_by_any_name(tmp_path):
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    trainer = run(tmp_path, architecture="GPT2Config", model_config=shape, embedding_lr=5e-4)
    rates = rates_of(trainer)
    assert rates["transformer.wte.weight"] == 5e-4
    assert rates["transformer.wpe.weight"] == rates["transformer.h.0.attn.c_attn.weight"] == 1e-3


def test_a_rate_for_embeddings_that_are_not_trained_is_said(tmp_path, caplog):
    run(tmp_path, lora={}, embedding_lr_scale=0.1)
    assert "`embedding_lr_scale` has no effect" in caplog.text


def test_an_optimizer_class_with_arguments(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, per_device_train_batch_size=4)
    trainer.optimizer_cls_and_kwargs = (ADOPT, {"lr": 1e-3})
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, ADOPT)


@pytest.mark.parametrize(
    ("args", "rates"),
    [
        ({"alternate_lr_scheduler_type": "rex"}, [0, 1e-3, 1e-3 * (2 / 3) / 0.7]),
        ({"cosine_min_lr_ratio": 0.5}, [0, 1e-3, 1e-3 * 0.875]),
        ({"cosine_min_lr_ratio": 0.5, "cosine_constant_lr_ratio": 0.5}, [0, 1e-3, 5e-4, 5e-4]),
        ({"lr_quadratic_warmup": True, "warmup_steps": 2}, [0, 2.5e-4, 1e-3]),
        ({"lr_scheduler_type": "constant_with_warmup"}, [0, 1e-3, 1e-3]),
        ({"alternate_lr_scheduler_type": "one_cycle", "lr_div_factor": 10.0}, [1e-4, 1e-3]),
    ],
)
def test_schedules(tmp_path, args, rates):
    trainer = run(tmp_path, **{"warmup_steps": 1, **args})
    seen = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen[: len(rates)] == pytest.approx(rates, rel=1e-6)
