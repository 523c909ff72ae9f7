"""Rows of edits as their owners store them: pictures of 16 x 12 pixels, one region."""

import numpy as np
from PIL import Image

SIZE = (16, 12)
BOX = (3, 2, 9, 8)
REGION = np.zeros(SIZE[::-1], dtype=bool)
REGION[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True


def photo(seed=0, size=SIZE):
    pixels = np.random.default_rng(seed).integers(80, 120, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def edited(seed=0, size=SIZE):
    image = photo(seed, size)
    image.paste((255, 0, 0), tuple(v * size[0] // SIZE[0] for v in BOX))
    return image


def white_mask():
    return Image.fromarray(REGION.astype(np.uint8) * 255)


def compbench(i=0, **changes):
    row = {"task": "replace", "image_path": f"{i // 2:08x}/0/{i:05d}.png", "input_image": photo(i)}
    row |= {"edited_image": edited(i), "instruction": f"edit {i}", "caption": "a cat", "mask": white_mask()}
    return {**row, **changes}


def write_pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        photo(i).save(folder / f"src{i}.png")
        white_mask().save(folder / f"mask{i}.png")


def check(data, group=None):
    rows = list(data)
    assert len(rows) == 3
    for i, row in enumerate(rows):
        assert row["input_image"].tobytes() == photo(i).tobytes() and row["instruction"] == f"edit {i}"
        assert np.array_equal(np.asarray(row["mask"]) == 255, REGION) and row["mask_source"] == "own"
        assert group is None or row["group"] == f"{group}{i}"


COLUMNS = {"input_image": "src", "instruction": "say", "mask": "region", "group": "video"}


def table():
    return [
        {"src": f"p/src{i}.png", "region": f"p/mask{i}.png", "say": f"edit {i}", "video": f"v{i}"} for i in range(3)
    ]
