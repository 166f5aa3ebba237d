"""Old name: attention through xformers. See axolotl._moved."""

from axolotl._moved import old_name

__getattr__ = old_name(__name__)
