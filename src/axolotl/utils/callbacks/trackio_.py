"""Trackio: the config becomes a part of its settings, the run there ends with ours."""

from __future__ import annotations

from pathlib import Path

import yaml

from axolotl.utils.callbacks.save_config import SaveConfigCallback
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class SaveAxolotlConfigtoTrackioCallback(SaveConfigCallback):
    """Callback to save axolotl config to Trackio, as `axolotl_config` of the run's settings.

    Args:
        axolotl_config_path: the file to save, with its secrets already removed.
    """

    def upload(self) -> None:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            text = Path(self.axolotl_config_path).read_text(encoding="utf-8")
            trackio.config.update({"axolotl_config": yaml.safe_load(text)})
            LOG.info("The config was saved to Trackio.")

    def is_running(self) -> bool:
        """Whether the process has a run."""
        import trackio

        return trackio.context_vars.current_run.get() is not None

    def end_run(self, outcome: str) -> None:
        """Finish the run."""
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()
