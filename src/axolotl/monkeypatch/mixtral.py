"""Old name: packing for Mixtral. See axolotl._moved."""

from axolotl._moved import old_name

__getattr__ = old_name(__name__)
