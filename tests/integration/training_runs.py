"""Trainers on tiny models and random rows, for the tests of this folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.utils.collators.batching import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq
from tests.tiny import make_tiny_model, make_tiny_tokenizer


def make_rows(num_rows: int = 32, seed: int = 0, vocab_size: int = 384, max_length: int = 40) -> Dataset:
    """Rows of different lengths, a random share of each masked; some train on their first token."""
    rng, rows = random.Random(seed), []
    for _ in range(num_rows):
        length = rng.randint(5, max_length)
        ids = [rng.randrange(5, vocab_size) for _ in range(length)]
        masked = rng.choice([0, rng.randint(0, length - 2)])
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * masked + ids[masked:],
                "attention_mask": [1] * length,
                "position_ids": list(range(length)),
                "length": length,
            }
        )
    return Dataset.from_list(rows)


def make_trainer(
    folder: Path,
    *,
    packed: bool = False,
    model: Any = None,
    architecture: str = "llama",
    model_config: dict[str, Any] | None = None,
    rows: Dataset | None = None,
    lora: dict[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    **args: Any,
) -> AxolotlTrainer:
    """An `AxolotlTrainer`, seeded like `train` seeds it: before the model and its adapter are made."""
    set_seed(42)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer")
    if model is None:
        model = make_tiny_model(folder / "model", architecture, **(model_config or {}))
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **lora))
    rows = make_rows() if rows is None else rows
    training_args = AxolotlTrainingArguments(
        **{
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "logging_steps": 1,
            "report_to": "none",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "optim": "adamw_torch",
            "sample_packing": packed,
            "multipack_real_batches": True,
            "max_seq_length": 64,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            **args,
        }
    )
    if packed:
        # Without a mask, transformers builds one from position ids that restart at each document.
        collator = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, drop_attention_mask=True)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer)
    return AxolotlTrainer(
        model=model,
        args=training_args,
        train_dataset=rows if packed else rows.remove_columns("position_ids"),
        eval_dataset=rows.select(range(min(7, len(rows)))),
        data_collator=collator,
        eval_data_collator=collator,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def steps_of(trainer: AxolotlTrainer) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every logged step."""
    return [(entry["loss"], float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer: AxolotlTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
