"""What several checks ask of a config."""

from __future__ import annotations

import re
from typing import Any

from axolotl.utils.dict import DictDefault, note_choice

# Backends that keep packed documents apart by their lengths, without a mask.
VARLEN_BACKENDS = frozenset(
    {
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flash_attention_torch",
        "flex_attention",
        "xformers",
        "sage",
        "kernels-community/flash-attn2",
        "kernels-community/flash-attn3",
        "kernels-community/sage-attention",
    }
)
# Backends that keep packed documents apart by a block-diagonal mask.
MASK_BACKENDS = frozenset({"sdpa", "eager"})
# Backends of the flash-attn library, versions 2 and 3.
FLASH_LIBRARY_BACKENDS = frozenset(
    {"flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "kernels-community/flash-attn3"}
)

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


def fill(cfg: DictDefault, key: str, value: Any, reason: str) -> None:
    """Set a key that was left open, and record why."""
    cfg[key] = value
    note_choice(cfg, key, value, reason)


def hub_kernel(attn_implementation: str) -> str:
    """`org/name` of a hub kernel, without revision and function."""
    return re.split(r"[@:]", attn_implementation)[0]


def knows_document_borders(attn_implementation: str | None) -> bool:
    """Whether a backend takes the lengths of packed documents instead of a mask."""
    return attn_implementation is not None and hub_kernel(attn_implementation) in VARLEN_BACKENDS


def capability(cfg: DictDefault, name: str) -> Any:
    """What is known about the machine: None when nothing is."""
    return (cfg.capabilities or DictDefault())[name]


def num_gpus(cfg: DictDefault) -> int | None:
    """GPUs of this machine, or None when nothing is known about it."""
    return capability(cfg, "n_gpu")


def compute_capability(cfg: DictDefault) -> int | None:
    """90 for `sm_90`; None when unknown or no CUDA."""
    found = re.fullmatch(r"sm_(\d+)[a-z]?", str(capability(cfg, "compute_capability")))
    return int(found.group(1)) if found else None


def torch_is_older_than(cfg: DictDefault, version: str) -> bool:
    """Whether torch is known to be older than `version`, such as `2.6.0`."""
    installed = (cfg.env_capabilities or DictDefault()).torch_version
    return installed is not None and _numbers(installed) < _numbers(version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", str(version).split("+")[0])[:3])


def rl_method(cfg: DictDefault) -> str | None:
    """`rl` as plain lower-case text."""
    return str(getattr(cfg.rl, "value", cfg.rl)).lower() if cfg.rl else None


def optimizer_name(cfg: DictDefault) -> str:
    """`optimizer` as plain text, the default when left open."""
    return str(getattr(cfg.optimizer, "value", cfg.optimizer)) if cfg.optimizer else "adamw_torch_fused"


def fsdp_version(cfg: DictDefault) -> int | None:
    """1 or 2 when FSDP is used, else None."""
    if not (cfg.fsdp or cfg.fsdp_config):
        return None
    nested = cfg.fsdp_config.fsdp_version if isinstance(cfg.fsdp_config, dict) else None
    return int(cfg.fsdp_version or nested or 1)


def fsdp_option(cfg: DictDefault, name: str) -> Any:
    """A value of `fsdp_config`."""
    return cfg.fsdp_config[name] if isinstance(cfg.fsdp_config, dict) else None


def is_reentrant(cfg: DictDefault) -> bool | None:
    """`gradient_checkpointing_kwargs.use_reentrant`; None when left open."""
    return (cfg.gradient_checkpointing_kwargs or DictDefault()).use_reentrant


def is_lora(cfg: DictDefault) -> bool:
    return cfg.adapter in ("lora", "qlora")


def is_multiple(steps: float, of: float) -> bool:
    """Whether steps, or shares of a run such as 0.3 and 0.1, divide up to rounding."""
    times = steps / of
    return round(times) >= 1 and abs(times - round(times)) < 1e-6


def more_than_one(size: Any) -> bool:
    """Whether a parallel size is set above 1."""
    return bool(size) and int(size) > 1


def datasets_of(cfg: DictDefault, *keys: str) -> list[DictDefault]:
    """The entries of the dataset lists, as mappings.

    Args:
        cfg: the config.
        keys: which lists; default `datasets` and `test_datasets`.
    """
    found = []
    for key in keys or ("datasets", "test_datasets"):
        entries = cfg[key]
        if isinstance(entries, dict):
            entries = [entries]
        found += [entry for entry in entries or [] if isinstance(entry, dict)]
    return found
