"""Base class for trainer builder."""

from __future__ import annotations

import abc
import importlib
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from axolotl.core.builders import arguments as read
from axolotl.exceptions import ConfigError
from axolotl.integrations.base import PluginManager
from axolotl.loaders.utils import read_seed
from axolotl.utils.callbacks.build import build_post_trainer_callbacks, build_pre_trainer_callbacks
from axolotl.utils.data.steps import num_steps_of_run
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.optimizers.table import read_optimizer, read_optimizer_args


class TrainerBuilderBase(abc.ABC):
    """Turns a config into training arguments, callbacks and a trainer.

    Args:
        cfg: the config.
        model: the model to train.
        tokenizer: its tokenizer.
        processor: its processor, for multimodal models.

    Set `train_dataset` and `eval_dataset` (and `model_ref`, `peft_config` where they apply) before `build`.
    """

    def __init__(self, cfg: DictDefault, model: Any, tokenizer: Any, processor: Any = None):
        self.cfg = cfg
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self.model_ref: Any = None
        self.peft_config: Any = None

    @abc.abstractmethod
    def build(self, total_num_steps: int | None) -> Trainer:
        """The trainer. `total_num_steps` is the length of the run in optimizer steps, None for a stream."""

    def get_callbacks(self) -> list[TrainerCallback]:
        """Callbacks that do not need the trainer: those of plugins, then those of the config."""
        plugins = PluginManager.get_instance().add_callbacks_pre_trainer(self.cfg, self.model)
        return [*plugins, *build_pre_trainer_callbacks(self.cfg)]

    def get_post_trainer_create_callbacks(self, trainer: Trainer) -> list[TrainerCallback]:
        """Callbacks added after the trainer is created, because they need it."""
        plugins = PluginManager.get_instance().add_callbacks_post_trainer(self.cfg, trainer)
        return [*build_post_trainer_callbacks(self.cfg, trainer), *(callback for callback in plugins if callback)]

    def hook_pre_create_training_args(self, training_arguments_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Last change of the arguments before they become an object."""
        return training_arguments_kwargs

    def hook_post_create_training_args(self, training_arguments: Any) -> Any:
        """Change of the arguments object."""
        return training_arguments

    def hook_pre_create_trainer(self, trainer_kwargs: dict[str, Any], trainer_cls: type) -> tuple[dict[str, Any], type]:
        """Last change of the trainer's keyword arguments and class."""
        return trainer_kwargs, trainer_cls

    def hook_post_create_trainer(self, trainer: Trainer) -> Trainer:
        """Change of the trainer."""
        return trainer

    def read_base_training_args(self, total_num_steps: int | None) -> dict[str, Any]:
        """Training arguments that every kind of training shares."""
        cfg = self.cfg
        args: dict[str, Any] = {
            "output_dir": str(Path(cfg.output_dir)),
            "per_device_train_batch_size": cfg.micro_batch_size or 1,
            "num_train_epochs": cfg.num_epochs if cfg.num_epochs is not None else 1,
            "max_steps": cfg.max_steps or (total_num_steps if cfg.pretraining_dataset or cfg.streaming else None) or -1,
            "warmup_steps": read.read_warmup_steps(cfg, total_num_steps),
            "logging_steps": read.read_logging_steps(cfg, total_num_steps),
            "seed": read_seed(cfg),
            # A loss that is not finite stops the run; hiding it in the average would not.
            "logging_nan_inf_filter": False,
            # The progress callback of this package writes the lines.
            "disable_tqdm": True,
            "average_tokens_across_devices": True,
        }
        args["data_seed"] = args["seed"]
        for name in (*read.SAME_NAME, *read.OWN_SAME_NAME):
            if cfg[name] is not None:
                value = cfg[name]
                args[name] = value.to_dict() if isinstance(value, DictDefault) else value
        if cfg.lr_groups:
            args["lr_groups"] = [dict(group) for group in cfg.lr_groups]
        for part in (
            read.read_save_args(cfg),
            read.read_watch_args(cfg),
            read.read_eval_args(cfg, self.eval_dataset is not None),
            read.read_best_args(cfg),
            read.read_precision_args(cfg),
            read.read_checkpointing_args(cfg),
            read.read_hub_args(cfg),
            read.read_tracker_args(cfg),
            read.read_data_args(cfg),
            read.read_scheduler_args(cfg),
            read.read_distributed_args(cfg),
            read_optimizer_args(cfg),
            PluginManager.get_instance().get_training_args(cfg) or {},
        ):
            args.update(part)
        args.update(read.align_saves(cfg, args, num_steps_of_run(cfg, total_num_steps)))
        if "learning_rate" in args:
            args["learning_rate"] = float(args["learning_rate"])
        return args

    def build_training_args(self, args_cls: type, kwargs: dict[str, Any]) -> Any:
        """The arguments object. Plugins' argument mixins become bases of its class."""
        mixins = [_import_class(mixin) for mixin in PluginManager.get_instance().get_training_args_mixin() or []]
        if mixins:
            args_cls = make_dataclass(args_cls.__name__, [], bases=(*mixins, args_cls))
        kwargs = self.hook_pre_create_training_args(kwargs)
        known = {field.name for field in fields(args_cls)}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise ConfigError(f"{args_cls.__name__} has no argument named {', '.join(unknown)}")
        args = args_cls(**kwargs)
        if args.world_size <= 1 and args.n_gpu > 1:
            args._n_gpu = 1
            note_choice(
                self.cfg, "launcher", "one GPU", "one process trains on one GPU; `--launcher torchrun` uses all of them"
            )
        return self.hook_post_create_training_args(args)

    def read_optimizer_cls_and_kwargs(self, training_args: Any) -> tuple[type, dict[str, Any]]:
        """Class, or factory, and arguments of the configured optimizer."""
        return read_optimizer(self.cfg, training_args)

    def read_trainer_cls(self, default: type) -> type:
        """The trainer class: `trainer_cls` of the config, else a plugin's, else the default."""
        written = self.cfg.trainer_cls
        chosen = _import_class(written) if written else PluginManager.get_instance().get_trainer_cls(self.cfg)
        if chosen is None:
            return default
        if not (isinstance(chosen, type) and issubclass(chosen, Trainer)):
            said = (
                f"`trainer_cls: {written}`" if written else f"`get_trainer_cls` of a plugin gives `{chosen!r}`, which"
            )
            raise ConfigError(
                f"{said} is no trainer: it must inherit from `transformers.Trainer`, best from "
                "`axolotl.core.trainers.base.AxolotlTrainer`."
            )
        return chosen

    def create_trainer(self, trainer_cls: type, trainer_kwargs: dict[str, Any]) -> Trainer:
        """Make the trainer and everything that needs it: hooks, plugins, late callbacks."""
        trainer_kwargs, trainer_cls = self.hook_pre_create_trainer(trainer_kwargs, trainer_cls)
        trainer = self.hook_post_create_trainer(trainer_cls(**trainer_kwargs))
        PluginManager.get_instance().post_trainer_create(self.cfg, trainer)
        for callback in self.get_post_trainer_create_callbacks(trainer):
            trainer.add_callback(callback)
        return trainer


def _import_class(path: str | type) -> type:
    if isinstance(path, type):
        return path
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import `{path}`: {error}. Write the full path of a class, `package.module.Class`."
        ) from error
