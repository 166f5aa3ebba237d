"""Keys of the densemixer plugin."""

from __future__ import annotations

from axolotl.utils.schemas.fields import Words, key


class DenseMixerArgs(Words):
    """Give the router of a mixture of experts a dense gradient."""

    dense_mixer: bool = key("Give the router a gradient from every expert.", True)
