"""The table of architectures that need something said about them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSupport:
    """One row: what this program must know about an architecture.

    Attributes:
        embedding_layers: names of the input and output embedding, to be trained in full when tokens are added.
        int8_skip_modules: modules that bitsandbytes must not quantize.
        quant_storage: dtype name in which packed 4-bit weights are stored; FSDP wants it equal to the other weights.
        lora_kernels_refused: why the fused LoRA kernels do not fit, or None.
        varlen_refused: why document borders do not reach its attention, although it says so to transformers, or None.
    """

    embedding_layers: tuple[str, str] = ("embed_tokens", "lm_head")
    int8_skip_modules: tuple[str, ...] = ()
    quant_storage: str = "bfloat16"
    lora_kernels_refused: str | None = None
    varlen_refused: str | None = None


_SSM = "its layers mix state-space blocks with attention"
_GPT_NEOX = ("embed_in", "embed_out")
_FALCON = ("word_embeddings", "lm_head")
_GPT2 = ("wte", "lm_head")

DEFAULT = ModelSupport()

MODEL_SUPPORT: dict[str, ModelSupport] = {
    "qwen2_moe": ModelSupport(quant_storage="float32"),
    "gpt_oss": ModelSupport(lora_kernels_refused="its experts are fused parameters"),
    "deepseek_v2": ModelSupport(lora_kernels_refused="latent attention has no q, k, v layers"),
    "deepseek_v3": ModelSupport(lora_kernels_refused="latent attention has no q, k, v layers"),
    "dbrx": ModelSupport(embedding_layers=_GPT2, lora_kernels_refused="q, k and v are one layer"),
    "falcon": ModelSupport(embedding_layers=_FALCON, lora_kernels_refused="q, k and v are one layer"),
    "bloom": ModelSupport(embedding_layers=_FALCON, lora_kernels_refused="q, k and v are one layer"),
    "gpt_neox": ModelSupport(embedding_layers=_GPT_NEOX, lora_kernels_refused="q, k and v are one layer"),
    "gpt2": ModelSupport(embedding_layers=_GPT2, lora_kernels_refused="q, k and v are one layer"),
    "gpt_neo": ModelSupport(embedding_layers=_GPT2),
    "gptj": ModelSupport(embedding_layers=_GPT2),
    "codegen": ModelSupport(embedding_layers=_GPT2),
    "phi3": ModelSupport(lora_kernels_refused="q, k and v are one layer"),
    "mamba": ModelSupport(embedding_layers=("embeddings", "lm_head"), int8_skip_modules=("mixer",), lora_kernels_refused=_SSM),
    "jamba": ModelSupport(quant_storage="float32", int8_skip_modules=("mamba",), lora_kernels_refused=_SSM),
    "falcon_h1": ModelSupport(int8_skip_modules=("mamba",), lora_kernels_refused=_SSM),
    "nemotron_h": ModelSupport(
        embedding_layers=("embeddings", "lm_head"), quant_storage="float32", int8_skip_modules=("mixer",), lora_kernels_refused=_SSM
    ),
    "granitemoehybrid": ModelSupport(int8_skip_modules=("mamba",), lora_kernels_refused=_SSM),
    "nemotron": ModelSupport(varlen_refused="its layers do not hand attention keywords down"),
    "bamba": ModelSupport(int8_skip_modules=("mamba",), lora_kernels_refused=_SSM),
}  # fmt: skip


def read_model_support(model_type: str | None) -> ModelSupport:
    """The row of an architecture, or the default row."""
    return MODEL_SUPPORT.get(model_type or "", DEFAULT)
