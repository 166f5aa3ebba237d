"""The built wheel imports whole, elsewhere: no file of the checkout is needed."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import axolotl
assert axolotl.__file__.startswith(sys.argv[1]), axolotl.__file__
failed = []
for module in pkgutil.walk_packages(axolotl.__path__, 'axolotl.'):
    try:
        importlib.import_module(module.name)
    except ImportError as err:
        if 'which is not installed' not in str(err):
            failed.append(f'{module.name}: {err!r}')
print('\\n'.join(failed))
sys.exit(bool(failed))
"""


def test_wheel_imports_elsewhere(tmp_path: Path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(unpacked)
    assert not [name for name in names if name.endswith("_test.py")]
    assert any(name.startswith("axolotl/_shipped/examples/") for name in names)
    assert any(name.startswith("axolotl/_shipped/deepspeed_configs/") for name in names)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(unpacked)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_has_a_door():
    import axolotl

    folders = {path.parent for path in Path(axolotl.__path__[0]).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders), [
        str(folder) for folder in folders if not (folder / "__init__.py").exists()
    ]
    assert sum(1 for _ in pkgutil.walk_packages(axolotl.__path__, "axolotl.")) > 50
