"""`labels.py`: several regions from labels or lists of masks."""

import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.maths.labels import split_regions

LABELS = np.array([[0, 1, 1], [2, 0, 2]], dtype=np.uint8)
EXPECTED = torch.tensor([[[0.0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 0, 1]]])


def palette():
    image = Image.fromarray(LABELS, mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


@pytest.mark.parametrize(
    "given",
    [
        palette(),
        Image.fromarray(LABELS),
        LABELS,
        torch.from_numpy(LABELS).long(),
        [Image.fromarray(255 * (LABELS == 1).astype(np.uint8)), torch.from_numpy(LABELS) == 2],
    ],
)
def test_every_form_names_the_same_regions(given):
    assert torch.equal(split_regions(given, (2, 3)), EXPECTED)


def test_lists_may_be_soft_and_labels_may_be_absent():
    soft = split_regions([np.full((2, 3), 0.25), np.zeros((2, 3))], (2, 3))
    assert soft[0].eq(0.25).all() and not soft[1].any()
    absent = split_regions(np.where(LABELS == 2, 3, 0), (2, 3))
    assert absent.shape == (3, 2, 3) and [bool(mask.any()) for mask in absent] == [False, False, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3), int), "row 3: got no region, expected at least one pixel"),
        ([], "row 3: got no region"),
        ([np.zeros((2, 3))], "row 3: got no region"),
        (255 * LABELS.clip(max=1), r"row 3: got labels in 0..255, expected 0 \(keep\) and 1 to at most 32; divide"),
        (-LABELS.astype(int), r"row 3: got labels in -2..0, expected 0"),
        (LABELS.T, r"row 3: got height × width \(3, 2\), expected the source picture's \(2, 3\)"),
        (LABELS.astype(np.float32), "row 3: got float32 of shape .*, expected integer labels"),
        (palette().convert("RGB"), "row 3: got a picture of mode RGB, expected labels"),
    ],
)
def test_what_names_no_regions_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        split_regions(given, (2, 3), "row 3")
