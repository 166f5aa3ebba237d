"""Optimizers, learning rates and batch flattening."""

from __future__ import annotations

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import (
    fill,
    fsdp_option,
    fsdp_version,
    is_lora,
    knows_document_borders,
    more_than_one,
    optimizer_name,
    torch_is_older_than,
)

LOG = get_logger(__name__)

# Optimizers whose updates happen inside the backward pass.
UPDATES_IN_BACKWARD = frozenset(
    """lomo adalomo galore_adamw_layerwise galore_adamw_8bit_layerwise galore_adafactor_layerwise
    apollo_adamw_layerwise""".split()  # noqa: SIM905 - a list of quoted words would take a page
)


def adam_settings_are_for_adam(cfg: DictDefault) -> None:
    """Betas and epsilon do nothing for an optimizer that is no Adam."""
    written = [
        key
        for key in ("adam_beta1", "adam_beta2", "adam_beta3", "adam_epsilon", "adam_epsilon2")
        if cfg[key] is not None
    ]
    # Others that read them: Adam by another name, and CAME, which has three betas and two epsilons.
    reads_them = ("adam", "came", "adopt", "ademamix", "apollo", "lion", "muon", "dion", "sinkgd")
    if written and not any(word in optimizer_name(cfg) for word in reads_them):
        LOG.warning(
            "adamw hyperparameters found, but no adamw optimizer set: %s with `optimizer: %s`.",
            ", ".join(f"`{key}: {cfg[key]}`" for key in written),
            optimizer_name(cfg),
        )


def muon_and_flash_optimizers_need_whole_matrices(cfg: DictDefault) -> None:
    """Muon and flashoptim work on whole weight matrices, which DeepSpeed and FSDP1 flatten and cut."""
    name = optimizer_name(cfg)
    if name != "muon" and not name.startswith("flash_"):
        return
    title = "Muon optimizer" if name == "muon" else f"{name} optimizer"
    if cfg.deepspeed:
        raise ConfigError(
            f"{title} is currently incompatible with DeepSpeed: `optimizer: {name}` with `deepspeed`. Use FSDP2 (`fsdp_version: 2`)."
        )
    if fsdp_version(cfg) == 1:
        raise ConfigError(
            f"{title} is only compatible with FSDP2: `optimizer: {name}` with FSDP1. Set `fsdp_version: 2`."
        )


def polora_trains_plain_lora(cfg: DictDefault) -> None:
    """PoLoRA couples each A with its B: nothing else may train, and nothing may be cut."""
    if optimizer_name(cfg) != "polora":
        return
    problems = []
    if not is_lora(cfg):
        problems.append(f"`optimizer: polora` requires `adapter: lora` or `adapter: qlora`, but it is `{cfg.adapter}`.")
    if cfg.deepspeed or more_than_one(cfg.tensor_parallel_size):
        problems.append(
            "`optimizer: polora` is not compatible with DeepSpeed or tensor parallelism. Use one GPU, DDP or FSDP2."
        )
    if fsdp_version(cfg) == 1:
        problems.append("`optimizer: polora` is only compatible with FSDP2. Set `fsdp_version: 2`.")
    others = (
        "lora_modules_to_save",
        "unfrozen_parameters",
        "peft_use_dora",
        "peft_trainable_token_indices",
        "lisa_n_layers",
        "reward_model",
        "process_reward_model",
    )
    rates = ("lr_groups", "embedding_lr", "embedding_lr_scale", "loraplus_lr_ratio")
    for key in (*others, *rates):
        if cfg[key]:
            problems.append(
                f"`optimizer: polora` is not compatible with `{key}`: it trains A and B only, at one learning rate. Remove `{key}`."
            )
    if problems:
        raise ConfigError(problems)
    if cfg.weight_decay:
        LOG.warning(
            "`weight_decay: %s` with `optimizer: polora` decays A and B apart, not their product.", cfg.weight_decay
        )


def q_galore_projects_full_weights(cfg: DictDefault) -> None:
    """Q-GaLore projects the gradients of full matrices, kept in bf16 or int8."""
    if optimizer_name(cfg) != "q_galore_adamw8bit":
        return
    problems = []
    if cfg.adapter:
        problems.append(
            f"`optimizer: q_galore_adamw8bit` trains full weights and cannot be combined with `adapter: {cfg.adapter}`. Remove one."
        )
    if cfg.deepspeed:
        problems.append("`optimizer: q_galore_adamw8bit` is not compatible with DeepSpeed.")
    if fsdp_version(cfg) == 1:
        problems.append("`optimizer: q_galore_adamw8bit` is only compatible with FSDP2. Set `fsdp_version: 2`.")
    if fsdp_version(cfg) == 2 and not fsdp_option(cfg, "use_orig_params"):
        problems.append("`optimizer: q_galore_adamw8bit` with FSDP2 requires `fsdp_config: {use_orig_params: true}`.")
    if problems:
        raise ConfigError(problems)
    if cfg.float32 or (cfg.bf16 is False and not (cfg.fp16 or cfg.bfloat16 or cfg.float16)):
        LOG.warning(
            "`optimizer: q_galore_adamw8bit` in fp32 needs the memory that it is there to save. Write `bf16: true`."
        )
    if cfg.optim_target_modules is None:
        fill(cfg, "optim_target_modules", ["attn", "mlp"], "`optimizer: q_galore_adamw8bit`")


def adopt_needs_torch_2_5_1(cfg: DictDefault) -> None:
    """ADOPT uses foreach operations of torch 2.5.1."""
    if "adopt" in optimizer_name(cfg) and torch_is_older_than(cfg, "2.5.1"):
        raise ConfigError(
            f"ADOPT optimizer is incompatible with torch version < 2.5.1: `optimizer: {optimizer_name(cfg)}`. Update torch."
        )


def updates_in_backward_need_whole_batches(cfg: DictDefault) -> None:
    """LOMO and layerwise optimizers update a weight as soon as its gradient is there: nothing can be summed up before."""
    name = optimizer_name(cfg)
    if name not in UPDATES_IN_BACKWARD:
        return
    problems = []
    if more_than_one(cfg.gradient_accumulation_steps):
        problems.append(
            f"`optimizer: {name}` updates the weights in every backward pass and cannot accumulate gradients: "
            f"`gradient_accumulation_steps: {cfg.gradient_accumulation_steps}`. Write `gradient_accumulation_steps: 1` with a larger "
            "`micro_batch_size`."
        )
    if cfg.fp16 and not cfg.bf16:
        problems.append(
            f"`optimizer: {name}` updates the weights before the loss scale of `fp16: true` can be checked. Write `bf16: true`."
        )
    if cfg.fsdp or cfg.fsdp_config or cfg.deepspeed:
        problems.append(
            f"`optimizer: {name}` updates whole weights on one GPU. Remove `fsdp_config` and `deepspeed`, or choose another optimizer."
        )
    if cfg.non_finite_policy in ("skip", "stop"):
        problems.append(
            f"`non_finite_policy: {cfg.non_finite_policy}` leaves bad steps out, but `optimizer: {name}` has updated the weights before "
            "one is seen. Write `non_finite_policy: raise`."
        )
    if problems:
        raise ConfigError(problems)
    if cfg.non_finite_policy is None:
        fill(
            cfg, "non_finite_policy", "raise", f"`optimizer: {name}` has updated the weights before a bad step is seen"
        )
    if cfg.max_grad_norm:
        LOG.warning(
            "`max_grad_norm: %s` has no effect with `optimizer: %s`, which never has all gradients at once.",
            cfg.max_grad_norm,
            name,
        )
    if name in ("lomo", "adalomo"):
        grouped = [key for key in ("lr_groups", "embedding_lr", "embedding_lr_scale") if cfg[key]]
        if grouped:
            raise ConfigError(
                f"`{grouped[0]}` cannot be used with `optimizer: {name}`, which has one learning rate. Remove it."
            )


def projections_need_to_know_their_modules(cfg: DictDefault) -> None:
    """GaLore and APOLLO work on the linear layers of `optim_target_modules`; nothing else reads it."""
    name = optimizer_name(cfg)
    projects = name.startswith(("galore_", "apollo_", "q_galore_"))
    if projects and not cfg.optim_target_modules:
        raise ConfigError(
            f"`optimizer: {name}` needs `optim_target_modules`: the layers whose gradients it projects. Write `optim_target_modules: "
            "all_linear`, or a list such as `[self_attn, mlp]`."
        )
    if cfg.optim_target_modules and not projects:
        LOG.warning("`optim_target_modules` has no effect with `optimizer: %s`.", name)


def schedule_free_optimizers_need_no_schedule(cfg: DictDefault) -> None:
    """A schedule-free optimizer warms up and averages by itself; another schedule on top works against it."""
    if optimizer_name(cfg).startswith("schedule_free") and cfg.lr_scheduler != "constant":
        LOG.warning(
            "`optimizer: %s` brings its own warmup and decay: `lr_scheduler: %s` comes on top of them. Write `lr_scheduler: constant`.",
            optimizer_name(cfg),
            cfg.lr_scheduler or "cosine",
        )


def schedule_keys_have_a_schedule(cfg: DictDefault) -> None:
    """A key of one schedule does nothing for another."""
    name = str(cfg.lr_scheduler or "cosine")
    by_metric = name in ("reduce_lr_on_plateau", "greedy")
    if cfg.jagged_restart_steps and by_metric:
        raise ConfigError(
            f"`jagged_restart_steps` cannot be used with `lr_scheduler: {name}`, whose rate follows the evaluations. Write "
            "`lr_scheduler: cosine`."
        )
    for key, schedules, also in (
        ("cosine_min_lr_ratio", ("cosine", "rex"), "jagged_restart_steps"),
        ("cosine_constant_lr_ratio", ("cosine",), None),
        ("lr_quadratic_warmup", ("cosine",), None),
        ("lr_div_factor", ("one_cycle",), None),
    ):
        if cfg[key] and name not in schedules and not (also and cfg[also]):
            LOG.warning(
                "`%s: %s` has no effect with `lr_scheduler: %s`. It is for %s.",
                key,
                cfg[key],
                name,
                " and ".join(schedules),
            )
    if cfg.cosine_constant_lr_ratio and not cfg.cosine_min_lr_ratio:
        LOG.warning("`cosine_constant_lr_ratio` has no effect without `cosine_min_lr_ratio`, the rate that stays.")
    for key in ("jagged_restart_warmup_steps", "jagged_restart_anneal_steps"):
        if cfg[key] and not cfg.jagged_restart_steps:
            LOG.warning("`%s: %s` has no effect without `jagged_restart_steps`.", key, cfg[key])


def learning_rates_are_grouped_once(cfg: DictDefault) -> None:
    """`lr_groups` and LoRA+ both divide the parameters into groups."""
    if cfg.lr_groups and cfg.loraplus_lr_ratio:
        raise ConfigError(
            "lr_groups and loraplus_lr_ratio cannot be used together: both divide the parameters. Remove one."
        )


def lora_plus_is_for_lora(cfg: DictDefault) -> None:
    """LoRA+ tells A from B. Without an adapter it would only let norms learn faster."""
    if cfg.loraplus_lr_ratio and not cfg.adapter:
        LOG.warning("`loraplus_lr_ratio: %s` has no effect without `adapter: lora`.", cfg.loraplus_lr_ratio)
        fill(cfg, "loraplus_lr_ratio", None, "no `adapter`")


def batch_flattening_needs_an_attention_that_knows_borders(cfg: DictDefault) -> None:
    """Rows of a batch put end to end need an attention that takes their lengths; packing does that already."""
    if not cfg.batch_flattening:
        return
    varlen = knows_document_borders(cfg.attn_implementation)
    if cfg.batch_flattening == "auto":
        on = varlen and not cfg.sample_packing and more_than_one(cfg.micro_batch_size)
        fill(cfg, "batch_flattening", bool(on), "it needs flash attention, `micro_batch_size` above 1 and no packing")
    else:
        problems = []
        if not varlen:
            problems.append(
                f"batch_flattening requires flash attention: `attn_implementation: {cfg.attn_implementation}` does not know where rows begin. "
                "Write `flash_attention: true`."
            )
        if cfg.sample_packing:
            problems.append(
                "batch_flattening not compatible with sample_packing, which fills rows already. Remove `batch_flattening`."
            )
        if problems:
            raise ConfigError(problems)
        if not more_than_one(cfg.micro_batch_size):
            LOG.warning("batch_flattening has no effect with micro_batch_size == 1")
    if cfg.batch_flattening and (cfg.liger_cross_entropy or cfg.liger_fused_linear_cross_entropy):
        LOG.warning(
            "`batch_flattening` with Liger's loss has been seen to give another loss than padding. Compare both on your data."
        )


CHECKS = (
    adam_settings_are_for_adam,
    muon_and_flash_optimizers_need_whole_matrices,
    polora_trains_plain_lora,
    q_galore_projects_full_weights,
    adopt_needs_torch_2_5_1,
    updates_in_backward_need_whole_batches,
    projections_need_to_know_their_modules,
    schedule_free_optimizers_need_no_schedule,
    schedule_keys_have_a_schedule,
    learning_rates_are_grouped_once,
    lora_plus_is_for_lora,
    batch_flattening_needs_an_attention_that_knows_borders,
)
