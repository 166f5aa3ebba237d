"""Configs with the plugins of the loss run without any package, and say which loss it is."""

from __future__ import annotations

import json

import pytest
import yaml

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.cut_cross_entropy.plugin import CutCrossEntropyPlugin
from axolotl.integrations.liger.plugin import LigerPlugin
from axolotl.train import train
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_tiny_base(folder / "model")
    rows = [{"instruction": f"add {i}", "input": "", "output": f"{i}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


CUT = {"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]}
LIGER = {"plugins": ["liger.LigerPlugin"], "liger_fused_linear_cross_entropy": True, "liger_rms_norm": True}
HEAD = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "lm_head"]}


@pytest.mark.parametrize(
    ("keys", "key", "loss"),
    [
        (CUT, "cut_cross_entropy", "fused linear cross-entropy"),
        (CUT | HEAD, "cut_cross_entropy", "cross-entropy of full logits"),
        (LIGER, "liger_fused_linear_cross_entropy", "fused linear cross-entropy"),
    ],
)
def test_a_run(base, tmp_path, keys, key, loss):
    cfg = {
        "base_model": str(base / "model"),
        "datasets": [{"path": str(base / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(base / "prepared"),
        "output_dir": str(tmp_path / "out"),
        "sequence_len": 128,
        "micro_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "save_strategy": "no",
        **keys,
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(cfg))
    cfg = load_cfg(tmp_path / "config.yml")
    assert cfg[key]
    train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    noted = {entry["key"]: entry["value"] for entry in cfg.resolution}
    assert noted[key] == loss


def test_a_loss_of_another_trainer_is_named():
    cfg = DictDefault({"cut_cross_entropy": True, "liger_cross_entropy": True, "rl": "dpo"})
    for plugin in (CutCrossEntropyPlugin(), LigerPlugin()):
        plugin.post_model_load(cfg, None)
    assert {entry["key"]: entry["value"] for entry in cfg.resolution} == {
        "cut_cross_entropy": False,
        "liger_cross_entropy": False,
    }
