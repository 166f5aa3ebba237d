"""`python -m axolotl.run.watched MODULE [ARGUMENTS]`: as `python -m MODULE`, but it ends when the process that started it is gone.

For modules of others in a child of ours; a parent that is killed cannot pass that on.
"""

from __future__ import annotations

import runpy
import sys

from axolotl.utils.processes import stop_with_launcher

if __name__ == "__main__":
    stop_with_launcher()
    del sys.argv[0]  # the module finds its own name there
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
