"""What has changed since a checkpoint was saved."""

from __future__ import annotations

import json

import yaml

from axolotl.core.checkpoint import RUN_STATE, SAVED_CONFIG
from axolotl.core.resume import changes_since

CONFIG = {
    "learning_rate": 0.01,
    "datasets": [{"path": "a.jsonl", "type": "alpaca"}],
    "output_dir": "a",
    "wandb_project": "x",
    "lora_r": 8,
}


def write(folder, config=CONFIG, world_size=2):
    (folder / SAVED_CONFIG).write_text(yaml.safe_dump(config))
    (folder / RUN_STATE).write_text(json.dumps({"world_size": world_size}))


def test_the_same_config_says_nothing(tmp_path):
    write(tmp_path)
    same = {**CONFIG, "output_dir": "b", "wandb_project": "y", "save_steps": 7}
    assert changes_since(tmp_path, yaml.safe_dump(same), 2) == []


def test_each_change_is_named(tmp_path):
    write(tmp_path)
    now = {**CONFIG, "learning_rate": 0.02, "datasets": [{"path": "b.jsonl", "type": "alpaca"}], "lora_r": None}
    world, dataset, rate, rank = changes_since(tmp_path, yaml.safe_dump(now), 1)
    assert world.startswith("it was saved by 2 processes, this run has 1")
    assert dataset == "`datasets[0].path` was a.jsonl and is b.jsonl"
    assert rate.startswith("`learning_rate` was 0.01 and is 0.02, but the optimizer")
    assert rank == "`lora_r` was 8 and is not set"


def test_a_checkpoint_of_another_program_says_nothing(tmp_path):
    assert changes_since(tmp_path, yaml.safe_dump(CONFIG), 1) == []
