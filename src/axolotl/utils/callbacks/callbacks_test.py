"""Callbacks: when they act and what they show."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import TrainerControl, TrainerState

from axolotl.utils.callbacks.dynamic_checkpoint import DynamicCheckpointCallback
from axolotl.utils.callbacks.guards import LossWatchDogCallback, SaveModelOnFirstStepCallback, SkipEvalOnResumeCallback
from axolotl.utils.callbacks.hardware import flops_per_token
from axolotl.utils.callbacks.perplexity import Perplexity
from axolotl.utils.callbacks.progress import ProgressCallback, describe_step
from tests.tiny import make_tiny_llama, make_tiny_tokenizer


def test_the_watchdog_counts_strikes_in_a_row():
    dog, control = LossWatchDogCallback(5.0, patience=2), TrainerControl()
    for loss in (6.0, 4.0, 6.0):
        dog.on_log(None, TrainerState(), control, logs={"loss": loss})
    assert not control.should_training_stop
    dog.on_log(None, TrainerState(), control, logs={"loss": 7.0})
    assert control.should_training_stop


def test_the_first_step_is_saved():
    control = TrainerControl()
    SaveModelOnFirstStepCallback().on_step_end(None, TrainerState(global_step=2), control)
    assert not control.should_save
    SaveModelOnFirstStepCallback().on_step_end(None, TrainerState(global_step=1), control)
    assert control.should_save


@pytest.mark.parametrize(("step", "evaluates"), [(0, True), (5, False)])
def test_a_resumed_run_does_not_evaluate_at_its_start(step, evaluates):
    args = SimpleNamespace(eval_on_start=True)
    SkipEvalOnResumeCallback().on_train_begin(args, TrainerState(global_step=step), TrainerControl())
    assert args.eval_on_start is evaluates


def test_a_trigger_file_saves_once(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0, world_size=1)
    callback = DynamicCheckpointCallback(check_interval=2)
    (tmp_path / "axolotl_checkpoint.save").write_text("")
    saves = []
    for step in range(1, 6):
        control = TrainerControl()
        callback.on_step_end(args, TrainerState(global_step=step), control)
        saves.append(control.should_save)
    assert saves == [False, True, False, False, False]


def test_flops_leave_out_lookups_and_the_gradient_of_frozen_weights():
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "linear": nn.Linear(4, 8, bias=False)})
    assert flops_per_token(model) == 6 * 32
    model["linear"].requires_grad_(False)
    assert flops_per_token(model) == 4 * 32


def test_progress_on_a_terminal_and_as_lines(caplog):
    logs = {"loss": 1.23456, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens/per_sec_per_gpu": 1234.0, "mfu": 0.412}
    assert describe_step(logs) == "loss 1.2346  lr 1.00e-04  grad 0.500  1,234 tok/s  MFU 41.2 %"
    state = TrainerState(global_step=3, max_steps=9)
    lines = ProgressCallback(Console(file=io.StringIO(), force_terminal=False))
    with caplog.at_level("INFO"):
        lines.on_train_begin(None, state, None)
        lines.on_log(None, state, None, logs=logs)
    assert "step 3/9  loss 1.2346" in caplog.text
    live = ProgressCallback(Console(file=io.StringIO(), force_terminal=True, width=120))
    live.on_train_begin(None, state, None)
    live.on_log(None, state, None, logs=logs)
    live.on_step_end(None, state, None)
    live.close()
    live.close()
    assert "loss 1.2346" in live.console.file.getvalue()


@pytest.mark.parametrize("stride", [3, 8])
def test_perplexity_counts_every_token_once(tmp_path, stride):
    tokenizer, model = make_tiny_tokenizer(tmp_path / "t"), make_tiny_llama(tmp_path / "m")
    text = "How many legs has a dog? A dog has four legs."
    length = len(tokenizer(text)["input_ids"])
    total, count = Perplexity(tokenizer, 8, stride).sum_losses(model, [text])
    assert count == length - 1 if stride < 8 else count <= length - 1
    assert math.isfinite(total)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    whole = Perplexity(tokenizer, 512).compute(model, [text])["score"]
    with torch.no_grad():
        assert whole == pytest.approx(math.exp(model(input_ids=ids, labels=ids).loss.item()), rel=1e-4)
    with pytest.raises(ValueError, match="references"):
        Perplexity(tokenizer, 8).compute(model)


def test_perplexity_makes_no_logits_over_the_vocabulary(tmp_path):
    tokenizer, model = make_tiny_tokenizer(tmp_path / "t"), make_tiny_llama(tmp_path / "m")
    widths = []
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[-1]))
    model.train()
    model.model.layers[0].eval()
    Perplexity(tokenizer, 8, 4).compute(model, ["How many legs has a dog? A dog has four legs."])
    # The first call learns the formula of the logits from two tokens.
    assert len(widths) > 3
    assert set(widths[1:]) == {1}
    assert model.training
    assert not model.model.layers[0].training
