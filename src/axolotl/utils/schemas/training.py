"""Batch size, length of the run, learning rate, optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Words, key, required


class LrGroup(Words):
    """Modules with a learning rate of their own."""

    name: str = required("Name of the group.")
    modules: list[str] = required("Parts of module names; a parameter belongs to the group if its name contains one.")
    lr: Float = required("Learning rate of the group.", ge=0)


class HyperparametersConfig(Words):
    """Hyperparameters of training."""

    gradient_accumulation_steps: Int | None = key("Micro-batches per optimizer step.", 1, ge=1)
    micro_batch_size: Int | None = key("Sequences per GPU in one forward pass.", 1, ge=1)
    batch_size: Int | None = key("Sequences per optimizer step; better set `gradient_accumulation_steps`.", ge=1)
    eval_batch_size: Int | None = key("Sequences per GPU in one evaluation pass. Default: `micro_batch_size`.", ge=1)
    auto_find_batch_size: bool | None = key(
        "Take the largest micro-batch that fits in memory. The rows of an optimizer step stay the same."
    )
    train_on_inputs: bool | None = key("Train on the prompt too, not only on the answer.", False)
    group_by_length: bool | None = key("Put sequences of like length in one batch, to pad less.")
    learning_rate: Float = required("Peak learning rate.", ge=0)
    embedding_lr: Float | None = key("Learning rate of the embeddings.", ge=0)
    embedding_lr_scale: Float | None = key("Learning rate of the embeddings, as a multiple of `learning_rate`.", ge=0)
    weight_decay: Float | None = key("Weight decay.", 0.0, ge=0)
    optimizer: Annotated[str | None, IGNORE_CASE] = key(
        "Optimizer; `docs/optimizers.md` lists all.", "adamw_torch_fused"
    )
    optim_args: str | dict[str, Any] | None = key("Arguments for the optimizer: a mapping, or `name=value,name=value`.")
    optim_target_modules: list[str] | Literal["all_linear"] | str | None = key(
        "Linear layers that GaLore, Q-GaLore and APOLLO work on: parts of names, regular expressions, or `all_linear`."
    )
    torchdistx_path: str | None = key("Path to torchdistx. `optimizer: adamw_anyprecision` works without it.")
    lr_scheduler: Annotated[str | None, IGNORE_CASE] = key("Learning rate schedule.", "cosine")
    lr_scheduler_kwargs: dict[str, Any] | None = key("Arguments for the schedule; `docs/optimizers.md` lists them.")
    lr_quadratic_warmup: bool | None = key("Let the learning rate grow with the square of the step during warmup.")
    cosine_min_lr_ratio: Float | None = key(
        "Lowest learning rate of the cosine schedule, as a share of the peak.", ge=0, le=1
    )
    cosine_constant_lr_ratio: Float | None = key(
        "Share of the run after which the learning rate stays at `cosine_min_lr_ratio`.", ge=0, le=1
    )
    lr_div_factor: Float | None = key("`one_cycle` starts at the peak learning rate divided by this.", gt=0)
    lr_groups: list[LrGroup] | None = key("Modules with learning rates of their own.")
    adam_epsilon: Float | None = key("Adam's epsilon.", ge=0)
    adam_epsilon2: Float | None = key("Second epsilon, for `came_pytorch` only.", ge=0)
    adam_beta1: Float | None = key("Adam's first beta.", ge=0, le=1)
    adam_beta2: Float | None = key("Adam's second beta.", ge=0, le=1)
    adam_beta3: Float | None = key("Third beta, of `came_pytorch` and `ademamix`.", ge=0, le=1)
    dion_lr: Float | None = key("Dion: learning rate. Default: 0.01.", ge=0)
    dion_momentum: Float | None = key("Dion: momentum. Default: 0.95.", ge=0)
    dion_rank_fraction: Float | None = key(
        "Dion: rank of the low-rank step, as a share of the full rank.", 1.0, gt=0, le=1
    )
    dion_rank_multiple_of: Int | None = key("Dion: round the rank up to a multiple of this.", 1, ge=1)
    qgalore_rank: Int | None = key("Q-GaLore: rank of the projection.", 256, ge=1)
    qgalore_update_proj_gap: Int | None = key("Q-GaLore: steps between updates of the projection.", 200, ge=1)
    qgalore_scale: Float | None = key("Q-GaLore: scale of the projected step.", 0.25)
    qgalore_proj_type: str | None = key("Q-GaLore: kind of projection: `std`, `reverse_std`, `left` or `right`.", "std")
    qgalore_proj_quant: bool | None = key("Q-GaLore: quantize the projection.", True)
    qgalore_proj_bits: Int | None = key("Q-GaLore: bits of the projection.", 4, ge=1, le=8)
    qgalore_proj_group_size: Int | None = key("Q-GaLore: group size of the quantized projection.", 256, ge=1)
    qgalore_cos_threshold: Float | None = key("Q-GaLore: similarity above which updates become rarer.", 0.4)
    qgalore_gamma_proj: Int | None = key("Q-GaLore: factor by which updates become rarer.", 2, ge=1)
    qgalore_queue_size: Int | None = key("Q-GaLore: number of similarities remembered.", 5, ge=1)
    max_grad_norm: Float | None = key("Clip the gradient to this norm.", ge=0)
    num_epochs: Float = key("Passes over the data.", 1.0, ge=0)


class JaggedLRConfig(Words):
    """A learning rate that restarts, for ReLoRA or alone."""

    jagged_restart_steps: Int | None = key("Optimizer steps between restarts.", ge=1)
    jagged_restart_warmup_steps: Int | None = key("Warmup steps after a restart. Default: 10.", ge=0)
    jagged_restart_anneal_steps: Int | None = key("Annealing steps before a restart. Default: 1.", ge=0)
