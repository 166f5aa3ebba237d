"""Layer offloading: the frozen weights of the decoder layers wait in pinned host memory and come to the device when needed.

A layer's weights are on the device while its forward or its backward runs, and those of the next one are on their way. Weights
that train stay. Swapping replaces `Parameter.data`; nothing is ever written over, so what autograd or a kernel still holds stays
right, it only takes memory for longer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from axolotl.exceptions import ConfigError
from axolotl.monkeypatch.gradient_checkpointing.transfers import Arriving, Transfers, empty_on_host
from axolotl.monkeypatch.lora_kernels import get_layers

MOVABLE = ("Parameter", "Params4bit")  # classes of weights whose values are one tensor


@dataclass(eq=False)
class _Weight:
    """A frozen weight and its copy in host memory."""

    parameter: nn.Parameter
    host: torch.Tensor


@dataclass(eq=False)
class _Layer:
    """One decoder layer.

    Attributes:
        num_users: forwards of it that run now (a checkpoint runs inside the layer's own).
        arriving: the copies that were started ahead.
    """

    module: nn.Module
    weights: list[_Weight]
    num_users: int = 0
    is_here: bool = True
    arriving: list[Arriving] | None = None


@dataclass(frozen=True)
class _View:
    """Stands in the autograd graph for a view of a weight."""

    layer: int
    weight: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class LayerOffloader:
    """Moves the frozen weights of `layers` between host and device.

    Args:
        layers: the decoder layers, in the order in which they run.
        device: where they compute.

    Raises:
        ConfigError: no weight of the layers is frozen.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device):
        self._transfers = Transfers(device)
        self._layers = [_Layer(layer, list(_frozen_weights(layer))) for layer in layers]
        self._undo: list[Callable[[], None]] = []
        if not any(layer.weights for layer in self._layers):
            raise ConfigError(
                "`layer_offloading: true` moves frozen weights, but all weights of the layers are trained. Write `adapter: lora`, "
                "or `unfrozen_parameters`, or remove `layer_offloading`."
            )
        for index, layer in enumerate(self._layers):
            if layer.weights:
                self._wrap(index)
                self._evict(layer)

    @property
    def num_here(self) -> int:
        """Layers whose frozen weights are on the device now."""
        return sum(layer.is_here for layer in self._layers if layer.weights)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights that move."""
        return sum(weight.host.nbytes for layer in self._layers for weight in layer.weights)

    def remove(self) -> None:
        """Bring all weights back for good."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        for layer in self._layers:
            self._bring(layer)

    def _wrap(self, index: int) -> None:
        module = self._layers[index].module
        had_forward = vars(module).get("forward")
        module.forward = self._streamed(index, module.forward, outermost=True)
        if had_forward is None:
            self._undo.append(lambda: delattr(module, "forward"))
        else:
            self._undo.append(lambda: setattr(module, "forward", had_forward))
        function = vars(module).get("_gradient_checkpointing_func")
        if function is None:
            return

        @functools.wraps(function)
        def checkpoint(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # Some versions of transformers recompute past the module's own `forward`.
            return function(self._streamed(index, inner, outermost=False), *args, **kwargs)

        module._gradient_checkpointing_func = checkpoint  # pyright: ignore[reportAttributeAccessIssue]
        self._undo.append(lambda: setattr(module, "_gradient_checkpointing_func", function))

    def _streamed(self, index: int, forward: Callable[..., Any], *, outermost: bool) -> Callable[..., Any]:
        layer = self._layers[index]

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            module = layer.module
            layer.num_users += 1
            try:
                self._need(index)
                checkpointed = module.training and getattr(module, "gradient_checkpointing", False)
                if checkpointed or not torch.is_grad_enabled():
                    output = forward(*args, **kwargs)
                else:
                    with saved_tensors_hooks(functools.partial(self._pack, index), self._unpack):
                        output = forward(*args, **kwargs)
            finally:
                layer.num_users -= 1
                # In the backward pass the layer stays until the next one is needed: its gradients are still to come.
                if not layer.num_users and not _in_backward():
                    self._evict(layer)
            if outermost:
                self._need_before_backward(index, output)
            return output

        return run

    def _need_before_backward(self, index: int, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        for tensor in tensors:
            if torch.is_tensor(tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: self._need(index))

    def _need(self, index: int) -> None:
        """Have the weights of a layer here, and those of the next one in this direction on their way."""
        layer, backward = self._layers[index], _in_backward()
        self._bring(layer)
        following = index - 1 if backward else index + 1
        for other_index, other in enumerate(self._layers):
            if backward and other is not layer and other.is_here and not other.num_users:
                self._evict(other)
            if other_index == following and not other.is_here and other.arriving is None:
                other.arriving = [self._transfers.fetch(weight.host) for weight in other.weights]

    def _bring(self, layer: _Layer) -> None:
        if layer.is_here:
            return
        arriving = layer.arriving or [self._transfers.fetch(weight.host) for weight in layer.weights]
        layer.arriving, layer.is_here = None, True
        for weight, tensor in zip(layer.weights, arriving, strict=True):
            weight.parameter.data = self._transfers.wait(tensor)

    def _evict(self, layer: _Layer) -> None:
        layer.is_here = False
        for weight in layer.weights:
            weight.parameter.data = weight.host

    def _pack(self, index: int, tensor: torch.Tensor) -> Any:
        """A view of a weight would keep the weight on the device: remember which view it is."""
        if tensor.layout is not torch.strided:
            return tensor
        pointer = tensor.untyped_storage().data_ptr()
        for number, weight in enumerate(self._layers[index].weights):
            if weight.parameter.untyped_storage().data_ptr() == pointer and tensor.dtype == weight.parameter.dtype:
                return _View(index, number, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        return tensor

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _View):
            return packed
        self._need(packed.layer)
        whole = self._layers[packed.layer].weights[packed.weight].parameter.data
        return whole.as_strided(packed.size, packed.stride, packed.offset)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _frozen_weights(layer: nn.Module) -> Iterator[_Weight]:
    for parameter in layer.parameters():
        if parameter.requires_grad or type(parameter).__name__ not in MOVABLE or parameter.data.is_meta:
            continue
        data = parameter.data.contiguous()
        host = empty_on_host(data, pinned=data.device.type != "cpu")
        host.copy_(data)
        yield _Weight(parameter, host)


def offload_layers(model: nn.Module, device: torch.device) -> LayerOffloader:
    """Send the frozen weights of the decoder layers of `model` to host memory; from here on they come when they are needed."""
    return LayerOffloader(get_layers(model), device)
