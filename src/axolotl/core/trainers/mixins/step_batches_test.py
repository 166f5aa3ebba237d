"""Steps that are loaded ahead: what a run does, and in which order, is what transformers' own loop does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainerCallback, masking_utils

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.trainers.gradient_sums import MAX_SHARE
from axolotl.core.trainers.mixins import step_batches
from axolotl.core.trainers.utils import HostValues
from axolotl.monkeypatch.attention.documents import add_document_hook, find_documents_once, register_masks
from axolotl.utils.collators.batching import DataCollatorForSeq2Seq
from axolotl.utils.data.bins import BinDataset
from tests.integration.training_runs import make_rows, make_trainer, run_on_ranks, steps_of

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Diary(TrainerCallback):
    """Every event of a run and every batch that the model was given, in their order."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        for name in EVENTS:
            setattr(self, name, self._writer(name))

    def _writer(self, name: str):
        def write(args, state, control, logs=None, **kwargs):
            logged = {
                key: value for key, value in (logs or {}).items() if "per_sec" not in key and "runtime" not in key
            }
            self.entries.append((name, state.global_step, state.epoch, control.should_log, control.should_save, logged))

        return write

    def watch(self, trainer: Trainer) -> Trainer:
        trainer.add_callback(self)
        trainer.model.register_forward_pre_hook(
            lambda module, given, named: self.entries.append(named["input_ids"].tolist()), with_kwargs=True
        )
        return trainer


class PlainLoop(AxolotlTrainer):
    """Our losses in transformers' own loop: every step is loaded when it begins, and every number read when it is asked for."""

    _run_epoch = Trainer._run_epoch
    _maybe_log_save_evaluate = Trainer._maybe_log_save_evaluate

    def load_next_step(self) -> None:
        pass

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)
        return super().get_batch_samples(iter(batches), num_batches, device)[0], num_items


def run(folder: Path, loop: type[AxolotlTrainer], resume: int | None = None, **args: Any) -> Diary:
    """Two epochs of 11 micro-batches, 4 to a step, so that the last step of an epoch has 3; evaluations and checkpoints between."""
    common = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "model_config": {"attention_dropout": 0.2},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = make_trainer(folder, **{**common, **args})
    trainer.__class__ = loop
    diary = Diary()
    diary.watch(trainer)
    trainer.train(resume_from_checkpoint=resume and str(folder / "out" / f"checkpoint-{resume}"))
    diary.steps = steps_of(trainer)
    return diary


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"dataloader_num_workers": 1},
        {"max_steps": 5},
        {"packed": True, "per_device_train_batch_size": 1},
        {"train_sampling_strategy": "group_by_length", "logging_steps": 2, "max_grad_norm": 0.0},
    ],
    ids=["rows", "workers", "max_steps", "packed", "by length"],
)
def test_events_batches_and_numbers_are_those_of_transformers_loop(tmp_path, args):
    ours, theirs = (run(tmp_path / loop.__name__, loop, **args) for loop in (AxolotlTrainer, PlainLoop))
    assert ours.entries == theirs.entries
    assert ours.steps == theirs.steps
    for step in (1, 3):  # within an epoch, and at its border
        ours, theirs = (run(tmp_path / loop.__name__, loop, step, **args) for loop in (AxolotlTrainer, PlainLoop))
        assert ours.entries == theirs.entries
        assert ours.steps == theirs.steps


def test_every_step_but_the_first_of_an_epoch_is_ready_before_the_update(tmp_path):
    class Watch(TrainerCallback):
        ready: list[bool] = []
        devices: list[Any] = []

        def on_optimizer_step(self, args, state, control, train_dataloader=None, **kwargs):
            self.ready.append(trainer._next_step is not None)
            self.devices.append(train_dataloader.device)

    trainer = make_trainer(
        tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_steps=6, callbacks=[Watch()]
    )
    trainer.train()
    assert Watch.ready == [True, True, True, False, True, False]  # four steps to an epoch, and the sixth is the last
    assert set(Watch.devices) == {trainer.args.device}
    assert trainer._next_step is None and trainer._epoch_iterator is None


class DrawsCollator(DataCollatorForSeq2Seq):
    def __call__(self, features, return_tensors=None):
        torch.rand(1)
        return super().__call__(features, return_tensors)


class OwnBatches(AxolotlTrainer):
    def get_batch_samples(self, *args, **kwargs):
        return super().get_batch_samples(*args, **kwargs)


def may_load_ahead(trainer: AxolotlTrainer) -> bool:
    return trainer._may_load_ahead(trainer.get_train_dataloader())


def test_batches_are_loaded_ahead_only_where_it_makes_no_difference(tmp_path):
    trainer = make_trainer(tmp_path)
    assert may_load_ahead(trainer)
    assert not trainer._may_load_ahead(Trainer.get_train_dataloader(trainer))
    trainer.__class__ = OwnBatches
    assert not may_load_ahead(trainer)

    draws = make_trainer(tmp_path)
    draws.data_collator = DrawsCollator(draws.processing_class)
    assert not may_load_ahead(draws)
    draws.args.dataloader_num_workers = 1  # which draws from generators of its own
    assert may_load_ahead(draws)

    transformed = make_trainer(
        tmp_path, rows=make_rows().with_transform(lambda rows: rows), remove_unused_columns=False
    )
    assert not may_load_ahead(transformed)


def test_what_is_wrong_with_the_next_batch_is_said_when_its_step_begins(tmp_path, monkeypatch):
    rows, asked = BinDataset.__getitems__, []

    def broken(self, batch):
        asked.append(batch)
        if len(asked) == 5:
            raise ValueError("row 5 is broken")
        return rows(self, batch)

    monkeypatch.setattr(BinDataset, "__getitems__", broken)
    trainer = make_trainer(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=1, save_strategy="steps"
    )
    with pytest.raises(ValueError, match="row 5 is broken"):
        trainer.train()
    assert trainer.state.global_step == 1 and len(steps_of(trainer)) == 1
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


def broken_on_second_rank(folder: Path) -> Any:
    """A run whose second rank cannot load its second step: its error, and how far it came."""
    torch.set_num_threads(1)
    rows, asked = BinDataset.__getitems__, []

    def broken(self, batch):
        asked.append(batch)
        if dist.get_rank() == 1 and len(asked) == 4:
            raise ValueError("row 4 is broken")
        return rows(self, batch)

    BinDataset.__getitems__ = broken  # in a process of its own
    trainer = make_trainer(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    try:
        trainer.train()
    except (ValueError, RuntimeError) as error:  # the first rank misses the second
        return [type(error).__name__, trainer.state.global_step]
    return None


def test_a_rank_that_cannot_load_its_next_step_does_not_leave_the_others_waiting(tmp_path):
    run_on_ranks(broken_on_second_rank, tmp_path)
    assert json.loads((tmp_path / "rank1" / "result.json").read_text()) == ["ValueError", 1]


class ChangesAccumulation(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        args.gradient_accumulation_steps = {1: 2, 2: 1, 4: 3}.get(state.global_step, args.gradient_accumulation_steps)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_accumulation_that_a_callback_changes_takes_no_batch_twice_and_leaves_none_out(tmp_path, num_workers):
    args = {
        "callbacks": [ChangesAccumulation()],
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": num_workers,
    }
    ours, theirs = (run(tmp_path / loop.__name__, loop, **args) for loop in (AxolotlTrainer, PlainLoop))
    assert ours.entries == theirs.entries
    assert ours.steps == theirs.steps


class LogsWithinStep(TrainerCallback):
    trainer: Trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer.log({"loss": 0.0})


def test_a_line_that_is_logged_within_a_step_leaves_its_loss_to_the_next_line(tmp_path):
    callback = LogsWithinStep()
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=4, callbacks=[callback])
    callback.trainer = trainer
    trainer.train()
    each = make_trainer(tmp_path, max_steps=4, logging_steps=1)
    each.train()
    losses = [loss for loss, _ in steps_of(each)]
    lines = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert lines == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])


class SeesGradients(AxolotlTrainer):
    """As a class of a user with a loss of its own that depends on the gradients of the micro-batches before."""

    seen: list[bool]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen.append(any(parameter.grad is not None for parameter in model.parameters()))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_a_loss_of_somebody_else_sees_the_gradients_so_far(tmp_path):
    trainer = make_trainer(
        tmp_path,
        lora={"r": 1, "target_modules": ["q_proj"]},
        gradient_accumulation_steps=3,
        per_device_train_batch_size=2,
        max_steps=2,
    )
    trainable, total = trainer.model.get_nb_trainable_parameters()
    assert trainable < MAX_SHARE * total
    trainer.__class__ = SeesGradients
    trainer.seen = []
    trainer.train()
    assert trainer.seen == [False, True, True] * 2


def test_values_are_read_once_and_anew_when_they_have_changed():
    values = HostValues()
    loss, counts, norm = torch.tensor(0.1), torch.tensor([2**40 + 1, 3]), torch.tensor(0.3, dtype=torch.bfloat16)
    values.send(loss, counts, norm)
    values.receive()
    assert (values.of(loss), values.of(counts), values.of(norm)) == ([loss.item()], [2**40 + 1, 3], [norm.item()])
    loss += 1
    assert values.of(loss) == [loss.item()]
    assert values.of(counts.clone()) == [2**40 + 1, 3]
    values.send(norm)
    values.receive()
    counts[1] = 4
    assert values.of(counts) == [2**40 + 1, 4]


READS = {
    "__bool__",
    "__contains__",
    "__float__",
    "__index__",
    "__int__",
    "cpu",
    "equal",
    "is_nonzero",
    "item",
    "nonzero",
}
READS |= {"numpy", "to_list", "tolist", "unique"}


class Reads(TorchFunctionMode):
    """What asks tensors for their values, for which a CPU would wait for its GPU."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
def test_no_value_is_read_between_the_batch_and_its_gradients(tmp_path, monkeypatch, attention, packed, lora):
    def run_once(folder, hooked):
        config = {"sliding_window": 8, "attn_implementation": attention}
        trainer = make_trainer(
            folder, architecture="mistral", model_config=config, lora=lora, packed=packed, max_steps=4,
            per_device_train_batch_size=3 if not packed else 1, gradient_accumulation_steps=2,
        )  # fmt: skip
        base = trainer.model.get_base_model() if lora is not None else trainer.model
        for model in dict.fromkeys((base, trainer.model)) if hooked else ():
            add_document_hook(model, varlen=False)
        found = []
        training_step = trainer.training_step

        def watched(*args, **kwargs):
            if trainer.state.global_step == 0:  # at the first batch the output head is found
                return training_step(*args, **kwargs)
            with Reads(found):
                return training_step(*args, **kwargs)

        trainer.training_step = watched
        trainer.train()
        return steps_of(trainer), found

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", masking_utils.find_packed_sequence_indices)
    plain, _ = run_once(tmp_path / "plain", hooked=False)
    register_masks()
    find_documents_once()
    told, found = run_once(tmp_path / "told", hooked=True)
    assert found == []
    monkeypatch.setattr(step_batches, "read_batch", lambda batch: None)
    untold, found = run_once(tmp_path / "untold", hooked=True)
    assert "tolist" in found, "the test sees what it looks for"
    assert told == untold == plain
