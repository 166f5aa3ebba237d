"""Weights & Biases module for trainer callbacks."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class SaveAxolotlConfigtoWandBCallback(TrainerCallback):
    """Callback to save axolotl config to Weights & Biases.

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
        import wandb

        if wandb.run is not None:
            artifact = wandb.Artifact(name=f"config-{wandb.run.id}", type="axolotl-config")
            artifact.add_file(self.axolotl_config_path)
            wandb.log_artifact(artifact)
            LOG.info("The config was saved to Weights & Biases.")
