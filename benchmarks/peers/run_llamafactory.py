"""LLaMA-Factory on the workload of a benchmark's YAML: `python run_llamafactory.py config.yml`.

The rows reach it as a tokenized dataset (`tokenized_path`), and packed ones as its `neat_packing` makes them: documents numbered in
the attention mask, positions that begin again, padding at the end. What `llamafactory-cli train` calls is called here, as only it
takes a callback. LoRA, QLoRA, all weights and packed rows have run on a CPU with LLaMA-Factory 0.9.5; what it uses only on a GPU
(bf16, flash-attn, Liger) has not been tried.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, DatasetDict, Features, Sequence, Value
from step_clock import StepClock, installed_versions, tokens_by_step

COLUMNS = ("input_ids", "attention_mask", "labels")
MULTIPLE = 8  # of a batch's length, in its collator, which pads all columns but the positions
Rows = list[dict[str, list[int]]]


def pack(documents: Rows, length: int) -> Iterator[dict[str, list[int]]]:
    """Rows of up to `length` tokens, first fit of the longest first.

    They are padded to one length, which leaves the collator nothing to pad. It is longer than `length`, as its own packed rows
    are: without padding in a row flash-attn would lose its mask.
    """
    padded = (length // MULTIPLE + 1) * MULTIPLE
    bins: list[tuple[int, list[dict[str, list[int]]]]] = []
    open_from = 0  # bins before it have no room for the shortest document
    shortest = min(len(document["input_ids"]) for document in documents)
    for document in sorted(documents, key=lambda document: -len(document["input_ids"])):
        size = len(document["input_ids"])
        place = next((i for i in range(open_from, len(bins)) if bins[i][0] >= size), None)
        if place is None:
            place = len(bins)
            bins.append((length, []))
        room, content = bins[place]
        bins[place] = (room - size, [*content, document])
        while open_from < len(bins) and bins[open_from][0] < shortest:
            open_from += 1
    for _, content in bins:
        row: dict[str, list[int]] = {name: [] for name in (*COLUMNS, "position_ids")}
        for number, document in enumerate(content, start=1):
            size = len(document["input_ids"])
            row["input_ids"] += document["input_ids"]
            row["labels"] += document["labels"]
            row["attention_mask"] += [number] * size
            row["position_ids"] += range(size)
        for name, values in row.items():
            values += [-100 if name == "labels" else 0] * (padded - len(values))
        yield row


def save_rows(cfg: dict[str, Any], folder: Path) -> Rows:
    """Write the rows for `tokenized_path`, and return them in the order that they are read."""
    rows = [json.loads(line) for line in Path(cfg["datasets"][0]["path"]).read_text().splitlines()]
    if cfg.get("sample_packing"):
        rows = list(pack(rows, cfg["sequence_len"]))
    features = Features({name: Sequence(Value("int32")) for name in rows[0]})
    DatasetDict({"train": Dataset.from_list(rows, features=features)}).save_to_disk(folder)
    return rows


def translated(cfg: dict[str, Any], tokenized: Path) -> dict[str, Any]:
    """The YAML in LLaMA-Factory's keys."""
    has_gpu = torch.cuda.is_available()
    keys: dict[str, Any] = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": cfg["base_model"],
        "template": "empty",
        "dataset": "rows",  # must be there; what is trained on is `tokenized_path`
        "tokenized_path": str(tokenized),
        "cutoff_len": cfg["sequence_len"],
        "packing": bool(cfg.get("sample_packing")),
        "neat_packing": bool(cfg.get("sample_packing")),
        "output_dir": cfg["output_dir"],
        "per_device_train_batch_size": cfg["micro_batch_size"],
        "gradient_accumulation_steps": cfg["gradient_accumulation_steps"],
        "max_steps": cfg["max_steps"],
        "learning_rate": cfg["learning_rate"],
        "lr_scheduler_type": cfg["lr_scheduler"],
        "warmup_steps": cfg["warmup_steps"],
        "weight_decay": cfg["weight_decay"],
        "optim": cfg["optimizer"],
        "seed": cfg["seed"],
        "disable_shuffling": True,
        "bf16": has_gpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_gradient_checkpointing": not cfg.get("gradient_checkpointing"),
        "flash_attn": "fa2" if "flash-attn" in installed_versions() else "sdpa",
        "enable_liger_kernel": has_gpu and "liger-kernel" in installed_versions(),
    }
    if cfg.get("adapter"):
        keys |= {"finetuning_type": "lora", "lora_rank": cfg["lora_r"], "lora_alpha": cfg["lora_alpha"]}
        keys |= {"lora_target": "all"}
    else:
        keys |= {"finetuning_type": "full", "pure_bf16": has_gpu}
    if cfg.get("load_in_4bit"):
        keys |= {"quantization_bit": 4}  # bitsandbytes, NF4, twice: its defaults
    return keys


def main() -> None:
    from llamafactory.train.tuner import run_exp  # here, so that the rest can be tested without it

    path = Path(sys.argv[1])
    cfg = yaml.safe_load(path.read_text())
    tokenized = path.with_name("llamafactory-rows")
    lengths = [sum(number > 0 for number in row["attention_mask"]) for row in save_rows(cfg, tokenized)]
    rows_per_step = cfg["micro_batch_size"] * cfg["gradient_accumulation_steps"]
    clock = StepClock(tokens_by_step(lengths, rows_per_step, cfg["max_steps"]))
    run_exp(args=translated(cfg, tokenized), callbacks=[clock])


if __name__ == "__main__":
    main()
