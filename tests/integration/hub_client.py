"""A process that loads and prepares datasets as it is told, one JSON line each: the hub's address is read when a process starts."""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import datasets

from axolotl.exceptions import AxolotlError
from axolotl.utils.data.fingerprint import source_fingerprint
from axolotl.utils.data.sft import prepare
from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config
from axolotl.utils.dict import DictDefault


def load(entry: dict[str, Any], login: bool = False, streaming: bool = False) -> list[dict[str, Any]]:
    entries = datasets_with_name_generator([DictDefault(entry)])
    opened = [load_dataset_with_config(one, login or None, streaming=streaming) for one in entries]
    return [row for dataset in opened for row in itertools.islice(dataset, 1000)]


def fingerprint(entry: dict[str, Any], login: bool = False) -> str | None:
    return source_fingerprint(DictDefault(entry), login)


def prepare_rows(cfg: dict[str, Any]) -> list[list[int]]:
    return prepare(DictDefault(cfg), None).train["input_ids"][:]


def shorten_pauses() -> None:
    """Retry at once: how often the client libraries try stays as it is, the seconds between are left out."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))


COMMANDS = {"load": load, "fingerprint": fingerprint, "prepare": prepare_rows}


def main() -> None:
    datasets.disable_progress_bars()
    if "--impatient" in sys.argv:
        shorten_pauses()
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            answer = {"result": COMMANDS[command](**arguments)}
        except AxolotlError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
