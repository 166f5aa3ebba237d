"""The package `transformers.models`, imported without reading all of its files a second time.

To know what it exports, `import transformers` reads 3,000 files, and `import transformers.models` reads them again for the same
list under shorter names: what is remembered of the first time is asked for by another path. That is a third of a second for
every command. Here the second list is made of the first. Can go when transformers remembers it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import import_utils

FOLDER = Path(transformers.__file__).parent / "models"


def import_models() -> None:
    """Import `transformers.models`, if that has not happened yet."""
    if "transformers.models" in sys.modules:
        return
    read = import_utils.define_import_structure

    def known_or_read(path: Any, *args: Any, **kwargs: Any) -> Any:
        is_package = str(path) == str(FOLDER / "__init__.py") and not args and not kwargs
        return names_of_models() if is_package else read(path, *args, **kwargs)

    import_utils.define_import_structure = known_or_read
    try:
        import transformers.models  # noqa: F401 - imported for what importing it does
    finally:
        import_utils.define_import_structure = read


def names_of_models() -> dict[frozenset[str], dict[str, set[str]]]:
    """Required packages -> module below `transformers.models` -> the names it exports."""
    prefix = "models."
    known = import_utils.define_import_structure(FOLDER, prefix="models")  # remembered from `import transformers`
    return {
        packages: {module.removeprefix(prefix): names for module, names in modules.items() if module.startswith(prefix)}
        for packages, modules in known.items()
    }
