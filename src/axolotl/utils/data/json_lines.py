"""Reads JSON rows exactly as written.

Arrow's own JSON reader gives every struct the union of all keys, reorders them, turns strings that look like dates into
dates, and gives up when a field is text in one row and a list in another. Training text must be what the file says. So rows
are parsed one by one; texts, numbers and lists of them become Arrow columns, everything else is kept as JSON and comes back
as the same Python object.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from datasets.arrow_writer import ArrowWriter
from datasets.features.features import register_feature

from axolotl.exceptions import DatasetError
from axolotl.utils.data.compressed import open_uncompressed
from axolotl.utils.temporary import temporary_folder

ROWS_PER_BLOCK = 10_000
BYTES_PER_BLOCK = 32 << 20
INT64 = range(-(2**63), 2**63)


@dataclass
class ExactJson(datasets.Json):
    """A column of JSON texts that come back as they were written.

    That of `datasets` reads with a parser that gets the last digits of long numbers wrong and fails on large ones.
    """

    _type: str = field(default="ExactJson", init=False, repr=False)

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        return None if example_data is None else json.loads(example_data)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # "experimental": there is no other way to name a column's type
    register_feature(ExactJson, "ExactJson")

# Kinds of column, from what its values are. "null" and "list_null" join with what later rows bring.
KINDS: dict[str, Any] = {
    "null": Value("null"),
    "string": Value("string"),
    "bool": Value("bool"),
    "int64": Value("int64"),
    "float64": Value("float64"),
    "list_null": [Value("null")],
    "list_int64": [Value("int64")],
    "list_string": [Value("string")],
}


File = Path | str
"""A local file, or the URL of one."""

Options = Mapping[str, Any]
"""What the file system of an URL is told, such as its credentials."""


def can_read(files: Sequence[File], options: Options | None = None) -> bool:
    """Whether the files are meant as rows: one per line, or one list. An object over many lines is left to `datasets`."""
    return all(_holds_rows(file, options) for file in files)


def _holds_rows(file: File, options: Options | None) -> bool:
    head = _head(file, options)
    if not head.startswith(b"{"):
        return True  # a list, or nothing that can be read: `read` says which line is wrong
    line = head.partition(b"\n")[0].rstrip()
    return line.endswith(b"}") or len(line) >= (1 << 16) - 4


def _head(file: File, options: Options | None = None) -> bytes:
    """The first 64 KB after byte order mark and blanks. Opened by itself: some compressions cannot be read backwards."""
    with open_uncompressed(file, options) as stream:
        return stream.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")


def iter_rows(files: Sequence[str], options: Options | None = None) -> Iterator[dict[str, Any]]:
    """The rows of JSON files one by one, for a stream.

    Args:
        files: paths or URLs.
        options: for the file system of the URLs.

    Raises:
        DatasetError: a line is no JSON object; names file and line.
    """
    for file in files:
        for row, _ in _rows(file, options):
            yield row


def stream(files: Sequence[str], options: Options | None = None) -> IterableDataset:
    """As `iter_rows`, as a dataset whose pieces are the files."""
    return IterableDataset.from_generator(iter_rows, gen_kwargs={"files": list(files), "options": dict(options or {})})


def read(files: Sequence[Path], cache_dir: str | None = None) -> Dataset:
    """The rows of JSON files.

    Args:
        files: JSON lines, or one JSON list of rows; may be compressed.
        cache_dir: where the Arrow file is written; a temporary folder by default.

    Raises:
        DatasetError: a line is no JSON object; names file and line.
    """
    folder = temporary_folder("json-", cache_dir)
    kinds: dict[str, str] = {}
    while not _write(files, kinds, Path(folder) / "rows.arrow"):
        pass  # a later row widened a column; kinds can only widen, so this ends
    return Dataset.from_file(str(Path(folder) / "rows.arrow"))


def _write(files: Sequence[Path], kinds: dict[str, str], target: Path) -> bool:
    """Write all rows. False when a row did not fit `kinds`, which is then wider. Kinds grow freely before the first block."""
    writer: ArrowWriter | None = None
    num_rows = 0
    for block in _blocks(files):
        num_rows += len(block)
        before = dict(kinds)
        columns = {
            name: [row.get(name) for row in block] for name in {**kinds, **{key: 0 for row in block for key in row}}
        }
        for name in filter(lambda name: "\0" in name, columns):
            row = num_rows - len(block) + next(index for index, row in enumerate(block) if name in row)
            raise DatasetError(f"row {row}: the name of field {_short(name)} holds a zero byte. Rename the field.")
        for name, values in columns.items():
            kinds[name] = join_kinds(kinds.get(name, "null"), kind_of_column(values))
        if writer is not None and kinds != before:
            writer.close()
            return False
        features = Features({name: KINDS[kind] if kind in KINDS else ExactJson() for name, kind in kinds.items()})
        if writer is None:
            writer = ArrowWriter(features=features, path=str(target))
        arrays = []
        for name, kind in kinds.items():
            try:
                arrays.append(_array(columns[name], kind, features.arrow_schema.field(name).type))
            except UnicodeEncodeError as error:
                raise _half_character(columns[name], name, num_rows - len(block)) from error
        writer.write_table(pa.Table.from_arrays(arrays, schema=features.arrow_schema))
    if writer is None or not kinds:
        raise DatasetError(
            f"dataset file {', '.join(map(str, files[:5]))} holds no rows with fields. Write rows into it, or take the dataset out of "
            "the config."
        )
    writer.finalize()
    return True


def _array(values: list[Any], kind: str, arrow_type: pa.DataType) -> pa.Array:
    if kind in KINDS:
        return pa.array(values, type=arrow_type)
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.ExtensionArray.from_storage(arrow_type, pa.array(texts, type=arrow_type.storage_type))


def _half_character(values: list[Any], column: str, first_row: int) -> DatasetError:
    def is_whole(value: Any) -> bool:
        return not any("\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False))

    row = first_row + next((index for index, value in enumerate(values) if not is_whole(value)), 0)
    return DatasetError(
        f"row {row}, field `{column}`: the text holds half of a character (a lone surrogate, such as \\ud800)."
    )


def kind_of_column(values: list[Any]) -> str:
    """The narrowest kind that holds all values."""
    types = set(map(type, values)) - {type(None)}
    if not types:
        return "null"
    if len(types) > 1:
        return "json"
    only = types.pop()
    if only is str:
        return "string"
    if only is bool:
        return "bool"
    if only is float:
        return "float64"
    if only is int:
        return "int64" if all(value is None or value in INT64 for value in values) else "json"
    if only is not list:
        return "json"
    inner = set().union(*(set(map(type, value)) for value in values if value))
    if not inner:
        return "list_null"
    if inner == {str}:
        return "list_string"
    if inner == {int} and all(min(value) in INT64 and max(value) in INT64 for value in values if value):
        return "list_int64"
    return "json"


def join_kinds(one: str, other: str) -> str:
    """The narrowest kind that holds both."""
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    if one.startswith("list_") and other.startswith("list_") and "list_null" in (one, other):
        return other if one == "list_null" else one
    return "json"


def _blocks(files: Sequence[Path]) -> Iterator[list[dict[str, Any]]]:
    """Rows in blocks that bound memory."""
    block: list[dict[str, Any]] = []
    size = 0
    for file in files:
        for row, row_bytes in _rows(file):
            block.append(row)
            size += row_bytes
            if len(block) >= ROWS_PER_BLOCK or size >= BYTES_PER_BLOCK:
                yield block
                block, size = [], 0
    if block:
        yield block


def _rows(file: File, options: Options | None = None) -> Iterator[tuple[dict[str, Any], int]]:
    is_list = _head(file, options).startswith(b"[")
    with open_uncompressed(file, options) as stream:
        if is_list:
            yield from _list_rows(file, stream.read())
            return
        for number, line in enumerate(stream, 1):
            text = line.lstrip(b"\xef\xbb\xbf") if number == 1 else line
            if not text.isspace():
                yield _parse(text, file, f"line {number}"), len(text)


def _list_rows(file: File, content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"dataset file {file} is not valid JSON: {error}") from error
    size = len(content) // max(len(rows), 1)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DatasetError(f"dataset file {file}, row {number}: expected an object of fields, got {_short(row)}.")
        yield row, size


def _parse(line: bytes, file: File, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"dataset file {file}, {where} is not UTF-8 text ({error.reason}, byte {error.start}). Save the file as UTF-8. "
            f"The line starts {_short(line)}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"dataset file {file}, {where} is not valid JSON: {error}. The line starts {_short(line)}."
        ) from error
    if not isinstance(row, dict):
        raise DatasetError(f"dataset file {file}, {where}: expected an object of fields, got {_short(row)}.")
    return row


def _short(value: Any) -> str:
    text = value.decode(errors="replace").strip() if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= 60 else text[:57] + "...")
