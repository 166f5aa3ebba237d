"""Which model and tokenizer to load, and where the result goes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, field_validator

from axolotl.utils.schemas.fields import NO_IS_TEXT, Text, Words, key, required


class ModelInputConfig(Words):
    """Model and tokenizer to start from."""

    base_model: Text = required("Model to start from: a name on the Hugging Face hub or a local folder.")
    base_model_config: Text | None = key("Where `config.json` is, if it is not with the model. Default: `base_model`.")
    cls_model_config: str | None = key(
        "Config class in transformers to read the model's config with. Default: `AutoConfig`."
    )
    tokenizer_config: Text | None = key("Where the tokenizer is, if it is not with the model. Default: `base_model`.")
    tokenizer_use_fast: bool | None = key("Use the fast tokenizer. Default: true.")
    tokenizer_legacy: bool | None = key("Use the tokenizer's legacy behaviour. Default: true.")
    tokenizer_use_mistral_common: bool | None = key("Tokenize with the mistral-common package.")
    tokenizer_type: str | None = key("Tokenizer class in transformers. Default: `AutoTokenizer`.")
    processor_type: str | None = key("Processor class in transformers, for multimodal models, such as `AutoProcessor`.")
    processor_kwargs: dict[str, Any] | None = key("Arguments for the processor's `from_pretrained`.")
    tokenizer_save_jinja_files: bool | None = key("Save the chat template in its own file beside the tokenizer.", True)
    trust_remote_code: bool | None = key("Run Python code that comes with the model. It can do anything you can.")
    experimental_skip_move_to_device: bool | None = key(
        "Leave the model where it was loaded until it is sharded, instead of moving it to the device first.", True
    )
    use_kernels: bool | None = key("Use kernels from the Hugging Face hub.")
    model_quantization_config: Literal["Mxfp4Config", "FineGrainedFP8Config"] | None = key(
        "Quantization config class of transformers for a model that is stored quantized."
    )
    model_quantization_config_kwargs: dict[str, Any] | None = key("Arguments for `model_quantization_config`.")
    use_onebitllms: bool | None = key("Train a BitNet (1.58 bit) model with the onebitllms package.")
    ple_cpu_offload: bool | None = key("Keep the per-layer embedding table in host memory.", False)
    quantize_moe_experts: bool | None = key("Quantize fused expert weights while they are loaded (CUDA only).", False)
    experts_implementation: str | None = key(
        "How expert layers are computed: `eager`, `batched_mm`, `grouped_mm`, `scattermoe`, `sonicmoe` or `deep_ep`."
    )
    freeze_mm_modules: bool | None = key("Freeze vision, audio and projector parameters.")
    overrides_of_model_config: dict[str, Any] | None = key(
        "Values that replace those of the model's config, such as `rope_scaling`.",
        validation_alias=AliasChoices("overrides_of_model_config", "model_config"),
    )
    overrides_of_model_kwargs: dict[str, Any] | None = key(
        "Further arguments for the model's `from_pretrained`.",
        validation_alias=AliasChoices("overrides_of_model_kwargs", "model_kwargs"),
    )
    type_of_model: str | None = key(
        "Model class in transformers. Default: `AutoModelForCausalLM`.",
        validation_alias=AliasChoices("type_of_model", "model_type"),
    )
    revision_of_model: str | None = key(
        "Branch, tag or commit of the model on the hub. Put numbers in quotes.",
        validation_alias=AliasChoices("revision_of_model", "model_revision"),
    )


class ModelOutputConfig(Words):
    """Where the trained model goes."""

    output_dir: Text = key("Folder for checkpoints, the trained model and the report.", "./model-out")
    hub_model_id: str | None = key("Repository on the hub to push to, as `owner/name`.")
    hub_strategy: Annotated[Literal["end", "every_save", "checkpoint", "all_checkpoints", "no"] | None, NO_IS_TEXT] = (
        key("What to push to the hub, and when.")
    )
    hub_revision: str | None = key("Branch on the hub to push to.")
    save_safetensors: bool | None = key("Weights are always saved as safetensors.", True)


class SpecialTokensConfig(Words):
    """Special tokens to set or add. They need not be listed under `tokens` too."""

    bos_token: str | None = key("Beginning of a sequence.")
    eos_token: str | None = key("End of a sequence.")
    pad_token: str | None = key("Padding.")
    unk_token: str | None = key("Unknown text.")
    additional_special_tokens: list[str] | None = key("Further special tokens.")

    @field_validator("additional_special_tokens", mode="before")
    @classmethod
    def one_token_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
