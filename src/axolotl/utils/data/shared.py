"""Sources: finding and opening what `path` of a dataset names.

The order: an URL; a local folder (with `data_files`; saved with `save_to_disk`; any folder of files); a local file; a dataset
of the Hugging Face hub. Everything comes back as a memory-mapped Arrow dataset, so memory does not grow with the data.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    DownloadConfig,
    DownloadManager,
    IterableDataset,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.json.json import Json
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from axolotl.exceptions import DatasetError
from axolotl.utils.data import files, remote
from axolotl.utils.data.compressed import check_whole, is_compressed, naming_damaged
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

READ_ERRORS = (
    DatasetsError,
    DatasetGenerationError,
    pa.ArrowException,
    ValueError,
    OSError,
    EOFError,
    KeyError,
    StopIteration,
    yaml.YAMLError,
)

LONGEST_CAUSE = 300

_CONFIGS = re.compile(r"(?:available configs|BuilderConfig '.*' not found\. Available): \[([^\]]*)\]")


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
    except DatasetError as error:
        if str(path) in str(error):
            raise
        raise DatasetError(f"dataset `path: {path}`: {error}") from error
    except DatasetNotFoundError as error:
        raise DatasetError(
            f"dataset `path: {path}` is no local file or folder, and the Hugging Face hub does not give it: {error} Check the "
            "spelling and `revision`; for a private or gated dataset log in (`hf auth login`) and write `hf_use_auth_token: true`."
        ) from error
    except (ConnectionError, OfflineModeIsEnabled, HTTPError) as error:
        copy = _open_copy(str(path), dataset_config, streaming, cache_dir)
        if copy is not None:
            return copy
        raise DatasetError(
            f"dataset `path: {path}` is no local file or folder, and the Hugging Face hub cannot be reached ({error}). "
            "Check the path and the network, or download the dataset and give its local path."
        ) from error
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise DatasetError(
            f"dataset `path: {path}` has no files of rows that are laid out like a dataset. Name them in `data_files`, or check `path`."
        ) from error
    except READ_ERRORS as error:
        check_disk(error)
        raise DatasetError(f"dataset `path: {path}` cannot be read: {first_cause(error)}") from error


def check_disk(error: BaseException | None) -> None:
    """Raise the error that a full disk caused, if one did: it is no fault of the data."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error
        error = error.__cause__ or error.__context__


def first_cause(error: BaseException) -> str:
    """What an error of a reader comes from, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    configs = _CONFIGS.search(text)
    if configs is not None:
        return f"its configurations are {configs[1]}. Write one of them as `name`."
    text = text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _open_copy(
    path: str, config: DictDefault, streaming: bool, cache_dir: str | None
) -> Dataset | IterableDataset | None:
    """A hub dataset as an earlier run or `hf download` left it on this machine; None when it did not."""
    try:
        folder = snapshot_download(path, repo_type="dataset", revision=config.revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        folder = None
    if folder is not None:
        LOG.warning(f"the Hugging Face hub cannot be reached: dataset `path: {path}` is read from its copy in {folder}")
        return _open(folder, DictDefault({**config, "path": folder}), None, streaming, cache_dir)
    try:
        common = {"split": config.split or "train", "streaming": streaming}
        return load_dataset(path, name=config.name, revision=config.revision, data_files=config.data_files, **common)
    except (ConnectionError, OfflineModeIsEnabled, HTTPError, ValueError, DatasetsError):
        return None


def _open(
    path: str, config: DictDefault, use_auth_token: bool | None, streaming: bool, cache_dir: str | None
) -> Dataset | IterableDataset:
    common = {"split": files.split_of_files(config), "streaming": streaming, "cache_dir": cache_dir}
    if path.startswith(("https://", "http://")):
        return files.open_files([remote.download(path, cache_dir)], config, common)
    if "://" in path:
        return remote.open_url(path, config, common)
    named = files.named_files(config)
    if named is not None:
        for key in ("name", "revision"):
            if config[key]:
                LOG.warning_once(
                    f"`{key}: {config[key]}` of dataset `path: {path}` has no effect: it is for datasets of the hub."
                )
        if config.data_files and os.path.isfile(os.path.expanduser(path)):
            LOG.warning_once(
                f"`data_files: {config.data_files}` of dataset `path: {path}` has no effect: the path is a file. Write its folder as `path`."
            )
        if files.names_reader(config):
            config = DictDefault({**config, "ds_type": path})
        return files.open_files(named, config, common)
    local = Path(os.path.expanduser(path))
    common["split"] = config.split or "train"
    if os.path.isdir(local):
        return _open_folder(local, config, common)
    if _looks_local(path):
        hint = " For several files write the folder as `path` and the pattern as `data_files`." if "*" in path else ""
        raise DatasetError(
            f"dataset `path: {path}` does not exist (looked for {os.path.realpath(local)}). Check the path.{hint}"
        )
    data_files = {"data_files": config.data_files} if config.data_files else {}
    return _open_repository(path, config, True if use_auth_token else None, common, data_files)


def _open_folder(folder: Path, config: DictDefault, common: dict[str, Any]) -> Dataset | IterableDataset:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return files.open_saved(str(folder), config, common["streaming"])
    found = files.files_of_folder(folder, config) if not config.name else []
    has_card = (folder / "README.md").exists()
    if not has_card and found and not _is_split_in_files(folder, found):
        return files.open_files(found, config, common)
    if config.ds_type and found:
        return files.open_files(found, config, common)
    files.check_folder(folder)
    return _open_repository(str(folder), config, None, common, {})


def _is_split_in_files(folder: Path, found: Sequence[Path]) -> bool:
    """Whether names tell splits apart, as those of a hub repository do."""
    folders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "_"))]
    return bool(folders) or any(file.name.startswith(("train", "test", "valid", "dev", "eval")) for file in found)


def _open_repository(
    path: str, config: DictDefault, token: bool | None, common: dict[str, Any], data_files: dict[str, Any]
) -> Dataset | IterableDataset:
    """A repository of the hub, or a folder laid out like one. JSON in it is read by us: exactly as it is written."""
    where = {"name": config.name, "revision": config.revision, "token": token, **data_files}
    builder = load_dataset_builder(path, cache_dir=common["cache_dir"], **where)
    found = {str(name): urls for name, urls in (builder.config.data_files or {}).items()}
    manager = DownloadManager(dataset_name=path, download_config=DownloadConfig(token=token))

    def fetch(urls: list[str]) -> list[tuple[str, str]]:
        return list(zip(manager.download(urls), urls, strict=True))

    if not found or not isinstance(builder, Json) or builder.info.features:
        if common["streaming"]:
            return cast(IterableDataset, builder.as_streaming_dataset(split=common["split"]))
        compressed = [str(url) for urls in found.values() for url in urls if is_compressed(str(url))]
        unnoticed = [url for url in compressed if url.lower().endswith(".zst")]
        for file, url in fetch(unnoticed):
            check_whole(file, url)
        with naming_damaged(lambda: fetch(compressed)):
            builder.download_and_prepare()
        return cast(Dataset, builder.as_dataset(split=common["split"]))
    splits = [part.strip().partition("[")[0] for part in common["split"].split("+")]
    if "all" in splits:
        splits = list(found)
    files.check_split(common["split"], list(found), path)
    if common["streaming"]:
        urls = [str(url) for name in splits for url in found[name]]
        options = {"token": token} if urls[0].startswith("hf://") else {}
        rows = files.stream_json(urls, options)
        return cast(IterableDataset, builder.as_streaming_dataset(split=common["split"])) if rows is None else rows
    whole = {"split": "train", "streaming": False, "cache_dir": common["cache_dir"]}
    json_config = DictDefault(path=path, ds_type="json")
    parts = {}
    for name in dict.fromkeys(splits):
        local = [Path(file) for file in manager.download(list(found[name]))]
        parts[name] = files.open_files(local, json_config, whole)
    return files.take_split(DatasetDict(parts), common["split"], path)


def _looks_local(path: str) -> bool:
    """A path that nobody means as a hub name: it starts like one of a file system, or ends like a data file."""
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or files.reader_of(path) is not None


def take_shard(dataset: Dataset, config: DictDefault, seed: int) -> Dataset:
    """One piece of a dataset, for `shards` and `shards_idx`. The rows are shuffled first, so that pieces are alike.

    `preprocess_shards` cuts in order instead: its pieces are put together again.
    """
    if not config.shards:
        if config.shards_idx is not None:
            LOG.warning_once(
                f"all rows of dataset `path: {config.path}` are used: `shards_idx: {config.shards_idx}` chooses a part only with `shards`"
            )
        return dataset
    index = int(config.shards_idx or 0)
    if not 0 <= index < config.shards:
        raise DatasetError(f"`shards_idx: {index}` of dataset {config.path} must be from 0 to {config.shards - 1}.")
    if index >= len(dataset):
        if config.preprocess_shards:
            return dataset.select([])  # more pieces than rows
        raise DatasetError(
            f"`shards: {config.shards}` of dataset `path: {config.path}` is more than its {len(dataset):,} rows, so part {index} is "
            "empty. Write a smaller number."
        )
    if not config.preprocess_shards:
        dataset = dataset.shuffle(seed=seed)
    return dataset.shard(num_shards=int(config.shards), index=index)


def read_shard(cfg: DictDefault) -> tuple[int, int]:
    """`(n, i)`: of all rows, part i of n is used (`dataset_shard_num`, `dataset_shard_idx`).

    Raises:
        DatasetError: there is no such part.
    """
    number, index = cfg.dataset_shard_num, cfg.dataset_shard_idx
    if number is None or index is None:
        if number is not None or index is not None:
            LOG.warning_once(
                "all rows are used: `dataset_shard_num` and `dataset_shard_idx` choose a part only together"
            )
        return 1, 0
    if not 0 <= int(index) < int(number):
        raise DatasetError(
            f"`dataset_shard_idx: {index}` must be from 0 to {int(number) - 1} (`dataset_shard_num: {number}`)."
        )
    return int(number), int(index)
