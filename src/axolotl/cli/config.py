"""Stages [1] to [4]: a path, a URL or standard input becomes the checked, resolved `cfg` of a run.

Finding the file and reading its keys is light, so that a launcher can do it. `load_cfg` then asks the schema and the
machine, and is what every process of a run calls first.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import textwrap
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault
from axolotl.utils.garbage import importing
from axolotl.utils.logging import get_logger
from axolotl.utils.temporary import temporary_folder

LOG = get_logger(__name__)

MAX_REMOTE_BYTES = 1 << 20
REMOTE_TIMEOUT_SECONDS = 30
CONFIG_SUFFIXES = (".yml", ".yaml")


def check_remote_config(config: str | Path) -> str | Path:
    """Fetch a config given as `https://` URL; anything else comes back as it is.

    The content must be JSON or YAML with a mapping; it is parsed, never executed, and at most 1 MiB.

    Args:
        config: a path or a URL.

    Returns:
        The path of a temporary file with the content, or `config` itself.

    Raises:
        ConfigError: an `http://` URL, or content that is too long or no config. Also a ValueError.
    """
    url = str(config)
    scheme = urllib.parse.urlsplit(url).scheme.lower()
    # Path("https://host") has lost one slash; what arrives as a Path may still be meant as a URL.
    if isinstance(config, Path) and scheme in ("http", "https"):
        url = url.replace(":/", "://", 1) if "://" not in url else url
    if scheme == "http":
        raise ConfigError(
            f"`{url}`: a config is not fetched over `http://`, where anyone on the way can change it. Use `https://`."
        )
    if scheme != "https":
        return config
    from axolotl.cli.utils.read import parse_config

    content = _fetch(url)
    name = Path(urllib.parse.urlsplit(url).path).name or "config"
    parsed = parse_config(content, url)
    return _write_temporary(parsed, name)


def _fetch(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "axolotl"})
    try:
        with urllib.request.urlopen(request, timeout=REMOTE_TIMEOUT_SECONDS) as response:
            if urllib.parse.urlsplit(response.url).scheme != "https":
                raise ConfigError(f"`{url}` redirects to `{response.url}`, which is not `https://`.")
            content = response.read(MAX_REMOTE_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ConfigError(f"`{url}` answers {error.code} {error.reason}. Check the address.") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ConfigError(
            f"`{url}` cannot be fetched: {error}. Check the network, or save the file and give its path."
        ) from None
    if len(content) > MAX_REMOTE_BYTES:
        raise ConfigError(f"`{url}` is longer than {MAX_REMOTE_BYTES >> 20} MiB, which no config is.")
    return content


def _write_temporary(parsed: dict[str, Any], name: str) -> Path:
    """A parsed config as a file that the processes of a run can read again. Credentials are no longer in it."""
    import yaml

    folder = temporary_folder("axolotl-")
    path = (folder / name).with_suffix(".yml")
    path.write_text(yaml.safe_dump(parsed, sort_keys=False), encoding="utf-8")
    return path


def choose_config(path: Path) -> str:
    """Choose the config YAML file of a folder (considering only files ending with .yml or .yaml).

    Args:
        path: the folder.

    Returns:
        The path of the only one, or of the one that the user chooses.

    Raises:
        ConfigError: there is none, or there are several and no terminal to ask at. Also a ValueError.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in CONFIG_SUFFIXES and file.is_file())
    if not files:
        raise ConfigError(f"No config found in the folder `{path}`: no file ends in .yml or .yaml.")
    if len(files) == 1:
        LOG.info("using the only config of `%s`: %s", path, files[0].name)
        return str(files[0])
    listing = "\n".join(f"  {number}. {file.name}" for number, file in enumerate(files, 1))
    if not sys.stdin.isatty():
        raise ConfigError(f"The folder `{path}` holds several configs. Give the path of one:\n{listing}")
    print(f"Choose a config of {path}:\n{listing}", file=sys.stderr)
    while True:
        try:
            answer = input(f"Enter a number (1 to {len(files)}): ").strip()
        except EOFError:
            raise KeyboardInterrupt from None
        if answer.isdigit() and 1 <= int(answer) <= len(files):
            return str(files[int(answer) - 1])
        print(f"`{answer}` is not one of them.", file=sys.stderr)


def find_config(config: str | Path) -> Path:
    """The file that a CONFIG argument means: a path, a folder, an `https://` URL, or `-` for standard input.

    A relative path that does not exist is also looked up in the folder named by the variable AXOLOTL_CONFIG_DIR.

    Raises:
        ConfigError: there is no such file; names the nearest.
    """
    if not str(config).strip():
        raise ConfigError("The CONFIG argument is empty. Is the variable set that it comes from?")
    if str(config) == "-":
        from axolotl.cli.utils.read import parse_config

        return _write_temporary(parse_config(sys.stdin.buffer.read(), "standard input"), "stdin")
    path = Path(os.path.expanduser(check_remote_config(config)))
    if not path.exists() and not path.is_absolute() and (folder := os.environ.get("AXOLOTL_CONFIG_DIR")):
        path = Path(folder) / path if (Path(folder) / path).exists() else path
    if path.is_dir():
        return Path(choose_config(path))
    if not path.exists():
        raise ConfigError(_describe_missing(path))
    return path


def _describe_missing(path: Path) -> str:
    message = f"No such config: `{path}`."
    if not path.parent.is_dir():
        folder = path.parent
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        message += f" The folder `{path.parent}` does not exist."
        if path.parts[0] == "examples":
            message += " `axolotl fetch examples` writes the shipped ones."
        return message
    names = [file.name for file in path.parent.iterdir() if file.suffix in (*CONFIG_SUFFIXES, ".json") or file.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return message + (f" Did you mean {' or '.join(f'`{path.parent / name}`' for name in near)}?" if near else "")


def read_config(path: str | Path) -> dict[str, Any]:
    """The keys and values of a config file as written.

    Raises:
        ConfigError: it cannot be read, or is no config.
    """
    from axolotl.cli.utils.read import parse_config

    try:
        content = Path(path).read_bytes()
    except PermissionError:
        raise ConfigError(f"Permission denied: `{path}`. Check the owner and mode of the file.") from None
    except FileNotFoundError:
        raise ConfigError(_describe_missing(Path(path))) from None
    return parse_config(content, str(path))


def keys_of_file(config: str | Path) -> set[str]:
    """The top-level keys that a local config file writes; none for what cannot be read here and now."""
    path = Path(config)
    return set(read_config(path)) if path.is_file() else set()


def prepare_plugins(cfg: DictDefault) -> None:
    """Registers the plugins for the given configuration.

    Args:
        cfg: the config; each entry of `plugins:` is loaded, then told the config as written.
    """
    if cfg.get("plugins"):
        from axolotl.utils import config as room

        room.prepare_plugins(cfg)


def load_cfg(config: str | Path | DictDefault = Path("examples/"), **kwargs: Any) -> DictDefault:
    """Loads the axolotl configuration stored at `config`, validates it, and performs various setup.

    Args:
        config: path, folder, `https://` URL, `-` for standard input, or a config already read.
        **kwargs: overrides by keyword, nested keys with a double underscore (`trl__beta=0.1`); None leaves a key alone.

    Returns:
        The config of the run; read-only from here on.

    Raises:
        ConfigError: all that is wrong with it, at once.
        OutputError: `output_dir` cannot be written.
    """
    import yaml

    from axolotl.cli.utils.tracking import prepare_tracking
    from axolotl.utils.redact import redact_secrets
    from axolotl.utils.tee import prepare_debug_log

    written, path = read_cfg(config, **kwargs)
    cfg = check_cfg(DictDefault(written), path)
    prepare_debug_log(cfg)
    resolve_cfg(cfg)
    prepare_tracking(cfg)
    # What was written, not the hundreds of defaults; what was chosen for the user is shown with its reasons.
    plain = json.loads(json.dumps(redact_secrets(written.to_dict()), default=str))
    shown = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    LOG.info("config%s:\n%s", f" {path}" if path else "", textwrap.indent(shown.rstrip(), "  "))
    return cfg


def inspect_cfg(
    config: str | Path | DictDefault = Path("examples/"), *, machine: dict[str, Any] | None = None, **kwargs: Any
) -> DictDefault:
    """The config that `load_cfg` returns, for commands that only look: no folder is made, nothing is logged or set.

    Args:
        config: as in `load_cfg`.
        machine: what `machine_capabilities` would say of another machine than this one.
        **kwargs: as in `load_cfg`.
    """
    cfg = check_cfg(*read_cfg(config, **kwargs), machine=machine)
    resolve_cfg(cfg)
    return cfg


def read_cfg(config: str | Path | DictDefault, **kwargs: Any) -> tuple[DictDefault, Path | None]:
    """Stage [1]: the keys as written, with overrides, and the file they come from."""
    from axolotl.cli.utils.overrides import apply_overrides

    path = None
    if isinstance(config, dict):
        cfg = DictDefault(config)
    else:
        path = find_config(config)
        cfg = DictDefault(read_config(path))
    kept_out = apply_overrides(cfg, {key: value for key, value in kwargs.items() if value is not None})
    for key in kept_out:
        LOG.warning("`strict: true`: the override of `%s` is not used, because the config does not write that key", key)
    return cfg, path


@importing()
def check_cfg(cfg: DictDefault, path: Path | None = None, *, machine: dict[str, Any] | None = None) -> DictDefault:
    """Stages [2] and [3]: the plugins of a config loaded, and the config validated, for this machine or another one."""
    from axolotl.utils.config import validate_config
    from axolotl.utils.environment import env_capabilities, machine_capabilities

    _find_modules_here()
    prepare_plugins(cfg)
    cfg = validate_config(cfg, machine or machine_capabilities(), env_capabilities())
    if path is not None:
        cfg.axolotl_config_path = str(path)
    if cfg.plugins:
        from axolotl.integrations.base import PluginManager

        PluginManager.get_instance().cfg = cfg
    return cfg


def _find_modules_here() -> None:
    """Python paths in a config may name modules of the working directory, as they do under `python -m`, which launchers use."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


@importing()
def resolve_cfg(cfg: DictDefault) -> None:
    """Stage [4], in place: what the config means on this machine and for this model."""
    from axolotl.utils.config import normalize_cfg_datasets, normalize_config

    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
