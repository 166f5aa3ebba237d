"""Utilities for `axolotl fetch` CLI command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import axolotl
from axolotl.exceptions import ConfigError

# Hashes of what was written, kept in the folder itself: a file that differs from its hash was changed by its owner.
RECORD = ".axolotl-fetch.json"


@dataclass
class FetchReport:
    """What happened to each file, by its path below the folder.

    Attributes:
        folder: where the files are.
        written: new, or brought up to date.
        unchanged: already there as shipped.
        kept: changed by their owner, so that the shipped file was written beside them as `<name>.new`.
    """

    folder: Path
    written: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def fetch_from_github(dir_prefix: str, dest_dir: str | None = None, max_workers: int = 5) -> FetchReport:
    """Sync files from a specific directory in the repository. Only files that don't exist locally or have changed are
    written. They come from the installed package, so that they fit its version; no network is used.

    Args:
        dir_prefix: Directory prefix to filter files (e.g., 'examples/', 'deepspeed_configs/').
        dest_dir: Local destination directory; by default a folder of the same name in the current one.
        max_workers: Accepted for compatibility; the files are copied one by one.

    Returns:
        What was written and what was kept.

    Raises:
        ConfigError: nothing is shipped under this name. Also a ValueError.
    """
    name = dir_prefix.strip("/")
    source = shipped_folder(name)
    folder = Path(dest_dir) if dest_dir else Path.cwd() / name
    report = FetchReport(folder)
    record_path = folder / RECORD
    record: dict[str, str] = json.loads(record_path.read_text(encoding="utf-8")) if record_path.is_file() else {}
    for relative in _files_below(source):
        content = (source / relative).read_bytes()
        target = folder / relative
        shipped_hash = hashlib.sha256(content).hexdigest()
        present_hash = hashlib.sha256(target.read_bytes()).hexdigest() if target.is_file() else None
        key = relative.as_posix()
        if present_hash == shipped_hash:
            report.unchanged.append(key)
        elif present_hash is None or record.get(key) == present_hash:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            report.written.append(key)
        else:
            target.with_name(target.name + ".new").write_bytes(content)
            report.kept.append(key)
            continue
        record[key] = shipped_hash
    folder.mkdir(parents=True, exist_ok=True)
    record_path.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    return report


def shipped_folder(name: str) -> Path:
    """The folder `name` inside the installed package, or at the root of the checkout of an editable install."""
    package = Path(axolotl.__file__).parent
    top = name.split("/")[0]
    for root in (package / "_shipped", package.parents[1]):
        if top in ("examples", "deepspeed_configs", "docs") and ".." not in name and (root / name).is_dir():
            return root / name
    raise ConfigError(f"Nothing is shipped under `{name}`. Available: examples, deepspeed_configs, docs.")


def _files_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in relative.parts):
            yield relative
