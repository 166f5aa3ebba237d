"""Checkpoints that are whole or not there.

A checkpoint is written to a folder beside its final place, its files are flushed to the disk, a marker with the size and
digest of every file is written last, and the folder is renamed. A process killed at any moment leaves either the old state
or the new one; what it was writing has a name that starts with a dot and is removed by the next run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axolotl.core.digest import ALGORITHM, digest_file
from axolotl.exceptions import CheckpointError
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

MARKER = "axolotl_checkpoint.json"
RUN_STATE = "tokens_state.json"
TRAINER_STATE = "trainer_state.json"
SAVED_CONFIG = "axolotl_config.yaml"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ASIDE = re.compile(r"\.(?:checkpoint-\d+|model)\.(writing|replaced)")
_MODEL_ASIDE = ".model.writing"
_WEIGHTS = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_ADAPTER_CONFIG = "adapter_config.json"


def aside_path(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is whole."""
    return Path(output_dir) / f".checkpoint-{step}.writing"


def checkpoint_path(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is whole."""
    return Path(output_dir) / f"checkpoint-{step}"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, the last saved one last, whole or not.

    That is not always the one of the highest step: a run that begins anew in the folder of an earlier one, or goes on from a
    checkpoint before the last, stays behind it for a while. Those that do not say when they were saved are the oldest.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = {p: int(m[1]) for p in output_dir.iterdir() if (m := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()}
    orders = {path: _read_order(path) for path in found}

    def place(path: Path) -> tuple[int, int]:
        order = orders[path]
        if order is None:  # a marker that cannot be read: as if saved after the steps before it
            order = max((other for p, other in orders.items() if other and found[p] < found[path]), default=0)
        return order, found[path]

    return sorted(found, key=place)


def _read_order(folder: Path) -> int | None:
    """The number of a checkpoint among all that were saved to its folder; 0 when it has none, None when unreadable."""
    try:
        return int(json.loads((folder / MARKER).read_text(encoding="utf-8")).get("order", 0))
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def seal_checkpoint(folder: Path, final: Path) -> None:
    """Make a written folder durable, mark it, and move it to its place.

    Args:
        folder: the folder that was written.
        final: where it shall lie, on the same file system. A folder that is there is replaced.
    """
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for name in files:
        _sync(folder / name)
    digests = {name: digest_file(folder / name) for name in files}
    marker = folder / MARKER
    order = 1 + max((_read_order(path) or 0 for path in list_checkpoints(final.parent)), default=0)
    contents = {"files": files, "algorithm": ALGORITHM, "digests": digests, "order": order}
    marker.write_text(json.dumps(contents, indent=1), encoding="utf-8")
    _sync(marker)
    for sub in (path for path in folder.rglob("*") if path.is_dir()):
        _sync(sub)
    _sync(folder)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(folder, final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def model_aside(output_dir: str | Path, *, owner: bool = True) -> Iterator[Path]:
    """A folder to write the trained model to; its files replace those of `output_dir` once all of them are on the disk.

    Args:
        output_dir: folder of the run, which may hold the model of an earlier one.
        owner: whether this process moves the files. Other ranks only get the path.
    """
    aside = Path(output_dir) / _MODEL_ASIDE
    try:
        yield aside
        if not owner or not aside.is_dir():
            return
        files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
        for path in files:
            _sync(path)
        _clear_earlier_model(Path(output_dir), {path.name for path in files})
        for path in files:
            target = Path(output_dir) / path.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        _sync(Path(output_dir))
    finally:
        if owner:
            shutil.rmtree(aside, ignore_errors=True)


def has_weights(folder: str | Path) -> bool:
    """Whether a trained model or adapter lies in a folder."""
    return any(_WEIGHTS.fullmatch(path.name) for path in Path(folder).iterdir())


def _clear_earlier_model(output_dir: Path, new: set[str]) -> None:
    """Take away what would be loaded instead of a new model, or on top of it.

    Whole weights go before shards, and shards before others, so that files of an earlier run that the new one does not replace
    are removed. An adapter of an earlier run is put in a folder of its own: libraries load its base model where they find it.
    """
    kinds = {match[1] for name in new if (match := _WEIGHTS.fullmatch(name))}
    for path in list(output_dir.iterdir()):
        match = _WEIGHTS.fullmatch(path.name)
        if match and match[1] in kinds and path.name not in new:
            path.unlink()
    if "model" in kinds and _ADAPTER_CONFIG not in new and (output_dir / _ADAPTER_CONFIG).is_file():
        kept = output_dir / "earlier-adapter"
        kept.mkdir(exist_ok=True)
        for path in output_dir.glob("adapter_*"):
            os.replace(path, kept / path.name)
        LOG.warning(
            f"{output_dir} held the adapter of an earlier run, which would be loaded instead of the model that was trained now. "
            f"It is in {kept}."
        )


def check_checkpoint(folder: str | Path, *, content: bool = False) -> None:
    """Raise `CheckpointError` unless the checkpoint is whole.

    A checkpoint without a marker was written by another program; it counts as whole when its trainer state can be read.

    Args:
        folder: the checkpoint.
        content: also read every file and compare its digest. A marker without digests has sizes only.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"the checkpoint {folder} does not exist")
    if not (folder / MARKER).is_file():
        try:
            json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the checkpoint {folder} has no readable {TRAINER_STATE}: {error}") from error
        return
    files, digests = _read_marker(folder)
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint {folder} lacks the file {name}")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {size}")
    for name, digest in digests.items() if content else ():
        try:
            found = digest_file(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
        if found != digest:
            raise CheckpointError(f"{folder / name} is not what was saved: its digest is {found} instead of {digest}")


def _read_marker(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes and digests by name of file. No digests when they were made in another way than here."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files, digests = dict(marker["files"]), dict(marker.get("digests") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint {folder} has a marker that cannot be read: {error}") from error
    return files, digests if marker.get("algorithm") == ALGORITHM else {}


def check_resumable(folder: Path) -> None:
    """Raise `CheckpointError` when a checkpoint holds a model and nothing to go on with."""
    names = {path.name for path in folder.iterdir()}
    if "scheduler.pt" in names or any(name.startswith(("optimizer", "global_step")) for name in names):
        return
    remedy = "`lora_model_dir`" if "adapter_config.json" in names else "`base_model`"
    raise CheckpointError(
        f"The checkpoint {folder} was saved with `save_only_model: true`: it has no optimizer, scheduler and random state, so "
        f"the run cannot go on from it. To start a new run from its weights, set {remedy} to it, choose another "
        "`output_dir`, and switch `resume_from_checkpoint` and `auto_resume_from_checkpoints` off."
    )


def is_whole(folder: str | Path) -> bool:
    """Whether `check_checkpoint` has nothing to say."""
    try:
        check_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def find_last_whole_checkpoint(
    output_dir: str | Path, *, before: int | None = None, content: bool = False
) -> Path | None:
    """The whole checkpoint that was saved last, or None. Broken ones on the way are warned about.

    Args:
        output_dir: folder of the run.
        before: only look at lower steps than this.
        content: whether to compare digests too, as `check_checkpoint` does.
    """
    for folder in reversed(list_checkpoints(output_dir)):
        if before is not None and step_of(folder) >= before:
            continue
        try:
            check_checkpoint(folder, content=content)
        except CheckpointError as error:
            LOG.warning(f"Not resuming from a broken checkpoint: {error}.")
            continue
        return folder
    return None


def step_of(folder: str | Path) -> int:
    """The step in the name of a checkpoint folder; -1 when the name has none."""
    match = _CHECKPOINT.fullmatch(Path(folder).name)
    return int(match[1]) if match else -1


def resolve_checkpoint(
    resume_from: str | Path | bool | None, output_dir: str | Path, *, auto: bool = False, content: bool = True
) -> Path | None:
    """The checkpoint to resume from, verified.

    Args:
        resume_from: `resume_from_checkpoint` of the config: a path, True for the last one, or None.
        output_dir: folder of the run.
        auto: `auto_resume_from_checkpoints`: take the last whole one if there is any.
        content: whether to compare digests too, as `check_checkpoint` does.

    Returns:
        The named checkpoint if it is whole, else the one before it, with a warning; None to start from the beginning.

    Raises:
        CheckpointError: the named checkpoint does not exist, none is whole, or it holds a model only.
    """
    if isinstance(resume_from, bool) or resume_from is None:
        found = find_last_whole_checkpoint(output_dir, content=content) if (resume_from or auto) else None
        if resume_from and found is None:
            raise CheckpointError(f"`resume_from_checkpoint: true`, but {output_dir} has no whole checkpoint.")
        if auto and found is None and list_checkpoints(output_dir):
            LOG.warning(f"No checkpoint in {output_dir} is whole: the run starts at the beginning.")
    else:
        found = _resolve_named(Path(resume_from), Path(output_dir), content)
    if found is not None:
        check_resumable(found)
        if not (found / MARKER).is_file():
            LOG.warning(f"{found} was written by another program: it has no {MARKER} to check its files with.")
    return found


def _resolve_named(folder: Path, output_dir: Path, content: bool) -> Path:
    """The checkpoint `folder`, or the last whole one before it."""
    if not folder.is_dir():
        have = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
        raise CheckpointError(
            f"`resume_from_checkpoint: {folder}` does not exist. Checkpoints in {output_dir}: {have}."
        )
    try:
        check_checkpoint(folder, content=content)
    except CheckpointError as error:
        step = step_of(folder)
        before = find_last_whole_checkpoint(folder.parent, before=step, content=content) if step >= 0 else None
        if before is None:
            raise CheckpointError(
                f"`resume_from_checkpoint: {folder}` cannot be used: {error}, and no earlier checkpoint is whole."
            ) from error
        LOG.warning(f"{error}. Resuming from {before} instead.")
        return before
    return folder


def remove_leftovers(output_dir: str | Path) -> None:
    """Remove what a killed process was writing, and put back what it was about to replace."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return
    for path in output_dir.iterdir():
        match = _ASIDE.fullmatch(path.name)
        if not match:
            continue
        final = output_dir / path.name[1:].rsplit(".", 1)[0]
        if match[1] == "replaced" and not final.exists():
            os.rename(path, final)
        else:
            LOG.warning(f"Removing {path}, left over from a run that was killed while it saved.")
            shutil.rmtree(path, ignore_errors=True)


def remove_old_checkpoints(output_dir: str | Path, limit: int | None, keep: str | Path | None = None) -> None:
    """Delete the oldest checkpoints so that at most `limit` stay.

    Never deleted: the last whole one, and `keep` (the best one). Broken ones do not count and go as soon as a later one is
    whole.
    """
    if not limit or limit <= 0:
        return
    checkpoints = list_checkpoints(output_dir)
    whole = [path for path in checkpoints if is_whole(path)]
    if not whole:
        return
    protected = {whole[-1].resolve()}
    if keep is not None:
        protected.add(Path(keep).resolve())
    broken = [path for path in checkpoints[: checkpoints.index(whole[-1])] if path not in whole]
    spare = [path for path in whole if path.resolve() not in protected]
    excess = len(whole) - max(limit, len(protected))
    for path in broken + spare[: max(excess, 0)]:
        # Renamed first: a process killed while it deletes must not leave half a checkpoint under a good name.
        doomed = path.with_name(f".{path.name}.writing")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            os.rename(path, doomed)
        except OSError as error:
            LOG.warning(f"The old checkpoint {path} could not be removed: {error}")
        shutil.rmtree(doomed, ignore_errors=True)


def read_run_state(folder: str | Path) -> dict[str, Any]:
    """Counters that transformers does not keep; empty when the checkpoint has none."""
    path = Path(folder) / RUN_STATE
    if not path.is_file():
        LOG.warning(f"{folder} has no `{RUN_STATE}`: token counts start at zero.")
        return {}
    state = json.loads(path.read_text(encoding="utf-8"))
    # Another program's file has only these two.
    state.setdefault("num_tokens_seen", state.get("total", 0))
    state.setdefault("num_tokens_trained", state.get("trainable", 0))
    return state


def write_run_state(folder: str | Path, state: dict[str, Any]) -> None:
    """The counters of a run, beside the files of transformers."""
    state = {**state, "total": state.get("num_tokens_seen", 0), "trainable": state.get("num_tokens_trained", 0)}
    (Path(folder) / RUN_STATE).write_text(json.dumps(state), encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder. The rename is still atomic there.
        if not path.is_dir():
            raise
        LOG.debug(f"cannot sync the folder {path}: {error}")
    finally:
        os.close(descriptor)
