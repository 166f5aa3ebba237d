"""Compressed files: read as what is in them, and named when they are damaged.

A file that was cut short must be an error. Most decompressors raise one, which names no file; readers of zst take the end of
the file for the end of the data.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from datasets.exceptions import DatasetGenerationError
from fsspec.compression import compr, register_compression
from fsspec.utils import infer_compression

from axolotl.exceptions import DatasetError, MissingExtraError

NEED_PACKAGE = {".zst": "zstandard", ".lz4": "lz4"}
"""Compression -> the package that undoes it. The others come with Python."""

EXTENSIONS = {"gzip": "gz", "bz2": "bz2", "xz": "xz", "zstd": "zst", "lz4": "lz4"}
"""Name of a compression in fsspec -> extension of its files."""

DECOMPRESSION_ERRORS: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
"""What the decompressors raise for a damaged file, besides a plain OSError."""

HAS_ZSTANDARD = importlib.util.find_spec("zstandard") is not None

if HAS_ZSTANDARD:
    import zstandard

    DECOMPRESSION_ERRORS = (*DECOMPRESSION_ERRORS, zstandard.ZstdError)


def check_compression(file: str) -> None:
    """Raise `MissingExtraError` for a compressed file that needs a package that is not installed."""
    package = NEED_PACKAGE.get(Path(file).suffix.lower())
    if package and infer_compression(file.lower()) is None:
        raise MissingExtraError(package, "compression", f"dataset file {file}")


@contextlib.contextmanager
def open_uncompressed(
    file: Path | str, options: Mapping[str, Any] | None = None, name: str | None = None
) -> Iterator[Any]:
    """The bytes of a file, uncompressed.

    Args:
        file: a path or URL.
        options: for the file system of an URL.
        name: what the file is called, where it lies under another name: says how it is compressed.

    Raises:
        DatasetError: a compressed file is damaged, also while it is read.
    """
    name = name or str(file)
    compression = infer_compression(name.lower())
    try:
        with fsspec.open(str(file), "rb", compression=None, **(options or {})) as stream:
            yield stream if compression is None else _decompressed(stream, compression)
    except DECOMPRESSION_ERRORS as error:
        raise _damaged(name, error) from error


def check_whole(file: Path | str, name: str | None = None) -> None:
    """Read a compressed file to its end.

    Args:
        file: the local file.
        name: what it is called, where it lies under another name.

    Raises:
        DatasetError: it is cut short or otherwise damaged.
    """
    with open_uncompressed(file, name=name) as stream:
        while stream.read(1 << 20):
            pass


@contextlib.contextmanager
def naming_damaged(files: Callable[[], Iterable[tuple[Path | str, str]]]) -> Iterator[None]:
    """While a library reads files and fails: say which of them is damaged, if one is.

    Args:
        files: gives the files and what they are called. Asked only when reading failed.

    Raises:
        DatasetError: a compressed file is cut short or otherwise damaged.
    """
    try:
        yield
    except (*DECOMPRESSION_ERRORS, DatasetGenerationError, OSError):
        for file, name in files():
            if is_compressed(name):
                check_whole(file, name)
        raise


def is_compressed(name: str) -> bool:
    """Whether a file is compressed, by its name; archives are no such files."""
    return Path(name.lower()).suffix[1:] in EXTENSIONS.values()


def name_damaged_files() -> None:
    """Let whatever opens compressed files through fsspec, as `datasets` does for a stream, notice the damaged ones and name them."""
    for compression, extension in EXTENSIONS.items():
        opener = compr.get(compression)
        if opener is not None and not isinstance(opener, _NamingOpener):
            register_compression(compression, _NamingOpener(compression, opener), extension, force=True)


class _NamingOpener:
    """What fsspec calls to decompress a file."""

    def __init__(self, compression: str, opener: Callable[..., Any]):
        self.compression = compression
        self.opener = opener

    def __call__(self, infile: Any, mode: str = "rb", **options: Any) -> Any:
        if "r" not in mode:
            return self.opener(infile, mode=mode, **options)
        name = str(getattr(infile, "path", None) or getattr(infile, "name", "of unknown name"))
        return io.BufferedReader(_NamedStream(_decompressed(infile, self.compression), name), 1 << 16)


def _decompressed(packed: Any, compression: str) -> Any:
    """What is in a file that is open, and compressed as fsspec calls it."""
    if compression == "zstd" and HAS_ZSTANDARD:
        return io.BufferedReader(_ZstStream(packed), 1 << 16)
    opener = compr[compression]
    return (opener.opener if isinstance(opener, _NamingOpener) else opener)(packed, mode="rb")


class _NamedStream(io.RawIOBase):
    """A decompressed file whose errors name it."""

    def __init__(self, stream: Any, name: str):
        self._stream = stream
        self._name = name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any, /) -> int:
        try:
            return self._stream.readinto(buffer)
        except DECOMPRESSION_ERRORS as error:
            raise _damaged(self._name, error) from error

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class _ZstStream(io.RawIOBase):
    """The content of a zst file. Other readers take the end of a file that was cut short for the end of the data."""

    def __init__(self, source: Any):
        self._source = source
        self._packed = b""  # read and not decompressed yet
        self._unpacked = memoryview(b"")
        self._frame: Any = None  # the one that has begun and not ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        import zstandard

        while not self._unpacked:
            self._packed = self._packed or self._source.read(1 << 16)
            if not self._packed and self._frame is not None:
                raise EOFError("its last frame does not end")
            if not self._packed:
                return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._unpacked = memoryview(frame.decompress(self._packed))
            self._packed = frame.unused_data if frame.eof else b""
            self._frame = None if frame.eof else frame
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size


def _damaged(name: str, error: Exception) -> DatasetError:
    return DatasetError(
        f"dataset file {name} cannot be decompressed: it is damaged, cut short or not what its name says "
        f"({str(error) or type(error).__name__}). Fetch or write it again."
    )
