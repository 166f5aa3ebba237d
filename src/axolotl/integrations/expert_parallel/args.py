"""Keys of the expert_parallel plugin."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.fields import Int, Words, key

LOG = get_logger(__name__)


class ExpertParallelArgs(Words):
    """Spread the experts of a model over GPUs."""

    expert_parallel_size: Int = key("GPUs that share the experts.", 1, ge=1)
    expert_parallel_backend: str = key("How tokens travel to their experts.", "deep_ep")
    expert_parallel_num_nvl_bytes: Int = key("Buffer for GPUs of one machine, in bytes.", 256 * 1024 * 1024, ge=0)
    expert_parallel_num_rdma_bytes: Int = key("Buffer for GPUs of other machines, in bytes.", 0, ge=0)
    expert_parallel_token_capacity: Int | None = key("Most tokens per expert and GPU.", ge=1)
    expert_parallel_fallback_on_unsupported: bool = key("Go on without, on models that do not support it.", True)

    @model_validator(mode="before")
    @classmethod
    def a_network_buffer_is_rarely_needed(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("expert_parallel_num_rdma_bytes"):
            LOG.warning_once("`expert_parallel_num_rdma_bytes` is needed only when experts are on several machines.")
        return data
