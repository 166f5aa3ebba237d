"""MLflow module for trainer callbacks."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class SaveAxolotlConfigtoMlflowCallback(TrainerCallback):
    """Callback to save axolotl config to MLflow.

    Args:
        axolotl_config_path: the file to upload, with its secrets already removed.
    """

    def __init__(self, axolotl_config_path: str):
        self.axolotl_config_path = str(axolotl_config_path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.is_world_process_zero:
            self._upload()
        return control

    def _upload(self) -> None:
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.log_artifact(self.axolotl_config_path, artifact_path="")
            LOG.info("The config was saved to MLflow.")
