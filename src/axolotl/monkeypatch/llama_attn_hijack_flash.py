"""Old name: flash attention for Llama. See axolotl._moved."""

from __future__ import annotations

import torch
from torch import nn

from axolotl._moved import old_name
from axolotl.exceptions import NotBuiltError

__getattr__ = old_name(__name__)


def flashattn_forward_with_s2attn(
    self: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_value: tuple[torch.Tensor] | None = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor] | None]:
    """Shifted sparse attention of LongLoRA as the forward of an attention layer of older transformers.

    Raises:
        NotBuiltError: always; layers call an attention function, and `s2_attention: true` registers one.
    """
    raise NotBuiltError(
        "No layer of today's transformers takes a forward like this one. Write `s2_attention: true`, which registers shifted "
        "sparse attention."
    )
