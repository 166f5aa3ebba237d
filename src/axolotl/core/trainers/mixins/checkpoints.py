"""Saving checkpoints of a run: whole or not at all, in the background where it can be, elsewhere when the disk gives up."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from axolotl.core.checkpoint import (
    SAVED_CONFIG,
    TRAINER_STATE,
    aside_path,
    checkpoint_path,
    model_aside,
    remove_old_checkpoints,
    seal_checkpoint,
    write_run_state,
)
from axolotl.core.checkpoint_weights import check_complete, is_converted, load_converted
from axolotl.core.checkpoint_writer import CheckpointWriter
from axolotl.core.host_copy import (
    MEMORY_SHARE,
    CapturedFile,
    HostMemory,
    captured_files,
    count_bytes,
    find_tensors,
)
from axolotl.core.output_dir import OutputFolder, is_write_error, rescue_dirs
from axolotl.exceptions import CheckpointError, OutputError
from axolotl.loaders.adapter_base import check_fits_base
from axolotl.utils.distributed import zero_first
from axolotl.utils.environment import free_host_memory
from axolotl.utils.garbage import collecting_only_new
from axolotl.utils.logging import get_logger
from axolotl.utils.redact import redact_secrets

LOG = get_logger(__name__)

# Methods that write a checkpoint. A trainer of the user that overrides one may read what it has just written.
SAVING_METHODS = ("_save_checkpoint", "save_model", "_save", "_save_optimizer_and_scheduler", "_save_rng_state")
LIBRARIES = ("transformers", "trl", "axolotl")

# Trackers' callbacks whose `on_save` uploads the folder only when an environment variable says so: class -> (it, when).
UPLOADS_ON_REQUEST: dict[str, tuple[str, tuple[str, ...]]] = {
    "WandbCallback": ("WANDB_LOG_MODEL", ("checkpoint",)),
    "MLflowCallback": ("HF_MLFLOW_LOG_ARTIFACTS", ("1", "on", "yes", "true")),
    "TrackioCallback": ("", ()),
}


class CheckpointPart(Protocol):
    """Something beside the trainer whose state belongs into checkpoints."""

    def save_to_checkpoint(self, folder: Path, final: Path) -> None:
        """Write files to `folder`, which will be renamed to `final`. Called on the process that saves."""

    def load_from_checkpoint(self, folder: Path, model: Any) -> None:
        """Read them again, after the model's weights. Called on every process."""


class CheckpointSaveMixin(Trainer):
    """Writes a checkpoint aside and renames it when all of it is on the disk.

    With `async_save` the training waits only until weights and optimizer are copied to host memory; `why_saves_wait` says
    when it waits for all of it. A checkpoint that cannot be written to `output_dir` is written to one of `rescue_dirs`,
    and the run ends.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.checkpoint_writer = CheckpointWriter()
        self.checkpoint_parts: list[CheckpointPart] = []  # what else goes into a checkpoint and is read from it
        self.saved_config: str | None = None  # YAML that goes into every checkpoint, to compare with when resuming
        self.saves_jinja_files = True  # the chat template beside the tokenizer's config, and not in it
        self.saved_steps: set[int] = set()  # of this run, which may not be the only one in its folder
        self._host_memory = HostMemory()
        self._reserving: threading.Thread | None = None
        self.output_folder: OutputFolder | None = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer._inner_training_loop`; what is being written when it ends, also by an exception, gets written.

        A search through half a million objects for garbage takes a third of a second: more than the save of an adapter, which
        may begin one.
        """
        self.output_folder = OutputFolder(self.args.output_dir)
        gc.collect()
        with collecting_only_new(after_setup=True):
            try:
                return super()._inner_training_loop(*args, **kwargs)
            finally:
                self.checkpoint_writer.wait()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer._finalize_training`, which may read the best checkpoint: it has to be there."""
        with zero_first(self.args.process_index == 0):
            self.checkpoint_writer.wait()
        if self._agree(self.checkpoint_writer.take_error()) is not None:
            self._save_to(Path(self.args.output_dir), in_background=False)
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])  # as `log` has put it right

    def _save_checkpoint(self, model: nn.Module, trial: Any = None, **kwargs: Any) -> None:
        self.checkpoint_writer.wait()
        # A background save that failed is made up for by one that waits.
        failed = self._agree(self.checkpoint_writer.take_error())
        run_dir = Path(self._get_output_dir(trial))
        # Free memory and callbacks may differ between ranks; what they do next may not.
        waits = self._agree(None if (reason := self.why_saves_wait()) is None else OutputError(reason))
        self._save_to(run_dir, in_background=failed is None and waits is None)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint_path(run_dir, self.state.global_step)))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """`Trainer._save`, whose `training_args.bin` is a pickle of the arguments: without their secrets."""
        args, self.args = self.args, without_secrets(self.args)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args
        if self.processing_class is not None and not self.saves_jinja_files:
            folder = Path(output_dir or self.args.output_dir)
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            self.processing_class.save_pretrained(folder, save_jinja_files=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        if isinstance(config, PreTrainedConfig):
            check_fits_base(
                resume_from_checkpoint, config, key="resume_from_checkpoint", base_name=str(config._name_or_path)
            )
        try:
            if not self.load_converted(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        except (torch.OutOfMemoryError, CheckpointError):
            raise
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            said = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
            raise CheckpointError(
                f"The weights of the checkpoint {resume_from_checkpoint} cannot be loaded: {said} Either the file is damaged, or "
                "the checkpoint belongs to another model or adapter than this config describes. Resume from another one with "
                "`resume_from_checkpoint`, or choose another `output_dir`."
            ) from error
        for part in self.checkpoint_parts:
            part.load_from_checkpoint(Path(resume_from_checkpoint), self.model)

    def load_converted(self, folder: Path) -> bool:
        """Load a checkpoint whose weights have other names than the model's; False when it is not such a one."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not is_converted(folder, model):
            return False
        load_converted(folder, model)
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Instead of the warning of `Trainer`: a model that is only in part that of the checkpoint must not train on."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        check_complete(model, set(load_result.missing_keys), "to load")
        super()._issue_warnings_after_load(load_result)

    # ---- in the background or not

    def why_saves_wait(self) -> str | None:
        """Why training waits until a checkpoint is on the disk; None when it only waits for a copy in host memory."""
        if not self.args.async_save:
            return "`async_save` is off"
        # Older versions of transformers do not load shards by themselves.
        loads_shards = getattr(self, "is_distributed_loading_by_transformers", False)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or loads_shards:
            return "the weights are spread over several processes"
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            return "`hub_strategy` uploads each checkpoint"
        for callback in self.callback_handler.callbacks:
            if _reads_checkpoints(callback):
                return f"{type(callback).__name__}.on_save may read the checkpoint"
        for cls in type(self).__mro__:
            if cls.__module__.split(".")[0] not in (*LIBRARIES, "builtins"):
                overridden = sorted(set(vars(cls)) & set(SAVING_METHODS))
                if overridden:
                    return f"{cls.__name__}.{overridden[0]} may read the checkpoint"
        needed, free = sum(self._bytes_to_save()) - self._host_memory.reserved_bytes, free_host_memory()
        if needed > MEMORY_SHARE * free:
            return f"a copy takes {needed / 2**30:.1f} GiB of host memory and {free / 2**30:.1f} GiB are free"
        return None

    def reserve_host_memory(self) -> None:
        """Take the memory for the copies beforehand, on a thread: pinning it takes longer than copying to it."""
        if self.args.save_strategy == "no" or self.args.device.type != "cuda" or not self.args.should_save:
            return
        if self.why_saves_wait() is not None:
            return
        sizes = self._bytes_to_save()

        def reserve() -> None:
            for size in sizes:
                self._host_memory.take(size, pinned=True)
            self._host_memory.reset()

        self._reserving = threading.Thread(target=reserve, name="reserve host memory", daemon=True)
        self._reserving.start()

    def _bytes_to_save(self) -> list[int]:
        """Sizes of the tensors of a checkpoint, about in the order in which they are saved."""
        model = self.accelerator.unwrap_model(self.model)
        tensors = [*model.parameters(), *model.buffers()]
        if isinstance(model, PeftModel):
            tensors = [tensor for tensor in tensors if tensor.requires_grad]
        if self.optimizer is not None and not self.args.save_only_model:
            tensors += find_tensors(dict(self.optimizer.state))
        return [size for tensor in tensors if (size := count_bytes(tensor))]

    # ---- writing

    def write_model(self, folder: Path) -> BaseException | None:
        """Write the model to a folder, whole or not at all. The error of a rank that could not is returned on all ranks."""

        def write() -> None:
            self._check_still_there(folder)
            with model_aside(folder, owner=self.args.should_save) as aside:
                # All ranks may write a part: the files are moved when all of them are there.
                error = self.together(lambda: self.save_model(str(aside), _internal_call=True))
                if error is not None:
                    raise error
                if self.args.should_save:
                    self._save_base_config(aside)

        return self.together(write)

    def _save_to(self, run_dir: Path, *, in_background: bool) -> None:
        """Save to `run_dir`; if that cannot be, save elsewhere and raise `OutputError` on every rank."""
        error = self._try_to_save(run_dir, in_background=in_background)
        if error is None:
            return
        step = self.state.global_step
        said = f"The checkpoint of step {step} could not be written to {run_dir}: {error}."
        for folder in rescue_dirs(run_dir):
            LOG.warning(f"{said} Trying {folder}.")
            if self._try_to_save(folder, in_background=False) is None:
                raise OutputError(
                    f"{said} It was written to {checkpoint_path(folder, step)} instead, and the run stopped. Earlier "
                    "checkpoints are untouched. Make room (or lower `save_total_limit`), then go on with "
                    f"`resume_from_checkpoint: {checkpoint_path(folder, step)}`."
                ) from error
        tried = " and ".join(str(folder) for folder in rescue_dirs(run_dir))
        raise OutputError(
            f"The checkpoint of step {step} could not be written to {run_dir}: {error}. Nor could it be written to {tried}. "
            "Earlier checkpoints are untouched. Free some space (or lower `save_total_limit`, or set `save_only_model: "
            "true`) and resume with `auto_resume_from_checkpoints: true`."
        ) from error

    def _try_to_save(self, run_dir: Path, *, in_background: bool) -> BaseException | None:
        """Save to a folder. The error of the rank that could not write is returned on all ranks."""
        step = self.state.global_step
        aside = aside_path(run_dir, step)
        files: list[CapturedFile] = []

        def write() -> None:
            if not (in_background and self.args.should_save):
                self._write_files(run_dir, aside)
                return
            if self._reserving is not None:
                self._reserving.join()
            with captured_files(self._host_memory) as captured:
                self._write_files(run_dir, aside)
            files.extend(captured)

        error = self.together(lambda: self._clear(run_dir, aside), on_main_only=True) or self.together(write)
        if error is not None:
            if self.args.should_save:
                self._remove(aside, run_dir)
            return error
        finish = partial(self._finish, files, run_dir, step, self.state.best_model_checkpoint)
        if not in_background:
            return self.together(finish, on_main_only=True)
        if self.args.should_save:
            self.checkpoint_writer.start(finish, f"The checkpoint of step {step}")
        return None

    def _finish(self, files: list[CapturedFile], run_dir: Path, step: int, best: str | None) -> None:
        """Write what was captured and make the checkpoint whole; then the oldest may go. Runs on any thread."""
        aside = aside_path(run_dir, step)
        try:
            for file in files:
                file.write(file.path)
            seal_checkpoint(aside, checkpoint_path(run_dir, step))
        except Exception:
            self._remove(aside, run_dir)
            raise
        remove_old_checkpoints(run_dir, self.args.save_total_limit, best)

    def _remove(self, aside: Path, run_dir: Path) -> None:
        """Remove what could not be written, and a folder that was made for its rescue alone."""
        shutil.rmtree(aside, ignore_errors=True)
        if run_dir in rescue_dirs(self.args.output_dir):
            with contextlib.suppress(OSError):
                run_dir.rmdir()

    def _clear(self, run_dir: Path, aside: Path) -> None:
        """Make an empty folder to write to, where there is room."""
        self._check_still_there(run_dir)
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        if run_dir != Path(self.args.output_dir):
            needed, free = sum(self._bytes_to_save()), shutil.disk_usage(run_dir).free
            if needed > free:
                raise OSError(f"{run_dir} has {free / 2**30:.1f} GiB left, {needed / 2**30:.1f} GiB are needed")

    def _check_still_there(self, folder: Path) -> None:
        """Raise `OutputError` when this is the folder of the run and it has gone."""
        if self.output_folder is not None and self.output_folder.path == folder:
            self.output_folder.check()

    def _write_files(self, run_dir: Path, aside: Path) -> None:
        self.store_flos()
        self.save_model(str(aside), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(aside))
            self._save_scaler(str(aside))
            self._save_rng_state(str(aside))
            if self.train_stream is not None:
                self.train_stream.save(aside)
        self.saved_steps.add(self.state.global_step)
        run_state = self.run_state()
        if not self.args.should_save:
            return
        best_step = self.state.best_global_step
        # A checkpoint of that step may also be one of an earlier run.
        is_there = best_step == self.state.global_step or checkpoint_path(run_dir, best_step or 0).is_dir()
        if best_step in self.saved_steps and is_there:
            self.state.best_model_checkpoint = str(checkpoint_path(run_dir, best_step))
        self._collect_callback_states()
        self.state.save_to_json(str(aside / TRAINER_STATE))
        write_run_state(aside, run_state)
        self._save_base_config(aside)
        for part in self.checkpoint_parts:
            part.save_to_checkpoint(aside, checkpoint_path(run_dir, self.state.global_step))
        if self.saved_config is not None:
            (aside / SAVED_CONFIG).write_text(self.saved_config, encoding="utf-8")

    def _save_base_config(self, folder: Path) -> None:
        """Beside an adapter, write which base model it belongs to."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) and isinstance(model.config, PreTrainedConfig):
            model.config.save_pretrained(folder)

    def together(self, work: Callable[[], None], *, on_main_only: bool = False) -> BaseException | None:
        """Run `work` and learn whether it could write on all ranks. What is no write error is raised."""
        error: BaseException | None = None
        try:
            if self.args.should_save or not on_main_only:
                work()
        except Exception as raised:  # noqa: BLE001 - the other ranks must hear of it before it is raised below
            error = raised
        agreed = self._agree(error)
        if error is not None and not is_write_error(error):
            raise error
        return agreed

    def _agree(self, error: BaseException | None) -> BaseException | None:
        """The error of any rank, on all ranks."""
        if self.args.world_size <= 1:
            return error
        said: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(said, None if error is None else str(error))
        elsewhere = next((f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None), None)
        return error or (None if elsewhere is None else OutputError(elsewhere))

    def _collect_callback_states(self) -> None:
        states: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        # transformers annotates the list that callers may pass; the state makes a dict of it.
        kept = cast("dict[str, Any]", self.state.stateful_callbacks)
        for name, found in states.items():
            kept[name] = found[0] if len(found) == 1 else found


def write_model(trainer: Any, folder: Path) -> BaseException | None:
    """`CheckpointSaveMixin.write_model`; a trainer that is not ours raises its error."""
    if isinstance(trainer, CheckpointSaveMixin):
        return trainer.write_model(folder)
    with model_aside(folder, owner=trainer.args.should_save) as aside:
        trainer.save_model(str(aside), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
    return None


def without_secrets(args: Any) -> Any:
    """A copy of training arguments in which tokens, logins and keys are hidden."""
    copied = copy.copy(args)
    for name, value in vars(args).items():
        if isinstance(value, str | dict | list) and (redacted := redact_secrets(value, name)) != value:
            vars(copied)[name] = redacted
    return copied


def _reads_checkpoints(callback: TrainerCallback) -> bool:
    """Whether a callback does something in `on_save`, where it may expect the checkpoint on the disk."""
    on_save = type(callback).on_save
    if on_save is TrainerCallback.on_save or on_save.__module__.startswith("axolotl."):
        return False
    variable, values = UPLOADS_ON_REQUEST.get(on_save.__qualname__.split(".")[0], (None, ()))
    if variable is None or not on_save.__module__.startswith("transformers."):
        return True
    return os.environ.get(variable, "").lower() in values
