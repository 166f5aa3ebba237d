"""Plugins: code of ours or of others that hooks into a run without the core knowing it.

Comes in: the dotted paths under `plugins:`. Goes out: `PluginManager.get_instance()`, which the rooms of the program ask
at each stage of a run. To write one, subclass `BasePlugin`, override the hooks you need, and list the class in the config:

    plugins:
      - my_package.MyPlugin                                           # any installed package
      - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin  # ours
      - cut_cross_entropy.CutCrossEntropyPlugin                       # ours, short
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from axolotl.exceptions import ConfigError, did_you_mean
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from peft import PeftConfig
    from pydantic import BaseModel
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel, Trainer, TrainerCallback

LOG = get_logger(__name__)

OUR_PACKAGE = "axolotl.integrations"


class PluginError(ConfigError, ImportError):
    """A class listed under `plugins:` cannot be imported or is not a plugin."""


@dataclass(frozen=True)
class AdapterCapabilities:
    """What the checks need to know of an `adapter:` value that a plugin brings.

    Attributes:
        name: the value of `adapter:`.
        lora_like: it reads `lora_r`, `lora_alpha` and the like and can be merged as W + s·B·A.
        relora: its weights may be merged and reset while training.
    """

    name: str
    lora_like: bool = True
    relora: bool = False


class BasePlugin:
    """Base class of plugins. Every hook does nothing and returns None until it is overridden.

    Hooks run in the order of the config. Where one answer is wanted (a trainer class, an optimizer), the first answer
    that is not None wins; where several make sense (callbacks, arguments), all are taken.
    """

    # --- configuration --------------------------------------------------------------------------------------------

    def register(self, cfg: dict) -> None:
        """Called once with the config as written, before it is validated."""

    def on_config_validation_error(self, cfg: DictDefault, error: ConfigError) -> None:
        """Called when the config was refused, before the error is raised.

        Args:
            cfg: the config as written.
            error: carries `problems`, one message each.
        """

    def get_input_args(self) -> str | type[BaseModel] | None:
        """A pydantic model (the class, or its dotted path) whose fields become keys of the config."""

    def get_training_args_mixin(self) -> str | type | None:
        """A dataclass (the class, or its dotted path) whose fields become training arguments."""

    def get_adapter_capabilities(self) -> list[AdapterCapabilities] | None:
        """The `adapter:` values that this plugin brings."""

    # --- data -----------------------------------------------------------------------------------------------------

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> Any | None:
        """Load and prepare the datasets in place of the built-in loader.

        Returns:
            A `TrainDatasetMeta`, or None to leave loading to others.
        """

    # --- model ----------------------------------------------------------------------------------------------------

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Called before the model is loaded."""

    def post_model_build(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """Called after the model is built or loaded, before any adapter is applied."""

    def pre_lora_load(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """Called before LoRA weights are loaded."""

    def get_lora_config_kwargs(self, cfg: DictDefault) -> dict[str, Any] | None:
        """Further keyword arguments for `peft.LoraConfig`."""

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[nn.Module | None, PeftConfig | None] | None:
        """Build an adapter that this plugin brings (see `get_adapter_capabilities`).

        Returns:
            The adapted model and its PEFT config, or None when `cfg.adapter` is not ours.
        """

    def post_lora_load(self, cfg: DictDefault, model: nn.Module) -> None:
        """Called after LoRA weights are loaded."""

    def post_model_load(self, cfg: DictDefault, model: nn.Module) -> None:
        """Called after the model is loaded, adapters included."""

    # --- trainer --------------------------------------------------------------------------------------------------

    def get_trainer_cls(self, cfg: DictDefault) -> type[Trainer] | None:
        """A trainer class to use in place of the built-in one."""

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any] | None:
        """Values to set on the training arguments."""

    def get_collator_cls_and_kwargs(
        self, cfg: DictDefault, is_eval: bool = False
    ) -> type | tuple[type, dict[str, Any]] | None:
        """A collator class, alone or with its keyword arguments.

        Args:
            cfg: the config.
            is_eval: whether it will collate evaluation batches.
        """

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Called after the trainer is created."""

    def create_optimizer(self, cfg: DictDefault, trainer: Trainer) -> Optimizer | None:
        """An optimizer to use in place of the configured one."""

    def create_lr_scheduler(
        self, cfg: DictDefault, trainer: Trainer, optimizer: Optimizer, num_training_steps: int
    ) -> LRScheduler | None:
        """A learning rate scheduler to use in place of the configured one."""

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: nn.Module) -> list[TrainerCallback]:
        """Callbacks that can be made before the trainer exists."""
        return []

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        """Callbacks that need the trainer, or the model inside it."""
        return []

    def on_rollouts_scored(
        self, cfg: DictDefault, trainer: Trainer, prompts: list, completions: list, rewards: Any, **kwargs: Any
    ) -> None:
        """Called in online RL when a batch of completions has its rewards.

        Args:
            cfg: the config.
            trainer: the running trainer.
            prompts: one per completion, repeated for every generation of one prompt.
            completions: what the policy wrote.
            rewards: float tensor of shape (num_completions, num_reward_functions).
            **kwargs: what later versions add.
        """

    # --- after ----------------------------------------------------------------------------------------------------

    def post_train(self, cfg: DictDefault, model: nn.Module) -> None:
        """Called after training, with the model still loaded."""

    def post_train_unload(self, cfg: DictDefault) -> None:
        """Called after training, when the model has been let go."""


class PluginManager:
    """The plugins of this process, in the order of the config. One instance; `PluginManager.get_instance()`."""

    _instance: PluginManager | None = None

    plugins: dict[str, BasePlugin]
    cfg: DictDefault

    def __new__(cls) -> PluginManager:
        if cls._instance is None:
            cls._instance = super().__new__(cls)
            cls._instance.plugins = {}
            cls._instance.cfg = DictDefault()
        return cls._instance

    @staticmethod
    def get_instance() -> PluginManager:
        """The one manager, made when first asked for."""
        return PluginManager()

    def register(self, plugin_name: str) -> None:
        """Load the plugin `plugin_name` (see `load_plugin`); does nothing when it is loaded already, by whatever name.

        Raises:
            PluginError: it cannot be imported, or is not a plugin.
        """
        if plugin_name in self.plugins:
            return
        plugin = load_plugin(plugin_name)
        for name, other in self.plugins.items():
            if type(other) is type(plugin):
                LOG.warning("`plugins` lists %s and %s, which are the same: it is loaded once.", name, plugin_name)
                return
        self.plugins[plugin_name] = plugin
        LOG.info("plugin loaded: %s", plugin_name)

    # --- configuration --------------------------------------------------------------------------------------------

    def on_config_validation_error(self, cfg: DictDefault, error: ConfigError) -> None:
        """Tell every plugin that the config was refused."""
        for plugin in self.plugins.values():
            plugin.on_config_validation_error(cfg, error)

    def get_input_args(self) -> list[str | type[BaseModel]]:
        """The argument models of all plugins that have one."""
        return _answers(plugin.get_input_args() for plugin in self.plugins.values())

    def get_training_args_mixin(self) -> list[str | type]:
        """The training argument dataclasses of all plugins that have one."""
        return _answers(plugin.get_training_args_mixin() for plugin in self.plugins.values())

    def get_adapter_capabilities(self) -> dict[str, AdapterCapabilities]:
        """The adapters that plugins bring, by the value of `adapter:`."""
        answers = _answers(plugin.get_adapter_capabilities() for plugin in self.plugins.values())
        return {adapter.name: adapter for answer in answers for adapter in answer}

    # --- data -----------------------------------------------------------------------------------------------------

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> Any | None:
        """The datasets of the one plugin that loads them, or None when none does.

        Raises:
            ConfigError: two plugins loaded datasets; the data of one would be dropped.
        """
        loaded = {name: plugin.load_datasets(cfg, preprocess) for name, plugin in self.plugins.items()}
        loaded = {name: dataset_meta for name, dataset_meta in loaded.items() if dataset_meta is not None}
        if len(loaded) > 1:
            raise ConfigError(
                f"`plugins` holds several that load the datasets ({', '.join(loaded)}), but a run has one training set. "
                "Remove all but one of them."
            )
        return next(iter(loaded.values()), None)

    # --- model ----------------------------------------------------------------------------------------------------

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Call the `pre_model_load` method of all plugins."""
        for plugin in self.plugins.values():
            plugin.pre_model_load(cfg)

    def post_model_build(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """Call the `post_model_build` method of all plugins, before any adapter is applied."""
        for plugin in self.plugins.values():
            plugin.post_model_build(cfg, model)

    def pre_lora_load(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """Call the `pre_lora_load` method of all plugins."""
        for plugin in self.plugins.values():
            plugin.pre_lora_load(cfg, model)

    def get_lora_config_kwargs(self, cfg: DictDefault) -> dict[str, Any]:
        """Keyword arguments for `peft.LoraConfig`, merged; an earlier plugin wins."""
        return _merged(plugin.get_lora_config_kwargs(cfg) for plugin in self.plugins.values())

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[nn.Module | None, PeftConfig | None] | None:
        """The first adapter that a plugin builds, or None."""
        return _first(
            lambda p=plugin: p.load_adapter(model, cfg, inference=inference, config_only=config_only)
            for plugin in self.plugins.values()
        )

    def post_lora_load(self, cfg: DictDefault, model: nn.Module) -> None:
        """Call the `post_lora_load` method of all plugins."""
        for plugin in self.plugins.values():
            plugin.post_lora_load(cfg, model)

    def post_model_load(self, cfg: DictDefault, model: nn.Module) -> None:
        """Call the `post_model_load` method of all plugins, adapters included."""
        for plugin in self.plugins.values():
            plugin.post_model_load(cfg, model)

    # --- trainer --------------------------------------------------------------------------------------------------

    def get_trainer_cls(self, cfg: DictDefault) -> type[Trainer] | None:
        """The first trainer class that a plugin names, or None."""
        return _first(lambda p=plugin: p.get_trainer_cls(cfg) for plugin in self.plugins.values())

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        """The training arguments of all plugins, merged; an earlier plugin wins."""
        return _merged(plugin.get_training_args(cfg) for plugin in self.plugins.values())

    def get_collator_cls_and_kwargs(
        self, cfg: DictDefault, is_eval: bool = False
    ) -> type | tuple[type, dict[str, Any]] | None:
        """The first collator class (alone or with keyword arguments) that a plugin names, or None."""
        return _first(lambda p=plugin: p.get_collator_cls_and_kwargs(cfg, is_eval) for plugin in self.plugins.values())

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Call the `post_trainer_create` method of all plugins."""
        for plugin in self.plugins.values():
            plugin.post_trainer_create(cfg, trainer)

    def create_optimizer(self, trainer: Trainer) -> Optimizer | None:
        """The first optimizer that a plugin creates, or None."""
        return _first(lambda p=plugin: p.create_optimizer(self.cfg, trainer) for plugin in self.plugins.values())

    def create_lr_scheduler(
        self, trainer: Trainer, optimizer: Optimizer, num_training_steps: int
    ) -> LRScheduler | None:
        """The first scheduler that a plugin creates, or None."""
        return _first(
            lambda p=plugin: p.create_lr_scheduler(self.cfg, trainer, optimizer, num_training_steps)
            for plugin in self.plugins.values()
        )

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: nn.Module) -> list[TrainerCallback]:
        """The callbacks of all plugins that need no trainer."""
        answers = _answers(plugin.add_callbacks_pre_trainer(cfg, model) for plugin in self.plugins.values())
        return [callback for answer in answers for callback in answer]

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        """The callbacks of all plugins that need the trainer."""
        answers = _answers(plugin.add_callbacks_post_trainer(cfg, trainer) for plugin in self.plugins.values())
        return [callback for answer in answers for callback in answer]

    def on_rollouts_scored(
        self, cfg: DictDefault, trainer: Trainer, prompts: list, completions: list, rewards: Any, **kwargs: Any
    ) -> None:
        """Call the `on_rollouts_scored` method of all plugins."""
        for plugin in self.plugins.values():
            plugin.on_rollouts_scored(cfg, trainer, prompts, completions, rewards, **kwargs)

    # --- after ----------------------------------------------------------------------------------------------------

    def post_train(self, cfg: DictDefault, model: nn.Module) -> None:
        """Call the `post_train` method of all plugins."""
        for plugin in self.plugins.values():
            plugin.post_train(cfg, model)

    def post_train_unload(self, cfg: DictDefault) -> None:
        """Call the `post_train_unload` method of all plugins."""
        for plugin in self.plugins.values():
            plugin.post_train_unload(cfg)


class BaseOptimizerFactory:
    """Base class for factories of custom optimizers. Subclass it and define `__call__(opt_model, training_args, **kwargs)`."""

    def __call__(self, opt_model: nn.Module, training_args: Any, **optimizer_kwargs: Any) -> Optimizer | None:
        """Create the optimizer of `opt_model`. The base class creates none."""

    @staticmethod
    def get_decay_parameter_names(model: nn.Module) -> list[str]:
        """Names of the parameters that weight decay applies to: all but those of norm layers, and biases."""
        from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
        from transformers.trainer_pt_utils import get_parameter_names

        forbidden_names = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
        return get_parameter_names(model, ALL_LAYERNORM_LAYERS, forbidden_names)


def load_plugin(plugin_name: str) -> BasePlugin:
    """Import and instantiate the plugin class at `plugin_name`.

    Args:
        plugin_name: `module.ClassName`. A module that does not exist is also looked for under `axolotl.integrations`.

    Raises:
        PluginError: no dot, no such module, no such class in it (near matches are named), or not a `BasePlugin`.
    """
    module_name, _, class_name = str(plugin_name).rpartition(".")
    if not module_name:
        raise PluginError(
            f"`plugins: [{plugin_name}]` is not of the form module.ClassName.{_near_plugins(plugin_name)}"
        )
    modules = _import_candidates(module_name, plugin_name)
    plugin_cls = next((getattr(module, class_name) for module in modules if hasattr(module, class_name)), None)
    if plugin_cls is None:
        names = [name for module in modules for name in dir(module) if name.endswith("Plugin") and name != "BasePlugin"]
        hint = did_you_mean(class_name, names, n=3, cutoff=0.3)
        raise PluginError(f"`plugins: [{plugin_name}]`: the module `{module_name}` has no class `{class_name}`.{hint}")
    plugin = plugin_cls() if isinstance(plugin_cls, type) else None
    if not isinstance(plugin, BasePlugin):
        raise PluginError(
            f"`plugins: [{plugin_name}]` is not a plugin: `{class_name}` does not inherit from "
            "axolotl.integrations.base.BasePlugin."
        )
    return plugin


def _import_candidates(module_name: str, plugin_name: str) -> list[types.ModuleType]:
    """The modules that `module_name` may mean: as it is, and under our package. Both may exist: some of our plugins are
    named after the library that they wrap.
    """
    ours = [] if module_name.startswith("axolotl.") else [f"{OUR_PACKAGE}.{module_name}"]
    modules = []
    for candidate in (module_name, *ours):
        try:
            modules.append(importlib.import_module(candidate))
        except ModuleNotFoundError as err:
            # A package that the plugin itself needs is missing: say that, not that the plugin does not exist.
            if not err.name or not (candidate == err.name or candidate.startswith(err.name + ".")):
                raise PluginError(
                    f"`plugins: [{plugin_name}]` cannot be loaded: it needs the package `{err.name}`, which is not installed."
                ) from err
        except ImportError as err:
            raise PluginError(f"`plugins: [{plugin_name}]` cannot be loaded: {err}") from err
    if not modules:
        raise PluginError(
            f"`plugins: [{plugin_name}]` cannot be found: there is no module `{module_name}`.{_near_plugins(plugin_name)} "
            "A plugin of your own must be installed in this Python environment (`pip install -e .` in its folder)."
        )
    return modules


def _near_plugins(plugin_name: str) -> str:
    """A hint that names our plugins that are spelt like `plugin_name`, by folder; empty when there are none."""
    package = importlib.import_module(OUR_PACKAGE)
    folders = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if info.ispkg)
    words = [word.lower() for word in str(plugin_name).split(".")]
    near = {
        match
        for word in words
        for match in difflib.get_close_matches(word.removesuffix("plugin"), folders, n=1, cutoff=0.5)
    }
    if near:
        return f" Did you mean one of {', '.join(f'{OUR_PACKAGE}.{name}' for name in sorted(near))}?"
    return ""


def _answers(answers: Iterable[Any]) -> list[Any]:
    return [answer for answer in answers if answer is not None]


def _first(asks: Iterable[Callable[[], Any]]) -> Any | None:
    """The first answer that is not None; later plugins are not asked."""
    for ask in asks:
        answer = ask()
        if answer is not None:
            return answer
    return None


def _merged(answers: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for answer in answers:
        merged = {**(answer or {}), **merged}
    return merged
