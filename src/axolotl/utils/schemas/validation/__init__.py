"""Checks across groups of the config: each a plain function whose name is a sentence.

Comes in: the config as written, renamed and typed, without defaults, so that a key that was left open reads as None. A
check raises `ConfigError`, warns, or fills what was left open and notes why. To add one: a function in the module of its
subject, its row in that module's `CHECKS`, one test. They run in the order of the lists: what fills comes before what reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from axolotl.exceptions import ConfigError, MissingExtraError, NotBuiltError
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.validation import (
    attention,
    datasets,
    distributed,
    memory,
    model,
    optimizer,
    peft,
    precision,
    rl,
    training,
)

CHECKS: tuple[Callable[[DictDefault], None], ...] = (
    *attention.CHECKS,
    *datasets.CHECKS,
    *training.CHECKS,
    *model.CHECKS,
    *precision.CHECKS,
    *memory.CHECKS,
    *optimizer.CHECKS,
    *rl.CHECKS,
    *distributed.CHECKS,
    *peft.CHECKS,
)


class _RefusedKey(Exception):
    """A check reads a key whose value was refused already."""


def run_checks(cfg: DictDefault, bad_keys: Iterable[str] = ()) -> list[str]:
    """Run every check and collect what they refuse.

    Args:
        cfg: the config as written, renamed and typed; filled in place.
        bad_keys: keys whose values were refused already. They are not in `cfg`, and a check that reads one is skipped.

    Returns:
        One message per problem.
    """
    view = _without(cfg, frozenset(bad_keys)) if bad_keys else cfg
    problems = []
    for check in CHECKS:
        try:
            check(view)
        except _RefusedKey:
            continue
        except ConfigError as err:
            problems += err.problems
        except (NotBuiltError, MissingExtraError) as err:
            problems.append(str(err))
    return problems


def _without(cfg: DictDefault, bad_keys: frozenset[str]) -> DictDefault:
    """A copy in which reading one of `bad_keys` raises `_RefusedKey`."""

    class Readable(DictDefault):
        def __missing__(self, key: Any) -> None:
            if key in bad_keys:
                raise _RefusedKey(key)

        def get(self, key: Any, default: Any = None) -> Any:
            return self[key] if key in self or key in bad_keys else default

    return Readable({key: value for key, value in cfg.items() if key not in bad_keys})
