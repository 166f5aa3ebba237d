"""Measuring the memory of the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from axolotl.utils.environment import find_device_type

T = TypeVar("T")
GIB = 1024**3


def check_cuda_device(default_value: T) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a function that measures a CUDA device, so that it answers `default_value` where there is none to measure.

    That is: without CUDA, and for a device given as `auto`, `cpu`, `meta` or None. The device is the first argument.
    """

    def decorator(fn: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> T:
            device = kwargs.get("device", args[0] if args else None)
            if not torch.cuda.is_available() or not _is_cuda(device):
                return default_value
            return fn(*args, **kwargs)

        return wrapper

    return decorator


def _is_cuda(device: Any) -> bool:
    if isinstance(device, int):
        return True
    return device is not None and str(device).startswith("cuda")


@check_cuda_device(0.0)
def gpu_memory_usage(device: Any = 0) -> float:
    """Memory that live tensors hold on a CUDA device, in GiB."""
    return torch.cuda.memory_allocated(device) / GIB


@check_cuda_device((0.0, 0.0, 0.0))
def gpu_memory_usage_all(device: Any = 0) -> tuple[float, float, float]:
    """What PyTorch holds on a CUDA device since its start, in GiB.

    Returns:
        Peak of active memory, peak of allocated memory, memory reserved now.
    """
    stats = torch.cuda.memory_stats(device)
    active = stats.get("active_bytes.all.peak", 0)
    return active / GIB, torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.memory_reserved(device) / GIB


def mps_memory_usage_all() -> tuple[float, float, float]:
    """What PyTorch holds on an Apple GPU, in GiB.

    Returns:
        Memory of tensors, the same again (there is no peak), memory of the driver.
    """
    usage = torch.mps.current_allocated_memory() / GIB
    return usage, usage, torch.mps.driver_allocated_memory() / GIB


def get_gpu_memory_usage(device: Any = 0) -> tuple[float, float, float]:
    """Active, allocated and reserved memory of the device in GiB; zeros where it cannot be measured."""
    if find_device_type() == "mps":
        return mps_memory_usage_all()
    return gpu_memory_usage_all(device)


def log_gpu_memory_usage(log: Any, msg: str = "", device: Any = 0) -> None:
    """Write the memory of the device to a log.

    Args:
        log: a logger.
        msg: what has just happened, such as `after model load`.
        device: index, name or `torch.device`.
    """
    active, allocated, reserved = get_gpu_memory_usage(device)
    if reserved:
        log.info(
            "device memory %s: %.3f GiB active, %.3f GiB allocated, %.3f GiB reserved", msg, active, allocated, reserved
        )
