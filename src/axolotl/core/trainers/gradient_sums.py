"""Gradients of micro-batches, summed in a few kernels.

Autograd adds each gradient to the one before by a kernel of its own: hundreds of tiny ones in every backward of a model with
adapters. Here each backward begins without gradients, and what it leaves is added to what was there all at once. The sums are
the same to the last bit, unless one backward adds twice to a weight, as re-entrant checkpointing does where segments share one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from axolotl.core.trainers.model_walks import parameters_of

MAX_SHARE = 0.05
"""Of a model's weights that may be trained: their gradients are in memory twice at the end of a backward."""


@contextmanager
def adds_gradients_at_once(model: nn.Module) -> Iterator[None]:
    """Within the context is one backward of a micro-batch. Does nothing where somebody could see the difference.

    Args:
        model: not wrapped for several processes, whose wrappers keep gradients in memory of their own.
    """
    kept = _take_gradients(model)
    try:
        yield
    finally:
        _give_back(kept)


def _take_gradients(model: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The gradients of the micro-batches before, after which the parameters have none; nothing where that does not pay."""
    parameters = parameters_of(model)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if sum(p.numel() for p in trained) > MAX_SHARE * sum(p.numel() for p in parameters):
        return []
    # Such as an optimizer that steps in backward, which wants the sum.
    if any(
        p._backward_hooks or p._post_accumulate_grad_hooks or (p.grad is not None and p.grad.is_sparse) for p in trained
    ):
        return []
    kept = [(parameter, parameter.grad) for parameter in trained if parameter.grad is not None]
    for parameter, _ in kept:
        parameter.grad = None
    return kept


def _give_back(kept: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    """Each parameter's gradient from before, plus what it has got since."""
    groups: defaultdict[tuple[torch.device, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]]
    groups = defaultdict(lambda: ([], []))
    for parameter, before in kept:
        if parameter.grad is not None:
            sums, parts = groups[before.device, before.dtype]
            sums.append(before)
            parts.append(parameter.grad)
        parameter.grad = before
    for sums, parts in groups.values():
        torch._foreach_add_(sums, parts)
