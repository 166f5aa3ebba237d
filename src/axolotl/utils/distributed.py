"""What ranks say to each other. Every function also works in a single process, where it does the obvious thing.

Values travel as pickled objects, so an int stays an int. Nothing waits inside a collective while one rank works for
long: `zero_first` polls the rendezvous store, which has no time limit and keeps no GPU busy.
"""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from axolotl.exceptions import AxolotlError

T = TypeVar("T")

POLL_SECONDS = 0.2
DEFAULT_TIMEOUT_SECONDS = 1800

# Number of the next store key; ranks call `zero_first` in the same order, so they count alike.
_turns = itertools.count()


class RankFailed(AxolotlError, RuntimeError):
    """The rank that others waited for failed."""


def init_distributed_state() -> None:
    """Join the process group when a launcher started several processes and nobody joined yet.

    GPU tensors go through NCCL, CPU tensors through gloo. AXOLOTL_NCCL_TIMEOUT is the limit of a collective, in seconds.
    """
    if dist.is_initialized() or get_world_size() == 1:
        return
    timeout = datetime.timedelta(seconds=int(os.environ.get("AXOLOTL_NCCL_TIMEOUT", DEFAULT_TIMEOUT_SECONDS)))
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes"):
        torch.cuda.set_device(get_local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def is_distributed() -> bool:
    """Whether several processes have joined a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_world_size() -> int:
    """Number of processes: of the process group, or as the launcher says."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def get_rank() -> int:
    """Number of this process among all: of the process group, or as the launcher says."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def get_local_rank() -> int:
    """Number of this process on its machine, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the first process of all. Before the process group exists: the first of its machine.

    Returns:
        True in a single process.
    """
    return get_rank() == 0 if is_distributed() else is_local_main_process()


def is_local_main_process() -> bool:
    """Whether this is the first process of its machine."""
    return get_local_rank() == 0


def barrier() -> None:
    """Wait until every process is here. For short waits; see `zero_first` for long ones."""
    if not is_distributed():
        return
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def cleanup_distributed() -> None:
    """Leave the process group, if there is one. Called when training ends, early or not."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def compute_and_broadcast(fn: Callable[[], T], rank: int = 0) -> T:
    """Run `fn` on one rank and give its result to all.

    Args:
        fn: computes a value that can be pickled. No side effects.
        rank: the rank that runs it.

    Raises:
        RankFailed: `fn` raised on that rank (which raises its own error).
    """
    if not is_distributed():
        return fn()
    message: list[Any] = [None]
    error = None
    if get_rank() == rank:
        try:
            message = [(True, fn())]
        except Exception as err:  # noqa: BLE001 - the others must hear of it before it is raised below
            error = err
            message = [(False, f"{type(err).__name__}: {err}")]
    dist.broadcast_object_list(message, src=rank)
    if error is not None:
        raise error
    worked, value = message[0]
    if not worked:
        raise RankFailed(f"rank {rank} failed: {value}")
    return value


def gather_scalar_from_all_ranks(fn: Callable[[], T], world_size: int = 1, rank: int = 0) -> list[T] | None:
    """Run `fn` on all ranks and gather the results on one.

    Args:
        fn: computes a number. No side effects.
        world_size: number of processes; taken from the process group where there is one.
        rank: the rank that gets the results.

    Returns:
        The values in the order of the ranks, on the gathering rank; None elsewhere.
    """
    return gather_from_all_ranks(fn, world_size, rank)


def gather_from_all_ranks(fn: Callable[[], T], world_size: int = 1, rank: int = 0) -> list[T] | None:
    """Run `fn` on all ranks and gather the results on one.

    Args:
        fn: computes a value that can be pickled. No side effects.
        world_size: number of processes; taken from the process group where there is one.
        rank: the rank that gets the results.

    Returns:
        The values in the order of the ranks, on the gathering rank; None elsewhere.
    """
    value = fn()
    if not is_distributed():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if get_rank() == rank else None
    dist.gather_object(value, values, dst=rank)
    return values


def gather_on_all_ranks(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks, on every rank.

    Args:
        value: of this rank; can be pickled.
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def reduce_and_broadcast(fn1: Callable[[], Any], fn2: Callable[[list], T], world_size: int = 1) -> T:
    """Run `fn1` on all ranks, reduce the results with `fn2` on the first, and give the outcome to all.

    Args:
        fn1: computes a value on each rank. No side effects.
        fn2: takes the list of values, in the order of the ranks.
        world_size: number of processes; taken from the process group where there is one.
    """
    values = gather_from_all_ranks(fn1, world_size)
    return compute_and_broadcast(lambda: fn2(values or []))


def broadcast_dict(vals: dict) -> dict:
    """The first rank's `vals`, on every rank."""
    return compute_and_broadcast(lambda: vals)


@contextmanager
def zero_first(is_main: bool) -> Iterator[None]:
    """Run the wrapped context on the first rank, then on the others.

    The others poll; they may wait for hours. If the first fails, they raise too, instead of waiting on.

    Args:
        is_main: whether this is the first rank. All ranks enter, in the same order.

    Raises:
        RankFailed: on the other ranks, when the first raised.
    """
    if not is_distributed():
        yield
        return
    turn = f"axolotl/zero_first/{next(_turns)}"
    if is_main:
        with _announced(turn):
            yield
    else:
        _wait_for(turn)
        yield


@contextmanager
def zero_only() -> Iterator[bool]:
    """Say whether this is the first rank: `with zero_only() as first:` and `if first:` inside. Nobody waits."""
    yield is_main_process()


@contextmanager
def _announced(turn: str) -> Iterator[None]:
    """Tell the waiting ranks how the context ended."""
    try:
        yield
    except BaseException as err:
        _store().set(turn, f"{type(err).__name__}: {err}")
        raise
    _store().set(turn, "done")


def _wait_for(turn: str) -> None:
    store = _store()
    while not store.check([turn]):
        time.sleep(POLL_SECONDS)
    outcome = store.get(turn).decode()
    if outcome != "done":
        raise RankFailed(f"rank 0 failed while this rank waited for it: {outcome}")


def _store() -> dist.Store:
    """The key-value store of the rendezvous, which every rank is connected to for as long as the process group lives."""
    return dist.distributed_c10d._get_default_store()
