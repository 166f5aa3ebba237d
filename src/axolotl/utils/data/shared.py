"""Sources: finding and opening what `path` of a dataset names.

The order: an URL; a local folder (with `data_files`; saved with `save_to_disk`; any folder of files); a local file; a dataset
of the Hugging Face hub. Everything comes back as a memory-mapped Arrow dataset, so memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from axolotl.exceptions import DatasetError
from axolotl.utils.data import json_lines, remote
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
    ".text": ("text", {}),
    ".md": ("text", {}),
}
"""File extension -> reader of `datasets` and its arguments. A compression suffix is taken off first."""

READER_NAMES = frozenset(reader for reader, _ in READERS.values())
"""Values of `path` that name a reader and no dataset: the files are those of `data_files`."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4")

READ_ERRORS = (DatasetsError, DatasetGenerationError, pa.ArrowException, ValueError, OSError, KeyError, StopIteration)


def datasets_with_name_generator(dataset_configs: Sequence[DictDefault]) -> Iterator[DictDefault]:
    """One config per dataset to load: a list under `name` and `preprocess_shards` stand for several."""
    for config in dataset_configs:
        names = config.name if isinstance(config.name, (list, tuple)) else [config.name]
        for name in names:
            one = DictDefault({**config, "name": name}) if name is not None else config
            if one.preprocess_shards and not one.shards:
                for index in range(int(one.preprocess_shards)):
                    yield DictDefault({**one, "shards": int(one.preprocess_shards), "shards_idx": index})
            else:
                yield one


def load_dataset_with_config(
    dataset_config: DictDefault,
    use_auth_token: bool | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> Dataset | IterableDataset:
    """Open the source of one entry of `datasets`.

    Args:
        dataset_config: `path`, and if given `name`, `split`, `data_files`, `ds_type`, `revision`, `trust_remote_code`.
        use_auth_token: send the stored Hugging Face token.
        streaming: read rows as they are asked for instead of converting the source first.
        cache_dir: where converted files are kept; the cache of `datasets` by default.

    Raises:
        DatasetError: nothing is there, or it cannot be read. Names the path and what to do.
        MissingExtraError: a remote file system needs a package that is not installed.
    """
    path = dataset_config.path
    if not path:
        raise DatasetError("a dataset has no `path`. Write a local file or folder, a name on the hub, or an URL.")
    if dataset_config.trust_remote_code:
        LOG.warning_once(
            f"`trust_remote_code: true` of dataset {path} has no effect: the `datasets` library no longer runs loading scripts."
        )
    try:
        return _open(str(path), dataset_config, use_auth_token, streaming, cache_dir)
    except DatasetError:
        raise
    except DatasetNotFoundError as error:
        raise DatasetError(
            f"dataset `path: {path}` is neither a local file or folder nor found on the Hugging Face hub. Check the spelling; "
            f"for a private or gated dataset log in (`hf auth login`) and write `hf_use_auth_token: true`. ({error})"
        ) from error
    except (ConnectionError, OfflineModeIsEnabled, HTTPError) as error:
        raise DatasetError(
            f"dataset `path: {path}` is no local file or folder, and the Hugging Face hub cannot be reached ({error}). "
            "Check the path and the network, or download the dataset and give its local path."
        ) from error
    except READ_ERRORS as error:
        raise DatasetError(f"dataset `path: {path}` cannot be read: {first_cause(error)}") from error


def first_cause(error: BaseException) -> str:
    """What an error of a reader comes from, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _open(
    path: str, config: DictDefault, use_auth_token: bool | None, streaming: bool, cache_dir: str | None
) -> Dataset | IterableDataset:
    split = config.split or "train"
    common = {"split": split, "streaming": streaming, "cache_dir": cache_dir}
    if path.startswith(("https://", "http://")):
        return _open_files([remote.download(path, cache_dir)], config, common)
    if "://" in path:
        return remote.open_url(path, config, split, common, reader_of)
    local = Path(path).expanduser()
    if local.is_dir():
        return _open_folder(local, config, split, common)
    if local.is_file():
        return _open_files([local], config, common)
    if names_reader(config):
        return _open_files(local_data_files(config), DictDefault({**config, "ds_type": path}), common)
    if _looks_local(path):
        raise DatasetError(f"dataset `path: {path}` does not exist (looked for {local.resolve()}). Check the path.")
    token = True if use_auth_token else None
    files = {"data_files": _as_list(config.data_files)} if config.data_files else {}
    return load_dataset(path, name=config.name, revision=config.revision, token=token, **files, **common)


def _open_folder(folder: Path, config: DictDefault, split: str, common: dict[str, Any]) -> Dataset | IterableDataset:
    if config.data_files:
        return _open_files([folder / name for name in _as_list(config.data_files)], config, common)
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        opened = take_split(load_from_disk(str(folder)), split, str(folder))
        return opened.to_iterable_dataset() if common["streaming"] else opened
    files = sorted(file for file in folder.iterdir() if file.is_file() and reader_of(file.name) is not None)
    kinds = {reader[0] for file in files if (reader := reader_of(file.name)) is not None}
    has_card = (folder / "README.md").exists()
    if config.name or has_card or any(entry.is_dir() for entry in folder.iterdir()) or not files:
        return load_dataset(str(folder), name=config.name, **common)
    files = [file for file in files if file.suffix != ".md"]
    if len(kinds) > 1 and not config.ds_type:
        raise DatasetError(
            f"dataset `path: {folder}` holds files of several kinds ({', '.join(sorted(kinds))}). Name those to read under "
            "`data_files`."
        )
    if kinds == {"json"} and not any(file.name.startswith(("train", "test", "valid", "dev", "eval")) for file in files):
        return _open_files(files, config, common)
    return load_dataset(str(folder), **common)


def _open_files(files: Sequence[Path], config: DictDefault, common: dict[str, Any]) -> Dataset | IterableDataset:
    """Local files of one kind. Names may hold `*`."""
    found = [match for file in files for match in _matches(file)]
    if all(file.stat().st_size == 0 for file in found):
        raise DatasetError(f"dataset file {', '.join(map(str, found))} is empty.")
    reader, arguments = _reader(found[0].name, config)
    names = [str(file) for file in found]
    if reader == "json" and json_lines.can_read(found):
        if common["streaming"]:
            return IterableDataset.from_generator(json_lines.iter_rows, gen_kwargs={"files": names})
        cache_dir = common["cache_dir"]
        return take_split(json_lines.read(found, cache_dir), common["split"], names[0])
    return load_dataset(reader, data_files=names, **arguments, **common)


def _matches(file: Path) -> list[Path]:
    if file.is_file():
        return [file]
    matches = sorted(match for match in file.parent.glob(file.name) if match.is_file())
    if not matches:
        raise DatasetError(f"dataset file {file} does not exist. Check `path` and `data_files`.")
    return matches


def names_reader(config: DictDefault) -> bool:
    """Whether `path` is a reader such as `json`, and `data_files` names local files."""
    return str(config.path) in READER_NAMES and all("://" not in name for name in _as_list(config.data_files or "://"))


def local_data_files(config: DictDefault) -> list[Path]:
    """The files of `data_files`, where names may hold `*`.

    Raises:
        DatasetError: one is not there.
    """
    return [match for name in _as_list(config.data_files) for match in _matches(Path(name).expanduser())]


def _as_list(value: Any) -> list[str]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _looks_local(path: str) -> bool:
    """A path that nobody means as a hub name: it starts like one of a file system, or ends like a data file."""
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or reader_of(path) is not None


def reader_of(name: str) -> tuple[str, dict[str, Any]] | None:
    """The reader for a file name, by its extension."""
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return READERS.get(Path(name).suffix.lower())


def _reader(name: str, config: DictDefault) -> tuple[str, dict[str, Any]]:
    by_name = reader_of(name)
    if config.ds_type:
        if by_name and by_name[0] == config.ds_type:
            return by_name
        return READERS.get(f".{config.ds_type}", (config.ds_type, {}))
    return by_name or ("json", {})


def take_split(loaded: Dataset | DatasetDict, split: str, path: str) -> Dataset:
    """The rows of a split, also of a part such as `train[:10%]`, from data that is already open.

    Raises:
        DatasetError: the split is not there; names those that are.
    """
    parts = loaded if isinstance(loaded, DatasetDict) else DatasetDict({split.partition("[")[0]: loaded})
    name = split.partition("[")[0]
    if name not in parts:
        raise DatasetError(
            f"dataset `path: {path}` has no split {name!r}. Write `split:` as one of: {', '.join(parts)}."
        )
    if split == name:
        return parts[name]
    try:
        pieces = ReadInstruction.from_spec(split).to_absolute({key: len(value) for key, value in parts.items()})
    except (ValueError, AssertionError) as error:
        raise DatasetError(f"dataset `path: {path}` has no rows for `split: {split}`: {error}") from error
    rows = [
        index
        for piece in pieces
        for index in range(piece.from_ or 0, len(parts[name]) if piece.to is None else piece.to)
    ]
    return parts[name].select(rows)


def take_shard(dataset: Dataset, config: DictDefault, seed: int) -> Dataset:
    """One piece of a dataset, for `shards` and `shards_idx`. The rows are shuffled first, so that pieces are alike.

    `preprocess_shards` cuts in order instead: its pieces are put together again.
    """
    if not config.shards:
        return dataset
    index = int(config.shards_idx or 0)
    if not 0 <= index < config.shards:
        raise DatasetError(f"`shards_idx: {index}` of dataset {config.path} must be from 0 to {config.shards - 1}.")
    if not config.preprocess_shards:
        dataset = dataset.shuffle(seed=seed)
    return dataset.shard(num_shards=int(config.shards), index=index)
