"""Axolotl ASCII logo utils."""

from __future__ import annotations

import sys

ART = r"""
   \|/ ___________ \|/
  --( /  o     o  \ )--      axolotl
   /|\\     w     /|\        one YAML, one trained model
       '--.___.--'
"""


def print_axolotl_text_art() -> None:
    """Prints axolotl ASCII art, where a person sees it: on a terminal."""
    if sys.stderr.isatty():
        print(ART, file=sys.stderr)
