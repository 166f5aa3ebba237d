"""The closed sets of words, and the names of optimizers and schedulers that are known here."""

from __future__ import annotations

from enum import StrEnum


class RLType(StrEnum):
    """How the model learns from preferences or rewards."""

    DPO = "dpo"
    GDPO = "gdpo"
    GRPO = "grpo"
    IPO = "ipo"
    ORPO = "orpo"
    KTO = "kto"
    SIMPO = "simpo"
    EBFT = "ebft"


class ChatTemplate(StrEnum):
    """The chat templates that ship with this package, and where else a template may come from."""

    alpaca = "alpaca"
    aya = "aya"
    chatml = "chatml"
    cohere = "cohere"
    command_a = "command_a"
    command_a_rag = "command_a_rag"
    command_a_tool_use = "command_a_tool_use"
    deepseek_v2 = "deepseek_v2"
    deepseek_v3 = "deepseek_v3"
    exaone = "exaone"
    exaone4 = "exaone4"
    falcon_h1 = "falcon_h1"
    gemma = "gemma"
    gemma3 = "gemma3"
    gemma3n = "gemma3n"
    gemma4 = "gemma4"
    gemma4_unified = "gemma4_unified"
    inst = "inst"
    jamba = "jamba"
    jinja = "jinja"
    llama3 = "llama3"
    llama3_2_vision = "llama3_2_vision"
    llama4 = "llama4"
    llava = "llava"
    metharme = "metharme"
    mistral_v1 = "mistral_v1"
    mistral_v2v3 = "mistral_v2v3"
    mistral_v3_tekken = "mistral_v3_tekken"
    mistral_v7_tekken = "mistral_v7_tekken"
    nemotron_h = "nemotron_h"
    phi_3 = "phi_3"
    phi_35 = "phi_35"
    phi_4 = "phi_4"
    pixtral = "pixtral"
    qwen2_vl = "qwen2_vl"
    qwen3 = "qwen3"
    qwen3_5 = "qwen3_5"
    qwen_25 = "qwen_25"
    tokenizer_default = "tokenizer_default"


class CustomSupportedOptimizers(StrEnum):
    """Optimizers that do not come from transformers."""

    optimi_adamw = "optimi_adamw"
    ao_adamw_4bit = "ao_adamw_4bit"
    ao_adamw_8bit = "ao_adamw_8bit"
    ao_adamw_fp8 = "ao_adamw_fp8"
    adopt_adamw = "adopt_adamw"
    adamc = "adamc"
    came_pytorch = "came_pytorch"
    muon = "muon"
    dion = "dion"
    sinkgd = "sinkgd"
    polora = "polora"
    flash_adamw = "flash_adamw"
    flash_adam = "flash_adam"
    flash_sgd = "flash_sgd"
    flash_sgdw = "flash_sgdw"
    flash_lion = "flash_lion"
    q_galore_adamw8bit = "q_galore_adamw8bit"


class RingAttnFunc(StrEnum):
    """How a sequence that is split over GPUs attends to itself."""

    VARLEN_LLAMA3 = "varlen_llama3"
    BATCH_RING = "batch_ring"


class TorchAOQuantDType(StrEnum):
    """Number formats of quantization with torchao."""

    int4 = "int4"
    int8 = "int8"
    float8_e4m3fn = "float8_e4m3fn"
    nvfp4 = "nvfp4"
    mxfp4 = "mxfp4"
    ternary = "ternary"


# Names that transformers' Trainer takes for `optim`.
TRANSFORMERS_OPTIMIZERS = frozenset(
    """adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_torch_4bit adamw_torch_8bit
    adafactor adamw_anyprecision sgd adagrad rmsprop rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit adamw_bnb_8bit adamw_8bit
    ademamix ademamix_8bit paged_ademamix_32bit paged_ademamix_8bit lion_8bit lion_32bit paged_adamw_32bit
    paged_adamw_8bit paged_lion_32bit paged_lion_8bit galore_adamw galore_adamw_8bit galore_adafactor
    galore_adamw_layerwise galore_adamw_8bit_layerwise galore_adafactor_layerwise lomo adalomo grokadamw schedule_free_radam
    schedule_free_adamw schedule_free_sgd apollo_adamw apollo_adamw_layerwise stable_adamw""".split()  # noqa: SIM905 - a list of quoted words would take a page
)

OPTIMIZERS = TRANSFORMERS_OPTIMIZERS | frozenset(CustomSupportedOptimizers)

# Names that transformers' Trainer takes for `lr_scheduler_type`.
TRANSFORMERS_SCHEDULERS = frozenset(
    """linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt reduce_lr_on_plateau
    cosine_with_min_lr cosine_warmup_with_min_lr warmup_stable_decay greedy""".split()  # noqa: SIM905 - a list of quoted words would take a page
)

SCHEDULERS = TRANSFORMERS_SCHEDULERS | {"one_cycle", "rex"}
