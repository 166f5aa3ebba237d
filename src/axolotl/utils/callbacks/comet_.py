"""Comet module for trainer callbacks."""

from __future__ import annotations

from axolotl.utils.callbacks.save_config import SaveConfigCallback
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class SaveAxolotlConfigtoCometCallback(SaveConfigCallback):
    """Callback to save axolotl config to Comet.

    Args:
        axolotl_config_path: the file to upload, with its secrets already removed.
    """

    def upload(self) -> None:
        import comet_ml

        experiment = comet_ml.get_running_experiment()
        if experiment is not None:
            experiment.log_asset(self.axolotl_config_path, file_name="axolotl-config")
            LOG.info("The config was saved to Comet.")
