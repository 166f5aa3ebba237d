"""What a checkpoint written as an autograd function needs: run without a graph, and run again as if it were the first time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states


@dataclass(frozen=True)
class Surroundings:
    """Random state and autocast of a moment.

    Attributes:
        device_type: type of the device that computes.
        cpu_state: state of the CPU's generator.
        devices, device_states: generators of the accelerators in use.
        autocasts: (device type, enabled, dtype, cache) of the accelerator and the CPU.
    """

    device_type: str
    cpu_state: torch.Tensor
    devices: list[int]
    device_states: list[torch.Tensor]
    autocasts: tuple[tuple[str, bool, torch.dtype, bool], ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Surroundings:
        """Those of now; `tensor` says which device computes."""
        kind = tensor.device.type
        devices, states = get_device_states(tensor) if kind not in ("cpu", "mps") else ([], [])
        autocasts = tuple(
            (name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name), torch.is_autocast_cache_enabled())
            for name in dict.fromkeys((kind, "cpu"))
        )
        return cls(kind, torch.get_rng_state(), devices, states, autocasts)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within the context they are as they were; afterwards as they are now."""
        kind = self.device_type if self.devices else "cuda"
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=self.devices, device_type=kind))
            torch.set_rng_state(self.cpu_state)
            if self.devices:
                set_device_states(self.devices, self.device_states, device_type=kind)
            for name, enabled, dtype, cache in self.autocasts:
                stack.enter_context(torch.autocast(name, enabled=enabled, dtype=dtype, cache_enabled=cache))
            yield


def run_forward(function: Callable[..., Any], hidden_states: torch.Tensor, args: Sequence[Any]) -> Any:
    """The outputs, without a graph."""
    with torch.no_grad():
        return function(hidden_states, *args)


def run_backward(
    surroundings: Surroundings,
    function: Callable[..., Any],
    hidden_states: torch.Tensor,
    args: Sequence[Any],
    grad_outputs: Sequence[torch.Tensor | None],
) -> tuple[Any, ...]:
    """Run `function` again with a graph, and back through it.

    Returns:
        The gradients that `torch.autograd.Function.backward` has to return for (function, hidden_states, *args).
    """
    hidden_states = hidden_states.detach().requires_grad_(hidden_states.is_floating_point())
    inputs = [arg.detach().requires_grad_(arg.requires_grad) if torch.is_tensor(arg) else arg for arg in args]
    with surroundings.restored(), torch.enable_grad():
        outputs = function(hidden_states, *inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grad_outputs, strict=True)
        if torch.is_tensor(output) and output.requires_grad and grad is not None
    ]
    torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
    return None, hidden_states.grad, *(arg.grad if torch.is_tensor(arg) else None for arg in inputs)
