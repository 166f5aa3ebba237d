"""The `fsdp_config` section: sharding a model over GPUs with FSDP."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, model_validator

from axolotl.utils.schemas.fields import UPPER_CASE, Int, Words, key

StateDictType = Literal["FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"]


class FSDPConfig(Words):
    """Sharding a model over GPUs with FSDP."""

    fsdp_version: Int | None = key(
        "Version of FSDP: 1 or 2.", validation_alias=AliasChoices("fsdp_version", "version"), ge=1, le=2
    )
    activation_checkpointing: bool | None = key("Recompute activations in the backward pass.")
    offload_params: bool | None = key("Keep parameters in host memory.")
    sync_module_states: bool | None = key("Send the first rank's weights to all.")
    cpu_ram_efficient_loading: bool | None = key("Load the weights on one rank only.")
    cpu_offload_pin_memory: bool | None = key("Pin host memory with `offload_params`; false lets it be swapped out.")
    use_orig_params: bool | None = key("Keep parameters unflattened.")
    state_dict_type: Annotated[StateDictType | None, UPPER_CASE] = key("How checkpoints are saved.")
    final_state_dict_type: Annotated[StateDictType | None, UPPER_CASE] = key("How the trained model is saved.")
    auto_wrap_policy: Annotated[Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] | None, UPPER_CASE] = (
        key("How layers are grouped.")
    )
    min_num_params: Int | None = key("Parameters that make a group, for `SIZE_BASED_WRAP`.", ge=1)
    transformer_layer_cls_to_wrap: str | list[str] | None = key(
        "Class of the layers to group, such as `LlamaDecoderLayer`."
    )
    reshard_after_forward: bool | None = key("Drop gathered weights after the forward pass.")
    mixed_precision_policy: str | None = key("Number format to compute in, such as `bf16`.")
    sharding_strategy: Annotated[str | None, UPPER_CASE] = key("What FSDP1 shards, such as `FULL_SHARD`.")
    backward_prefetch: Annotated[str | None, UPPER_CASE] = key(
        "When FSDP1 fetches the next weights in the backward pass."
    )
    forward_prefetch: bool | None = key("Let FSDP1 fetch the next weights in the forward pass.")
    limit_all_gathers: bool | None = key("Let FSDP1 wait before it gathers more weights.")

    @model_validator(mode="before")
    @classmethod
    def drop_the_prefix(cls, data: Any) -> Any:
        """`fsdp_offload_params` is `offload_params`. `fsdp_version` keeps its prefix."""
        if not isinstance(data, dict):
            return data
        return {
            name if name == "fsdp_version" else str(name).removeprefix("fsdp_"): value for name, value in data.items()
        }
