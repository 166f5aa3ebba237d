"""A loss or gradient that is not finite: what is said, what is left out, and that everything else goes on exactly."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TrainerCallback

from axolotl.core.checkpoint import find_last_whole_checkpoint
from axolotl.core.trainers.nonfinite import describe_rows, skips_by_itself
from axolotl.exceptions import TrainingStopped
from tests.integration.training_runs import make_rows, make_trainer, steps_of, weights_of


class Bad(TrainerCallback):
    """Makes the loss (or, with `what="gradient"`, a gradient) of some steps a NaN."""

    def __init__(self, trainer, steps, what="loss"):
        self.trainer, self.steps, self.what = trainer, set(steps), what
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: self.spoil(compute_loss(*args, **kwargs))

    def spoil(self, loss):
        if self.trainer.state.global_step + 1 not in self.steps or not self.trainer.model.training:
            return loss
        if self.what == "loss":
            return loss * math.nan
        return loss + _NaNGradient.apply(loss)


class _NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss * 0

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def make(folder, steps=(), what="loss", **args):
    common = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8, "rows": make_rows(16)}
    trainer = make_trainer(folder, **{**common, **args})
    if steps:
        trainer.add_callback(Bad(trainer, steps, what))
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])  # the first leaves out updates by itself
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_changes_neither_weights_nor_optimizer(tmp_path, what, optim):
    trainer = make(tmp_path, steps=[1, 3, 5, 6], what=what, non_finite_policy="skip", optim=optim)
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            optimizer = trainer.optimizer.optimizer
            assert (
                skips_by_itself(optimizer, args.device) is hasattr(optimizer, "found_inf") is (optim != "adamw_torch")
            )
            seen.setdefault(0, self.look())

        def on_step_end(self, args, state, control, **kwargs):
            assert not hasattr(trainer.optimizer.optimizer, "found_inf")
            seen[state.global_step] = self.look()

        def look(self):
            optimizer = trainer.optimizer.state_dict()["state"]
            states = {
                (index, name): value.clone() for index, state in optimizer.items() for name, value in state.items()
            }
            return weights_of(trainer), {key: value for key, value in states.items() if value.any()}

    trainer.add_callback(Look())
    trainer.train()
    for step, changed in {1: False, 2: True, 3: False, 4: True, 5: False, 6: False, 7: True}.items():
        for before, after in zip(seen[step - 1], seen[step], strict=True):
            same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
            assert same is not changed, step
    assert trainer.nonfinite.num_skipped == 4
    losses = [loss for loss, _ in steps_of(trainer)]
    assert [math.isfinite(loss) for loss in losses] == [step not in (1, 3, 5, 6) for step in range(1, 9)]
    # The schedule goes on by steps, so that it ends with the run; the average is over what was learned from.
    assert trainer.lr_scheduler.last_epoch == 8
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert trainer.state.log_history[-2]["steps_skipped"] == 4


def test_hooks_of_the_optimizer_are_not_called_in_a_skipped_step(tmp_path):
    """They may average gradients, as Grokfast does."""
    trainer = make(tmp_path, steps=[3], non_finite_policy="skip", optim="adamw_torch_fused")
    finite = []

    class Hooks(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.optimizer.optimizer.register_step_pre_hook(
                lambda *_: finite.append(all(p.grad.isfinite().all() for p in trainer.model.parameters()))
            )

    trainer.add_callback(Hooks())
    trainer.train()
    assert finite == [True] * 7 and trainer.nonfinite.num_skipped == 1


def test_a_step_that_an_exception_ends_decides_nothing_later(tmp_path):
    trainer = make(tmp_path, non_finite_policy="skip", optim="adamw_torch_fused")

    class Raises(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            assert hasattr(trainer.optimizer.optimizer, "found_inf")
            raise RuntimeError("mine")

    raises = Raises()
    trainer.add_callback(raises)
    with pytest.raises(RuntimeError, match="mine"):
        trainer.train()
    trainer.remove_callback(raises)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
    trainer.add_callback(Bad(trainer, [1]))
    trainer.train()
    assert trainer.nonfinite.num_skipped == 1
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer).values())


def test_stop_saves_after_patience_and_names_the_rows(tmp_path):
    trainer = make(
        tmp_path, steps=[4, 6, 7, 8], non_finite_policy="stop", non_finite_patience=2, save_strategy="no", packed=True
    )
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert "The loss of step 7 is nan" in message
    assert "learning rate" in message
    assert "rank 0" in message
    assert "of the prepared dataset" in message
    assert "checkpoint-7" in message
    assert find_last_whole_checkpoint(tmp_path / "out").name == "checkpoint-7"
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer).values())


def test_a_run_that_ends_in_the_middle_of_a_streak_ends_with_an_error(tmp_path):
    def run(resume=None, **args):
        trainer = make(tmp_path, steps=[7, 8], packed=True, save_strategy="no", **args)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    for attempt in range(2):  # what is resumed has ended so as well
        last = find_last_whole_checkpoint(tmp_path / "out")
        with pytest.raises(TrainingStopped) as stopped:
            run(resume=last and str(last))
        message = str(stopped.value)
        for said in ("The loss of step 8 is nan", "learning rate", "of the prepared dataset", "2 such steps in a row"):
            assert said in message, attempt
        assert "checkpoint-8" in message
    checkpoint = find_last_whole_checkpoint(tmp_path / "out")
    assert checkpoint.name == "checkpoint-8"
    taken = run(resume=str(checkpoint), non_finite_policy="skip")
    assert taken.state.global_step == 8
    assert all(torch.isfinite(weight).all() for weight in weights_of(taken).values())


def test_an_end_before_the_last_step_does_not_hide_a_streak(tmp_path):
    class Ends(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer = make(tmp_path, steps=[4], save_strategy="no", callbacks=[Ends()])
    with pytest.raises(TrainingStopped, match="ends with such a step"):
        trainer.train()
    assert find_last_whole_checkpoint(tmp_path / "out").name == "checkpoint-4"


def test_raise_ends_at_the_first(tmp_path):
    trainer = make(tmp_path, steps=[2], non_finite_policy="raise", save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingStopped, match="The loss of step 2 is nan"):
        trainer.train()
    assert find_last_whole_checkpoint(tmp_path / "out").name == "checkpoint-1"


def test_resuming_between_skipped_steps_is_exact(tmp_path):
    common = {"non_finite_patience": 2, "save_strategy": "steps", "save_steps": 1, "logging_steps": 3}
    whole = make(tmp_path, steps=[3, 5], **common)
    whole.train()
    for step in (3, 4, 5):
        resumed = make(tmp_path / f"again-{step}", steps=[3, 5], **common)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{step}"))
        assert repr(steps_of(resumed)) == repr(steps_of(whole))  # a NaN is not equal to itself
        assert resumed.nonfinite.num_skipped == 2
        for (name, a), b in zip(weights_of(resumed).items(), weights_of(whole).values(), strict=True):
            assert torch.equal(a, b), name


def test_patience_counts_across_a_resume(tmp_path):
    common = {"non_finite_patience": 2, "save_strategy": "steps", "save_steps": 1}
    first = make(tmp_path, steps=[3], max_steps=3, **common)
    with pytest.raises(TrainingStopped, match="step 3"):
        first.train()
    second = make(tmp_path, steps=[4], **common)
    with pytest.raises(TrainingStopped, match="step 4"):
        second.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_found_in_the_dataset(tmp_path, packed):
    trainer = make(tmp_path, packed=packed, per_device_train_batch_size=2)
    batches = [batch for _, batch in zip(range(2), iter(trainer.get_train_dataloader()), strict=False)]
    said = describe_rows(batches, trainer.train_dataset, trainer.processing_class)
    rows = trainer.train_dataset["input_ids"]
    named = [int(part.split()[0]) for part in said.split("row ")[1:]]
    assert len(named) >= 4
    tokens = sum(len(rows[index]) for index in named)
    if packed:
        assert said.count("more") or tokens <= sum(int(batch["input_ids"].numel()) for batch in batches)
    else:
        assert tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    text = trainer.processing_class.decode(rows[named[0]])[:20]
    assert repr(text)[1:-1] in said
