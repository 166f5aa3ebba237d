"""Every change that this program makes to somebody else's code, one row each.

A row says what is changed, why, until when, at which stage of loading, and under which condition. `axolotl patches
config.yml` prints the rows of a run. A row climbs the ladder and stops at the first step that holds: a documented hook, a
subclass, one reversible attribute. All rows are safe to apply twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from axolotl.monkeypatch.attention import varlen
from axolotl.monkeypatch.attention.documents import MASK_BUILDERS, add_document_hook, register_masks
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.schemas.validation.common import LORA_KERNELS

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
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, PreTrainedModel):
        used = base.config._attn_implementation or ""
        reports = used == varlen.NAME or used in MASK_BUILDERS
        for carrier in (base, model):
            add_document_hook(carrier, varlen=used == varlen.NAME or "flash" in used, checked=reports)


def _keep_four_bits_unpacked(cfg: DictDefault, model: nn.Module | None) -> None:
    for module in model.modules() if model is not None else ():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False


def _wants_lora_kernels(cfg: DictDefault) -> bool:
    return bool(cfg.adapter) and any(cfg[key] for key in LORA_KERNELS)


def _apply_lora_kernels(cfg: DictDefault, model: nn.Module | None) -> None:
    if cfg.torch_compile:
        # Seen on a GPU with PyTorch 2.11: the layers compile, the loss is right, the gradients of the adapters are zero.
        refusal = "`torch_compile` has been seen to lose the gradients of fused adapters"
    elif not isinstance(model, PeftModel):
        refusal = "the trainer puts the adapter on after the model is loaded"
    else:
        apply_lora_kernel_patches(model, cfg)
        return
    for key in LORA_KERNELS:
        if cfg[key]:
            note_choice(cfg, key, False, refusal)


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
        what="forward hooks on model and decoder that tell its documents to the attention backend, and check that it asked",
        why="each backend reads another form of them; transformers' flash attention reads positions only in batches of one row",
        until="transformers' attention takes documents in one form on all backends",
        stage="post_model_load",
        condition=_always,
        apply=_add_document_hook,
    ),
    Patch(
        name="4-bit weights on a CPU",
        what="sets `support_avx512bf16_for_cpu` of bitsandbytes' 4-bit layers to False",
        why="in its first forward for evaluation such a layer repacks its weight for good: scales are rounded to bf16, later "
        "steps get no gradient through it, and a width that is no multiple of the block size fails",
        until="bitsandbytes repacks a copy, or has a backward pass for packed weights",
        stage="post_model_build",
        condition=lambda cfg: bool(cfg.load_in_4bit),
        apply=_keep_four_bits_unpacked,
    ),
    Patch(
        name="LoRA kernels",
        what="the forward of MLPs and projections with an adapter, on the instance, and of the attention class around its own",
        why="peft runs each projection by itself, keeps every input of every matmul and passes over activations several times",
        until="peft fuses projections that share an input",
        stage="post_model_load",
        condition=_wants_lora_kernels,
        apply=_apply_lora_kernels,
    ),
)


def rows_for(cfg: DictDefault) -> list[Patch]:
    """The rows that a run with `cfg` will apply, in order."""
    return [patch for patch in LEDGER if patch.condition(cfg)]
