"""Weights & Biases: the login is checked early, the config is uploaded, the run there ends as ours does."""

from __future__ import annotations

from axolotl.exceptions import TrackerError
from axolotl.utils.callbacks.save_config import SaveConfigCallback
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

EXIT_CODES = {"finished": 0, "interrupted": 130, "failed": 1}


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

    def is_running(self) -> bool:
        """Whether the process has a run."""
        import wandb

        return wandb.run is not None

    def end_run(self, outcome: str) -> None:
        """Finish the run. Weights & Biases shows as failed what ends with another exit code than 0."""
        import wandb

        if wandb.run is not None:
            wandb.run.summary["run_state"] = outcome
            wandb.finish(exit_code=EXIT_CODES[outcome])
            # Everything is on the disk or the server, and the next run of this process reads its variables anew.
            wandb.teardown()


def check_login(cfg: DictDefault) -> None:
    """Log in, asking for the key on a terminal; nothing is sent.

    Raises:
        TrackerError: there is no key, and nobody to ask for it.
    """
    import wandb

    if wandb.run is not None:
        return
    wandb.teardown()  # what an earlier run of this process has read of the environment
    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    try:
        wandb.login()
    except (wandb.Error, ValueError) as error:
        raise TrackerError(
            f"`use_wandb: true` needs a login: {error} Run `wandb login`, set WANDB_API_KEY, or write `wandb_mode: offline`."
        ) from error
