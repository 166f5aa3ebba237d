"""LLaMA-Factory on the workload of a benchmark's YAML: `python run_llamafactory.py config.yml`. Written from its documentation.

The rows reach it as a tokenized dataset (`tokenized_path`), and packed ones as its `neat_packing` makes them: documents numbered in
the attention mask, positions that begin again. What `llamafactory-cli train` calls is called here, as only it takes a callback.
Has not been run here: LLaMA-Factory was not installed on any machine of this project's tests.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, DatasetDict, Features, Sequence, Value
from step_clock import StepClock

COLUMNS = Features(
    {name: Sequence(Value("int32")) for name in ("input_ids", "attention_mask", "position_ids", "labels")}
)


def pack(documents: list[dict[str, list[int]]], length: int) -> Iterator[dict[str, list[int]]]:
    """Rows of at most `length` tokens, first fit of the longest first."""
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
        row: dict[str, list[int]] = {name: [] for name in COLUMNS}
        for number, document in enumerate(content, start=1):
            size = len(document["input_ids"])
            row["input_ids"] += document["input_ids"]
            row["labels"] += document["labels"]
            row["attention_mask"] += [number] * size
            row["position_ids"] += range(size)
        yield row


def save_rows(cfg: dict[str, Any], folder: Path) -> None:
    documents = [json.loads(line) for line in Path(cfg["datasets"][0]["path"]).read_text().splitlines()]
    if cfg.get("sample_packing"):
        rows = list(pack(documents, cfg["sequence_len"]))
    else:
        rows = [{**document, "position_ids": list(range(len(document["input_ids"])))} for document in documents]
    DatasetDict({"train": Dataset.from_list(rows, features=COLUMNS)}).save_to_disk(folder)


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
        "optim": cfg["optimizer"],
        "seed": cfg["seed"],
        "disable_shuffling": True,
        "bf16": has_gpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_gradient_checkpointing": not cfg.get("gradient_checkpointing"),
        "flash_attn": "fa2" if importlib.util.find_spec("flash_attn") else "sdpa",
        "enable_liger_kernel": has_gpu and importlib.util.find_spec("liger_kernel") is not None,
    }
    if cfg.get("adapter"):
        keys |= {"finetuning_type": "lora", "lora_rank": cfg["lora_r"], "lora_alpha": cfg["lora_alpha"]}
        keys |= {"lora_target": "all"}
    else:
        keys |= {"finetuning_type": "full", "pure_bf16": has_gpu}
    if cfg.get("load_in_4bit"):
        keys |= {"quantization_bit": 4, "quantization_method": "bnb"}
    return keys


def main() -> None:
    from llamafactory.train.tuner import run_exp  # here, so that the rest can be tested without it

    path = Path(sys.argv[1])
    cfg = yaml.safe_load(path.read_text())
    tokenized = path.with_name("llamafactory-rows")
    save_rows(cfg, tokenized)
    run_exp(args=translated(cfg, tokenized), callbacks=[StepClock()])


if __name__ == "__main__":
    main()
