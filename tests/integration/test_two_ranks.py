"""What changes weights beside the optimizer, or where they lie, on two processes: the ranks stay equal, and train what one process trains."""

from __future__ import annotations

import json
import random
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import train
from tests.integration.training_runs import run_on_ranks, weights_of
from tests.tiny import make_tiny_base

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]}
RELORA = {
    **LORA,
    "relora": True,
    "jagged_restart_steps": 2,
    "jagged_restart_warmup_steps": 1,
    "max_steps": 5,
}
DROPOUT = {"lora_dropout": 0.1}  # lets the random numbers of the ranks run apart
LISA = {"lisa_n_layers": 2, "lisa_step_interval": 2, "max_steps": 5, "learning_rate": 0.005}
NOISE = {"neftune_noise_alpha": 5, "max_steps": 4}
JOINED = {"torch_compile": True, "torch_compile_backend": "aot_eager", "learning_rate": 0.002, "max_steps": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model and rows."""
    folder = tmp_path_factory.mktemp("base")
    make_tiny_base(folder / "model", num_hidden_layers=4)
    rng = random.Random(0)
    numbers = [(rng.randint(0, 50), rng.randint(0, 50)) for _ in range(24)]
    rows = [{"instruction": f"add {a} and {b}", "input": "", "output": f"{a + b}"} for a, b in numbers]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def run(base: Path, out: Path, config: Path, **keys: Any) -> dict[str, Any]:
    """Train; the losses of the run, and what the weights of each rank come to."""
    torch.set_num_threads(1)
    written = {
        "base_model": str(base / "model"),
        "datasets": [{"path": str(base / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(base / "prepared"),
        "output_dir": str(out),
        "val_set_size": 0,
        "sequence_len": 128,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 9,
        **keys,
    }
    config.write_text(yaml.safe_dump(written))
    cfg = load_cfg(config)
    _, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    weights = zlib.crc32(b"".join(value.numpy().tobytes() for value in weights_of(trainer).values()))
    of_ranks = [weights]
    if dist.is_initialized():
        of_ranks = [0] * dist.get_world_size()
        dist.all_gather_object(of_ranks, weights)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "weights": of_ranks}


def on_a_rank(folder: Path, base: Path, keys: dict[str, Any]) -> list[dict[str, Any]]:
    """A run on this rank, and the same gone on with after its second step."""
    out, config = folder.parent / "out", folder / "config.yml"
    whole = run(base, out, config, micro_batch_size=1, **keys)
    checkpoint = str(out / "checkpoint-2")
    resumed = run(
        base, folder.parent / "resumed", config, micro_batch_size=1, **keys, resume_from_checkpoint=checkpoint
    )
    return [whole, resumed]


@pytest.mark.parametrize(
    "keys",
    [RELORA, {**RELORA, **DROPOUT}, LISA, {**NOISE, **LORA}, JOINED],
    ids=["relora", "relora, dropout", "lisa", "noise", "joined projections"],
)
def test_ranks_stay_equal_and_resume(base, tmp_path, keys):
    whole, resumed = run_on_ranks(partial(on_a_rank, base=base, keys=keys), tmp_path / "ranks")
    first, second = whole["weights"]
    assert first == second
    assert resumed == whole
    if not {"neftune_noise_alpha", "lora_dropout"} & set(keys):  # what is drawn follows from the rows of a rank
        alone = run(base, tmp_path / "alone", tmp_path / "config.yml", micro_batch_size=2, **keys)
        assert alone["losses"] == pytest.approx(whole["losses"], abs=1e-5)
