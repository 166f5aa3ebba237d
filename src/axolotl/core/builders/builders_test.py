"""From keys of a config to training arguments."""

from __future__ import annotations

import importlib.util

import pytest

from axolotl.core.builders import arguments as read
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.builders.rl import HFRLTrainerBuilder
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.exceptions import ConfigError, MissingExtraError, NotBuiltError
from axolotl.utils.callbacks.trackers import check_trackers
from axolotl.utils.dict import DictDefault


@pytest.mark.parametrize(
    ("keys", "total", "steps"),
    [
        ({"warmup_steps": 7, "warmup_ratio": None}, 1000, 7),
        ({"warmup_ratio": 0.1}, 1000, 100),
        ({}, 1000, 30),
        ({}, 100_000, 100),
        ({}, 10, 0),
        ({}, 40, 2),
        ({}, None, 0.03),
        ({"warmup_steps": 0}, 1000, 0),
    ],
)
def test_warmup(keys, total, steps):
    assert read.read_warmup_steps(DictDefault(keys), total) == steps


def test_a_warmup_is_a_share_of_the_epochs_where_max_steps_goes_beyond_them():
    cfg = DictDefault(warmup_ratio=0.1, max_steps=500)
    assert read.read_warmup_steps(cfg, num_steps := 100) == 10
    assert f"`warmup_ratio: 0.1` of {num_steps} steps" in cfg.resolution[0]["reason"]
    assert "`max_steps: 500` goes beyond them" in cfg.resolution[0]["reason"]


EVALUATED = {"val_set_size": 0.1, "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({**EVALUATED, "eval_steps": 2, "save_steps": 3}, "`save_steps: 3` is no multiple of `eval_steps: 2`"),
        ({**EVALUATED, "eval_steps": 2}, "`eval_strategy: steps` and saves by `save_strategy: epoch`"),
        (
            {"early_stopping_patience": 2, "eval_steps": 2, "save_steps": 2},
            "`early_stopping_patience: 2` needs evaluations",
        ),
    ],
)
def test_a_best_model_that_cannot_be_kept_is_said_at_once(keys, said):
    with pytest.raises(ConfigError, match=said):
        read.check_best_model(DictDefault(keys))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {**EVALUATED, "eval_steps": 2, "save_steps": 4},
        {**EVALUATED, "eval_steps": 0.15, "save_steps": 0.3},
        {**EVALUATED, "eval_steps": 2, "save_strategy": "best"},
        EVALUATED,
    ],
)
def test_a_best_model_that_can_be_kept(keys):
    read.check_best_model(DictDefault(keys))


@pytest.mark.parametrize(
    ("evals", "saves", "num_steps", "aligned"),
    [
        (1 / 9, 1 / 3, 20, (3, 6)),
        (0.15, 0.3, 20, (3, 6)),
        (0.5, 0.25, 8, (4, 4)),
        (3, 0.5, 20, (3, 9)),
        (2, 4, 20, None),
    ],
)
def test_saves_of_the_best_model_fall_on_evaluations(evals, saves, num_steps, aligned):
    args = {"load_best_model_at_end": True, "eval_steps": evals, "save_steps": saves}
    found = read.align_saves(DictDefault(), args, num_steps)
    assert found == ({} if aligned is None else {"eval_steps": aligned[0], "save_steps": aligned[1]})
    assert read.align_saves(DictDefault(), {**args, "load_best_model_at_end": False}, num_steps) == {}


@pytest.mark.parametrize(
    ("given", "total", "steps"), [(None, 100, 1), (None, 1000, 5), (None, 10**6, 10), (None, None, 500), (3, 9, 3)]
)
def test_logging_steps(given, total, steps):
    assert read.read_logging_steps(DictDefault(logging_steps=given), total) == steps


def test_saving():
    assert read.read_save_args(DictDefault()) == {
        "save_strategy": "epoch",
        "save_total_limit": 4,
        "async_save": True,
    }
    assert read.read_save_args(DictDefault(save_steps=0.25))["save_strategy"] == "steps"
    assert read.read_save_args(DictDefault(save_strategy="no", save_total_limit=1)) == {
        "save_strategy": "no",
        "save_total_limit": 1,
        "async_save": True,
    }


def test_evaluation():
    assert read.read_eval_args(DictDefault(eval_steps=5), has_eval_set=False)["eval_strategy"] == "no"
    args = read.read_eval_args(DictDefault(eval_steps=5, micro_batch_size=3), has_eval_set=True)
    assert (args["eval_strategy"], args["eval_on_start"], args["per_device_eval_batch_size"]) == ("steps", True, 3)
    stopping = read.read_eval_args(
        DictDefault(eval_steps=5, save_steps=10, early_stopping_patience=2), has_eval_set=True
    )
    assert (stopping["load_best_model_at_end"], stopping["metric_for_best_model"]) == (True, "loss")
    shares = DictDefault(eval_steps=0.1, save_steps=0.3, early_stopping_patience=2)
    assert read.read_eval_args(shares, has_eval_set=True)["load_best_model_at_end"] is True


@pytest.mark.parametrize(
    "metric, wanted",
    [("eval_ppl", {"greater_is_better": False}), ("ter", {"greater_is_better": False}), ("eval_chrf", {}), (None, {})],
)
def test_the_lowest_perplexity_is_the_best(metric, wanted):
    cfg = DictDefault(metric_for_best_model=metric)
    assert read.read_best_args(cfg) == wanted
    assert [choice["key"] for choice in cfg.resolution or []] == list(wanted)
    assert read.read_best_args(DictDefault(metric_for_best_model=metric, greater_is_better=True)) == {}


def test_trackers():
    assert read.read_tracker_args(DictDefault())["report_to"] == "none"
    both = read.read_tracker_args(DictDefault(use_wandb=True, use_mlflow=True, mlflow_run_name="m", wandb_name="w"))
    assert both == {"report_to": ["wandb", "mlflow"], "run_name": "w"}


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(DictDefault())
    for key, extra in (("use_comet", "comet"), ("use_otel_metrics", "otel"), ("use_tensorboard", "tensorboard")):
        with pytest.raises(MissingExtraError, match=rf"`{key}: true`.*axolotl\[{extra}\]"):
            check_trackers(DictDefault({key: True}))


@pytest.mark.parametrize("name", ["one_cycle", "rex"])
def test_our_schedules_are_hidden_from_transformers(name):
    args = read.read_scheduler_args(DictDefault(lr_scheduler=name))
    assert (args["lr_scheduler_type"], args["alternate_lr_scheduler_type"]) == ("cosine", name)


def builder(**keys):
    return HFCausalTrainerBuilder(DictDefault({"output_dir": "out", "learning_rate": "2e-4", **keys}), None, None)


@pytest.mark.parametrize("bf16", [True, "full", False])
def test_arguments_become_an_object_on_a_cpu(tmp_path, bf16):
    subject = builder(
        output_dir=str(tmp_path), bf16=bf16, gradient_checkpointing=True, sample_packing=True, sequence_len=64
    )
    args = subject.build_training_args(AxolotlTrainingArguments, subject.read_base_training_args(100))
    assert args.learning_rate == 2e-4
    assert args.bf16 is bool(bf16)
    assert args.max_seq_length == 64
    assert args.gradient_checkpointing
    assert args.average_tokens_across_devices


def test_an_argument_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match="learning_rat"):
        builder().build_training_args(AxolotlTrainingArguments, {"output_dir": str(tmp_path), "learning_rat": 1.0})


def test_a_trainer_class_that_cannot_be_imported_is_named():
    with pytest.raises(ConfigError, match="no_such_module"):
        builder(trainer_cls="no_such_module.Trainer").read_trainer_cls(object)
    with pytest.raises(ConfigError, match="is no trainer"):
        builder(trainer_cls="collections.OrderedDict").read_trainer_cls(object)
    assert builder(trainer_cls="transformers.Trainer").read_trainer_cls(object).__name__ == "Trainer"


def test_rl_is_refused():
    with pytest.raises(NotBuiltError, match="dpo"):
        HFRLTrainerBuilder(DictDefault(rl="dpo"), None, None).build(1)
