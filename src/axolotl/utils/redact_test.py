from __future__ import annotations

import pytest

from axolotl.utils.redact import HIDDEN, redact_secrets


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
