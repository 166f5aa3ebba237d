"""`qat`: fake quantization that begins after some steps."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import TrainerCallback

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


def toggle_fake_quant(mod: nn.Module, enable: bool) -> None:
    """Toggle fake quantization for a fake quantized linear or embedding layer.

    Args:
        mod: a module; other kinds of modules are left alone, so that `model.apply` can be used.
        enable: on or off.
    """
    # Only a model that torchao prepared has such layers, so torchao is there by then.
    if type(mod).__name__ not in ("FakeQuantizedLinear", "FakeQuantizedEmbedding"):
        return
    for quantizer in (mod.weight_fake_quantizer, getattr(mod, "activation_fake_quantizer", None)):
        if quantizer is not None:
            quantizer.enabled = enable


class QATCallback(TrainerCallback):
    """Callback to toggle fake quantization for the model.

    Args:
        cfg: the `qat` section of the config; `fake_quant_after_n_steps` delays the fake quantization.
    """

    def __init__(self, cfg: Any):
        self.qat = cfg

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        after = self.qat.fake_quant_after_n_steps
        if after is None or model is None:
            return
        if state.global_step == 0:
            LOG.info(f"Fake quantization starts after {after} steps.")
            model.apply(partial(toggle_fake_quant, enable=False))
        elif state.global_step == after:
            LOG.info(f"Fake quantization starts at step {state.global_step}.")
            model.apply(partial(toggle_fake_quant, enable=True))
