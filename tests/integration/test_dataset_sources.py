"""Every place that `path` of a dataset may name, opened for real: files, folders, archives, object stores, web servers."""

from __future__ import annotations

import bz2
import gzip
import http.server
import importlib.util
import io
import json
import lzma
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from fsspec.implementations.memory import MemoryFileSystem

from axolotl.exceptions import AxolotlError, DatasetError, MissingExtraError
from axolotl.utils.data import remote
from axolotl.utils.data.fingerprint import source_fingerprint
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault
from tests.integration.object_store import serving_s3

ROWS = [{"instruction": f"ask {n}", "output": f"say {n}"} for n in range(20)]
OTHER = [{"instruction": f"demand {n}", "output": f"tell {n}"} for n in range(3)]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(path: Any, streaming: bool = False, **entry: Any) -> list[dict]:
    return list(load_dataset_with_config(DictDefault(path=str(path), **entry), streaming=streaming))


def refusal(path: Any, **entry: Any) -> str:
    with pytest.raises(DatasetError) as error:
        load(path, **entry)
    return str(error.value)


def lines(rows: list[dict] = ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(kind: str, rows: list[dict] = ROWS) -> bytes:
    buffer = io.BytesIO()
    dataset = Dataset.from_list(rows)
    if kind == "parquet":
        dataset.to_parquet(buffer)
    elif kind in ("csv", "tsv"):
        dataset.to_csv(buffer, index=False, sep="\t" if kind == "tsv" else ",")
    else:
        new = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
        with new(buffer, dataset.data.table.schema) as writer:
            writer.write_table(dataset.data.table)
    return buffer.getvalue()


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), content)
    return buffer.getvalue()


def tarred(mode: str, **files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard", reason="needs the package zstandard").compress(content)


FILES: dict[str, Callable[[], bytes]] = {
    "rows.json": lambda: json.dumps(ROWS, indent=2).encode(),
    "rows.jsonl": lines,
    "rows.ndjson": lines,
    "ROWS.JSONL": lines,
    "rows.data": lines,
    "rows": lines,
    "rows.csv": lambda: table("csv"),
    "rows.tsv": lambda: table("tsv"),
    "rows.parquet": lambda: table("parquet"),
    "rows.arrow": lambda: table("arrow stream"),
    "rows-file.arrow": lambda: table("arrow file"),
    "rows.json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "rows.jsonl.gz": lambda: gzip.compress(lines()),
    "rows.jsonl.bz2": lambda: bz2.compress(lines()),
    "rows.jsonl.xz": lambda: lzma.compress(lines()),
    "rows.jsonl.zst": lambda: zstd(lines()),
    "rows.json.zst": lambda: zstd(json.dumps(ROWS).encode()),
    "rows.csv.gz": lambda: gzip.compress(table("csv")),
    "rows.tsv.gz": lambda: gzip.compress(table("tsv")),
    "rows.csv.zst": lambda: zstd(table("csv")),
    "rows.zip": lambda: zipped(a_jsonl=lines(ROWS[:8]), b_jsonl=lines(ROWS[8:]), README_md=b"# about", __MACOSX_=b"x"),
    "rows.jsonl.zip": lambda: zipped(inner__rows_jsonl=lines()),
    "tables.zip": lambda: zipped(rows_csv=table("csv")),
    "rows.tar": lambda: tarred("w", a_jsonl=lines(ROWS[:8]), b_jsonl=lines(ROWS[8:])),
    "rows.tar.gz": lambda: tarred("w:gz", a_parquet=table("parquet")),
    "rows.tgz": lambda: tarred("w:gz", a_jsonl=lines()),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_kind(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name]())
    assert load(tmp_path / name) == ROWS
    assert load(tmp_path / name, split="train[:10%]") == ROWS[:2]
    assert load(tmp_path / name, streaming=True) == ROWS


@pytest.mark.parametrize("name", ["rows.txt", "rows.text", "rows.txt.gz"])
def test_lines_of_text(tmp_path, name):
    text = b"one\ntwo\n"
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert load(tmp_path / name) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("ds_type", "content"),
    [
        ("json", lines()),
        ("jsonl", lines()),
        ("JSON", lines()),
        ("csv", table("csv")),
        ("parquet", table("parquet")),
        ("arrow", table("arrow stream")),
    ],
)
def test_ds_type_says_what_the_name_does_not(tmp_path, ds_type, content):
    (tmp_path / "download").write_bytes(content)
    assert load(tmp_path / "download", ds_type=ds_type) == ROWS


def test_words_in_a_table_stay_words(tmp_path):
    (tmp_path / "t.csv").write_text("question,answer\nSodium?,Na\nNobody?,None\nNothing?,null\nNot?,NA\nEmpty?,\n")
    assert [row["answer"] for row in load(tmp_path / "t.csv")] == ["Na", "None", "null", "NA", None]


SPLITS = {
    "train": ROWS,
    "train[:10%]": ROWS[:2],
    "train[10:15]": ROWS[10:15],
    "train[90%:]": ROWS[18:],
    "train[-4:]": ROWS[16:],
    "train[:2]+train[-1:]": [*ROWS[:2], ROWS[19]],
    "train[:200]": ROWS,
    "all": ROWS,
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_parts_of_one_split(tmp_path, split, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "saved":
        Dataset.from_list(ROWS).save_to_disk(path)
    else:
        path.write_bytes(lines() if kind == "jsonl" else table(kind))
    assert load(path, split=split) == SPLITS[split]


def write_splits(folder: Path, kind: str) -> None:
    if kind == "saved":
        DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(OTHER)).save_to_disk(folder)
        return
    folder.mkdir()
    for name, rows in (("train", ROWS), ("test", OTHER)):
        (folder / f"{name}.{kind}").write_bytes(lines(rows) if kind == "jsonl" else table(kind, rows))


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", ROWS), ("test", OTHER), ("train+test", ROWS + OTHER), ("test[1:]+train[:1]", OTHER[1:] + ROWS[:1])],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_several_splits(tmp_path, split, expected, kind):
    write_splits(tmp_path / "d", kind)
    assert load(tmp_path / "d", split=split) == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize(
    ("split", "words"),
    [("dev", ("dev", "train", "test")), ("train[5", ("train[5",)), ("train[30:40]", ("train[30:40]",))],
)
def test_splits_that_are_not_there(tmp_path, kind, split, words):
    write_splits(tmp_path / "d", kind)
    message = refusal(tmp_path / "d", split=split)
    for word in (str(tmp_path / "d"), *words):
        assert word in message


def test_a_file_has_no_split_but_train(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    assert "no split 'test'" in refusal(tmp_path / "a.jsonl", split="test")


def write_folder(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def test_folders(tmp_path):
    half = {"a_jsonl": lines(ROWS[:8]), "b_jsonl": lines(ROWS[8:])}
    assert load(write_folder(tmp_path / "plain", **half)) == ROWS
    assert load(write_folder(tmp_path / "notes", **half, NOTES_md=b"# hi", LICENSE=b"MIT", _DS__Store=b"x")) == ROWS
    assert load(write_folder(tmp_path / "infos", a_parquet=table("parquet"), dataset__infos_json=b"{}")) == ROWS
    assert load(write_folder(tmp_path / "nested", x__a_jsonl=half["a_jsonl"], y__b_jsonl=half["b_jsonl"])) == ROWS
    assert load(write_folder(tmp_path / "zipped", a_jsonl_gz=gzip.compress(lines()))) == ROWS
    assert load(write_folder(tmp_path / "arrow", a_arrow=table("arrow stream"))) == ROWS
    assert load(write_folder(tmp_path / "text", a_txt=b"one\n", b_txt=b"two\n")) == [{"text": "one"}, {"text": "two"}]


def test_a_folder_of_several_kinds(tmp_path):
    write_folder(tmp_path, a_jsonl=lines(), b_csv=table("csv", OTHER))
    message = refusal(tmp_path)
    assert "several kinds (csv, json)" in message
    assert "`data_files`" in message
    assert load(tmp_path, ds_type="csv") == OTHER
    assert load(tmp_path, ds_type="json") == ROWS
    assert "Write an entry for each" in refusal(tmp_path, data_files=["a.jsonl", "b.csv"])


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"data_files": "a.jsonl"}, ROWS),
        ({"data_files": ["a.jsonl", "x/b.jsonl"]}, ROWS + OTHER),
        ({"data_files": "**/*.jsonl"}, ROWS + OTHER),
        ({"data_files": "x/*.jsonl"}, OTHER),
        ({"data_files": ["d/a.jsonl"]}, ROWS),
        ({"data_files": {"train": "a.jsonl", "test": ["x/b.jsonl"]}}, ROWS),
        ({"data_files": {"train": "a.jsonl", "test": ["x/b.jsonl"]}, "split": "test[:2]"}, OTHER[:2]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_data_files(tmp_path, monkeypatch, entry, expected, streaming):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "d", a_jsonl=lines(), x__b_jsonl=lines(OTHER))
    if not (streaming and "[" in entry.get("split", "")):  # streams are cut by `stream_sources`
        assert load("d", streaming, **entry) == expected


def test_a_reader_as_path(tmp_path):
    write_folder(tmp_path, a_jsonl=lines(), b_csv=table("csv", OTHER))
    assert load("json", data_files=str(tmp_path / "a.jsonl")) == ROWS
    assert load("csv", data_files={"train": str(tmp_path / "b.csv")}) == OTHER
    assert "Name files in `data_files`" in refusal("json")


def test_rows_that_arrow_would_not_take(tmp_path):
    rows: list[dict[str, Any]] = [
        {"content": "text", "n": 1, "date": "2020-01-01"},
        {"content": [{"type": "text", "text": "part"}], "n": "two", "date": "2020-01-01T10:00:00Z"},
        {"content": {"b": 1, "a": None}, "n": None, "extra": [1, "x"]},
        {"content": None, "n": 2**70},
        {"content": [], "n": 1.5, "extra": []},
    ]
    names = ("content", "n", "date", "extra")
    expected = [{name: row.get(name) for name in names} for row in rows]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    assert load(tmp_path / "a.jsonl") == expected
    # The same rows in a folder with splits, which `datasets` would open by itself.
    (tmp_path / "d").mkdir()
    (tmp_path / "d/train.jsonl").write_bytes(lines(rows))
    (tmp_path / "d/test.jsonl").write_bytes(lines(OTHER))
    assert load(tmp_path / "d") == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.parquet", b"PAR1 not really", ("cannot be read",)),
        ("a.feather", b"ARROW1\x00\x00\xff\xff", ("Write `ds_type`",)),
        ("a.zip", b"PK nothing", ("cannot be unpacked",)),
        ("a.tar.gz", b"nothing", ("cannot be unpacked",)),
        ("b.zip", zipped(picture_png=b"x"), ("holds no files of rows",)),
        ("a.jsonl.gz", b"nothing", ("cannot be decompressed", "not what its name says")),
        ("a.jsonl", b"", ("is empty",)),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ("line 2",)),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    for word in (name, *words):
        assert word in message


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.csv.lz4", "lz4")])
def test_a_compression_without_its_package(tmp_path, monkeypatch, name, package):
    """`fsspec` knows the ending only with the package, and would read compressed bytes as text."""
    monkeypatch.delitem(fsspec.utils.compressions, name.rpartition(".")[2], raising=False)
    (tmp_path / name).write_bytes(b"\x28\xb5")
    with pytest.raises(MissingExtraError, match=rf"`{package}`.*axolotl\[compression\]"):
        load(tmp_path / name)


def test_long_numbers_keep_their_digits(tmp_path):
    """Numbers in tool calls are text to the model: each digit counts."""
    row = {"messages": [{"arguments": {"x": 0.02050917810952172, "y": 2**70, "z": -(2**63) - 1}}]}
    (tmp_path / "a.jsonl").write_bytes(lines([row]))
    assert load(tmp_path / "a.jsonl") == [row]


def test_what_is_not_there(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.jsonl")
    assert "pattern as `data_files`" in refusal(tmp_path / "*.jsonl")
    assert "`ds_type: yaml`" in refusal(write_folder(tmp_path, a_data=lines()) / "a.data", ds_type="yaml")


# Object stores


class Bucket(MemoryFileSystem):
    """A store that answers to the protocol of a cloud."""

    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.partition("://")[2] if "://" in path else path)


@pytest.fixture(params=["gs", "az", "abfs", "oci"])
def bucket(request) -> Iterator[str]:
    registered = fsspec.get_filesystem_class.__globals__["_registry"]
    before = registered.get(request.param)
    store = type("Store", (Bucket,), {"protocol": (request.param,), "store": {}})
    fsspec.register_implementation(request.param, store, clobber=True)
    yield f"{request.param}://bucket"
    registered.pop(request.param)
    if before is not None:
        registered[request.param] = before


def fill(url: str) -> None:
    filesystem, inner = fsspec.core.url_to_fs(url)
    for name, content in {
        "rows.jsonl": lines(),
        "rows.parquet": table("parquet"),
        "packed.jsonl.gz": gzip.compress(lines()),
        "many/a.jsonl": lines(ROWS[:8]),
        "many/b.jsonl": lines(ROWS[8:]),
    }.items():
        filesystem.makedirs(f"{inner}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{inner}/{name}", content)
    Dataset.from_list(ROWS).save_to_disk(f"{url}/saved")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(OTHER)).save_to_disk(f"{url}/splits")


def check_store(url: str) -> None:
    """Every way to name rows in an object store."""
    fill(url)
    for name in ("rows.jsonl", "rows.parquet", "packed.jsonl.gz", "many", "saved", "splits"):
        assert load(f"{url}/{name}") == ROWS, name
        assert load(f"{url}/{name}", split="train[:10%]") == ROWS[:2], name
    assert load(f"{url}/splits", split="test") == OTHER
    assert load(f"{url}/many", data_files=["a.jsonl"]) == ROWS[:8]
    assert load(f"{url}/many", data_files="*.jsonl") == ROWS
    assert "has no file 'c.jsonl'" in refusal(f"{url}/many", data_files="c.jsonl")
    assert f"{url}/none.jsonl" in refusal(f"{url}/none.jsonl")
    entry = DictDefault(path=f"{url}/many")
    before = source_fingerprint(entry, False)
    assert before == source_fingerprint(entry, False)
    filesystem, inner = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(f"{inner}/many/b.jsonl", lines(OTHER))
    filesystem.invalidate_cache()
    assert source_fingerprint(entry, False) != before
    assert source_fingerprint(DictDefault(path=f"{url}/none.jsonl"), False) is None


def test_object_stores(bucket):
    check_store(bucket)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.zst"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_a_store_that_is_cut_short_between_two_rows(bucket, name, streaming):
    """What is left of it is rows without fault: only the compression says that there were more."""
    rows = [{"text": f"row {number}"} for number in range(500)]
    whole = lines(rows) if "jsonl" in name else b"text\n" + b"".join(b"row %d\n" % number for number in range(500))
    if name.endswith("zst"):
        writer = pytest.importorskip("zstandard", reason="needs the package zstandard").ZstdCompressor().compressobj()
        cut = writer.compress(whole) + writer.flush(1)
        content = cut + writer.flush()
    else:
        content = gzip.compress(whole)
        cut = content[:-8]
    filesystem, inner = fsspec.core.url_to_fs(bucket)
    filesystem.pipe_file(f"{inner}/{name}", content)
    assert load(f"{bucket}/{name}", streaming=streaming) == rows
    filesystem.pipe_file(f"{inner}/{name}", cut)
    with pytest.raises(DatasetError, match=name):
        load(f"{bucket}/{name}", streaming=streaming)


@pytest.mark.parametrize(("protocol", "package", "extra"), [(key, *value) for key, value in remote.PACKAGES.items()])
def test_a_missing_package_is_named(protocol, package, extra):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(MissingExtraError, match=rf"`{package}`.*axolotl\[{extra}\]"):
        load(f"{protocol}://bucket/rows.jsonl")


def test_an_unknown_protocol(tmp_path):
    assert "unknown protocol 'gopher'" in refusal("gopher://host/rows.jsonl")


def test_azure_asks_for_credentials(monkeypatch):
    """Its package would go without, and then a private container looks empty."""
    assert remote.storage_options_of("az://container/rows.jsonl") == {"anon": False}
    monkeypatch.setenv("AZURE_STORAGE_ANON", "true")
    assert remote.storage_options_of("az://container/rows.jsonl") == {}


@pytest.fixture
def s3() -> Iterator[Any]:
    with serving_s3("bucket"):
        import s3fs

        yield s3fs.S3FileSystem()


def test_s3(s3):
    check_store("s3://bucket/data")
    assert load("s3://bucket/data/rows.jsonl", streaming=True) == ROWS
    mixed = [{"content": "text"}, {"content": [{"type": "text", "text": "a"}], "n": 2**70}]
    s3.pipe_file("bucket/mixed/rows.jsonl", lines(mixed))
    assert load("s3://bucket/mixed", streaming=True) == mixed
    message = refusal("s3://nobody/rows.jsonl")
    assert "s3://nobody/rows.jsonl" in message
    assert "credentials" in message


def test_a_store_that_is_not_there(monkeypatch):
    s3fs = pytest.importorskip("s3fs", reason="needs the package s3fs (axolotl[s3])")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(AxolotlError, match=r"s3://bucket/rows\.jsonl"):
        load("s3://bucket/rows.jsonl")
    s3fs.S3FileSystem.clear_instance_cache()


# Web servers


class Site(http.server.BaseHTTPRequestHandler):
    """`/redirect/x` leads to `/x`; `/broken/...` stops in the middle; `/chunked/...` does not tell its size."""

    protocol_version = "HTTP/1.1"
    files = {"rows.jsonl": lines(), "rows.jsonl.gz": gzip.compress(lines()), "rows.parquet": table("parquet")}

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        kind, _, name = path.rpartition("/")
        content = self.files.get(name)
        if kind == "redirect":
            self.reply(302, b"", {"Location": f"/{name}"})
        elif content is None:
            self.reply(404, b"no", {})
        elif kind == "broken":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif kind == "chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            half = len(content) // 2
            chunks = [content[:half]] if self.path.endswith("?cut") else [content[:half], content[half:], b""]
            for chunk in chunks:
                self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            self.close_connection = True
        else:
            self.reply(200, content, {"ETag": f'"{hash(content)}"'})

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "place", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "redirect/rows.jsonl", "chunked/rows.jsonl"]
)
@pytest.mark.parametrize("query", ["", "?download=true"])
def test_the_web(site, place, query):
    assert load(f"{site}/{place}{query}") == ROWS


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("none.jsonl", ("404", "publicly accessible")),
        ("broken/rows.jsonl", ("broke off", "Try again")),
        ("chunked/rows.jsonl?cut", ("cannot be fetched",)),
    ],
)
def test_a_server_that_refuses_or_breaks_off(site, place, words):
    message = refusal(f"{site}/{place}")
    for word in (f"{site}/{place}", *words):
        assert word in message


def test_a_server_that_is_not_there():
    assert "cannot be fetched" in refusal("http://127.0.0.1:9/rows.jsonl")
    assert source_fingerprint(DictDefault(path="http://127.0.0.1:9/rows.jsonl"), False) is None


def test_a_changed_page_has_another_fingerprint(site, monkeypatch):
    entry = DictDefault(path=f"{site}/rows.jsonl")
    before = source_fingerprint(entry, False)
    assert source_fingerprint(entry, False) == before
    monkeypatch.setitem(Site.files, "rows.jsonl", lines(OTHER))
    assert source_fingerprint(entry, False) != before
