"""The files of a workload: a base of random weights, rows of token ids, and the YAML that trains one on the other."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from common import DEVICE, SHAPES, save_base
from rows import ROWS, Row
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# Lengths of GSM8K's training rows in tokens of phi-3-mini: mean and deviation of their logarithm, share of the prompt.
MEAN_LOG, DEVIATION_LOG, PROMPT_SHARE = 5.244, 0.348, 0.369
ROOMY = 1024  # tokens of a row that holds several such documents


def make_base(folder: Path, shape: str) -> LlamaConfig:
    """The model of a shape, made unless it is there, with a tokenizer that knows all its ids, by no useful name."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=max(length for row in ROWS.values() for length in (row.sequence_len, *row.lengths)),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **SHAPES[shape],
    )
    if not folder.exists():
        words = [*SPECIAL.values(), *(f"t{i}" for i in range(len(SPECIAL), config.vocab_size))]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_base(folder, config, tokenizer, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    return config


Document = tuple[list[int], int]  # ids, and how many of the first are the prompt


def random_documents(vocab_size: int, rng: random.Random, row_length: int) -> Iterator[Document]:
    """Random ids with the lengths of GSM8K, without end; where `row_length` has no room for several, shortened alike."""
    scale = min(1.0, row_length / ROOMY)
    while True:
        length = max(8, round(scale * rng.lognormvariate(MEAN_LOG, DEVIATION_LOG)))
        yield rng.choices(range(len(SPECIAL), vocab_size), k=length), round(length * PROMPT_SHARE)


def read_documents(data: Path, tokenizer: str, vocab_size: int) -> Iterator[Document]:
    """Questions and answers of a JSONL file, over and over.

    Raises:
        SystemExit: the tokenizer knows more tokens than the model.
    """
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    if len(loaded) > vocab_size:
        raise SystemExit(f"--tokenizer {tokenizer} has {len(loaded):,} tokens, the model of this shape {vocab_size:,}.")
    documents = []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        prompt = loaded(f"Question: {row['question']}\nAnswer: ")["input_ids"]
        answer = loaded(row["answer"], add_special_tokens=False)["input_ids"]
        documents.append((prompt + answer + [loaded.eos_token_id], len(prompt)))
    while True:
        yield from documents


def full_rows(documents: Iterable[Document], length: int) -> Iterator[Document]:
    """The documents one after another, cut to rows of one length that train on every token but the first.

    Nothing comes before it, so its label takes part in no loss, masked or not. Older releases of transformers (5.6) divide by the
    number of labels and count it: unmasked it would make the losses of peers on them smaller by one part in `length`.
    """
    ids = (token for document, _ in documents for token in document)
    while row := list(islice(ids, length)):
        yield row, 1


def write_rows(path: Path, row: Row, documents: Iterator[Document]) -> float:
    """Tokenized rows for all steps. Returns sum(length^2) / sum(length), the length that attention costs."""
    tokens = row.steps * row.micro_batch_size * row.accumulation * row.sequence_len
    rows = documents if row.packed else full_rows(documents, row.sequence_len)
    # Packed rows are not quite full, but what is left over at the end of an epoch must not matter either.
    wanted = round(tokens * 1.1) if row.packed else tokens
    total = squares = 0
    with path.open("w") as file:
        for ids, num_prompt in rows:
            if total >= wanted:
                break
            ids = ids[: row.sequence_len]
            total, squares = total + len(ids), squares + len(ids) ** 2
            num_prompt = min(num_prompt, len(ids) - 1)  # a document cut within its prompt trains on its last token
            labels = [-100] * num_prompt + ids[num_prompt:]
            columns = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
            file.write(json.dumps(columns) + "\n")
    return squares / total


def write_config(path: Path, row: Row, base: Path, rows: Path, **keys: Any) -> None:
    """The YAML of a row. It is all that any framework gets."""
    config = {
        "base_model": str(base),
        "datasets": [{"path": str(rows), "ds_type": "json", "type": None}],
        "val_set_size": 0,
        "shuffle_merged_datasets": False,
        **({} if row.packed else {"curriculum_sampling": True}),  # in the order of the file, in every framework
        "dataset_prepared_path": str(path.with_name("prepared")),
        "sequence_len": row.sequence_len,
        **({"sample_packing": True, "flash_attention": True} if row.packed else {}),
        "bf16": "auto",
        "micro_batch_size": row.micro_batch_size,
        "gradient_accumulation_steps": row.accumulation,
        "max_steps": row.steps,
        "num_epochs": 100,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 42,
        "output_dir": str(path.with_suffix("")),
        "plugins": ["step_clock_plugin.StepClockPlugin"],
        **row.keys,
        **keys,
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False))
