"""What a newcomer gets wrong, through the real command line: exit code 1, one message that names it, nothing lost."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from axolotl.cli.main import run
from axolotl.utils.data import files
from axolotl.utils.tee import close_debug_log
from tests.tiny import CHATML, make_tiny_base, make_tiny_model, make_tiny_tokenizer

ALPACA = [{"instruction": f"Add {n} and 1.", "input": "", "output": str(n + 1)} for n in range(12)]
CHAT = [
    {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
    for n in range(12)
]
MAX_LINES = 60  # of output, with the config and the table of choices: what fits on a screen or two


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_tiny_base(folder / "base")
    make_tiny_base(folder / "no_template", chat_template=None)
    tokenizer = make_tiny_tokenizer(folder / "no_end", eos=None, pad=None, chat_template=CHATML)
    make_tiny_model(folder / "no_end", vocab_size=len(tokenizer))
    return folder


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory) -> Path:
    """A folder with a LoRA adapter of `base`."""
    import peft
    import transformers

    folder = tmp_path_factory.mktemp("trained")
    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


class Desk:
    """A working folder with a config and data, and a terminal."""

    def __init__(self, folder: Path, bases: Path, capfd: Any):
        self.folder, self.bases, self.capfd = folder, bases, capfd
        self.cfg: dict[str, Any] = {
            "base_model": str(bases / "base"),
            "datasets": [{"path": "d.jsonl", "type": "alpaca"}],
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_linear": True,
            "sequence_len": 128,
            "micro_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 0.001,
            "optimizer": "adamw_torch",
            "bf16": False,
            "save_strategy": "no",
            "output_dir": "./out",
            "dataset_prepared_path": "./prepared",
        }
        self.write_rows(ALPACA)

    def write_rows(self, rows: list[Any], name: str = "d.jsonl") -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def use_chat(self, rows: list[Any], **entry: Any) -> None:
        self.write_rows(rows)
        self.cfg["datasets"] = [{"path": "d.jsonl", "type": "chat_template", **entry}]

    def run(self, *command: str) -> tuple[int, str]:
        """(exit code, what was printed)."""
        if isinstance(self.cfg, dict):
            (self.folder / "c.yml").write_text(yaml.safe_dump(self.cfg, sort_keys=False))
        self.capfd.readouterr()
        try:
            code = run(list(command or ("train", "c.yml")))
        finally:
            close_debug_log()
        out, err = self.capfd.readouterr()
        return code, out + err

    def refuses(self, *words: str, command: tuple[str, ...] = ()) -> str:
        """Run, and check that it ends with one error that holds `words`."""
        code, said = self.run(*command)
        assert code == 1, said
        assert "Traceback" not in said
        said = f"\n{said}"
        assert said.count("\nError: ") == 1, said
        assert len(said.splitlines()) < MAX_LINES, said
        message = said.partition("\nError: ")[2]
        for word in words:
            assert word in message
        return message


@pytest.fixture
def desk(tmp_path, bases, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("AXOLOTL_DEBUG", raising=False)
    before = dict(os.environ)
    yield Desk(tmp_path, bases, capfd)
    for name in set(os.environ) - set(before):
        del os.environ[name]


def with_row(index: int, row: Any, rows: list[Any] = ALPACA) -> list[Any]:
    rows = copy.deepcopy(rows)
    rows[index] = row
    return rows


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("d.jsonl is empty",)),
        ("\n \n\n", ("d.jsonl holds no rows",)),
        ("[]", ("d.jsonl holds no rows",)),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "c", "outp', ("line 2 is not valid JSON", '"c"')),
        (b'{"output": "caf\xe9"}\n', ("line 1 is not UTF-8 text", "Save the file as UTF-8")),
        ("1\n2\n", ("line 1", "expected an object of fields")),
        ("hello\n", ("line 1 is not valid JSON", "hello")),
    ],
)
def test_files_that_are_no_rows(desk, content, words):
    (desk.folder / "d.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    desk.refuses(*words)
    assert not (desk.folder / "out/adapter_model.safetensors").exists()


def _header(folder: Path) -> str:
    (folder / "d.csv").write_text("instruction,input,output\n")
    return "d.csv"


def _no_parquet_rows(folder: Path) -> str:
    parquet.write_table(pa.table({"instruction": pa.array([], pa.string())}), folder / "d.parquet")
    return "d.parquet"


def _folder_without_files(folder: Path) -> str:
    (folder / "data/inner").mkdir(parents=True)
    return "data"


def _folder_of_other_files(folder: Path) -> str:
    (folder / "data").mkdir()
    (folder / "data/weights.bin").write_bytes(b"1")
    return "data"


def _folder_named_like_a_file(folder: Path) -> str:
    (folder / "data.jsonl").mkdir()
    return "data.jsonl"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_header, ("holds no rows", "Write rows into it")),
        (_no_parquet_rows, ("holds no rows", "Write rows into it")),
        (_folder_without_files, ("folder without files of rows", "Check `path`")),
        (_folder_of_other_files, ("folder without files of rows", "Check `path`")),
        (_folder_named_like_a_file, ("folder without files of rows", "Check `path`")),
    ],
)
def test_sources_without_rows(desk, make, words, streaming):
    name = make(desk.folder)
    desk.cfg["datasets"][0]["path"] = name
    desk.cfg["streaming"] = streaming
    desk.refuses(name, *words, command=("train" if streaming else "preprocess", "c.yml"))


def test_an_empty_part_among_others_is_no_rows(desk):
    for number, table in enumerate(
        (pa.table({"text": ["one two", "three"]}), pa.table({"text": pa.array([], pa.string())}))
    ):
        parquet.write_table(table, desk.folder / f"{number}.parquet")
    desk.cfg["datasets"] = [{"path": ".", "data_files": "*.parquet", "ds_type": "parquet", "type": "completion"}]
    code, said = desk.run("preprocess", "c.yml")
    assert code == 0, said
    assert "2 rows" in said


def test_a_folder_that_is_no_dataset_is_not_read_whole(desk, monkeypatch):
    """Nobody means `/`. The rows in it are not worth looking at every file of a machine."""
    monkeypatch.setattr(files, "MOST_OTHER_FILES", 50)
    for number in range(60):
        (desk.folder / f"code/{number}").mkdir(parents=True)
    desk.cfg["datasets"][0]["path"] = str(desk.folder / "code")
    desk.refuses("more than 50 files and folders that hold no rows", "`data_files`", command=("preprocess", "c.yml"))


JSON_LINES = "".join(json.dumps(row) + "\n" for row in ALPACA * 20).encode()


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"hello"])
def test_compressed_files_that_are_damaged(desk, suffix, compress, damage):
    name = f"d.jsonl.{suffix}"
    (desk.folder / name).write_bytes(damage(compress(JSON_LINES)))
    desk.cfg["datasets"][0]["path"] = name
    desk.refuses(name, command=("preprocess", "c.yml"))


@pytest.mark.parametrize("name", ["d.jsonl.zst", "d.csv.zst"])
@pytest.mark.parametrize("frames_before", [0, 1])
def test_a_zst_file_cut_short_is_not_read_as_a_shorter_one(desk, name, frames_before):
    zstandard = pytest.importorskip("zstandard")
    rows = b"".join(b"add,,%d\n" % (number * 7919) for number in range(20_000))
    content = zstandard.compress(JSON_LINES if "json" in name else b"instruction,input,output\n" + rows)
    (desk.folder / name).write_bytes(content * frames_before + content[: len(content) // 2])
    desk.cfg["datasets"][0]["path"] = name
    desk.refuses(name, "cut short", command=("preprocess", "c.yml"))


@pytest.mark.parametrize("row", ["x,add,,2", "add,,2,x,y"])
def test_a_csv_row_with_more_cells_than_names(desk, row):
    (desk.folder / "d.csv").write_text(f"instruction,input,output\n{row}\n")
    desk.cfg["datasets"][0]["path"] = "d.csv"
    desk.refuses("d.csv", "does not match length", command=("preprocess", "c.yml"))


def test_a_comma_at_the_end_of_csv_rows_moves_nothing(desk):
    (desk.folder / "d.csv").write_text("instruction,input,output\n" + "add,one,two,\n" * 3)
    desk.cfg["datasets"][0]["path"] = "d.csv"
    code, said = desk.run("preprocess", "c.yml")
    assert code == 0, said
    assert "3 rows" in said


def test_json_too_deep_to_read(desk):
    (desk.folder / "d.jsonl").write_text(
        f'{{"instruction": "a", "output": "b", "c": {"[" * 100_000}{"]" * 100_000}}}\n'
    )
    desk.refuses("line 1 is not valid JSON", "recursion", command=("preprocess", "c.yml"))


@pytest.mark.parametrize("name", ["~nobody.jsonl", "50%.jsonl", "a b:c.jsonl", "[x]*.jsonl"])
def test_odd_names_of_files(desk, name):
    desk.write_rows(ALPACA, name)
    desk.cfg["datasets"][0]["path"] = name
    code, said = desk.run("preprocess", "c.yml")
    assert code == 0, said


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + ".jsonl", "loop.jsonl"])
def test_names_that_no_file_can_have(desk, name):
    (desk.folder / "loop.jsonl").symlink_to("loop.jsonl")
    desk.cfg["datasets"][0]["path"] = name
    desk.refuses(name[:80], command=("preprocess", "c.yml"))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for x in range(10 ** 9) %}a{% endfor %}", "Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
        ("{{ messages[99].content }}", "no element 99"),
    ],
)
def test_templates_that_fail_while_they_write(desk, template, words):
    desk.use_chat(CHAT)
    desk.cfg |= {"chat_template": "jinja", "chat_template_jinja": template}
    desk.refuses("Row 0 of `d.jsonl`: The chat template cannot render the row", words, command=("preprocess", "c.yml"))


@pytest.mark.parametrize("change", [{"hidden_size": "x"}, {"num_attention_heads": 3}, {"dtype": "nope"}])
def test_a_config_of_the_model_that_is_wrong(desk, change):
    shutil.copytree(desk.bases / "base", desk.folder / "m")
    written = json.loads((desk.folder / "m/config.json").read_text())
    (desk.folder / "m/config.json").write_text(json.dumps(written | change))
    desk.cfg["base_model"] = "m"
    desk.refuses("`base_model: m`", str(next(iter(change.values()))))


@pytest.mark.parametrize("command", ["merge-lora", "evaluate"])
@pytest.mark.parametrize(
    "change",
    ["{", "{}", {"peft_type": "NOPE"}, {"r": 8}, {"target_modules": ["zz"]}],
    ids=["cut", "empty", "type", "r", "target"],
)
def test_an_adapter_config_that_is_wrong(desk, trained, command, change):
    shutil.copytree(trained, desk.folder / "out")
    file = desk.folder / "out/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change) if isinstance(change, dict) else change)
    desk.refuses("adapter", command=(command, "c.yml"))


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ALPACA, indent=1).encode(),
        b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ALPACA)).encode(),
    ],
)
def test_odd_files_that_are_rows(desk, content):
    (desk.folder / "d.jsonl").write_bytes(content)
    code, said = desk.run("preprocess", "c.yml")
    assert code == 0, said
    assert "12 rows" in said


@pytest.mark.parametrize("index", [0, 6, 11])
@pytest.mark.parametrize("row", [{"instruction": None, "output": "x"}, {"output": 5}, {"output": {"a": 1}}])
def test_a_field_of_the_wrong_kind(desk, index, row):
    desk.write_rows(with_row(index, {"instruction": "x", "input": "", **row}))
    desk.refuses(f"Row {index} of `d.jsonl`", f"`{next(iter(row))}`", "must be text")


def test_a_row_without_an_answer_is_dropped_and_counted(desk):
    desk.write_rows(with_row(3, {"instruction": "x", "input": "", "output": None}))
    code, said = desk.run("preprocess", "c.yml")
    assert code == 0
    assert "1 of 12 rows dropped: without a trained token" in said


@pytest.mark.parametrize("index", [0, 6, 11])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "hi"}, ("not JSON", "'hi'")),
        ({"messages": {"role": "user", "content": "x"}}, ("Unknown messages format: a mapping",)),
        ({"messages": None}, ("Messages is null",)),
        ({"messages": []}, ("holds no message",)),
        ({"messages": [{"content": "x"}]}, ("no `role`",)),
        ({"messages": [{"role": 3, "content": "x"}]}, ("role of a message is a number",)),
        ({"messages": [{"role": "user", "content": 7}]}, ("message 0 (`user`) has a number",)),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
            ("message 1 (`assistant`) has null",),
        ),
    ],
)
def test_messages_of_the_wrong_kind(desk, index, row, words):
    desk.use_chat(with_row(index, row, CHAT))
    desk.refuses(f"Row {index} of `d.jsonl`", *words)


def test_rows_that_are_one_message_each_are_not_one_conversation(desk):
    desk.use_chat([{"messages": {"role": "user", "content": "x"}}] * 3)
    desk.refuses("Row 0 of `d.jsonl`", "Unknown messages format: a mapping")


def test_an_unknown_role_is_said_once(desk):
    rows = [{"messages": [{"role": "usr", "content": "x"}, {"role": "assistant", "content": "y"}]}] * 4
    desk.use_chat(rows)
    code, said = desk.run("preprocess", "c.yml")
    assert code == 0
    assert said.count("the role `usr`") == 1


def _no_template(desk: Desk) -> None:
    desk.cfg["base_model"] = str(desk.bases / "no_template")
    desk.use_chat(CHAT)


def _broken_jinja(desk: Desk) -> None:
    desk.use_chat(CHAT)
    desk.cfg |= {"chat_template": "jinja", "chat_template_jinja": "{% for m in messages %}\n{{ m"}


def _cut_weights(desk: Desk) -> None:
    shutil.copytree(desk.bases / "base", desk.folder / "m")
    os.truncate(desk.folder / "m/model.safetensors", 1000)
    desk.cfg["base_model"] = "m"


def _no_tokenizer(desk: Desk) -> None:
    shutil.copytree(desk.bases / "base", desk.folder / "m")
    for file in (desk.folder / "m").glob("token*"):
        file.unlink()
    desk.cfg["base_model"] = "m"


def _a_file_for_output(desk: Desk) -> None:
    (desk.folder / "f").write_text("mine")
    desk.cfg["output_dir"] = "f/out"


def _a_file_for_the_cache(desk: Desk) -> None:
    (desk.folder / "f").write_text("mine")
    desk.cfg["dataset_prepared_path"] = "f"


def _set(**changes: Any) -> Callable[[Desk], None]:
    return lambda desk: desk.cfg.update(changes)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_set(base_model="./nope"), ("`base_model: ./nope` does not exist",)),
        (_set(datasets=[{"path": "nope.jsonl", "type": "alpaca"}]), ("`path: nope.jsonl` does not exist",)),
        (_set(datasets=[{"path": "d.jsonl", "type": "alpca"}]), ("`type: alpca`", "Did you mean `alpaca`")),
        (_set(datasets=[{"path": "d.jsonl"}]), ("has no `type`", "instruction")),
        (_set(chat_template="chatmll"), ("`chat_template: chatmll`", "`chatml`")),
        (_no_template, ("tokenizer's chat_template is null", "chat_template: chatml")),
        (_broken_jinja, ("`chat_template_jinja` is not a valid jinja template", "Line 2")),
        (_cut_weights, ("`base_model: m`", "damaged or cut short")),
        (_no_tokenizer, ("`base_model: m` holds no tokenizer", "tokenizer.json")),
        (_a_file_for_output, ("`output_dir: f/out` cannot be written", "f is a file")),
        (_a_file_for_the_cache, ("`dataset_prepared_path: f` cannot be written",)),
        (_set(torch_compile=True, torch_compile_backend="inductr"), ("`torch_compile_backend: inductr`", "`inductor`")),
        (_set(accelerator_config={"splt_batches": True}), ("`accelerator_config.splt_batches`", "`split_batches`")),
        (_set(trainer_cls="json.JSONDecoder"), ("`trainer_cls: json.JSONDecoder` is no trainer",)),
        (_set(num_epochs=0, max_steps=None), ("`num_epochs: 0` trains nothing",)),
        (_set(logging_steps=0), ("`logging_steps: 0`", "above 0")),
        (_set(hub_model_id="me/my model"), ("`hub_model_id: me/my model`", "owner/name")),
        (_set(sequence_len=8), ("no row is left to train on", "12 longer than `sequence_len: 8`")),
        (_set(val_set_size=100), ("`val_set_size: 100", "only 12")),
        (_set(lora_target_linear=False, lora_target_modules=["qproj"]), ("matches nothing", "Did you mean q_proj")),
        (_set(lora_model_dir="nope"), ("`lora_model_dir: nope`", "adapter_config.json")),
        (_set(resume_from_checkpoint="out/checkpoint-9"), ("`resume_from_checkpoint: out/checkpoint-9`", "none")),
        (_set(learning_rate=1e30, non_finite_policy="raise"), ("The loss of step 2 is nan", "lower `learning_rate`")),
        (
            _set(sample_paking=True, lora_r="x", micro_batch_size=None, bf16="perhaps"),
            ("`sample_packing`", "`lora_r: x`"),
        ),
    ],
)
def test_configs_that_cannot_be_trained(desk, prepare, words):
    prepare(desk)
    desk.refuses(*words)
    assert not (desk.folder / "out/adapter_model.safetensors").exists()
    if (desk.folder / "f").exists():
        assert (desk.folder / "f").read_text() == "mine"


def test_a_tokenizer_with_neither_padding_nor_end(desk):
    desk.cfg["base_model"] = str(desk.bases / "no_end")
    desk.refuses("pad")


def test_commands_before_training(desk):
    desk.refuses("Train first", "--lora-model-dir", command=("merge-lora", "c.yml"))
    desk.refuses("Train first", "--lora-model-dir", "--adapter null", command=("evaluate", "c.yml"))
    (desk.folder / "out/checkpoint-3").mkdir(parents=True)
    (desk.folder / "out/checkpoint-best").mkdir()
    for command in ("merge-lora", "evaluate"):
        desk.refuses("--lora-model-dir out/checkpoint-3", command=(command, "c.yml"))
    code, said = desk.run("evaluate", "c.yml", "--adapter", "null")
    assert code == 0, said
    assert "the base model" in said


def test_the_traceback_is_there_for_those_who_ask(desk, monkeypatch):
    monkeypatch.setenv("AXOLOTL_DEBUG", "1")
    (desk.folder / "d.jsonl").write_text("")
    code, said = desk.run()
    assert code == 1
    assert "Traceback" in said
    assert "d.jsonl is empty" in said


def test_a_normal_run_says_nothing_that_a_library_muttered(desk):
    desk.run("preprocess", "c.yml")  # writes the config file
    # A process of its own: libraries mutter while they are imported.
    command = [sys.executable, "-m", "axolotl.cli.main", "train", "c.yml"]
    done = subprocess.run(command, cwd=desk.folder, capture_output=True, text=True, timeout=500)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for noise in ("Failed to load", "FutureWarning", "it/s]", "examples/s]", "_pytree"):
        assert noise not in said
    assert len(said.splitlines()) < MAX_LINES, said
