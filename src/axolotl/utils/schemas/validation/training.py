"""Batches, steps, saving, evaluating, reporting."""

from __future__ import annotations

import importlib.util
import re
from typing import Literal

from axolotl.exceptions import ConfigError, MissingExtraError
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import fill, is_multiple

LOG = get_logger(__name__)

# `name` or `owner/name`.
REPOSITORY = re.compile(r"(\b[\w\-.]+\b/)?\b[\w\-.]{1,96}\b")

CAUSAL_LM_METRICS = ("sacrebleu", "comet", "ter", "chrf", "perplexity")
TOKENS_OF_MISTRAL_COMMON = ("added_tokens_overrides", "special_tokens", "tokens", "chat_template", "processor_kwargs")


def a_run_has_steps(cfg: DictDefault) -> None:
    """`num_epochs: 0` without `max_steps` would save what it started with. A limit of no steps is no limit."""
    limited = cfg.max_steps is not None and cfg.max_steps > 0
    if cfg.num_epochs == 0 and not limited:
        raise ConfigError("`num_epochs: 0` trains nothing. Write a number above 0, or `max_steps`.")
    if cfg.max_steps is not None and not limited and cfg.max_steps != -1:
        LOG.warning("`max_steps: %s` sets no limit, as -1 does: `num_epochs` says how long to train.", cfg.max_steps)


def a_learning_rate_of_zero_learns_nothing(cfg: DictDefault) -> None:
    """`learning_rate: 0` runs all steps and changes no weight, unless some have a rate of their own."""
    own = (cfg.embedding_lr, cfg.lr_groups, cfg.loraplus_lr_embedding)
    if cfg.learning_rate == 0 and not any(own):
        LOG.warning("`learning_rate: 0` trains nothing: every weight stays as it is.")


def repositories_have_names_that_the_hub_takes(cfg: DictDefault) -> None:
    """What is pushed at the end of a run must not fail there for its name."""
    for key in ("hub_model_id", "push_dataset_to_hub"):
        name = cfg[key]
        if name and (not REPOSITORY.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git")):
            raise ConfigError(
                f"`{key}: {name}` is no name of a repository: write `name` or `owner/name`, each of letters, digits, `-`, `_` and `.`, "
                "neither starting nor ending with `-` or `.`, and at most 96 characters."
            )


def two_of_three_batch_sizes_are_known(cfg: DictDefault) -> None:
    """`batch_size` = `micro_batch_size` x `gradient_accumulation_steps`: two determine the third, three may contradict."""
    if not cfg.batch_size:
        return
    if cfg.gradient_accumulation_steps:
        raise ConfigError(
            f"please set only one of gradient_accumulation_steps or batch_size: `batch_size: {cfg.batch_size}` and "
            f"`gradient_accumulation_steps: {cfg.gradient_accumulation_steps}` say the same thing twice. Remove `batch_size`."
        )
    if not cfg.micro_batch_size:
        raise ConfigError(
            f"At least two of [micro_batch_size, gradient_accumulation_steps, batch_size] must be set: `batch_size: {cfg.batch_size}` alone "
            "does not say how many sequences fit in memory. Write `micro_batch_size`."
        )
    if cfg.batch_size % cfg.micro_batch_size:
        raise ConfigError(
            f"`batch_size: {cfg.batch_size}` is no multiple of `micro_batch_size: {cfg.micro_batch_size}`, so no number of micro-batches makes "
            "it. Write `gradient_accumulation_steps` instead of `batch_size`."
        )
    LOG.warning("batch_size is not recommended. Please use gradient_accumulation_steps instead.")
    steps = cfg.batch_size // cfg.micro_batch_size
    fill(
        cfg,
        "gradient_accumulation_steps",
        steps,
        f"`batch_size: {cfg.batch_size}` / `micro_batch_size: {cfg.micro_batch_size}`",
    )
    # From here on `batch_size` is derived; written and derived together would be the contradiction above.
    del cfg["batch_size"]


def evaluation_batches_are_best_like_training_batches(cfg: DictDefault) -> None:
    """Another evaluation batch size changes the memory that is used between steps."""
    if cfg.eval_batch_size and cfg.micro_batch_size and cfg.eval_batch_size != cfg.micro_batch_size:
        LOG.warning("eval_batch_size != micro_batch_size. This can lead to VRAM instability.")


def packed_batches_are_padded_to_one_length(cfg: DictDefault) -> None:
    """Packed rows are padded to `sequence_len`, so that every step has one shape."""
    if not cfg.sample_packing:
        return
    if cfg.pad_to_sequence_len is False:
        LOG.warning("`pad_to_sequence_len: true` is recommended when using sample_packing")
    elif cfg.pad_to_sequence_len is None:
        fill(cfg, "pad_to_sequence_len", True, "`sample_packing: true`: every step has one shape")


def reward_models_score_padded_rows(cfg: DictDefault) -> None:
    """A reward model is a classifier with one output, on rows of one length."""
    if not cfg.reward_model:
        return
    if not cfg.pad_to_sequence_len:
        LOG.warning("`pad_to_sequence_len: true` is recommended when using reward_model")
        if cfg.pad_to_sequence_len is None:
            fill(cfg, "pad_to_sequence_len", True, "`reward_model: true`")
    _fill_classifier(cfg, "reward_model", num_labels=1, type_of_model="AutoModelForSequenceClassification")


def a_classifier_learns_from_rewards(cfg: DictDefault) -> None:
    """A class with a head that classifies writes no text, which is what a run learns unless it says otherwise."""
    name = str(cfg.type_of_model or "")
    other = cfg.reward_model or cfg.process_reward_model or cfg.trainer_cls or cfg.plugins
    if name.endswith(("Classification", "QuestionAnswering")) and not other:
        raise ConfigError(
            f"`type_of_model: {name}` classifies, but this run trains a model to write text. Remove it, or write `reward_model: true`."
        )


def process_reward_models_judge_tokens(cfg: DictDefault) -> None:
    """A process reward model is a token classifier with two outputs."""
    if cfg.process_reward_model:
        _fill_classifier(cfg, "process_reward_model", num_labels=2, type_of_model="AutoModelForTokenClassification")


def _fill_classifier(cfg: DictDefault, key: str, *, num_labels: int, type_of_model: str) -> None:
    if cfg.num_labels is None:
        fill(cfg, "num_labels", num_labels, f"`{key}: true`")
    if not cfg.type_of_model:
        fill(cfg, "type_of_model", type_of_model, f"`{key}: true`")


def warmup_is_given_once(cfg: DictDefault) -> None:
    """`warmup_steps` or `warmup_ratio`."""
    if cfg.warmup_steps and cfg.warmup_ratio:
        raise ConfigError(
            f"warmup_steps and warmup_ratio are mutually exclusive: `warmup_steps: {cfg.warmup_steps}` and `warmup_ratio: "
            f"{cfg.warmup_ratio}` are set. Remove one."
        )


def saves_are_given_once(cfg: DictDefault) -> None:
    """Saves are counted in steps or per epoch, and `save_strategy` agrees."""
    _check_given_once(cfg, "save")


def the_best_checkpoint_needs_a_metric(cfg: DictDefault) -> None:
    """`save_strategy: best` needs to know what is best."""
    if cfg.save_strategy == "best" and not cfg.metric_for_best_model:
        raise ConfigError(
            "`save_strategy: best` requires `metric_for_best_model` to be set, which says what is best. Write `metric_for_best_model: eval_loss`."
        )


def a_push_to_the_hub_needs_saves(cfg: DictDefault) -> None:
    """With `hub_model_id` and no saves, only the end of the run is pushed, if that."""
    if cfg.hub_model_id and cfg.save_strategy not in (None, "steps", "epoch", "best"):
        LOG.warning(
            "hub_model_id is set without any models being saved. To save a model, set save_strategy to steps, epochs or leave empty."
        )


def evaluations_are_given_once(cfg: DictDefault) -> None:
    """Evaluations are counted in steps or per epoch, and `eval_strategy` agrees."""
    _check_given_once(cfg, "eval")


def _check_given_once(cfg: DictDefault, what: Literal["save", "eval"]) -> None:
    steps, per_epoch, strategy = f"{what}_steps", f"{what}s_per_epoch", f"{what}_strategy"
    other_strategy = cfg[strategy] if cfg[strategy] != "steps" else None
    if cfg[steps] and other_strategy:
        raise ConfigError(
            f"{strategy} and {steps} mismatch: `{strategy}: {other_strategy}` and `{steps}: {cfg[steps]}`. Please set "
            f"{strategy} to 'steps' or remove {steps}."
        )
    if cfg[per_epoch] and cfg[steps]:
        raise ConfigError(
            f"{steps} and {per_epoch} are mutually exclusive and cannot be used together: `{steps}: {cfg[steps]}`, "
            f"`{per_epoch}: {cfg[per_epoch]}`. Remove one."
        )
    if cfg[per_epoch] and other_strategy:
        raise ConfigError(
            f"{strategy} must be empty or set to `steps` when used with {per_epoch}: `{strategy}: {other_strategy}`. Remove one."
        )


def an_evaluation_needs_data(cfg: DictDefault) -> None:
    """`eval_steps` and `eval_strategy` need rows to evaluate on. `val_set_size: 0` contradicts them; left open, they do nothing."""
    wants_evaluation = cfg.eval_steps or (cfg.eval_strategy and cfg.eval_strategy != "no")
    if cfg.val_set_size or cfg.test_datasets:
        return
    if cfg.evals_per_epoch:
        LOG.warning(
            f"`evals_per_epoch: {cfg.evals_per_epoch}` has no effect: nothing to evaluate on. Write `val_set_size: 0.05` or `test_datasets:`."
        )
    if not wants_evaluation:
        return
    if cfg.val_set_size is None:
        LOG.warning(
            "`eval_steps` and `eval_strategy` have no effect: nothing to evaluate on. Write `val_set_size: 0.05` or `test_datasets:`."
        )
        # With `val_set_size: 0`, which is filled in later, they would be refused when the checked config is read again.
        for key in ("eval_steps", "eval_strategy"):
            cfg.pop(key, None)
    else:
        raise ConfigError(
            f"eval_steps and eval_strategy are not supported with val_set_size == 0: nothing to evaluate on (`eval_steps: {cfg.eval_steps}`, "
            f"`eval_strategy: {cfg.eval_strategy}`). Write `val_set_size: 0.05` or `test_datasets:`, or remove them."
        )


def a_benchmark_runs_at_evaluations(cfg: DictDefault) -> None:
    """`do_bench_eval` needs evaluations to run at."""
    if cfg.do_bench_eval and not (cfg.evals_per_epoch or cfg.eval_steps):
        raise ConfigError("do_bench_eval requires evals_per_epoch or eval_steps to be set. Write `evals_per_epoch: 1`.")


def early_stopping_compares_saved_models(cfg: DictDefault) -> None:
    """Early stopping returns to a checkpoint, so every save must fall on an evaluation."""
    if not cfg.early_stopping_patience:
        return
    hint = "early_stopping_patience requires save_steps and eval_steps to be set. eval_steps should evenly divide save_steps."
    if not cfg.save_steps or not cfg.eval_steps:
        raise ConfigError(f"{hint} Set: `save_steps: {cfg.save_steps}`, `eval_steps: {cfg.eval_steps}`.")
    if not is_multiple(cfg.save_steps, cfg.eval_steps):
        raise ConfigError(f"{hint} `save_steps: {cfg.save_steps}` is no multiple of `eval_steps: {cfg.eval_steps}`.")


def weights_by_entropy_are_for_the_next_token(cfg: DictDefault) -> None:
    """EAFT weighs the loss of supervised fine-tuning."""
    other = next((key for key in ("rl", "reward_model", "process_reward_model") if cfg[key]), None)
    if cfg.use_eaft and other:
        raise ConfigError(
            f"`use_eaft: true` weighs the loss of the next token, but `{other}: {cfg[other]}` brings its own. Remove one."
        )


def noise_on_embeddings_is_positive(cfg: DictDefault) -> None:
    """NEFTune's alpha is above 0."""
    if cfg.neftune_noise_alpha is not None and cfg.neftune_noise_alpha <= 0.0:
        raise ConfigError(
            f"`neftune_noise_alpha: {cfg.neftune_noise_alpha}`: neftune_noise_alpha must be > 0.0. Remove it to add no noise."
        )


def generated_metrics_need_whole_rows(cfg: DictDefault) -> None:
    """`do_causal_lm_eval` generates from single rows, and computes metrics that exist."""
    if cfg.do_causal_lm_eval and cfg.eval_sample_packing:
        raise ConfigError(
            "do_causal_lm_eval is enabled, eval_sample_packing must be set to False: metrics are computed on single rows. Write "
            "`eval_sample_packing: false`."
        )
    metrics = cfg.eval_causal_lm_metrics
    if metrics is None:
        return
    if not isinstance(metrics, list):
        raise ConfigError(
            f"`eval_causal_lm_metrics: {metrics}`: eval_causal_lm_metrics must be a list. Write `eval_causal_lm_metrics: [chrf]`."
        )
    unknown = [str(metric) for metric in metrics if metric not in CAUSAL_LM_METRICS]
    if unknown:
        raise ConfigError(
            f"eval_causal_lm_metrics must be one of {', '.join(CAUSAL_LM_METRICS)}; `{', '.join(unknown)}` is not."
        )


def sample_tables_are_generated_samples_now(cfg: DictDefault) -> None:
    """`eval_table_size` and `eval_max_new_tokens` are the older form of `generate_samples`."""
    for key in ("eval_table_size", "eval_max_new_tokens"):
        if cfg[key]:
            LOG.warning(
                "`%s: %s` is superseded. Write `generate_samples: true` with `num_generation_samples` and `generation_max_new_tokens`.",
                key,
                cfg[key],
            )


def tokens_per_second_needs_a_known_number_of_tokens(cfg: DictDefault) -> None:
    """A stream's tokens are not counted in advance."""
    if cfg.pretraining_dataset and cfg.include_tokens_per_second:
        raise ConfigError(
            "include_tokens_per_second is not supported for pretraining datasets, whose tokens are not known in advance. Write "
            "`include_tkps: true`, which counts while training."
        )


def mistral_tokenizers_bring_their_own_tokens(cfg: DictDefault) -> None:
    """Magistral is tokenized with mistral-common, which takes no tokens or templates from elsewhere."""
    names = [str(cfg[key]).lower() for key in ("base_model", "base_model_config", "tokenizer_config") if cfg[key]]
    if cfg.tokenizer_use_mistral_common is None and any("magistral" in name for name in names):
        LOG.warning(
            "tokenizer_use_mistral_common auto inferred to True for Magistral models. Please set it to True explicitly."
        )
        fill(cfg, "tokenizer_use_mistral_common", True, "Magistral models have no other tokenizer")
    if not cfg.tokenizer_use_mistral_common:
        return
    foreign = [key for key in TOKENS_OF_MISTRAL_COMMON if cfg[key]]
    if foreign:
        raise ConfigError(
            "`tokenizer_use_mistral_common: true`: the tokens and the template are mistral-common's own, so "
            + ", ".join(f"`{key}` is not supported with mistral-common" for key in foreign)
            + ". Remove it."
        )
    if importlib.util.find_spec("mistral_common") is None:
        raise MissingExtraError("mistral_common", "mistral", "`tokenizer_use_mistral_common: true`")


CHECKS = (
    a_run_has_steps,
    a_learning_rate_of_zero_learns_nothing,
    repositories_have_names_that_the_hub_takes,
    two_of_three_batch_sizes_are_known,
    evaluation_batches_are_best_like_training_batches,
    packed_batches_are_padded_to_one_length,
    reward_models_score_padded_rows,
    process_reward_models_judge_tokens,
    a_classifier_learns_from_rewards,
    warmup_is_given_once,
    saves_are_given_once,
    the_best_checkpoint_needs_a_metric,
    a_push_to_the_hub_needs_saves,
    evaluations_are_given_once,
    an_evaluation_needs_data,
    a_benchmark_runs_at_evaluations,
    early_stopping_compares_saved_models,
    weights_by_entropy_are_for_the_next_token,
    noise_on_embeddings_is_positive,
    generated_metrics_need_whole_rows,
    sample_tables_are_generated_samples_now,
    tokens_per_second_needs_a_known_number_of_tokens,
    mistral_tokenizers_bring_their_own_tokens,
)
