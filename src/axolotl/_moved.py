"""Old names: documented module paths that describe how something was once done, and where it is done today.

Each row of `MOVED` has a module of three lines at its path, so that `import axolotl.monkeypatch.unsloth_` keeps working. A
name that lives elsewhere today is found there; any other name is an AttributeError that says what replaced it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OldName:
    """One row.

    Attributes:
        once: what the module did.
        today: what does it now.
        names: public names that live elsewhere: name -> module that defines it.
    """

    once: str
    today: str
    names: dict[str, str] = field(default_factory=dict)


_ATTENTION = "`attn_implementation`, through axolotl.monkeypatch.attention"
_CU = "axolotl.monkeypatch.utils"

MOVED: dict[str, OldName] = {
    "axolotl.monkeypatch.llama_attn_hijack_flash": OldName(
        "replaced the attention of Llama by flash attention", _ATTENTION
    ),
    "axolotl.monkeypatch.llama_attn_hijack_xformers": OldName(
        "replaced the attention of Llama by that of xformers", _ATTENTION
    ),
    "axolotl.monkeypatch.mistral_attn_hijack_flash": OldName(
        "replaced the attention of Mistral by flash attention", _ATTENTION
    ),
    "axolotl.monkeypatch.btlm_attn_hijack_flash": OldName(
        "replaced the attention of BTLM by flash attention", _ATTENTION
    ),
    "axolotl.monkeypatch.stablelm_attn_hijack_flash": OldName(
        "replaced the attention of StableLM by flash attention", _ATTENTION
    ),
    "axolotl.monkeypatch.llama_patch_multipack": OldName(
        "told packed documents to the masks of Llama",
        "axolotl.monkeypatch.attention.documents",
        {"get_cu_seqlens": _CU, "get_cu_seqlens_from_pos_ids": _CU, "mask_2d_to_4d": _CU},
    ),
    "axolotl.monkeypatch.llama_expand_mask": OldName(
        "expanded the attention mask of packed rows", "axolotl.monkeypatch.attention"
    ),
    "axolotl.monkeypatch.mixtral": OldName(
        "told packed documents to Mixtral", "axolotl.monkeypatch.attention.documents"
    ),
    "axolotl.monkeypatch.transformers_fa_utils": OldName(
        "cast queries back to half precision", "axolotl.monkeypatch.attention.varlen"
    ),
    "axolotl.monkeypatch.trainer_fsdp_optim": OldName("saved the optimizer under FSDP", "transformers' own Trainer"),
    "axolotl.monkeypatch.unsloth_": OldName(
        "patched models with unsloth's kernels", "`lora_mlp_kernel`, `lora_qkv_kernel` and `lora_o_kernel`"
    ),
}


def old_name(module: str) -> Callable[[str], Any]:
    """`__getattr__` of the module at an old path."""
    row = MOVED[module]

    def __getattr__(name: str) -> Any:
        if name in row.names:
            return getattr(importlib.import_module(row.names[name]), name)
        raise AttributeError(f"{module}.{name} is gone: the module {row.once}. Today that is done by {row.today}.")

    return __getattr__
