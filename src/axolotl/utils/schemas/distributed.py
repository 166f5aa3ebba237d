"""Several GPUs and machines."""

from __future__ import annotations

from typing import Annotated, Any

from axolotl.utils.schemas.enums import RingAttnFunc
from axolotl.utils.schemas.fields import IGNORE_CASE, Int, Words, key
from axolotl.utils.schemas.fsdp import FSDPConfig


class DistributedConfig(Words):
    """Several GPUs."""

    ddp: bool | None = key("Use distributed data parallel. Default: with more than one process.")
    ddp_timeout: Int | None = key("Seconds before a collective operation is given up.", ge=1)
    ddp_bucket_cap_mb: Int | None = key("Size of gradient buckets, in megabytes.", ge=1)
    ddp_broadcast_buffers: bool | None = key("Send buffers from the first rank at every step.")
    ddp_find_unused_parameters: bool | None = key("Look for parameters without a gradient.")
    deepspeed: str | dict[str, Any] | None = key(
        "DeepSpeed config: a path such as `deepspeed_configs/zero3.json`, or a mapping."
    )
    deepcompile: bool | None = key("Let DeepSpeed compile the model.")
    fsdp: list[str] | None = key("Deprecated: use `fsdp_config`.")
    fsdp_config: FSDPConfig | None = key("Sharding with FSDP.")
    fsdp_version: Int | None = key("Version of FSDP: 1 or 2.", ge=1, le=2)
    dp_shard_size: Int | None = key("GPUs that share one copy of the model.", ge=1)
    dp_replicate_size: Int | None = key("Copies of the model.", ge=1)
    context_parallel_size: Int | None = key("GPUs that share one sequence.", ge=1)
    heads_k_stride: Int | None = key("Key heads exchanged at a time in context parallelism.", ge=1)
    ring_attn_func: Annotated[RingAttnFunc | None, IGNORE_CASE] = key("How a split sequence attends to itself.")
    tensor_parallel_size: Int | None = key("GPUs that share one layer.", ge=1)
