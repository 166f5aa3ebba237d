"""The callbacks of a run, read from the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback

from axolotl.utils.callbacks.comet_ import SaveAxolotlConfigtoCometCallback
from axolotl.utils.callbacks.dynamic_checkpoint import DynamicCheckpointCallback
from axolotl.utils.callbacks.guards import (
    GCCallback,
    LossWatchDogCallback,
    SaveModelOnFirstStepCallback,
    SkipEvalOnResumeCallback,
)
from axolotl.utils.callbacks.lisa import lisa_callback_factory
from axolotl.utils.callbacks.mlflow_ import SaveAxolotlConfigtoMlflowCallback
from axolotl.utils.callbacks.profiler import PytorchProfilerCallback
from axolotl.utils.callbacks.progress import ProgressCallback
from axolotl.utils.callbacks.wandb_ import SaveAxolotlConfigtoWandBCallback
from axolotl.utils.dict import DictDefault

SAVED_CONFIG = "axolotl_config.yaml"

# Trackers that get the config as a file: key that switches them on -> callback.
CONFIG_UPLOADS = (
    ("use_wandb", SaveAxolotlConfigtoWandBCallback),
    ("use_mlflow", SaveAxolotlConfigtoMlflowCallback),
    ("use_comet", SaveAxolotlConfigtoCometCallback),
)


def build_pre_trainer_callbacks(cfg: DictDefault) -> list[TrainerCallback]:
    """Callbacks that need nothing but the config."""
    callbacks: list[TrainerCallback] = [SkipEvalOnResumeCallback(), ProgressCallback()]
    if cfg.gc_steps or cfg.gc_collect_steps:
        callbacks.append(GCCallback(cfg.gc_collect_steps or cfg.gc_steps))
    if cfg.save_first_step:
        callbacks.append(SaveModelOnFirstStepCallback())
    if cfg.dynamic_checkpoint and cfg.dynamic_checkpoint.enabled:
        dynamic = cfg.dynamic_checkpoint
        callbacks.append(DynamicCheckpointCallback(dynamic.check_interval or 10, dynamic.trigger_file_path or ""))
    if cfg.loss_watchdog_threshold is not None:
        callbacks.append(LossWatchDogCallback(cfg.loss_watchdog_threshold, cfg.loss_watchdog_patience or 3))
    if cfg.profiler_steps:
        callbacks.append(PytorchProfilerCallback(cfg.profiler_steps, cfg.profiler_steps_start or 0))
    if cfg.qat:
        from axolotl.utils.callbacks.qat import QATCallback  # torchao is an extra

        callbacks.append(QATCallback(cfg.qat))
    path = str(Path(cfg.output_dir) / SAVED_CONFIG)
    callbacks += [callback(path) for key, callback in CONFIG_UPLOADS if cfg[key]]
    return callbacks


def build_post_trainer_callbacks(cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
    """Callbacks that need the trainer. Also takes away the one of transformers that ours replaces."""
    trainer.remove_callback(PrinterCallback)
    callbacks: list[TrainerCallback] = []
    if cfg.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(cfg.early_stopping_patience))
    if cfg.lisa_step_interval and cfg.lisa_n_layers:
        callbacks.append(
            lisa_callback_factory(trainer)(cfg.lisa_n_layers, cfg.lisa_step_interval, cfg.lisa_layers_attribute)
        )
    return callbacks


def find_callback(trainer: Trainer, kind: type) -> Any:
    """The trainer's callback of a class, or None."""
    return next((callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)), None)
