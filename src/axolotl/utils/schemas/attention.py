"""Attention and other fused computation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Words, key


class AttentionConfig(Words):
    """Attention and other fused computation."""

    attn_implementation: str | None = key(
        "Attention: `eager`, `sdpa`, `flash_attention_2` (or `_3`, `_4`, `_torch`), `flex_attention`, `xformers`, `sage`, "
        "`fp8`, or a kernel on the hub."
    )
    flash_attention: bool | None = key("Use the best attention that knows document borders.")
    sdp_attention: bool | None = key("Same as `attn_implementation: sdpa`.")
    flex_attention: bool | None = key("Same as `attn_implementation: flex_attention`.")
    xformers_attention: bool | None = key("Same as `attn_implementation: xformers`.")
    sage_attention: bool | None = key("Same as `attn_implementation: sage`.")
    eager_attention: bool | None = key("Same as `attn_implementation: eager`.")
    s2_attention: bool | None = key(
        "Train with shifted sparse attention (LongLoRA): attention within groups of tokens."
    )
    flex_attn_compile_kwargs: dict[str, Any] | None = key("Arguments of `torch.compile` for flex attention.")
    flash_attn_cross_entropy: bool | None = key("Replaced by the fused linear cross-entropy, which is always on.")
    flash_attn_fuse_mlp: bool | None = key("Fuse part of the MLP.")
    flash_attn_d512: bool | None = key("Deprecated: use `large_head_attention`.")
    flash_optimum: bool | None = key("Use BetterTransformer.")
    gemma4_hybrid_attn_impl: bool | None = key("Flash attention for sliding-window layers, SDPA for the others.")
    large_head_attention: Annotated[Literal["auto", "sdpa", "triton_flash"] | None, IGNORE_CASE] = key(
        "Attention for heads wider than 256: `auto` and `sdpa` are PyTorch's own, document by document."
    )
    sdpa_varlen: bool | None = key(
        "Use PyTorch's own variable-length attention for packed rows. Default: when it is there."
    )
    fused_attn_kernel: bool | None = key("Fuse the norm and the rotation of queries and keys.")
    scaling_softmax: bool | None = key(
        "Multiply attention scores by the logarithm of the number of keys; with `attn_implementation: flex_attention`."
    )
    scaling_softmax_factor: Float | None = key("Factor of that logarithm. Default: 0.43.")
    scaling_softmax_bias: Float | None = key("Bias of `scaling_softmax`. Default: 0.")
    lora_mlp_kernel: bool | None = key("Fuse LoRA in MLPs.")
    lora_qkv_kernel: bool | None = key("Fuse LoRA in query, key and value.")
    lora_o_kernel: bool | None = key("Fuse LoRA in attention's output.")
    lora_embedding_kernel: bool | None = key("Fuse LoRA in embeddings.")
    chunked_cross_entropy: bool | None = key("Compute the loss in chunks, to save memory.")
    chunked_cross_entropy_num_chunks: Int | None = key("Number of those chunks. Default: 8.", ge=1)
    use_eaft: bool | None = key("Weigh each token's loss by how undecided the model is about it.")
    eaft_alpha: Float | None = key("Exponent of the weight of `use_eaft`: 0 for none.", 1.0, ge=0)
    eaft_k: Int | None = key("Most probable tokens that the entropy is taken over.", 20, ge=2)
    tiled_mlp: bool | None = key("Compute MLPs in tiles along the sequence, for very long context.")
    tiled_mlp_num_shards: Int | None = key("Number of tiles. Default: from the sequence's length.", ge=1)
    tiled_mlp_use_original_mlp: bool | None = key("Tile the model's own MLP instead of a general one.", True)
    llama4_linearized_experts: bool | None = key("Load Llama 4 experts as separate linear layers.")
