"""A resumed run is the uninterrupted one, to the last bit; a killed run loses nothing that was whole."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from axolotl.core import checkpoint as checkpoints
from axolotl.core.checkpoint import check_checkpoint, find_last_whole_checkpoint, list_checkpoints, remove_leftovers
from axolotl.exceptions import OutputError, TrainingStopped
from tests.integration.training_runs import make_trainer, steps_of, weights_of

ROOT = Path(__file__).resolve().parents[2]

DATA = {
    "unpacked": {},
    "packed": {"packed": True},
    "lengths": {"train_sampling_strategy": "group_by_length"},
    "workers": {"dataloader_num_workers": 1, "packed": True},
}


def same_state(ours, theirs) -> None:
    assert steps_of(ours) == steps_of(theirs)
    assert (ours.num_tokens_seen, ours.num_tokens_trained) == (theirs.num_tokens_seen, theirs.num_tokens_trained)
    for (name, a), b in zip(weights_of(ours).items(), weights_of(theirs).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("data", sorted(DATA))
@pytest.mark.parametrize("step", [1, 5])
def test_resuming_continues_bit_for_bit(tmp_path, data, step):
    """Over two epochs, with dropout, from the middle of an epoch and of a logging window."""
    common = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "model_config": {"attention_dropout": 0.2},
        "save_strategy": "steps",
        "save_steps": step,
        "logging_steps": 2,
        **DATA[data],
    }
    if "packed" in common:
        common["per_device_train_batch_size"] = 1
    whole = make_trainer(tmp_path, **common)
    whole.train()
    assert whole.state.global_step > 5
    resumed = make_trainer(tmp_path, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    same_state(resumed, whole)


@pytest.mark.parametrize("packed", [False, True])
def test_a_lora_run_twice_is_the_same(tmp_path, packed):
    runs = []
    for name in ("a", "b"):
        trainer = make_trainer(
            tmp_path / name,
            packed=packed,
            lora={"lora_dropout": 0.1},
            max_steps=3,
            per_device_train_batch_size=2,
            dataloader_num_workers=1,
        )
        trainer.train()
        runs.append(trainer)
        torch.rand(7)  # what the process draws in between must not matter
    same_state(*runs)


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


KILLED_RUN = """
import sys, time
from pathlib import Path
from axolotl.core.checkpoint import find_last_whole_checkpoint, remove_leftovers
from tests.integration.training_runs import make_trainer, steps_of
folder = Path(sys.argv[1])
remove_leftovers(folder / "out")
trainer = make_trainer(folder, max_steps=int(sys.argv[2]), save_strategy="steps", save_steps=1, save_total_limit=2,
                       per_device_train_batch_size=4)
print("ready", flush=True)
last = find_last_whole_checkpoint(folder / "out")
trainer.train(resume_from_checkpoint=str(last) if last else None)
import json
(folder / "steps.json").write_text(json.dumps([steps_of(trainer), trainer.num_tokens_seen]))
"""


def start(folder: Path, steps: int) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, str(folder), str(steps)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_ready(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready"):
            return
    raise AssertionError("the run ended before it began")


@pytest.mark.slow
def test_kill_at_random_moments_and_resume(tmp_path):
    """Two kills at moments that fall into steps and saves alike, then a run to the end: the same as never killed."""
    rng = random.Random(time.time_ns())
    steps = 24
    for _ in range(2):
        process = start(tmp_path / "killed", steps)
        wait_ready(process)
        time.sleep(rng.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for folder in list_checkpoints(tmp_path / "killed" / "out"):
            check_checkpoint(folder)
    process = start(tmp_path / "killed", steps)
    assert process.wait(timeout=120) == 0
    whole = make_trainer(tmp_path / "whole", max_steps=steps, per_device_train_batch_size=4)
    whole.train()
    logged, seen = json.loads((tmp_path / "killed" / "steps.json").read_text())
    assert [tuple(entry) for entry in logged] == steps_of(whole)
    assert seen == whole.num_tokens_seen


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
