"""Comet: the key is checked early, the config is uploaded, the experiment ends with the run."""

from __future__ import annotations

from axolotl.exceptions import TrackerError
from axolotl.utils.callbacks.save_config import SaveConfigCallback
from axolotl.utils.dict import DictDefault
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

    def is_running(self) -> bool:
        """Whether the process has an experiment."""
        import comet_ml

        experiment = comet_ml.get_running_experiment()
        return experiment is not None and not experiment.ended  # one that has ended stays the "running" one

    def end_run(self, outcome: str) -> None:
        """End the experiment. Comet has no states; its outcome is one of its "others"."""
        import comet_ml

        experiment = comet_ml.get_running_experiment()
        if experiment is not None:
            experiment.log_other("run_state", outcome)
            experiment.end()


def check_key(cfg: DictDefault) -> None:
    """Raise TrackerError if data is to be sent to Comet and there is no key."""
    import comet_ml

    online = comet_ml.config.get_config("comet.start.online")
    if online is False or comet_ml.config.get_config("comet.api_key"):
        return
    raise TrackerError(
        "`use_comet: true` needs a key. Run `comet login`, set COMET_API_KEY, or write `comet_online: false` to keep the "
        "experiment on this machine."
    )
