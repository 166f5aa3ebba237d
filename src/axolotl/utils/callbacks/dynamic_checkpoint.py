"""Save when someone asks for it: a file that appears in `output_dir` triggers a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

TRIGGER_FILE = "axolotl_checkpoint.save"


class DynamicCheckpointCallback(TrainerCallback):
    """Looks for the trigger file every few steps; when it is there, removes it and saves a checkpoint.

    Args:
        check_interval: steps between looks.
        trigger_file_path: file name (within `output_dir`) or path; empty for `axolotl_checkpoint.save`.
    """

    def __init__(self, check_interval: int = 10, trigger_file_path: str = ""):
        self.check_interval = max(1, check_interval)
        self.trigger_file_path = trigger_file_path or TRIGGER_FILE

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step % self.check_interval:
            return control
        found = [False]
        if args.process_index == 0:
            trigger = Path(args.output_dir) / self.trigger_file_path
            found[0] = trigger.is_file()
            if found[0]:
                trigger.unlink()
        if args.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        if found[0]:
            LOG.info(f"Found {self.trigger_file_path}: saving a checkpoint at step {state.global_step}.")
            control.should_save = True
        return control
