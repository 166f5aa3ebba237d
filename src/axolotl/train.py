"""The story of a training run, in order.

`train` gets a config and the prepared datasets. It loads the model, builds the trainer, writes down what is about to
happen, trains, and saves what came out: model or adapter, tokenizer, config, model card and report.
"""

from __future__ import annotations

import json
import os
import signal
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_callback import CallbackHandler

from axolotl.core.builders.arguments import check_best_model, read_schedule
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.checkpoint import (
    SAVED_CONFIG,
    check_output_dir,
    model_aside,
    remove_leftovers,
    rescue_dirs,
    resolve_checkpoint,
)
from axolotl.core.resume import changes_since
from axolotl.core.trainers.mixins.checkpoints import CheckpointSaveMixin
from axolotl.exceptions import AxolotlError, ConfigError, NotBuiltError, OutOfMemoryError, OutputError
from axolotl.integrations.base import PluginManager
from axolotl.loaders import ModelLoader, load_processor, load_tokenizer
from axolotl.loaders.data_starts import DATA_STARTS, DataStart
from axolotl.loaders.untrained_tokens import check_ids, find_untrained, set_to_mean
from axolotl.model_card import write_model_card
from axolotl.utils.callbacks.build import check_evaluation, find_callback
from axolotl.utils.callbacks.progress import ProgressCallback
from axolotl.utils.callbacks.trackers import RunOutcome, check_trackers
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.distributed import compute_and_broadcast
from axolotl.utils.logging import get_logger
from axolotl.utils.optimizers.table import check_optimizer
from axolotl.utils.redact import redact_secrets
from axolotl.utils.report import write_report
from axolotl.utils.schedulers import check_scheduler_kwargs
from axolotl.utils.trainer import setup_trainer

LOG = get_logger(__name__)

REPORT = "report.html"

# Ctrl-C, a scheduler's wish to end, a lost terminal, and what Slurm sends before the time limit (`--signal=USR1@60`).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SAME_WISH_SECONDS = 1.0

# What to change when memory runs out, best first: key -> (applies, what to write).
SMALLER_RUN: tuple[tuple[str, Any, str], ...] = (
    (
        "micro_batch_size",
        lambda cfg: (cfg.micro_batch_size or 1) > 1,
        "`micro_batch_size: 1`, with more `gradient_accumulation_steps`",
    ),
    ("gradient_checkpointing", lambda cfg: not cfg.gradient_checkpointing, "`gradient_checkpointing: true`"),
    ("activation_offloading", lambda cfg: not cfg.activation_offloading, "`activation_offloading: true` with it"),
    ("sample_packing", lambda cfg: (cfg.sequence_len or 0) > 1024, "a smaller `sequence_len`"),
    ("adapter", lambda cfg: not cfg.adapter, "`adapter: lora`"),
    ("load_in_4bit", lambda cfg: not cfg.load_in_4bit, "`load_in_4bit: true` with `adapter: qlora`"),
    ("optimizer", lambda cfg: "8bit" not in str(cfg.optimizer), "`optimizer: adamw_bnb_8bit`"),
)


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
    # What can fail cheaply comes before what takes minutes.
    check_trackers(cfg, is_main_process=is_main_process())
    check_optimizer(cfg)
    check_scheduler_kwargs(read_schedule(cfg))
    check_evaluation(cfg)
    check_best_model(cfg)
    check_output_dir(cfg.output_dir)
    if is_main_process():
        remove_leftovers(cfg.output_dir)
    find_checkpoint(cfg, content=False)

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
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)
        PluginManager.get_instance().post_train(cfg, model)
    exit_if_signalled(cfg, trainer)
    return model, tokenizer, trainer


def setup_model_and_trainer(cfg: DictDefault, dataset_meta: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Load model, tokenizer, trainer, etc. Helper function to encapsulate the full trainer setup.

    Returns:
        (trainer, model, tokenizer, peft_config, processor).
    """
    model, tokenizer, peft_config, processor = setup_model_and_tokenizer(cfg, dataset_meta.train_dataset)
    model_ref = setup_reference_model(cfg, tokenizer)
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
    set_seed(cfg.seed if cfg.seed is not None else 42)
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
    seed = cfg.seed if cfg.seed is not None else 42
    checkpoint = compute_and_broadcast(lambda: find_checkpoint(cfg, content=True))
    if checkpoint is None and train_dataset is None:
        raise ConfigError(f"`peft_init_lora_weights: {method}` starts from training rows, and there are none.")
    return DataStart(method, None if checkpoint else train_dataset, seed, checkpoint)


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
    untrained = find_untrained(model)
    broken = torch.zeros_like(untrained)
    if wanted is not True:
        ids = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
        check_ids(ids, len(untrained))
        broken[torch.as_tensor(ids, device=broken.device)] = True
    elif isinstance(train_dataset, IterableDataset):
        broken = untrained  # which tokens a stream will bring is not known
    else:
        for row in train_dataset["input_ids"]:
            broken[torch.as_tensor(row, device=broken.device)] = True
        broken &= untrained
    if not broken.any():
        return
    set_to_mean(model, broken, ~(untrained | broken))
    LOG.info(f"`fix_untrained_tokens`: {int(broken.sum())} tokens got the mean embedding.")


def save_initial_configs(
    cfg: DictDefault,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    peft_config: Any = None,
    processor: Any = None,
) -> None:
    """Save initial configurations before training, so that even a run that dies can be loaded and repeated."""
    if not is_main_process():
        return
    output_dir = Path(cfg.output_dir)
    (output_dir / SAVED_CONFIG).write_text(config_as_yaml(cfg), encoding="utf-8")
    # mistral-common has no chat template that could stand in a file.
    options = (
        {} if cfg.tokenizer_use_mistral_common else {"save_jinja_files": cfg.tokenizer_save_jinja_files is not False}
    )
    tokenizer.save_pretrained(str(output_dir), **options)
    if processor is not None:
        processor.save_pretrained(str(output_dir))
    if peft_config is not None:
        peft_config.save_pretrained(str(output_dir))
    if model.config is not None:
        model.config.save_pretrained(str(output_dir))


def setup_model_card(cfg: DictDefault, trainer: Any = None) -> None:
    """Keep the trainer from writing a card of its own: `create_model_card` writes one with tags, results and the config."""
    if trainer is not None:
        trainer.writes_model_card = False
    LOG.debug(f"The model card goes to {Path(cfg.output_dir) / 'README.md'}.")


def find_checkpoint(cfg: DictDefault, *, content: bool) -> Path | None:
    """The whole checkpoint that the config asks to resume from; None to begin at the beginning."""
    auto = bool(cfg.auto_resume_from_checkpoints)
    return resolve_checkpoint(cfg.resume_from_checkpoint, cfg.output_dir, auto=auto, content=content)


def prepare_resume(cfg: DictDefault, trainer: Any, checkpoint: Path | None) -> None:
    """Let the trainer's checkpoints hold the config, and warn of what is another than in the one to resume from."""
    trainer.saved_config = config_as_yaml(cfg)
    if checkpoint is None:
        return
    changes = changes_since(checkpoint, trainer.saved_config, trainer.args.world_size)
    if changes:
        lines = "".join(f"\n  - {change}" for change in changes)
        LOG.warning(f"The run of {checkpoint} was another one than this that goes on from it:{lines}")


def settle_async_save(cfg: DictDefault, trainer: Any) -> None:
    """Decide whether checkpoints are written while training goes on, and say so."""
    if cfg.async_save is False or not isinstance(trainer, CheckpointSaveMixin):
        return
    reason = trainer.why_saves_wait()
    if reason is None and cfg.async_save is None:
        note_choice(cfg, "async_save", True, "training waits only for a copy of weights and optimizer in host memory")
    elif reason is not None:
        note_choice(cfg, "async_save", False, reason)


def setup_signal_handler(cfg: DictDefault, trainer: Any) -> dict[int, Any]:
    """Set up signal handler for graceful termination.

    The first signal of `STOP_SIGNALS` lets the step end, saves and exits; the next one exits at once. A launcher passes on
    what a terminal or scheduler has already sent to all: what comes within a second of the first is the same wish.

    Returns:
        The handlers that were there before.
    """

    owner = os.getpid()
    first_at = 0.0

    def handle(number: int, frame: types.FrameType | None) -> None:
        nonlocal first_at
        if os.getpid() != owner:
            return  # a forked worker: the trainer ends it when it is done with it
        if trainer.stop_requested:
            if time.monotonic() - first_at > SAME_WISH_SECONDS:
                os._exit(128 + number)
            return
        first_at = time.monotonic()
        trainer.stop_requested = True
        trainer.stop_signal = number
        name = signal.Signals(number).name
        LOG.warning(f"{name}: finishing the step, then saving to {cfg.output_dir}. Once more to exit without saving.")

    trainer.stop_signal = None
    trainer.stop_requested = False
    # An ignored signal stays ignored: `nohup` ignores SIGHUP.
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in wanted}


def execute_training(cfg: DictDefault, trainer: Any, resume_from_checkpoint: str | None) -> None:
    """Execute the training process with appropriate SDP kernel configurations.

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
        if not isinstance(error, AxolotlError) and (where := find_raising_callback(error)):
            error.add_note(
                f"Raised by the callback {where} at step {trainer.state.global_step}. Checkpoints in {cfg.output_dir} are whole; go on "
                "with `auto_resume_from_checkpoints: true` when it is mended."
            )
        raise
    finally:
        progress = find_callback(trainer, ProgressCallback)
        if progress is not None:
            progress.close()
    LOG.info(f"Trained {trainer.state.global_step} steps in {time.perf_counter() - began:.0f} s.")


def find_raising_callback(error: BaseException) -> str | None:
    """`package.module.Class.on_step_end` of the trainer callback that an error came out of; None when it was not one."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code is CallbackHandler.call_event.__code__:
            names = frame.tb_frame.f_locals
            kind = type(names["callback"])
            return f"{kind.__module__}.{kind.__qualname__}.{names['event']}"
        frame = frame.tb_next
    return None


def describe_out_of_memory(cfg: DictDefault, trainer: Any, error: Exception) -> str:
    """The message of an out-of-memory error: step, sizes, keys to change."""
    remedies = [text for _, applies, text in SMALLER_RUN if applies(cfg)]
    peak = ""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        peak = f" ({torch.cuda.max_memory_allocated() / 2**30:.1f} of {total:.1f} GiB were in use)"
    return (
        f"Out of memory at step {trainer.state.global_step + 1}{peak}, with `micro_batch_size: {cfg.micro_batch_size}` and "
        f"`sequence_len: {cfg.sequence_len}`. Checkpoints in {cfg.output_dir} are whole. Try, one after the other: "
        f"{', '.join(remedies)}. The library said: {str(error).splitlines()[0]}"
    )


@contextmanager
def trackers_told_how_it_ends(trainer: Any) -> Iterator[None]:
    """End the runs of the trackers with what is within: finished, interrupted by a signal, or failed."""
    outcome = "failed"
    try:
        yield
        outcome = "interrupted" if trainer.stop_agreed else "finished"
    finally:
        kept = find_callback(trainer, RunOutcome)
        if kept is not None:
            kept.end(outcome)


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
        with reported(output_dir / "trainer_state.json") as path:
            trainer.state.save_to_json(str(path))
    LOG.info(f"Saved the {'adapter' if cfg.adapter else 'model'} to {output_dir}.")


def write_model(trainer: Any, folder: Path) -> BaseException | None:
    """Write the model to a folder, whole or not at all. The error of a rank that could not is returned on all ranks."""
    owner = trainer.args.should_save

    def save(aside: Path) -> None:
        trainer.save_model(str(aside), _internal_call=True)

    if not isinstance(trainer, CheckpointSaveMixin):
        with model_aside(folder, owner=owner) as aside:
            save(aside)
            trainer.accelerator.wait_for_everyone()
        return None

    def write() -> None:
        if trainer.output_folder is not None and trainer.output_folder.path == folder:
            trainer.output_folder.check()
        with model_aside(folder, owner=owner) as aside:
            # All ranks may write a part: the files are moved when all of them are there.
            if (error := trainer.together(lambda: save(aside))) is not None:
                raise error

    return trainer.together(write)


def create_model_card(cfg: DictDefault, trainer: Any) -> None:
    """Create a model card for the trained model if needed, and push to the hub if asked to."""
    if is_main_process():
        with reported(Path(cfg.output_dir) / "README.md") as path:
            write_model_card(path, cfg=cfg, config_yaml=config_as_yaml(cfg), history=trainer.state.log_history)
    if cfg.hub_model_id:
        trainer.push_to_hub(commit_message="End of training", dataset_tags=trainer.dataset_tags)


def save_report(cfg: DictDefault, trainer: Any) -> None:
    """Write `report.html`: the curves of the run, readable offline."""
    if not is_main_process():
        return
    with reported(Path(cfg.output_dir) / REPORT) as path:
        write_report(
            path,
            title=f"{Path(str(cfg.base_model)).name} · {Path(cfg.output_dir).name}",
            history=trainer.state.log_history,
            summary=summarize(cfg, trainer),
            config_yaml=config_as_yaml(cfg),
        )
        LOG.info(f"Report: {path}")


@contextmanager
def reported(path: Path) -> Iterator[Path]:
    """A file that a run can do without: when it cannot be written, say so and go on."""
    try:
        yield path
    except OSError as error:
        LOG.warning(f"{path} could not be written: {error}. The trained model is saved.")


def summarize(cfg: DictDefault, trainer: Any) -> dict[str, Any]:
    """The figures of a run that head its report."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    rates = [entry["tokens/per_sec_per_gpu"] for entry in history if "tokens/per_sec_per_gpu" in entry]
    trainable, total = count_parameters(trainer.model)
    summary = {
        "base model": cfg.base_model,
        "adapter": cfg.adapter or "none (all weights)",
        "steps": f"{trainer.state.global_step} of {trainer.state.max_steps}",
        "epochs": round(trainer.state.epoch or 0, 3),
        "trainable parameters": f"{trainable:,} of {total:,} ({100 * trainable / max(total, 1):.2f} %)",
        "tokens seen": f"{trainer.num_tokens_seen:,}",
        "tokens trained": f"{trainer.num_tokens_trained:,}",
    }
    if losses:
        summary["loss, first and last"] = f"{losses[0]:.4f} → {losses[-1]:.4f}"
    if evals:
        summary["evaluation loss, first and last"] = f"{evals[0]:.4f} → {evals[-1]:.4f}"
    if rates:
        summary["tokens per second and GPU, median"] = f"{sorted(rates)[len(rates) // 2]:,.0f}"
    return summary


def exit_if_signalled(cfg: DictDefault, trainer: Any) -> None:
    """Leave with the exit code of a signal, when one ended the run and everything is saved."""
    if not trainer.stop_agreed:
        return
    number = trainer.stop_signal or signal.SIGTERM
    LOG.warning(
        f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; checkpoint and model are saved in "
        f"{cfg.output_dir}. Go on with `auto_resume_from_checkpoints: true`."
    )
    raise SystemExit(128 + number)


def print_choices(cfg: DictDefault) -> None:
    """Show what was decided for the user, and why."""
    if not is_main_process() or not cfg.resolution:
        return
    table = Table(title="Choices made for this run", title_justify="left", box=None, pad_edge=False)
    for column in ("key", "value", "why"):
        table.add_column(column, overflow="fold")
    for entry in cfg.resolution:
        value = entry["value"]
        shown = value.to_dict() if isinstance(value, DictDefault) else value
        table.add_row(str(entry["key"]), json.dumps(shown, default=str), str(entry["reason"]))
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 160  # a log file has no width of its own
    console.print(table)


def print_size(model: Any, trainer: Any, total_num_steps: int | None) -> None:
    """Show how much is trained, and for how long."""
    trainable, total = count_parameters(model)
    args = trainer.args
    steps = args.max_steps if args.max_steps > 0 else total_num_steps
    LOG.info(
        f"Training {trainable:,} of {total:,} parameters ({100 * trainable / max(total, 1):.2f} %): {steps} steps, "
        f"{args.num_train_epochs:g} epochs, {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x "
        f"{args.world_size} rows per step."
    )


def count_parameters(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters. A 4-bit weight counts its values, not the elements of what stores them."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # of bitsandbytes
        values = state.shape.numel() if state else parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        total += values
        trainable += values if parameter.requires_grad else 0
    return trainable, total


def config_as_yaml(cfg: DictDefault) -> str:
    """The resolved config as YAML, without secrets and without what the program found out for itself."""
    plain = redact_secrets({key: value for key, value in cfg.to_dict().items() if value is not None})
    for key in ("resolution", "capabilities", "env_capabilities"):
        plain.pop(key, None)
    # Through JSON, so that enums and dtypes become words that any YAML reader takes.
    return yaml.safe_dump(json.loads(json.dumps(plain, default=_as_word)), sort_keys=True, allow_unicode=True)


def _as_word(value: Any) -> str:
    return str(value).removeprefix("torch.")


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0
