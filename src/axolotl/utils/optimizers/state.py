"""Optimizer states that come back from a checkpoint as they were saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def keep_loaded_dtypes(optimizer: Optimizer, object_types: tuple[type, ...] = ()) -> None:
    """Let the states of `optimizer` keep their dtypes when they are loaded.

    torch casts each state to the dtype of its parameter. States that an optimizer keeps in float32 beside bfloat16
    parameters would lose their lower bits, and a resumed run would differ from the uninterrupted one.

    Args:
        optimizer: gets hooks on `load_state_dict`.
        object_types: classes of states that are objects with tensors as attributes. A checkpoint may hold them, and their
            tensors go to the device of the parameter.
    """
    torch.serialization.add_safe_globals(list(object_types))
    loaded: dict[str, Any] = {}

    def remember(_: Optimizer, state_dict: dict[str, Any]) -> None:
        loaded.update(state_dict)

    def restore(optimizer: Optimizer) -> None:
        indices = [index for group in loaded["param_groups"] for index in group["params"]]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for index, param in zip(indices, params, strict=True):
            state = optimizer.state.get(param, {})
            for key, saved in loaded["state"].get(index, {}).items():
                if isinstance(saved, object_types):
                    _move(saved, param.device)
                    continue
                found = state.get(key)
                if isinstance(saved, Tensor) and isinstance(found, Tensor) and found.dtype != saved.dtype:
                    state[key] = saved.clone().to(found.device)
        loaded.clear()

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(restore)


def _move(holder: Any, device: torch.device) -> None:
    for name, value in vars(holder).items():
        if isinstance(value, Tensor):
            setattr(holder, name, value.to(device))
