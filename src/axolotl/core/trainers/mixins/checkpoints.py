"""Saving checkpoints of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from axolotl.core.checkpoint import (
    TRAINER_STATE,
    aside_path,
    checkpoint_path,
    is_write_error,
    remove_old_checkpoints,
    seal_checkpoint,
    write_run_state,
)
from axolotl.exceptions import CheckpointError, OutputError


class CheckpointSaveMixin(Trainer):
    """Writes a checkpoint aside and renames it when all of it is on the disk."""

    def _save_checkpoint(self, model: nn.Module, trial: Any = None, **kwargs: Any) -> None:
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        aside, final = aside_path(run_dir, step), checkpoint_path(run_dir, step)
        if self.args.should_save and aside.exists():
            shutil.rmtree(aside)
        self.accelerator.wait_for_everyone()
        try:
            self._write_checkpoint(run_dir, aside, final)
        except Exception as error:
            if not is_write_error(error):
                raise
            shutil.rmtree(aside, ignore_errors=True)
            raise OutputError(
                f"The checkpoint of step {step} could not be written to {run_dir}: {error}. Earlier checkpoints are "
                "untouched. Free some space (or lower `save_total_limit`, or set `save_only_model: true`) and resume "
                "with `auto_resume_from_checkpoints: true`."
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            remove_old_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            said = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
            raise CheckpointError(
                f"The weights of the checkpoint {resume_from_checkpoint} cannot be loaded: {said} Either the file is damaged, or "
                "the checkpoint belongs to another model or adapter than this config describes. Resume from another one with "
                "`resume_from_checkpoint`, or choose another `output_dir`."
            ) from error

    def _write_checkpoint(self, run_dir: Path, aside: Path, final: Path) -> None:
        self.store_flos()
        self.save_model(str(aside), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(aside))
            self._save_scaler(str(aside))
            self._save_rng_state(str(aside))
            if self.train_stream is not None:
                self.train_stream.save(aside)
        run_state = self.run_state()
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        best_step = self.state.best_global_step
        if best_step and (best_step == self.state.global_step or checkpoint_path(run_dir, best_step).is_dir()):
            self.state.best_model_checkpoint = str(checkpoint_path(run_dir, best_step))
        self._collect_callback_states()
        self.state.save_to_json(str(aside / TRAINER_STATE))
        write_run_state(aside, run_state)
        seal_checkpoint(aside, final)

    def _collect_callback_states(self) -> None:
        states: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        # transformers annotates the list that callers may pass; the state makes a dict of it.
        kept = cast("dict[str, Any]", self.state.stateful_callbacks)
        for name, found in states.items():
            kept[name] = found[0] if len(found) == 1 else found
