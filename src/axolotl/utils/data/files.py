"""Local files as rows: which files an entry of `datasets` means, what reads them, and which of their rows `split` takes.

JSON is read by `json_lines`, exactly as it is written; everything else by `datasets`. Archives are unpacked first.
"""

from __future__ import annotations

import glob
import os
import tarfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.packaged_modules import _EXTENSION_TO_MODULE, _PACKAGED_DATASETS_MODULES
from pandas.errors import ParserWarning
from pyarrow import parquet

from axolotl.exceptions import DatasetError
from axolotl.utils.data import json_lines
from axolotl.utils.data.compressed import check_compression, check_whole, naming_damaged
from axolotl.utils.dict import DictDefault
from axolotl.utils.temporary import temporary_folder

# In a CSV file only an empty cell is nothing: "NA", "null" and "None" are words. A row with more cells than the header has
# names is wrong: without `index_col` every cell of the file would move to the name of another column.
CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""], "index_col": False}

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", CSV),
    ".tsv": ("csv", {**CSV, "sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
    ".text": ("text", {}),
    ".md": ("text", {}),
}
"""File extension -> reader of `datasets` and its arguments. A compression suffix is taken off first."""

READER_NAMES = frozenset(reader for reader, _ in READERS.values())
"""Values of `path` that name a reader and no dataset: the files are those of `data_files`."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

NO_ROWS = "corresponds to no data"
"""What `datasets` says of files in which it found no row."""

FILL_IT = "Write rows into it, or take the dataset out of the config."

MOST_NAMES = 5
MOST_OTHER_FILES = 20_000
"""A folder with more files and folders than this that hold no rows is not meant as a dataset."""

ABOUT_DATA = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"})
"""Names of files that describe data and hold none."""


def names_reader(config: DictDefault) -> bool:
    """Whether `path` is a reader such as `json`, and `data_files` names local files."""
    names = file_names(config) if config.data_files else []
    return str(config.path) in READER_NAMES and not any("://" in name for name in names)


def named_files(config: DictDefault) -> list[Path] | None:
    """The local files that `path` and `data_files` name; None for a whole folder and for what is not here.

    Raises:
        DatasetError: `data_files` names one that does not exist.
    """
    path = Path(os.path.expanduser(str(config.path)))
    # `os.path` says no to what can be no path, such as a name of a thousand letters; `Path` raises.
    if os.path.isdir(path):
        return find_files(path, file_names(config)) if config.data_files else None
    if os.path.isfile(path):
        return [path]
    if names_reader(config):
        if not config.data_files:
            raise DatasetError(f"dataset `path: {config.path}` names a reader and no data. Name files in `data_files`.")
        return find_files(Path(), file_names(config))
    return None


def file_names(config: DictDefault) -> list[str]:
    """`data_files` as a list. Of a mapping from splits to files, the files of `split`.

    Raises:
        DatasetError: the mapping has no such split.
    """
    files = config.data_files
    if isinstance(files, Mapping):
        split = split_name(config)
        if split not in files:
            raise DatasetError(
                f"dataset `path: {config.path}`: `data_files` has no files for `split: {split}`; it has: {', '.join(files)}."
            )
        files = files[split]
    return [str(name) for name in files] if isinstance(files, (list, tuple)) else [str(files)]


def split_name(config: DictDefault) -> str:
    """`train` of `split: train[:10%]`."""
    return (config.split or "train").partition("[")[0]


def split_of_files(config: DictDefault) -> str:
    """`split` where the files are only those of one split, for which `datasets` has one name: `train`."""
    split = config.split or "train"
    return "train" + split.removeprefix(split_name(config)) if isinstance(config.data_files, Mapping) else split


def find_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Files by name, in a folder or else in the working directory. `*` and `**` stand for several.

    Raises:
        DatasetError: a name finds nothing.
    """
    found: list[Path] = []
    for name in names:
        pattern = os.path.expanduser(name)
        for root in (folder, Path()):
            matches = sorted(glob.glob(str(root / pattern), recursive=True)) or [str(root / pattern)]
            matches = [match for match in matches if os.path.isfile(match)]
            if matches:
                break
        else:
            raise DatasetError(
                f"dataset file {folder / pattern} does not exist. Check `path` and `data_files` (seen from {Path.cwd()})."
            )
        found += [Path(match) for match in matches if Path(match) not in found]
    return found


def files_of_folder(folder: Path, config: DictDefault) -> list[Path]:
    """The files of rows directly in a folder, all of one kind.

    Raises:
        DatasetError: they are of several kinds, and `ds_type` does not choose one.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and _is_data(file.name))
    files = [file for file in files if file.suffix != ".md"] or files  # notes beside the data
    kinds = {kind for file in files if (kind := kind_of(file.name)) is not None}
    if config.ds_type:
        wanted = _reader_of_type(config)[0]
        return [file for file in files if kind_of(file.name) == wanted]
    if len(kinds) > 1:
        raise DatasetError(
            f"dataset `path: {folder}` holds files of several kinds ({', '.join(sorted(kinds))}). Name those to read under "
            "`data_files`, or write `ds_type`."
        )
    return files


def check_folder(folder: Path) -> None:
    """Raise for a folder without rows, and for one that nobody means, such as `/` or a home, before all of it is read.

    Raises:
        DatasetError: there are no files of rows, at any depth, or far too many others.
    """
    num_data = num_others = 0
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found = sum(Path(name).suffix.lower() in _EXTENSION_TO_MODULE or may_hold_rows(name) for name in names)
        num_data += found
        num_others += len(names) - found + len(folders)
        if num_others > MOST_OTHER_FILES:
            raise DatasetError(
                f"dataset `path: {folder}` is a folder with more than {MOST_OTHER_FILES:,} files and folders that hold no rows. Write "
                "the folder of the dataset itself, or name its files in `data_files`."
            )
    if not num_data:
        raise DatasetError(
            f"dataset `path: {folder}` is a folder without files of rows (json, csv, parquet, arrow, text). Check `path`, or put the "
            "files there."
        )


def may_hold_rows(name: str) -> bool:
    """Whether a file is one of rows, or an archive of such, by its name."""
    return kind_of(name) is not None or name.lower().endswith(ARCHIVES)


def _is_data(name: str) -> bool:
    return kind_of(name) is not None and name not in ABOUT_DATA and not name.startswith((".", "_"))


def kind_of(name: str) -> str | None:
    """The reader for a file name, or None when its extension says nothing."""
    reader = reader_of(name)
    return reader[0] if reader else None


def reader_of(name: str) -> tuple[str, dict[str, Any]] | None:
    """The reader for a file name and its arguments, by its extension."""
    name = name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return READERS.get(Path(name).suffix)


def reader_for(name: str, config: DictDefault) -> tuple[str, dict[str, Any]]:
    """The reader for a file: that of `ds_type`, or by its extension, or JSON.

    Raises:
        DatasetError: nothing reads `ds_type`.
    """
    by_name = reader_of(name)
    if not config.ds_type:
        return by_name or ("json", {})
    wanted = _reader_of_type(config)
    return by_name if by_name and by_name[0] == wanted[0] else wanted


def _reader_of_type(config: DictDefault) -> tuple[str, dict[str, Any]]:
    kind = str(config.ds_type).lower()
    if f".{kind}" in READERS:
        return READERS[f".{kind}"]
    if kind not in _PACKAGED_DATASETS_MODULES:
        raise DatasetError(
            f"`ds_type: {config.ds_type}` of dataset `path: {config.path}` is unknown. Write json, csv, parquet, arrow or text."
        )
    return kind, {}


def open_files(files: Sequence[Path], config: DictDefault, common: dict[str, Any]) -> Dataset | IterableDataset:
    """Open local files of one kind.

    Args:
        files: at least one.
        config: `ds_type`, `path` for messages.
        common: `split`, `streaming` and `cache_dir`, as for `load_dataset`.

    Raises:
        DatasetError: they are of several kinds, or hold no rows.
    """
    files = [inner for file in files for inner in unpack(file, common["cache_dir"])]
    if all(file.stat().st_size == 0 for file in files):
        raise DatasetError(f"dataset file {_names(files)} is empty. {FILL_IT}")
    readers = [reader_for(file.name, config) for file in files]
    if any(reader != readers[0] for reader in readers):
        kinds = sorted({file.suffix for file in files})
        raise DatasetError(
            f"`data_files` of dataset `path: {config.path}` are of several kinds ({', '.join(kinds)}). Write an entry for each."
        )
    reader, arguments = readers[0]
    if reader == "json" and json_lines.can_read(files):
        return _read_json(files, config, common)
    files = [file for file in files if _holds_rows(file, reader)]
    if not files:
        raise DatasetError(f"dataset `path: {config.path}` holds no rows. {FILL_IT}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # cells would be lost
            with naming_damaged(lambda: [(file, str(file)) for file in files]):
                return load_dataset(reader, data_files=[str(file) for file in files], **arguments, **common)
    except ValueError as error:
        if NO_ROWS not in str(error):
            raise
        where = f" in `split: {common['split']}`" if "[" in common["split"] else ""
        raise DatasetError(f"dataset file {_names(files)} holds no rows{where}. {FILL_IT}") from error


def _holds_rows(file: Path, reader: str) -> bool:
    """Whether a file is worth opening. One part of several may be empty; the readers of `datasets` stumble over it."""
    if reader != "parquet":
        return file.stat().st_size > 0
    try:
        return parquet.read_metadata(file).num_rows > 0
    except pa.ArrowException as error:
        raise DatasetError(
            f"dataset file {file} cannot be read: it is damaged, cut short or no parquet file ({error}). Fetch or write it again."
        ) from error


def _names(files: Sequence[Path]) -> str:
    names = [str(file) for file in files[:MOST_NAMES]]
    return ", ".join(names) + (f" and {len(files) - MOST_NAMES:,} more" if len(files) > MOST_NAMES else "")


def _read_json(files: Sequence[Path], config: DictDefault, common: dict[str, Any]) -> Dataset | IterableDataset:
    if common["streaming"]:
        check_split(common["split"], ["train"], str(config.path))
        return json_lines.stream([str(file) for file in files])
    try:
        rows = json_lines.read(files, common["cache_dir"])
    except DatasetError as error:
        if config.ds_type or reader_of(files[0].name):
            raise
        raise DatasetError(
            f"{error} Its extension names no kind of data, so it was read as JSON. Write `ds_type` for another."
        ) from error
    return take_split(DatasetDict(train=rows), common["split"], str(config.path))


def open_saved(
    path: str, config: DictDefault, streaming: bool, storage_options: dict[str, Any] | None = None
) -> Dataset | IterableDataset:
    """Open a folder written by `save_to_disk`, here or behind an URL. One without splits has whichever `split` names."""
    loaded = load_from_disk(path, storage_options=storage_options)
    parts = loaded if isinstance(loaded, DatasetDict) else DatasetDict({split_name(config): loaded})
    rows = take_split(parts, config.split or "train", str(config.path))
    return rows.to_iterable_dataset() if streaming else rows


def unpack(file: Path, cache_dir: str | None) -> list[Path]:
    """The files of rows in an archive; any other file itself.

    Raises:
        DatasetError: the archive cannot be opened, holds no rows, or is cut short.
        MissingExtraError: a compressed file needs a package that is not installed.
    """
    check_compression(str(file))
    if file.suffix.lower() == ".zst":
        check_whole(file)  # the readers of `datasets` would take its end for the end of the data
    if not file.name.lower().endswith(ARCHIVES):
        return [file]
    folder = temporary_folder("unpacked-", cache_dir)
    try:
        if file.suffix.lower() == ".zip":
            with zipfile.ZipFile(file) as archive:
                archive.extractall(folder)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError, OSError) as error:
        raise DatasetError(f"dataset file {file} cannot be unpacked: {error}") from error
    inner = sorted(inner for inner in folder.rglob("*") if inner.is_file() and _is_data(inner.name))
    inner = [file for file in inner if file.suffix != ".md"] or inner
    if not inner:
        raise DatasetError(f"dataset file {file} holds no files of rows (json, csv, parquet, arrow, text).")
    return inner


def stream_json(urls: Sequence[str], options: Mapping[str, Any]) -> IterableDataset | None:
    """The rows of JSON files of a store, read as they are asked for; None for what only `datasets` reads.

    Args:
        urls: the files, all JSON.
        options: for their file system.

    Raises:
        MissingExtraError: a compressed file needs a package that is not installed.
    """
    if any(url.lower().endswith(ARCHIVES) for url in urls):
        return None
    for url in urls:
        check_compression(url)
    # One of thousands says how all are written; reading a line of each would take minutes.
    return json_lines.stream(urls, options) if json_lines.can_read(urls[:1], options) else None


def take_split(loaded: DatasetDict, split: str, path: str) -> Dataset:
    """The rows of a split, also of parts such as `train[:10%]` and `train+test`, from data that is already open.

    Raises:
        DatasetError: the split is not there; names those that are.
    """
    if split in loaded:
        return loaded[split]
    if split == "all":
        return concatenate_datasets(list(loaded.values()))
    check_split(split, [str(name) for name in loaded], path)
    try:
        pieces = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in loaded.items()})
    except (ValueError, AssertionError) as error:
        raise DatasetError(
            f"dataset `path: {path}` has no rows for `split: {split}`: {error}. Write `train[:100]`, `train[:10%]` or "
            "`train+test`, say."
        ) from error
    parts = []
    for piece in pieces:
        rows = loaded[piece.splitname]
        start, stop = piece.from_ or 0, len(rows) if piece.to is None else piece.to
        parts.append(rows.select(range(start, stop) if start < stop else []))
    if not any(map(len, parts)):
        sizes = ", ".join(f"{name} has {len(rows):,}" for name, rows in loaded.items())
        raise DatasetError(f"dataset `path: {path}`: `split: {split}` takes no rows; {sizes}.")
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def check_split(split: str, names: Sequence[str], path: str) -> None:
    """Raise when `split` is of other splits than there are."""
    wanted = [part.strip().partition("[")[0] for part in split.split("+")]
    missing = [name for name in wanted if name not in (*names, "all")]
    if missing:
        raise DatasetError(
            f"dataset `path: {path}` has no split {missing[0]!r}. Write `split:` as one of: {', '.join(names)}."
        )
