"""Images for multimodal models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import field_validator

from axolotl.utils.schemas.fields import IGNORE_CASE, Int, Words, key, required

# The values of `PIL.Image.Resampling`.
RESAMPLING = {"lanczos": 1, "bilinear": 2, "bicubic": 3}


class RoleBoundary(Words):
    """Text that marks where a role's turn starts and ends, in place of the built-in markers."""

    role: str = required("Role whose turns this marks.")
    start: str = required("Text that opens the turn.")
    end: str | None = key("Text that closes the turn.")
    include_start: bool = key("The opening text is part of the turn.", False)
    include_end: bool = key("The closing text is part of the turn.", True)


class MultiModalConfig(Words):
    """Images for multimodal models."""

    image_size: Int | tuple[Int, Int] | None = key(
        "Size to resize images to: one number (padded square) or width and height. Default: the processor's size."
    )
    image_resize_algorithm: Annotated[
        Literal["bilinear", "bicubic", "lanczos"] | Literal[1, 2, 3] | None, IGNORE_CASE
    ] = key("How to resample images. Default: bilinear.")
    role_boundaries: list[RoleBoundary] | None = key("Replace the built-in markers of turns.")

    @field_validator("image_resize_algorithm", mode="before")
    @classmethod
    def convert_image_resize_algorithm(cls, image_resize_algorithm: Any) -> Any:
        """The value of `PIL.Image.Resampling` that a name stands for; other values are returned as they are."""
        if isinstance(image_resize_algorithm, str):
            return RESAMPLING.get(image_resize_algorithm.strip().lower(), image_resize_algorithm)
        return image_resize_algorithm
