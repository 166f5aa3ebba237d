"""How fast and how tight sample packing is: a million lengths, four mixes.

CPU seconds are of one thread, so that other work on the machine counts little; the memory is what Python and numpy allocate
at most between the lengths and the finished batches, which are lists of Python integers.

python benchmarks/data_packing.py [--num 1000000] [--out benchmarks/results/cpu-data_packing.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from axolotl.utils.samplers.epoch import EpochSampler
from axolotl.utils.samplers.multipack import MultipackBatchSampler


def mixes(num: int) -> dict[str, tuple[np.ndarray, int]]:
    """Name -> (lengths, capacity)."""
    rng = np.random.default_rng(0)
    return {
        "chat, median 245, packed at 4096": (np.clip(rng.lognormal(5.5, 1.0, num).astype(int) + 2, 2, 4096), 4096),
        "chat, median 245, packed at 32768": (np.clip(rng.lognormal(5.5, 1.0, num).astype(int) + 2, 2, 4096), 32768),
        "long documents, median 4900, packed at 131072": (
            np.clip(rng.lognormal(8.5, 1.2, num).astype(int) + 2, 2, 131072),
            131072,
        ),
        "uniform 2 to 8192, packed at 8192": (rng.integers(2, 8193, num), 8192),
    }


def measure(name: str, lengths: np.ndarray, capacity: int) -> dict[str, Any]:
    """Median of three runs of what a trainer asks for: a sampler, its length, and all batches of an epoch."""
    runs = []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        sampler = MultipackBatchSampler(EpochSampler(len(lengths)), 1, capacity, lengths, drop_last=False)
        num_batches = len(sampler)
        planned = time.process_time() - cpu
        batches = sampler.generate_batches()
        runs.append((time.process_time() - cpu, time.perf_counter() - wall, planned))
        assert len(batches) == num_batches
        del batches
    seconds, wall, planned = sorted(runs)[1]
    tracemalloc.start()
    batches = MultipackBatchSampler(
        EpochSampler(len(lengths)), 1, capacity, lengths, drop_last=False
    ).generate_batches()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del batches
    result = {
        "mix": name,
        "documents": len(lengths),
        "bins": num_batches,
        "efficiency": round(sampler.efficiency(), 5),
        "plan_cpu_seconds": round(planned, 3),
        "generate_batches_cpu_seconds": round(seconds, 3),
        "generate_batches_wall_seconds": round(wall, 3),
        "peak_memory_beyond_lengths_mib": round(peak / 2**20),
    }
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-data_packing.json"))
    options = parser.parse_args()
    results = [measure(name, lengths, capacity) for name, (lengths, capacity) in mixes(options.num).items()]
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
