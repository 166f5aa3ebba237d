"""What TRL and unsloth have in common: the rows and settings of a benchmark's YAML for TRL's `SFTTrainer`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_dataset
from step_clock import StepClock, tokens_by_step
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer


def read_config() -> dict[str, Any]:
    """The YAML named on the command line."""
    return yaml.safe_load(Path(sys.argv[1]).read_text())


def read_rows(cfg: dict[str, Any]) -> Dataset:
    """Token ids, and which of them are trained on, in the one form that all releases of TRL and unsloth pack as it should be.

    With `labels` older releases of TRL train on every token, and unsloth takes another collator, which drops where documents end.
    """
    rows = load_dataset("json", data_files=cfg["datasets"][0]["path"], split="train")
    rows = rows.map(lambda row: {"completion_mask": [int(label != -100) for label in row["labels"]]})
    return rows.select_columns(["input_ids", "completion_mask"])


class InOrder(SFTTrainer):
    """Reads rows in the order of the file."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def train(
    model: Any, tokenizer: PreTrainedTokenizerBase, cfg: dict[str, Any], *, peft_config: Any = None, **settings: Any
) -> None:
    """Train `model` on the rows. `settings` are further ones of `SFTConfig`."""
    has_gpu = torch.cuda.is_available()
    args = SFTConfig(
        output_dir=cfg["output_dir"],
        max_length=cfg["sequence_len"],
        packing=bool(cfg.get("sample_packing")),
        completion_only_loss=True,
        per_device_train_batch_size=cfg["micro_batch_size"],
        gradient_accumulation_steps=cfg["gradient_accumulation_steps"],
        max_steps=cfg["max_steps"],
        learning_rate=cfg["learning_rate"],
        lr_scheduler_type=cfg["lr_scheduler"],
        warmup_steps=cfg["warmup_steps"],
        weight_decay=cfg["weight_decay"],
        optim=cfg["optimizer"],
        bf16=has_gpu,
        use_cpu=not has_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=cfg["seed"],
        **settings,
    )
    trainer = InOrder(
        model=model, args=args, train_dataset=read_rows(cfg), processing_class=tokenizer, peft_config=peft_config
    )
    if trainer.args.packing != bool(cfg.get("sample_packing")):
        raise SystemExit("The trainer turned packing off, so it would train on other batches. Its reason is above.")
    # unsloth logs no count of tokens, and where rows are packed only the trainer knows them.
    lengths = (len(row["input_ids"]) for row in trainer.train_dataset)  # pyright: ignore
    rows_per_step = cfg["micro_batch_size"] * cfg["gradient_accumulation_steps"]
    trainer.add_callback(StepClock(tokens_by_step(lengths, rows_per_step, cfg["max_steps"])))
    trainer.train()
