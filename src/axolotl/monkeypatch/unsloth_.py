"""Old name: unsloth's kernels. See axolotl._moved."""

from axolotl._moved import old_name

__getattr__ = old_name(__name__)
