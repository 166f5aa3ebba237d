"""Sources behind an URL: object stores through fsspec, and single files over https.

Files are fetched first and then read like local ones; a folder written by `save_to_disk` is fetched by `datasets`.
"""

from __future__ import annotations

import errno
import http.client
import os
import shutil
import urllib.parse
import urllib.request
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from datasets import Dataset, IterableDataset, load_dataset

from axolotl.exceptions import AxolotlError, DatasetError, MissingExtraError
from axolotl.utils.data import files
from axolotl.utils.dict import DictDefault
from axolotl.utils.temporary import temporary_folder

TIMEOUT_SECONDS = 60

PACKAGES: dict[str, tuple[str, str]] = {
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "adl": ("adlfs", "azure"),
    "abfs": ("adlfs", "azure"),
    "abfss": ("adlfs", "azure"),
    "az": ("adlfs", "azure"),
    "oci": ("ocifs", "oci"),
}
"""Protocol -> (package, extra of this package that installs it)."""

STORE_ERRORS = (Exception,)
"""What file systems raise when a store refuses or is not there: each package has classes of its own."""


def open_url(url: str, config: DictDefault, common: dict[str, Any]) -> Dataset | IterableDataset:
    """Open a file, files of a folder, or a folder saved with `save_to_disk`, behind an URL.

    Args:
        url: `protocol://...`.
        config: `ds_type`, `data_files` and `split` are read.
        common: `split`, `streaming` and `cache_dir` for `load_dataset`.

    Raises:
        DatasetError: nothing is there, or the store does not give it.
        MissingExtraError: the package of the store is not installed.
    """
    filesystem, inner = connect(url)
    try:
        if not config.data_files and filesystem.isdir(inner) and _is_saved(filesystem, inner):
            return files.open_saved(url, config, common["streaming"], storage_options_of(url))
        names = remote_files(url, config)
        reader, arguments = files.reader_for(names[0], config)
        # A zst file that only `datasets` reads is fetched all the same: it does not notice one that was cut short.
        fetched_first = reader != "json" and any(name.lower().endswith(".zst") for name in names)
        if common["streaming"] and not fetched_first:
            urls = [filesystem.unstrip_protocol(name) for name in names]
            options = storage_options_of(url)
            rows = files.stream_json(urls, options) if reader == "json" else None
            if rows is not None:
                files.check_split(common["split"], ["train"], url)
                return rows
            return load_dataset(reader, data_files=urls, **arguments, storage_options=options, **common)
        folder = temporary_folder("fetched-", common["cache_dir"])
        local = []
        for index, name in enumerate(names):
            # A folder each: two files of a store may have the same name.
            local.append(folder / str(index) / PurePosixPath(name).name)
            filesystem.get_file(name, str(_with_parent(local[-1])))
    except AxolotlError:
        raise
    except STORE_ERRORS as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DatasetError(
            f"dataset `path: {url}` cannot be fetched ({type(error).__name__}: {error}). Check the path, the network and the "
            "credentials in the environment."
        ) from error
    return files.open_files(local, config, common)


def remote_files(url: str, config: DictDefault) -> list[str]:
    """Names, without protocol, of the files that an URL and `data_files` mean.

    Raises:
        DatasetError: there are none.
    """
    filesystem, inner = connect(url)
    if config.data_files:
        found: list[str] = []
        for name in files.file_names(config):
            pattern = f"{inner.rstrip('/')}/{name}"
            matches = sorted(filesystem.glob(pattern)) if "*" in name else [pattern]
            if not matches or not filesystem.isfile(matches[0]):
                raise DatasetError(f"dataset `path: {url}` has no file {name!r}. Check `data_files`.")
            found += matches
        return found
    if filesystem.isfile(inner):
        return [inner]
    if not filesystem.isdir(inner):
        raise DatasetError(
            f"dataset `path: {url}` does not exist, or the credentials in the environment do not open it."
        )
    names = sorted(name for name in filesystem.find(inner, maxdepth=1) if files.reader_of(name) is not None)
    if not names:
        raise DatasetError(
            f"dataset `path: {url}` is a folder without files of rows. Name files in `data_files`, or one of its folders."
        )
    return names


def connect(url: str) -> tuple[Any, str]:
    """The file system of an URL, and the path in it.

    Raises:
        DatasetError: nothing here can open URLs of this protocol.
        MissingExtraError: the package for it is not installed.
    """
    protocol = url.partition("://")[0]
    package, extra = PACKAGES.get(protocol, ("", ""))
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        if not package:
            raise DatasetError(f"dataset `path: {url}` needs a package that is not installed: {error}") from error
        raise MissingExtraError(package, extra, f"dataset `path: {url}`") from error
    except ValueError as error:
        if package:  # a name that fsspec learns from the package
            raise MissingExtraError(package, extra, f"dataset `path: {url}`") from error
        raise DatasetError(
            f"dataset `path: {url}` has the unknown protocol {protocol!r}. Known: https, {', '.join(sorted(PACKAGES))}."
        ) from error
    try:
        return fsspec.core.url_to_fs(url, **storage_options_of(url))
    except STORE_ERRORS as error:
        raise DatasetError(
            f"dataset `path: {url}` cannot be opened ({type(error).__name__}: {error}). Check the credentials in the environment."
        ) from error


def storage_options_of(url: str) -> dict[str, Any]:
    """What the file system of an URL is told besides the environment, where its package finds endpoint and credentials.

    Azure's package would try to go without credentials first, unless told not to.
    """
    package = PACKAGES.get(url.partition("://")[0], ("", ""))[0]
    return {"anon": False} if package == "adlfs" and "AZURE_STORAGE_ANON" not in os.environ else {}


def _is_saved(filesystem: Any, folder: str) -> bool:
    return any(filesystem.isfile(f"{folder.rstrip('/')}/{name}") for name in ("state.json", "dataset_dict.json"))


def _with_parent(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def download(url: str, folder: str | None = None) -> Path:
    """Fetch a public file over https into a folder of its own, under the name that the URL ends with.

    Raises:
        DatasetError: the server does not give the file, or it breaks off.
    """
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "data.json"
    target = temporary_folder("download-", folder) / name
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, open(target, "wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
            promised = answer.headers.get("Content-Length")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DatasetError(
            f"dataset `path: {url}` cannot be fetched: {error or type(error).__name__}. The file must be publicly accessible."
        ) from error
    if promised is not None and target.stat().st_size != int(promised):
        raise DatasetError(
            f"dataset `path: {url}` broke off after {target.stat().st_size:,} of {int(promised):,} bytes. Try again."
        )
    return target
