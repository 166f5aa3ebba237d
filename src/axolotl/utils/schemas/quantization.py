"""Quantization with torchao, while training (`qat`) and after it (`quantization`)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from axolotl.utils.schemas.enums import TorchAOQuantDType
from axolotl.utils.schemas.fields import Int, Words, key

OTHER_NAMES = {"fp8": "float8_e4m3fn", "float8": "float8_e4m3fn"}


def other_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name = value.strip().lower()
    return OTHER_NAMES.get(name, name)


QuantDType = Annotated[TorchAOQuantDType, BeforeValidator(other_name)]


class QATConfig(Words):
    """Train with the rounding of quantization simulated."""

    activation_dtype: QuantDType | None = key("Number format of activations.")
    weight_dtype: QuantDType = key("Number format of weights.", "int8")
    quantize_embedding: bool | None = key("Quantize the embeddings too.", False)
    group_size: Int | None = key("Weights that share one scale.", 32, ge=1)
    fake_quant_after_n_steps: Int | None = key("Optimizer steps before quantization is simulated.", ge=0)


class PTQConfig(Words):
    """Quantize a trained model."""

    weight_dtype: QuantDType = key("Number format of weights.", "int8")
    activation_dtype: QuantDType | None = key("Number format of activations.")
    quantize_embedding: bool | None = key("Quantize the embeddings too.")
    group_size: Int | None = key("Weights that share one scale.", 32, ge=1)
