"""The cache of prepared rows: what is in its key, and what kills, races, full and read-only disks leave of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_from_disk
from transformers import PreTrainedTokenizerFast

from axolotl.exceptions import OutputError
from axolotl.utils.data import fingerprint
from axolotl.utils.data.cache import MARKER, find_damage, load_prepared
from axolotl.utils.data.fingerprint import CONFIG_KEYS, NOT_IN_ROWS, WatchedConfig, dataset_key
from axolotl.utils.data.sft import build_rows, prepare
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset
from tests.integration.training_runs import CommandLine, start_process
from tests.tiny import CHATML, make_tiny_base, make_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CHAT = [{"role": "user", "content": "How much is 1 + 1?"}, {"role": "assistant", "content": "2"}]

# Rows and entries of every kind of strategy.
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpaca": ({"instruction": "ask", "input": "", "output": "say"}, {}),
    "chat_template": ({"messages": CHAT}, {}),
    "messages.chat": ({"messages": CHAT}, {"chat_template": "chatml"}),
    "completion": ({"text": "some words"}, {}),
    "pretrain": ({"text": "some words"}, {}),
    "input_output": ({"segments": [{"label": False, "text": "a"}, {"label": True, "text": "bcd"}]}, {}),
    "pygmalion": ({"conversations": [{"role": "human", "value": "a"}, {"role": "bot", "value": "bcd"}]}, {}),
    "llama2_chat": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "bcd"}]}, {}),
    "metharme": ({"prompt": "<|user|>a<|model|>", "generation": "bcd"}, {}),
    "stepwise_supervised": ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, {}),
    "user": ({"q": "ask", "a": "say"}, {"type": {"field_instruction": "q", "field_output": "a"}}),
    "tokens": ({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"type": None}),
}


@pytest.fixture
def tokenizer(tmp_path) -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer(tmp_path / "tokenizer", chat_template=CHATML)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(folder: Path, type_: str = "alpaca", **keys: Any) -> DictDefault:
    row, entry = TYPES[type_]
    path = write(folder / f"{type_}.jsonl", [row] * 3)
    return DictDefault(
        {
            "datasets": [{"path": path, "type": type_, **entry}],
            "sequence_len": 512,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "seed": 3,
            "dataset_prepared_path": str(folder / "prepared"),
            **keys,
        }
    )


def folders(cfg: DictDefault) -> set[str]:
    return {file.parent.name for file in Path(cfg.dataset_prepared_path).glob(f"*/{MARKER}")}


@pytest.mark.parametrize("type_", TYPES)
def test_every_key_that_is_read_is_in_the_key(tmp_path, tokenizer, type_):
    """Whatever the data rooms read of the config, in any strategy, changes the key or is known not to change the rows."""
    cfg = config(tmp_path, type_, use_pose=True, dataset_exact_deduplication=False, val_set_size=0)
    watched = WatchedConfig(cfg)
    build_rows(watched, watched.datasets, tokenizer, None, "train", str(tmp_path))
    assert watched.reads_beyond_key() == {}
    assert "sequence_len" in watched.reads


def test_every_key_of_the_list_changes_the_key(tmp_path, tokenizer):
    cfg = config(tmp_path)
    base = dataset_key(cfg, cfg.datasets, tokenizer, "train")
    keys = {base}
    for name in CONFIG_KEYS:
        value = ["new"] if name == "plugins" else "new"
        keys.add(dataset_key(DictDefault({**cfg, name: value}), cfg.datasets, tokenizer, "train"))
    assert len(keys) == len(CONFIG_KEYS) + 1
    for name in NOT_IN_ROWS - {"dataset_prepared_path"}:
        assert dataset_key(DictDefault({**cfg, name: "new"}), cfg.datasets, tokenizer, "train") == base
    for change in ({"learning_rate": 7}, {"output_dir": "x"}, {"lora_r": 9}, {"num_epochs": 5}, {"val_set_size": 0.5}):
        assert dataset_key(DictDefault({**cfg, **change}), cfg.datasets, tokenizer, "train") == base
    assert dataset_key(cfg, cfg.datasets, tokenizer, "test") != base


def test_every_field_of_an_entry_changes_the_key(tmp_path, tokenizer):
    cfg = config(tmp_path)
    fields = set(SFTDataset.model_fields) - {"path", "data_files"}
    keys = {dataset_key(cfg, cfg.datasets, tokenizer, "train")}
    for name in fields:
        entry = DictDefault({**cfg.datasets[0], name: "new"})
        keys.add(dataset_key(cfg, [entry], tokenizer, "train"))
    assert len(keys) == len(fields) + 1


def change_byte(file: Path, old: bytes, new: bytes) -> None:
    """A change that leaves size and time of the file as they were."""
    content, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    assert old in content
    assert len(old) == len(new)
    file.write_bytes(content.replace(old, new))
    os.utime(file, ns=times)


def test_a_changed_file_is_a_miss(tmp_path, monkeypatch, tokenizer):
    """Data, a template file, the tokenizer's own files, a strategy of the user's and a module that it imports."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "mine_of_cache_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "words.py").write_text("END = 'stop'\n")
    (package / "strategy.py").write_text(
        "from axolotl.prompt_strategies.alpaca_chat import load as load_alpaca\n"
        "from mine_of_cache_test import words\n"
        "def load(tokenizer, cfg, ds_cfg=None):\n    return load_alpaca(tokenizer, cfg)\n"
    )
    (package / "plugin.py").write_text("class MyPlugin:\n    pass\n")
    (tmp_path / "chat.jinja").write_text(CHATML)
    row = {"instruction": "ask", "input": "", "output": "say", "messages": CHAT}
    first, second = (write(tmp_path / f"{name}.jsonl", [row] * 3) for name in "ab")
    cfg = config(tmp_path)
    cfg["datasets"] = [
        {"path": first, "type": "mine_of_cache_test.strategy"},
        {
            "path": second,
            "type": "chat_template",
            "chat_template": "jinja",
            "chat_template_jinja": str(tmp_path / "chat.jinja"),
        },
    ]
    cfg["plugins"] = ["mine_of_cache_test.plugin.MyPlugin"]

    def key() -> str:
        loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
        return dataset_key(cfg, cfg.datasets, loaded, "train")

    seen = {key()}
    assert key() in seen
    for number, (file, old, new) in enumerate(
        [
            (tmp_path / "a.jsonl", b"ask", b"ark"),
            (tmp_path / "b.jsonl", b"say", b"sag"),
            (tmp_path / "chat.jinja", b"assistant", b"assistent"),
            (tmp_path / "tokenizer/chat_template.jinja", b"assistant", b"assistent"),
            (tmp_path / "tokenizer/tokenizer.json", b'"</s>"', b'"<.s>"'),
            (package / "strategy.py", b"ds_cfg", b"ds_cf_"),
            (package / "words.py", b"stop", b"step"),
            (package / "plugin.py", b"pass", b"..  "),
        ],
        2,
    ):
        change_byte(file, old, new)
        seen.add(key())
        assert len(seen) == number, file


def test_a_strategy_of_ones_own_may_read_any_key(tmp_path, monkeypatch, tokenizer):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reads_of_cache_test").mkdir()
    (tmp_path / "reads_of_cache_test/strategy.py").write_text(
        "from axolotl.prompt_strategies.completion import load as load_completion\n"
        "def load(tokenizer, cfg, ds_cfg=None):\n"
        "    strategy = load_completion(tokenizer, cfg, ds_cfg)\n"
        "    strategy.max_length = cfg.lora_r\n"
        "    return strategy\n"
    )
    cfg = config(tmp_path, "completion", lora_r=8, learning_rate=1)
    cfg.datasets[0]["type"] = "reads_of_cache_test.strategy"

    def stamp(**changes: Any) -> bytes:
        prepare(DictDefault({**cfg, **changes}), tokenizer)
        (folder,) = folders(cfg)
        return marker_of(Path(cfg.dataset_prepared_path) / folder)

    first = stamp()
    assert stamp(learning_rate=2) == first
    second = stamp(lora_r=9)
    assert second != first
    assert stamp(lora_r=9) == second


def test_where_a_file_lies_does_not_matter(tmp_path, tokenizer):
    cfg = config(tmp_path)
    prepare(cfg, tokenizer)
    moved = Path(cfg.datasets[0].path).rename(tmp_path / "elsewhere.jsonl")
    cfg.datasets[0]["path"] = str(moved)
    prepare(cfg, tokenizer)
    assert len(folders(cfg)) == 1


def test_a_hidden_or_unread_file_of_a_folder_does_not_matter(tmp_path, tokenizer):
    cfg = config(tmp_path)
    folder = tmp_path / "d"
    (folder / ".git").mkdir(parents=True)
    Path(cfg.datasets[0].path).rename(folder / "a.jsonl")
    cfg["datasets"] = [{"path": str(folder), "type": "alpaca", "data_files": ["a.jsonl"]}]
    base = dataset_key(cfg, cfg.datasets, tokenizer, "train")
    whole = [DictDefault(path=str(folder), type="alpaca")]
    base_whole = dataset_key(cfg, whole, tokenizer, "train")
    (folder / ".git/HEAD").write_text("x")
    assert dataset_key(cfg, whole, tokenizer, "train") == base_whole
    (folder / "b.jsonl").write_text("{}")
    assert dataset_key(cfg, whole, tokenizer, "train") != base_whole
    assert dataset_key(cfg, cfg.datasets, tokenizer, "train") == base


# Processes and disks


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    make_tiny_base(folder / "base")
    write(
        folder / "d.jsonl", [{"instruction": f"ask {n} " * 9, "input": "", "output": f"say {n}"} for n in range(6000)]
    )
    return folder


def preprocess(desk: Path, prepared: str) -> CommandLine:
    cfg = {
        "base_model": "base",
        "datasets": [{"path": "d.jsonl", "type": "alpaca"}],
        "sequence_len": 512,
        "micro_batch_size": 1,
        "num_epochs": 1,
        "learning_rate": 1e-3,
        "output_dir": "out",
        "dataset_num_proc": 1,
        "dataset_prepared_path": prepared,
    }
    (desk / f"{Path(prepared).name}.yml").write_text(yaml.safe_dump(cfg))
    return CommandLine("preprocess", f"{Path(prepared).name}.yml", folder=desk)


@pytest.mark.slow
def test_killed_at_any_moment(desk):
    """What is under a final name is always whole, and the next run finishes."""
    prepared = desk / "killed"
    rng = random.Random(1)
    preprocess(desk, "whole").finish()
    start = time.monotonic()
    preprocess(desk, "again").finish()  # the first may have waited for imports
    whole_seconds = time.monotonic() - start
    for _ in range(5):
        process = preprocess(desk, "killed")
        time.sleep(rng.uniform(0.1, 1.0) * whole_seconds)
        process.kill()
        for folder in prepared.glob("*/"):
            if "building" not in folder.name:
                assert find_damage(folder) is None
    preprocess(desk, "killed").finish()
    (made,) = list(prepared.glob("*/"))
    (expected,) = list((desk / "whole").glob("*/"))
    assert load_from_disk(str(made))[:] == load_from_disk(str(expected))[:]


def marker_of(folder: Path) -> bytes:
    """What tells one making of the rows from the next; nothing while one takes the place of the other."""
    try:
        return (folder / MARKER).read_bytes()
    except FileNotFoundError:
        return b""


def prepare_again_and_again(folder: Path) -> None:
    os.environ["AXOLOTL_IS_PREPROCESS"] = "1"  # build anew what is there
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    while True:
        prepare(config(folder), tokenizer)


@pytest.mark.slow
def test_killed_while_rows_take_the_place_of_others(tmp_path, tokenizer):
    """Under the final name stand the old rows, the new ones, or for an instant none; never a part of them."""
    cfg, rng = config(tmp_path), random.Random(2)
    expected = prepare(cfg, tokenizer).train[:]
    (folder,) = (Path(cfg.dataset_prepared_path) / name for name in folders(cfg))
    first = marker_of(folder)
    for _ in range(8):
        process = start_process(prepare_again_and_again, tmp_path)
        deadline = time.monotonic() + 300
        while marker_of(folder) in (b"", first) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert not folder.exists() or find_damage(folder) is None
    assert prepare(cfg, tokenizer).train[:] == expected


@pytest.mark.slow
def test_rows_that_are_made_anew_can_be_opened_meanwhile(tmp_path, tokenizer, caplog):
    cfg = config(tmp_path)
    expected = prepare(cfg, tokenizer).train[:]
    (folder,) = (Path(cfg.dataset_prepared_path) / name for name in folders(cfg))
    process = start_process(prepare_again_and_again, tmp_path)
    try:
        markers, deadline = set(), time.monotonic() + 300
        while len(markers) < 20 and time.monotonic() < deadline:
            found = load_prepared(folder)
            assert found is None or found[0][:] == expected
            markers.add(marker_of(folder))
    finally:
        process.kill()
        process.join()
    assert len(markers) == 20
    assert "damaged" not in caplog.text


@pytest.mark.slow
def test_two_at_the_same_time(desk):
    processes = [preprocess(desk, "shared") for _ in range(2)]
    for process in processes:
        process.finish()
    (folder,) = list((desk / "shared").glob("*/"))
    assert find_damage(folder) is None


def test_a_full_disk_is_said(tmp_path, tokenizer):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    try:
        cfg = config(tmp_path, dataset_prepared_path=str(disk / "prepared"))
        cfg.datasets[0]["path"] = write(
            tmp_path / "big.jsonl", [{"instruction": "x" * 99, "output": "y" * n} for n in range(2000)]
        )
        with pytest.raises(OutputError, match=r"`dataset_prepared_path: .*`.* without space.* choose another folder"):
            prepare(cfg, tokenizer)
        assert not folders(cfg)
        assert not list((disk / "prepared").glob("*building*"))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_place_that_cannot_be_written(tmp_path, tokenizer):
    (tmp_path / "file").write_text("mine")
    cfg = config(tmp_path, dataset_prepared_path=str(tmp_path / "file/prepared"))
    with pytest.raises(OutputError, match=r"`dataset_prepared_path: .*` cannot be written"):
        prepare(cfg, tokenizer)


def test_a_read_only_disk(tmp_path, tokenizer):
    """Prepared rows are used from it; new ones are refused with a reason."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a disk")
    try:
        cfg = config(tmp_path, dataset_prepared_path=str(disk / "prepared"))
        expected = prepare(cfg, tokenizer).train[:]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert prepare(cfg, tokenizer).train[:] == expected
        with pytest.raises(OutputError, match=r"`dataset_prepared_path: .*` cannot be"):
            prepare(DictDefault({**cfg, "sequence_len": 100}), tokenizer)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_without_network_prepared_rows_are_found(tmp_path, tokenizer, monkeypatch, caplog):
    """A source that cannot be asked is taken to be as it was."""
    cfg = config(tmp_path)
    rows = Path(cfg.datasets[0].path)
    answers = iter(["commit 1", None, "commit 2", None])
    monkeypatch.setattr(fingerprint, "source_fingerprint", lambda entry, token: next(answers))
    cfg.datasets[0]["path"] = "https://somewhere/rows.jsonl"
    first, without, second, still = (dataset_key(cfg, cfg.datasets, tokenizer, "train") for _ in range(4))
    assert first == without != second == still
    assert "cannot be reached" in caplog.text
    assert rows.exists()
