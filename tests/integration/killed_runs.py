"""Kill training runs, again and again, and see that they always resume and end as if nobody had killed them.

    python -m tests.integration.killed_runs FOLDER --random 200 --async-save
    python -m tests.integration.killed_runs FOLDER --operations 80
    python -m tests.integration.killed_runs FOLDER --random 20 --async-save --kind stream

One process imports everything and makes the model; each run is a fork of it, so that a kill costs a fraction of a second. With
`--random` a run is killed (SIGKILL, or SIGTERM) after a random time; with `--operations` the first run kills itself before
its first file operation, the next before its second, and so on, so that every point of a save is one at which a run died.
A run that was killed is resumed; one that finished is compared with the uninterrupted one, and another is begun. Prints one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from axolotl.core import host_copy
from axolotl.core.checkpoint import (
    check_checkpoint,
    find_last_whole_checkpoint,
    list_checkpoints,
    remove_leftovers,
    step_of,
)
from axolotl.train import exit_if_signalled, setup_signal_handler
from axolotl.utils.data.streaming import wrap_streaming_dataset
from axolotl.utils.dict import DictDefault
from axolotl.utils.garbage import set_aside
from tests.integration.training_runs import make_rows, make_trainer, steps_of, weights_of
from tests.tiny import make_tiny_model

STEPS = 40
LIFE_SECONDS = 0.4  # a run is killed within this time from its first step
# What is trained: arguments of the trainer, and sizes of the model.
KINDS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "rows": ({}, {}),
    # Weights of this size have states in 8 bits; those of smaller ones are in 32.
    "8-bit optimizer": ({"optim": "adamw_bnb_8bit"}, {"hidden_size": 64, "intermediate_size": 128}),
    "stream": ({"ignore_data_skip": True, "packed": True}, {}),
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def texts_as_a_stream(tokenizer: Any) -> Any:
    """Texts that are packed as they come."""
    cfg = DictDefault(
        sequence_len=64, micro_batch_size=2, sample_packing=True, seed=1, streaming_multipack_buffer_size=9
    )
    cfg.pretraining_dataset = [{"type": "pretrain"}]
    texts = Dataset.from_list([{"text": f"text {number} " * (1 + number % 30)} for number in range(25)])
    return wrap_streaming_dataset(texts, tokenizer, cfg)


def train(
    folder: Path, model: Any, rows: Any, *, async_save: bool, kind: str, save: bool = True, callbacks: Any = ()
) -> None:
    """A run from its beginning or last checkpoint to its end; leaves its losses in `result.json`."""
    out = folder / "out"
    remove_leftovers(out)
    last = find_last_whole_checkpoint(out, content=True)
    trainer = make_trainer(
        folder,
        model=model,
        rows=rows,
        callbacks=list(callbacks),
        max_steps=STEPS,
        save_strategy="steps" if save else "no",
        save_steps=1,
        save_total_limit=2,
        per_device_train_batch_size=2,
        async_save=async_save,
        **KINDS[kind][0],
    )
    if kind == "stream":
        trainer.train_dataset = texts_as_a_stream(trainer.processing_class)
    trainer.processing_class = None  # its files would only make the runs slower
    trainer.remove_callback(PrinterCallback)
    cfg = DictDefault(output_dir=str(out))
    setup_signal_handler(cfg, trainer)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    exit_if_signalled(cfg, trainer)
    weights = zlib.crc32(b"".join(weight.numpy().tobytes() for weight in weights_of(trainer).values()))
    (folder / "result.json").write_text(json.dumps([steps_of(trainer), trainer.num_tokens_seen, weights]))


class Begun(TrainerCallback):
    """Writes a byte to a pipe when training begins."""

    def __init__(self, pipe: int, then: Callable[[], None]):
        self.pipe = pipe
        self.then = then

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.then()
        os.write(self.pipe, b".")


def die_at_operation(deadly: int, folder: Path) -> None:
    """From now on, kill this process before its `deadly`-th operation on files of a folder."""
    count = 0

    def happens(path: Any) -> None:
        nonlocal count
        if str(folder) in str(path):
            count += 1
            if count >= deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if (event == "open" and isinstance(args[2], int) and args[2] & WRITES) or event in (
            "os.rename",
            "os.mkdir",
            "os.remove",
            "os.rmdir",
        ):
            happens(args[0])

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        happens(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(audit)


def fork(work: Callable[[int], None]) -> tuple[int, int]:
    """Run `work` in a child, with a pipe to write to. Returns its id and the end to read from."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    os.close(read)
    code = 70
    try:
        work(write)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


class Kills:
    """A chain of runs that are killed.

    Args:
        folder: where they run.
        async_save: whether their checkpoints are written in the background.
        kind: a key of `KINDS`.
    """

    def __init__(self, folder: Path, *, async_save: bool, kind: str = "rows"):
        self.folder = folder
        self.how: dict[str, Any] = {"async_save": async_save, "kind": kind}
        self.model = make_tiny_model(folder / "model", attention_dropout=0.2, **KINDS[kind][1])
        self.rows = make_rows(24)
        self.counts = {"kills": 0, "terms": 0, "inside_a_save": 0, "finished": 0}
        self.last_step = 0
        set_aside()  # a collection in a fork would look at (and copy) all that was imported
        host_copy.SMALL_BYTES = 0  # the files of a tiny model go the way of large ones
        without = {**self.how, "async_save": False}
        whole, _ = fork(lambda _: train(folder / "whole", self.model, self.rows, **without, save=False))
        assert os.waitpid(whole, 0)[1] == 0
        self.expected = json.loads((folder / "whole/result.json").read_text())

    def once(self, *, sent: int, after: float = 0.0, deadly: int = 0) -> bool:
        """Start or resume a run and end it: by a signal after some time, or by itself at an operation.

        Returns:
            Whether the run finished before.
        """
        run = self.folder / "run"

        def work(pipe: int) -> None:
            begun = Begun(pipe, lambda: die_at_operation(deadly, run) if deadly else None)
            train(run, self.model, self.rows, **self.how, callbacks=[begun])

        child, pipe = fork(work)
        os.read(pipe, 1)  # empty when the run died before
        os.close(pipe)
        if not deadly:
            time.sleep(after)
            os.kill(child, sent)
        status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            self._compare()
            return True
        assert code in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM), f"the run ended with {code}"
        self._look(code)
        return False

    def _compare(self) -> None:
        ours = json.loads((self.folder / "run/result.json").read_text())
        assert ours == self.expected, "the run that was killed is not the uninterrupted one"
        shutil.rmtree(self.folder / "run")
        self.counts["finished"] += 1
        self.last_step = 0

    def _look(self, code: int) -> None:
        out = self.folder / "run/out"
        self.counts["terms" if code != -signal.SIGKILL else "kills"] += 1
        self.counts["inside_a_save"] += any(out.glob(".checkpoint-*"))
        # What a killed process was about to replace has another name until the next run puts it back.
        names = list_checkpoints(out)
        for checkpoint in names:
            check_checkpoint(checkpoint, content=True)
        last = step_of(names[-1]) if names else 0
        assert last >= self.last_step, f"the last whole checkpoint was {self.last_step} and is {last}"
        self.last_step = last


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--operations", type=int, default=0)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--kind", choices=KINDS, default="rows")
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    disable_progress_bar()
    seed = time.time_ns() if args.seed is None else args.seed
    rng = random.Random(seed)
    began = time.monotonic()
    kills = Kills(args.folder, async_save=args.async_save, kind=args.kind)
    for _ in range(args.random):
        sent = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
        kills.once(sent=sent, after=rng.uniform(0, LIFE_SECONDS))
    for deadly in range(1, args.operations + 1):
        kills.once(sent=signal.SIGKILL, deadly=deadly)
    while not kills.once(sent=signal.SIGKILL, deadly=10**9):
        pass
    print(json.dumps({**kills.counts, "seed": seed, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    os._exit(0)  # what is frozen is not freed, which some extensions complain of


if __name__ == "__main__":
    main()
