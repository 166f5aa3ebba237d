"""Layer replication: the merged model has other layers than its base, each a copy with changes of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from axolotl.utils.merge.tensors import TensorInfo, TensorStore

# A stored name up to the number of the layer, the number, and the rest.
_LAYER = re.compile(r"((?:.*\.)?(?:layers|layer|h|blocks))\.(\d+)\.(.+)")


def list_sources(pairs: Sequence[Sequence[int]]) -> list[int]:
    """The base layer of each layer: `[[0, 2], [1, 2]]` makes 0, 1, 1."""
    return [layer for start, end in pairs for layer in range(start, end)]


def replicate_config(config: PretrainedConfig, sources: list[int]) -> None:
    """Change the number of layers of a config, and its list of their types."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    text.num_hidden_layers = len(sources)
    if types:
        text.layer_types = [types[source] for source in sources]


class ReplicatedStore(TensorStore):
    """The tensors of a base model under the names that they have in the replicated one.

    Args:
        store: the base model's.
        sources: the base layer of each layer.
    """

    def __init__(self, store: TensorStore, sources: list[int]):
        self._store = store
        self._source: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in store.tensors.items():
            match = _LAYER.fullmatch(name)
            layers = [None] if match is None else [new for new, old in enumerate(sources) if old == int(match[2])]
            for layer in layers:
                new_name = name if match is None else f"{match[1]}.{layer}.{match[3]}"
                self.tensors[new_name] = replace(info, name=new_name)
                self._source[new_name] = name

    def read(self, name: str) -> torch.Tensor:
        return self._store.read(self._source[name])

    def close(self) -> None:
        self._store.close()
