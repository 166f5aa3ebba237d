"""Quick walks leave a model as those of torch do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from axolotl.core.trainers.model_walks import modules_of, parameters_of, quick_walks


class Cached(nn.Linear):
    """Does something in `train`, as peft's layer of DoRA."""

    calls = 0

    def train(self, mode: bool = True):
        self.calls += 1
        return super().train(mode)


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[2][1].weight = model[0].weight
    model[2].register_module("nothing", None)
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_training_mode_comes_back_wherever_it_was_left():
    model = make_model()
    with quick_walks(model):
        for module in [*model.modules(), None]:
            if module is not None:
                module.training = False
            assert model.train() is model
            assert all(modes(model))
        model.add_module("new", nn.Dropout().eval())
        model.train()
        assert all(modes(model))
        model.eval()
        assert not any(modes(model))
    assert "train" not in vars(model) and "zero_grad" not in vars(model)


def test_what_is_put_in_their_place_meanwhile_stays():
    model = make_model()

    def train(mode: bool = True):
        return model

    with quick_walks(model):
        model.train = train
    assert vars(model)["train"] is train and "zero_grad" not in vars(model)


def test_a_class_with_its_own_train_is_asked_each_time():
    model = nn.Sequential(nn.Dropout(), Cached(2, 2))
    with quick_walks(model):
        model.train()
        model.train()
    assert model[1].calls == 2


def test_a_part_that_does_not_want_to_train_is_left_alone():
    model = make_model().train()
    part = model[2][0].eval()
    part.train = lambda mode=True: part  # as users freeze a part
    with quick_walks(model):
        model.train()
    assert not part.training and model.training


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_cleared(to_none):
    model = make_model()
    with quick_walks(model):
        model.add_module("new", nn.Linear(2, 2))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.zero_grad(set_to_none=to_none)
    for parameter in model.parameters():
        assert parameter.grad is None if to_none else not parameter.grad.any()


def test_parameters_and_modules_are_all_there():
    model = make_model()
    assert set(modules_of(model)) == set(model.modules())
    ours, theirs = parameters_of(model), list(model.parameters())
    assert len(ours) == len(theirs) and {*map(id, ours)} == {*map(id, theirs)}


def test_a_copy_made_meanwhile_is_on_its_own():
    model = make_model()
    with quick_walks(model):
        copied = copy.deepcopy(model)
    model.eval()
    copied.train()
    assert all(modes(copied)) and not any(modes(model))


def test_whoever_hides_parameters_clears_gradients_itself():
    class Hides(nn.Sequential):
        def named_parameters(self, *args, **kwargs):
            return iter(())

    model = Hides(nn.Linear(2, 2))
    model[0].weight.grad = torch.ones(2, 2)
    with quick_walks(model):
        model.zero_grad()
    assert model[0].weight.grad is not None
