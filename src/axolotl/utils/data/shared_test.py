from __future__ import annotations

import gzip
import http.server
import json
import threading
from functools import partial

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from huggingface_hub.errors import HTTPError

from axolotl.exceptions import DatasetError, MissingExtraError
from axolotl.utils.data import fingerprint
from axolotl.utils.data.fingerprint import source_fingerprint, strategy_code_fingerprint
from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config, take_shard
from axolotl.utils.dict import DictDefault

ROWS = [{"instruction": f"ask {n}", "output": f"say {n}"} for n in range(20)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def load(path, **config):
    return load_dataset_with_config(DictDefault(path=str(path), **config))


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path):
    rows = Dataset.from_list(ROWS)
    name = path.name
    if name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif name.endswith(".jsonl"):
        write_jsonl(path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=2))
    elif name.endswith(".csv"):
        rows.to_csv(path, index=False)
    elif name.endswith(".tsv"):
        rows.to_csv(path, index=False, sep="\t")
    elif name.endswith(".parquet"):
        rows.to_parquet(path)
    else:
        rows.save_to_disk(path.parent / "saved")
        (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet", "a.arrow"])
def test_files(tmp_path, name):
    assert load(write(tmp_path / name))[:] == Dataset.from_list(ROWS)[:]


def test_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert load(tmp_path / "a.txt")["text"][:] == ["one", "two"]


def test_ds_type_when_the_name_says_nothing(tmp_path):
    file = write(tmp_path / "a.parquet").rename(tmp_path / "data.bin")
    assert len(load(file, ds_type="parquet")) == 20


@pytest.mark.parametrize("split, first, count", [("train[:10%]", 0, 2), ("train[5:]", 5, 15), ("train[-4:]", 16, 4)])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "saved"])
def test_slices(tmp_path, name, split, first, count):
    path = tmp_path / name
    Dataset.from_list(ROWS).save_to_disk(path) if name == "saved" else write(path)
    rows = load(path, split=split)
    assert rows["instruction"][:] == [f"ask {n}" for n in range(first, first + count)]


def test_folder_of_files_and_data_files(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:5])
    write_jsonl(tmp_path / "b.jsonl", ROWS[5:])
    assert len(load(tmp_path)) == 20
    assert len(load(tmp_path, data_files="b.jsonl")) == 15
    assert len(load(tmp_path, data_files=["a.jsonl", "b.jsonl"])) == 20
    assert len(load(tmp_path, data_files="*.jsonl")) == 20
    with pytest.raises(DatasetError, match=r"c\.jsonl does not exist"):
        load(tmp_path, data_files="c.jsonl")
    assert "data_files" not in caplog.text
    assert len(load(tmp_path / "a.jsonl", data_files="b.jsonl")) == 5
    assert "`data_files: b.jsonl` of dataset" in caplog.text and "the path is a file" in caplog.text


def test_a_reader_with_local_data_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:5])
    entry = DictDefault(path="json", data_files=[str(tmp_path / "*.jsonl")])
    assert len(load_dataset_with_config(entry)) == 5
    before = source_fingerprint(entry, False)
    write_jsonl(tmp_path / "a.jsonl", ROWS[:6])
    assert source_fingerprint(entry, False) != before
    with pytest.raises(DatasetError, match="does not exist"):
        source_fingerprint(DictDefault(path="csv", data_files=str(tmp_path / "none.csv")), False)


def test_a_hub_that_cannot_be_reached_gives_no_commit(monkeypatch):
    def unreachable(*args, **kwargs):
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(fingerprint.HfApi, "dataset_info", unreachable)
    assert source_fingerprint(DictDefault(path="someone/something"), False) is None


def test_folder_laid_out_like_a_hub_repository(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "data" / "train-00000.parquet")
    Dataset.from_list(ROWS[:3]).to_parquet(tmp_path / "data" / "test-00000.parquet")
    assert len(load(tmp_path)) == 20
    assert len(load(tmp_path, split="test")) == 3


def test_folder_with_named_configurations(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ROWS[:4])
    write_jsonl(tmp_path / "y.jsonl", ROWS[:6])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files: x.jsonl\n- config_name: y\n  data_files: y.jsonl\n---\n"
    )
    entries = list(datasets_with_name_generator([DictDefault(path=str(tmp_path), name=["x", "y"])]))
    assert [len(load_dataset_with_config(entry)) for entry in entries] == [4, 6]


def test_saved_with_splits(tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:2])).save_to_disk(tmp_path / "d")
    assert len(load(tmp_path / "d")) == 20
    assert len(load(tmp_path / "d", split="test")) == 2
    with pytest.raises(DatasetError, match=r"no split 'dev'.*train, test"):
        load(tmp_path / "d", split="dev")


def test_object_store_urls(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "d")
    assert len(load(f"file://{tmp_path}/a.jsonl")) == 20
    assert len(load(f"file://{tmp_path}/d")) == 20
    assert len(load(f"file://{tmp_path}", data_files="a.jsonl", split="train[:5]")) == 5
    with pytest.raises(MissingExtraError, match=r"axolotl\[oci\]"):
        load("oci://bucket/a.json")
    with pytest.raises(DatasetError, match="unknown protocol"):
        load("gopher://a/b.json")


def test_over_http(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert len(load(f"http://127.0.0.1:{server.server_port}/a.jsonl?download=true", split="train[:7]")) == 7
        with pytest.raises(DatasetError, match=r"cannot be fetched.*404"):
            load(f"http://127.0.0.1:{server.server_port}/b.jsonl")
        server.shutdown()


def test_streaming(tmp_path):
    rows = load_dataset_with_config(DictDefault(path=str(write_jsonl(tmp_path / "a.jsonl"))), streaming=True)
    assert isinstance(rows, IterableDataset)
    assert next(iter(rows))["instruction"] == "ask 0"


def test_nothing_there(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        load(tmp_path / "no.jsonl")
    with pytest.raises(DatasetError, match="hub cannot be reached"):
        load("some-org/some-data")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DatasetError, match=r"empty\.jsonl is empty"):
        load(tmp_path / "empty.jsonl")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DatasetError, match="is empty"):
        load(tmp_path / "empty.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DatasetError, match="folder without files of rows"):
        load(tmp_path / "folder")
    with pytest.raises(DatasetError, match="no `path`"):
        load_dataset_with_config(DictDefault(type="alpaca"))


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DatasetError, match=r"a\.parquet cannot be read"):
        load(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('a,b\n1,2\n1,2,3,4\n"')
    with pytest.raises(DatasetError, match=r"a\.csv` cannot be read"):
        load(tmp_path / "a.csv")


def test_shards_and_preprocess_shards(tmp_path, caplog):
    rows = load(write_jsonl(tmp_path / "a.jsonl"))
    shards = [take_shard(rows, DictDefault(path="a", shards=3, shards_idx=index), seed=1) for index in range(3)]
    assert sorted(text for shard in shards for text in shard["instruction"]) == sorted(rows["instruction"])
    with pytest.raises(DatasetError, match="shards_idx: 3"):
        take_shard(rows, DictDefault(path="a", shards=3, shards_idx=3), seed=1)
    pieces = list(datasets_with_name_generator([DictDefault(path="a", preprocess_shards=3)]))
    together = [text for piece in pieces for text in take_shard(rows, piece, seed=1)["instruction"]]
    assert together == rows["instruction"][:]
    assert "all rows" not in caplog.text
    assert take_shard(rows, DictDefault(path="a", shards_idx=1), seed=1) is rows
    assert "all rows of dataset `path: a` are used: `shards_idx: 1` chooses a part only with `shards`" in caplog.text


def test_code_of_the_users_counts_and_that_of_libraries_does_not_wherever_they_lie(tmp_path, monkeypatch):
    own, installed = tmp_path / "own", tmp_path / "target"
    (installed / "a_library-1.0.dist-info").mkdir(parents=True)
    (installed / "a_library").mkdir()
    own.mkdir()
    files = {
        "library": installed / "a_library/__init__.py",
        "strategy": own / "own_strategy.py",
        "helper": own / "own_helper.py",
    }
    for file in files.values():
        file.write_text("")
    files["strategy"].write_text("import a_library\nimport own_helper\n")
    monkeypatch.syspath_prepend(str(own))
    monkeypatch.syspath_prepend(str(installed))
    first = strategy_code_fingerprint("own_strategy.load")
    files["library"].write_text("VALUE = 1\n")
    assert strategy_code_fingerprint("own_strategy.load") == first
    files["helper"].write_text("VALUE = 1\n")
    assert strategy_code_fingerprint("own_strategy.load") != first
