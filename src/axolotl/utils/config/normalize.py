"""`normalize_config`: what a config means on this machine, under this launcher, for this model."""

from __future__ import annotations

import json
from pathlib import Path

from axolotl.exceptions import ConfigError
from axolotl.utils.config.batch import resolve_batch_size, resolve_eval_steps, resolve_save_steps
from axolotl.utils.config.machine import (
    check_accelerator_config,
    check_compile_backend,
    resolve_device,
    resolve_dtype,
    resolve_tf32,
    resolve_world,
)
from axolotl.utils.config.model_facts import resolve_model_facts
from axolotl.utils.dict import DictDefault, note_choice

CAUSAL_LM_METRICS = ["sacrebleu", "comet", "ter", "chrf"]
TEMPLATED_TYPES = ("chat_template", "orpo.chat_template")


def normalize_config(cfg: DictDefault) -> None:
    """Fill, in place, what depends on the machine, the launcher and the model. Safe to call twice.

    Args:
        cfg: a config from `validate_config`.

    Raises:
        ConfigError: the DeepSpeed file is missing or no JSON.
        ModelError: the model's config cannot be loaded.
    """
    resolve_world(cfg)
    resolve_batch_size(cfg)
    resolve_device(cfg)
    check_compile_backend(cfg)
    check_accelerator_config(cfg)
    resolve_dtype(cfg)
    resolve_tf32(cfg)
    resolve_save_steps(cfg)
    resolve_eval_steps(cfg)
    _read_deepspeed(cfg)
    _fill_eval_defaults(cfg)
    resolve_model_facts(cfg)
    _resolve_gradient_checkpointing(cfg)


def normalize_cfg_datasets(cfg: DictDefault) -> None:
    """Hand the top-level chat template to every dataset that renders one and names none of its own."""
    if not cfg.chat_template:
        return
    for key in ("datasets", "test_datasets"):
        for position, dataset in enumerate(cfg[key] or []):
            if dataset.type not in TEMPLATED_TYPES or dataset.chat_template:
                continue
            dataset["chat_template"] = cfg.chat_template
            if cfg.chat_template_jinja and not dataset.chat_template_jinja:
                dataset["chat_template_jinja"] = cfg.chat_template_jinja
            note_choice(
                cfg,
                f"{key}[{position}].chat_template",
                cfg.chat_template,
                "the top-level `chat_template`; the dataset names none",
            )


def _read_deepspeed(cfg: DictDefault) -> None:
    """Replace the path of a DeepSpeed file by what it says."""
    if not isinstance(cfg.deepspeed, str):
        return
    path = Path(cfg.deepspeed)
    try:
        cfg.deepspeed = json.loads(path.read_text())
    except OSError as err:
        raise ConfigError(
            f"`deepspeed: {path}` cannot be read: {err.strerror}. `axolotl fetch deepspeed_configs` writes the shipped files here."
        ) from err
    except json.JSONDecodeError as err:
        raise ConfigError(f"`deepspeed: {path}` is no JSON: {err}") from err


def _fill_eval_defaults(cfg: DictDefault) -> None:
    if cfg.do_causal_lm_eval and not cfg.eval_causal_lm_metrics:
        cfg.eval_causal_lm_metrics = list(CAUSAL_LM_METRICS)
        note_choice(cfg, "eval_causal_lm_metrics", CAUSAL_LM_METRICS, "`do_causal_lm_eval: true` names none")
    cfg.eval_table_size = cfg.eval_table_size or 0
    cfg.eval_max_new_tokens = cfg.eval_max_new_tokens or 128


def _resolve_gradient_checkpointing(cfg: DictDefault) -> None:
    """Say how checkpointed layers are run again where the config leaves it open."""
    if not cfg.gradient_checkpointing or cfg.gradient_checkpointing_kwargs is not None:
        return
    if cfg.model_config_type in ("gemma4", "gemma4_unified"):
        reentrant, reason = False, "layers of this model share values, which the reentrant kind drops"
        cfg.ddp_find_unused_parameters = True
    elif cfg.unfrozen_parameters:
        reentrant, reason = (
            False,
            "`unfrozen_parameters` freezes the embeddings, through which the reentrant kind finds no gradient",
        )
    elif cfg.selective_checkpointing:
        reentrant, reason = False, "`selective_checkpointing` needs to see the operations of a layer"
    elif cfg.rl:
        reentrant, reason = False, "`rl` runs the model several times per step"
    elif (cfg.world_size or 1) > 1 or str(cfg.device).startswith("cuda"):
        reentrant, reason = (
            False,
            "compiled layers then leave out what backward does not need, and DDP sees each weight once",
        )
    else:
        reentrant, reason = True, "it saves the most memory; for `rl` and `unfrozen_parameters` it would be false"
    cfg.gradient_checkpointing_kwargs = {"use_reentrant": reentrant}
    note_choice(cfg, "gradient_checkpointing_kwargs.use_reentrant", reentrant, reason)
