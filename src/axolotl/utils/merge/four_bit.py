"""bitsandbytes weights in 4 and 8 bits: what a run on a quantized base really multiplied with.

A QLoRA adapter is trained on top of weights that went through NF4. Merging it into the unquantized weights gives a model
that nobody trained; merging it into the NF4 round trip of them reproduces the trained one. With 8 bits it is the same, by less.

Weights in 4 bits are made dense by `axolotl.kernels.quantize`: on a CPU, bitsandbytes 0.50.2 gives wrong numbers where blocks reach
over the ends of rows (4,304 columns of SigLIP in blocks of 64).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from axolotl.exceptions import MissingExtraError, ModelError
from axolotl.kernels.quantize import dequantize

STORED_SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.")


@dataclass(frozen=True)
class FourBit:
    """How the base model was quantized while the adapter was trained.

    Args:
        quant_type: `nf4` or `fp4`.
        double_quant: the scales are themselves quantized.
        compute_dtype: dtype that the weights had before they were quantized, and have when they are multiplied.
        skip_modules: modules left unquantized, besides those that transformers leaves out by itself.
    """

    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: torch.dtype = torch.bfloat16
    skip_modules: tuple[str, ...] = ()

    def to_transformers(self) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype,
            llm_int8_skip_modules=list(self.skip_modules) or None,
        )

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` (out, in) through 4 bits and back, in `compute_dtype`."""
        functional = _functional()
        packed, state = functional.quantize_4bit(
            weight.to(self.compute_dtype).contiguous(),
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
        )
        return dequantize(packed, state)


@dataclass(frozen=True)
class EightBit:
    """A base model in 8 bits while the adapter was trained: a scale for each row of a weight (LLM.int8, arXiv 2208.07339).

    bitsandbytes rounds the inputs of such a layer too, by the largest value of each token. No weight can stand for that.

    Args:
        skip_modules: modules left unquantized, besides those that transformers leaves out by itself.
    """

    skip_modules: tuple[str, ...] = ()

    def to_transformers(self) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(self.skip_modules) or None)

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` (out, in) through 8 bits and back, in float32. bitsandbytes starts from float16, whatever the model's dtype."""
        functional = _functional()
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return functional.int8_vectorwise_dequant(codes, scales)


def quantized_params(model: PreTrainedModel, trained_on: FourBit | EightBit) -> set[str]:
    """Names of the weights that transformers quantizes when it loads this model class with this setting.

    Args:
        model: the model on the meta device; its linear layers are replaced, so pass one that is used for nothing else.
    """
    _functional()
    import bitsandbytes as bnb

    quantizer = AutoHfQuantizer.from_config(trained_on.to_transformers())
    quantizer.preprocess_model(model=model, device_map=None)
    layers = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)}


def is_side_tensor(name: str, names: set[str]) -> bool:
    """Whether `name` stores the scales of a 4-bit weight that is itself in `names`."""
    return any(suffix in name and name.split(suffix)[0] in names for suffix in STORED_SUFFIXES)


def read_stored(name: str, names: set[str], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A weight stored in 4 bits, dequantized.

    Args:
        name: stored name of the packed weight.
        names: all stored names.
        read: stored name -> tensor.
    """
    functional = _functional()
    sides = {side.removeprefix(name + "."): read(side) for side in names if side.startswith(name + ".")}
    state = functional.QuantState.from_dict(sides, device=torch.device("cpu"))
    return dequantize(read(name), state)


def check_base_is_mergeable(quantization: dict | None, where: str) -> None:
    """The base is unquantized, or quantized in a way whose weights can be read back exactly."""
    if not quantization:
        return
    method = quantization.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in quantization else "unknown")
    if method == "bitsandbytes" and quantization.get("load_in_4bit"):
        return
    raise ModelError(
        f"The base model `{where}` is quantized (`quant_method: {method}`), and a merge into such weights would have to "
        "round the adapter away. Give the unquantized model with `--base-model`, or keep the adapter unmerged."
    )


def _functional():
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MissingExtraError(
            "bitsandbytes", "bitsandbytes", "merging an adapter trained on a quantized base (without `--dequant`)"
        ) from error
    return bitsandbytes.functional
