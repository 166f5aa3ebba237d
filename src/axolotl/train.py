"""The story of a training run, in order.

`train` gets a config and the prepared datasets. It loads the model, builds the trainer, writes down what is about to
happen, trains, and saves what came out: model or adapter, tokenizer, config, model card and report.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from axolotl.core.builders.arguments import check_best_model, read_schedule
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.checkpoint import (
    SAVED_CONFIG,
    TRAINER_STATE,
    has_weights,
    remove_leftovers,
    resolve_checkpoint,
)
from axolotl.core.output_dir import check_output_dir, rescue_dirs
from axolotl.core.resume import changes_since, later_checkpoints
from axolotl.core.trainers.mixins.checkpoints import CheckpointSaveMixin, write_model
from axolotl.exceptions import ConfigError, NotBuiltError, OutOfMemoryError, OutputError
from axolotl.integrations.base import PluginManager
from axolotl.loaders import ModelLoader, load_processor, load_tokenizer
from axolotl.loaders.data_starts import DATA_STARTS, DataStart
from axolotl.loaders.untrained_tokens import fix_untrained
from axolotl.loaders.utils import read_seed
from axolotl.model_card import write_model_card
from axolotl.run.errors import advise, describe_out_of_memory, note_raising_callback
from axolotl.run.report import config_as_yaml, optional_file, print_choices, print_size, save_report
from axolotl.run.signals import exit_if_signalled, restore_handlers, setup_signal_handler, was_stopped
from axolotl.utils.callbacks.build import check_evaluation, find_callback
from axolotl.utils.callbacks.progress import ProgressCallback
from axolotl.utils.callbacks.trackers import RunOutcome, check_trackers
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.distributed import compute_and_broadcast, get_rank
from axolotl.utils.logging import get_logger
from axolotl.utils.optimizers.table import check_optimizer
from axolotl.utils.schedulers import check_scheduler_kwargs
from axolotl.utils.trainer import setup_trainer

LOG = get_logger(__name__)


def train(*, cfg: DictDefault, dataset_meta: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Trainer]:
    """Train a model on the given dataset.

    Args:
        cfg: the resolved config.
        dataset_meta: `TrainDatasetMeta`: `train_dataset`, `eval_dataset`, `total_num_steps`.

    Returns:
        (model, tokenizer, trainer).

    Raises:
        OutputError: `output_dir` cannot be written. Raised before the model is loaded.
        CheckpointError: the checkpoint to resume from does not exist or is broken.
        OutOfMemoryError: the device ran out of memory.
        TrainingStopped: the loss or gradient was not finite (`non_finite_policy`).
        SystemExit: 128 + its number (130, 143, ...) after a signal of `STOP_SIGNALS`, when everything is saved.
    """
    check_run(cfg)
    trainer, model, tokenizer, peft_config, processor = setup_model_and_trainer(cfg, dataset_meta)
    if cfg.auto_find_batch_size:
        HFCausalTrainerBuilder(cfg, model, tokenizer, processor).settle_batch_size(trainer)
    handle_untrained_tokens_fix(cfg, model, tokenizer, dataset_meta.train_dataset, safe_serialization=True)
    save_initial_configs(cfg, tokenizer, model, peft_config, processor)
    setup_model_card(cfg, trainer)
    settle_async_save(cfg, trainer)
    print_choices(cfg)
    print_size(model, trainer, dataset_meta.total_num_steps)
    # Reading a checkpoint whole takes as long as loading it. One rank does it, so that all resume from the same.
    checkpoint = compute_and_broadcast(lambda: find_checkpoint(cfg, content=True))
    prepare_resume(cfg, trainer, checkpoint)

    previous_handlers = setup_signal_handler(cfg, trainer)
    with trackers_told_how_it_ends(trainer):
        try:
            execute_training(cfg, trainer, str(checkpoint) if checkpoint else None)
            save_trained_model(cfg, trainer, model)
            create_model_card(cfg, trainer)
            save_report(cfg, trainer)
        finally:
            restore_handlers(previous_handlers)
        PluginManager.get_instance().post_train(cfg, model)
    exit_if_signalled(cfg, trainer)
    return model, tokenizer, trainer


def check_run(cfg: DictDefault) -> None:
    """What can fail cheaply fails here, before what takes minutes. Removes what a killed run left half written.

    Raises:
        AxolotlError: an optimizer, tracker, metric, checkpoint or folder that cannot be used.
    """
    check_trackers(cfg, is_main_process=get_rank() == 0)
    check_optimizer(cfg)
    check_scheduler_kwargs(read_schedule(cfg))
    check_evaluation(cfg)
    check_best_model(cfg)
    check_output_dir(cfg.output_dir)
    if get_rank() == 0:
        remove_leftovers(cfg.output_dir)
    find_checkpoint(cfg, content=False)


def setup_model_and_trainer(cfg: DictDefault, dataset_meta: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Load tokenizer, processor and model, and build the trainer.

    Returns:
        (trainer, model, tokenizer, peft_config, processor).
    """
    model, tokenizer, peft_config, processor = setup_model_and_tokenizer(cfg, dataset_meta.train_dataset)
    model_ref = setup_reference_model(cfg, tokenizer)
    try:
        trainer = setup_trainer(
            cfg,
            dataset_meta.train_dataset,
            dataset_meta.eval_dataset,
            model,
            tokenizer,
            processor,
            dataset_meta.total_num_steps,
            model_ref=model_ref,
            peft_config=peft_config,
        )
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"{error} {advise(cfg)}") from error
    return trainer, model, tokenizer, peft_config, processor


def setup_model_and_tokenizer(cfg: DictDefault, train_dataset: Any = None) -> tuple[Any, Any, Any, Any]:
    """Load the tokenizer, processor (for multimodal models), and model based on configuration.

    Random numbers are seeded first: adapters and resized embeddings are initialised from them.

    Args:
        cfg: the config.
        train_dataset: the rows that an adapter may start from.

    Returns:
        (model, tokenizer, peft_config, processor).
    """
    set_seed(read_seed(cfg))
    tokenizer = load_tokenizer(cfg)
    processor = load_processor(cfg, tokenizer) if cfg.is_multimodal else None
    model, peft_config = ModelLoader(cfg, tokenizer, data_start=read_data_start(cfg, train_dataset)).load()
    if model.generation_config is not None:
        # A generation config with sampling values and `do_sample: false` could not be saved.
        model.generation_config.do_sample = True
    return model, tokenizer, peft_config, processor


def read_data_start(cfg: DictDefault, train_dataset: Any) -> DataStart | None:
    """What an adapter starts from, when it looks at rows first. A checkpoint to resume from brings its start along."""
    method = cfg.peft_init_lora_weights
    if method not in DATA_STARTS or cfg.lora_model_dir:
        return None
    checkpoint = compute_and_broadcast(lambda: find_checkpoint(cfg, content=True))
    if checkpoint is None and train_dataset is None:
        raise ConfigError(f"`peft_init_lora_weights: {method}` starts from training rows, and there are none.")
    return DataStart(method, None if checkpoint else train_dataset, read_seed(cfg), checkpoint)


def setup_reference_model(cfg: DictDefault, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set up the reference model for RL training if needed. No supported kind of training needs one."""
    if cfg.rl:
        raise NotBuiltError(f"`rl: {cfg.rl}` is not implemented yet.")


def handle_untrained_tokens_fix(
    cfg: DictDefault,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Any,
    safe_serialization: bool = True,
) -> None:
    """Apply fixes for untrained tokens if configured.

    With True, tokens that the base model never trained (embedding rows that are all zero) and that occur in the dataset get the
    mean of the trained rows, in embedding and head. With ids, these tokens do.

    Args:
        cfg: the config; `fix_untrained_tokens` switches this on, as True, a token id or a list of ids.
        model: the model, changed in place.
        tokenizer: not needed; part of the documented signature.
        train_dataset: the rows to look at.
        safe_serialization: not needed; part of the documented signature.
    """
    wanted = cfg.fix_untrained_tokens
    if wanted is None or wanted is False:
        return
    num_fixed = fix_untrained(model, wanted, train_dataset)
    if num_fixed:
        LOG.info(f"`fix_untrained_tokens`: {num_fixed} tokens got the mean embedding.")


def save_initial_configs(
    cfg: DictDefault,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    peft_config: Any = None,
    processor: Any = None,
) -> None:
    """Save initial configurations before training, so that even a run that dies can be loaded and repeated.

    What describes weights of an earlier run stays with them until the new ones are there.
    """
    if get_rank() != 0:
        return
    output_dir = Path(cfg.output_dir)
    (output_dir / SAVED_CONFIG).write_text(config_as_yaml(cfg), encoding="utf-8")
    if has_weights(output_dir):
        return
    tokenizer.save_pretrained(str(output_dir), **({} if saves_jinja_files(cfg) else {"save_jinja_files": False}))
    if processor is not None:
        processor.save_pretrained(str(output_dir))
    if peft_config is not None:
        peft_config.save_pretrained(str(output_dir))
    if model.config is not None:
        model.config.save_pretrained(str(output_dir))


def saves_jinja_files(cfg: DictDefault) -> bool:
    """Whether the chat template gets a file of its own. mistral-common has none that could stand anywhere else."""
    return cfg.tokenizer_save_jinja_files is not False or bool(cfg.tokenizer_use_mistral_common)


def setup_model_card(cfg: DictDefault, trainer: Any = None) -> None:
    """Keep the trainer from writing a card of its own: `create_model_card` writes one with tags, results and the config."""
    if trainer is not None:
        trainer.writes_model_card = False
    LOG.debug(f"The model card goes to {Path(cfg.output_dir) / 'README.md'}.")


def settle_async_save(cfg: DictDefault, trainer: Any) -> None:
    """Decide whether checkpoints are written while training goes on, and say so."""
    if cfg.async_save is False or not isinstance(trainer, CheckpointSaveMixin):
        return
    reason = trainer.why_saves_wait()
    if reason is None and cfg.async_save is None:
        note_choice(cfg, "async_save", True, "training waits only for a copy of weights and optimizer in host memory")
    elif reason is not None:
        note_choice(cfg, "async_save", False, reason)


def find_checkpoint(cfg: DictDefault, *, content: bool) -> Path | None:
    """The whole checkpoint that the config asks to resume from; None to begin at the beginning."""
    auto = bool(cfg.auto_resume_from_checkpoints)
    return resolve_checkpoint(cfg.resume_from_checkpoint, cfg.output_dir, auto=auto, content=content)


def prepare_resume(cfg: DictDefault, trainer: Any, checkpoint: Path | None) -> None:
    """Let the trainer save config and tokenizer as the config asks; warn of what is another than in the checkpoint to resume from."""
    trainer.saved_config, trainer.saves_jinja_files = config_as_yaml(cfg), saves_jinja_files(cfg)
    later = later_checkpoints(cfg.output_dir, checkpoint)
    if later and get_rank() == 0:
        LOG.warning(later)
    if checkpoint is None:
        return
    changes = changes_since(checkpoint, trainer.saved_config, trainer.args.world_size)
    if changes:
        lines = "".join(f"\n  - {change}" for change in changes)
        LOG.warning(f"The run of {checkpoint} was another one than this that goes on from it:{lines}")


@contextmanager
def trackers_told_how_it_ends(trainer: Any) -> Iterator[None]:
    """End the runs of the trackers with what is within: finished, interrupted by a signal, or failed."""
    outcome = "failed"
    try:
        yield
        outcome = "interrupted" if was_stopped(trainer) else "finished"
    finally:
        kept = find_callback(trainer, RunOutcome)
        if kept is not None:
            kept.end(outcome)


def execute_training(cfg: DictDefault, trainer: Any, resume_from_checkpoint: str | None) -> None:
    """Execute the training process, from a checkpoint or from the beginning.

    Args:
        cfg: the config.
        trainer: the trainer.
        resume_from_checkpoint: a whole checkpoint, or None.

    Raises:
        OutOfMemoryError: with the numbers, and the keys that would make the run smaller.
    """
    if resume_from_checkpoint:
        LOG.info(f"Resuming from {resume_from_checkpoint}.")
    began = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(describe_out_of_memory(cfg, trainer, error)) from error
    except Exception as error:
        note_raising_callback(cfg, trainer, error)
        raise
    finally:
        progress = find_callback(trainer, ProgressCallback)
        if progress is not None:
            progress.close()
    LOG.info(f"Trained {trainer.state.global_step} steps in {time.perf_counter() - began:.0f} s.")


def save_trained_model(cfg: DictDefault, trainer: Any, model: Any) -> None:
    """Save the trained model according to configuration and training setup: model or adapter, and tokenizer.

    Raises:
        OutputError: `output_dir` cannot be written. The model was saved elsewhere if any folder could be written.
    """
    output_dir = Path(cfg.output_dir)
    error = write_model(trainer, output_dir)
    if error is not None:
        said = f"The trained model could not be written to {output_dir}: {error}. Checkpoints there are untouched."
        for folder in rescue_dirs(output_dir):
            if write_model(trainer, folder) is None:
                raise OutputError(f"{said} It was written to {folder} instead.") from error
        raise OutputError(
            f"{said} Nor could it be written to {' and '.join(map(str, rescue_dirs(output_dir)))}. Free some space and run again "
            "with `auto_resume_from_checkpoints: true` to save it."
        ) from error
    if trainer.args.should_save:
        with optional_file(output_dir / TRAINER_STATE) as path:
            trainer.state.save_to_json(str(path))
    LOG.info(f"Saved the {'adapter' if cfg.adapter else 'model'} to {output_dir}.")


def create_model_card(cfg: DictDefault, trainer: Any) -> None:
    """Create a model card for the trained model if needed, and push to the hub if asked to."""
    if get_rank() == 0:
        with optional_file(Path(cfg.output_dir) / "README.md") as path:
            write_model_card(path, cfg=cfg, config_yaml=config_as_yaml(cfg), history=trainer.state.log_history)
    if cfg.hub_model_id:
        trainer.push_to_hub(commit_message="End of training")
