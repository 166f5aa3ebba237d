"""How fast and how tight sample packing is: a million lengths, three mixes.

python benchmarks/data_packing.py [--num 1000000] [--out benchmarks/results/cpu-data_packing.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-data_packing.json"))
    options = parser.parse_args()
    results = []
    for name, (lengths, capacity) in mixes(options.num).items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        sampler = MultipackBatchSampler(EpochSampler(len(lengths)), 1, capacity, lengths, drop_last=False)
        num_batches = len(sampler)
        planned = time.perf_counter()
        dealt = sum(1 for _ in sampler)
        done = time.perf_counter()
        assert dealt == num_batches
        results.append(
            {
                "mix": name,
                "documents": len(lengths),
                "bins": num_batches,
                "efficiency": round(sampler.efficiency(), 5),
                "plan_seconds": round(planned - start, 3),
                "epoch_seconds": round(done - planned, 3),
                "memory_growth_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
            }
        )
        print(results[-1])
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
