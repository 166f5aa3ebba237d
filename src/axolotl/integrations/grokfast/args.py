"""Keys of the grokfast plugin."""

from __future__ import annotations

from axolotl.utils.schemas.fields import Float, Words, key


class GrokfastArgs(Words):
    """Amplify the slow part of the gradient (https://arxiv.org/abs/2405.20233)."""

    grokfast_alpha: Float | None = key("Memory of the moving average of the gradient.", 0.98, ge=0, le=1)
    grokfast_lamb: Float | None = key("Weight of that average.", 2.0)
