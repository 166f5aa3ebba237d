"""Runs that report to SwanLab without a network, and what is said before one that cannot."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from axolotl.exceptions import MissingExtraError, TrackerError
from axolotl.integrations.swanlab.plugin import SwanLabPlugin
from axolotl.utils.callbacks.swanlab_ import SwanLabReportCallback, check_login, read_init_arguments
from axolotl.utils.callbacks.trackers import check_trackers, guard_trackers
from axolotl.utils.dict import DictDefault
from tests.integration.training_runs import make_trainer


def config(**keys) -> DictDefault:
    return DictDefault({"use_swanlab": True, "swanlab_project": "tests", "swanlab_log_completions": True, **keys})


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"axolotl\[swanlab\]"):
        check_trackers(config())


def test_what_the_keys_become():
    keys = {
        "swanlab_experiment_name": "n",
        "swanlab_description": "d",
        "swanlab_mode": "offline",
        "swanlab_workspace": "w",
    }
    assert read_init_arguments(config(**keys)) == {
        "project": "tests",
        "name": "n",
        "description": "d",
        "mode": "offline",
        "workspace": "w",
    }
    assert read_init_arguments(config()) == {"project": "tests"}


def test_switched_off_there_is_no_callback():
    assert SwanLabPlugin().add_callbacks_pre_trainer(DictDefault({"use_swanlab": False}), None) == []


def test_answers_wait_for_their_interval_and_the_oldest_are_dropped(tmp_path):
    callback = SwanLabReportCallback(config(swanlab_completion_max_buffer=3), str(tmp_path / "c.yaml"))
    trainer = SimpleNamespace(
        is_world_process_zero=lambda: True,
        callback_handler=SimpleNamespace(callbacks=[callback]),
        state=SimpleNamespace(global_step=5),
    )
    rewards = torch.tensor([[1.0, 0.5], [float("nan"), 2.0]])
    for word in "ab":
        prompts = [[{"role": "user", "content": word}]] * 2
        SwanLabPlugin().on_rollouts_scored(config(), trainer, prompts, ["x", "y"], rewards)
    assert [text for text, _ in callback.answers] == [
        "user: a\n\n---\n\ny",
        "user: b\n\n---\n\nx",
        "user: b\n\n---\n\ny",
    ]
    assert [caption for _, caption in callback.answers] == [
        "step 5, reward 2",
        "step 5, reward 1.5",
        "step 5, reward 2",
    ]
    SwanLabPlugin().on_rollouts_scored(config(swanlab_log_completions=False), trainer, ["p"], ["z"], [1.0])
    assert len(callback.answers) == 3


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def at_home(self, monkeypatch, tmp_path):
        pytest.importorskip("swanlab", reason="swanlab is not installed")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
        monkeypatch.setenv("SWANLAB_LOG_DIR", str(tmp_path / "log"))
        monkeypatch.chdir(tmp_path)

    def test_a_login_is_asked_for_before_the_run(self, monkeypatch):
        with pytest.raises(TrackerError, match="swanlab login"):
            check_login(config())
        check_login(config(swanlab_mode="offline"))
        check_login(config(swanlab_mode="disabled"))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(TrackerError, match="dashboard"):
            check_login(config(swanlab_mode="local"))
        monkeypatch.setenv("SWANLAB_API_HOST", "")
        monkeypatch.setenv("SWANLAB_API_KEY", "")
        check_login(config(swanlab_api_key="k" * 21))

    @pytest.mark.parametrize("outcome", ["finished", "interrupted", "failed"])
    def test_a_run_that_stays_here(self, tmp_path, outcome):
        import swanlab

        saved = tmp_path / "axolotl_config.yaml"
        saved.write_text(yaml.safe_dump({"base_model": "tiny"}))
        cfg = config(swanlab_mode="offline", swanlab_experiment_name="one", swanlab_completion_log_interval=2)
        callback = SwanLabReportCallback(cfg, str(saved))
        trainer = make_trainer(tmp_path, max_steps=2, callbacks=[callback])
        (guard,) = guard_trackers(cfg, trainer.callback_handler.callbacks)
        callback.take_answers(["the question"], ["the answer"], torch.tensor([1.0]), 0)
        trainer.train()
        assert swanlab.has_run()
        guard.end_run(outcome)
        assert not swanlab.has_run()
        assert not guard.num_failures
        kept = b"".join(path.read_bytes() for path in (tmp_path / "log").rglob("*") if path.is_file())
        for word in (b"train/loss", b"tiny", b"the answer", b"learning_rate"):
            assert word in kept
