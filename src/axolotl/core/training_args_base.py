"""The training arguments that are ours: one dataclass to mix into any `TrainingArguments`.

Every field has a default, so that it can stand before or after the fields of transformers and TRL.
"""

# ruff: noqa: RUF009 - `_arg` is `dataclasses.field`.
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from axolotl.utils.redact import redact_secrets


def _arg(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class AxolotlTrainingMixins:
    """Arguments that the mixins of `AxolotlTrainer` read."""

    # Data order and packing.
    model_type: str | None = _arg(None, "HF model configuration `model_type`.")
    pretraining: bool = _arg(False, "The rows are a stream: no length, no shuffling here.")
    sample_packing: bool = _arg(False, "Pack several samples into one row.")
    sample_packing_sequentially: bool = _arg(False, "Keep the order of samples when packing.")
    sample_packing_mp_start_method: str | None = _arg(None, "Start method of the packing processes.")
    sample_packing_efficiency: float = _arg(1.0, "Expected share of used tokens in a packed row.")
    sample_packing_bin_size: int = _arg(200, "At most this many samples in one packed row.")
    sample_packing_group_size: int = _arg(100_000, "Samples that are packed together.")
    sample_packing_drop_attention_mask: bool = _arg(False, "Drop the mask of packed rows; position ids carry borders.")
    multipack_real_batches: bool = _arg(False, "A batch is micro_batch_size packed rows instead of one long row.")
    eval_sample_packing: bool | None = _arg(None, "Pack the evaluation set. None follows `sample_packing`.")
    max_seq_length: int = _arg(2048, "Capacity of a packed row, in tokens.")
    eval_max_seq_length: int | None = _arg(None, "Capacity of a packed evaluation row, in tokens.")
    curriculum_sampling: bool | None = _arg(None, "Take the rows in the order of the dataset.")
    dataset_num_proc: int | None = _arg(None, "Processes that prepare data.")
    chat_template: str | None = _arg(None, "Chat template, as text.")

    # Loss.
    fused_linear_loss: bool = _arg(True, "Compute the head and its cross-entropy together, in bounded memory.")
    loss_num_chunks: int | None = _arg(None, "Pieces that the rows go through head and loss in. None: by memory.")
    loss_token_scaling: bool = _arg(False, "Weigh each token's loss by the probability that the model gives it.")
    loss_entropy_top_k: int = _arg(0, "Weigh each token's loss by the entropy of so many tokens (EAFT). 0: do not.")
    loss_entropy_alpha: float = _arg(1.0, "Exponent of that weight.")

    # Optimizer.
    alternate_optimizer: str | None = _arg(None, "An optimizer that transformers does not know.")
    optimizer_kwargs: dict[str, Any] | None = _arg(
        None, "Further arguments of the optimizer that `optim`, or the config, names. They win over `optim_args`."
    )
    adam_beta3: float | None = _arg(None, "Third beta of CAME.")
    adam_epsilon2: float | None = _arg(None, "Second epsilon of CAME.")
    embedding_lr: float | None = _arg(None, "Learning rate of embeddings and output head.")
    embedding_lr_scale: float | None = _arg(None, "The same, as a factor of learning_rate.")
    lr_groups: list[dict[str, Any]] | None = _arg(None, "[{name, modules, lr}]: learning rates by module name.")
    loraplus_lr_ratio: float | None = _arg(None, "LoRA+: learning rate of B over that of A.")
    loraplus_lr_embedding: float | None = _arg(1e-6, "LoRA+: learning rate of LoRA embedding layers.")

    # Schedule.
    alternate_lr_scheduler_type: str | None = _arg(None, "`one_cycle` or `rex`.")
    lr_quadratic_warmup: bool = _arg(False, "Quadratic instead of linear warmup (cosine).")
    cosine_min_lr_ratio: float | None = _arg(None, "Lowest learning rate of the cosine, as a share of the peak.")
    cosine_constant_lr_ratio: float | None = _arg(None, "Share of the steps after which the rate stays lowest.")
    lr_div_factor: float | None = _arg(None, "`one_cycle`: peak over first learning rate.")
    jagged_restart_steps: int | None = _arg(None, "Steps between restarts of the learning rate.")
    jagged_restart_warmup_steps: int | None = _arg(None, "Warmup steps after a restart.")
    jagged_restart_anneal_steps: int | None = _arg(None, "Steps in which the rate falls before a restart.")
    relora: bool | None = _arg(None, "Merge and restart the adapter at every restart.")
    relora_prune_ratio: float | None = _arg(None, "Share of the optimizer state pruned at a restart.")

    # Saving.
    async_save: bool = _arg(False, "Write checkpoints on a thread while training goes on.")

    # Watching.
    non_finite_policy: str = _arg("stop", "What to do with a non-finite loss or gradient: `skip`, `stop` or `raise`.")
    non_finite_patience: int = _arg(3, "`stop`: steps in a row that are left out before the run ends.")
    include_tkps: bool = _arg(True, "Log tokens per second and device.")
    include_tokens_per_second: bool = _arg(False, "Report tokens per second of the whole run when it ends.")
    torch_profiler_steps: int | None = _arg(None, "Steps to profile.")
    do_bench_eval: bool | None = _arg(None, "Evaluate on the benchmark set.")
    do_causal_lm_eval: bool | None = _arg(None, "Evaluate text metrics of generations.")
    causal_lm_eval_metrics: list[str] | None = _arg(None, "Which text metrics.")

    # Others that trainers of plugins and of RL read.
    qlora: bool = _arg(False, "The run is QLoRA.")
    orpo_alpha: float | None = _arg(None, "Weight of the ORPO term.")
    image_size: int | tuple[int, int] | None = _arg(None, "Size to which images are resized.")
    image_resize_algorithm: str | None = _arg(None, "How images are resized.")
    dion_learning_rate: float | None = _arg(None, "Learning rate of Dion.")
    dion_momentum: float | None = _arg(None, "Momentum of Dion.")
    dion_rank_fraction: float | None = _arg(None, "Rank fraction of Dion.")
    dion_rank_multiple_of: int | None = _arg(None, "Dion ranks are multiples of this.")

    def to_dict(self) -> dict[str, Any]:
        """`TrainingArguments.to_dict`, which trackers upload, without secrets such as a login in an address."""
        return redact_secrets(super().to_dict())  # type: ignore[misc] - the class that this is mixed into has it
