from __future__ import annotations

import os

import pytest

from axolotl.cli.utils.tracking import prepare_tracking
from axolotl.utils.dict import DictDefault


@pytest.fixture(autouse=True)
def _own_environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_project_switches_its_tracker_on():
    os.environ["WANDB_DISABLED"] = "true"
    cfg = DictDefault(wandb_project="p", wandb_name=None, comet_experiment_config={"tags": ["a"]}, comet_mode="create")
    prepare_tracking(cfg)
    assert cfg.use_wandb is True
    assert cfg.use_mlflow is None
    assert os.environ["WANDB_PROJECT"] == "p"
    assert os.environ["COMET_START_MODE"] == "create"
    assert os.environ["COMET_START_EXPERIMENT_TAGS"] == '["a"]'
    assert "WANDB_DISABLED" not in os.environ


def test_an_explicit_switch_wins_and_nothing_is_sent_unasked():
    cfg = DictDefault(wandb_project="p", use_wandb=False)
    prepare_tracking(cfg)
    assert cfg.use_wandb is False
    assert os.environ["WANDB_DISABLED"] == "true"


@pytest.mark.parametrize(
    "value, variable",
    [(True, "gradients"), ("true", "gradients"), ("All", "all"), ("parameters", "parameters"), ("x", "false")],
)
def test_wandb_watches_what_the_key_says(value, variable):
    prepare_tracking(DictDefault(wandb_project="p", wandb_watch=value))
    assert os.environ["WANDB_WATCH"] == variable


def test_a_run_id_continues_the_run_unless_the_environment_says_otherwise():
    prepare_tracking(DictDefault(wandb_project="p", wandb_run_id="r"))
    assert os.environ["WANDB_RESUME"] == "allow"
    os.environ["WANDB_RESUME"] = "must"
    prepare_tracking(DictDefault(wandb_project="p", wandb_run_id="r"))
    assert os.environ["WANDB_RESUME"] == "must"


@pytest.mark.parametrize(
    ("uri", "is_folder"), [("./mlruns", True), ("file:///x", True), ("sqlite:///m.db", False), ("databricks", False)]
)
def test_a_folder_is_consent_to_keep_runs_in_it(uri, is_folder):
    os.environ.pop("MLFLOW_ALLOW_FILE_STORE", None)
    prepare_tracking(DictDefault(mlflow_experiment_name="e", mlflow_tracking_uri=uri))
    assert ("MLFLOW_ALLOW_FILE_STORE" in os.environ) == is_folder
