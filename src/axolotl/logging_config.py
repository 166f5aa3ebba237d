"""Logging for every command: axolotl's records at INFO, anybody else's at WARNING but for known noise, on standard error."""

from __future__ import annotations

import logging
import logging.config
import os
import sys
import warnings

_COLORS = {"DEBUG": "36", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


# What libraries say while they are imported or used as intended, about things that no user of this program can act on:
# logger -> how the message starts.
NOISE: dict[str, tuple[str, ...]] = {
    # transformers imports torchao and bitsandbytes wherever they are installed, whether the run uses them or not.
    "torchao": ("Failed to load ",),
    "torchao.kernel.intmm": ("Warning: Detected no triton",),
    "torch.utils._pytree": ("<enum ",),
    # At every layer of every step of an 8-bit model.
    "bitsandbytes.autograd._functions": ("MatMul8bitLt: inputs will be cast",),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # Files that cannot be read end in an error of ours, which names the dataset and the cause.
    "datasets.packaged_modules.json.json": ("Failed to load JSON",),
    "datasets.packaged_modules.csv.csv": ("Failed to read file",),
    "datasets.packaged_modules.parquet.parquet": ("Failed to read ",),
}
# The same for `warnings`: (how the message starts, as a regular expression; its category).
NOISE_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),  # peft asks transformers by the old name
    # At every checkpoint; how many rows the embedding has is one of the choices that are shown.
    ("Setting `save_embedding_layers` to `True` as the embedding layer has been resized", UserWarning),
)


class NoiseFilter(logging.Filter):
    """Drops the records that `NOISE` lists for a logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(NOISE.get(record.name, ()))


class AxolotlOrWarnErrorFilter(logging.Filter):
    """Lets through WARNING and above (LOG_LEVEL overrides), and axolotl's own records from INFO (AXOLOTL_LOG_LEVEL)."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.other_level = _level("LOG_LEVEL", logging.WARNING)
        self.axolotl_level = _level("AXOLOTL_LOG_LEVEL", logging.INFO)

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name == "axolotl" or record.name.startswith("axolotl.")
        return record.levelno >= (self.axolotl_level if ours else self.other_level)


class AxolotlLogger(logging.Logger):
    """A logger that filters what does not come from axolotl."""

    def __init__(self, name: str, level: int = logging.NOTSET):
        super().__init__(name, level)
        if not name.startswith("axolotl"):
            self.addFilter(AxolotlOrWarnErrorFilter())


class ColorfulFormatter(logging.Formatter):
    """Colours the level on a terminal; names the rank when there are several processes."""

    def format(self, record: logging.LogRecord) -> str:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        record.rank = rank
        record.rank_fmt = f" [RANK:{rank}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        text = super().format(record)
        if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
            return f"\033[{_COLORS.get(record.levelname, '0')}m{text}\033[0m"
        return text


class StandardErrorHandler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is when a record comes, also after a tee or a test has replaced it."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def _level(variable: str, default: int) -> int:
    value = logging.getLevelName(os.environ.get(variable, "").upper())
    return value if isinstance(value, int) else default


DEFAULT_LOGGING_CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "colorful": {
            "()": ColorfulFormatter,
            "format": "[%(asctime)s] [%(levelname)s] [%(name)s]%(rank_fmt)s %(message)s",
            "datefmt": "%Y-%m-%d %H:%M:%S",
        },
    },
    "filters": {"ax_or_warn": {"()": AxolotlOrWarnErrorFilter}, "noise": {"()": NoiseFilter}},
    "handlers": {
        "console": {
            "()": StandardErrorHandler,
            "formatter": "colorful",
            "filters": ["ax_or_warn"],
        },
    },
    "loggers": {
        "axolotl": {
            "handlers": ["console"],
            "level": os.environ.get("AXOLOTL_LOG_LEVEL", "INFO").upper(),
            "propagate": False,
        },
        **{name: {"filters": ["noise"]} for name in NOISE},
    },
    "root": {"handlers": ["console"], "level": os.environ.get("LOG_LEVEL", "WARNING").upper()},
}


def configure_logging() -> None:
    """Configure with default logging. Safe to call more than once."""
    logging.config.dictConfig(DEFAULT_LOGGING_CONFIG)
    for message, category in NOISE_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
