"""Every error this package raises on purpose.

Each class is also the standard-library error it stands for, so that `except ValueError` keeps working. A message names
the key as the user wrote it, its value, why it cannot be, and what to write instead. The command line prints the message
alone; `AXOLOTL_DEBUG=1` adds the traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class AxolotlError(Exception):
    """Root of the tree. Raised on purpose, with a message meant for the person at the terminal."""


class ConfigError(AxolotlError, ValueError):
    """The config cannot be run as written.

    Args:
        problems: one message, or all messages of one file. They are shown together.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


def did_you_mean(word: str, known: Iterable[str], *, n: int = 1, cutoff: float = 0.6) -> str:
    """A hint to append to a message: `` Did you mean `lora` or `dora`?``, or nothing where no known word is near.

    Args:
        word: what was written.
        known: what could have been.
        n: how many are named at most.
        cutoff: how alike they must be, from 0 to 1.
    """
    import difflib  # only a message needs it

    near = difflib.get_close_matches(word, list(known), n=n, cutoff=cutoff)
    return f" Did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without blanks around it; the name of its class when it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class NotBuiltError(AxolotlError, NotImplementedError):
    """A key or command that is known but not implemented here yet (see `axolotl._not_built`)."""


class MissingExtraError(AxolotlError, ImportError):
    """An optional package is needed. The message names the extra that installs it.

    Args:
        package: the import name, such as `bitsandbytes`.
        extra: the extra of this package that installs it, such as `bitsandbytes`.
        needed_for: the key and value that need it, such as `` `load_in_4bit: true` ``.
    """

    def __init__(self, package: str, extra: str, needed_for: str):
        super().__init__(
            f"{needed_for} needs the package `{package}`, which is not installed. "
            f"Install it with: pip install 'axolotl[{extra}]'"
        )


class DatasetError(AxolotlError, ValueError):
    """A dataset cannot be read or a row cannot be turned into tokens. Names the dataset, the row index and the field."""


class TokenizerError(AxolotlError, ValueError):
    """The tokenizer lacks something the config asks of it (a template, a pad token, an end-of-turn token)."""


class ModelError(AxolotlError, ValueError):
    """The model cannot be loaded, adapted or merged as asked."""


class CheckpointError(AxolotlError, RuntimeError):
    """A checkpoint is missing, half-written or does not belong to this run."""


class OutputError(AxolotlError, OSError):
    """`output_dir` or another path cannot be written. Names the path and what was not saved."""


class OutOfMemoryError(AxolotlError, RuntimeError):
    """The device ran out of memory. Names the step and the keys that would make the run smaller."""


class TrackerError(AxolotlError, RuntimeError):
    """An experiment tracker cannot be started. Names its key and what it said; raised before anything is trained."""


class TrainingStopped(AxolotlError, RuntimeError):
    """The run stopped itself (non-finite loss, watchdog, signal). What was saved is named in the message."""
