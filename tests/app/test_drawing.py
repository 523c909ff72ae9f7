"""`drawing.py`: captions, scales and outlines."""

import math

import numpy as np
import pytest
from PIL import Image

from app_edits import SAMPLING, make_edit, make_lora, make_pipeline
from rcgrpo.app import LoraSlot, compare, draw, table
from rcgrpo.evaluation.benchmark import contenders


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


def test_maps_share_one_scale_and_the_region_is_outlined(pipeline, tmp_path):
    source, mask = make_edit()
    entrants = LoraSlot(pipeline).entrants(make_lora(tmp_path))
    comparison = compare(pipeline, entrants, source, mask, "go", SAMPLING, 2)
    drawings = draw(comparison)
    for drawing, outcome in zip(drawings, comparison.outcomes, strict=True):
        assert len(drawing.edits) == len(drawing.attention) == len(drawing.changes) == 2
        assert all(picture.size == (320, 320) for picture, _ in drawing.edits)
        assert drawing.edits[0][1] == f"{outcome.name}: background {outcome.background_psnr[0]:.2f} dB"
        picture = np.asarray(drawing.edits[0][0])
        assert tuple(picture[50, 161]) == (255, 45, 120)  # just right of the region's edge
        assert tuple(picture[50, 100]) == outcome.images[0].getpixel((10, 5))
    text = table(comparison)
    assert text.count("\n") == 3 and f"{np.mean(comparison.outcomes[0].background_psnr):.2f} dB" in text


def test_a_full_mask_has_no_background(pipeline):
    source = make_edit()[0]
    comparison = compare(pipeline, contenders([]), source, Image.new("L", source.size, 255), "go", SAMPLING)
    assert math.isnan(comparison.outcomes[0].background_psnr[0]) and "| base | – |" in table(comparison)
    assert draw(comparison)[0].edits[0][1] == "base: background –"
