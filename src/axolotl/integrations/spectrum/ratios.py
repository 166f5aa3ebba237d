"""How much of a weight matrix is signal, and which layers to train by it.

Spectrum (https://arxiv.org/abs/2406.06623, section 3): singular values of a matrix of noise alone stay below the edge of the
Marchenko-Pastur law. With sigma estimated from the interquartile range of the singular values and beta the ratio of the
sides, `threshold = sigma * (1 + sqrt(beta))`; the ratio of a matrix is the sum of the singular values above it over the
sum of those below, over the largest one, as the scanner of the authors computes it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.distributed import get_rank, get_world_size, reduce_and_broadcast
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

_IQR_OF_NORMAL = 1.349
_LAYER = re.compile(r"\.\d+\.")


def signal_to_noise(weight: torch.Tensor) -> float:
    """The ratio of a matrix, or the mean of those of a stack of matrices.

    Args:
        weight: (..., rows, columns), any floating point.

    Returns:
        The ratio; infinite when no singular value is below the threshold.
    """
    matrices = weight.detach().reshape(-1, *weight.shape[-2:])
    return sum(_of_one_matrix(matrix) for matrix in matrices) / len(matrices)


def _of_one_matrix(matrix: torch.Tensor) -> float:
    short, long = sorted(matrix.shape)
    values = singular_values(matrix)
    upper, lower = torch.quantile(values, torch.tensor([0.75, 0.25], dtype=values.dtype, device=values.device))
    threshold = (upper - lower) / _IQR_OF_NORMAL * (1 + (short / long) ** 0.5)
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    return float(signal / noise / values.max()) if float(noise) > 0 else float("inf")


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All singular values, float64. From the Gram matrix of the short side: a wide matrix takes a tenth of the time."""
    wide = matrix.double() if matrix.device.type != "mps" else matrix.cpu().double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    return torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).sqrt()


def find_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the decoder layers that are matrices or stacks of them, by the name of their module."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() in (2, 3) and min(parameter.shape[-2:]) > 1 and _LAYER.search(name):
            found[name.removesuffix(".weight")] = parameter
    return found


def kind_of(name: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`: ratios are compared within a kind."""
    return _LAYER.split(name, maxsplit=1)[-1]


def choose_layers(ratios: Mapping[str, float], top_fraction: float) -> list[str]:
    """The names with the highest ratios of each kind, at least one of each.

    Args:
        ratios: by name of module.
        top_fraction: share of each kind, above 0 and up to 1.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in ratios:
        kinds[kind_of(name)].append(name)
    chosen = set()
    for names in kinds.values():
        best = sorted(names, key=lambda name: ratios[name], reverse=True)
        chosen |= set(best[: max(1, int(len(best) * top_fraction))])
    return [name for name in ratios if name in chosen]


def patterns_for(names: Iterable[str], model: Any) -> list[str]:
    """Patterns of `unfrozen_parameters` for the chosen modules, and the embeddings and the head of a transformers model."""
    patterns = [f"^{name}(\\.|$)" for name in names]
    ends = {
        id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None
    }
    patterns += [f"^{name}\\." for name, module in model.named_modules() if id(module) in ends]
    return patterns


def read_ratios(path: Path) -> dict[str, float]:
    """Ratios from a file of the scanner, `{name: {"snr": ratio, ...}}`, or of an earlier run, `{name: ratio}`.

    Raises:
        ConfigError: it is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(entry["snr"] if isinstance(entry, dict) else entry) for name, entry in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"`spectrum_model_name: {path}` is not a file of ratios ({error}). Remove the key to measure them."
        ) from error


def read_or_measure(cfg: DictDefault, model: nn.Module) -> dict[str, float]:
    """The ratio of every matrix in the decoder layers: from the file that `spectrum_model_name` names, else measured.

    Raises:
        ConfigError: the file is of another model.
    """
    matrices = find_matrices(model)
    written = cfg.spectrum_model_name
    if written and str(written).endswith(".json"):
        ratios = read_ratios(Path(written))
        known = {name: ratio for name, ratio in ratios.items() if name in matrices}
        if not known:
            raise ConfigError(
                f"`spectrum_model_name: {written}` has the ratios of another model: none of its {len(ratios)} names is in this one, "
                f"such as {next(iter(matrices), '-')}. Remove the key to measure them."
            )
        return known
    if written and written != cfg.base_model:
        note_choice(cfg, "spectrum_model_name", cfg.base_model, "ratios are measured on the weights that are trained")
    return measure(matrices)


def measure(matrices: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """The ratios, each rank measuring its share of the matrices."""
    LOG.info("spectrum: measuring the signal-to-noise ratio of %d weight matrices", len(matrices))

    def measure_my_share() -> dict[str, float]:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        names = list(matrices)[get_rank() :: get_world_size()]
        return {name: signal_to_noise(matrices[name].detach().to(device or matrices[name].device)) for name in names}

    def merge(shares: list[dict[str, float]]) -> dict[str, float]:
        merged = {name: ratio for share in shares for name, ratio in share.items()}
        return {name: merged[name] for name in matrices}

    return reduce_and_broadcast(measure_my_share, merge, get_world_size())
