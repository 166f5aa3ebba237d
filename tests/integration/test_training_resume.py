"""A resumed run is the uninterrupted one, to the last bit; a killed run loses nothing that was whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from axolotl.core import checkpoint as checkpoints
from axolotl.core.checkpoint import check_checkpoint, find_last_whole_checkpoint, list_checkpoints, remove_leftovers
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.exceptions import CheckpointError, OutputError, TrainingStopped
from axolotl.utils.callbacks.guards import EarlyStoppingCallback, LossWatchDogCallback, SkipEvalOnResumeCallback
from tests.integration.training_runs import evaluations_of, make_trainer, run_on_ranks, steps_of, weights_of

ROOT = Path(__file__).resolve().parents[2]

# transformers holds experts in one parameter, and writes them one by one.
EXPERTS: dict[str, Any] = {
    "architecture": "Qwen3MoeConfig",
    "model_config": {
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "attention_dropout": 0.2,
    },
}

# What makes a run, and the steps after which it is stopped: within an epoch of four steps, at its border, after it.
RUNS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "unpacked": ({}, (1, 4, 7)),
    "packed": ({"packed": True, "per_device_train_batch_size": 1}, (1, 5)),
    "one row, workers": ({"packed": True, "multipack_real_batches": False, "dataloader_num_workers": 1}, (1, 3)),
    "short last step": ({"per_device_train_batch_size": 3}, (2, 6, 8)),
    "by length": ({"train_sampling_strategy": "group_by_length"}, (3,)),
    "lora": ({"lora": {"lora_dropout": 0.2}, "dataloader_num_workers": 1}, (3,)),
    "evaluations": ({"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}, (2, 4)),
    "experts": (EXPERTS, (3,)),
    "adafactor": ({"optim": "adafactor", "lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2,
                   "lr_scheduler_kwargs": {"num_decay_steps": 2}}, (3,)),
    "schedule free": ({"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}, (3,)),
}  # fmt: skip


def stopped_anywhere(folder: Path, callbacks: Sequence[TrainerCallback] = (), **args: Any) -> AxolotlTrainer:
    """A run over two epochs, with dropout, that logs every other step and saves after each."""
    common = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "model_config": {"attention_dropout": 0.2},
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 2,
    }
    return make_trainer(folder, callbacks=[SkipEvalOnResumeCallback(), *callbacks], **{**common, **args})


def mean_loss(trainer: AxolotlTrainer) -> float:
    """That of the whole run, in its last line."""
    return trainer.state.log_history[-1]["train_loss"]


def same_state(ours: AxolotlTrainer, theirs: AxolotlTrainer) -> None:
    assert steps_of(ours) == steps_of(theirs)
    assert evaluations_of(ours) == evaluations_of(theirs)
    for name in ("global_step", "epoch", "max_steps", "best_metric", "best_global_step", "best_model_checkpoint"):
        assert getattr(ours.state, name) == getattr(theirs.state, name), name
    assert (ours.num_tokens_seen, ours.num_tokens_trained) == (theirs.num_tokens_seen, theirs.num_tokens_trained)
    assert mean_loss(ours) == mean_loss(theirs)
    for (name, a), b in zip(weights_of(ours).items(), weights_of(theirs).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", RUNS)
def test_resuming_continues_bit_for_bit(tmp_path, name):
    args, steps = RUNS[name]
    if name == "schedule free":
        pytest.importorskip("schedulefree")
    whole = stopped_anywhere(tmp_path, **args)
    said = whole.train()
    assert whole.state.global_step > max(steps)
    assert (
        said.training_loss
        == mean_loss(whole)
        == pytest.approx(sum(loss for loss, _ in steps_of(whole)) / len(steps_of(whole)))
    )
    for step in steps:
        torch.rand(step)  # what else the process draws must not matter
        resumed = stopped_anywhere(tmp_path, **args)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        same_state(resumed, whole)


def test_resuming_keeps_what_is_known_of_the_best_model(tmp_path):
    """Step 3 is the best; two evaluations that are no better stop the run, none or one of them before it is resumed.

    The log lines of steps 2 and 4 are strikes of the watchdog.
    """

    class Worth(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_worth"] = -abs(state.global_step - 3)

    def run(resume: int | None) -> AxolotlTrainer:
        watchdog = LossWatchDogCallback(threshold=1.0, patience=3)
        callbacks = [Worth(), EarlyStoppingCallback(2), watchdog]
        trainer = stopped_anywhere(
            tmp_path,
            callbacks=callbacks,
            eval_strategy="steps",
            eval_steps=1,
            eval_on_start=True,
            load_best_model_at_end=True,
            metric_for_best_model="worth",
        )
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / "out" / f"checkpoint-{resume}"))
        assert watchdog.strikes == 2
        return trainer

    whole = run(None)
    assert (whole.state.global_step, whole.state.best_global_step) == (5, 3)
    assert whole.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-3")
    for step in (3, 4):
        same_state(run(step), whole)


def test_the_best_experts_come_with_the_best_model(tmp_path):
    class Worth(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_worth"] = -abs(state.global_step - 3)

    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "worth"}
    trainer = stopped_anywhere(tmp_path, callbacks=[Worth()], **EXPERTS, **best)
    trainer.train()
    trainer.save_model(str(tmp_path / "best"))
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "best", tmp_path / "out/checkpoint-3")
    )
    assert any(".experts.0." in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_with_too_few_weights_is_refused(tmp_path):
    stopped_anywhere(tmp_path).train()
    file = tmp_path / "out/checkpoint-3/model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of the model: model\.norm\.weight"):
        stopped_anywhere(tmp_path).train(resume_from_checkpoint=str(file.parent))


def learning_rates(trainer: AxolotlTrainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"lr_scheduler_type": "linear", "warmup_steps": 0.5},
        {"alternate_lr_scheduler_type": "rex"},
        {"alternate_lr_scheduler_type": "one_cycle"},
        {"jagged_restart_steps": 3, "jagged_restart_warmup_steps": 2},
        {"cosine_min_lr_ratio": 0.1, "embedding_lr": 1e-4},
    ],
    ids=["cosine", "longer warmup", "rex", "one cycle", "restarts", "groups"],
)
def test_a_longer_run_follows_its_own_schedule_from_the_first_step(tmp_path, args):
    """The rates of a run that is resumed for more steps are those of one that had so many steps from its beginning."""
    common = {"logging_steps": 1, **args}
    whole = stopped_anywhere(tmp_path / "whole", **common, max_steps=12, save_strategy="no")
    whole.train()
    stopped_anywhere(tmp_path, **common, max_steps=6).train()
    resumed = stopped_anywhere(tmp_path, **common, max_steps=12, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert learning_rates(resumed)[4:] == learning_rates(whole)[4:]
    if "alternate_lr_scheduler_type" in args:
        groups = zip(resumed.optimizer.param_groups, whole.optimizer.param_groups, strict=True)
        assert all(ours["betas"] == theirs["betas"] for ours, theirs in groups)


def test_a_rate_that_a_callback_has_set_is_resumed(tmp_path):
    class Halve(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] *= 0.5

    whole = stopped_anywhere(tmp_path, callbacks=[Halve()], logging_steps=1)
    whole.train()
    resumed = stopped_anywhere(tmp_path, callbacks=[Halve()], logging_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    same_state(resumed, whole)


def test_what_had_ended_a_run_ends_it_again_until_it_is_given_more_patience(tmp_path, caplog):
    def run(patience: int, strikes: int = 99, resume: bool = False) -> AxolotlTrainer:
        watchdog = LossWatchDogCallback(threshold=0.1, patience=strikes)
        callbacks = [EarlyStoppingCallback(patience), watchdog]
        evaluating = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "metric_for_best_model": "step"}
        trainer = stopped_anywhere(
            tmp_path, callbacks=[Grows(), *callbacks], **evaluating, greater_is_better=False, num_train_epochs=3
        )
        last = find_last_whole_checkpoint(tmp_path / "out")
        trainer.train(resume_from_checkpoint=str(last) if resume else None)
        return trainer

    class Grows(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_step"] = state.global_step

    before = run(patience=2)
    stopped_at = before.state.global_step
    again = run(patience=2, resume=True)
    assert again.state.global_step == stopped_at < again.state.max_steps
    assert "Early stopping had ended the run" in caplog.text
    same_state(again, before)
    longer = run(patience=4, strikes=2, resume=True)
    assert longer.state.global_step > stopped_at
    stopped_at = longer.state.global_step
    assert run(patience=9, strikes=2, resume=True).state.global_step == stopped_at
    assert "`loss_watchdog_threshold: 0.1` had ended the run" in caplog.text
    assert run(patience=99, resume=True).state.global_step == 12


def resumed_on_a_rank(folder: Path) -> bool:
    args = {"output_dir": str(folder.parent / "out"), "ddp_backend": "gloo", "packed": True, "max_steps": 5}
    whole = stopped_anywhere(folder, **args)
    whole.train()
    resumed = stopped_anywhere(folder, **args)
    resumed.train(resume_from_checkpoint=str(folder.parent / "out" / "checkpoint-2"))
    same_state(resumed, whole)
    return True


def test_resuming_on_two_ranks(tmp_path):
    assert run_on_ranks(resumed_on_a_rank, tmp_path)


def test_a_broken_last_checkpoint_is_passed_over(tmp_path, caplog):
    trainer = make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, per_device_train_batch_size=4)
    trainer.train()
    out = tmp_path / "out"
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    optimizer = out / "checkpoint-3" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert find_last_whole_checkpoint(out) == out / "checkpoint-2"
    assert checkpoints.resolve_checkpoint(out / "checkpoint-3", out) == out / "checkpoint-2"


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_keeps_the_newest(tmp_path, limit):
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=limit,
        per_device_train_batch_size=4,
    )
    trainer.train()
    kept = [path.name for path in list_checkpoints(tmp_path / "out")]
    assert kept == [f"checkpoint-{step}" for step in range(5 - limit, 5)]


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    save = torch.save

    def full(obj, path, *args, **kwargs):
        if "checkpoint-2" in str(path) and str(path).endswith("optimizer.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(obj, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    trainer = make_trainer(
        tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1, per_device_train_batch_size=4
    )
    with pytest.raises(OutputError, match="step 2 could not be written"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").iterdir() if "checkpoint" in path.name] == ["checkpoint-1"]
    check_checkpoint(tmp_path / "out" / "checkpoint-1")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.lm_head.weight[7] = float("nan")

    trainer = make_trainer(tmp_path, max_steps=3, per_device_train_batch_size=4, callbacks=[Poison()])
    with pytest.raises(TrainingStopped, match="The loss of step 2 is nan"):
        trainer.train()


def test_leftovers_are_removed_and_a_replaced_checkpoint_comes_back(tmp_path):
    (tmp_path / ".checkpoint-3.writing").mkdir()
    (tmp_path / ".checkpoint-2.replaced").mkdir()
    (tmp_path / ".checkpoint-2.replaced" / "a").write_text("a")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_kill_inside_a_save(tmp_path, monkeypatch):
    """Every moment of a save at which a process can die leaves a whole checkpoint to resume from."""
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, per_device_train_batch_size=4)
    trainer.train()
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    renames, syncs = os.rename, checkpoints._sync
    for deadly in range(1, 30):
        count = 0

        def die_at(function, deadly=deadly):
            def step(*args):
                nonlocal count
                count += 1
                if count == deadly:
                    raise Killed
                return function(*args)

            return step

        monkeypatch.setattr(checkpoints.os, "rename", die_at(renames))
        monkeypatch.setattr(checkpoints, "_sync", die_at(syncs))
        try:
            trainer._save_checkpoint(trainer.model)
            died = False
        except Killed:
            died = True
        monkeypatch.undo()
        remove_leftovers(out)
        assert find_last_whole_checkpoint(out) == out / "checkpoint-1"
        if not died:
            break
    assert not died, "the save has more steps than this test tries"
