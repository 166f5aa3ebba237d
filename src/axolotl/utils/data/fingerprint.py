"""The key of a prepared dataset: everything that its tokens depend on.

Config fields that the pipeline reads, the content of every source and template file, the tokenizer, and the code that turns
rows into tokens. Equal keys mean equal rows, so a prepared dataset with the right key is always safe to use again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import urllib.request
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import fsspec
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

import axolotl
from axolotl.utils.data.shared import local_data_files, names_reader
from axolotl.utils.data.synthetic import SYNTHETIC
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

TIMEOUT_SECONDS = 10

CONFIG_KEYS = [
    "sequence_len",
    "eval_sequence_len",
    "excess_length_strategy",
    "min_sample_len",
    "train_on_inputs",
    "pretraining_sample_concatenation",
    "seed",
    "shuffle_merged_datasets",
    "shuffle_before_merging_datasets",
    "curriculum_sampling",
    "dataset_exact_deduplication",
    "dataset_shard_num",
    "dataset_shard_idx",
    "chat_template",
    "chat_template_jinja",
    "chat_template_kwargs",
    "eot_tokens",
    "default_system_message",
    "special_tokens",
    "tokens",
    "added_tokens_overrides",
    "tokenizer_use_mistral_common",
    "processor_kwargs",
    "processor_type",
    "rl",
    "reward_model",
    "process_reward_model",
    "use_pose",
    "pose_split_on_token_ids",
    "pose_max_context_len",
    "pose_num_chunks",
    "max_prompt_len",
    "step_scorer",
    "kd_temperature",
    "kd_normalize_topk",
    "kd_online_server_base_url",
    "plugins",
]
"""Keys of the config, besides the entries of `datasets`, that change prepared rows."""

CODE = (
    "prompt_strategies",
    "prompters.py",
    "prompt_tokenizers.py",
    "datasets.py",
    "core/chat",
    "core/datasets",
    "utils/chat_templates",
    "utils/data",
)
"""Code of this package, relative to it, that turns rows into tokens."""


def dataset_key(cfg: DictDefault, entries: Iterable[DictDefault], tokenizer: Any, part: str) -> str:
    """The key of the rows prepared from `entries`.

    Args:
        cfg: the whole config.
        entries: the entries of `datasets` or `test_datasets`.
        tokenizer: the tokenizer of the run.
        part: `train` or `test`.
    """
    entries = list(entries)
    digest = hashlib.blake2b(digest_size=16)
    for value in (
        part,
        {key: cfg[key] for key in CONFIG_KEYS if cfg[key] is not None},
        [_plain(entry) for entry in entries],
        [source_fingerprint(entry, bool(cfg.hf_use_auth_token)) for entry in entries],
        [_template_file(holder.chat_template_jinja) for holder in (cfg, *entries)],
        tokenizer_fingerprint(tokenizer),
        own_code_fingerprint(),
        [strategy_code_fingerprint(entry.type) for entry in entries],
        [strategy_code_fingerprint(entry.input_transform) for entry in entries],
        datasets.__version__.split(".")[0],
    ):
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an entry that are set. A local path counts by its content, wherever it lies."""
    return {
        key: value for key, value in entry.items() if value is not None and not (key == "path" and _is_local(value))
    }


def _is_local(path: Any) -> bool:
    return isinstance(path, str) and "://" not in path and Path(path).expanduser().exists()


def source_fingerprint(entry: DictDefault, use_auth_token: bool) -> str:
    """What the source of an entry holds now: content of local files, the commit of a hub dataset, the tag of an URL."""
    path = str(entry.path)
    if entry.type == SYNTHETIC:
        return SYNTHETIC
    if path.startswith(("https://", "http://")):
        return _web_fingerprint(path)
    if "://" in path:
        return _url_fingerprint(path)
    local = Path(path).expanduser()
    if local.is_file():
        return file_fingerprint(local)
    if local.is_dir():
        return folder_fingerprint(local)
    if names_reader(entry):
        return json.dumps([file_fingerprint(file) for file in local_data_files(entry)])
    return _hub_fingerprint(path, entry.revision, use_auth_token)


def file_fingerprint(file: Path) -> str:
    """Digest of name suffixes, size and content."""
    with open(file, "rb") as stream:
        content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return f"{''.join(file.suffixes)}:{file.stat().st_size}:{content}"


def folder_fingerprint(folder: Path) -> str:
    """Digest of names and contents of all files below, without what `datasets` caches there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("cache-"))
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(folder)}\0{file_fingerprint(file)}\0".encode())
    return digest.hexdigest()


def _url_fingerprint(url: str) -> str:
    """Size and tag of what an URL names, as far as its server tells; a folder by its listing."""
    try:
        filesystem, inner = fsspec.core.url_to_fs(url)
        found = filesystem.find(inner, detail=True) if filesystem.isdir(inner) else {inner: filesystem.info(inner)}
    except (OSError, ValueError, ImportError) as error:
        LOG.debug(f"{url}: no fingerprint ({error})")
        return url
    tags = ("ETag", "etag", "size", "mtime", "LastModified", "last_modified", "updated", "generation", "content_md5")
    return json.dumps([[name, [str(info.get(tag)) for tag in tags]] for name, info in sorted(found.items())])


def _web_fingerprint(url: str) -> str:
    """What the server says about a file: its tag, date and size."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_SECONDS) as answer:
            headers = {name: answer.headers.get(name) for name in ("ETag", "Last-Modified", "Content-Length")}
    except OSError as error:
        LOG.debug(f"{url}: no fingerprint ({error})")
        return url
    return json.dumps([url, headers])


def _hub_fingerprint(repo: str, revision: str | None, use_auth_token: bool) -> str:
    """The commit of a hub dataset. Offline, the revision as written: the local copy does not change by itself."""
    try:
        return str(
            HfApi().dataset_info(repo, revision=revision, token=True if use_auth_token else None, timeout=10).sha
        )
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        LOG.debug(f"{repo}: the hub gives no commit ({type(error).__name__})")
        return f"offline:{revision}"


def _template_file(template: str | None) -> str | None:
    """Content of a template that is given as a file."""
    if not template or "\n" in template or "{" in template or not Path(template).is_file():
        return None
    return file_fingerprint(Path(template))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Digest of vocabulary, merges, added tokens, special tokens and template."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
        # Truncation and padding stand before the added tokens; they are state of the last call, not of the vocabulary.
        digest.update(text[text.find('"added_tokens"') :].encode())
    elif hasattr(tokenizer, "get_vocab"):
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name in (
        "name_or_path",
        "chat_template",
        "special_tokens_map",
        "add_bos_token",
        "add_eos_token",
        "padding_side",
    ):
        value = getattr(tokenizer, name, None)
        if name != "name_or_path" or backend is None:
            digest.update(json.dumps([name, value], sort_keys=True, default=str).encode())
    digest.update(type(tokenizer).__name__.encode())
    return digest.hexdigest()


@cache
def own_code_fingerprint() -> str:
    """Digest of the code of this package that makes tokens."""
    root = Path(axolotl.__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for name in CODE:
        place = root / name
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            if file.suffix in (".py", ".jinja") and not file.name.endswith("_test.py") and file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def strategy_code_fingerprint(strategy: Any) -> str | None:
    """Digest of the module of a strategy of the user's own, a dotted path outside this package's strategies."""
    if not isinstance(strategy, str) or "." not in strategy:
        return None
    parts = strategy.split(":")[0].split(".")
    for stop in range(len(parts), 0, -1):
        try:
            spec = importlib.util.find_spec(".".join(parts[:stop]))
        except (ImportError, ValueError):
            continue
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            return file_fingerprint(Path(spec.origin))
    return None
