"""What the trackers' callbacks share: the config goes to the tracker once, when training begins; its run ends with ours."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class TrackerCallback(TrainerCallback):
    """Our side of an experiment tracker."""

    def is_running(self) -> bool:
        """Whether the process has a run of this tracker."""
        return False

    def end_run(self, outcome: str) -> None:
        """End that run. Safe to call when there is none.

        Args:
            outcome: `finished`, `interrupted` (by a signal) or `failed`.
        """


class SaveConfigCallback(TrackerCallback):
    """Uploads the config from the first process. A subclass says in `upload` where to.

    Args:
        axolotl_config_path: the file to upload, with its secrets already removed.
    """

    def __init__(self, axolotl_config_path: str):
        self.axolotl_config_path = str(axolotl_config_path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.is_world_process_zero:
            self.upload()
        return control

    def upload(self) -> None:
        """Give the file to the tracker's running experiment, if it has one."""
        raise NotImplementedError(f"{type(self).__name__} does not define upload")
