"""Datasets of the Hugging Face hub, through the real client libraries and a hub on this machine."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.integration.hub_server import TOKEN, Hub, running_hub

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"instruction": f"ask {n}", "output": f"say {n}"} for n in range(20)]
MIXED = [
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ]
    },
    {"messages": "2020-01-01", "when": "2020-01-01T00:00:00"},
]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


class Client:
    """A process of its own that loads from the hub at `url`."""

    def __init__(self, url: str, home: Path, **env: str):
        base = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        (home / "token").write_text(TOKEN)
        env = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_XET": "1",
            **env,
        }
        command = [sys.executable, "-m", "tests.integration.hub_client", "--impatient"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**base, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([command, arguments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def rows(self, login: bool = False, streaming: bool = False, **entry: Any) -> list[dict]:
        return result(self.ask("load", entry=entry, login=login, streaming=streaming))

    def refusal(self, login: bool = False, **entry: Any) -> str:
        answer = self.ask("load", entry=entry, login=login)
        assert answer["error"] == "DatasetError", answer
        return answer["message"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        repo = hub.add(
            "org/lines", {"train.jsonl": lines(ROWS), "test.jsonl": lines(ROWS[:4]), "README.md": "# Lines\n"}
        )
        repo.refs["v1"] = repo.refs["main"]
        repo.commit({"train.jsonl": lines(ROWS[:11]).encode()})
        card = "---\nconfigs:\n- config_name: easy\n  data_files: data/train*\n- config_name: hard\n  data_files: hard.parquet\n---\n"
        files = {
            "data/train-00000-of-00001.parquet": parquet(ROWS),
            "hard.parquet": parquet(ROWS[:7]),
            "README.md": card,
        }
        hub.add("org/tables", files)
        hub.add("org/mixed", {"rows.jsonl": lines(MIXED)})
        more = gzip.compress(b'[{"n": 1180591620717411303424, "ratio": 0.1}]')
        hub.add(
            "org/mixed_parts",
            {"train-0.jsonl": lines(MIXED), "train-1.json.gz": more, "test.jsonl": lines(MIXED)},
        )
        hub.add("org/secret", {"rows.jsonl": lines(ROWS)}, private=True)
        hub.add("org/gated", {"rows.jsonl": lines(ROWS)}, gated=True)
        tokens = [{"input_ids": [n, n + 1, n + 2], "labels": [-100, n + 1, n + 2]} for n in range(9)]
        hub.add("org/tokens", {"train.jsonl": lines(tokens)})
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def client(hub, home) -> Iterator[Client]:
    client = Client(hub.url, home)
    yield client
    client.close()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"path": "org/lines"}, ROWS[:11]),
        ({"path": "org/lines", "revision": "v1"}, ROWS),
        ({"path": "org/lines", "split": "test"}, ROWS[:4]),
        ({"path": "org/lines", "data_files": ["test.jsonl"]}, ROWS[:4]),
        ({"path": "org/lines", "data_files": "test.jsonl", "ds_type": "json"}, ROWS[:4]),
        ({"path": "org/lines", "data_files": {"dev": "test.jsonl"}, "split": "dev"}, ROWS[:4]),
        ({"path": "org/tables", "name": "hard"}, ROWS[:7]),
        ({"path": "org/tables", "name": ["easy", "hard"]}, ROWS + ROWS[:7]),
    ],
)
def test_parts_of_a_repository(client, entry, expected, streaming):
    assert client.rows(**entry, streaming=streaming) == expected


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[:2]", ROWS[:2]), ("train[10%:20%]", ROWS[1:2]), ("train[-1:]+test", ROWS[10:11] + ROWS[:4])],
)
def test_slices(client, split, expected):
    assert client.rows(path="org/lines", split=split) == expected


def test_slices_of_tables(client):
    assert client.rows(path="org/tables", name="easy", split="train[:25%]") == ROWS[:5]


def test_json_is_read_as_it_is_written(client):
    assert client.rows(path="org/mixed") == [{**MIXED[0], "when": None}, MIXED[1]]
    assert client.rows(path="org/mixed", streaming=True) == MIXED
    parts = MIXED + [{"n": 2**70, "ratio": 0.1}]
    assert client.rows(path="org/mixed_parts", streaming=True) == parts
    assert client.rows(path="org/mixed_parts", split="train+test", streaming=True) == parts + MIXED


def test_a_token_opens_what_is_private(client):
    assert client.rows(login=True, path="org/secret") == ROWS
    assert client.rows(login=True, path="org/gated") == ROWS
    assert client.ask("fingerprint", entry={"path": "org/secret"}, login=True)["result"]
    assert client.ask("fingerprint", entry={"path": "org/secret"})["result"] is None


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"path": "org/secret"}, ("`path: org/secret`", "hf_use_auth_token: true")),
        ({"path": "org/gated"}, ("`path: org/gated`", "gated", "hf_use_auth_token: true")),
        ({"path": "org/nowhere"}, ("`path: org/nowhere`", "doesn't exist", "spelling")),
        ({"path": "org/lines", "revision": "v9"}, ("`path: org/lines`", "Revision 'v9' doesn't exist")),
        ({"path": "org/lines", "split": "dev"}, ("`path: org/lines`", "no split 'dev'", "train, test")),
        ({"path": "org/lines", "data_files": "none.jsonl"}, ("`path: org/lines`", "none.jsonl")),
        ({"path": "org/lines", "data_files": {"train": "a"}, "split": "dev"}, ("`path: org/lines`", "dev", "train")),
        ({"path": "org/tables"}, ("`path: org/tables`", "'easy', 'hard'", "`name`")),
        ({"path": "org/tables", "name": "mild"}, ("`path: org/tables`", "'easy', 'hard'", "`name`")),
        ({"path": "org/tables", "name": "easy", "split": "test"}, ("`path: org/tables`", "test", "train")),
    ],
)
def test_refusals_name_dataset_and_remedy(client, entry, words):
    message = client.refusal(**entry)
    for word in words:
        assert word in message
    assert len(message) < 800


def test_fingerprint_is_the_commit(client, hub):
    repo = hub.repos["org/lines"]
    for revision, sha in repo.refs.items():
        assert client.ask("fingerprint", entry={"path": "org/lines", "revision": revision})["result"] == sha


def result(answer: dict[str, Any]) -> Any:
    assert "result" in answer, answer
    return answer["result"]


def preparation(folder: Path, **keys: Any) -> dict[str, Any]:
    return {
        "datasets": [{"path": "org/tokens"}],
        "sequence_len": 8,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "seed": 1,
        "shuffle_merged_datasets": False,
        "dataset_prepared_path": str(folder),
        **keys,
    }


def test_prepared_rows_are_pushed_and_found_again(client, hub, tmp_path):
    keys = {"push_dataset_to_hub": "someone/prepared", "hf_use_auth_token": True}
    rows = result(client.ask("prepare", cfg=preparation(tmp_path / "one", **keys)))
    assert rows == [[n, n + 1, n + 2] for n in range(9)]
    assert hub.repos["someone/prepared"].private
    del hub.requests[:]
    assert client.ask("prepare", cfg=preparation(tmp_path / "two", **keys))["result"] == rows
    # The second machine took the rows that the first one had pushed, and made none of its own.
    assert not any("/org/tokens/resolve/" in request for request in hub.requests)
    assert any("/someone/prepared/resolve/" in request for request in hub.requests)
    assert not list((tmp_path / "two").glob("*/*.arrow"))


def test_a_push_that_fails_keeps_the_rows(client, hub, tmp_path):
    hub.repos["someone/shut"] = hub.repos["org/gated"]
    cfg = preparation(tmp_path, push_dataset_to_hub="not a name", hf_use_auth_token=True)
    answer = client.ask("prepare", cfg=cfg)
    assert answer["error"] == "OutputError"
    assert "`push_dataset_to_hub: not a name` failed" in answer["message"]
    assert list(tmp_path.glob("*/axolotl_dataset.json"))


@pytest.fixture(scope="module")
def offline(hub, home, client) -> Iterator[Client]:
    """The same machine later, told not to use the network."""
    client.rows(path="org/lines")
    client.rows(path="org/mixed")
    offline = Client(hub.url, home, HF_HUB_OFFLINE="1")
    yield offline
    offline.close()


def test_without_a_hub_the_copy_on_this_machine_is_read(offline):
    assert offline.rows(path="org/lines") == ROWS[:11]
    assert offline.rows(path="org/mixed") == [{**MIXED[0], "when": None}, MIXED[1]]
    message = offline.refusal(path="org/other")
    assert "`path: org/other`" in message
    assert "cannot be reached" in message
    assert "network" in message


def test_rows_prepared_online_are_found_without_a_hub(client, offline, tmp_path):
    rows = result(client.ask("prepare", cfg=preparation(tmp_path)))
    before = sorted(tmp_path.glob("*/*.arrow"))
    assert result(offline.ask("prepare", cfg=preparation(tmp_path))) == rows
    assert sorted(tmp_path.glob("*/*.arrow")) == before


def test_a_hub_that_does_not_answer(client, home):
    client.rows(path="org/lines")
    unplugged = Client("http://127.0.0.1:9", home)
    assert unplugged.rows(path="org/lines") == ROWS[:11]
    unplugged.close()
