from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import multiprocessing, sys
from axolotl.utils.temporary import temporary_folder

folder = temporary_folder("rows-", sys.argv[1])
(folder / "inner").mkdir()
(folder / "inner" / "file").write_text("x")
child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(0))
child.start()
child.join()
assert (folder / "inner" / "file").exists()
print(folder)
"""


def test_it_is_there_until_the_process_ends(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert folder.parent == tmp_path and folder.name.startswith("rows-")
    assert not folder.exists()
