"""What a training loop asks of every module of a model at each step, without the milliseconds that `nn.Module` takes for it.

`train()` writes to each module through `nn.Module.__setattr__`, and `zero_grad()` goes by way of the names of all parameters. A
model with adapters has thousands of modules, and a GPU that has finished a step waits for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

PLAIN_TRAIN = {nn.Module.train, PreTrainedModel.train, DistributedDataParallel.train}
"""Implementations of `train` that do nothing where the mode stays what it is."""

PARAMETER_READERS = ("zero_grad", "parameters", "named_parameters", "named_modules", "_named_members")
"""What decides which gradients `zero_grad` clears."""


@contextmanager
def quick_walks(model: nn.Module) -> Iterator[None]:
    """Within the context, `model.train()` and `model.zero_grad()` do what they always do, in a tenth of the time.

    The tree of modules is looked at anew in each call, so that it may change. Where a class has its own way, that is taken.
    """
    cls, own = type(model), vars(model)
    quick = {}
    if cls.train in PLAIN_TRAIN:
        quick["train"] = partial(train_unless_training, model)
    if all(vars(nn.Module)[name] is getattr(cls, name) for name in PARAMETER_READERS):
        quick["zero_grad"] = partial(clear_gradients, model)
    quick = {name: function for name, function in quick.items() if name not in own}
    own.update(quick)  # not by `setattr`, which wrappers hand on to what they wrap
    try:
        yield
    finally:
        for name, function in quick.items():
            if own.get(name) is function:  # not what somebody has put in its place meanwhile
                del own[name]


def train_unless_training(model: nn.Module, mode: bool = True) -> nn.Module:
    """`model.train(mode)`, which is left out where it would change nothing."""
    if mode is True and is_training_throughout(model):
        return model
    return type(model).train(model, mode)


def is_training_throughout(model: nn.Module) -> bool:
    """Whether the model and every module in it is in training mode, and none does more in `train()` than to go there."""
    modules = modules_of(model)
    if not (model.training and all(cls.train in PLAIN_TRAIN for cls in set(map(type, modules)))):
        return False
    for module in modules[1:]:  # the model itself has the `train` of `quick_walks`
        state = vars(module)
        if not state.get("training") or "train" in state:
            return False
    return True


def clear_gradients(model: nn.Module, set_to_none: bool = True) -> None:
    """`nn.Module.zero_grad`."""
    if not set_to_none:
        nn.Module.zero_grad(model, set_to_none=False)
        return
    for parameter in parameters_of(model):
        if parameter.grad is not None:
            parameter.grad = None


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The model and all modules in it; one that is in two places comes twice."""
    modules: list[nn.Module | None] = [model]
    for module in modules:
        if module is not None and module._modules:
            modules += module._modules.values()  # grows the list that is gone through
    return [module for module in modules if module is not None]


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the model, each once."""
    tables = [module._parameters for module in modules_of(model) if module._parameters]
    return list(
        {id(parameter): parameter for table in tables for parameter in table.values() if parameter is not None}.values()
    )
