"""What is taken from the package liger-kernel, under the signatures that this plugin calls."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from axolotl.integrations.liger.norms import LayerNorm, RmsNorm
from axolotl.integrations.liger.rope import Rope

IMPL_VARIABLE = "LIGER_KERNEL_IMPL"
# Package that each kind of kernel is written with.
IMPL_NEEDS = {"cutile": "cuda.tile", "cutedsl": "cutlass"}


@dataclass(frozen=True)
class LigerKernels:
    """Functions of liger-kernel.

    Attributes:
        name: package and version, as it is printed.
        rms_norm: in one kernel per direction.
        layer_norm: likewise.
        rope: of both q and k, over their memory.
    """

    name: str
    rms_norm: RmsNorm
    layer_norm: LayerNorm
    rope: Rope


def why_not_impl(impl: str) -> str | None:
    """Why the kernels written in `impl` cannot run here, or None."""
    package = IMPL_NEEDS[impl]
    root = package.partition(".")[0]
    if importlib.util.find_spec(root) is None or importlib.util.find_spec(package) is None:
        return f"the package `{package}` is not installed; the Triton kernels run"
    return None


def load_liger_kernels(impl: str | None = None) -> LigerKernels | str:
    """The functions of liger-kernel, or why there are none.

    Args:
        impl: `cutile` or `cutedsl`, for which `why_not_impl` has no objection; None for Triton.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (`pip install axolotl[liger-kernel]`)"
    if impl is not None:
        os.environ[IMPL_VARIABLE] = impl  # read when the package is imported, and at each call
    try:
        from importlib.metadata import version

        from liger_kernel.transformers.layer_norm import LigerLayerNormFunction
        from liger_kernel.transformers.rms_norm import LigerRMSNormFunction
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except (ImportError, RuntimeError, OSError) as error:
        return f"liger-kernel cannot be imported ({error})"

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, casting: str) -> torch.Tensor:
        # Never in place: where a norm's output is added to the residual stream, both get the same gradient tensor.
        return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False)

    def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        with torch.cuda.device_of(q):  # of several GPUs, Triton launches on the current one
            return liger_rotary_pos_emb(q, k, cos, sin)

    return LigerKernels(
        name=f"liger-kernel {version('liger-kernel')}",
        rms_norm=rms_norm,
        layer_norm=LigerLayerNormFunction.apply,
        rope=rope,
    )
