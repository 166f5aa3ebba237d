"""Weights & Biases module for trainer callbacks."""

from __future__ import annotations

from axolotl.utils.callbacks.save_config import SaveConfigCallback
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class SaveAxolotlConfigtoWandBCallback(SaveConfigCallback):
    """Callback to save axolotl config to Weights & Biases.

    Args:
        axolotl_config_path: the file to upload, with its secrets already removed.
    """

    def upload(self) -> None:
        import wandb

        if wandb.run is not None:
            artifact = wandb.Artifact(name=f"config-{wandb.run.id}", type="axolotl-config")
            artifact.add_file(self.axolotl_config_path)
            wandb.log_artifact(artifact)
            LOG.info("The config was saved to Weights & Biases.")
