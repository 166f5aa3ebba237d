"""The loaders that transformers builds for us. What our own yield is in tests/integration."""

from __future__ import annotations

import signal
import subprocess

import psutil
import pytest

from axolotl.core.datasets.map_rows import can_fork
from tests.integration.training_runs import make_rows, make_trainer


@pytest.mark.skipif(
    not can_fork() or not hasattr(signal, "sigwaitinfo"),
    reason="on this system processes cannot be forked, or signals do not tell who sent them, as on macOS",
)
@pytest.mark.parametrize("config", ["split_batches", "dispatch_batches"])
def test_workers_of_every_loader_leave_signals_to_this_process(config, tmp_path):
    rows = make_rows(40)
    trainer = make_trainer(
        tmp_path,
        rows=rows,
        accelerator_config={config: True},
        dataloader_num_workers=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
    )
    for loader in (
        trainer.get_train_dataloader(),
        trainer.get_eval_dataloader(rows),
        trainer.get_test_dataloader(rows),
    ):
        others = set(psutil.Process().children())  # such as the server that forks ranks of other tests
        batches = iter(loader)
        next(batches)
        (worker,) = set(psutil.Process().children()) - others
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        assert 1 + len(list(batches)) == 20
