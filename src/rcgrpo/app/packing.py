"""What a visitor takes home: the pictures of a comparison at the size of the edit, and how they were made."""

import json
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from .comparing import Comparison


def pack(comparison: Comparison, settings: Mapping[str, Any], path: Path, size: tuple[int, int] | None = None) -> Path:
    """Write a zip of PNGs, `source`, `mask` and `NAME-1`, `NAME-2` and so on, and `edit.json`.

    Args:
        settings: how the edits were made; the numbers are added.
        path: of the zip.
        size: (width, height) that all pictures are brought to; as they were edited by default.

    Returns:
        The path.
    """
    pictures = {"source": comparison.source, "mask": comparison.mask}
    for outcome in comparison.outcomes:
        pictures |= {f"{outcome.name}-{i}": image for i, image in enumerate(outcome.images, 1)}
    numbers = {
        outcome.name: {"background_psnr": outcome.background_psnr, "attention_density": outcome.density}
        for outcome in comparison.outcomes
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, picture in pictures.items():
            if size is not None and picture.size != size:
                kind = Image.Resampling.NEAREST if picture.mode == "L" else Image.Resampling.LANCZOS
                picture = picture.resize(size, kind)
            stream = BytesIO()
            picture.save(stream, "PNG")
            archive.writestr(f"{name}.png", stream.getvalue())
        archive.writestr("edit.json", json.dumps({**settings, "numbers": numbers}, indent=1, ensure_ascii=False) + "\n")
    return path
