"""The digest of a file: every byte counts, and so does every piece."""

from __future__ import annotations

import random

from axolotl.core.digest import digest_file


def test_any_flipped_bit_changes_the_digest(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "file"
    content = rng.randbytes(5000)
    path.write_bytes(content)
    whole = digest_file(path, piece_bytes=512)
    assert digest_file(path, piece_bytes=512) == whole
    for position in [0, 511, 512, 4999, *rng.sample(range(5000), 20)]:
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        assert digest_file(path, piece_bytes=512) != whole
    path.write_bytes(content[512:1024] + content[:512] + content[1024:])
    assert digest_file(path, piece_bytes=512) != whole


def test_an_empty_file_has_a_digest(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "zero").write_bytes(b"\0")
    assert len(digest_file(tmp_path / "empty")) == 8
    assert digest_file(tmp_path / "empty") != digest_file(tmp_path / "zero")
