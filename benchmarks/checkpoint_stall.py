"""How long training stands still for a checkpoint: when it waits for the disk, and when only for a copy in host memory.

    python benchmarks/checkpoint_stall.py --shape 8b --folder /fast/disk      # full fine-tuning, bf16 weights and states
    python benchmarks/checkpoint_stall.py --shape 8b --lora                   # an adapter of rank 16
    python benchmarks/checkpoint_stall.py --shape tiny                        # on any machine

Random weights of the real shapes, short random rows, fused AdamW. Each way of saving trains the same steps and saves a few times;
the first save of a background writer may wait for host memory to be pinned, so it is listed apart. `stall_seconds` is what the
step loop spends in the save, `write_seconds` the time until the checkpoint is whole, `step_seconds` the median step without a
save. Needs disk space for two checkpoints in `--folder` and host memory for one. Writes
`benchmarks/results/<device>-checkpoint-<shape>-<full|lora>.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, HERE, SHAPES, device_slug, record_head, synchronize
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.trainers.mixins import checkpoints
from axolotl.core.training_args import AxolotlTrainingArguments


class Clock(TrainerCallback):
    """Seconds of each step, and of each save as the step loop sees it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.steps.append(time.perf_counter() - self._began)


def make_model(shape: str, lora: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return model


def measure(args: argparse.Namespace, in_background: bool) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-stall-", dir=args.folder))
    rng = random.Random(0)
    vocab = SHAPES[args.shape]["vocab_size"]
    ids = [[rng.randrange(vocab) for _ in range(args.length)] for _ in range(32)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    writes: list[float] = []
    finish = checkpoints.CheckpointSaveMixin._finish

    def timed_finish(*finish_args: Any) -> None:
        began = time.perf_counter()
        finish(*finish_args)
        writes.append(time.perf_counter() - began)

    clock = Clock()
    trainer = AxolotlTrainer(
        model=make_model(args.shape, args.lora),
        args=AxolotlTrainingArguments(
            output_dir=str(folder),
            max_steps=args.saves * args.every,
            save_strategy="steps",
            save_steps=args.every,
            save_total_limit=1,
            per_device_train_batch_size=1,
            gradient_checkpointing=True,
            optim="adamw_torch_fused" if DEVICE == "cuda" else "adamw_torch",
            bf16=DEVICE == "cuda",
            report_to="none",
            logging_steps=args.every,
            disable_tqdm=True,
            async_save=in_background,
        ),
        train_dataset=rows,
        data_collator=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")},
        callbacks=[clock],
    )
    stalls: list[float] = []
    save = trainer._save_checkpoint

    def timed_save(*save_args: Any, **kwargs: Any) -> None:
        synchronize()  # what is still running is the step's own work, not the save's
        began = time.perf_counter()
        save(*save_args, **kwargs)
        stalls.append(time.perf_counter() - began)

    trainer._save_checkpoint = timed_save
    reason = trainer.why_saves_wait()
    if in_background and reason is not None:
        raise SystemExit(f"The checkpoint cannot be saved in the background: {reason}.")
    checkpoints.CheckpointSaveMixin._finish = timed_finish
    try:
        trainer.train()
        (last,) = folder.glob("checkpoint-*")
        size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    finally:
        checkpoints.CheckpointSaveMixin._finish = finish
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "checkpoint_gib": round(size / 2**30, 3),
        "first_stall_seconds": round(stalls[0], 4),
        "stall_seconds": [round(seconds, 4) for seconds in stalls[1:]],
        "write_seconds": [round(seconds, 4) for seconds in writes],
        "step_seconds": round(statistics.median(clock.steps), 4),
    }
    del trainer
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--lora", action="store_true", help="an adapter instead of all weights")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the checkpoints go")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--every", type=int, default=10, help="steps between saves")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    result = {
        **record_head(),
        "shape": args.shape,
        "trained": "adapter" if args.lora else "all weights",
        "waiting": measure(args, in_background=False),
        "background": measure(args, in_background=True),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    kind = "lora" if args.lora else "full"
    (args.out / f"{device_slug()}-checkpoint-{args.shape}-{kind}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
