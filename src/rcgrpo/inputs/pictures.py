"""Pictures as users, data sets and files hold them, as Pillow images: upright, as a viewer shows them.

Everything that comes from outside (rows, files, what is uploaded) passes through here, so that it is read, or refused
by name, the same way everywhere. Pictures that this library made itself are plain RGB and need none of it.
"""

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SAID_AT_MOST = 160
"""Characters of a value, or of another library's error, that a message repeats."""

ENCODED = re.compile(r"data:image/[\w.+-]+;base64,|iVBORw0KGgo|/9j/[\w+/]{60}|R0lGOD|UklGR")
"""How base64 begins: of a data URL, PNG, JPEG (a path may begin like it), GIF, WebP."""


def decode_picture(value: Any, where: str) -> Image.Image:
    """`open_picture` with 8 bits a channel: 16-bit, 32-bit and floating pictures become 8-bit grey.

    The other modes stay as stored, as an alpha channel may be the mask; see `to_rgb`.
    """
    return _eight_bits(open_picture(value, where))


def open_picture(value: Any, where: str) -> Image.Image:
    """A PIL image, upright, from what a dataset may hold: PIL image, path, bytes, base64, or `{"bytes", "path"}`.

    Nothing is resized, and the mode stays as stored. A path with a protocol (`hf://`, `zip://`), as a stream from afar
    brings, is read through `datasets`; web addresses are not, as they may give something else at every look.

    Raises:
        ValueError: naming `where`, when the value is missing or no picture that Pillow can read.
    """
    if isinstance(value, Mapping) and value.get("bytes") is None and "path" in value:
        value = value["path"]
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ValueError(
            f"{where}: got {short(value)}, expected a picture that is here; download it, and give its path or its bytes"
        )
    try:
        if isinstance(value, Image.Image):
            image = value
        elif is_encoded(value):
            image = Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2] or value, validate=True)))
        elif isinstance(value, str) and "://" in value and not value.startswith("file://"):
            from datasets import Image as Decoder  # slow to load, and seldom needed

            image = Decoder().decode_example({"bytes": None, "path": value})
        else:
            content = value["bytes"] if isinstance(value, Mapping) else value
            if isinstance(content, str):
                content = Path(content.removeprefix("file://"))
            image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else Path(content))
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # every decoder and every file system has kinds of its own
        raise ValueError(
            f"{where}: got {short(value)}, expected a picture that Pillow can decode; fix or drop the row "
            f"({short(error)})"
        ) from error


def is_stored(value: Any) -> bool:
    """Whether a picture is yet to be opened: a path, bytes, base64, or a mapping of such."""
    return isinstance(value, str | bytes | Path) or (isinstance(value, Mapping) and value.keys() <= {"bytes", "path"})


def is_encoded(value: Any) -> bool:
    """Whether a text is a picture itself, in base64, rather than the path of one."""
    return isinstance(value, str) and ENCODED.match(value) is not None and (value.startswith("d") or len(value) >= 64)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of the same size, as a viewer shows it: transparent pixels on white, palette and CMYK converted."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def has_alpha(image: Image.Image) -> bool:
    """Whether pixels may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def short(value: Any) -> str:
    """A value for a message: never long, whatever it is; of bytes only how many."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return short(value["bytes"])
    value = str(value) if isinstance(value, Path) else value
    text = " ".join(str(value).split()) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= SAID_AT_MOST else f"{text[: SAID_AT_MOST // 2]}…, {len(text)} characters"


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips where it should scale, so a 16-bit grey picture would turn white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode.startswith("I;16"):
        full = 65535.0
    elif image.mode == "F":
        full = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        full = 65535.0 if values.max(initial=0) > 255 else 255.0
    return Image.fromarray(np.round(np.clip(values / full, 0, 1) * 255).astype(np.uint8))
