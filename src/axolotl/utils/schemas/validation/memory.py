"""Checkpointing, offloading, tiling, quantization-aware training."""

from __future__ import annotations

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import (
    fill,
    is_reentrant,
    torch_is_older_than,
)

LOG = get_logger(__name__)

# Operations that adapters change: their saved results would be those of the frozen weights alone.
MATMUL_OPS = frozenset({"matmul", "mm", "addmm", "bmm", "linear", "all_matmuls"})
# Arguments of torch.utils.checkpoint.checkpoint, and the two that transformers takes out.
NON_REENTRANT_ARGUMENTS = frozenset({"determinism_check", "debug", "early_stop"})
CHECKPOINT_ARGUMENTS = NON_REENTRANT_ARGUMENTS | {"use_reentrant", "preserve_rng_state", "every_n_layers", "offload"}
SELECTIVE_DEFAULT = {"save": ["attention"], "save_sliding_window": False, "offload": False}


def checkpointing_takes_known_arguments(cfg: DictDefault) -> None:
    """`gradient_checkpointing_kwargs` are those of torch's checkpoint and of transformers, and choose its kind."""
    kwargs = cfg.gradient_checkpointing_kwargs
    if not kwargs:
        return
    unknown = sorted(set(kwargs) - CHECKPOINT_ARGUMENTS)
    if unknown:
        raise ConfigError(
            f"`gradient_checkpointing_kwargs` has no argument {', '.join(f'`{name}`' for name in unknown)}. Known are "
            f"{', '.join(sorted(CHECKPOINT_ARGUMENTS))}."
        )
    if kwargs.use_reentrant is not None and not isinstance(kwargs.use_reentrant, bool):
        raise ConfigError(
            f"`gradient_checkpointing_kwargs: {{use_reentrant: {kwargs.use_reentrant}}}` must be true or false, without quotes."
        )
    if kwargs.use_reentrant is None:
        kwargs.use_reentrant = False
        note_choice(
            cfg, "gradient_checkpointing_kwargs.use_reentrant", False, "works with frozen inputs and every wrapper"
        )
    elif kwargs.use_reentrant and set(kwargs) & NON_REENTRANT_ARGUMENTS:
        wrong = sorted(set(kwargs) & NON_REENTRANT_ARGUMENTS)
        raise ConfigError(
            f"`gradient_checkpointing_kwargs: {{use_reentrant: true}}` does not take {', '.join(f'`{name}`' for name in wrong)}. Write "
            "`use_reentrant: false`."
        )


def frozen_embeddings_break_reentrant_checkpointing(cfg: DictDefault) -> None:
    """Reentrant checkpointing finds no gradient through inputs that are frozen."""
    if cfg.unfrozen_parameters and is_reentrant(cfg) is True:
        raise ConfigError(
            "`unfrozen_parameters` is not supported with `gradient_checkpointing_kwargs: {use_reentrant: true}`: no gradient would reach the "
            "unfrozen layers. Write `use_reentrant: false`."
        )


def offloading_is_a_key_of_its_own(cfg: DictDefault) -> None:
    """`gradient_checkpointing: offload` is `true` with `activation_offloading`."""
    modes = {"offload": True, "offload_disk": "disk"}
    if cfg.gradient_checkpointing in modes:
        written = cfg.gradient_checkpointing
        LOG.warning(
            "`gradient_checkpointing: %s` is deprecated. Write `gradient_checkpointing: true` and `activation_offloading: %s`.",
            written,
            str(modes[written]).lower(),
        )
        fill(cfg, "activation_offloading", modes[written], f"`gradient_checkpointing: {written}`")
        fill(cfg, "gradient_checkpointing", True, f"`gradient_checkpointing: {written}`")


def only_checkpoints_are_offloaded(cfg: DictDefault) -> None:
    """Activations that are kept anyway are not moved away."""
    if cfg.activation_offloading and not cfg.gradient_checkpointing:
        raise ConfigError(
            f"activation_offloading requires gradient_checkpointing: `activation_offloading: {cfg.activation_offloading}`. Write `gradient_checkpointing: true`."
        )


def offloaded_hidden_states_use_plain_checkpointing(cfg: DictDefault) -> None:
    """`activation_offloading: hidden_states` moves the inputs of checkpointed layers; the non-reentrant kind is the default."""
    if cfg.activation_offloading != "hidden_states":
        return
    kwargs = cfg.gradient_checkpointing_kwargs or DictDefault()
    if kwargs.use_reentrant and cfg.unfrozen_parameters:
        raise ConfigError(
            "`activation_offloading: hidden_states` with `use_reentrant: true` is not supported with `unfrozen_parameters`. Write `use_reentrant: false`."
        )
    if kwargs.use_reentrant is None:
        kwargs.use_reentrant = False
        cfg["gradient_checkpointing_kwargs"] = kwargs
        note_choice(cfg, "gradient_checkpointing_kwargs.use_reentrant", False, "`activation_offloading: hidden_states`")
    if cfg.adapter:
        LOG.warning(
            "`activation_offloading: hidden_states` with an adapter saves little memory: the frozen layers keep few activations."
        )


def selective_checkpointing_refines_checkpointing(cfg: DictDefault) -> None:
    """Selective checkpointing chooses what a checkpointed layer keeps. It needs the non-reentrant kind and nothing that moves activations."""
    if not cfg.selective_checkpointing:
        return
    if cfg.selective_checkpointing is True:
        fill(
            cfg,
            "selective_checkpointing",
            dict(SELECTIVE_DEFAULT),
            "`selective_checkpointing: true` keeps the results of attention",
        )
    problems = []
    if not cfg.gradient_checkpointing:
        problems.append(
            "selective_checkpointing requires gradient_checkpointing. Write `gradient_checkpointing: true`."
        )
    if is_reentrant(cfg):
        problems.append(
            "selective_checkpointing requires `use_reentrant: false` under `gradient_checkpointing_kwargs`."
        )
    if cfg.activation_offloading and cfg.activation_offloading != "hidden_states":
        problems.append(
            f"selective_checkpointing cannot be combined with `activation_offloading: {cfg.activation_offloading}`. Write "
            "`activation_offloading: hidden_states`, or remove one."
        )
    words = cfg.selective_checkpointing.save or []
    unknown = [word for word in words if word != "attention" and word not in MATMUL_OPS and not set(word) & set(".:")]
    if unknown:
        problems.append(
            f"`selective_checkpointing: {{save: {unknown}}}` names no operation. Known are attention, {', '.join(sorted(MATMUL_OPS))}, and "
            "operators of torch by their full names, such as `aten.mm`."
        )
    saved = MATMUL_OPS.intersection(words)
    if cfg.adapter and saved:
        problems.append(
            f"selective_checkpointing with an adapter cannot save matmul results ({', '.join(sorted(saved))}): the adapter changes them. Write "
            "`save: [attention]`."
        )
    if problems:
        raise ConfigError(problems)
    if cfg.torch_compile is None:
        fill(
            cfg,
            "torch_compile",
            False,
            "compiled layers choose for themselves what to keep, not by `selective_checkpointing`",
        )
    if cfg.torch_compile:
        LOG.warning(
            "`selective_checkpointing` with `torch_compile: true`: the compiler chooses for itself what to keep."
        )


def layer_offloading_moves_frozen_weights(cfg: DictDefault) -> None:
    """Only weights that do not train are moved, by one process that holds them whole."""
    if not cfg.layer_offloading:
        return
    problems = []
    if not cfg.adapter and not cfg.unfrozen_parameters and not cfg.lisa_n_layers:
        problems.append(
            "`layer_offloading: true` moves frozen weights, but without `adapter` all weights train. Write `adapter: lora`, or remove "
            "`layer_offloading` (`activation_offloading: true` and `optimizer: adamw_8bit` save memory in full training)."
        )
    if cfg.fsdp or cfg.fsdp_config or cfg.deepspeed:
        problems.append(
            "`layer_offloading: true` cannot be combined with FSDP or DeepSpeed, which move weights themselves. Write "
            "`fsdp_config: {offload_params: true}`, or ZeRO-3 with `offload_param`."
        )
    if cfg.torch_compile is True:
        problems.append(
            "`layer_offloading: true` cannot be combined with `torch_compile: true`: compiled code expects weights where they were. "
            "Remove one."
        )
    if problems:
        raise ConfigError(problems)
    if cfg.load_in_8bit:
        LOG.warning(
            "`layer_offloading: true` with `load_in_8bit: true`: 8-bit weights stay on the GPU, only the others move."
        )


def tiles_are_of_the_models_own_mlp(cfg: DictDefault) -> None:
    """Tiling computes what the model's MLP computes; its settings need it."""
    if not cfg.tiled_mlp:
        if cfg.tiled_mlp_num_shards:
            LOG.warning("`tiled_mlp_num_shards: %s` has no effect without `tiled_mlp: true`.", cfg.tiled_mlp_num_shards)
        return
    if cfg.torch_compile is True:
        raise ConfigError(
            "`tiled_mlp: true` cannot be combined with `torch_compile: true`: compiled, the pieces would be one graph again. Remove one."
        )
    if cfg.tiled_mlp_use_original_mlp is False:
        fill(
            cfg,
            "tiled_mlp_use_original_mlp",
            True,
            "a general MLP would compute the same for Llama and something else for other models",
        )


def losses_are_cut_in_chunks_once(cfg: DictDefault) -> None:
    """A number of chunks needs the chunked loss."""
    if cfg.chunked_cross_entropy_num_chunks and not cfg.chunked_cross_entropy:
        LOG.warning(
            "`chunked_cross_entropy_num_chunks: %s` has no effect without `chunked_cross_entropy: true`.",
            cfg.chunked_cross_entropy_num_chunks,
        )


def rounding_is_simulated_on_full_weights(cfg: DictDefault) -> None:
    """Quantization-aware training rounds the weights that train; adapters and quantized bases have none of those."""
    if not cfg.qat:
        return
    problems = []
    if cfg.adapter or cfg.peft:
        problems.append(
            f"QAT and PEFT cannot be used together: `qat` with `{'adapter' if cfg.adapter else 'peft'}`. Remove one."
        )
    for key in ("load_in_8bit", "load_in_4bit"):
        if cfg[key]:
            problems.append(f"QAT and {key} cannot be used together: `qat` with `{key}: true`. Remove one.")
    if cfg.qat.weight_dtype == "ternary" and cfg.qat.activation_dtype not in (None, "int8"):
        problems.append(
            f"`qat: {{weight_dtype: ternary}}` requires `activation_dtype: int8`, but it is `{cfg.qat.activation_dtype}`."
        )
    if torch_is_older_than(cfg, "2.6.0"):
        problems.append("QAT is not supported on torch version < 2.6.0. Update torch.")
    if problems:
        raise ConfigError(problems)


CHECKS = (
    checkpointing_takes_known_arguments,
    frozen_embeddings_break_reentrant_checkpointing,
    offloading_is_a_key_of_its_own,
    only_checkpoints_are_offloaded,
    offloaded_hidden_states_use_plain_checkpointing,
    selective_checkpointing_refines_checkpointing,
    layer_offloading_moves_frozen_weights,
    tiles_are_of_the_models_own_mlp,
    losses_are_cut_in_chunks_once,
    rounding_is_simulated_on_full_weights,
)
