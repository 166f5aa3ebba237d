"""`step_clock` for runs from YAML: `plugins: [step_clock_plugin.StepClockPlugin]`."""

from __future__ import annotations

from typing import Any

from step_clock import StepClock

from axolotl.integrations.base import BasePlugin


class StepClockPlugin(BasePlugin):
    """Adds the clock to the trainer."""

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return [StepClock()]
