"""What the config means on this machine: ranks, device, number format."""

from __future__ import annotations

import dataclasses
import os

import torch

from axolotl.exceptions import ConfigError, did_you_mean
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.environment import cpu_computes_in_bf16, find_device_type, gpu_computes_in_bf16, use_tf32
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

# Launched by `accelerate` with one of these, the placement is accelerate's.
ACCELERATE_PLACES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


def resolve_world(cfg: DictDefault) -> None:
    """Ranks, from the launcher's environment."""
    cfg.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    cfg.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cfg.ddp is None:
        cfg.ddp = cfg.world_size != 1


def resolve_device(cfg: DictDefault) -> None:
    """Set `device` to where this rank computes and `device_map` to where transformers puts the model.

    One process on a machine with several GPUs spreads the model over them (`auto`), as `device_map` leaves it; every
    other rank keeps the model whole on its own device.
    """
    kind = _device_type(cfg)
    written = str(cfg.device or kind)
    cfg.device = kind if kind in ("cpu", "mps") else f"{kind}:{cfg.local_rank or 0}"
    if written.split(":")[0] != kind:
        note_choice(cfg, "device", cfg.device, f"that of this machine; `device: {written}` is not used")
        LOG.warning(
            f"`device: {written}` is not used: this process computes on `{cfg.device}`. To hide GPUs, set CUDA_VISIBLE_DEVICES."
        )
    if any(os.environ.get(name, "").lower() in ("1", "true") for name in ACCELERATE_PLACES):
        cfg.device_map = None
        note_choice(cfg, "device_map", None, "accelerate places the model")
    elif cfg.world_size and cfg.world_size > 1:
        cfg.device_map = {"": cfg.local_rank if kind != "cpu" else "cpu"}
    elif cfg.device_map is None:
        cfg.device_map = {"": "cpu"} if kind == "cpu" else "auto"
        note_choice(cfg, "device_map", cfg.device_map, f"one process, device `{cfg.device}`")


def check_compile_backend(cfg: DictDefault) -> None:
    """Raise `ConfigError` for a backend of the compiler that is not there."""
    backend = cfg.torch_compile_backend
    if not cfg.torch_compile or not backend:
        return
    import torch._dynamo  # the compiler takes a second to import

    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        hint = did_you_mean(backend, known)
        raise ConfigError(
            f"`torch_compile_backend: {backend}` is no backend of this PyTorch; it has: {', '.join(sorted(known))}.{hint} The "
            "default is `inductor`."
        )


def check_accelerator_config(cfg: DictDefault) -> None:
    """Raise `ConfigError` for settings that `AcceleratorConfig` does not have, and switches that are neither true nor false."""
    if not cfg.accelerator_config:
        return
    from transformers.trainer_pt_utils import AcceleratorConfig

    known = {field.name: field.default for field in dataclasses.fields(AcceleratorConfig)}
    for name, value in cfg.accelerator_config.items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise ConfigError(f"`accelerator_config.{name}` is unknown; it has: {', '.join(known)}.{hint}")
        if isinstance(known[name], bool) and not isinstance(value, bool):
            raise ConfigError(f"`accelerator_config.{name}: {value}` must be true or false.")


def resolve_dtype(cfg: DictDefault) -> None:
    """Choose the number format: `bf16`, `fp16` and `torch_dtype` (the dtype that the model is loaded in).

    `bf16: auto` is bf16 where the device computes in it, else fp16 on a GPU and float32 on a CPU, which has no fp16
    units. A format that the device cannot use at all is replaced, and said so.
    """
    kind = (cfg.device or _device_type(cfg)).split(":")[0]
    if cfg.bf16 == "auto":
        _resolve_auto(cfg, kind)
    if kind == "mps":
        _resolve_for_mps(cfg)
    if kind == "cpu" and cfg.fp16:
        cfg.fp16 = False
        note_choice(cfg, "fp16", False, "a CPU has no fp16 units; it computes in float32")
        LOG.warning("`fp16: true` needs a GPU; this CPU run computes in float32.")
    if cfg.bf16 and cfg.fp16:
        cfg.fp16 = False
        note_choice(cfg, "fp16", False, "`bf16` is on, and needs no loss scaling")
    elif cfg.bf16:
        cfg.fp16 = False
    written = cfg.torch_dtype
    cfg.torch_dtype = _weight_dtype(cfg, kind)
    if isinstance(written, str) and written.removeprefix("torch.") != str(cfg.torch_dtype).removeprefix("torch."):
        LOG.warning(
            f"`torch_dtype: {written}` is not used: weights are in {cfg.torch_dtype}. Write `bf16`, `fp16`, `bfloat16`, `float16` or "
            "`float32`."
        )


def _weight_dtype(cfg: DictDefault, kind: str) -> torch.dtype:
    """The dtype that weights are loaded in; with `bf16` or `fp16`, matrix products may run in another one."""
    if cfg.float32:
        return torch.float32
    if cfg.bf16 or cfg.bfloat16:
        return torch.bfloat16
    if cfg.fp16 or cfg.float16 or (cfg.load_in_8bit and kind != "cpu"):
        return torch.float16
    return torch.float32


def resolve_tf32(cfg: DictDefault) -> None:
    """`tf32: auto` is true where the GPU has it; true turns it on for the whole process."""
    if cfg.tf32 == "auto":
        capabilities = cfg.capabilities or DictDefault()
        known = capabilities.tf32
        cfg.tf32 = bool(known if known is not None else _gpu_has_tf32())
        note_choice(cfg, "tf32", cfg.tf32, "the GPU has TF32" if cfg.tf32 else "no GPU with TF32")
    elif cfg.tf32 and torch.cuda.is_available() and not _gpu_has_tf32():
        cfg.tf32 = False
        note_choice(cfg, "tf32", False, "this GPU has no TF32 (it came with compute capability 8.0); float32 is exact")
    if cfg.tf32 and torch.cuda.is_available():
        use_tf32()


def _device_type(cfg: DictDefault) -> str:
    """The kind of device that the config is resolved for: a plan may be made for a GPU that this machine lacks."""
    return "cuda" if (cfg.capabilities or DictDefault()).compute_capability else find_device_type()


def _computes_in_bf16(cfg: DictDefault, kind: str) -> bool:
    known = (cfg.capabilities or DictDefault()).bf16
    return gpu_computes_in_bf16(kind) if known is None else bool(known)


def _resolve_auto(cfg: DictDefault, kind: str) -> None:
    if cfg.fp16 or cfg.float16:
        cfg.bf16 = False
        note_choice(cfg, "bf16", False, "`fp16` or `float16` is set")
    elif kind == "cpu":
        cfg.bf16 = cpu_computes_in_bf16()
        reason = (
            "this CPU has bf16 units (AMX or AVX512-BF16)"
            if cfg.bf16
            else "this CPU has no bf16 units; float32 is faster"
        )
        note_choice(cfg, "bf16", cfg.bf16, reason)
    elif _computes_in_bf16(cfg, kind):
        cfg.bf16 = True
        note_choice(cfg, "bf16", True, "the device computes in bf16")
    else:
        cfg.bf16 = False
        note_choice(cfg, "bf16", False, "the device has no bf16 units")
        if cfg.fp16 is None:
            cfg.fp16 = True
            note_choice(cfg, "fp16", True, "`bf16: auto` on a device without bf16 units")


def _resolve_for_mps(cfg: DictDefault) -> None:
    """Apple GPUs: no 8-bit loading, no TF32, fp16 instead of bf16."""
    if cfg.load_in_8bit:
        cfg.load_in_8bit = False
        note_choice(cfg, "load_in_8bit", False, "bitsandbytes has no 8-bit kernels for Apple GPUs")
    cfg.tf32 = False
    if cfg.bf16:
        cfg.bf16 = False
        cfg.fp16 = True
        note_choice(cfg, "bf16", False, "Apple GPUs: `fp16: true` instead")


def _gpu_has_tf32() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
