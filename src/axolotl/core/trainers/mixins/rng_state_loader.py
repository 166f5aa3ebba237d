"""Random state of a resumed run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from axolotl.core.checkpoint import checkpoint_path, read_run_state
from axolotl.exceptions import CheckpointError, first_line
from axolotl.utils.logging import get_logger
from axolotl.utils.schedulers import follow_own_curve

LOG = get_logger(__name__)


class RngLoaderMixin(Trainer):
    """Loads the generators of a checkpoint, and the counters and callbacks that transformers does not keep."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
            if not (Path(checkpoint) / name).is_file():
                LOG.warning(
                    f"{checkpoint} has no `{name}`: the run goes on with other random numbers than the interrupted one."
                )
        super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"The optimizer or scheduler of the checkpoint {checkpoint} cannot be loaded: {first_line(error)}. "
                "Either a file is damaged, or the run that saved it trained other parameters or had another `optimizer`. "
                "Resume from another one with `resume_from_checkpoint`, or choose another `output_dir`."
            ) from error
        if checkpoint is not None:
            self._check_optimizer(checkpoint)
            if self.state.global_step < self.state.max_steps and follow_own_curve(self.lr_scheduler):
                LOG.info(
                    f"The schedule is another one than that of {checkpoint}: step {self.state.global_step + 1} begins with "
                    f"a learning rate of {self._get_learning_rate():.3g}."
                )
            self.load_run_state(read_run_state(checkpoint))
            self._find_best_checkpoint(Path(checkpoint))
            if self.train_stream is not None:
                self.train_stream.load(checkpoint)

    def _find_best_checkpoint(self, checkpoint: Path) -> None:
        """The best one lies beside the one to resume from, also when the folder of the run has moved."""
        best, step = self.state.best_model_checkpoint, self.state.best_global_step
        found = checkpoint_path(checkpoint.parent, step or 0)
        if step in self.saved_steps and found.is_dir() and not (best and Path(best).is_dir()):
            self.state.best_model_checkpoint = str(found)

    def _load_callback_state(self) -> None:
        """Give callbacks what they have counted, such as evaluations without progress.

        What they were made with stays that of this run: a longer `early_stopping_patience` takes effect. transformers, when
        asked to restore callbacks, would make them anew as they were.
        """
        if self.args.restore_callback_states_from_checkpoint:
            super()._load_callback_state()
            return
        found: dict[str, list[ExportableState]] = {}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                found.setdefault(type(callback).__name__, []).append(callback)
        for name, saved in cast("dict[str, Any]", self.state.stateful_callbacks).items():
            states = saved if isinstance(saved, list) else [saved]
            for callback, state in zip(found.get(name, []), states, strict=False):
                vars(callback).update(state.get("attributes", {}))

    def _check_optimizer(self, checkpoint: str) -> None:
        """Refuse the state of another optimizer: torch takes it, and fails at the first step, or not at all."""
        for group in [] if self.is_deepspeed_enabled else self.optimizer.param_groups:
            # torch adds `differentiable` to the defaults of every optimizer that it loads, not to the groups.
            lacks = sorted(set(self.optimizer.defaults) - set(group) - {"differentiable"})
            if lacks:
                name = self.args.alternate_optimizer or self.args.optim.value
                raise CheckpointError(
                    f"The checkpoint {checkpoint} was saved with another optimizer than `optimizer: {name}`: its "
                    f"state has no {', '.join(lacks)}. Go on with the optimizer of that run, or choose another `output_dir`."
                )

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint has to hold beyond the files of transformers, as JSON values."""
        window_loss = self.window_loss
        if self.args.world_size > 1:
            window_loss = self.accelerator.reduce(window_loss, reduction="mean")
        return {
            "num_tokens_seen": self.num_tokens_seen,
            "num_tokens_trained": self.num_tokens_trained,
            "window_loss": window_loss.item(),
            "window_steps": self.window_steps,
            "run_loss": self.run_loss,
            "run_steps": self.run_steps,
            "steps_skipped": self.nonfinite.num_skipped,
            "steps_skipped_in_a_row": self.nonfinite.num_in_a_row,
            "last_step_skipped": self.nonfinite.last_message,
            "saved_steps": sorted(self.saved_steps),
            "world_size": self.args.world_size,
        }

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on counting where `state` stopped."""
        self.num_tokens_seen = int(state.get("num_tokens_seen", 0))
        self.num_tokens_trained = int(state.get("num_tokens_trained", 0))
        self.window_loss = self.window_loss.new_tensor(float(state.get("window_loss", 0.0)))
        self.window_steps = int(state.get("window_steps", 0))
        self.run_loss = float(state.get("run_loss", 0.0))
        self.run_steps = int(state.get("run_steps", 0))
        self.nonfinite.num_skipped = int(state.get("steps_skipped", 0))
        self.nonfinite.num_in_a_row = int(state.get("steps_skipped_in_a_row", 0))
        self.saved_steps = set(state.get("saved_steps", range(self.state.global_step + 1)))
        self.nonfinite.last_message = str(state.get("last_step_skipped", ""))
