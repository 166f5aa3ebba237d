"""The filter against the formula, and in runs: what the optimizer gets, and what a checkpoint holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl.exceptions import ConfigError
from axolotl.integrations.grokfast.optimizer import STATE_KEY, GrokfastCallback, gradfilter_ema
from axolotl.integrations.grokfast.plugin import GrokfastPlugin
from axolotl.utils.dict import DictDefault
from tests.integration.training_runs import make_trainer, steps_of


def test_the_filter_is_that_of_the_paper():
    layer = nn.Linear(3, 2, bias=False)
    gradients = [torch.full((2, 3), value) for value in (1.0, 2.0, -4.0)]
    grads, mean = None, gradients[0]
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        grads = gradfilter_ema(layer, grads, alpha=0.9, lamb=2.0)
        mean = 0.9 * mean + 0.1 * gradient
        torch.testing.assert_close(layer.weight.grad, gradient + 2.0 * mean)
        torch.testing.assert_close(grads["weight"], mean)


def test_a_frozen_parameter_has_no_average():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    layer.weight.grad = torch.ones_like(layer.weight)
    assert list(gradfilter_ema(layer)) == ["weight"]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_a_run_steps_with_amplified_gradients(tmp_path, optim):
    plain, amplified = (
        make_trainer(
            tmp_path / str(on), max_steps=3, optim=optim, callbacks=[GrokfastCallback(0.9, 2.0)] if on else None
        )
        for on in (False, True)
    )
    plain.train()
    amplified.train()
    first, second = steps_of(plain), steps_of(amplified)
    assert first[0] == second[0]
    if optim == "sgd":
        # The first average is the gradient itself: three times as far.
        assert first[1] != second[1]
    states = amplified.optimizer.state.values()
    assert all(state[STATE_KEY].dtype == torch.float32 for state in states if state)


def test_a_resumed_run_goes_on_with_the_averages(tmp_path):
    def trainer(**kwargs):
        return make_trainer(
            tmp_path, max_steps=4, save_strategy="steps", save_steps=2, callbacks=[GrokfastCallback(0.9, 2.0)], **kwargs
        )

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert steps_of(resumed)[2:] == steps_of(whole)[2:]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_optimizers_that_update_in_backward_are_refused():
    with pytest.raises(ConfigError, match="lomo"):
        GrokfastPlugin().add_callbacks_post_trainer(DictDefault({"optimizer": "lomo"}), None)
    with pytest.raises(ConfigError, match="PyTorch optimizer"):
        GrokfastCallback(0.9, 2.0).on_train_begin(None, None, None, optimizer=object())


def test_zero_is_a_value():
    (callback,) = GrokfastPlugin().add_callbacks_post_trainer(DictDefault({"grokfast_lamb": 0.0}), None)
    assert (callback.alpha, callback.lamb) == (0.98, 0.0)
