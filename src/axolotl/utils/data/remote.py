"""Sources behind an URL: object stores through fsspec, and single files over https."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, load_dataset, load_from_disk

from axolotl.exceptions import DatasetError, MissingExtraError
from axolotl.utils.dict import DictDefault

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


def open_url(
    url: str,
    config: DictDefault,
    split: str,
    common: dict[str, Any],
    reader_of: Callable[[str], tuple[str, dict[str, Any]] | None],
) -> Dataset | IterableDataset:
    """Open a file, or a folder saved with `save_to_disk`, behind an URL.

    Args:
        url: `protocol://...`.
        config: `ds_type` and `data_files` are read.
        split: the split to take.
        common: `split`, `streaming` and `cache_dir` for `load_dataset`.
        reader_of: gives the reader for a file name.
    """
    protocol = url.partition("://")[0]
    check_protocol(url, protocol)
    if config.data_files:
        names = config.data_files if isinstance(config.data_files, (list, tuple)) else [config.data_files]
        urls = [f"{url.rstrip('/')}/{name}" for name in names]
        reader, arguments = _reader(urls[0], config, reader_of)
        return load_dataset(reader, data_files=urls, **arguments, **common)
    filesystem, inner = fsspec.core.url_to_fs(url)
    if filesystem.isdir(inner):
        loaded = load_from_disk(url)
        if isinstance(loaded, DatasetDict):
            name = split.partition("[")[0]
            if name not in loaded:
                raise DatasetError(f"dataset `path: {url}` has no split {name!r}; it has: {', '.join(loaded)}.")
            loaded = loaded[name]
        if "[" in split:
            name = split.partition("[")[0]
            pieces = ReadInstruction.from_spec(split).to_absolute({name: len(loaded)})
            loaded = loaded.select(
                [row for piece in pieces for row in range(piece.from_ or 0, piece.to or len(loaded))]
            )
        return loaded
    if not filesystem.isfile(inner):
        raise DatasetError(
            f"dataset `path: {url}` does not exist, or the credentials in the environment do not open it."
        )
    reader, arguments = _reader(url, config, reader_of)
    return load_dataset(reader, data_files=url, **arguments, **common)


def download(url: str, folder: str | None = None) -> Path:
    """Fetch a public file over https into a folder of its own, under the name that the URL ends with.

    Raises:
        DatasetError: the server does not give the file, or it breaks off.
    """
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "data.json"
    target = Path(tempfile.mkdtemp(prefix="download-", dir=folder)) / name
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, open(target, "wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
            promised = answer.headers.get("Content-Length")
    except OSError as error:
        raise DatasetError(
            f"dataset `path: {url}` cannot be fetched: {error}. The file must be publicly accessible."
        ) from error
    if promised is not None and target.stat().st_size != int(promised):
        raise DatasetError(
            f"dataset `path: {url}` broke off after {target.stat().st_size:,} of {int(promised):,} bytes. Try again."
        )
    return target


def check_protocol(url: str, protocol: str) -> None:
    """Raise when nothing here can open URLs of this protocol."""
    package, extra = PACKAGES.get(protocol, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra, f"dataset `path: {url}`")
    if protocol not in fsspec.available_protocols():
        raise DatasetError(
            f"dataset `path: {url}` has the unknown protocol {protocol!r}. Known: https, {', '.join(sorted(PACKAGES))}."
        )


def _reader(
    name: str, config: DictDefault, reader_of: Callable[[str], tuple[str, dict[str, Any]] | None]
) -> tuple[str, dict[str, Any]]:
    by_name = reader_of(name)
    if config.ds_type:
        return by_name if by_name and by_name[0] == config.ds_type else (config.ds_type, {})
    return by_name or ("json", {})
