"""Every optimizer, from its name in YAML: the loss falls, and a resumed run is the uninterrupted one to the last bit."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
import yaml

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.exceptions import CheckpointError, ConfigError, MissingExtraError
from axolotl.integrations.base import PluginManager
from axolotl.train import train
from axolotl.utils.dict import DictDefault
from axolotl.utils.optimizers.table import OPTIMIZERS, read_optimizer
from axolotl.utils.schemas.enums import OPTIMIZERS as NAMES
from tests.integration.training_runs import make_rows, make_trainer, steps_of, weights_of
from tests.tiny import make_tiny_base

ELSEWHERE = {"adalomo", "adamw_torch_xla", "adamw_torch_npu_fused"}  # need a device or a build
GALORE = {"optim_target_modules": "all_linear", "optim_args": {"rank": 8, "update_proj_gap": 2, "scale": 2.0}}
KEYS: dict[str, dict] = {
    "q_galore_adamw8bit": {
        "optim_target_modules": ["attn", "mlp"],
        "qgalore_rank": 8,
        "qgalore_update_proj_gap": 2,
        "qgalore_scale": 2.0,
        "qgalore_proj_group_size": 64,
    },
    "sgd": {"learning_rate": 0.2},
    "lomo": {"learning_rate": 0.2},
    "flash_sgd": {"learning_rate": 0.2},
    "flash_sgdw": {"learning_rate": 0.2},
    "schedule_free_sgd": {"learning_rate": 0.5},
    "schedule_free_radam": {"learning_rate": 0.1, "optim_args": {"silent_sgd_phase": False}},
    **{name: GALORE for name in OPTIMIZERS if name.startswith("galore")},
    **{
        name: {"optim_target_modules": ["self_attn", "mlp"], "optim_args": "rank=8,update_proj_gap=2"}
        for name in OPTIMIZERS
        if name.startswith("apollo")
    },
}
ROWS = make_rows(8, max_length=24)
LORA = {"lora": {"lora_dropout": 0.0}}


@pytest.fixture(autouse=True)
def no_compiler():
    """torchao compiles its steps, which takes half a minute here and changes nothing that is tested."""
    with torch.compiler.set_stance("force_eager"):
        yield


def trainer_of(name, folder, **args):
    """A trainer with the optimizer that a config with this name gets."""
    cfg = DictDefault(optimizer=name, learning_rate=0.01, weight_decay=0.01)
    cfg.update(KEYS.get(name, {}))
    trainer = make_trainer(
        folder,
        rows=ROWS,
        max_steps=4,
        learning_rate=cfg.learning_rate,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=3,
        per_device_train_batch_size=8,
        max_grad_norm=10.0,
        optim_target_modules=cfg.optim_target_modules,
        alternate_optimizer=name if name != "lomo" else None,
        optim="lomo" if name == "lomo" else "adamw_torch",
        **args,
    )
    try:
        trainer.optimizer_cls_and_kwargs = read_optimizer(cfg, trainer.args)
    except MissingExtraError as error:
        pytest.skip(str(error))
    return trainer


def is_the_same_after_a_resume(name, folder, **args):
    whole = trainer_of(name, folder, **args)
    whole.train()
    resumed = trainer_of(name, folder, **args)
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-3"))
    assert steps_of(resumed) == steps_of(whole)
    for (key, ours), theirs in zip(weights_of(resumed).items(), weights_of(whole).values(), strict=True):
        assert torch.equal(ours, theirs), key
    return [loss for loss, _ in steps_of(whole)]


def test_every_name_has_a_row():
    assert set(NAMES) == {*OPTIMIZERS, "polora", "ao_adamw_4bit", "ao_adamw_8bit"}


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - ELSEWHERE))
def test_full_weights(name, tmp_path):
    losses = is_the_same_after_a_resume(name, tmp_path)
    assert losses[-1] < losses[0] - 0.1, losses


@pytest.mark.parametrize("name", ["adamw_torch_fused", "muon", "dion", "sinkgd", "galore_adamw", "lomo", "adamw_8bit"])
def test_adapters(name, tmp_path):
    losses = is_the_same_after_a_resume(name, tmp_path, **LORA)
    assert losses[-1] < losses[0]


# Names that differ in how they are paged, or in when they step, keep the same state.
ONE_PER_STATE = {(row.path, row.via, row.fixed.get("optim_bits")): name for name, row in OPTIMIZERS.items()}


@pytest.mark.parametrize("name", sorted(set(ONE_PER_STATE.values()) - ELSEWHERE))
def test_bfloat16_weights_with_states_of_other_dtypes(name, tmp_path):
    model = make_trainer(tmp_path / "m", rows=ROWS).model.to(torch.bfloat16)
    whole = trainer_of(name, tmp_path, model=copy.deepcopy(model))
    whole.train()
    resumed = trainer_of(name, tmp_path, model=copy.deepcopy(model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert steps_of(resumed) == steps_of(whole)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "muon", "adamc", "galore_adamw", "came_pytorch", "adamw_8bit"])
def test_groups_keep_their_rates(name, tmp_path):
    trainer = trainer_of(
        name, tmp_path, embedding_lr=5e-4, lr_groups=[{"name": "v", "modules": ["v_proj"], "lr": 2e-3}]
    )
    trainer.create_optimizer()
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert rates["embeddings"] == (5e-4, 0.0)
    assert rates["v"] == (2e-3, 0.01)
    found = [param for group in trainer.optimizer.param_groups for param in group["params"]]
    assert {id(p) for p in found} == {id(p) for p in trainer.model.parameters()} and len(found) == len(set(found))


def test_matrices_and_the_rest(tmp_path):
    trainer = trainer_of("muon", tmp_path)
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    matrices = {names[id(p)] for g in trainer.optimizer.param_groups if g["is_matrix"] for p in g["params"]}
    assert matrices == {name for name in names.values() if "proj" in name}


@pytest.mark.parametrize("tied", [False, True])
def test_adamc_corrects_all_but_the_head(tmp_path, tied):
    trainer = trainer_of("adamc", tmp_path, model_config={"tie_word_embeddings": tied})
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    plain = {names[id(p)] for g in trainer.optimizer.param_groups if not g["normalized"] for p in g["params"]}
    assert plain == {"model.embed_tokens.weight" if tied else "lm_head.weight"}


@pytest.mark.parametrize("saves_aside", [False, True])
def test_a_schedule_free_run_saves_what_it_evaluates(tmp_path, saves_aside):
    pytest.importorskip("schedulefree")
    trainer = trainer_of("schedule_free_adamw", tmp_path, async_save=saves_aside)
    trainer.train()
    training_point = weights_of(trainer)
    loss = trainer.evaluate()["eval_loss"]
    average = weights_of(trainer)
    trainer.optimizer.train()
    assert not torch.equal(weights_of(trainer)["lm_head.weight"], average["lm_head.weight"])
    trainer.save_model(str(tmp_path / "saved"))
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(saved.lm_head.weight, average["lm_head.weight"])
    again = make_trainer(tmp_path / "again", rows=ROWS, model=saved)
    assert again.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert training_point.keys() == average.keys()


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"])
def test_neither_evaluations_nor_saves_change_a_schedule_free_run(name, tmp_path):
    plain = trainer_of(name, tmp_path / "plain")
    plain.train()
    watched = trainer_of(name, tmp_path, eval_strategy="steps", eval_steps=1)
    watched.args.save_steps = 1
    watched.train()
    resumed = trainer_of(name, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert steps_of(watched) == steps_of(plain) == steps_of(resumed)
    for trainer in (watched, resumed):
        assert all(
            torch.equal(a, b) for a, b in zip(weights_of(plain).values(), weights_of(trainer).values(), strict=True)
        )


def test_the_best_weights_of_a_schedule_free_run_stay_as_they_are(tmp_path):
    pytest.importorskip("schedulefree")
    trainer = trainer_of(
        "schedule_free_adamw", tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = weights_of(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(weights_of(trainer)["lm_head.weight"], best["lm_head.weight"])


def test_layerwise_is_the_same_without_clipping(tmp_path):
    runs = []
    for name in ("galore_adamw", "galore_adamw_layerwise"):
        trainer = trainer_of(name, tmp_path / name)
        trainer.args.max_grad_norm = 0.0
        trainer.train()
        runs.append(weights_of(trainer))
    for key in runs[0]:
        torch.testing.assert_close(runs[0][key], runs[1][key], rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("name", ["lomo", "apollo_adamw_layerwise"])
def test_updates_in_backward_cannot_accumulate(name, tmp_path):
    trainer = trainer_of(name, tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="cannot accumulate gradients"):
        trainer.create_optimizer()


def test_the_moments_of_adalomo_are_saved(tmp_path, monkeypatch):
    """On the CPU, to which the library's calls of `.cuda()` are turned."""
    lomo_optim = pytest.importorskip("lomo_optim")
    from axolotl.utils.optimizers.libraries import saves_moments

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    cls = saves_moments(lomo_optim.AdaLomo)

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        return model, cls(model, lr=0.01)

    def go(model, optimizer, steps):
        for step in range(steps):
            inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            optimizer.fused_backward(model(inputs).square().mean(), 0.01)

    model, optimizer = make()
    go(model, optimizer, 3)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again, resumed = make()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    go(model, optimizer, 2)
    go(again, resumed, 2)
    assert torch.equal(model[0].weight, again[0].weight)


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    trainer_of("muon", tmp_path).train()
    for other in ("dion", "galore_adamw", "adamw_torch"):
        with pytest.raises(CheckpointError, match="checkpoint-3"):
            trainer_of(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_tiny_base(folder / "base")
    rng = random.Random(0)
    rows = [
        {"instruction": f"add {rng.randint(0, 50)}", "input": "", "output": f"{rng.randint(0, 50)}"} for _ in range(16)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def train_yaml(base, out, **keys):
    """`train` of a YAML file, as the command line does it."""
    config = {
        "base_model": str(base / "base"),
        "datasets": [{"path": str(base / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(base / "prepared"),
        "output_dir": str(out),
        "val_set_size": 0,
        "sequence_len": 128,
        "micro_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "bf16": False,
        "logging_steps": 1,
        "save_steps": 2,
        **keys,
    }
    path = base / "config.yml"
    path.write_text(yaml.safe_dump(config))
    cfg = load_cfg(path)
    return train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))[2]


YAMLS: dict[str, dict] = {
    "muon with options": {"optimizer": "muon", "optim_args": {"ns_steps": 3, "adjust_lr_fn": "original"}},
    "dion by its keys": {"optimizer": "dion", "dion_lr": 0.02, "dion_momentum": 0.9, "dion_rank_fraction": 0.5},
    "galore by text": {"optimizer": "galore_adamw", "optim_target_modules": "all_linear", "optim_args": "rank=4"},
    "layerwise": {"optimizer": "galore_adafactor_layerwise", "optim_target_modules": ["mlp"]},
    "lomo": {"optimizer": "lomo", "learning_rate": 0.1},
    "restarts": {"optimizer": "adamw_torch", "jagged_restart_steps": 2, "jagged_restart_warmup_steps": 1},
    "anyprecision": {
        "optimizer": "adamw_anyprecision",
        "bf16": "full",
        "optim_args": {"use_kahan_summation": True, "variance_dtype": "bfloat16"},
    },
    "adamc in bf16": {"optimizer": "adamc", "bf16": True, "weight_decay": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("title", YAMLS)
def test_yaml(title, base, tmp_path):
    whole = train_yaml(base, tmp_path / "out", **YAMLS[title])
    resumed = train_yaml(
        base, tmp_path / "out", **YAMLS[title], resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")
    )
    assert steps_of(whole)[-1][0] < steps_of(whole)[0][0]
    assert steps_of(resumed) == steps_of(whole)


def test_a_plugin_brings_optimizer_and_schedule(base, tmp_path, monkeypatch):
    manager = PluginManager.get_instance()
    monkeypatch.setattr(
        manager, "create_optimizer", lambda trainer: torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    )
    monkeypatch.setattr(
        manager,
        "create_lr_scheduler",
        lambda trainer, optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5),
    )
    trainer = train_yaml(base, tmp_path / "out", optimizer="adamw_torch", save_steps=None, save_strategy="no")
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert trainer.state.log_history[0]["learning_rate"] == 0.25


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"optimizer": "adamw_torchh"}, "adamw_torch"),
        ({"optimizer": "polora", "adapter": "lora", "lora_target_linear": True}, "package of its own, `polora`"),
        ({"optimizer": "adamw_torch_xla"}, "for TPUs"),
        ({"optimizer": "adamw_torch_npu_fused"}, "Ascend NPUs"),
        ({"optimizer": "muon", "optim_args": {"ns_step": 3}}, "Did you mean `ns_steps`"),
        ({"optimizer": "adamw_torch", "optim_args": "amsgrad=maybe"}, "must be true or false"),
        ({"optimizer": "galore_adamw", "optim_target_modules": "all_linear", "optim_args": "proj_type=up"}, "std, reverse_std"),
        ({"optimizer": "galore_adamw", "optim_target_modules": ["nowhere"]}, "names no linear layer"),
        ({"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"num_cycle": 1}}, "Did you mean `num_cycles`"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(keys, said, base, tmp_path):
    with pytest.raises(ConfigError, match=said):
        train_yaml(base, tmp_path / "out", **keys)
