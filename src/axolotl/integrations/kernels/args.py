"""Keys of the kernels plugin: mixtures of experts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import model_validator

from axolotl.utils.schemas.fields import IGNORE_CASE, Int, Words, key


class KernelsArgs(Words):
    """Kernels for mixtures of experts."""

    expert_backend: Annotated[Literal["scattermoe", "sonicmoe", "eager", "builtin"] | None, IGNORE_CASE] = key(
        "How experts are computed."
    )
    use_scattermoe: bool | None = key("Same as `expert_backend: scattermoe`.")
    use_sonicmoe: bool | None = key("Same as `expert_backend: sonicmoe`.")
    use_dsv4_kernels: bool | None = key("Kernels for DeepSeek V4.")
    use_glm_dsa_kernels: bool | None = key("Kernels for GLM sparse attention.")
    nonexpert_quantization: Annotated[
        Literal["none", "bf16", "fp8", "fp8_blockwise", "nf4", "nvfp4"] | None, IGNORE_CASE
    ] = key("Number format of the layers that are not experts.")
    moe_grouped_backend: Annotated[Literal["auto", "marlin", "cutlass", "deepgemm"] | None, IGNORE_CASE] = key(
        "How the matrices of all experts are multiplied."
    )
    moe_dequant_chunk_size: Int | None = key("Experts turned back to full precision at a time.", ge=1)
    moe_bnb_fast: bool | None = key("Faster path for bitsandbytes experts.")
    dsv4_fp8_nonexpert_mode: str | None = key("DeepSeek V4: float8 outside the experts.")
    dsv4_fp8_lora_kernel: bool | None = key("DeepSeek V4: fuse LoRA with float8.")
    dsv4_shared_mlp_lora_kernel: bool | None = key("DeepSeek V4: fuse LoRA in the shared expert.")
    dsv4_bf16_all: bool | None = key("DeepSeek V4: all weights in bfloat16.")
    dsv4_fp4_grouped_mode: str | None = key("DeepSeek V4: how 4-bit experts are multiplied.")
    gemma4_fp8_nonexpert: bool | None = key("Deprecated: use `nonexpert_quantization: fp8`.")
    gemma4_nf4_nonexpert: bool | None = key("Deprecated: use `nonexpert_quantization: nf4`.")
    nvfp4_merge_aware: bool | None = key("Train LoRA so that it survives merging into 4-bit weights.")
    nvfp4_merge_aware_start_step: Int | None = key("First step of `nvfp4_merge_aware`.", ge=0)

    @model_validator(mode="before")
    @classmethod
    def names_one_backend(cls, data: Any) -> Any:
        """`expert_backend` and the older flags must agree, and only one flag may be set."""
        if not isinstance(data, dict):
            return data
        flags = [name for name in ("scattermoe", "sonicmoe") if data.get(f"use_{name}")]
        if len(flags) > 1:
            raise ValueError("`use_scattermoe: true` and `use_sonicmoe: true` exclude each other. Keep one.")
        backend = data.get("expert_backend")
        if flags and backend and str(backend).strip().lower() != flags[0]:
            raise ValueError(
                f"`expert_backend: {backend}` contradicts `use_{flags[0]}: true`. Keep `expert_backend` only."
            )
        return data

    @model_validator(mode="before")
    @classmethod
    def merge_aware_training_needs_sonicmoe_and_plain_lora(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if not data.get("nvfp4_merge_aware"):
            if data.get("nvfp4_merge_aware_start_step") is not None:
                raise ValueError("`nvfp4_merge_aware_start_step` needs `nvfp4_merge_aware: true`.")
            return data
        if not (data.get("use_sonicmoe") or data.get("expert_backend") == "sonicmoe"):
            raise ValueError("`nvfp4_merge_aware: true` needs `expert_backend: sonicmoe`.")
        if data.get("adapter") != "lora":
            raise ValueError("`nvfp4_merge_aware: true` needs `adapter: lora`.")
        fused = [name for name in ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel") if data.get(name)]
        if fused:
            raise ValueError(f"`nvfp4_merge_aware: true` cannot be used with `{fused[0]}: true`. Set it to false.")
        return data
