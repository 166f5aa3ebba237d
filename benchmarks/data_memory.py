"""Whether memory grows with the dataset while it is prepared: the same small rows, few and many, each in a process of its own.

The rows are written to disk as they are made. What counts is how much the peak of the resident memory grows between the two
sizes, against how much the data does. Pages of memory-mapped files count as resident while the system has room for them, so
the anonymous memory (what was allocated) is watched too. Deduplication, shuffling and dropping of long rows are on.

    python benchmarks/data_memory.py [--rows 100000 1000000] [--out benchmarks/results/cpu-data_memory.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

WATCH_SECONDS = 0.05


def write_rows(path: Path, num: int) -> None:
    """Small question and answer rows; every tenth is there twice."""
    with path.open("w") as file:
        for index in range(num):
            number = index - 1 if index % 10 == 9 else index
            row = {
                "instruction": f"Add {number} and {number * 7 % 1000}.",
                "output": f"It is {number + number * 7 % 1000}.",
            }
            file.write(json.dumps(row) + "\n")


def watch(peaks: dict[str, int], stop: threading.Event) -> None:
    """The highest `RssAnon` and `VmRSS`, in KiB, of this process until `stop`."""
    while not stop.wait(WATCH_SECONDS):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "VmRSS"):
                peaks[name] = max(peaks.get(name, 0), int(value.split()[0]))


def prepare_rows(source: Path, folder: Path) -> dict[str, Any]:
    """Prepare the rows of `source` in this process, in one process, so that its memory is all there is."""
    import datasets
    from data_preprocess import made_rows, trained_tokenizer

    from axolotl.utils.data import prepare_datasets
    from axolotl.utils.dict import DictDefault

    datasets.disable_progress_bars()
    tokenizer = trained_tokenizer(made_rows(2000))
    cfg = DictDefault(
        datasets=[{"path": str(source), "type": "alpaca"}],
        sequence_len=512,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        dataset_prepared_path=str(folder),
        dataset_exact_deduplication=True,
        dataset_num_proc=1,
    )
    peaks: dict[str, int] = {}
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(peaks, stop), daemon=True)
    time.sleep(4 * WATCH_SECONDS)
    watcher.start()
    time.sleep(4 * WATCH_SECONDS)
    before = dict(peaks)
    start = time.process_time()
    train = prepare_datasets(cfg, tokenizer)[0]
    seconds = time.process_time() - start
    stop.set()
    watcher.join()
    size = sum(file.stat().st_size for file in folder.rglob("*.arrow"))
    return {
        "rows_kept": len(train),
        "cpu_seconds": round(seconds, 1),
        "source_mib": source.stat().st_size >> 20,
        "prepared_mib": size >> 20,
        "anonymous_mib_before": before["RssAnon"] >> 10,
        "anonymous_mib_peak": peaks["RssAnon"] >> 10,
        "resident_mib_peak": peaks["VmRSS"] >> 10,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-data_memory.json"))
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(prepare_rows(*options.one)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for num in options.rows:
            source, prepared = Path(folder) / f"{num}.jsonl", Path(folder) / f"prepared-{num}"
            write_rows(source, num)
            command = [sys.executable, __file__, "--one", str(source), str(prepared)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append({"rows": num, **json.loads(done.stdout.splitlines()[-1])})
            print(results[-1], flush=True)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
