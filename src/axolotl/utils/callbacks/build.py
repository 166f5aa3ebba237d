"""The callbacks of a run, read from the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from axolotl.core.checkpoint import SAVED_CONFIG
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.monkeypatch.relora import ReLoRACallback
from axolotl.utils.callbacks.bench_eval import DEFAULT_SPLIT, BenchEvalCallback, load_benchmark
from axolotl.utils.callbacks.causal_lm_eval import CausalLMBenchEvalCallback, check_metrics
from axolotl.utils.callbacks.dynamic_checkpoint import DynamicCheckpointCallback
from axolotl.utils.callbacks.frozen_rows import FrozenRowsCallback
from axolotl.utils.callbacks.generation import GenerationSettings, SFTGenerationCallback
from axolotl.utils.callbacks.guards import (
    EarlyStoppingCallback,
    GCCallback,
    LossWatchDogCallback,
    SaveModelOnFirstStepCallback,
    SkipEvalOnResumeCallback,
)
from axolotl.utils.callbacks.layer_offloading import LayerOffloadingCallback
from axolotl.utils.callbacks.lisa import LISACallback
from axolotl.utils.callbacks.loss_scale import LossScaleCallback
from axolotl.utils.callbacks.opentelemetry import OpenTelemetryMetricsCallback
from axolotl.utils.callbacks.profiler import PytorchProfilerCallback
from axolotl.utils.callbacks.progress import ProgressCallback
from axolotl.utils.callbacks.tensorboard_ import SaveAxolotlConfigtoTensorBoardCallback
from axolotl.utils.callbacks.trackers import RunOutcome, guard_trackers, trackers_of
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.freeze import find_frozen_rows
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


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
    if cfg.layer_offloading:
        callbacks.append(LayerOffloadingCallback())
    if cfg.qat:
        from axolotl.utils.callbacks.qat import QATCallback  # torchao is an extra

        callbacks.append(QATCallback(cfg.qat))
    path = saved_config_path(cfg)
    callbacks += [tracker.saves_config(path) for tracker in trackers_of(cfg) if tracker.saves_config]
    if cfg.use_otel_metrics:
        callbacks.append(OpenTelemetryMetricsCallback(cfg))
    return callbacks


def saved_config_path(cfg: DictDefault) -> str:
    """The config as `train` writes it, without secrets."""
    return str(Path(cfg.output_dir) / SAVED_CONFIG)


def build_post_trainer_callbacks(cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
    """Callbacks that need the trainer. Also takes away the one of transformers that ours replaces."""
    trainer.remove_callback(PrinterCallback)
    # What adds metrics to an evaluation comes before what acts on them.
    callbacks: list[TrainerCallback] = build_evaluation_callbacks(cfg, trainer)
    tensorboard = find_callback(trainer, TensorBoardCallback)
    if cfg.use_tensorboard and tensorboard is not None:
        callbacks.append(SaveAxolotlConfigtoTensorBoardCallback(saved_config_path(cfg), tensorboard))
    callbacks.append(RunOutcome(guard_trackers(cfg, [*trainer.callback_handler.callbacks, *callbacks])))
    if trainer.args.fp16 and isinstance(trainer, AxolotlTrainer):
        callbacks.append(LossScaleCallback(trainer))
    if cfg.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(cfg.early_stopping_patience))
    frozen = find_frozen_rows(trainer.model, cfg.unfrozen_parameters) if cfg.unfrozen_parameters else []  # type: ignore[arg-type]
    if frozen:
        callbacks.append(FrozenRowsCallback(frozen))
    if cfg.relora:
        relora = ReLoRACallback(cfg)
        trainer.checkpoint_parts.append(relora)  # type: ignore[attr-defined]
        callbacks.append(relora)
    if cfg.lisa_step_interval and cfg.lisa_n_layers:
        callbacks.append(LISACallback(trainer, cfg.lisa_n_layers, cfg.lisa_step_interval, cfg.lisa_layers_attribute))
    return callbacks


def check_evaluation(cfg: DictDefault) -> None:
    """What evaluations need besides the model is there.

    Raises:
        ConfigError: a package is missing.
        DatasetError: the benchmark cannot be loaded.
    """
    if cfg.do_causal_lm_eval:
        check_metrics(cfg.eval_causal_lm_metrics)
    if cfg.do_bench_eval:
        load_benchmark(cfg.bench_dataset, cfg.bench_split)


def build_evaluation_callbacks(cfg: DictDefault, trainer: Any) -> list[TrainerCallback]:
    """Callbacks that let the model write or answer at evaluations."""
    callbacks: list[TrainerCallback] = []
    if cfg.do_causal_lm_eval:
        callbacks.append(
            CausalLMBenchEvalCallback(
                trainer, cfg.eval_causal_lm_metrics, cfg.eval_max_new_tokens, int(cfg.sequence_len or 512)
            )
        )
    if cfg.do_bench_eval:
        questions = load_benchmark(cfg.bench_dataset, cfg.bench_split)
        callbacks.append(BenchEvalCallback(trainer, questions, cfg.bench_split or DEFAULT_SPLIT))
    seed = trainer.args.seed
    if cfg.eval_table_size:
        settings = GenerationSettings("predictions", cfg.eval_table_size, cfg.eval_max_new_tokens, seed=seed)
        callbacks.append(SFTGenerationCallback(trainer, settings))
    if cfg.generate_samples:
        callbacks.append(SFTGenerationCallback(trainer, read_sample_settings(cfg, seed)))
    if callbacks and trainer.args.eval_strategy == "no":
        LOG.warning(
            "Nothing is evaluated during this run, so that `generate_samples`, `eval_table_size`, `do_causal_lm_eval` and "
            "`do_bench_eval` do nothing. "
            "Write `val_set_size: 0.05` or `test_datasets:`, and `evals_per_epoch: 1`."
        )
    return callbacks


def read_sample_settings(cfg: DictDefault, seed: int) -> GenerationSettings:
    """The keys of `generate_samples`."""
    ratio = cfg.generation_prompt_ratio
    note_choice(
        cfg,
        "prompts of generated samples",
        "what a row does not train on",
        f"`generation_prompt_ratio: {ratio}` cuts rows that train on everything",
    )
    temperature = cfg.generation_temperature
    return GenerationSettings(
        name="generated_samples",
        num_samples=cfg.num_generation_samples or 3,
        max_new_tokens=cfg.generation_max_new_tokens or 50,
        prompt_ratio=0.5 if ratio is None else ratio,
        # A temperature of 0 means the most probable token, which is another algorithm for `generate`.
        do_sample=cfg.generation_do_sample is not False and temperature != 0,
        sampling={"temperature": temperature, "top_p": cfg.generation_top_p, "top_k": cfg.generation_top_k},
        seed=seed,
    )


def find_callback(trainer: Trainer, kind: type) -> Any:
    """The trainer's callback of a class, or None."""
    return next((callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)), None)
