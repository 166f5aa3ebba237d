"""Random state of a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from axolotl.core.checkpoint import read_run_state
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class RngLoaderMixin(Trainer):
    """Loads the generators of a checkpoint, and the counters that transformers does not keep."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
            if not (Path(checkpoint) / name).is_file():
                LOG.warning(
                    f"{checkpoint} has no `{name}`: the run goes on with other random numbers than the interrupted one."
                )
        super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_run_state(read_run_state(checkpoint))

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint has to hold beyond the files of transformers, as JSON values."""
        window_loss = self.window_loss
        if self.args.world_size > 1:
            window_loss = self.accelerator.reduce(window_loss, reduction="mean")
        return {
            "num_tokens_seen": self.num_tokens_seen,
            "num_tokens_trained": self.num_tokens_trained,
            "window_loss": window_loss.item(),
            "window_steps": self.window_steps,
        }

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on counting where `state` stopped."""
        self.num_tokens_seen = int(state.get("num_tokens_seen", 0))
        self.num_tokens_trained = int(state.get("num_tokens_trained", 0))
        self.window_loss = self.window_loss.new_tensor(float(state.get("window_loss", 0.0)))
        self.window_steps = int(state.get("window_steps", 0))
