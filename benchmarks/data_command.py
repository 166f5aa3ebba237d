"""How long `axolotl preprocess` takes from the start of the process to its exit, for few and for many rows.

The cache is empty each time. Beside the seconds of the clock stand CPU seconds of the process and its children, which say more on
a machine that others use, and for the larger number the raw speed of `tokenizers` over the same texts. Without arguments rows and
tokenizer are made as in `data_preprocess.py`.

    python benchmarks/data_command.py [--tokenizer folder] [--data question_answer.jsonl] [--rows 124 20000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
CONFIG = {
    "base_model": "base",
    "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
    "sequence_len": 8192,
    "sample_packing": True,
    "flash_attention": True,
    "micro_batch_size": 1,
    "num_epochs": 1,
    "learning_rate": 1e-4,
    "output_dir": "out",
    "dataset_prepared_path": "prepared",
}


def write_folder(folder: Path, tokenizer: Path | None, data: Path | None, num_rows: int) -> dict[str, Any]:
    """A config with its rows and a base without weights. Returns the raw time of tokenizing. Runs in a process of its own."""
    from data_preprocess import cpu_seconds, made_rows, read_rows, trained_tokenizer
    from transformers import AutoTokenizer

    from axolotl.prompters import AlpacaPrompter

    rows = read_rows(data, num_rows) if data else made_rows(num_rows)
    loaded = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else trained_tokenizer(rows)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    loaded.save_pretrained(folder / "base")
    (folder / "base/config.json").write_text(json.dumps({**MODEL, "vocab_size": len(loaded)}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yml").write_text(json.dumps(CONFIG))  # JSON is YAML too
    prompter = AlpacaPrompter()
    texts = [next(iter(prompter.build_prompt(row["instruction"], "", row["output"]))) for row in rows]
    wall, cpu = time.perf_counter(), cpu_seconds()
    encodings = loaded.backend_tokenizer.encode_batch(texts)
    return {
        "tokens": sum(map(len, encodings)),
        "raw_wall_seconds": round(time.perf_counter() - wall, 2),
        "raw_cpu_seconds": round(cpu_seconds() - cpu, 2),
    }


def preprocess(folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one `axolotl preprocess`."""
    shutil.rmtree(folder / "prepared", ignore_errors=True)
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "axolotl.cli.main", "preprocess", "config.yml"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    seconds, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--data", type=Path, help="rows with `question` and `answer`")
    parser.add_argument("--rows", type=int, nargs="+", default=[124, 20_000])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-data_command.json"))
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        print(json.dumps(write_folder(options.write, options.tokenizer, options.data, options.rows[0])))
        return
    load, results = os.getloadavg()[0], []
    for num in options.rows:
        with tempfile.TemporaryDirectory() as name:
            command = [sys.executable, __file__, "--write", name, "--rows", str(num)]
            for option, value in (("--tokenizer", options.tokenizer), ("--data", options.data)):
                command += [option, str(value)] if value else []
            written = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs = [preprocess(Path(name)) for _ in range(options.repeat)]
        wall, cpu = (round(statistics.median(seconds), 2) for seconds in zip(*runs, strict=True))
        raw = json.loads(written.splitlines()[-1])
        results.append(
            {"rows": num, "wall_seconds": wall, "least_wall_seconds": round(min(runs)[0], 2), "cpu_seconds": cpu, **raw}
        )
        print(results[-1], flush=True)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
        "note": options.note,
        "python": platform.python_version(),
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
