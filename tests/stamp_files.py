"""Stamps as Tux Paint has them."""

import numpy as np
from PIL import Image


def save_stamp(path, seed=0, size=(70, 60), caption=None, flat=False, alpha=255):
    """An ellipse full of colours on a transparent ground."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[1], : size[0]]
    inside = ((rows / size[1] - 0.5) ** 2 + (columns / size[0] - 0.5) ** 2) < 0.24
    pixels = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if flat:
        pixels[..., :3] = rng.integers(0, 256, 3)
    pixels[..., 3] = alpha * inside
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Etwas anderes.\n", encoding="utf-8")
