"""`painting.py`: what was painted is what is edited."""

import numpy as np
import pytest
from PIL import Image

from app_edits import make_edit
from rcgrpo.app import brush_radius, painting_of, read_painting


def test_a_painting_gives_back_what_was_painted():
    source, mask = make_edit((40, 30))
    given, found = read_painting(painting_of(source, mask))
    assert given == source and found.tobytes() == mask.tobytes()


def test_every_layer_counts_and_faint_paint_does_not():
    layers = [Image.new("RGBA", (20, 10), (255, 0, 0, 0)) for _ in range(3)]
    layers[0].putpixel((1, 2), (255, 0, 0, 255))
    layers[1].putpixel((5, 2), (255, 0, 0, 153))
    layers[2].putpixel((7, 2), (255, 0, 0, 30))
    _, mask = read_painting({"background": Image.new("RGB", (20, 10)), "layers": layers})
    assert np.argwhere(np.asarray(mask)).tolist() == [[2, 1], [2, 5]]


def test_what_is_transparent_in_an_upload_is_white():
    upload = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    upload.paste((0, 0, 255, 255), (0, 0, 5, 10))
    layer = Image.new("RGBA", (20, 10), (255, 0, 0, 255))
    source, _ = read_painting({"background": upload, "layers": [layer]})
    assert source.getpixel((1, 1)) == (0, 0, 255) and source.getpixel((9, 9)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("painting", "message"),
    [
        (None, "picture: got none"),
        ({"background": None, "layers": []}, "picture: got none"),
        ({"background": Image.new("RGB", (4, 4)), "layers": []}, "mask: got nothing painted"),
        ({"background": Image.new("RGB", (4, 4)), "layers": [Image.new("RGBA", (4, 4))]}, "mask: got nothing painted"),
    ],
)
def test_a_painting_without_picture_or_paint_is_said(painting, message):
    with pytest.raises(ValueError, match=message):
        read_painting(painting)


@pytest.mark.parametrize(("side", "radius"), [(64, 4), (1024, 64), (8, 1)])
def test_the_brush_fits_the_picture(side, radius):
    assert brush_radius(side) == radius
