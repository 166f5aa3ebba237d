"""When to warm up, evaluate, save, log and stop."""

from __future__ import annotations

from typing import Annotated, Literal

from axolotl.utils.schemas.dynamic_checkpoint import DynamicCheckpointConfig
from axolotl.utils.schemas.fields import NO_IS_TEXT, Float, Int, Words, key


class ScheduleConfig(Words):
    """When to warm up, evaluate, save, log and stop."""

    max_steps: Int | None = key("Stop after this many optimizer steps, whatever `num_epochs` says.")
    warmup_steps: Int | None = key("Optimizer steps of warmup.", ge=0)
    warmup_ratio: Float | None = key("Warmup, as a share of the run.", ge=0, le=1)
    eval_steps: Int | Float | None = key("Evaluate every so many steps; below 1, a share of the run.", ge=0)
    evals_per_epoch: Int | None = key("Evaluations per epoch.", ge=0)
    eval_strategy: Annotated[Literal["no", "steps", "epoch", "best"] | None, NO_IS_TEXT] = key(
        "When to evaluate: `no`, `steps` or `epoch`. Default: from `eval_steps`."
    )
    save_steps: Int | Float | None = key("Save every so many steps; below 1, a share of the run.", ge=0)
    saves_per_epoch: Int | None = key("Checkpoints per epoch.", ge=0)
    save_strategy: Annotated[Literal["no", "steps", "epoch", "best"] | None, NO_IS_TEXT] = key(
        "When to save: `no`, `steps`, `epoch` or `best`. Default: from `save_steps`."
    )
    save_total_limit: Int | None = key("Most checkpoints to keep.", ge=0)
    save_first_step: bool | None = key("Save after the first step, to see that saving works.")
    save_only_model: bool | None = key("Save weights without the optimizer; the run cannot be resumed.", False)
    async_save: bool | None = key(
        "Write checkpoints on a thread: training waits only until weights and optimizer are copied to host memory. Default: true "
        "where half of the free host memory holds the copy."
    )
    dynamic_checkpoint: DynamicCheckpointConfig | None = key("Save a checkpoint when a file appears.")
    load_best_model_at_end: bool | None = key("End with the best checkpoint instead of the last.", False)
    metric_for_best_model: str | None = key("Metric that says which checkpoint is best.")
    greater_is_better: bool | None = key("A higher metric is better.")
    early_stopping_patience: Int | None = key("Stop after this many evaluations without improvement.", ge=1)
    loss_watchdog_threshold: Float | None = key("Stop when the loss stays above this.")
    loss_watchdog_patience: Int | None = key(
        "Log lines above the threshold, or non-finite steps, in a row before the run stops. Default: 3.", ge=1
    )
    non_finite_policy: Literal["skip", "stop", "raise"] | None = key(
        "A step without a finite loss or gradient is left out. `stop`: after `loss_watchdog_patience` in a row, save and end. "
        "`skip`: go on. `raise`: end at the first. Default: stop."
    )
    logging_steps: Int | Float | None = key("Log every so many steps.", gt=0)
    use_tensorboard: bool | None = key("Report to TensorBoard.")
    profiler_steps: Int | None = key("Record this many steps with PyTorch's profiler.", ge=1)
    profiler_steps_start: Int | None = key("First step to record.", 0, ge=0)
    include_tokens_per_second: bool | None = key("Report tokens per second at the end.")
    include_tkps: bool | None = key("Report tokens per second and GPU during training.", True)
    neftune_noise_alpha: Float | None = key("NEFTune: noise on embeddings; the paper uses 5.")
    eval_table_size: Int | None = key(
        "Older form of `generate_samples`: rows to answer greedily at each evaluation.", ge=0
    )
    eval_max_new_tokens: Int | None = key(
        "Longest answer of `eval_table_size` and `do_causal_lm_eval`, in tokens. Default: 128.", ge=1
    )
    do_causal_lm_eval: bool | None = key("At each evaluation, answer every row and compare with the answers there.")
    eval_causal_lm_metrics: list[str] | None = key(
        "Any of sacrebleu, comet, ter, chrf, perplexity. Default: the first four. Logged as `eval_<name>`."
    )
    do_bench_eval: bool | None = key("Answer a multiple-choice benchmark at each evaluation.")
    bench_dataset: str | None = key(
        "A local file with `input`, `output` (a letter) and `name`, `owner/dataset/file` on the hub, `mmlu-zs` or `mmlu-fs`. "
        "Default: a small Dharma set."
    )
    bench_split: str | None = key(
        "Split of the benchmark, and the beginning of the names of its metrics. Default: eval."
    )
    generate_samples: bool | None = key("Write answers to the first evaluation rows at each evaluation.", False)
    num_generation_samples: Int | None = key("Samples to generate.", 3, ge=1)
    generation_max_new_tokens: Int | None = key("Tokens generated per sample.", 50, ge=1)
    generation_temperature: Float | None = key("Sampling temperature.", 0.7, ge=0)
    generation_top_p: Float | None = key(
        "Sample from the most probable tokens that sum to this. Default: as the model's generation config says.",
        gt=0,
        le=1,
    )
    generation_top_k: Int | None = key(
        "Sample from this many most probable tokens. Default: as the model's generation config says.",
        ge=0,
    )
    generation_prompt_ratio: Float | None = key(
        "Share of a row that is its prompt, for rows without a part that is not trained on.", 0.5, ge=0, le=1
    )
    generation_do_sample: bool | None = key("Sample instead of taking the most probable token.", True)
