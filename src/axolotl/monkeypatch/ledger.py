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
from transformers import PreTrainedModel

from axolotl.monkeypatch.attention import varlen
from axolotl.monkeypatch.attention.documents import MASK_BUILDERS, add_document_hook, register_masks
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
    if isinstance(model, PreTrainedModel):
        used = model.config._attn_implementation or ""
        reports = used == varlen.NAME or used in MASK_BUILDERS
        add_document_hook(model, varlen=used == varlen.NAME or "flash" in used, checked=reports)


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
        name="documents in masks",
        what="registers mask builders for sdpa, eager and flex_attention that add one condition to those of transformers",
        why="transformers forgets packed documents when a batch has a mask or a cache, and some models never tell it positions",
        until="every model of transformers hands position_ids to its masks, and they are read beside an attention mask",
        stage="pre_model_load",
        condition=_always,
        apply=lambda cfg, model: register_masks(),
    ),
    Patch(
        name="document borders",
        what="forward hooks on the decoder that tell its documents to the attention backend, and check that it asked",
        why="each backend reads another form of them; transformers' flash attention reads positions only in batches of one row",
        until="transformers' attention takes documents in one form on all backends",
        stage="post_model_build",
        condition=_always,
        apply=_add_document_hook,
    ),
)


def rows_for(cfg: DictDefault) -> list[Patch]:
    """The rows that a run with `cfg` will apply, in order."""
    return [patch for patch in LEDGER if patch.condition(cfg)]
