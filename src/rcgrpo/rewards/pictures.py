"""Pictures as rewards need them: tensors, what lies outside the mask, the region's box, and PNG text for the wire.

Where it fits: the bottom of this package; every reward that looks at pixels reads them here. Why it exists: a crop, a
mask's threshold and the wire format mean the same everywhere.

Gotchas: masks are read at ≥ 128 = edit. What comes over the wire is untrusted: `from_png` takes PNG alone, and looks at
the size in the header (`png_size`) before any pixel is decoded.
"""

import base64
import io
from collections.abc import Callable
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..inputs.pictures import to_rgb

Box = tuple[int, int, int, int]
Made = TypeVar("Made")
PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


def image_tensor(image: Image.Image) -> Tensor:
    """fp32 `[3, height, width]` in [0, 1]."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).to(torch.float32) / 255


def place() -> str:
    """Where rewards that follow from pixels compute: the current GPU if there is one."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def outside(image: Image.Image, source: Image.Image, mask: Image.Image) -> Tensor:
    """Boolean `[height, width]`, true where the source is to be kept.

    Raises:
        ValueError: the three differ in size.
    """
    if not image.size == source.size == mask.size:
        raise ValueError(f"image {image.size}, source {source.size} and mask {mask.size} must share one size")
    return torch.from_numpy(np.array(mask.convert("L"))) < 128


def region_box(mask: Image.Image, margin: float = 0.0, min_side: int = 2) -> Box | None:
    """The bounding box (left, upper, right, lower) of the edit pixels, grown, and moved to lie within the picture.

    Args:
        mask: PIL "L", 255 = edit.
        margin: grow by this share of the box's longer side, on every side; 0 is CompBench's box.
        min_side: grow further until both sides have so many pixels, as far as the picture allows.

    Returns:
        `None` for a mask without edit pixels, and for a picture too small for `min_side`.
    """
    if margin < 0:
        raise ValueError(f"margin: got {margin}, expected 0 or more")
    box = mask.convert("L").point(lambda value: 255 * (value >= 128)).getbbox()
    if box is None or min(mask.size) < min_side:
        return None
    grown = round(margin * max(box[2] - box[0], box[3] - box[1]))
    sides = []
    for low, high, length in ((box[0], box[2], mask.width), (box[1], box[3], mask.height)):
        low, high = max(0, low - grown), min(length, high + grown)
        missing = max(0, min_side - (high - low))
        low = min(max(0, low - missing // 2), length - (high - low) - missing)
        sides.append((low, max(high, low + min_side)))
    (left, right), (upper, lower) = sides
    return left, upper, right, lower


def crop_to_region(image: Image.Image, mask: Image.Image, margin: float = 0.0, min_side: int = 2) -> Image.Image | None:
    """The part of a picture within `region_box`; a picture of another size than the mask is resized to it first."""
    box = region_box(mask, margin, min_side)
    if box is None:
        return None
    if image.size != mask.size:
        image = image.resize(mask.size, Image.Resampling.BICUBIC)
    return image.crop(box)


def to_png(image: Image.Image) -> str:
    """Base64 of the picture as PNG: lossless, and lightly compressed, because candidates travel once."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def once_each(make: Callable[[Image.Image], Made]) -> Callable[[Image.Image], Made]:
    """`make`, called once for all pictures that are alike: a group's candidates share a source, each its own copy."""
    made: dict[bytes, Made] = {}

    def get(image: Image.Image) -> Made:
        look = (image.mode, image.size, image.getpalette(), image.info.get("transparency"))
        digest = blake2b(repr(look).encode())
        digest.update(image.tobytes())
        key = digest.digest()
        if key not in made:
            made[key] = make(image)
        return made[key]

    return get


def png_size(text: object, where: str) -> tuple[int, int]:
    """Width and height that the picture in base64 text says it has, read from its first 24 bytes and nothing else.

    Args:
        text: what came over the wire.
        where: what errors call it, e.g. "images[3]".

    Raises:
        ValueError: naming `where`: no text, no base64, no PNG.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where}: got {type(text).__name__}, expected a base64 PNG")
    try:
        start = base64.b64decode(text[:32], validate=True)
    except ValueError as error:
        raise ValueError(f"{where}: got {len(text)} characters, expected a base64 PNG ({error})") from error
    if len(start) < 24 or not start.startswith(PNG_START):
        raise ValueError(f"{where}: got {len(text)} characters that do not begin like a PNG, expected a base64 PNG")
    return int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big")


def from_png(text: object, where: str, max_pixels: int = 64_000_000) -> Image.Image:
    """The picture in base64 text: its pixels and its transparency, without what else the file may hold.

    Args:
        text: what came over the wire.
        where: what errors call it, e.g. "images[3]".
        max_pixels: refuse more, before they are decoded.

    Raises:
        ValueError: naming `where`: no text, no base64, no PNG, too many pixels, a broken or truncated file.
    """
    width, height = png_size(text, where)
    try:
        if width * height > max_pixels:
            raise ValueError(f"{width}x{height} pixels are more than {max_pixels}")
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])  # type: ignore[arg-type]
        if image.size != (width, height):  # a second header further down
            raise ValueError(f"{image.width}x{image.height} pixels where the file begins with {width}x{height}")
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: got {len(text)} characters, expected a base64 PNG ({error})") from error  # type: ignore[arg-type]
    plain = image.copy()
    plain.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return plain
