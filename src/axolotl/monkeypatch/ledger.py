"""Every change that this program makes to somebody else's code, one row each.

A row says what is changed, why, until when, at which stage of loading, and under which condition. `axolotl patches
config.yml` prints the rows of a run. A row climbs the ladder and stops at the first step that holds: a documented hook, a
subclass, one reversible attribute. All rows are safe to apply twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from axolotl.exceptions import ConfigError
from axolotl.loaders.utils import plain_model
from axolotl.monkeypatch.attention import shifted, varlen
from axolotl.monkeypatch.attention.documents import (
    MASK_BUILDERS,
    add_document_hook,
    find_documents_once,
    register_masks,
)
from axolotl.monkeypatch.attention.flex import apply_flex_compile_kwargs
from axolotl.monkeypatch.attention.scaled_softmax import apply_scaling_softmax
from axolotl.monkeypatch.compile_layers import apply_torch_compile
from axolotl.monkeypatch.four_bit_blocks import replace_cpu_dequantization
from axolotl.monkeypatch.fp8_base import apply_fp8_base
from axolotl.monkeypatch.fp8_linear import apply_fp8_training
from axolotl.monkeypatch.gradient_checkpointing.choose import why_not_offloaded_by_default
from axolotl.monkeypatch.gradient_checkpointing.install import apply_activation_policies
from axolotl.monkeypatch.gradient_checkpointing.selective import Selection
from axolotl.monkeypatch.joined_linear import apply_joined_linear
from axolotl.monkeypatch.layer_graphs import apply_cuda_graphs
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.monkeypatch.tiled_mlp import apply_tiled_mlp
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.distributed import get_world_size
from axolotl.utils.environment import free_host_memory
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
    base = plain_model(model)
    if isinstance(base, PreTrainedModel):
        used = base.config._attn_implementation or ""
        ours = used in (varlen.NAME, shifted.NAME)
        for carrier in (base, model):
            add_document_hook(carrier, varlen=ours or "flash" in used, checked=ours or used in MASK_BUILDERS)


def _base_of(model: nn.Module | None) -> PreTrainedModel:
    base = plain_model(model)
    assert isinstance(base, PreTrainedModel)
    return base


def _apply_scaling_softmax(cfg: DictDefault, model: nn.Module | None) -> None:
    apply_scaling_softmax(_base_of(model), cfg.scaling_softmax_factor, cfg.scaling_softmax_bias)


def _apply_flex_compile_kwargs(cfg: DictDefault, model: nn.Module | None) -> None:
    used = _base_of(model).config._attn_implementation
    if used == "flex_attention":
        apply_flex_compile_kwargs(cfg.flex_attn_compile_kwargs)
    else:
        note_choice(cfg, "flex_attn_compile_kwargs", None, f"the attention of this run is `{used}`, not flex attention")


def _keep_four_bits_unpacked(cfg: DictDefault, model: nn.Module | None) -> None:
    for module in model.modules() if model is not None else ():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False


def _dequantize_across_rows(cfg: DictDefault, model: nn.Module | None) -> None:
    replace_cpu_dequantization()


def _wants_lora_kernels(cfg: DictDefault) -> bool:
    return bool(cfg.adapter) and any(cfg[key] for key in LORA_KERNELS)


def _apply_lora_kernels(cfg: DictDefault, model: nn.Module | None) -> None:
    if isinstance(model, PeftModel):
        apply_lora_kernel_patches(model, cfg)
        return
    for key in LORA_KERNELS:
        if cfg[key]:
            note_choice(cfg, key, False, "the trainer puts the adapter on after the model is loaded")


def _apply_fp8_base(cfg: DictDefault, model: nn.Module | None) -> None:
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"`fp8: true` quantizes the base below an adapter, but with `rl: {cfg.rl}` the trainer puts the adapter on later. Remove `fp8`."
        )
    apply_fp8_base(model, cfg)


def _apply_fp8_training(cfg: DictDefault, model: nn.Module | None) -> None:
    assert model is not None
    apply_fp8_training(model, cfg)


def _apply_joined_linear(cfg: DictDefault, model: nn.Module | None) -> None:
    if model is not None:
        apply_joined_linear(cfg, model)


def _wants_compile(cfg: DictDefault) -> bool:
    return cfg.torch_compile is None or bool(cfg.torch_compile)


def _apply_torch_compile(cfg: DictDefault, model: nn.Module | None) -> None:
    if model is not None:
        apply_torch_compile(cfg, model)


def _apply_cuda_graphs(cfg: DictDefault, model: nn.Module | None) -> None:
    if model is not None:
        apply_cuda_graphs(cfg, model, has_gpu=torch.cuda.is_available(), num_processes=get_world_size())


def _wants_activation_policies(cfg: DictDefault) -> bool:
    unsaid = cfg.activation_offloading is None
    return bool(cfg.gradient_checkpointing and (unsaid or cfg.activation_offloading or cfg.selective_checkpointing))


def _apply_activation_policies(cfg: DictDefault, model: nn.Module | None) -> None:
    assert model is not None
    wanted, selection = cfg.selective_checkpointing, None
    if cfg.activation_offloading is None:
        machine = {"has_gpu": torch.cuda.is_available(), "free_host_bytes": free_host_memory()}
        config = plain_model(model).config
        if why_not_offloaded_by_default(cfg, config, num_processes=get_world_size(), **machine) is None:
            note_choice(cfg, "activation_offloading", True, "the copies to host memory hide behind the layers")
            cfg["activation_offloading"] = True
        elif not wanted:
            return
    if wanted:
        selection = Selection(
            save=tuple(wanted.save or ("attention",)),
            save_sliding_window=bool(wanted.save_sliding_window),
            recompute_layer_types=tuple(wanted.recompute_layer_types or ()),
            offload=bool(wanted.offload),
        )
    apply_activation_policies(model, offloading=cfg.activation_offloading or None, selection=selection)


def _apply_tiled_mlp(cfg: DictDefault, model: nn.Module | None) -> None:
    assert model is not None
    apply_tiled_mlp(model, cfg.tiled_mlp_num_shards)


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
        name="axolotl_shifted attention",
        what="registers an attention function with transformers' AttentionInterface and AttentionMaskInterface",
        why="`s2_attention` attends within groups of tokens, shifted for half of the heads",
        until="transformers ships shifted sparse attention",
        stage="pre_model_load",
        condition=lambda cfg: bool(cfg.s2_attention),
        apply=lambda cfg, model: shifted.register(),
    ),
    Patch(
        name="documents in masks",
        what="registers mask builders for sdpa, eager and flex_attention that add one condition to those of transformers",
        why="transformers forgets packed documents when a batch has a mask or a cache, and some models never tell it positions; "
        "and it asks the GPU for each mask whether rows are padded",
        until="every model of transformers hands position_ids to its masks, they are read beside an attention mask, and padding "
        "can be told",
        stage="pre_model_load",
        condition=_always,
        apply=lambda cfg, model: register_masks(),
    ),
    Patch(
        name="documents found once",
        what="`find_packed_sequence_indices` of transformers' masking_utils, which does nothing where a hook told the documents",
        why="it asks the GPU a question in every micro-batch, and the CPU falls behind while it waits for the answer",
        until="transformers takes the borders of documents as an answer",
        stage="pre_model_load",
        condition=_always,
        apply=lambda cfg, model: find_documents_once(),
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
        name="scalable softmax",
        what="registers the attention function of the run anew, as one that scales the queries of models whose config says so",
        why="`scaling_softmax` multiplies scores by the logarithm of the number of keys",
        until="transformers scales scores by length",
        stage="post_model_load",
        condition=lambda cfg: bool(cfg.scaling_softmax),
        apply=_apply_scaling_softmax,
    ),
    Patch(
        name="compiled flex attention",
        what="`WrappedFlexAttention` of transformers by a function compiled with `flex_attn_compile_kwargs`",
        why="transformers compiles flex attention without arguments",
        until="transformers takes arguments for compiling flex attention",
        stage="post_model_load",
        condition=lambda cfg: bool(cfg.flex_attn_compile_kwargs),
        apply=_apply_flex_compile_kwargs,
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
        name="blocks of 4-bit weights on a CPU",
        what="the CPU kernel of the operator `bitsandbytes::dequantize_4bit`",
        why="it reads weights wrongly whose width is no multiple of the block size, as blocks go on across the ends of rows",
        until="bitsandbytes (0.50.2 does not) makes such weights dense as it packed them",
        stage="post_model_build",
        condition=lambda cfg: bool(cfg.load_in_4bit) and not torch.cuda.is_available(),
        apply=_dequantize_across_rows,
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
    Patch(
        name="frozen base in fp8",
        what="the base layers of adapters by `Fp8Linear`, where the LoRA kernels run them",
        why="frozen weights need no more than 8 bits to multiply by, and the matrix units are twice as fast with them",
        until="peft has base layers in fp8",
        stage="post_model_load",
        condition=lambda cfg: bool(cfg.fp8 and cfg.adapter),
        apply=_apply_fp8_base,
    ),
    Patch(
        name="linear layers that train in fp8",
        what="the class of the linear layers of decoder layers, by `Fp8TrainingLinear`, which quantizes the factors of its matmuls",
        why="the matrix units are twice as fast in fp8",
        until="transformers trains in fp8 without a package of its own",
        stage="post_model_load",
        condition=lambda cfg: bool(cfg.fp8 and not cfg.adapter),
        apply=_apply_fp8_training,
    ),
    Patch(
        name="tiled MLP",
        what="the forward of each layer's MLP, on the instance, by one that calls it for pieces of the sequence",
        why="the wide intermediates of an MLP over a very long sequence do not fit into memory at once",
        until="transformers tiles MLPs",
        stage="post_model_load",
        condition=lambda cfg: bool(cfg.tiled_mlp),
        apply=_apply_tiled_mlp,
    ),
    Patch(
        name="activation policies",
        what="`_set_gradient_checkpointing` of the model, on the instance, by one that gives each layer its own checkpoint function",
        why="transformers has one checkpoint function for all layers and leaves their inputs on the GPU",
        until="transformers takes a checkpoint function per layer",
        stage="post_model_load",
        condition=_wants_activation_policies,
        apply=_apply_activation_policies,
    ),
    Patch(
        name="joined projections",
        what="the class of attentions whose weights are all trained, and the memory in which those of q, k and v lie: in compiled "
        "layers they are one matmul",
        why="the matmuls of few key-value heads are too small for a GPU, and every projection reads its input again",
        until="transformers keeps projections of one input in one weight",
        stage="post_model_load",
        condition=lambda cfg: _wants_compile(cfg) and not cfg.adapter and not cfg.fp8,
        apply=_apply_joined_linear,
    ),
    Patch(
        name="compiled layers",
        what="the forward of each decoder layer, on the instance, by a compiled one",
        why="`torch.compile` of a whole model takes minutes, breaks at hooks and compiles anew for every shape",
        until="transformers compiles models layer by layer",
        stage="post_model_load",
        condition=_wants_compile,
        apply=_apply_torch_compile,
    ),
    Patch(
        name="CUDA graphs of layers",
        what="how the compiled forward of each decoder layer is run: recorded once per shape, then replayed",
        why="launching the kernels of a small model takes as long as running them",
        until="the graphs of `torch.compile` allow gradients to accumulate over micro-batches",
        stage="post_model_load",
        condition=lambda cfg: cfg.cuda_graphs is None or bool(cfg.cuda_graphs),
        apply=_apply_cuda_graphs,
    ),
)


def rows_for(cfg: DictDefault) -> list[Patch]:
    """The rows that a run with `cfg` will apply, in order."""
    return [patch for patch in LEDGER if patch.condition(cfg)]
