"""What the CPU does between two optimizer steps on a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from axolotl.monkeypatch.attention.documents import add_document_hook, find_documents_once, register_masks
from tests.integration.training_runs import make_trainer, steps_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def make(folder, *, padded=False, **args):
    lengths = [32 - (number % 7 if padded else 0) for number in range(48)]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 384, (length,), generator=generator).tolist() for length in lengths]
    rows = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": [[1] * length for length in lengths],
        "position_ids": [list(range(length)) for length in lengths],
    }
    trainer = make_trainer(
        folder,
        rows=Dataset.from_dict(rows),
        use_cpu=False,
        dataloader_pin_memory=True,
        optim="adamw_torch_fused",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=10,
        save_strategy="no",
        **args,
    )
    # As the loader of models does, so that transformers need not look for documents.
    register_masks()
    find_documents_once()
    add_document_hook(trainer.model, varlen=False)
    return trainer


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("lora", [None, {}])
def test_nothing_waits_for_the_gpu_but_the_one_read_of_a_step(tmp_path, lora, padded):
    trainer = make(tmp_path, lora=lora, padded=padded)
    said: list[str] = []

    class Listens(TrainerCallback):
        """From the first step on that begins with loaded micro-batches to the last that has a next one."""

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("warn" if 2 <= state.global_step <= 7 else "default")

    trainer.add_callback(Listens())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, _, file, line, *__: said.append(f"{file}:{line}: {message}")
            trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # That read waits for an event, which the debug mode does not count.
    assert [line for line in said if "called a synchronizing" in line] == []
    assert len(steps_of(trainer)) == 10


def test_a_step_left_out_on_the_gpu_changes_nothing(tmp_path):
    trainer = make(tmp_path, non_finite_policy="skip")
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        compute_loss(*args, **kwargs) * (float("nan") if trainer.state.global_step == 4 else 1.0)
    )
    weights = {}

    class Keeps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights[state.global_step] = [weight.detach().clone() for weight in trainer.model.parameters()]

    trainer.add_callback(Keeps())
    trainer.train()
    assert trainer.nonfinite.num_skipped == 1
    changed = [
        any(not torch.equal(before, after) for before, after in zip(weights[step], weights[step + 1], strict=True))
        for step in range(1, 10)
    ]
    assert changed == [step != 4 for step in range(1, 10)]
