"""Keys and values of older versions: what they are called now, what replaced them, what is gone.

Tables, read by `apply_renames` before anything else looks at a config.
"""

from __future__ import annotations

from typing import Any

from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.fields import Int, Words, key

LOG = get_logger(__name__)

# Two spellings of one key, both in use. No warning.
ALIASES = {
    "model_type": "type_of_model",
    "model_config": "overrides_of_model_config",
    "model_kwargs": "overrides_of_model_kwargs",
    "model_revision": "revision_of_model",
    "epochs": "num_epochs",
    "flash_attn_cross_entropy_loss": "flash_attn_cross_entropy",
}

# Old name -> new name, same meaning.
RENAMES = {
    "dpo_beta": "rl_beta",
    "evaluation_strategy": "eval_strategy",
    "dataset_processes": "dataset_num_proc",
    "pretrain_multipack_buffer_size": "streaming_multipack_buffer_size",
    "sequence_parallel_degree": "context_parallel_size",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "load_4bit": "load_in_4bit",
    "load_8bit": "load_in_8bit",
    "offload_activations": "activation_offloading",
    "eval_table_max_new_tokens": "eval_max_new_tokens",
    "relora_steps": "jagged_restart_steps",
    "relora_warmup_steps": "jagged_restart_warmup_steps",
    "relora_anneal_steps": "jagged_restart_anneal_steps",
}

# Values of `optimizer` that are called otherwise now.
OPTIMIZER_RENAMES = {
    "adamw_hf": "adamw_torch",
    "adamw_apex_fused": "adamw_torch_fused",
    "ao_adamw_4bit": "adamw_torch_4bit",
    "ao_adamw_8bit": "adamw_torch_8bit",
    "lion": "lion_32bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_lion": "paged_lion_32bit",
}
# Not another algorithm, only another name: no warning.
SILENT_OPTIMIZER_RENAMES = frozenset({"adamw_hf", "lion", "paged_adamw", "paged_lion"})

# Keys that would change a run and cannot be honoured: an error unless empty or false.
REMOVED = {
    "unsloth_cross_entropy_loss": "remove it; the loss is fused anyway",
    "unsloth_lora_mlp": "use `lora_mlp_kernel: true`",
    "unsloth_lora_qkv": "use `lora_qkv_kernel: true`",
    "unsloth_lora_o": "use `lora_o_kernel: true`",
    "unsloth_rms_norm": "use `liger_rms_norm: true` with the liger plugin",
    "unsloth_rope": "use `liger_rope: true` with the liger plugin",
    "max_packed_sequence_len": "use `sample_packing: true` with `sequence_len`",
    "rope_scaling": "write it under `overrides_of_model_config:` as `rope_scaling:`",
    "dpo_use_logits_to_keep": "remove it; the prompt's logits are never computed",
    "dpo_generate_during_eval": "remove it",
    "dpo_norm_loss": "use `dpo_loss_type` with a length-normalised loss",
    "rpo_alpha": "use `dpo_loss_type: [sigmoid, sft]` with `dpo_loss_weights`",
    "flash_attn_rms_norm": "use `liger_rms_norm: true` with the liger plugin",
    "xpos_rope": "use `overrides_of_model_config: {rope_scaling: ...}`",
    "landmark_attention": "remove it; for long context use `flash_attention: true` with a larger `sequence_len`",
}

# Keys that only older versions knew and that no longer change anything: a warning, then dropped.
OBSOLETE = {
    "debug": "use the flag `--debug` of `axolotl preprocess` or `axolotl train`",
    "gptq_groupsize": "it is read from the quantized model",
    "gptq_model_v1": "GPTQ models load with `gptq: true` alone",
    "gptq_triton": "GPTQ models load with `gptq: true` alone",
    "lora_out_dir": "use `output_dir`",
    "base_model_ignore_patterns": "only the files that are needed are downloaded",
    "flash_attn_fuse_qkv": "use `lora_qkv_kernel: true`",
    "log_sweep_min_lr": "the schedule `log_sweep` is gone; see `lr_scheduler`",
    "log_sweep_max_lr": "the schedule `log_sweep` is gone; see `lr_scheduler`",
}


class DeprecatedParameters(Words):
    """Keys that are still read, under another name."""

    max_packed_sequence_len: Int | None = key("Removed: use `sample_packing` with `sequence_len`.")
    rope_scaling: Any | None = key("Removed: write it under `overrides_of_model_config`.")
    noisy_embedding_alpha: float | None = key("Deprecated: use `neftune_noise_alpha`.")
    dpo_beta: float | None = key("Deprecated: use `rl_beta`.")
    evaluation_strategy: str | None = key("Deprecated: use `eval_strategy`.")
    dataset_processes: Int | None = key("Deprecated: use `dataset_num_proc`.")
    pretrain_multipack_buffer_size: Int | None = key("Deprecated: use `streaming_multipack_buffer_size`.")
    sequence_parallel_degree: Int | None = key("Deprecated: use `context_parallel_size`.")
    gc_steps: Int | None = key("Deprecated: use `torch_empty_cache_steps` and `gc_collect_steps`.")
    fsdp_final_state_dict_type: str | None = key("Deprecated: use `final_state_dict_type` under `fsdp_config`.")
    dpo_use_logits_to_keep: bool | None = key("Removed.")
    dpo_generate_during_eval: bool | None = key("Removed.")
    dpo_norm_loss: bool | None = key("Removed: use `dpo_loss_type`.")
    rpo_alpha: float | None = key("Removed: use `dpo_loss_type` and `dpo_loss_weights`.")
    flash_attn_rms_norm: bool | None = key("Removed: use `liger_rms_norm`.")
    unsloth_cross_entropy_loss: bool | None = key("Removed: the loss is fused anyway.")
    unsloth_lora_mlp: bool | None = key("Removed: use `lora_mlp_kernel`.")
    unsloth_lora_qkv: bool | None = key("Removed: use `lora_qkv_kernel`.")
    unsloth_lora_o: bool | None = key("Removed: use `lora_o_kernel`.")
    unsloth_rms_norm: bool | None = key("Removed: use `liger_rms_norm`.")
    unsloth_rope: bool | None = key("Removed: use `liger_rope`.")


def apply_renames(cfg: dict[str, Any]) -> list[str]:
    """Bring a config to today's names, in place.

    Args:
        cfg: the config as read, a `DictDefault` or a plain dict.

    Returns:
        One message per key that cannot be honoured.
    """
    problems = [f"`{name}: {cfg[name]}` was removed; {remedy}." for name, remedy in REMOVED.items() if cfg.get(name)]
    for name in REMOVED:
        cfg.pop(name, None)
    for old, new in ALIASES.items():
        problems += _rename(cfg, old, new)
    for old, new in RENAMES.items():
        if cfg.get(old) is not None:
            LOG.warning_once(f"`{old}` is deprecated. Write `{new}`.")
        problems += _rename(cfg, old, new)
    _split_gc_steps(cfg)
    _rename_optimizer(cfg)
    if isinstance(cfg.get("pretraining_dataset"), str | dict):
        entry = cfg["pretraining_dataset"]
        cfg["pretraining_dataset"] = [{"path": entry} if isinstance(entry, str) else entry]
    problems += _clean_fsdp(cfg)
    if cfg.get("save_safetensors") is False:
        problems.append(
            "`save_safetensors: false` was removed: weights are always saved as safetensors. Remove the key."
        )
        del cfg["save_safetensors"]
    return problems


def _rename(cfg: dict[str, Any], old: str, new: str) -> list[str]:
    if old not in cfg:
        return []
    value = cfg.pop(old)
    if value is None:
        return []
    if cfg.get(new) is not None and cfg[new] != value:
        return [f"`{old}: {value}` and `{new}: {cfg[new]}` are the same key with different values. Keep `{new}` only."]
    cfg[new] = value
    return []


def _split_gc_steps(cfg: dict[str, Any]) -> None:
    """`gc_steps` did two things: empty the GPU cache every so many steps, and collect Python's garbage."""
    steps = cfg.get("gc_steps")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
        return  # not a number: reading the field refuses it
    cfg.pop("gc_steps", None)
    if not steps:
        return
    LOG.warning_once("`gc_steps` is deprecated. Write `torch_empty_cache_steps` and `gc_collect_steps`.")
    cfg.setdefault("gc_collect_steps", steps)
    if steps > 0:
        cfg.setdefault("torch_empty_cache_steps", steps)


def _rename_optimizer(cfg: dict[str, Any]) -> None:
    name = cfg.get("optimizer")
    old = name.strip().lower() if isinstance(name, str) else None
    if old in OPTIMIZER_RENAMES:
        cfg["optimizer"] = OPTIMIZER_RENAMES[old]
        if old not in SILENT_OPTIMIZER_RENAMES:
            LOG.warning_once(f"`optimizer: {old}` is deprecated. Write `optimizer: {OPTIMIZER_RENAMES[old]}`.")


def _clean_fsdp(cfg: dict[str, Any]) -> list[str]:
    """Inside `fsdp_config`, drop the prefix `fsdp_`; move `fsdp_final_state_dict_type` into it."""
    section = cfg.get("fsdp_config")
    problems: list[str] = []
    if isinstance(section, dict):
        for name in [name for name in section if str(name).startswith("fsdp_") and name != "fsdp_version"]:
            LOG.warning_once(f"`fsdp_config.{name}` is deprecated. Write `{name.removeprefix('fsdp_')}`.")
            problems += _rename(section, name, name.removeprefix("fsdp_"))
    final = cfg.pop("fsdp_final_state_dict_type", None)
    if final is not None:
        LOG.warning_once(
            "`fsdp_final_state_dict_type` is deprecated. Write `final_state_dict_type` under `fsdp_config`."
        )
        if not isinstance(section, dict):
            cfg["fsdp_config"] = {}
        cfg["fsdp_config"].setdefault("final_state_dict_type", final)
    return problems
