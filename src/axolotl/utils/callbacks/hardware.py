"""Model FLOPs utilisation: how much of a GPU's matmul speed the run uses."""

from __future__ import annotations

import torch
from torch import nn

from axolotl.loaders.quantization import num_values

# Dense bf16 (fp16 where the chip has no bf16) peak of the tensor cores in TFLOP/s, from the makers' data sheets.
# Searched in this order in the name that the driver reports.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the device, None when it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for part, tera in PEAK_TFLOPS if part in name), None)


def flops_per_token(model: nn.Module) -> float:
    """Matmul FLOPs of forward and backward for one token, attention scores left out.

    2 per weight forward, 2 for the gradient of the input, 2 more for the gradient of a weight that is trained
    (Kaplan et al., https://arxiv.org/abs/2001.08361, section 2.1). Embedding lookups are no matmuls.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    flops = 0.0
    for parameter in model.parameters():
        if id(parameter) in tables and id(parameter) not in heads:
            continue
        flops += num_values(parameter) * (6 if parameter.requires_grad else 4)
    return flops
