"""The key of a prepared dataset: everything that its tokens depend on.

Config fields that the pipeline reads, the content of every source and template file, the tokenizer, and the code that turns
rows into tokens. Equal keys mean equal rows, so a prepared dataset with the right key is always safe to use again.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sysconfig
import urllib.request
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
import xxhash
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

import axolotl
from axolotl.utils.data import files, remote
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


NOT_IN_ROWS = frozenset(
    """datasets test_datasets pretraining_dataset dataset_prepared_path dataset_num_proc dataset_keep_in_memory
    num_dataset_shards_to_save push_dataset_to_hub hf_use_auth_token resolution""".split()  # noqa: SIM905 - a list of quoted words would take a page
)
"""Keys that preparing reads, too, and that do not change the rows: entries are in the key one by one, and the others say how
and where rows are made."""

LIBRARIES = {
    **{module.__name__: module.__version__ for module in (datasets, transformers, tokenizers)},
    "jinja2": importlib.metadata.version("jinja2"),
}
"""Versions of the packages that take part in making tokens of rows. Those that tell theirs are asked: reading the metadata of
transformers takes longer than opening a prepared dataset."""


class WatchedConfig(DictDefault):
    """A config that remembers which of its keys were read: a strategy or plugin of the user's own may depend on any of them.

    Args:
        cfg: the config to stand in for; what is written here is written there as well.
    """

    def __init__(self, cfg: DictDefault | None = None):
        super().__init__()
        object.__setattr__(self, "reads", set())
        object.__setattr__(self, "written", cfg)
        dict.update(self, cfg or {})  # the same values, not copies of them

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if self.written is not None:
            self.written[key] = value

    def __getitem__(self, key: Any) -> Any:
        self.reads.add(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.reads.add(key)
        return super().get(key, default)

    def reads_beyond_key(self) -> dict[str, Any]:
        """Keys that were read and that `dataset_key` does not cover, with their values."""
        beyond = sorted(map(str, self.reads - {*CONFIG_KEYS} - NOT_IN_ROWS))
        return {key: _as_json(dict.get(self, key)) for key in beyond}


def changed_read(cfg: DictDefault, reads: Mapping[str, Any]) -> str | None:
    """The first key whose value is not the one that was read when rows were prepared."""
    return next((key for key, value in reads.items() if _as_json(cfg[key]) != value), None)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def dataset_key(
    cfg: DictDefault, entries: Iterable[DictDefault], tokenizer: Any, part: str, processor: Any = None
) -> str:
    """The key of the rows prepared from `entries`.

    Args:
        cfg: the whole config.
        entries: the entries of `datasets` or `test_datasets`.
        tokenizer: the tokenizer of the run.
        part: `train` or `test`.
        processor: the processor of a multimodal model.
    """
    entries = list(entries)
    digest = hashlib.blake2b(digest_size=16)
    for value in (
        part,
        {key: cfg[key] for key in CONFIG_KEYS if cfg[key] is not None},
        [_plain(entry) for entry in entries],
        [_known_fingerprint(entry, cfg) for entry in entries],
        [_template_file(holder.chat_template_jinja) for holder in (cfg, *entries)],
        tokenizer_fingerprint(tokenizer),
        [type(processor).__name__, getattr(processor, "chat_template", None)],
        own_code_fingerprint(),
        [strategy_code_fingerprint(entry.type) for entry in entries],
        [strategy_code_fingerprint(entry.input_transform) for entry in entries],
        [strategy_code_fingerprint(plugin) for plugin in cfg.plugins or []],
        LIBRARIES,
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
    return isinstance(path, str) and "://" not in path and os.path.exists(os.path.expanduser(path))


def _known_fingerprint(entry: DictDefault, cfg: DictDefault) -> str:
    """What a source holds, now or, when nobody answers, as last seen: rows that were prepared online serve offline too."""
    root = Path(cfg.dataset_prepared_path or "last_run_prepared")
    identity = {key: entry[key] for key in ("path", "name", "revision", "data_files")}
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    seen = root / f"source-{digest}.json"
    found = source_fingerprint(entry, bool(cfg.hf_use_auth_token))
    if found is None:
        if not seen.is_file():
            return "unknown"
        LOG.warning(
            f"dataset `path: {entry.path}` cannot be reached; it is taken to be as it was when it was last prepared ({seen})."
        )
        return str(json.loads(seen.read_text(encoding="utf-8"))["fingerprint"])
    if not _is_local(entry.path) and entry.type != SYNTHETIC:
        _remember(seen, {**identity, "fingerprint": found})
    return found


def _remember(file: Path, content: dict[str, Any]) -> None:
    aside = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        LOG.debug(f"{file} cannot be written ({error}): without network, prepared rows will not be found")


def source_fingerprint(entry: DictDefault, use_auth_token: bool) -> str | None:
    """What the source of an entry holds now: content of local files, the commit of a hub dataset, the tag of an URL.

    None when it is elsewhere and cannot be asked.
    """
    path = str(entry.path)
    if entry.type == SYNTHETIC:
        return SYNTHETIC
    if path.startswith(("https://", "http://")):
        return _web_fingerprint(path)
    if "://" in path:
        return _url_fingerprint(path, entry)
    named = files.named_files(entry)
    if named is not None:
        return json.dumps([file_fingerprint(file) for file in named])
    local = os.path.expanduser(path)
    if os.path.isdir(local):
        files.check_folder(Path(local))
        return folder_fingerprint(Path(local))
    return _hub_fingerprint(path, entry.revision, use_auth_token)


def file_fingerprint(file: Path) -> str:
    """Name suffixes, size and a digest of the content: of 128 bits, and as fast as memory is."""
    with open(file, "rb") as stream:
        content = hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
    return f"{''.join(file.suffixes)}:{file.stat().st_size}:{content}"


def folder_fingerprint(folder: Path) -> str:
    """Digest of names and contents of all files below, without hidden ones and what `datasets` caches there."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.is_file() and not file.name.startswith("cache-") and not any(part[0] == "." for part in inside.parts):
            digest.update(f"{inside}\0{file_fingerprint(file)}\0".encode())
    return digest.hexdigest()


def _url_fingerprint(url: str, entry: DictDefault) -> str | None:
    """Size and tag of what an URL names, as far as its server tells; a folder by its listing."""
    try:
        filesystem, inner = remote.connect(url)
        if entry.data_files:
            found = {name: filesystem.info(name) for name in remote.remote_files(url, entry)}
        else:
            found = filesystem.find(inner, detail=True) or {inner: filesystem.info(inner)}
    except remote.STORE_ERRORS as error:
        LOG.debug(f"{url}: no fingerprint ({error})")
        return None
    tags = (
        "ETag",
        "etag",
        "size",
        "mtime",
        "LastModified",
        "last_modified",
        "updated",
        "generation",
        "content_md5",
        "md5",
    )
    return json.dumps([[name, [str(info.get(tag)) for tag in tags]] for name, info in sorted(found.items())])


def _web_fingerprint(url: str) -> str | None:
    """What the server says about a file: its tag, date and size."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_SECONDS) as answer:
            headers = {name: answer.headers.get(name) for name in ("ETag", "Last-Modified", "Content-Length")}
    except (OSError, ValueError) as error:
        LOG.debug(f"{url}: no fingerprint ({error})")
        return None
    return json.dumps([url, headers])


def _hub_fingerprint(repo: str, revision: str | None, use_auth_token: bool) -> str | None:
    """The commit of a hub dataset."""
    try:
        token = True if use_auth_token else None
        return str(HfApi().dataset_info(repo, revision=revision, token=token, timeout=TIMEOUT_SECONDS).sha)
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        LOG.debug(f"{repo}: the hub gives no commit ({type(error).__name__})")
        return None


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
    """Digest of the module of a strategy or plugin of the user's own, a dotted path, and of the modules that it imports."""
    if not isinstance(strategy, str) or "." not in strategy:
        return None
    parts = strategy.split(":")[0].split(".")
    for stop in range(len(parts), 0, -1):
        origin = _code_of(".".join(parts[:stop]))
        if origin is not None:
            found: dict[str, str] = {}
            _add_code(".".join(parts[:stop]), origin, found)
            return json.dumps(sorted(found.values()))
    return None


def _code_of(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


def _add_code(module: str, origin: Path, found: dict[str, str]) -> None:
    """Add the digests of a module and of what it imports that is neither a library nor this package."""
    found[module] = file_fingerprint(origin)
    if origin.suffix != ".py":
        return
    try:
        tree = ast.parse(origin.read_bytes())
    except (SyntaxError, ValueError):
        return  # importing it will say so
    for name in sorted(_imports(tree, module, origin.name == "__init__.py") - set(found)):
        place = _code_of(name) if _is_users(name.partition(".")[0]) else None
        if place is not None:
            _add_code(name, place, found)


def _imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + (1 if is_package else 0)] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return names - {""}


def _is_users(package: str) -> bool:
    """Whether a top-level package is neither a library nor this one. Looking for it imports nothing."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if spec is None or package == "axolotl" or spec.origin in ("built-in", "frozen"):
        return False
    places = [Path(place) for place in spec.submodule_search_locations or ([spec.origin] if spec.origin else [])]
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not any(
        any(place.is_relative_to(folder) for folder in libraries) or _holds_libraries(place.parent) for place in places
    )


@cache
def _holds_libraries(folder: Path) -> bool:
    """Whether packages were installed here: the base of a virtual environment, a system's dist-packages, `pip --target`."""
    return any(folder.glob("*.dist-info"))
