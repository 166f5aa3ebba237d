"""How close preparing a dataset, from JSON lines to the saved cache, comes to the raw speed of `tokenizers`.

Both tokenize the same texts in the same run. Without arguments the rows are made from the documentation strings of the
standard library and the tokenizer is trained on them.

    python benchmarks/data_preprocess.py [--data rows.jsonl --type alpaca --tokenizer path] [--rows 20000]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import json
import os
import platform
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from axolotl.utils.data import prepare_datasets
from axolotl.utils.dict import DictDefault

MODULES = [
    "os",
    "json",
    "re",
    "random",
    "string",
    "textwrap",
    "statistics",
    "datetime",
    "collections",
    "itertools",
    "functools",
    "pathlib",
    "logging",
]


def made_rows(num: int) -> list[dict[str, str]]:
    """Questions about functions of the standard library, with their documentation as answers."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        for member, value in inspect.getmembers(module):
            text = inspect.getdoc(value)
            if text and not member.startswith("_"):
                found.append({"instruction": f"What does {name}.{member} do?", "input": "", "output": text})
    return list(itertools.islice(itertools.cycle(found), num))


def trained_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((row["output"] for row in rows[:2000]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--type", default="alpaca")
    parser.add_argument("--tokenizer")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-data_preprocess.json"))
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = (
            [json.loads(line) for line in options.data.read_text().splitlines()]
            if options.data
            else made_rows(options.rows)
        )
        source = Path(folder) / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else trained_tokenizer(rows)
        cfg = DictDefault(
            datasets=[{"path": str(source), "type": options.type}],
            sequence_len=8192,
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            sample_packing=True,
            dataset_prepared_path=f"{folder}/prepared",
        )
        start = time.perf_counter()
        train = prepare_datasets(cfg, tokenizer)[0]
        ours = time.perf_counter() - start
        start = time.perf_counter()
        prepare_datasets(cfg, tokenizer)
        again = time.perf_counter() - start
        texts = [tokenizer.decode(row) for row in train["input_ids"]]
        tokens = sum(train["length"])
        start = time.perf_counter()
        raw_tokens = sum(len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts))
        raw = time.perf_counter() - start
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "datasets": datasets.__version__,
        "rows": len(train),
        "tokens": tokens,
        "prepare_seconds": round(ours, 2),
        "prepare_tokens_per_second": round(tokens / ours),
        "raw_seconds": round(raw, 2),
        "raw_tokens_per_second": round(raw_tokens / raw),
        "share_of_raw_speed": round((tokens / ours) / (raw_tokens / raw), 3),
        "from_cache_seconds": round(again, 3),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(report, indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
