"""MLflow module for trainer callbacks."""

from __future__ import annotations

from axolotl.utils.callbacks.save_config import SaveConfigCallback
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class SaveAxolotlConfigtoMlflowCallback(SaveConfigCallback):
    """Callback to save axolotl config to MLflow.

    Args:
        axolotl_config_path: the file to upload, with its secrets already removed.
    """

    def upload(self) -> None:
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.log_artifact(self.axolotl_config_path, artifact_path="")
            LOG.info("The config was saved to MLflow.")
