"""Selective activation checkpointing: a checkpointed layer keeps the results of chosen operations and recomputes the others.

Attention costs time that grows with the square of the length and keeps an output that grows with the length, so its result is
the first one to keep. Built on the `context_fn` of torch's checkpoint (Chen et al., https://arxiv.org/abs/1604.06174, for
checkpointing; torch.utils.checkpoint.create_selective_checkpoint_contexts for choosing operations).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from axolotl.exceptions import ConfigError
from axolotl.monkeypatch.gradient_checkpointing.offload_cpu import HostStore, Parked
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

# Parts of the names of operators that attend: those of torch, of its varlen kernel, of flash-attn and of xformers.
ATTENTION_PARTS = (
    "scaled_dot_product",
    "varlen_attn",
    "flash_attn",
    "flash_attention",
    "flex_attention",
    "efficient_attention",
)
_MATMULS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::linear",
    "aten::_scaled_mm",
    "aten::_grouped_mm",
)
# Words that `save` may hold beside the full names of operators -> operators.
MATMUL_WORDS: dict[str, tuple[str, ...]] = {
    "mm": ("aten::mm",),
    "addmm": ("aten::addmm",),
    "bmm": ("aten::bmm", "aten::baddbmm"),
    "linear": ("aten::mm", "aten::addmm", "aten::linear", "aten::_scaled_mm"),
    "matmul": _MATMULS,
    "all_matmuls": _MATMULS,
}
SLIDING = "sliding_attention"


@dataclass
class Tally:
    """Says once when a selection keeps nothing.

    Attributes:
        num_layers: checkpointed layers of the model.
    """

    num_layers: int
    num_begun: int = 0
    num_kept: int = 0

    def begin_layer(self) -> None:
        if self.num_begun == self.num_layers and not self.num_kept:
            LOG.warning(
                "`selective_checkpointing` keeps nothing: none of the operations in `save` runs in the layers, so that all is "
                "recomputed. Attention written out (`attn_implementation: eager`) has no operation of its own."
            )
        self.num_begun += 1


@dataclass(frozen=True)
class Selection:
    """What `selective_checkpointing` asks for.

    Args:
        save: `attention`, words of `MATMUL_WORDS`, or names of operators such as `aten.mm` or `aten::gelu`.
        save_sliding_window: also keep attention of layers with a sliding window, which is cheap to compute again.
        recompute_layer_types: values of `layer_types` in the model's config whose layers keep nothing.
        offload: keep the results in host memory.
    """

    save: tuple[str, ...] = ("attention",)
    save_sliding_window: bool = False
    recompute_layer_types: tuple[str, ...] = ()
    offload: bool = False
    _store: HostStore = field(default_factory=HostStore, compare=False, repr=False)

    def keeps(self, layer_type: str | None) -> Callable[[Any], bool]:
        """Whether the result of an operator is kept in a layer of this type."""
        if layer_type is not None and layer_type in self.recompute_layer_types:
            return lambda operator: False
        wants_attention = "attention" in self.save and (layer_type != SLIDING or self.save_sliding_window)
        names = frozenset(_operator_names(self.save))

        @functools.cache
        def keep(operator: Any) -> bool:
            name = operator.name()
            if name in names or name.partition(".")[0] in names:
                return True
            return wants_attention and "backward" not in name and any(part in name for part in ATTENTION_PARTS)

        return keep

    def checkpoint_function(
        self, layer: nn.Module, config: Any, function: Callable[..., Any], tally: Tally
    ) -> Callable[..., Any]:
        """`function`, torch's non-reentrant checkpoint, with this selection for `layer`."""
        keep = self.keeps(read_layer_type(layer, config))

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            tally.begin_layer()
            if self.offload:
                results: dict[Any, list[Any]] = defaultdict(list)
                return _KeepElsewhere(keep, results, self._store, tally), _TakeBack(keep, results, self._store)
            return create_selective_checkpoint_contexts(policy)

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if not keep(operator):
                return CheckpointPolicy.PREFER_RECOMPUTE
            tally.num_kept += 1
            return CheckpointPolicy.MUST_SAVE

        return functools.partial(function, context_fn=contexts)


class _EagerOnly(TorchDispatchMode):
    """A mode that does not look into compiled code."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _KeepElsewhere(_EagerOnly):
    """Forward: sends the results of chosen operators to a store."""

    def __init__(self, keep: Callable[[Any], bool], results: dict[Any, list[Any]], store: HostStore, tally: Tally):
        super().__init__()
        self._keep, self._results, self._store, self._tally = keep, results, store, tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._keep(func):
            self._tally.num_kept += 1
            self._results[func].append(tree_map_only(torch.Tensor, self._store.put, output))
        return output


class _TakeBack(_EagerOnly):
    """Recomputation: takes the results from the store, in the order in which they were made."""

    def __init__(self, keep: Callable[[Any], bool], results: dict[Any, list[Any]], store: HostStore):
        super().__init__()
        self._keep, self._results, self._store = keep, results, store
        self._position: dict[Any, int] = {}

    def __enter__(self) -> _TakeBack:
        self._position = defaultdict(int)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._keep(func):
            return func(*args, **(kwargs or {}))
        position = self._position[func]
        self._position[func] += 1
        return tree_map_only(Parked, self._store.take, self._results[func][position])


def read_layer_type(layer: nn.Module, config: Any) -> str | None:
    """The layer's type by the model's config (`full_attention`, `sliding_attention`, ...), or None."""
    for holder in (layer, *(child for name, child in layer.named_children() if "attn" in name or "attention" in name)):
        for name in ("attention_type", "layer_type"):
            if isinstance(vars(holder).get(name), str):
                return vars(holder)[name]
    index = next((vars(m)["layer_idx"] for m in layer.modules() if isinstance(vars(m).get("layer_idx"), int)), None)
    types = getattr(config.get_text_config(), "layer_types", None)
    return types[index] if types and index is not None and index < len(types) else None


def _operator_names(words: Iterable[str]) -> Iterable[str]:
    """Names of operators as `Operator.name()` gives them, with or without overload."""
    for word in words:
        if word == "attention":
            continue
        if word in MATMUL_WORDS:
            yield from MATMUL_WORDS[word]
            continue
        parts = word.removeprefix("torch.ops.").replace("::", ".").split(".")
        packet = getattr(getattr(torch.ops, parts[0], None), parts[1], None) if len(parts) in (2, 3) else None
        if packet is None or (len(parts) == 3 and parts[2] not in packet.overloads()):
            known = ", ".join(("attention", *MATMUL_WORDS))
            raise ConfigError(
                f"`selective_checkpointing: {{save: [{word}]}}` names no operation. Write one of {known}, or the name of an operator "
                "of torch such as `aten.mm`."
            )
        overload = "." + parts[2] if len(parts) == 3 and parts[2] != "default" else ""
        yield f"{parts[0]}::{parts[1]}{overload}"
