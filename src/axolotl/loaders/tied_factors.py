"""One pair of LoRA matrices for embedding and head (`peft_ensure_weight_tying` with LoRA on either).

peft gives the head two parameters of its own, over the memory of the embedding's. An optimizer then updates that memory twice per
step, each time with half of the gradient, and casting the matrices to float32 takes them apart: they train on as two, and whatever
loads the adapter takes one of them for both. Here the head reads the embedding's parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn


class TransposedLinear(nn.Module):
    """A linear layer without bias whose weight is the transpose of a parameter of another layer.

    It has no parameters, yet saves its weight as `nn.Linear` does, so that files are peft's.

    Args:
        holder: holds the parameter, and may hold another one later.
        name: of the parameter (in, out).
    """

    def __init__(self, holder: nn.ParameterDict, name: str):
        super().__init__()
        self._source = (holder, name)  # in a tuple: not a child of this layer

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), part of the graph."""
        holder, name = self._source
        return holder[name].t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight.contiguous()
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Nothing: the same numbers are loaded where the parameter is."""


def share_tied_factors(model: PeftModel) -> None:
    """Let a head that peft ties to the embedding read the embedding's LoRA matrices. Other models stay as they are."""
    embedding: Any = model.get_base_model().get_input_embeddings()
    for adapter, config in model.peft_config.items():
        tied = getattr(config, "target_modules_to_tie", None) or ()
        for name, layer in model.named_modules():
            if not name.endswith(tuple(f".{target}" for target in tied)):
                continue
            if adapter in getattr(layer, "lora_A", ()) and layer is not embedding:
                layer.lora_A[adapter] = TransposedLinear(embedding.lora_embedding_B, adapter)
                layer.lora_B[adapter] = TransposedLinear(embedding.lora_embedding_A, adapter)
