"""What a run says when it ends by an error: where it came from, and what to change."""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_callback import CallbackHandler

from axolotl.exceptions import AxolotlError, first_line
from axolotl.plan import name_remedies
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


def describe_out_of_memory(cfg: DictDefault, trainer: Any, error: Exception) -> str:
    """The message of an out-of-memory error: step, sizes, keys to change."""
    peak = ""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        peak = f" ({torch.cuda.max_memory_allocated() / 2**30:.1f} of {total:.1f} GiB were in use)"
    return (
        f"Out of memory at step {trainer.state.global_step + 1}{peak}, with `micro_batch_size: {cfg.micro_batch_size}` and "
        f"`sequence_len: {cfg.sequence_len}`. Checkpoints in {cfg.output_dir} are whole. {advise(cfg)} "
        f"The library said: {first_line(error)}"
    )


def advise(cfg: DictDefault) -> str:
    """What to write so that a run needs less memory."""
    try:
        return f"Try, one after the other: {name_remedies(cfg)}."
    except Exception as error:  # noqa: BLE001 - advice must not hide the error; a model may lack what the forecast reads
        LOG.info(f"The memory of this run could not be forecast: {error}")
        return "See which keys make a run smaller: `axolotl plan CONFIG --memory GIB`."


def note_raising_callback(cfg: DictDefault, trainer: Any, error: Exception) -> None:
    """Add to an error that came out of a callback which one it was, and how to go on."""
    where = None if isinstance(error, AxolotlError) else find_raising_callback(error)
    if where is not None:
        error.add_note(
            f"Raised by the callback {where} at step {trainer.state.global_step}. Checkpoints in {cfg.output_dir} are whole; go on "
            "with `auto_resume_from_checkpoints: true` when it is mended."
        )


def find_raising_callback(error: BaseException) -> str | None:
    """`package.module.Class.on_step_end` of the trainer callback that an error came out of; None when it was not one."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code is CallbackHandler.call_event.__code__:
            names = frame.tb_frame.f_locals
            kind = type(names["callback"])
            return f"{kind.__module__}.{kind.__qualname__}.{names['event']}"
        frame = frame.tb_next
    return None
