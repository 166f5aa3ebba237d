"""Cards by the names that people call them: their memory, and what they can do."""

from __future__ import annotations

from typing import Any

from axolotl.exceptions import ConfigError

# Memory that a program can use, in GiB, by the name people call the card.
GPUS: dict[str, float] = {
    "b200": 179.0, "h200": 139.8, "h100": 79.2, "h100-nvl": 93.1, "gh200": 95.0, "h20": 95.6, "a100-80gb": 79.2,
    "a100": 39.4, "a100-40gb": 39.4, "a40": 44.4, "a30": 23.5, "a10": 22.1, "a10g": 22.1, "l40s": 44.4, "l40": 44.4,
    "l4": 22.0, "t4": 14.7, "v100": 15.8, "v100-32gb": 31.7, "rtx-pro-6000": 94.9, "rtx6000-ada": 47.4, "a6000": 47.4,
    "rtx5090": 31.4, "rtx5080": 15.5, "rtx4090": 23.5, "rtx4080": 15.7, "rtx4070": 11.7, "rtx3090": 23.6,
    "rtx3080": 9.8, "rtx3060": 11.8,
}  # fmt: skip

# Compute capabilities of the cards, as CUDA counts them: 80 is Ampere (bf16, TF32), 89 Ada and 90 Hopper (fp8).
ARCHITECTURES: dict[int, tuple[str, ...]] = {
    70: ("v100", "v100-32gb"),
    75: ("t4",),
    80: ("a100", "a100-40gb", "a100-80gb", "a30"),
    86: ("a40", "a10", "a10g", "a6000", "rtx3060", "rtx3080", "rtx3090"),
    89: ("l4", "l40", "l40s", "rtx6000-ada", "rtx4070", "rtx4080", "rtx4090"),
    90: ("h100", "h100-nvl", "h200", "gh200", "h20"),
    100: ("b200",),
    120: ("rtx5080", "rtx5090", "rtx-pro-6000"),
}
ASSUMED_GPU = "h100"  # what a plan is made for on a machine without a GPU when none is named


def find_gpu(name: str) -> str:
    """The key of `GPUS` for a name as people write it (`H100`, `NVIDIA GeForce RTX 4090`).

    Raises:
        ConfigError: the card is not known.
    """
    key = name.lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-").replace("rtx-", "rtx")
    key = key.removeprefix("geforce-")
    key = {"rtxpro-6000": "rtx-pro-6000"}.get(key, key)
    if key not in GPUS:
        raise ConfigError(f"`--gpu {name}` is not known. Write one of {', '.join(sorted(GPUS))}, or `--memory 24GiB`.")
    return key


def capabilities_of(gpu: str) -> dict[str, Any]:
    """What `axolotl.utils.environment.machine_capabilities` says on a machine with one such card.

    Raises:
        ConfigError: the card is not known.
    """
    key = find_gpu(gpu)
    number = next(number for number, names in ARCHITECTURES.items() if key in names)
    return {
        "bf16": number >= 80,
        "fp8": number >= 89,
        "tf32": number >= 80,
        "n_gpu": 1,
        "n_node": 1,
        "compute_capability": f"sm_{number}",
    }
