"""Trainer classes of users and plugins: what the config says holds for them too, or the run says that it does not."""

from __future__ import annotations

import json

import pytest
import yaml
from torch.utils.data import DataLoader
from transformers import Trainer

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.core.trainers.adopted import adopt_trainer_cls
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.trainers.mixins.packing import PackingMixin
from axolotl.core.trainers.mixins.scheduler import SchedulerMixin
from axolotl.exceptions import ConfigError
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.train import train
from tests.tiny import make_tiny_base


class PlainTrainer(Trainer):
    """A trainer of somebody who knows nothing of this package."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_losses = 0

    def compute_loss(self, *args, **kwargs):
        self.num_losses += 1
        return super().compute_loss(*args, **kwargs)


class PlainPlugin(BasePlugin):
    def get_trainer_cls(self, cfg):
        return PlainTrainer


class OwnBatches(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, 2, collate_fn=self.data_collator)


class OwnMean(Trainer):
    """The mean over a micro-batch as loss, as transformers documents it: the trainer divides by the accumulation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class PassesOursBy(Trainer):
    def __init__(self, *args, **kwargs):
        Trainer.__init__(self, *args, **kwargs)


class Kind(type(Trainer)):
    def __call__(cls, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class OfAKind(Trainer, metaclass=Kind):
    """A trainer class with a metaclass."""


class Tangled(SchedulerMixin, PackingMixin):
    """Two bases that `AxolotlTrainer` has in the other order."""


@pytest.fixture
def run(tmp_path):
    """A function that trains two steps on packed rows, with more keys of the config."""
    make_tiny_base(tmp_path / "base")
    rows = [{"instruction": f"repeat {n}", "input": "", "output": f"{n} " * (n % 7 + 1)} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def run(**keys):
        config = {
            "base_model": str(tmp_path / "base"),
            "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "alpaca"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "val_set_size": 0.2,
            "sequence_len": 256,
            "sample_packing": True,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "num_epochs": 3,
            "learning_rate": 0.01,
            "optimizer": "adamw_torch",
            "bf16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            **keys,
        }
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(config))
        cfg = load_cfg(path)
        return cfg, train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))[2]

    plugins = dict(PluginManager.get_instance().plugins)
    yield run
    PluginManager.get_instance().plugins.clear()
    PluginManager.get_instance().plugins.update(plugins)


def figures_of(trainer):
    history = trainer.state.log_history
    steps = [(entry["loss"], entry["learning_rate"]) for entry in history if "loss" in entry]
    return steps, [entry["eval_loss"] for entry in history if "eval_loss" in entry]


@pytest.mark.parametrize(
    "named",
    [{"trainer_cls": f"{__name__}.PlainTrainer"}, {"plugins": [f"{__name__}.PlainPlugin"]}],
    ids=["trainer_cls", "plugin"],
)
def test_a_plain_trainer_class_trains_as_the_config_says(run, named):
    keys = {
        "eval_sample_packing": False,
        "eval_steps": 2,
        "lr_scheduler": "rex",
        "embedding_lr": 0.5,
    }
    _, ours = run(**keys)
    cfg, theirs = run(**keys, **named)
    assert figures_of(theirs) == figures_of(ours)
    assert isinstance(theirs, PlainTrainer)
    assert theirs.num_losses >= 6
    assert "trainer class" in [choice["key"] for choice in cfg.resolution]


def test_a_trainer_class_that_makes_its_own_batches_is_told_that_they_are_not_packed(run, caplog):
    run(trainer_cls=f"{__name__}.OwnBatches")
    assert (
        f"`sample_packing: true`: `{__name__}.OwnBatches` makes its own batches in `get_train_dataloader`"
        in caplog.text
    )
    assert "get_eval_dataloader" not in caplog.text


def test_a_loss_that_is_a_mean_is_divided_by_the_accumulation(run):
    cfg, trainer = run(trainer_cls=f"{__name__}.OwnMean", max_steps=1)
    assert f"{__name__}.OwnMean.compute_loss" in [
        choice["value"] for choice in cfg.resolution if choice["key"] == "loss"
    ]
    loss, evaluated = figures_of(trainer)[0][0][0], figures_of(trainer)[1][0]
    assert loss == pytest.approx(evaluated, rel=0.2)


def test_a_trainer_class_that_passes_ours_by_is_named(run):
    with pytest.raises(ConfigError, match=r"PassesOursBy.__init__` sets up `Trainer` only.*`super\(\).__init__"):
        run(trainer_cls=f"{__name__}.PassesOursBy")


def test_a_class_is_adopted_once_and_keeps_its_name():
    adopted = adopt_trainer_cls(PlainTrainer)
    assert (adopted.__name__, adopted.__module__) == ("PlainTrainer", __name__)
    assert adopted.__mro__.index(PlainTrainer) < adopted.__mro__.index(AxolotlTrainer)
    assert adopt_trainer_cls(adopted) is adopted
    assert adopt_trainer_cls(Trainer) is AxolotlTrainer
    assert isinstance(adopt_trainer_cls(OfAKind), Kind)


def test_a_class_that_cannot_stand_on_ours_is_named():
    with pytest.raises(ConfigError, match=rf"`{__name__}.Tangled` cannot be combined with ours.*AxolotlTrainer"):
        adopt_trainer_cls(Tangled)
