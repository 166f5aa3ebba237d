"""Killed, interrupted, damaged, out of disk: nothing that was whole is lost, and going on gives the uninterrupted run."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from axolotl.cli.main import run
from axolotl.core.checkpoint import MARKER, model_aside, remove_leftovers
from axolotl.exceptions import CheckpointError, ModelError
from axolotl.utils.tee import Tee, close_debug_log
from tests.integration.training_runs import make_rows, make_trainer, steps_of, weights_of
from tests.tiny import make_tiny_base

STEPS = 12
STEPS_OF_EPOCH = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base"))


def write_config(folder: Path, base: Path, num_rows: int = 14, **changes) -> None:
    rows = [{"instruction": f"Add {n} and 1.", "input": "", "output": str(n + 1)} for n in range(num_rows)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = {
        "base_model": str(base),
        "datasets": [{"path": "d.jsonl", "type": "alpaca"}],
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.2,
        "lora_target_linear": True,
        "sequence_len": 128,
        "micro_batch_size": 2,
        "num_epochs": STEPS // STEPS_OF_EPOCH,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "bf16": False,
        "val_set_size": 2,
        "save_steps": 2,
        "auto_resume_from_checkpoints": True,
        "output_dir": "./out",
        "dataset_prepared_path": "./prepared",
        **changes,
    }
    (folder / "c.yml").write_text(yaml.safe_dump(cfg))


def start(folder: Path, command: str = "train", *arguments: str, new_group: bool = False) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = (folder / "log.txt").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "axolotl.cli.main", command, "c.yml", *arguments],
        cwd=folder,
        env=environment,
        stdout=log,
        stderr=log,
        process_group=0 if new_group else None,
    )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen, seconds: float = 300) -> None:
    """Until a file or folder whose name fits is anywhere below a folder."""
    end = time.monotonic() + seconds
    while not any(fnmatch.filter(folders + files, pattern) for _, folders, files in os.walk(folder)):
        assert process.poll() is None, f"ended with {process.returncode} before {pattern} was there"
        assert time.monotonic() < end
        time.sleep(0.005)


def cli(folder: Path, *command: str) -> int:
    with contextlib.chdir(folder):
        try:
            return run(list(command))
        finally:
            close_debug_log()


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    write_config(folder, base)
    assert cli(folder, "train", "c.yml") == 0
    return folder


def same_adapter(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "out/adapter_model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, base, finished):
    """Killed after the last checkpoint of an epoch, when an evaluation lies between it and the next step."""
    write_config(tmp_path, base)
    process = start(tmp_path)
    wait_for(tmp_path / "out", f"checkpoint-{STEPS_OF_EPOCH}", process)
    process.kill()
    process.wait()
    assert cli(tmp_path, "train", "c.yml") == 0
    assert same_adapter(tmp_path, finished)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_saves_and_the_next_run_goes_on(tmp_path, base, finished, number, workers):
    """Sent to every process of the run, as terminals and schedulers do."""
    write_config(tmp_path, base, dataloader_num_workers=workers)
    process = start(tmp_path, new_group=True)
    wait_for(tmp_path / "out", "checkpoint-2", process)
    os.killpg(process.pid, number)
    assert process.wait(240) in (0, 128 + number)
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" not in log
    assert cli(tmp_path, "train", "c.yml") == 0
    assert same_adapter(tmp_path, finished)


SWEEP = ("--sweep", "sweep.yml")
ACCELERATE = ("--launcher", "accelerate", "--num-processes", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "number", "codes"),
    [
        (SWEEP, signal.SIGTERM, {128 + signal.SIGTERM}),
        ((*SWEEP, *ACCELERATE), signal.SIGINT, {128 + signal.SIGINT}),
        ((*SWEEP, "--launcher", "torchrun"), signal.SIGTERM, {128 + signal.SIGTERM}),
        (ACCELERATE, signal.SIGTERM, {-signal.SIGTERM}),
        (ACCELERATE, signal.SIGKILL, {-signal.SIGKILL}),
        (("--launcher", "torchrun"), signal.SIGTERM, {1, 128 + signal.SIGTERM}),
    ],
    ids=["sweep", "sweep, accelerate", "sweep, torchrun", "accelerate", "accelerate, killed", "torchrun"],
)
def test_a_signal_reaches_what_was_launched(tmp_path, base, arguments, number, codes):
    """The run ends with a checkpoint of its last step. A sweep waits for it, and begins no other."""
    write_config(tmp_path, base, num_epochs=1000)
    (tmp_path / "sweep.yml").write_text("seed: [1, 2]")
    process = start(tmp_path, "train", *arguments)
    out = tmp_path / ("out/sweep0001" if "--sweep" in arguments else "out")
    wait_for(out, "checkpoint-2", process)
    launched = psutil.Process(process.pid).children(recursive=True)
    assert launched
    process.send_signal(number)
    assert process.wait(240) in codes
    if "--sweep" not in arguments:
        assert not psutil.wait_procs(launched, timeout=120)[1]
    stopped_at = re.search(r"Stopped at step (\d+)", (tmp_path / "log.txt").read_text())
    assert stopped_at is not None and (out / f"checkpoint-{stopped_at[1]}" / MARKER).exists()
    assert not psutil.wait_procs(launched, timeout=120)[1]  # a sweep waits for runs, not for what looks after them
    assert not (tmp_path / "out/sweep0002").exists()


def test_an_interrupted_preparation_leaves_nothing_half(tmp_path, base):
    write_config(tmp_path, base, num_rows=60_000, dataset_num_proc=2)
    process = start(tmp_path, "preprocess")
    wait_for(tmp_path / "prepared", "*.arrow", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 128 + signal.SIGTERM
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    assert [path.suffix for path in (tmp_path / "prepared").iterdir()] == [".lock"]


def test_a_finished_run_takes_no_further_step(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    assert cli(tmp_path / "run", "train", "c.yml") == 0
    assert same_adapter(tmp_path / "run", finished)
    assert not (tmp_path / f"run/out/checkpoint-{STEPS + 1}").exists()


def test_max_steps_inside_an_epoch_is_the_end_of_a_resumed_run_too(tmp_path):
    """transformers would take one more step before it looks at `max_steps`."""
    common = {"per_device_train_batch_size": 4, "max_steps": 5, "save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(tmp_path, **common)
    whole.train()
    resumed = make_trainer(tmp_path, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-5"))
    assert resumed.state.global_step == 5
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(resumed)[name]), name


def test_an_evaluation_does_not_change_the_training(tmp_path):
    common = {"per_device_train_batch_size": 4, "max_steps": 4, "model_config": {"attention_dropout": 0.3}}
    plain = make_trainer(tmp_path / "a", **common)
    plain.train()
    evaluated = make_trainer(tmp_path / "b", **common, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    evaluated.train()
    assert steps_of(plain) == steps_of(evaluated)


@pytest.mark.parametrize("damage", ["cut", "removed", "marker", "all"])
def test_a_damaged_checkpoint_falls_back_to_an_earlier_one(tmp_path, finished, damage, capfd):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    checkpoints = [folder / f"out/checkpoint-{step}" for step in range(2, STEPS + 1, 2) if step]
    for checkpoint in (path for path in checkpoints if path.exists()):
        if checkpoint.name == f"checkpoint-{STEPS}" or damage == "all":
            if damage in ("cut", "all"):
                os.truncate(checkpoint / "adapter_model.safetensors", 50)
            elif damage == "removed":
                (checkpoint / "optimizer.pt").unlink()
            else:
                (checkpoint / MARKER).write_text("[]")
    assert cli(folder, "train", "c.yml") == 0
    assert "Not resuming from a broken checkpoint" in capfd.readouterr().err
    assert same_adapter(folder, finished)


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    make_trainer(tmp_path / "a", **args, model_config={"hidden_size": 64}).train()
    small = make_trainer(tmp_path / "b", **args)
    with pytest.raises(ModelError, match=r"another base model.*`hidden_size` is 64.*but 32 here"):
        small.train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-2"))


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    make_trainer(tmp_path, rows=make_rows(16), **args).train()
    other = make_trainer(tmp_path, rows=make_rows(16), **{**args, "optim": "adafactor", "max_steps": 4})
    with pytest.raises(CheckpointError, match="another optimizer than `optimizer: adafactor`"):
        other.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))


@pytest.mark.parametrize("damage", ["flip", "cut", "removed"])
def test_a_damaged_cache_is_built_again(tmp_path, finished, damage, capfd):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (table,) = (folder / "prepared").glob("*/*.arrow")
    whole = table.read_bytes()
    if damage == "flip":
        middle = len(whole) // 2
        table.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    elif damage == "cut":
        os.truncate(table, len(whole) // 2)
    else:
        table.unlink()
    assert cli(folder, "train", "c.yml", "--output-dir", "again") == 0
    assert capfd.readouterr().err.count("is damaged") == 1
    (rebuilt,) = (folder / "prepared").glob("*/*.arrow")
    assert rebuilt.read_bytes() == whole


def test_a_model_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    (tmp_path / "model.safetensors").write_text("earlier")
    with pytest.raises(OSError, match="full"), model_aside(tmp_path) as aside:
        aside.mkdir()
        (aside / "model.safetensors").write_text("hal")
        raise OSError("full")
    assert (tmp_path / "model.safetensors").read_text() == "earlier"
    with model_aside(tmp_path) as aside:
        (aside / "sub").mkdir(parents=True)
        (aside / "model.safetensors").write_text("later")
        (aside / "sub/part").write_text("part")
    assert (tmp_path / "model.safetensors").read_text() == "later"
    assert (tmp_path / "sub/part").read_text() == "part"
    assert not list(tmp_path.glob(".*"))


def test_what_would_be_loaded_instead_of_a_new_model_goes(tmp_path, caplog):
    """`from_pretrained` prefers an adapter to a model, and whole weights to shards."""
    earlier = ("adapter_config.json", "adapter_model.safetensors", "model.safetensors", "tokenizer.json")
    for name in earlier:
        (tmp_path / name).write_text("earlier")
    with model_aside(tmp_path) as aside:
        aside.mkdir()
        for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json"):
            (aside / name).write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert (tmp_path / "earlier-adapter/adapter_model.safetensors").read_text() == "earlier"
    assert "adapter of an earlier run" in caplog.text


def test_a_new_adapter_leaves_the_model_of_an_earlier_run(tmp_path):
    (tmp_path / "model.safetensors").write_text("earlier")
    with model_aside(tmp_path) as aside:
        aside.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (aside / name).write_text("new")
    assert (tmp_path / "model.safetensors").read_text() == "earlier"
    assert (tmp_path / "adapter_config.json").read_text() == "new"


def test_a_model_half_written_by_a_killed_process_is_removed(tmp_path):
    (tmp_path / ".model.writing").mkdir()
    (tmp_path / "model.safetensors").write_text("earlier")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_does_not_end_a_run_for_its_log(capsys):
    tee = Tee(sys.stdout, open("/dev/full", "w", buffering=1))  # noqa: SIM115 - the Tee closes it
    tee.write("first\n")
    tee.write("second\n")
    tee.flush()
    said = capsys.readouterr().out
    assert "first\nThe log /dev/full cannot be written any more" in said
    assert said.endswith("second\n")
