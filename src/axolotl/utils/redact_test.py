from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.utils.redact import HIDDEN, is_secret_name, redact_command, redact_secrets


@pytest.mark.parametrize(
    "key",
    [
        "comet_api_key",
        "apikey",
        "hf_token",
        "token",
        "HF_TOKEN",
        "swanlab_api_key",
        "lark_secret",
        "auth_token",
        "password",
    ],
)
def test_secrets_are_hidden_at_any_depth(key):
    assert redact_secrets({"a": [{key: "s3cret"}], key: ["s3cret"]}) == {"a": [{key: HIDDEN}], key: [HIDDEN]}


def test_what_only_looks_like_a_secret_stays():
    cfg = {"special_tokens": {"pad_token": "<pad>", "eos_token": "</s>"}, "tokens": ["<x>"], "hf_use_auth_token": True}
    assert redact_secrets(cfg) == cfg


def test_passwords_in_addresses():
    assert redact_secrets({"uri": "https://me:pw@host/x"}) == {"uri": f"https://{HIDDEN}@host/x"}
    assert redact_secrets({"uri": "https://host:80/a@b"}) == {"uri": "https://host:80/a@b"}


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:p@ss@host/x", f"https://{HIDDEN}@host/x"),
        ("https://me:p/w@host", f"https://{HIDDEN}@host"),
        ("redis://:pw@host:1/0", f"redis://{HIDDEN}@host:1/0"),
        ("https://token@github.com/x", f"https://{HIDDEN}@github.com/x"),
        ("https://h/x?sv=1&sig=abc%2B&se=2", f"https://h/x?sv=1&sig={HIDDEN}&se=2"),
        ("see https://u:p@h/x and https://h:80/a@b", f"see https://{HIDDEN}@h/x and https://h:80/a@b"),
        # A container, a user and a path are no secrets.
        ("abfs://container@account.dfs.core.windows.net/p", "abfs://container@account.dfs.core.windows.net/p"),
        ("ssh://git@github.com/x", "ssh://git@github.com/x"),
        ("https://host:8080", "https://host:8080"),
    ],
)
def test_logins_in_addresses(address, shown):
    assert redact_secrets(address) == shown


def test_numbers_and_all_that_is_under_a_secret_are_hidden():
    cfg = {"credentials": {"user": "me", "pin": 1234}, "password": 5, "use_token": None, "hub_token": False, "lr": 0.1}
    assert redact_secrets(cfg) == {
        "credentials": {"user": HIDDEN, "pin": HIDDEN},
        "password": HIDDEN,
        "use_token": None,
        "hub_token": False,
        "lr": 0.1,
    }


def test_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("PLAIN_VARIABLE", "ordinary-value")
    cfg = {"path": "s3://b/0123456789abcdef/x", "note": "ordinary-value"}
    assert redact_secrets(cfg) == {"path": f"s3://b/{HIDDEN}/x", "note": "ordinary-value"}


def test_the_working_folder_is_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("PWD", str(tmp_path / "gone"))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert redact_secrets(f"{tmp_path}/gone/out") == f"{tmp_path}/gone/out"


def test_keys_of_a_known_form_are_hidden_wherever_they_stand():
    assert redact_secrets(f"use hf_{'a' * 34} here") == f"use {HIDDEN} here"
    assert redact_secrets("hf_dataset_of_mine") == "hf_dataset_of_mine"


def test_command_lines():
    command = ["axolotl", "train", "c.yml", "--comet-api-key", "X", "--hub-token=Y", "--eos-token", "</s>", "--debug"]
    assert redact_command([*command, "--password", "--uri", "http://a:b@c"]) == [
        *command[:4],
        HIDDEN,
        f"--hub-token={HIDDEN}",
        *command[6:],
        "--password",
        "--uri",
        f"http://{HIDDEN}@c",
    ]


SECRET = "Zq7-s3cret-Zq7"
plain_keys = st.sampled_from(
    ["path", "datasets", "eos_token", "lora_r", "tokenizer", "keys", "monkey", "author", "a", ""]
)
secret_keys = st.sampled_from(
    [
        "token",
        "hf_token",
        "HF_TOKEN",
        "hubToken",
        "api-key",
        "WANDB_API_KEY",
        "apikey",
        "aws_secret_access_key",
        "client-secret",
        "PASSWORD",
        "dbPasswd",
    ]
    + [
        "passphrase",
        "credentials",
        "lark_webhook_url",
        "connection_string",
        "authorization",
        "access_key",
        "sas_token",
        "cookie",
    ]
)
plain_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.sampled_from(["", "</s>", "./out", "meta/llama-3"]),
)
secret_texts = st.sampled_from(
    [
        f"https://me:{SECRET}@host/x",
        f"mysql://me:{SECRET}@host",
        f"https://h/x?a=1&token={SECRET}",
        f"see https://{SECRET}@h",
    ]
)


def nested(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(plain_keys, inner), st.tuples(inner)),
        max_leaves=8,
    )


@st.composite
def with_secrets(draw):
    """A config in which every secret is under a key that says so, or in an address."""
    leaves = st.one_of(
        plain_values,
        secret_texts,
        st.dictionaries(secret_keys, nested(st.one_of(st.just(SECRET), plain_values)), max_size=2),
    )
    return draw(st.dictionaries(plain_keys, nested(leaves), max_size=4))


@settings(max_examples=100, deadline=None)
@given(with_secrets())
def test_no_secret_is_left_in_any_config(cfg):
    before = copy.deepcopy(cfg)
    shown = redact_secrets(cfg)
    assert SECRET not in json.dumps(shown)
    assert cfg == before
    assert redact_secrets(shown) == shown


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(plain_keys, nested(plain_values), max_size=4))
def test_a_config_without_secrets_stays_as_it_is(cfg):
    assert json.dumps(redact_secrets(cfg)) == json.dumps(cfg)


def test_no_key_of_the_config_is_taken_for_a_secret_by_mistake():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    # A switch, which stays.
    assert {name for name in AxolotlInputConfig.model_fields if is_secret_name(name)} <= {
        "comet_api_key",
        "hf_use_auth_token",
    }
