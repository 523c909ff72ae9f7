"""What a visitor paints over a picture, as a mask, and the other way round."""

from typing import Any

import numpy as np
from PIL import Image

from ..inputs.pictures import to_rgb

PAINT, PAINT_OPACITY = "#ff2d78", 0.6

BRUSH_SHARE = 16
"""A brush's radius is this part of the picture's shorter side, so that a stroke is an eighth of it wide."""


def brush_radius(side: int) -> int:
    """Of a brush that fits a picture whose shorter side has so many pixels."""
    return max(1, round(side / BRUSH_SHARE))


def read_painting(painting: Any) -> tuple[Image.Image, Image.Image]:
    """Picture (RGB) and mask ("L", 255 = painted) of what `gr.ImageEditor` hands over.

    Raises:
        ValueError: no picture, or nothing painted.
    """
    if not painting or painting["background"] is None:
        raise ValueError("picture: got none, expected one; open a picture, or click an example")
    source = to_rgb(painting["background"])
    covered = np.zeros((source.height, source.width), dtype=bool)
    for layer in painting["layers"]:
        alpha = layer.convert("RGBA").getchannel("A").resize(source.size, Image.Resampling.NEAREST)
        covered |= np.asarray(alpha) > 255 * PAINT_OPACITY / 2  # a stroke's edge is smoothed
    if not covered.any():
        raise ValueError("mask: got nothing painted, expected the region to edit; paint over it with the brush")
    return source, Image.fromarray(np.where(covered, 255, 0).astype(np.uint8))


def painting_of(source: Image.Image, mask: Image.Image) -> dict[str, Any]:
    """The other way round: a picture with its region painted, for `gr.ImageEditor`."""
    layer = Image.new("RGBA", source.size, PAINT)
    layer.putalpha(mask.convert("L").point(lambda value: round(PAINT_OPACITY * value)))
    together = Image.alpha_composite(source.convert("RGBA"), layer)
    return {"background": to_rgb(source), "layers": [layer], "composite": together}
