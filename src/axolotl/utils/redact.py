"""Secrets are taken out of whatever is logged, saved or given to a tracker."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "[redacted]"

# Names of secrets, in lower case with underscores.
_SECRET_KEY = re.compile(
    r"api_?key|secret|passw(or)?d|passphrase|pass_?wd|^pwd$|credential|webhook|authorization|^bearer$|cookie"
    r"|(access|account|private|storage|encryption|ssh)_key$|connection_string|signature|^sig$"
)
_TOKEN_KEY = re.compile(r"(^|_)token$")
# Tokens of a tokenizer, and numbers of them. Any other `..._token` opens a door.
_SPECIAL_TOKEN_KEY = re.compile(
    r"(^|_)(max|min|num|bos|eos|unk|pad|sep|cls|mask|eot|eom|turn|start|end|begin|stop|first|last|next|new|per|special|image|audio|video"
    r"|vision|speech|boi|eoi|boa|eoa|think|tool|prefix|suffix|middle|fim|chat|user|assistant|system|added|extra|fill)_token$"
)
_QUERY_SECRET = re.compile(
    r"([?&;][^=&;\s]*(?:token|key|secret|passw|signature|sig|credential|auth)[^=&;\s]*=)[^&;\s#\"']+", re.IGNORECASE
)
# What stands before the host. A number between colon and slash is a port, not a password.
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/\s:@]*:(?!\d+(?:[/?#]|$))[^\s]*@|(?<=://)[^/\s:@]*:[^/\s]*@")
_TOKEN_IN_URL = re.compile(r"(?<=https://)[^/\s:@]+@|(?<=http://)[^/\s:@]+@")
# Keys that tell by their form what they are: Hugging Face, GitHub, OpenAI and alike, Slack, AWS, Google.
_KNOWN_FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,})"
)
# A value of the environment that is shorter may be an ordinary word.
_SHORTEST_SECRET = 8


def is_secret_name(name: str) -> bool:
    """Whether a key, flag or variable of this name holds a secret: `comet_api_key`, `HF_TOKEN`, `clientSecret`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    plain = re.sub(r"[\W_]+", "_", words).strip("_").lower()
    if _TOKEN_KEY.search(plain):
        return not _SPECIAL_TOKEN_KEY.search(plain)
    return bool(_SECRET_KEY.search(plain))


def redact_secrets(value: Any, key: str = "") -> Any:
    """A plain copy of `value` without its secrets.

    `[redacted]` replaces texts and numbers under a key that names a secret, at any depth, and within other texts: logins in
    addresses, secrets in their queries, keys of a known form, and what variables of the environment hold as secrets. Keys of
    special tokens (`pad_token`, `eos_token`) are not secrets; a switch such as `hf_use_auth_token: true` stays.
    """
    return _redact(value, secret=is_secret_name(key), found=_secrets_of_environment())


def _redact(value: Any, *, secret: bool, found: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {
            name: _redact(item, secret=secret or is_secret_name(str(name)), found=found) for name, item in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_redact(item, secret=secret, found=found) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if secret:
        return HIDDEN
    return _redact_text(value, found) if isinstance(value, str) else value


def _redact_text(text: str, found: Sequence[str]) -> str:
    for known in found:
        text = text.replace(known, HIDDEN)
    if "://" in text:
        text = _TOKEN_IN_URL.sub(f"{HIDDEN}@", _LOGIN_IN_URL.sub(f"{HIDDEN}@", text))
        text = _QUERY_SECRET.sub(rf"\1{HIDDEN}", text)
    return _KNOWN_FORM.sub(HIDDEN, text)


def _secrets_of_environment() -> list[str]:
    """Longest first, so that one which contains another is replaced whole.

    Folders are no secrets: `PWD` names one, and so may `CREDENTIALS_DIRECTORY`.
    """
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and is_secret_name(name) and not (name == "PWD" or os.path.isdir(value))
    }
    return sorted(values, key=len, reverse=True)


def redact_command(arguments: Sequence[str]) -> list[str]:
    """A command line without its secrets: `--comet-api-key X`, `--comet-api-key=X`, and addresses with a login."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        is_flag = argument.startswith("-")
        if hide_next and not is_flag:
            shown.append(HIDDEN)
        elif is_flag and equals:
            shown.append(f"{flag}={redact_secrets(value, flag)}")
        else:
            shown.append(redact_secrets(argument))
        hide_next = is_flag and not equals and is_secret_name(flag)
    return shown
