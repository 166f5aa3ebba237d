from __future__ import annotations

import json
import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from axolotl.cli.utils.read import LOADERS, parse_config
from axolotl.exceptions import ConfigError


def refusal(content: bytes | str, source: str = "c.yml") -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(content if isinstance(content, bytes) else content.encode(), source)
    return str(error.value)


def test_yaml_and_json_hold_the_same():
    expected = {"base_model": "a/b", "datasets": [{"path": "x", "type": "alpaca"}], "learning_rate": 0.1}
    assert parse_config(json.dumps(expected).encode(), "c.json") == expected
    assert parse_config(json.dumps(expected).encode(), "c.yml") == expected
    assert parse_config(b"{base_model: a/b, x: 1}", "c.yml") == {"base_model": "a/b", "x": 1}
    assert parse_config("\ufeffbase_model: a".encode(), "c.yml") == {"base_model": "a"}


def test_merge_keys_are_not_duplicates():
    text = b"base: &b {x: 1, y: 2}\nother: {<<: *b, x: 3}\n"
    assert parse_config(text, "c.yml")["other"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("text", ["a: &x [*x]", "a: &x {b: [1, *x]}"])
def test_an_alias_inside_its_own_value(text):
    assert "inside the value that it names" in refusal(text)


def test_a_key_written_twice_names_both_lines_and_the_last_counts(monkeypatch):
    said = []
    monkeypatch.setattr("axolotl.cli.utils.read.LOG.warning", said.append)
    assert parse_config(b"base_model: a\nseed: 1\nbase_model: b\ntrl:\n  beta: 1\n  beta: 2\n", "c.yml") == {
        "base_model": "b",
        "seed": 1,
        "trl": {"beta": 2},
    }
    assert "`base_model` is written twice: on line 1 and again on line 3" in said[0]
    assert "`beta` is written twice" in said[1]
    assert "`a` is written twice" in refusal('{"a": 1, "a": 2}', "c.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "holds a list"),
        (b"just text", "holds text"),
        (b"a: 1\n\0", "binary"),
        (b"\xff\xfe\x00", "binary"),
        (b"a: 1\nb: \xff\n", "line 2 is not UTF-8"),
        (b"a: [1, 2\nb: 3\n", "not valid YAML"),
        (b"a: 1\n\tb: 2\n", "line 2"),
        (b"on: 1\n", "read by YAML as true/false"),
        (b"a: 1\n---\nb: 2\n", "several YAML documents"),
        (
            b"a: &a [x, x]\n"
            + b"".join(
                b"b%d: &%s [*%s, *%s, *%s, *%s]\n" % (n, b"bcdefghij"[n : n + 1], *[b"abcdefghi"[n : n + 1]] * 4)
                for n in range(9)
            ),
            "100,000 values",
        ),
        (b"d: 2024-13-45\n", "in quotes"),
        (b"a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_config(content, words):
    message = refusal(content)
    assert words in message
    assert message.startswith("c.yml")
    assert len(message.splitlines()) <= 4


def test_the_caret_stands_under_the_error():
    lines = refusal("a: 1\nb: 'open\nc: ]\n").splitlines()
    assert lines[1].startswith("  line ")
    assert lines[2].strip() == "^"
    json_lines = refusal('{\n  "a": 1,\n  "b": oops\n}', "c.json").splitlines()
    assert json_lines[1].index("oops") == json_lines[2].index("^")


def test_comments_in_json():
    text = '{\n "url": "https://x//y", // a comment\n /* more */ "a": 1\n}'
    assert parse_config(text.encode(), "c.json") == {"url": "https://x//y", "a": 1}


def test_request_body(monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "")  # so that it is put back afterwards
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("WANDB_API_KEY", "from-environment")
    body = {
        "input": {
            "user_id": "u",
            "run_id": "r",
            "credentials": {"hf_token": "s3cret", "wandb_api_key": "from-body"},
            "args": {"base_model": "a/b"},
        }
    }
    assert parse_config(json.dumps(body).encode(), "body.json") == {"base_model": "a/b"}
    assert os.environ["HF_TOKEN"] == "s3cret"
    assert os.environ["WANDB_API_KEY"] == "from-environment"
    assert "s3cret" not in caplog.text
    body["input"]["credentials"] = {"aws": "x"}
    assert "unknown `input.credentials.aws`" in refusal(json.dumps(body))
    body["input"]["credentials"] = "x"
    assert "credentials" in refusal(json.dumps(body))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("text", ["a: " + "[" * 5000 + "]" * 5000, "- " * 5000, "a: " + "{b: " * 5000])
def test_no_depth_crashes_a_loader(loader, text):
    with pytest.raises((RecursionError, yaml.YAMLError)):
        yaml.load(text, loader)


PIECES = [
    *":-[]{},&*#|>'\"!~ \n",
    "\n  ",
    "\n- ",
    ": ",
    "<<: ",
    "key",
    "é",
    "no",
    "1e-3",
    "0x1f",
    "012",
    "1_0",
    "1:30",
    "'a b'",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_what_the_fast_loader_reads_is_what_the_other_reads(text):
    read = []
    for loader in LOADERS:
        try:
            read.append(yaml.load(text, loader))
        except (yaml.YAMLError, ValueError, TypeError, RecursionError):
            return  # then the last of them says what is wrong
    assert all(repr(one) == repr(read[0]) for one in read) or "!" in text  # `!` alone is null or an empty text


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_give_a_mapping_or_a_config_error(content):
    try:
        result = parse_config(content, "c.yml")
    except ConfigError:
        return
    assert isinstance(result, dict)
    assert all(isinstance(key, str) for key in result)
