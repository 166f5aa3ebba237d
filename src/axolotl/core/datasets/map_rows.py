"""Rows through a function into one Arrow dataset, a block at a time, in several processes where that pays.

`Dataset.map` turns every value into Arrow one by one and sends the function to its processes as a pickle, tokenizer and all.
Here a block of token lists becomes Arrow in a few calls, and processes are forked: they have the function already. Each takes
the next part of the rows when it is done with one, so that none waits for one that is slower, and writes it to a file of its
own: memory holds one block per process however many rows there are.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets
from datasets.arrow_writer import ArrowWriter, OptimizedTypedSequence
from datasets.utils import tqdm

from axolotl.exceptions import DatasetError
from axolotl.utils.garbage import collecting_only_new
from axolotl.utils.processes import end_with_parent
from axolotl.utils.temporary import temporary_folder

BLOCK_ROWS = 1000

PARTS_PER_PROCESS = 8
"""Into how many parts the rows of a process are cut, on average: what the last one to finish can be late by."""

MAX_PARTS = 1024
"""Parts whose numbers always fit into a pipe, however little the system gives it."""

TOKEN_TYPES = {"input_ids": pa.int32(), "labels": pa.int32(), "attention_mask": pa.int8()}
"""Columns of lists with one integer per token, and what holds such an integer."""

TOKEN_CODES = {pa.int32(): "i", pa.int8(): "b"}
"""The codes that Python's `array` has for the types."""

Convert = Callable[[dict[str, list], list[int]], Mapping[str, Any]]
"""A block of rows (a dict of lists) and their numbers into a block of new rows, not always as many."""


def can_fork() -> bool:
    """Whether processes can be forked. On macOS libraries that started threads do not survive it."""
    return "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"


def map_rows(
    dataset: Dataset, convert: Convert, *, num_proc: int = 1, keep_in_memory: bool = False, desc: str | None = None
) -> Dataset:
    """A dataset of what `convert` makes of the rows, in their order.

    Args:
        dataset: the rows.
        convert: what to do with a block of them.
        num_proc: processes that share the rows. One where processes cannot be forked.
        keep_in_memory: do not write to a file. One process then.
        desc: what the progress bar says.

    Raises:
        DatasetError: a process died.
        Exception: what `convert` raised; of several processes the first that failed.
    """
    with collecting_only_new():
        return _map_rows(dataset, convert, num_proc, keep_in_memory, desc)


def _map_rows(dataset: Dataset, convert: Convert, num_proc: int, keep_in_memory: bool, desc: str | None) -> Dataset:
    if keep_in_memory:
        tables = [to_table(block) for block in _converted(dataset, convert, range(len(dataset)), desc)]
        tables = [table for table in tables if table.num_rows] or tables or [to_table({})]
        return concatenate_datasets([Dataset(table) for table in tables]) if len(tables) > 1 else Dataset(tables[0])
    num_blocks = -(-len(dataset) // BLOCK_ROWS)
    num_proc = min(num_proc, num_blocks) if can_fork() else 1
    folder = temporary_folder("rows-")
    if num_proc <= 1:
        _write(_converted(dataset, convert, range(len(dataset)), desc), folder / "0.arrow")
        return Dataset.from_file(str(folder / "0.arrow"))
    num_parts = min(num_proc * PARTS_PER_PROCESS, num_blocks, MAX_PARTS)
    borders = [min(num_blocks * part // num_parts * BLOCK_ROWS, len(dataset)) for part in range(num_parts + 1)]
    parts_of_rows = {folder / f"{start}.arrow": range(start, stop) for start, stop in itertools.pairwise(borders)}
    _write_in_processes(dataset, convert, parts_of_rows, num_proc, desc)
    parts = [Dataset.from_file(str(file)) for file in parts_of_rows]
    return _joined([part for part in parts if len(part)] or parts[:1])


def _joined(parts: list[Dataset]) -> Dataset:
    """The parts as one dataset. A column that holds whole numbers in one and fractions in another holds fractions."""
    if any(part.features != parts[0].features for part in parts):
        wide = pa.unify_schemas([part.data.schema for part in parts], promote_options="permissive")
        features = Features.from_arrow_schema(wide.remove_metadata())
        parts = [part.cast(features) for part in parts]
    return concatenate_datasets(parts)


def _converted(dataset: Dataset, convert: Convert, rows: range, desc: str | None) -> Iterator[Mapping[str, Any]]:
    with tqdm(total=len(rows), unit=" rows", desc=desc) as bar:
        for numbers in _blocks_of(rows):
            yield convert(dataset[numbers.start : numbers.stop], list(numbers))
            bar.update(len(numbers))


def _write(blocks: Iterator[Mapping[str, Any]], file: Path) -> None:
    """Write blocks to an Arrow file. Later blocks get the types of the first that has rows."""
    writer, empty = None, None
    for block in blocks:
        table = to_table(block)
        if not table.num_rows:
            empty = table if empty is None else empty
            continue
        if writer is None:
            writer = ArrowWriter(features=Features.from_arrow_schema(table.schema), path=str(file))
        writer.write_table(table)
    if writer is None:
        table = to_table({}) if empty is None or not empty.num_columns else empty
        writer = ArrowWriter(features=Features.from_arrow_schema(table.schema), path=str(file))
        writer.write_table(table)
    writer.finalize()
    writer.close()


def to_table(block: Mapping[str, Any]) -> pa.Table:
    """A dict of lists as Arrow. Without columns it is a table of no rows with those that every tokenized row has."""
    block = block or {name: [] for name in TOKEN_TYPES}
    return pa.table({name: _array(name, values) for name, values in block.items()})


def _array(name: str, values: Any) -> pa.Array:
    """A column. Lists of one integer per token take the short way, everything else that of `datasets`."""
    if name in TOKEN_TYPES and _are_int_lists(values):
        lengths = [len(row) for row in values]
        if name == "attention_mask" and all(row.count(1) == len(row) for row in values):
            return _as_lists(np.ones(sum(lengths), dtype=np.int8), lengths)
        tokens = array(TOKEN_CODES[TOKEN_TYPES[name]])
        try:
            for row in values:
                tokens.fromlist(row)  # strict: numpy and Arrow would cut 0.5 to 0 here
        except (TypeError, OverflowError):
            pass  # not only such integers: `datasets` finds a type for the column, or says why there is none
        else:
            return _as_lists(np.frombuffer(tokens, dtype=TOKEN_TYPES[name].to_pandas_dtype()), lengths)
    return pa.array(OptimizedTypedSequence(values, col=name))


def _are_int_lists(values: Any) -> bool:
    """Whether a column looks like lists of integers, from the first value of each."""
    return isinstance(values, list) and all(type(row) is list and (not row or type(row[0]) is int) for row in values)


def _as_lists(tokens: np.ndarray, lengths: list[int]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))


# processes


def _write_in_processes(
    dataset: Dataset, convert: Convert, parts: Mapping[Path, range], num_proc: int, desc: str | None
) -> None:
    context = multiprocessing.get_context("fork")
    numbers, writer = os.pipe()
    os.write(writer, array("i", range(len(parts))))
    os.close(writer)
    pipes: dict[Connection, Any] = {}
    try:
        for _ in range(num_proc):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(dataset, convert, parts, numbers, sender), daemon=True)
            process.start()
            sender.close()
            pipes[receiver] = process
        with tqdm(total=len(dataset), unit=" rows", desc=desc) as bar:
            waiting = set(pipes)
            while waiting:
                for receiver in wait(list(waiting)):
                    said = _hear(receiver, pipes[receiver])
                    if said is None:
                        waiting.discard(receiver)
                    else:
                        bar.update(said)
    finally:
        os.close(numbers)
        for receiver, process in pipes.items():
            if process.is_alive() and sys.exc_info()[0] is not None:
                process.kill()
            process.join()
            receiver.close()


def _hear(receiver: Any, process: Any) -> int | None:
    """Rows that a process has done since it last spoke; None when it is finished. Raises the error that it met."""
    try:
        said = receiver.recv()
    except EOFError:
        process.join()
        raise DatasetError(
            f"a process that tokenizes rows ended with exit code {process.exitcode}. A negative one is a signal; -9 is mostly "
            "the system that ran out of memory. Write a smaller `dataset_num_proc`."
        ) from None
    if isinstance(said, BaseException):
        raise said
    return said


def _work(dataset: Dataset, convert: Convert, parts: Mapping[Path, range], numbers: int, sender: Any) -> None:
    """What a process does: write parts while there are any, tell how many rows are done, or which error it met.

    Args:
        dataset: the rows.
        convert: what to do with a block of them.
        parts: the file of each part, and its rows.
        numbers: a pipe with the numbers of the parts that no process has taken.
        sender: the pipe to the parent.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    end_with_parent()

    def told(block_rows: dict[str, list], numbers: list[int]) -> Mapping[str, Any]:
        block = convert(block_rows, numbers)
        sender.send(len(numbers))
        return block

    try:
        for file, rows in _taken(parts, numbers):
            _write((told(dataset[r.start : r.stop], list(r)) for r in _blocks_of(rows)), file)
        sender.send(None)
    except Exception as error:  # noqa: BLE001 - raised again in the parent
        sender.send(_sendable(error))


def _taken(parts: Mapping[Path, range], numbers: int) -> Iterator[tuple[Path, range]]:
    """The parts that no other process takes. Reading a number takes it out of the pipe, whole: the system sees to that."""
    files = list(parts)
    while number := array("i", os.read(numbers, array("i").itemsize)):
        yield files[number[0]], parts[files[number[0]]]


def _blocks_of(rows: range) -> Iterator[range]:
    for start in range(rows.start, rows.stop, BLOCK_ROWS):
        yield range(start, min(start + BLOCK_ROWS, rows.stop))


def _sendable(error: Exception) -> Exception:
    """The error, or what it says where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - errors of others fail to pickle in ways of their own
        return DatasetError(f"{type(error).__name__}: {error}")
    return error
