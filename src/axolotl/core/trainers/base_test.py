"""Who owns which method, stored metrics, tags."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.trainers.causal_loss import perplexity
from axolotl.core.trainers.utils import sanitize_kwargs_for_tagging
from axolotl.utils.garbage import give_back
from axolotl.utils.processes import init_worker
from tests.integration.training_runs import make_trainer


def overridden(cls: type) -> set[str]:
    """Methods of Trainer that a class defines anew."""
    return {
        name for name in vars(cls) if name in dir(Trainer) and callable(vars(cls)[name]) and not name.startswith("__")
    }


def test_every_overridden_method_has_one_owner_and_stands_in_the_table():
    owners: dict[str, str] = {}
    for cls in AxolotlTrainer.__mro__[: AxolotlTrainer.__mro__.index(Trainer)]:
        names = overridden(cls)
        assert names == set(AxolotlTrainer.OWNERS.get(cls.__name__, ())), cls.__name__
        for name in names:
            assert name not in owners, f"{name} is owned by {owners[name]} and {cls.__name__}"
            owners[name] = cls.__name__
    assert set(AxolotlTrainer.OWNERS) == set(owners.values())


def test_stored_metrics_are_reduced_and_logged_once(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.store_metrics({"a": 1.0, "b": torch.tensor(4.0)})
    trainer.store_metrics({"a": 3.0, "b": 2.0}, reduction="max")
    trainer.store_metrics({"c": (5, "sum")})
    trainer.store_metrics({"c": (6, "sum")})
    trainer.store_metrics({"d": 1.0}, train_eval="eval")
    trainer.log({"loss": 1.0})
    entry = trainer.state.log_history[-1]
    # The first reduction that a name was stored with stays.
    assert (entry["a"], entry["b"], entry["c"]) == (2.0, 3.0, 11)
    assert "d" not in entry
    trainer.log({"loss": 1.0})
    assert "a" not in trainer.state.log_history[-1]
    trainer.log({"eval_loss": 2.0})
    assert trainer.state.log_history[-1]["d"] == 1.0
    assert trainer.state.log_history[-1]["eval_ppl"] == pytest.approx(math.exp(2.0))


def test_an_unknown_reduction_is_named(tmp_path):
    with pytest.raises(ValueError, match="'median'"):
        make_trainer(tmp_path).store_metrics({"a": 1.0}, reduction="median")


def test_tags_are_added_to_the_given_ones():
    assert sanitize_kwargs_for_tagging(("axolotl",), ["d"], {"tags": "mine"}) == {
        "tags": ["mine", "axolotl"],
        "dataset_tags": ["d"],
    }
    assert sanitize_kwargs_for_tagging("axolotl", None, {"tags": ["axolotl"]}) == {"tags": ["axolotl"]}


def test_perplexity_of_a_huge_loss_is_infinite():
    assert perplexity(1e9) == math.inf


def test_workers_of_its_loaders_end_with_the_trainer(tmp_path):
    trainer = make_trainer(tmp_path, dataloader_num_workers=1)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert loader.worker_init_fn.func is init_worker


def test_flos_are_those_of_transformers(tmp_path):
    trainer = make_trainer(tmp_path)
    for shape in ((2, 7), (1, 16)):
        batch = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
        assert trainer.floating_point_ops(batch) == Trainer.floating_point_ops(trainer, batch) > 0
    assert trainer.floating_point_ops({"labels": torch.zeros(1)}) == 0


def test_models_are_not_given_masks_that_mask_nothing(tmp_path):
    ids = torch.arange(3, 27).reshape(2, 12)
    full = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    padded = {**full, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    padded["attention_mask"][1, 8:] = 0
    padded["labels"][1, 8:] = -100
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2)
    with_mask = trainer.compute_loss(trainer.model, full, num_items_in_batch=100).item()
    seen = []
    trainer.model.register_forward_pre_hook(lambda *call: seen.append(call[2].get("attention_mask")), with_kwargs=True)
    batches, _ = trainer.get_batch_samples(iter([full, padded]), 2, torch.device("cpu"))
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=100).item() for batch in batches]
    assert seen[0] is None and seen[1] is padded["attention_mask"]
    assert losses[0] == pytest.approx(with_mask)


def test_training_does_not_search_what_was_there_before_for_garbage(tmp_path):
    class Watch(TrainerCallback):
        frozen = 0

        def on_step_end(self, *args, **kwargs):
            self.frozen = gc.get_freeze_count()

    watch = Watch()
    give_back()  # a program that imports the package has nothing set aside, as these tests have
    make_trainer(tmp_path, max_steps=1, callbacks=[watch]).train()
    assert watch.frozen > 10_000 and gc.get_freeze_count() == 0


def test_an_optimizer_is_the_same_when_it_is_made_again(tmp_path):
    pytest.importorskip("galore_torch")
    trainer = make_trainer(
        tmp_path, optim="galore_adamw", optim_target_modules=["mlp"], optim_args="rank=4", max_steps=1
    )

    def groups():
        trainer.optimizer = None
        made = trainer.create_optimizer()
        return [(len(group["params"]), group.get("rank")) for group in made.param_groups]

    first = groups()
    assert (4 in [rank for _, rank in first]) and groups() == first
