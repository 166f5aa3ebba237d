"""What the program writes into the config itself: the machine it runs on and the choices it made."""

from __future__ import annotations

from typing import Any

from axolotl.utils.schemas.fields import Words, key


class GPUCapabilities(Words):
    """What the GPUs of this machine can do."""

    bf16: bool = key("bfloat16 works.", False)
    fp8: bool = key("float8 works.", False)
    tf32: bool = key("TF32 works.", False)
    n_gpu: int = key("Number of GPUs.", 1)
    n_node: int = key("Number of machines.", 1)
    compute_capability: str | None = key("CUDA architecture, such as `sm_90`.")


class EnvCapabilities(Words):
    """What is installed."""

    torch_version: str | None = key("Version of torch.")


class InternalConfig(Words):
    """Set by the program. Writing these by hand is seldom right."""

    is_preprocess: bool | None = key("Internal: this is `axolotl preprocess`.")
    preprocess_iterable: bool | None = key("Internal: preprocess without writing the dataset to disk.")
    inference: bool | None = key("Internal: this is `axolotl inference`.")
    total_num_tokens: int | None = key("Internal: tokens in the training set.")
    total_supervised_tokens: int | None = key("Internal: trained tokens in the training set.")
    sample_packing_eff_est: float | None = key("Internal: packing efficiency.")
    axolotl_config_path: str | None = key("Internal: path of this config.")
    resolution: list[dict[str, Any]] | None = key("Internal: choices made for the user, with their reasons.")
    is_falcon_derived_model: bool | None = key("Internal: the model derives from Falcon.")
    is_llama_derived_model: bool | None = key("Internal: the model derives from Llama.")
    is_mistral_derived_model: bool | None = key("Internal: the model derives from Mistral.")
    is_qwen_derived_model: bool | None = key("Internal: the model derives from Qwen.")
    model_config_type: str | None = key("Internal: `model_type` of the model's config.")
    model_config_type_text: str | None = key("Internal: `model_type` of the text part of the model's config.")
    model_vocab_size: int | None = key("Internal: rows of the model's embedding, before tokens are added.")
    is_multimodal: bool | None = key("Internal: the model takes images or sound.")
    processor_config: str | None = key("Internal: where the processor is loaded from.")
    torch_dtype: Any | None = key("Internal: number format of the weights.")
