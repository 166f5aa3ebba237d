"""Keys that change what is learnt, or how it is attended to, from a YAML file: they take effect, and a resumed run goes on exactly."""

from __future__ import annotations

import json
import random

import pytest
import yaml

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.exceptions import ConfigError
from axolotl.train import train
from tests.integration.training_runs import steps_of
from tests.tiny import make_tiny_base

LORA = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True}
EAFT = {"use_eaft": True, "eaft_alpha": 2.0, "eaft_k": 5}
SSMAX = {"scaling_softmax": True, "attn_implementation": "flex_attention", "scaling_softmax_bias": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_tiny_base(folder / "base")
    rng = random.Random(0)
    rows = [
        {"instruction": f"add {rng.randint(0, 50)}", "input": "", "output": "x" * rng.randint(1, 9)} for _ in range(16)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(base, out, **keys):
    config = {
        "base_model": str(base / "base"),
        "datasets": [{"path": str(base / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(base / "prepared"),
        "output_dir": str(out),
        "val_set_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "sequence_len": 128,
        "micro_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.003,
        "optimizer": "adamw_torch",
        "bf16": False,
        "logging_steps": 1,
        "save_steps": 2,
        **keys,
    }
    path = base / "config.yml"
    path.write_text(yaml.safe_dump(config))
    cfg = load_cfg(path)
    return train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))[2]


@pytest.mark.parametrize(
    "keys",
    [
        {**EAFT, "sample_packing": True},
        {**EAFT, **LORA, "chunked_cross_entropy": True, "gradient_checkpointing": True},
        {**SSMAX, "sample_packing": True, "flex_attn_compile_kwargs": {"dynamic": False}},
        {**SSMAX, **LORA, "gradient_checkpointing": True},
        {**SSMAX, **EAFT},
    ],
    ids=["entropy, packed", "entropy, chunked", "scaled softmax, packed", "scaled softmax, lora", "both"],
)
def test_it_takes_effect_and_resumes_exactly(keys, base, tmp_path):
    whole = run(base, tmp_path / "out", **keys)
    steps = steps_of(whole)
    resumed = run(base, tmp_path / "out", **keys, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert steps_of(resumed) == steps
    off = {key: value for key, value in keys.items() if key not in EAFT and "scaling_softmax" not in key}
    assert steps_of(run(base, tmp_path / "off", **off))[0] != pytest.approx(steps[0], rel=1e-3)


def test_entropy_weighs_what_is_learnt_and_not_what_is_measured(base, tmp_path):
    plain, weighed = (
        run(base, tmp_path / str(on), learning_rate=1e-30, **(EAFT if on else {})) for on in (False, True)
    )
    assert 0 < steps_of(weighed)[0][0] < 0.99 * steps_of(plain)[0][0]
    losses = [next(e["eval_loss"] for e in t.state.log_history if "eval_loss" in e) for t in (plain, weighed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({**EAFT, "eaft_k": 1}, "eaft_k"),
        ({**EAFT, "reward_model": True}, "brings its own"),
        ({"scaling_softmax": True, "attn_implementation": "sdpa"}, "requires flex attention"),
    ],
)
def test_what_cannot_be_is_said(keys, said, base, tmp_path):
    with pytest.raises(ConfigError, match=said):
        run(base, tmp_path / "out", **keys)
