"""`MergeReport`: what a merge has done, and how exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from axolotl.utils.merge.adapter import Fidelity
from axolotl.utils.merge.proof import LogitProof


@dataclass
class MergeReport:
    """What was merged and how exactly.

    Args:
        output_dir: where the merged model lies.
        num_changed: parameters that the adapter changed.
        num_rounded: frozen weights written as the round trip of their quantization.
        fidelity: parameter name -> how near its merged layer is to the unmerged one.
        logits: the comparison of whole models, or None with the reason in `logits_skipped`.
    """

    output_dir: Path
    num_tensors: int = 0
    num_changed: int = 0
    num_rounded: int = 0
    num_bytes: int = 0
    untied: bool = False
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    logits: LogitProof | None = None
    logits_skipped: str = "not asked for"

    @property
    def worst_layer(self) -> tuple[str, float]:
        if not self.fidelity:
            return "", 0.0
        name = max(self.fidelity, key=lambda key: self.fidelity[key].output_error)
        return name, self.fidelity[name].output_error

    @property
    def mean_lost(self) -> float:
        return sum(layer.lost for layer in self.fidelity.values()) / max(len(self.fidelity), 1)

    def lines(self) -> list[str]:
        """The report for the terminal."""
        text = [
            f"{self.num_changed} of {self.num_tensors} tensors changed by the adapter, {self.num_bytes / 2**30:.2f} GiB "
            f"written to {self.output_dir}"
        ]
        if self.num_rounded:
            text.append(f"{self.num_rounded} weights written as the quantized base that the adapter was trained on")
        if self.untied:
            text.append("input and output embeddings now differ: written as two tensors, tie_word_embeddings: false")
        if self.fidelity:
            text.append(
                f"every merged layer reproduces base + adapter on random inputs within {self.worst_layer[1]:.1e} (worst: "
                f"{self.worst_layer[0]}); rounding takes {self.mean_lost:.1%} of the adapter's change"
            )
        text.append(str(self.logits) if self.logits else f"whole-model logits not compared: {self.logits_skipped}")
        return text
