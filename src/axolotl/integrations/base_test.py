from __future__ import annotations

import sys
import textwrap

import pytest
from pydantic import BaseModel

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import (
    AdapterCapabilities,
    BaseOptimizerFactory,
    BasePlugin,
    PluginError,
    PluginManager,
    load_plugin,
)
from axolotl.integrations.config import merge_input_args, merge_training_args
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault

PLUGIN = """
from dataclasses import dataclass
from pydantic import BaseModel
from axolotl.integrations.base import BasePlugin


class Args(BaseModel):
    shout_factor: float = 2.0


@dataclass
class TrainingMixin:
    shout: bool = False


class ShoutPlugin(BasePlugin):
    registered_with = None

    def register(self, cfg):
        type(self).registered_with = cfg

    def get_input_args(self):
        return "shouting.Args"

    def get_training_args_mixin(self):
        return "shouting.TrainingMixin"


class NotAPlugin:
    pass
"""
CONFIG = {"base_model": "x", "learning_rate": 1e-4, "datasets": [{"path": "a", "type": "alpaca"}]}


@pytest.fixture(autouse=True)
def manager(monkeypatch):
    """A manager of this test's own."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    return PluginManager.get_instance()


@pytest.fixture
def shouting(tmp_path, monkeypatch):
    """An installed package with a plugin in it."""
    (tmp_path / "shouting.py").write_text(textwrap.dedent(PLUGIN))
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("shouting", "broken"):
        sys.modules.pop(name, None)


class First(BasePlugin):
    def get_trainer_cls(self, cfg):
        return None

    def get_training_args(self, cfg):
        return {"a": 1, "b": 1}

    def add_callbacks_pre_trainer(self, cfg, model):
        return ["first"]

    def create_optimizer(self, cfg, trainer):
        return (cfg["optimizer"], trainer)

    def get_adapter_capabilities(self):
        return [AdapterCapabilities("mora", relora=True)]


class Second(BasePlugin):
    def get_trainer_cls(self, cfg):
        return dict

    def get_training_args(self, cfg):
        return {"b": 2, "c": 2}

    def add_callbacks_pre_trainer(self, cfg, model):
        return ["second"]

    def create_optimizer(self, cfg, trainer):
        raise AssertionError("the first plugin has answered")

    def add_callbacks_post_trainer(self, cfg, trainer):
        return None

    def load_datasets(self, cfg, preprocess=False):
        return "data"


class TestManager:
    def test_is_one(self, manager):
        assert PluginManager.get_instance() is PluginManager.get_instance() is manager

    def test_the_first_answer_wins_and_lists_are_joined(self, manager):
        manager.plugins = {"first": First(), "second": Second()}
        manager.cfg = DictDefault(optimizer="mine")
        assert manager.get_trainer_cls({}) is dict
        assert manager.create_optimizer("trainer") == ("mine", "trainer")
        assert manager.create_lr_scheduler("trainer", "optimizer", 10) is None
        assert manager.get_training_args({}) == {"a": 1, "b": 1, "c": 2}
        assert manager.add_callbacks_pre_trainer({}, None) == ["first", "second"]
        assert manager.add_callbacks_post_trainer({}, None) == []
        assert manager.get_adapter_capabilities()["mora"].relora
        assert manager.load_datasets({}) == "data"

    def test_two_data_sets_are_refused(self, manager):
        manager.plugins = {"a": Second(), "b": Second()}
        with pytest.raises(ConfigError, match="a, b"):
            manager.load_datasets({})

    def test_every_hook_of_a_plugin_has_its_call(self, manager):
        hooks = {name for name in vars(BasePlugin) if not name.startswith("_")} - {"register"}
        assert hooks <= set(vars(PluginManager))
        manager.plugins = {"plain": BasePlugin()}
        assert manager.get_collator_cls_and_kwargs({}, is_eval=True) is None
        assert manager.load_adapter(None, {}) is None
        assert manager.get_input_args() == [] and manager.get_lora_config_kwargs({}) == {}
        for hook in ("pre_model_load", "post_train_unload"):
            getattr(manager, hook)({})
        for hook in (
            "post_model_build",
            "pre_lora_load",
            "post_lora_load",
            "post_model_load",
            "post_trainer_create",
            "post_train",
        ):
            getattr(manager, hook)({}, None)


class TestLoading:
    def test_an_installed_plugin(self, shouting):
        assert type(load_plugin("shouting.ShoutPlugin")).__name__ == "ShoutPlugin"

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("ShoutPlugin", "module.ClassName"),
            ("shouting.ShotPlugin", "Did you mean `ShoutPlugin`"),
            ("shouting.NotAPlugin", "does not inherit"),
            ("shoutin.ShoutPlugin", "no module `shoutin`"),
            ("broken.Plugin", "needs the package `a_package_that_is_not_there`"),
            ("axolotl.integrations.ligerr.LigerPlugin", "axolotl.integrations.liger"),
        ],
    )
    def test_what_is_wrong_is_named(self, shouting, name, words):
        with pytest.raises(PluginError) as error:
            load_plugin(name)
        assert words in str(error.value)
        assert isinstance(error.value, ImportError) and isinstance(error.value, ValueError)

    def test_keys_and_training_arguments_of_a_plugin(self, shouting):
        cfg = DictDefault({**CONFIG, "plugins": ["shouting.ShoutPlugin"], "shout_factor": "3"})
        checked = validate_config(cfg)
        assert checked.shout_factor == 3.0
        with_capabilities, plain = merge_input_args()
        assert "shout_factor" in plain.model_fields and "capabilities" in with_capabilities.model_fields
        assert merge_input_args()[1] is plain
        assert [mixin.__name__ for mixin in merge_training_args()] == ["TrainingMixin"]

    def test_a_key_of_a_plugin_that_is_not_listed_is_unknown(self, shouting):
        validate_config(DictDefault({**CONFIG, "plugins": ["shouting.ShoutPlugin"]}))
        with pytest.raises(ConfigError, match="shout_factor"):
            validate_config(DictDefault({**CONFIG, "shout_factor": 3}))

    def test_a_broken_plugin_is_one_problem_among_others(self, shouting):
        with pytest.raises(ConfigError) as error:
            validate_config(
                DictDefault({**CONFIG, "plugins": ["broken.Plugin"], "warmup_steps": 1, "warmup_ratio": 0.1})
            )
        assert len(error.value.problems) == 2

    def test_a_broken_plugin_does_not_hide_what_else_is_wrong(self, shouting):
        with pytest.raises(ConfigError) as error:
            prepare_plugins(
                DictDefault({**CONFIG, "plugins": ["broken.Plugin", 5], "warmup_steps": 1, "warmup_ratio": 0.1})
            )
        assert len(error.value.problems) == 3

    def test_a_plugin_is_handed_the_config_and_belongs_to_it(self, shouting, manager):
        cfg = DictDefault({**CONFIG, "plugins": ["shouting.ShoutPlugin"]})
        prepare_plugins(cfg)
        assert manager.plugins["shouting.ShoutPlugin"].registered_with is cfg
        prepare_plugins(DictDefault(CONFIG))
        assert manager.plugins == {}

    def test_one_plugin_by_two_names_is_loaded_once(self, manager):
        names = ["liger.LigerPlugin", "axolotl.integrations.liger.LigerPlugin"]
        prepare_plugins(DictDefault({**CONFIG, "plugins": names}))
        assert list(manager.plugins) == names[:1]
        prepare_plugins(DictDefault({**CONFIG, "plugins": names[1:]}))
        assert list(manager.plugins) == names[1:]

    def test_input_args_that_are_no_model_are_refused(self, manager):
        class Odd(BasePlugin):
            def get_input_args(self):
                return "json.nothing"

        manager.plugins = {"odd": Odd()}
        with pytest.raises(ConfigError, match=r"json\.nothing"):
            merge_input_args()

    def test_input_args_may_be_the_class(self, manager):
        class Args(BaseModel):
            loudness: int = 1

        class Direct(BasePlugin):
            def get_input_args(self):
                return Args

        manager.plugins = {"direct": Direct()}
        assert "loudness" in merge_input_args()[1].model_fields


def test_a_refused_config_is_told_to_plugins(manager):
    told = []

    class Curious(BasePlugin):
        def on_config_validation_error(self, cfg, error):
            told.append((cfg.base_model, error.problems))

    manager.plugins = {"curious": Curious()}
    with pytest.raises(ConfigError):
        validate_config(DictDefault({**CONFIG, "warmup_steps": 1, "warmup_ratio": 0.1}))
    assert told[0][0] == "x" and "warmup_steps" in told[0][1][0]


def test_norms_and_biases_do_not_decay():
    import torch

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(2, 2)
            self.input_layernorm = torch.nn.LayerNorm(2)
            self.normal_proj = torch.nn.Linear(2, 2, bias=False)

    assert sorted(BaseOptimizerFactory.get_decay_parameter_names(Block())) == ["normal_proj.weight", "proj.weight"]
