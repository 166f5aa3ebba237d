"""Builder for RLHF trainers."""

from __future__ import annotations

from typing import NoReturn

from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.exceptions import NotBuiltError


class HFRLTrainerBuilder(TrainerBuilderBase):
    """Trainer factory class for TRL-based RLHF trainers (e.g. DPO)."""

    def build(self, total_num_steps: int | None) -> NoReturn:
        """Refuses: preference and online training are not part of this version."""
        raise NotBuiltError(f"`rl: {self.cfg.rl}` is not implemented yet.")
