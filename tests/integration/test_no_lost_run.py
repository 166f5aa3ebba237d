"""No run is lost: killed at any point, disks that fill or vanish, saves in the background, bytes that decay."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from axolotl.cli.utils.errors import explain_error
from axolotl.core import host_copy
from axolotl.core.checkpoint import (
    MARKER,
    check_checkpoint,
    find_last_whole_checkpoint,
    list_checkpoints,
    resolve_checkpoint,
)
from axolotl.core.resume import later_checkpoints
from axolotl.core.trainers.mixins import checkpoints as mixin
from axolotl.core.trainers.mixins.checkpoints import CheckpointSaveMixin
from axolotl.exceptions import CheckpointError, OutputError
from axolotl.run import signals
from axolotl.train import execute_training, save_trained_model, setup_signal_handler
from axolotl.utils.dict import DictDefault
from tests.integration import killed_runs
from tests.integration.test_non_finite import Bad
from tests.integration.training_runs import CommandLine, make_rows, make_trainer, run_on_ranks, steps_of, weights_of


def make(folder: Path, **args):
    common = {
        "rows": make_rows(16),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "model_config": {"attention_dropout": 0.2},
    }
    return make_trainer(folder, **{**common, **args})


@pytest.fixture
def all_in_background(monkeypatch):
    """Tiny files go the way of large ones."""
    monkeypatch.setattr(host_copy, "SMALL_BYTES", 0)


# ---- two runs, one folder


class StopAt(TrainerCallback):
    """Raises an error after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("stopped here")


def test_a_run_in_the_folder_of_an_earlier_one_keeps_its_own_checkpoints(tmp_path):
    """The earlier run has higher steps; it is the one that makes room, and not the one that is gone on from."""
    make(tmp_path, max_steps=6, save_total_limit=2).train()
    whole = make(tmp_path / "whole", max_steps=6, learning_rate=2e-3)
    whole.train()
    args = {"max_steps": 6, "save_total_limit": 2, "learning_rate": 2e-3}
    with pytest.raises(RuntimeError, match="stopped here"):
        make(tmp_path, callbacks=[StopAt(3)], **args).train()
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]
    again = make(tmp_path, **args)
    again.train(resume_from_checkpoint=str(resolve_checkpoint(None, tmp_path / "out", auto=True)))
    assert steps_of(again) == steps_of(whole)


def test_going_on_from_an_earlier_checkpoint_leaves_the_later_ones_behind(tmp_path):
    make(tmp_path, max_steps=5).train()
    out = tmp_path / "out"
    said = later_checkpoints(out, out / "checkpoint-2")
    assert said is not None and "3 checkpoints, the last of them checkpoint-5, of an earlier run" in said
    assert later_checkpoints(out, out / "checkpoint-5") is None
    with pytest.raises(RuntimeError, match="stopped here"):
        make(tmp_path, max_steps=5, callbacks=[StopAt(3)]).train(resume_from_checkpoint=str(out / "checkpoint-2"))
    names = [path.name for path in list_checkpoints(out)]
    assert names == [f"checkpoint-{step}" for step in (1, 2, 4, 5, 3)]
    assert find_last_whole_checkpoint(out) == out / "checkpoint-3"


def test_checkpoints_of_other_programs_come_before_ours(tmp_path):
    out = tmp_path / "out"
    for step in (100, 300):
        (out / f"checkpoint-{step}").mkdir(parents=True)
        (out / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    make(tmp_path, max_steps=2).train()
    names = [path.name for path in list_checkpoints(out)]
    assert names == [f"checkpoint-{step}" for step in (100, 300, 1, 2)]


class BestAt(TrainerCallback):
    """Gives evaluations a metric that is highest at a step."""

    def __init__(self, step: int):
        self.step = step

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_worth"] = -abs(state.global_step - self.step)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "worth",
    "greater_is_better": True,
}


def test_the_best_model_is_none_of_an_earlier_run(tmp_path):
    make(tmp_path, max_steps=4).train()
    trainer = make(tmp_path, max_steps=4, save_steps=2, callbacks=[BestAt(3)], **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 3  # which this run has not saved, but the other has
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out/checkpoint-2")


def test_the_best_model_is_found_when_the_folder_has_moved(tmp_path):
    best = BEST | {"callbacks": [BestAt(2)]}
    whole = make(tmp_path / "a", **best)
    whole.train()
    (tmp_path / "b").mkdir()
    shutil.move(tmp_path / "a/out", tmp_path / "b/out")
    moved = make(tmp_path / "b", **best)
    moved.train(resume_from_checkpoint=str(tmp_path / "b/out/checkpoint-4"))
    assert moved.state.best_model_checkpoint == str(tmp_path / "b/out/checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(weights_of(whole).values(), weights_of(moved).values(), strict=True))


# ---- killed


def kill_runs(folder: Path, *options: str) -> dict[str, int]:
    """Run `killed_runs`. Returns its counts."""
    # Memory takes the files where it can: a kill loses no page of it either, and nothing waits for a disk.
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else folder
    place = base / f"killed-{os.getpid()}-{folder.name}"
    try:
        output = CommandLine(str(place), *options, folder=folder, program=killed_runs.main).finish(timeout=560)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("in_background", [False, True], ids=["waiting", "background"])
def test_killed_at_every_operation_and_at_random(tmp_path, in_background):
    """Each point of the protocol at which a run can die, then moments that nobody chose."""
    mode = ["--async-save"] if in_background else []
    counts = kill_runs(tmp_path, "--random", "25", "--operations", "45", *mode)
    assert counts["kills"] + counts["terms"] >= 50
    assert counts["inside_a_save"] >= 20


@pytest.mark.parametrize("kind", ["8-bit optimizer", "stream"])
def test_killed_while_saving_in_the_background(tmp_path, kind):
    if kind == "8-bit optimizer":
        pytest.importorskip("bitsandbytes")
    counts = kill_runs(tmp_path, "--random", "6", "--operations", "12", "--async-save", "--kind", kind)
    assert counts["kills"] + counts["terms"] >= 12
    assert counts["inside_a_save"] >= 5
    assert counts["finished"] >= 1


# ---- in the background


KINDS = {
    "full": {},
    "lora": {"lora": {"lora_dropout": 0.1}},
    "packed": {"packed": True, "per_device_train_batch_size": 1},
    "adafactor": {"optim": "adafactor"},
    "8_bit_optimizer": {
        "optim": "adamw_bnb_8bit",
        "model_config": {"hidden_size": 64, "intermediate_size": 128, "attention_dropout": 0.2},
    },
    "best": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1},
    "model_only": {"save_only_model": True},
    "bf16_weights": {"model_config": {"dtype": torch.bfloat16}},
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_files_of_a_background_save_are_those_of_one_that_waits(tmp_path, kind, all_in_background):
    if "8_bit" in kind:
        pytest.importorskip("bitsandbytes")
    trainers = []
    for in_background in (False, True):
        # The path is in the files, so both runs have the same.
        trainer = make(tmp_path / "run", async_save=in_background, **KINDS[kind])
        trainer.train()
        assert (trainer.why_saves_wait() is None) is in_background
        shutil.move(tmp_path / "run/out", tmp_path / f"out-{in_background}")
        trainers.append(trainer)
    waiting, background = tmp_path / "out-False", tmp_path / "out-True"
    names = [path.name for path in list_checkpoints(waiting)]
    assert names
    assert [path.name for path in list_checkpoints(background)] == names
    times = ("eval_runtime", "_per_second", "per_sec_per_gpu", "train_runtime")
    for name in names:
        check_checkpoint(background / name, content=True)
        ours, theirs = contents(background / name), contents(waiting / name)
        assert ours.keys() == theirs.keys()
        for file in ours.keys() - {MARKER, "training_args.bin", "trainer_state.json"}:
            assert ours[file] == theirs[file], f"{name}/{file}"
        states = [json.loads(found["trainer_state.json"]) for found in (ours, theirs)]
        for state in states:
            for entry in state["log_history"]:
                for key in [key for key in entry if any(word in key for word in times)]:
                    del entry[key]
        assert states[0] == states[1]
    for (label, a), b in zip(weights_of(trainers[0]).items(), weights_of(trainers[1]).values(), strict=True):
        assert torch.equal(a, b), label


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, all_in_background, monkeypatch):
    """The writer is held until two more steps are done; what it writes is the state of its own step."""
    steps_done, release = [], threading.Event()
    seal = mixin.seal_checkpoint

    def held_seal(folder, final):
        if final.name == "checkpoint-1":
            assert release.wait(60)
        seal(folder, final)

    monkeypatch.setattr(mixin, "seal_checkpoint", held_seal)

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps_done.append(state.global_step)
            if state.global_step == 3:
                assert not (tmp_path / "out/checkpoint-1").exists()
                release.set()

    trainer = make(tmp_path, async_save=True, save_steps=3, callbacks=[Look(), SaveAt(1)])
    trainer.train()
    whole = make(tmp_path / "whole", save_strategy="no")
    whole.train()
    for step in (1, 3):
        resumed = make(tmp_path / f"again-{step}", save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{step}"))
        assert steps_of(resumed) == steps_of(whole)


class SaveAt(TrainerCallback):
    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or state.global_step in self.steps
        return control


def test_who_reads_a_checkpoint_in_on_save_finds_it(tmp_path, all_in_background):
    found = []

    class Reader(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            check_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", content=True)
            found.append(state.global_step)

    trainer = make(tmp_path, async_save=True, callbacks=[Reader()])
    assert trainer.why_saves_wait() == "Reader.on_save may read the checkpoint"
    trainer.train()
    assert found == [1, 2, 3, 4]


def test_memory_that_is_short_makes_the_save_wait(tmp_path, all_in_background, monkeypatch):
    monkeypatch.setattr(mixin, "free_host_memory", lambda: 100)
    trainer = make(tmp_path, async_save=True, max_steps=1)
    assert "GiB are free" in trainer.why_saves_wait()
    trainer.train()
    check_checkpoint(tmp_path / "out/checkpoint-1", content=True)


def test_a_background_save_that_fails_is_made_up_for(tmp_path, all_in_background, monkeypatch, caplog):
    """The disk was full for a moment: the next step saves again, and waits for it."""
    seal = mixin.seal_checkpoint
    broken = ["checkpoint-1"]

    def failing_seal(folder, final):
        if final.name in broken:
            broken.remove(final.name)
            raise OSError(28, "No space left on device")
        seal(folder, final)

    class Fails(TrainerCallback):
        """The writer has failed before the second step ends, however long it takes."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.checkpoint_writer.wait()

    monkeypatch.setattr(mixin, "seal_checkpoint", failing_seal)
    trainer = make(tmp_path, async_save=True, save_steps=4, callbacks=[SaveAt(1), Fails()])
    trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-4"]
    assert "The checkpoint of step 1 could not be written" in caplog.text


def test_an_exception_waits_for_the_writer(tmp_path, all_in_background, monkeypatch):
    seal = mixin.seal_checkpoint

    def slow_seal(folder, final):
        time.sleep(0.3)
        seal(folder, final)

    monkeypatch.setattr(mixin, "seal_checkpoint", slow_seal)

    class Raises(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise ValueError("mine")

    trainer = make(tmp_path, async_save=True, callbacks=[Raises()])
    cfg = DictDefault(output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="mine") as raised:
        execute_training(cfg, trainer, None)
    assert find_last_whole_checkpoint(tmp_path / "out").name == "checkpoint-1"
    said = explain_error(raised.value)
    assert "Raises.on_step_end at step 2" in said
    assert "are whole" in said


# ---- disks


def is_mounted(folder: Path, *options: str) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    if not is_mounted(disk, "-t", "tmpfs", "-o", "size=700k", "tmpfs"):
        pytest.skip("this machine does not let tests mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.parametrize("in_background", [False, True], ids=["waiting", "background"])
def test_a_full_disk_saves_elsewhere_and_says_where(
    tmp_path, small_disk, in_background, all_in_background, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    trainer = make(tmp_path, output_dir=str(small_disk / "out"), async_save=in_background, max_steps=8)
    with pytest.raises(OutputError) as raised:
        trainer.train()
    step = trainer.state.global_step
    place = tmp_path / f"tmp/out-rescued/checkpoint-{step}"
    said = str(raised.value)
    assert f"step {step} could not be written to {small_disk / 'out'}" in said
    assert str(place) in said
    check_checkpoint(place, content=True)
    for checkpoint in list_checkpoints(small_disk / "out"):
        check_checkpoint(checkpoint, content=True)
    assert list_checkpoints(small_disk / "out")
    assert not list((small_disk / "out").glob(".checkpoint*"))
    assert not (small_disk / "out-rescued").exists()
    resumed = make(tmp_path / "again", max_steps=8, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(place))
    whole = make(tmp_path / "whole", max_steps=8, save_strategy="no")
    whole.train()
    assert steps_of(resumed) == steps_of(whole)


def test_a_file_size_limit_is_a_full_disk(tmp_path, monkeypatch):
    """Nothing can be written anywhere: the message says what was tried, and earlier checkpoints stay."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limit(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))

    trainer = make(tmp_path, callbacks=[Limit()])
    try:
        with pytest.raises(OutputError, match=r"step 2 could not be written to .*Nor could it be written to"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    check_checkpoint(tmp_path / "out/checkpoint-1", content=True)
    assert not (tmp_path / "out-rescued").exists()


@pytest.mark.parametrize("loss", ["deleted", "unmounted", "read_only"])
def test_an_output_that_goes_away_is_named(tmp_path, loss, request):
    disk = tmp_path / "disk"
    disk.mkdir()
    if loss != "deleted":
        if not is_mounted(disk, "-t", "tmpfs", "-o", "size=20m", "tmpfs"):
            pytest.skip("this machine does not let tests mount a small file system")
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False))

    class Lose(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                if loss == "deleted":
                    shutil.rmtree(disk / "out")
                elif loss == "unmounted":
                    subprocess.run(["umount", "-l", str(disk)], check=True)
                    (disk / "out").mkdir()
                else:
                    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    trainer = make(tmp_path, output_dir=str(disk / "out"), callbacks=[Lose()])
    reason = {"deleted": "is gone", "unmounted": "mount was lost", "read_only": "Read-only file system"}[loss]
    with pytest.raises(OutputError, match=f"step 2 could not be written to .*{reason}.* instead") as raised:
        trainer.train()
    rescued = Path(str(raised.value).partition("It was written to ")[2].partition(" instead")[0])
    check_checkpoint(rescued, content=True)
    if loss == "read_only":
        shutil.rmtree(rescued.parent)  # in the folder for temporary files


def test_the_trained_model_is_saved_elsewhere_too(tmp_path):
    trainer = make(tmp_path, save_strategy="no", max_steps=1)
    trainer.train()
    shutil.rmtree(tmp_path / "out")
    cfg = DictDefault(output_dir=str(tmp_path / "out"))
    with pytest.raises(OutputError, match=r"The trained model could not be written .* is gone.* instead"):
        save_trained_model(cfg, trainer, trainer.model)
    assert (tmp_path / "out-rescued/model.safetensors").is_file()


# ---- two ranks


def train_and_lose_the_output(folder: Path, resume: Path | None) -> None:
    """On a rank: what it has seen is left in `said.json` of its folder. Its output lies beside that folder."""
    host_copy.SMALL_BYTES = 0
    tempfile.tempdir = str(folder.parent)
    out = folder.parent.parent
    trainer = make(out, async_save=True, max_steps=5, save_steps=1, ddp_backend="gloo", save_total_limit=2)
    rank = trainer.args.process_index
    if rank == 1:
        trainer.add_callback(Bad(trainer, [3]))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    weights = weights_of(trainer).values()
    said = {"skipped": trainer.nonfinite.num_skipped, "sum": sum(w.double().sum().item() for w in weights)}
    if rank == 0:
        shutil.rmtree(out / "out")
    try:
        torch.distributed.barrier()
        trainer._save_checkpoint(trainer.model)
    except OutputError as error:
        said["error"] = str(error)
    (folder / "said.json").write_text(json.dumps(said))


def test_two_ranks_decide_alike(tmp_path):
    """A loss that is bad on one of them, saves in the background, and an output that goes away under the one that writes."""
    said = []
    for name, resume in (("first", None), ("resumed", tmp_path / "out-rescued/checkpoint-5")):
        run_on_ranks(partial(train_and_lose_the_output, resume=resume), tmp_path / name)
        said.append([json.loads((tmp_path / name / f"rank{rank}/said.json").read_text()) for rank in (0, 1)])
    for zero, one in said:
        assert (zero["skipped"], zero["sum"]) == (one["skipped"], one["sum"])
        assert zero["skipped"] == 1
        assert "is gone" in zero["error"]
        assert "out-rescued/checkpoint-5 instead" in zero["error"]
        assert "rank 0: " in one["error"]
    assert said[0][0]["sum"] == said[1][0]["sum"]  # resumed at the end, nothing was left to train
    check_checkpoint(tmp_path / "out-rescued/checkpoint-5", content=True)
    names = {path.name for path in (tmp_path / "out-rescued/checkpoint-5").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= names


# ---- decay, and checkpoints of others


def test_a_flipped_byte_is_noticed(tmp_path, caplog):
    make(tmp_path).train()
    out = tmp_path / "out"
    weights = out / "checkpoint-4/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    check_checkpoint(out / "checkpoint-4")  # the size is right
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was saved"):
        check_checkpoint(out / "checkpoint-4", content=True)
    assert resolve_checkpoint(True, out) == out / "checkpoint-3"
    assert resolve_checkpoint(out / "checkpoint-4", out) == out / "checkpoint-3"
    assert "is not what was saved" in caplog.text


def test_a_marker_without_digests_is_taken_by_its_sizes(tmp_path):
    make(tmp_path, max_steps=1).train()
    folder = tmp_path / "out/checkpoint-1"
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({"files": marker["files"]}))
    assert resolve_checkpoint(True, tmp_path / "out") == folder
    os.truncate(folder / "optimizer.pt", 10)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        resolve_checkpoint(True, tmp_path / "out")


def test_a_checkpoint_of_the_plain_trainer_can_be_resumed_from(tmp_path, caplog):
    ours = make(tmp_path / "ours", save_strategy="no")
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    plain = Trainer(
        model=ours.model,
        args=args,
        train_dataset=ours.train_dataset,
        data_collator=ours.data_collator,
        processing_class=ours.processing_class,
    )
    plain.train()
    folder = resolve_checkpoint(tmp_path / "out/checkpoint-2", tmp_path / "out")
    assert "was written by another program" in caplog.text
    resumed = make(tmp_path / "again", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.state.global_step == 4


def test_a_model_alone_is_refused(tmp_path):
    make(tmp_path, save_only_model=True, max_steps=1).train()
    for resume, auto in ((True, False), (None, True), (tmp_path / "out/checkpoint-1", False)):
        with pytest.raises(CheckpointError, match="`save_only_model: true`"):
            resolve_checkpoint(resume, tmp_path / "out", auto=auto)


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_stop_after_the_step(tmp_path, number, monkeypatch):
    monkeypatch.setattr(signals, "SAME_WISH_SECONDS", 60)  # a machine at work may let more than one second pass

    class Send(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # what a launcher passes on at once is the same wish

    trainer = make(tmp_path, callbacks=[Send()], save_strategy="no")
    inherited = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests in the background may ignore it
    before = setup_signal_handler(DictDefault(output_dir=str(tmp_path / "out")), trainer)
    try:
        trainer.train()
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
        signal.signal(number, inherited)
    assert trainer.stop_agreed
    assert trainer.stop_signal == number
    assert 2 <= trainer.state.global_step <= 3
    check_checkpoint(tmp_path / f"out/checkpoint-{trainer.state.global_step}", content=True)


def test_an_ignored_hangup_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = make(tmp_path, max_steps=1)
        restore = setup_signal_handler(DictDefault(output_dir=str(tmp_path)), trainer)
        for number, handler in restore.items():
            signal.signal(number, handler)
        assert signal.SIGHUP not in restore
    finally:
        signal.signal(signal.SIGHUP, before)


def test_trainers_of_users_that_override_saving_wait(tmp_path, all_in_background):
    trainer = make(tmp_path, async_save=True, max_steps=1)

    class Theirs(type(trainer)):
        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)

    trainer.__class__ = Theirs
    assert isinstance(trainer, CheckpointSaveMixin)
    assert trainer.why_saves_wait() == "Theirs.save_model may read the checkpoint"
