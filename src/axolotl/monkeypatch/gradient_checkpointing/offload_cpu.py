"""CPU offloaded checkpointing: what the backward pass needs waits in pinned host memory.

`HostStore` is the place that `activation_offloading: true | hidden_states | legacy` uses. While the backward pass computes one
layer, the tensor of the layer before it is copied back (tensors are needed in the reverse order of their leaving).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from axolotl.monkeypatch.gradient_checkpointing.recompute import Surroundings, run_backward, run_forward
from axolotl.monkeypatch.gradient_checkpointing.transfers import Arriving, Leaving, TransfersByDevice


class Parked:
    """One tensor in host memory. Its memory is given back when the autograd graph lets go of this object."""

    __slots__ = ("__weakref__", "arriving", "device", "earlier", "host", "leaving")

    def __init__(self, device: torch.device, host: torch.Tensor, leaving: Leaving, earlier: weakref.ref[Parked] | None):
        self.device = device
        self.host = host
        self.leaving = leaving
        self.earlier = earlier
        self.arriving: Arriving | None = None


class HostStore:
    """Keeps tensors of accelerators in host memory. Tensors of the CPU stay where they are.

    Args:
        overlap: copy beside the computation, and fetch the next tensor ahead.
    """

    def __init__(self, *, overlap: bool = True):
        self._overlap = overlap
        self._transfers = TransfersByDevice(overlap=overlap)
        self._latest: dict[torch.device, weakref.ref[Parked]] = {}
        self._ahead: dict[torch.device, Parked] = {}

    def put(self, tensor: torch.Tensor) -> Parked:
        """Send `tensor` away."""
        device = tensor.device
        self._drop_ahead(device)
        parked = Parked(device, *self._transfers.of(device).send(tensor), self._latest.get(device))
        self._latest[device] = weakref.ref(parked)
        return parked

    def take(self, parked: Parked) -> torch.Tensor:
        """The tensor, on its device. May be called again: the host keeps it as long as `parked` lives."""
        transfers = self._transfers.of(parked.device)
        tensor = transfers.keep(parked.leaving)
        if tensor is None:
            if self._ahead.get(parked.device) is parked:
                del self._ahead[parked.device]
            arriving = parked.arriving or transfers.fetch(parked.host)
            parked.arriving = None
            tensor = transfers.wait(arriving)
        if self._overlap:
            self._fetch_ahead(parked)
        return tensor

    def _fetch_ahead(self, parked: Parked) -> None:
        earlier = parked.earlier() if parked.earlier is not None else None
        if earlier is None or earlier.leaving.tensor is not None or earlier.arriving is not None:
            return
        self._drop_ahead(parked.device)
        earlier.arriving = self._transfers.of(parked.device).fetch(earlier.host)
        # Held here too: memory that a copy is being made into must not be given back when the graph goes away.
        self._ahead[parked.device] = earlier

    def _drop_ahead(self, device: torch.device) -> None:
        """Forget a tensor that was fetched ahead and not used."""
        parked = self._ahead.pop(device, None)
        if parked is not None and parked.arriving is not None:
            self._transfers.of(device).finish(parked.arriving)
            parked.arriving = None


_STORE = HostStore()


class CPU_Offloaded_Gradient_Checkpointer(torch.autograd.Function):
    """Saves VRAM by smartly offloading to RAM. Tiny hit to performance, since we mask the movement via non blocking calls.

    A checkpoint whose input waits in host memory: `apply(forward_function, hidden_states, *args)` runs `forward_function`
    without a graph and again, with the random state and autocast of the first time, in the backward pass. As with every
    reentrant checkpoint, `hidden_states` has to require a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, forward_function: Callable[..., Any], hidden_states: torch.Tensor, *args: Any
    ) -> torch.Tensor | tuple[Any, ...]:
        ctx.surroundings = Surroundings.of(hidden_states)
        ctx.parked = _STORE.put(hidden_states)
        ctx.forward_function, ctx.args = forward_function, args
        return run_forward(forward_function, hidden_states, args)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[Any, ...]:
        hidden_states = _STORE.take(ctx.parked)
        return run_backward(ctx.surroundings, ctx.forward_function, hidden_states, ctx.args, grad_outputs)
