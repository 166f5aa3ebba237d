"""A digest of a file that says whether a byte of it has changed, as fast as the disk gives the bytes.

The file is cut into pieces of 16 MiB, the CRC-32 of each is computed on its own thread (zlib lets other threads run), and the
digest is the CRC-32 of these numbers. It guards against decay and half-written pages, not against somebody who means harm.
"""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ALGORITHM = "crc32-16MiB"
PIECE_BYTES = 16 * 2**20
MAX_THREADS = 8


def digest_file(path: str | Path, *, piece_bytes: int = PIECE_BYTES) -> str:
    """The digest of a file's content, 8 hexadecimal digits.

    Args:
        path: the file.
        piece_bytes: size of a piece. Part of the algorithm: another size gives another digest.

    Raises:
        OSError: the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        starts = range(0, os.fstat(descriptor).st_size, piece_bytes)

        def digest_piece(start: int) -> bytes:
            return zlib.crc32(_read(descriptor, start, piece_bytes)).to_bytes(4, "big")

        if len(starts) <= 1:
            pieces = [digest_piece(start) for start in starts]
        else:
            with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1, len(starts))) as pool:
                pieces = list(pool.map(digest_piece, starts))
    finally:
        os.close(descriptor)
    return f"{zlib.crc32(b''.join(pieces)):08x}"


def _read(descriptor: int, start: int, count: int) -> bytes:
    """`count` bytes from `start`, fewer at the end of the file. One call may return less than there is."""
    parts = []
    while count and (part := os.pread(descriptor, count, start)):
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
