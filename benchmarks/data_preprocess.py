"""How close preparing a dataset, from JSON lines to the saved cache, comes to the raw speed of `tokenizers`.

Both tokenize the same texts in the same run, in turns, several times; the medians count. The yardstick is
`Tokenizer.encode_batch`, which uses all cores. CPU seconds are of all processes and threads: on a machine that others use they
say more than the clock. Without arguments the rows are made from the documentation strings of the standard library and the
tokenizer is trained on them.

    python benchmarks/data_preprocess.py [--tokenizers folder ...] [--data question_answer.jsonl] [--rows 20000]
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
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import __version__ as tokenizers_version
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


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
)


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


def read_rows(path: Path, num: int) -> list[dict[str, str]]:
    """Rows with `question` and `answer`, repeated until there are `num`."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{"instruction": row["question"], "input": "", "output": row["answer"]} for row in found]
    return list(itertools.islice(itertools.cycle(rows), num))


def as_chats(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """As many conversations of five turns: a system message, and two questions with their answers."""
    system = {"role": "system", "content": "You are a careful tutor."}
    turns = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in rows
    ]
    return [{"messages": [system, *turns[index - 1], *turns[index]]} for index in range(len(turns))]


def cpu_seconds() -> float:
    """User and system time of this process and of those it has waited for."""
    return sum(os.times()[:4])


def measure(kind: str, rows: list[dict[str, Any]], tokenizer: Any, repeat: int) -> dict[str, Any]:
    """Prepare rows of a kind (`alpaca` or `chat_template`), and tokenize their texts, `repeat` times."""
    ours, raw, warm = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts: list[str] = []
        for run in range(repeat):
            cfg = DictDefault(
                datasets=[{"path": str(source), "type": kind}],
                chat_template="jinja" if kind == "chat_template" else None,
                chat_template_jinja=CHATML if kind == "chat_template" else None,
                sequence_len=8192,
                micro_batch_size=1,
                gradient_accumulation_steps=1,
                sample_packing=True,
                dataset_prepared_path=f"{folder}/prepared-{run}",
            )
            wall, cpu = time.perf_counter(), cpu_seconds()
            train = prepare_datasets(DictDefault(cfg), tokenizer)[0]
            ours.append((cpu_seconds() - cpu, time.perf_counter() - wall))
            wall = time.perf_counter()
            prepare_datasets(DictDefault(cfg), tokenizer)
            warm.append(time.perf_counter() - wall)
            texts = texts or tokenizer.batch_decode(train["input_ids"][:])
            wall, cpu = time.perf_counter(), cpu_seconds()
            encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            raw.append((cpu_seconds() - cpu, time.perf_counter() - wall))
            del encodings
    tokens = sum(train["length"][:])
    (cpu, wall), (raw_cpu, raw_wall) = (tuple(map(statistics.median, zip(*runs, strict=True))) for runs in (ours, raw))
    result = {
        "type": kind,
        "tokenizer": Path(tokenizer.name_or_path).name or "trained here",
        "rows": len(train),
        "tokens": tokens,
        "prepare_wall_seconds": round(wall, 2),
        "raw_wall_seconds": round(raw_wall, 2),
        "share_of_raw_speed": round(raw_wall / wall, 3),
        "prepare_cpu_seconds": round(cpu, 2),
        "raw_cpu_seconds": round(raw_cpu, 2),
        "share_of_raw_speed_by_cpu": round(raw_cpu / cpu, 3),
        "from_cache_seconds": round(statistics.median(warm), 3),
    }
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="rows with `question` and `answer`")
    parser.add_argument("--tokenizers", type=Path, nargs="*", default=[])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-data_preprocess.json"))
    options = parser.parse_args()
    datasets.disable_progress_bars()
    rows = read_rows(options.data, options.rows) if options.data else made_rows(options.rows)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in options.tokenizers] or [trained_tokenizer(rows)]
    before = os.getloadavg()
    results = []
    for tokenizer in tokenizers:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        results.append(measure("alpaca", rows, tokenizer, options.repeat))
        results.append(measure("chat_template", as_chats(rows), tokenizer, options.repeat))
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_before_and_after": [round(before[0], 1), round(os.getloadavg()[0], 1)],
        "note": options.note,
        "python": platform.python_version(),
        "datasets": datasets.__version__,
        "tokenizers": tokenizers_version,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
