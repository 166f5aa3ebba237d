"""Puts the config's choices about activations on a model.

transformers switches checkpointing on by handing a checkpoint function to `_set_gradient_checkpointing` of the model. That
method of the instance is replaced by one that passes on and then gives each layer the function of its own: with other saved
results (`selective_checkpointing`), with inputs that are kept elsewhere (`activation_offloading`). It holds however often,
and by whichever trainer, checkpointing is switched on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from axolotl.exceptions import ModelError
from axolotl.kernels.quantize import split_state
from axolotl.loaders.utils import plain_model
from axolotl.monkeypatch.gradient_checkpointing.offload_cpu import HostStore
from axolotl.monkeypatch.gradient_checkpointing.offload_disk import Disco
from axolotl.monkeypatch.gradient_checkpointing.selective import Selection, Tally

Offloading = Literal[True, "legacy", "disk", "hidden_states"]
MARK = "_axolotl_activation_policies"
MIN_BYTES = 1024  # smaller tensors cost more to move than they take
SMALL_SHARE = 8  # so do those below this part of the largest: their copy back would wait behind that of a large one


class Store(Protocol):
    """A place for tensors."""

    def put(self, tensor: torch.Tensor) -> Any: ...

    def take(self, parked: Any) -> torch.Tensor: ...


STORES: dict[Offloading, Callable[[], Store]] = {
    True: HostStore,
    "hidden_states": HostStore,
    "legacy": lambda: HostStore(overlap=False),
    # Two: while one is copied to the device, the one before it is read.
    "disk": lambda: Disco.get_instance(prefetch_size=2),
}


class Offloaded(saved_tensors_hooks):
    """While this context is open, what autograd saves goes to a store: floating-point tensors that are no weights.

    A tensor that is saved twice is kept once.

    Args:
        store: the place.
        weights: storages that stay where they are.
    """

    def __init__(self, store: Store, weights: frozenset[int] = frozenset()):
        self._store = store
        self._weights = weights
        self._seen: dict[tuple[Any, ...], tuple[StorageWeakRef, Any]] = {}
        self._largest = MIN_BYTES
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.is_floating_point()
        num_bytes = tensor.numel() * tensor.element_size()
        if not plain or num_bytes < max(MIN_BYTES, self._largest // SMALL_SHARE):
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._weights:
            return tensor
        self._largest = max(self._largest, num_bytes)
        reference = StorageWeakRef(storage)
        key = (reference.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        seen = self._seen.get(key)
        if seen is not None and not seen[0].expired():
            return seen[1]
        parked = self._store.put(tensor)
        self._seen[key] = (reference, parked)
        return parked

    def _unpack(self, packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else self._store.take(packed)

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._seen.clear()  # the graph alone decides from here on how long each tensor is kept


def weight_storages(module: nn.Module) -> frozenset[int]:
    """Addresses of the storages of parameters, buffers and what belongs to quantized weights."""
    tensors: list[torch.Tensor] = [*module.parameters(), *module.buffers()]
    for parameter in module.parameters():
        state = getattr(parameter, "fp8_state", None) or getattr(parameter, "quant_state", None)
        tensors += [tensor for tensor in split_state(state)[0] if tensor is not None]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta)


class OffloadedCheckpoint:
    """A checkpoint function whose saved inputs go to a store. What it recomputes is not touched."""

    def __init__(self, function: Callable[..., Any], store: Store):
        self.function = function
        self.store = store
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with Offloaded(self.store):
            return self.function(*args, **kwargs)


class _OffloadDuringForward:
    """Hooks of a decoder: while its forward runs in training, what autograd saves goes to a store."""

    def __init__(self, store: Store):
        self._store = store
        self._open: list[Offloaded | None] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        context = None
        if module.training and torch.is_grad_enabled():
            context = Offloaded(self._store, weight_storages(module))
            context.__enter__()
        self._open.append(context)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context = self._open.pop()
        if context is not None:
            context.__exit__(None, None, None)


def apply_activation_policies(
    model: nn.Module, *, offloading: Offloading | None = None, selection: Selection | None = None
) -> None:
    """Let checkpointing of `model`, whenever it is switched on, keep activations as asked. Doing it again replaces both.

    Args:
        model: a transformers model or a peft model around one.
        offloading: where the inputs of checkpointed layers are kept; None leaves them on the device. With True, so is all
            else that the decoder saves.
        selection: which results of a layer are kept instead of computed again.

    Raises:
        ModelError: the model switches checkpointing on in a way of its own.
    """
    base = plain_model(model)
    if (
        not isinstance(base, PreTrainedModel)
        or "value" in inspect.signature(base._set_gradient_checkpointing).parameters
    ):
        raise ModelError(
            f"{type(base).__name__} has gradient checkpointing of its own, which takes no checkpoint function: "
            "`activation_offloading` and `selective_checkpointing` cannot be used with it. Remove them."
        )
    remove_activation_policies(base)
    store = STORES[offloading]() if offloading else None
    original = base._set_gradient_checkpointing

    @functools.wraps(original)
    def set_with_policies(
        enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        original(enable=enable, gradient_checkpointing_func=gradient_checkpointing_func, **kwargs)
        layers = [module for module in base.modules() if "_gradient_checkpointing_func" in vars(module)]
        tally = Tally(sum("gradient_checkpointing" in vars(layer) and layer.gradient_checkpointing for layer in layers))
        inputs_only = store is not None and offloading is not True
        for layer in layers if enable and (selection is not None or inputs_only) else ():
            function = gradient_checkpointing_func
            if selection is not None:
                function = selection.checkpoint_function(layer, base.config, function, tally)
            layer._gradient_checkpointing_func = OffloadedCheckpoint(function, store) if inputs_only else function

    base._set_gradient_checkpointing = set_with_policies
    handles = []
    if offloading is True and store is not None:
        hooks, decoder = _OffloadDuringForward(store), base.base_model
        handles = [
            decoder.register_forward_pre_hook(hooks.before),
            decoder.register_forward_hook(hooks.after, always_call=True),
        ]
    setattr(base, MARK, handles)


def remove_activation_policies(model: nn.Module) -> None:
    """Undo `apply_activation_policies`. Checkpointing that is on stays as it is until it is switched on again."""
    for handle in vars(model).pop(MARK, ()):
        handle.remove()
    vars(model).pop("_set_gradient_checkpointing", None)
