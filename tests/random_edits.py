"""Edits of noise at 32 x 32 pixels, each with a target and a region of its own size."""

import numpy as np
import torch
from PIL import Image

from rcgrpo.data.edits import Edit


def picture(seed, size=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def edit_of(row):
    mask = torch.zeros(32, 32)
    mask[4 : 14 + row, 8:18] = 1
    return Edit(row, f"test row {row}", picture(row), "make it red", mask, {"edited_image": picture(row + 50)})
