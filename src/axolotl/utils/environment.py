"""What this machine can do, and what is installed on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch


def machine_capabilities() -> dict[str, Any]:
    """What this machine can do.

    Returns:
        `bf16`, `fp8`, `tf32` (bool), `n_gpu` (GPUs that take part in the run, on all machines), `n_node` (machines),
        `compute_capability` (such as `sm_90`, or None).
    """
    cuda = find_device_type() == "cuda"
    major, minor = torch.cuda.get_device_capability() if cuda else (0, 0)
    kind = find_device_type()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    is_launched = "LOCAL_RANK" in os.environ
    num_gpus = torch.cuda.device_count() if cuda else 0
    return {
        "bf16": cpu_computes_in_bf16() if kind == "cpu" else gpu_computes_in_bf16(kind),
        "fp8": cuda and (major, minor) >= (8, 9),
        "tf32": cuda and major >= 8,
        "n_gpu": world_size if num_gpus and is_launched else num_gpus,
        "n_node": max(world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), 1),
        "compute_capability": f"sm_{major}{minor}" if cuda else None,
    }


def env_capabilities() -> dict[str, Any]:
    """What is installed: `torch_version`, without the build suffix."""
    return {"torch_version": torch.__version__.split("+")[0]}


def find_device_type() -> str:
    """`cuda`, `npu`, `mps` or `cpu`: the first that this process can use. `ACCELERATE_USE_CPU` forces `cpu`."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    # torch gains the attribute when the package torch_npu is installed and loaded.
    npu = getattr(torch, "npu", None)
    if npu is not None and npu.is_available():
        return "npu"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def gpu_computes_in_bf16(kind: str = "cuda") -> bool:
    """Whether the accelerator multiplies in bf16 in hardware (emulation, which torch also offers, is slower than fp16)."""
    if kind == "cuda":
        if not torch.cuda.is_available():
            return False
        return torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= 8
    return kind in ("npu", "mps")


def cpu_computes_in_bf16() -> bool:
    """Whether the CPU multiplies in bf16 in hardware (AMX, AVX512-BF16, Arm BF16). Without, float32 is faster."""
    facts = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else _older_capabilities()
    return any(bool(facts.get(unit)) for unit in ("amx_bf16", "avx512_bf16", "arm_bf16", "bf16"))


def _older_capabilities() -> dict[str, bool]:
    """What torch before 2.12 says of the CPU."""
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}


def use_tf32() -> None:
    """Let float32 matrix products and convolutions use TF32 on the GPU, for the whole process."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def free_host_memory() -> int:
    """Bytes that this process can still take, within the limit of its container."""
    free = psutil.virtual_memory().available
    limits = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
            "total_inactive_file",
        ),
    )
    for limit_file, used_file, stat_file, cached_name in limits:
        try:
            limit, used = Path(limit_file).read_text().strip(), int(Path(used_file).read_text())
            stat = dict(line.split() for line in Path(stat_file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            free = min(free, int(limit) - used + int(stat.get(cached_name, 0)))
    return max(free, 0)
