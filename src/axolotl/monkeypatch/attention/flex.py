"""`flex_attn_compile_kwargs`: how PyTorch's flex attention is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as theirs

from axolotl.exceptions import ConfigError


def apply_flex_compile_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Let transformers run flex attention compiled with `kwargs` of `torch.compile`. Safe to apply twice.

    transformers keeps the compiled function in a class that compiles it anew, without arguments, whenever training turns to
    evaluation or back. Inside layers that are compiled as a whole it is compiled with them.

    Raises:
        ConfigError: `torch.compile` does not take them.
    """
    try:
        compiled = torch.compile(flex_attention, **kwargs)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"`flex_attn_compile_kwargs: {dict(kwargs)}`: torch.compile does not take them: {str(error).splitlines()[0]}"
        ) from error
    setattr(theirs, "WrappedFlexAttention", lambda training: lambda: compiled)  # noqa: B010
