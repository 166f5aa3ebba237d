"""Compressed files that are whole give all rows; one that was cut short is an error that names it, wherever it lies."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import fsspec
import pytest
from fsspec.compression import compr

from axolotl.exceptions import DatasetError
from axolotl.utils.data.compressed import check_whole, is_compressed, name_damaged_files
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.data.stream_sources import open_sources
from axolotl.utils.dict import DictDefault

NUM_ROWS = 3000


def zst(data: bytes) -> bytes:
    """Several blocks, so that what is left of a file cut short holds whole lines."""
    zstandard = pytest.importorskip("zstandard")
    packer = zstandard.ZstdCompressor().compressobj()
    blocks = (data[start : start + 8000] for start in range(0, len(data), 8000))
    packed = b"".join(packer.compress(block) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for block in blocks)
    return packed + packer.flush()


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst}


def content(kind: str) -> bytes:
    rows = [{"id": n, "text": f"{n * 7919 % 100_003} {n * n}"} for n in range(NUM_ROWS)]
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    head = "id,text\n" if kind == "csv" else ""
    return (head + "".join(f"{row['id']},{row['text']}\n" for row in rows)).encode()


def read(entry, streaming: bool, folder) -> int:
    """The number of rows."""
    if not streaming:
        return len(load_dataset_with_config(entry, cache_dir=str(folder)))
    ((_, source),) = open_sources([entry], seed=1)
    num_rows = 0
    while source.next() is not None:
        num_rows += 1
    return num_rows


@pytest.fixture(params=["files", "repository", "store"])
def place(request, tmp_path):
    """A function that puts files somewhere, and gives the entry of a dataset that has them."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "rows").mkdir()

    def put(files: dict[str, bytes]) -> DictDefault:
        if request.param == "store":
            folder = f"memory://{tmp_path.name}"
            for name, data in files.items():
                with fsspec.open(f"{folder}/{name}", "wb") as file:
                    file.write(data)
            return DictDefault(path=folder, data_files=sorted(files), split="train")
        for name, data in files.items():
            (tmp_path / "rows" / name).write_bytes(data)
        if request.param == "files":
            return DictDefault(path=str(tmp_path / "rows"), data_files=sorted(files), split="train")
        (tmp_path / "rows/README.md").write_text("---\nlicense: mit\n---\n")  # laid out as on the hub
        return DictDefault(path=str(tmp_path / "rows"), split="train")

    return put


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize(("kind", "extension"), [("csv", "zst"), ("txt", "zst"), ("jsonl", "zst"), ("csv", "gz"), ("csv", "bz2"), ("csv", "xz")])  # fmt: skip
def test_a_file_cut_short_is_named(place, tmp_path, kind, extension, streaming):
    whole = PACK[extension](content(kind))
    names = [f"train-0.{kind}.{extension}", f"train-1.{kind}.{extension}"]
    entry = place({names[0]: whole, names[1]: whole})
    assert read(entry, streaming, tmp_path / "cache") == 2 * NUM_ROWS
    entry = place({names[0]: whole, names[1]: whole[: len(whole) * 2 // 3]})
    with pytest.raises(DatasetError) as error_info:
        read(entry, streaming, tmp_path / "cache")
    assert names[1] in str(error_info.value)
    assert names[0] not in str(error_info.value)
    assert "cut short" in str(error_info.value)


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_a_file_that_is_not_what_its_name_says_is_named(place, tmp_path, streaming):
    with pytest.raises(DatasetError, match=r"train\.jsonl\.gz cannot be decompressed: .*not what its name says"):
        read(place({"train.jsonl.gz": content("jsonl")}), streaming, tmp_path / "cache")


@pytest.mark.parametrize("extension", PACK)
def test_files_are_read_as_they_were_before(tmp_path, extension):
    file = tmp_path / f"a.{extension}"
    file.write_bytes(PACK[extension](content("txt")))
    name_damaged_files()
    name_damaged_files()
    assert type(compr["gzip"].opener).__name__ != "_NamingOpener"
    with fsspec.open(str(file), "rb", compression="infer") as stream:
        assert stream.readline() == content("txt").split(b"\n")[0] + b"\n"
        assert stream.read() == content("txt").partition(b"\n")[2]
        if stream.seekable():
            stream.seek(7)
            assert stream.read(5) == content("txt")[7:12]
    with fsspec.open(str(tmp_path / f"b.{extension}"), "wb", compression="infer") as stream:
        stream.write(b"written")
    check_whole(tmp_path / f"b.{extension}")
    (tmp_path / "moved").write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DatasetError, match=rf"hf://a.{extension} cannot be decompressed"):
        check_whole(tmp_path / "moved", f"hf://a.{extension}")


def test_what_is_compressed():
    assert is_compressed("a/b.csv.GZ") and is_compressed("hf://datasets/x/y@main/t.json.zst")
    assert not is_compressed("a.csv") and not is_compressed("a.zip") and not is_compressed("gz")
