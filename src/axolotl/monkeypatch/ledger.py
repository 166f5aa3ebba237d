"""Every change that this program makes to somebody else's code, one row each.

A row says what is changed, why, until when, at which stage of loading, and under which condition. `axolotl patches
config.yml` prints the rows of a run. A row climbs the ladder and stops at the first step that holds: a documented hook, a
subclass, one reversible attribute. All rows are safe to apply twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from axolotl.monkeypatch.attention import varlen
from axolotl.monkeypatch.attention.documents import add_document_hook
from axolotl.utils.dict import DictDefault

Stage = Literal["pre_model_load", "post_plugin_pre_model_load", "post_model_build", "post_model_load"]


@dataclass(frozen=True)
class Patch:
    """One row of the ledger.

    Attributes:
        name: short, as it is printed.
        what: what is changed, and by which hook.
        why: what goes wrong without it.
        until: when the row can be deleted.
        stage: at which stage of loading it is applied.
        condition: whether a config needs it.
        apply: does it. Stages before the model get None in place of the model.
    """

    name: str
    what: str
    why: str
    until: str
    stage: Stage
    condition: Callable[[DictDefault], bool]
    apply: Callable[[DictDefault, nn.Module | None], None]


def _always(cfg: DictDefault) -> bool:
    return True


def _add_document_hook(cfg: DictDefault, model: nn.Module | None) -> None:
    if model is not None:
        add_document_hook(model, varlen=model.config._attn_implementation in _VARLEN)


_VARLEN = (varlen.NAME, "flash_attention_2", "flash_attention_3", "flash_attention_4")

LEDGER: tuple[Patch, ...] = (
    Patch(
        name="axolotl_varlen attention",
        what="registers an attention function with transformers' AttentionInterface and AttentionMaskInterface",
        why="packed rows need attention that stops at document borders, without a compiled package",
        until="transformers ships an attention built on torch.nn.attention.varlen that also runs on a CPU",
        stage="pre_model_load",
        condition=_always,
        apply=lambda cfg, model: varlen.register(),
    ),
    Patch(
        name="document borders",
        what="a forward pre-hook on the decoder that tells its documents to the attention backend",
        why="transformers forgets packed documents when a batch has a mask, a cache, or more than one row with flash attention",
        until="transformers' masks read position_ids beside an attention mask, and its flash attention reads them for any batch",
        stage="post_model_build",
        condition=_always,
        apply=_add_document_hook,
    ),
)


def rows_for(cfg: DictDefault) -> list[Patch]:
    """The rows that a run with `cfg` will apply, in order."""
    return [patch for patch in LEDGER if patch.condition(cfg)]
