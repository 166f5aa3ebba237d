"""`get_logger`: a logger that speaks once per machine unless told otherwise."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import MutableMapping
from typing import Any


class RankLogger(logging.LoggerAdapter):
    """Drops records of ranks other than the first. `main_process_only=False` lets every rank speak."""

    def log(self, level: int, msg: object, *args: Any, main_process_only: bool = True, **kwargs: Any) -> None:
        if main_process_only and os.environ.get("LOCAL_RANK", "0") != "0":
            return
        kwargs.setdefault("stacklevel", 2)
        super().log(level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, kwargs

    @functools.lru_cache(maxsize=512)  # noqa: B019 - loggers live as long as the process
    def warning_once(self, msg: str) -> None:
        """Warn, the first time this message is given."""
        self.warning(msg)


@functools.cache
def get_logger(name: str, log_level: str | None = None) -> RankLogger:
    """The logger of a module: `LOG = get_logger(__name__)`."""
    logger = logging.getLogger(name)
    if log_level:
        logger.setLevel(log_level.upper())
    return RankLogger(logger, {})
