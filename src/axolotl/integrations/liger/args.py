"""Keys of the liger plugin."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import model_validator

from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.fields import IGNORE_CASE, Words, key

LOG = get_logger(__name__)


class LigerArgs(Words):
    """Kernels of the liger-kernel package."""

    liger_rope: bool | None = key("Fuse rotary embeddings.")
    liger_rms_norm: bool | None = key("Fuse RMS norms.")
    liger_rms_norm_gated: bool | None = key("Fuse gated RMS norms.")
    liger_layer_norm: bool | None = key("Fuse layer norms.")
    liger_swiglu: bool | None = key("Deprecated: use `liger_glu_activation`.")
    liger_glu_activation: bool | None = key("Fuse the gated activations of MLPs.")
    liger_cross_entropy: bool | None = key("Fuse the cross-entropy.")
    liger_fused_linear_cross_entropy: bool | None = key("Fuse the output layer with the cross-entropy.")
    liger_use_token_scaling: bool | None = key("Weight each token's loss by its probability.")
    liger_kernel_impl: Annotated[Literal["cutile", "cutedsl"] | None, IGNORE_CASE] = key(
        "Kernels to use instead of Triton's."
    )

    @model_validator(mode="before")
    @classmethod
    def swiglu_is_called_glu_activation(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("liger_swiglu") is None:
            return data
        if data.get("liger_glu_activation") is not None:
            raise ValueError("You cannot have both `liger_swiglu` and `liger_glu_activation` set. Keep the second.")
        LOG.warning_once("The 'liger_swiglu' argument is deprecated. Write `liger_glu_activation`.")
        data = dict(data)
        data["liger_glu_activation"] = data.pop("liger_swiglu")
        return data

    @model_validator(mode="before")
    @classmethod
    def fused_activation_is_in_the_models_own_mlp(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("tiled_mlp_use_original_mlp", True):
            return data
        if data.get("liger_glu_activation") and data.get("tiled_mlp"):
            raise ValueError(
                "`liger_glu_activation: true` with `tiled_mlp: true` needs `tiled_mlp_use_original_mlp: true`."
            )
        return data

    @model_validator(mode="before")
    @classmethod
    def tensor_parallelism_splits_what_these_kernels_fuse(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(size := data.get("tensor_parallel_size"), int) or size < 2:
            return data
        for name in ("liger_rms_norm", "liger_fused_linear_cross_entropy"):
            if data.get(name):
                raise ValueError(f"`{name}: true` cannot be used with `tensor_parallel_size: {size}`. Set it to false.")
        return data

    @model_validator(mode="before")
    @classmethod
    def token_scaling_is_part_of_the_fused_loss(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("liger_fused_linear_cross_entropy"):
            return data
        if data.get("liger_use_token_scaling"):
            raise ValueError("`liger_use_token_scaling: true` requires `liger_fused_linear_cross_entropy: true`.")
        return data
