import base64
import io
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rcgrpo.rewards.pictures import crop_to_region, from_png, once_each, png_size, region_box, to_png


def mask_with(size, *boxes):
    mask = Image.new("L", size, 0)
    for box in boxes:
        mask.paste(255, box)
    return mask


def test_box_by_hand():
    mask = mask_with((100, 60), (10, 20, 30, 30))
    assert region_box(mask) == (10, 20, 30, 30)
    assert region_box(mask, 0.5) == (0, 10, 40, 40)
    assert region_box(mask, 0.1) == (8, 18, 32, 32)
    assert region_box(mask, 0, min_side=20) == (10, 15, 30, 35)
    assert region_box(mask_with((100, 60), (98, 0, 100, 3)), 0, min_side=10) == (90, 0, 100, 10)
    assert region_box(mask.point(lambda value: value // 2)) is None, "127 is not edit"
    assert region_box(mask, min_side=61) is None
    with pytest.raises(ValueError, match="margin: got -1"):
        region_box(mask, -1)


@given(st.data())
def test_box_holds_the_region_lies_in_the_picture_and_is_large_enough(data):
    width, height = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    left, upper = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, lower = data.draw(st.integers(left + 1, width)), data.draw(st.integers(upper + 1, height))
    least = data.draw(st.integers(1, min(width, height)))
    mask = mask_with((width, height), (left, upper, right, lower))
    box = region_box(mask, data.draw(st.floats(0, 2)), least)
    assert 0 <= box[0] <= left < right <= box[2] <= width and 0 <= box[1] <= upper < lower <= box[3] <= height
    assert min(box[2] - box[0], box[3] - box[1]) >= least


def test_crop_resizes_what_has_another_size():
    mask = mask_with((10, 10), (5, 0, 10, 10))
    picture = Image.new("RGB", (20, 20), "red")
    picture.paste("blue", (10, 0, 20, 20))
    part = crop_to_region(picture, mask, min_side=2)
    assert part.size == (5, 10) and part.getpixel((4, 5)) == (0, 0, 255)
    assert crop_to_region(picture, mask_with((10, 10))) is None


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_png_round_trip(mode):
    picture = Image.effect_noise((9, 7), 80).convert(mode)
    back = from_png(to_png(picture), "x")
    assert (back.mode, back.size, back.tobytes()) == (mode, (9, 7), picture.tobytes())


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def bomb():
    """A PNG of 3 kB whose header announces 30,000 × 30,000 pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (30_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    body = chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")).decode()


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "",
        "not base64!",
        base64.b64encode(b"no picture").decode(),
        to_png(Image.new("L", (9, 9)))[:60],
        jpeg(),
        bomb(),
    ],
    ids=["none", "number", "empty", "no base64", "no picture", "half", "jpeg", "bomb"],
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"^images\[3\]: got .*expected a base64 PNG"):
        from_png(text, "images[3]")


def test_pixels_are_bounded():
    text = to_png(Image.new("L", (10, 10)))
    assert from_png(text, "x", max_pixels=100).size == (10, 10)
    with pytest.raises(ValueError, match="10x10 pixels are more than 99"):
        from_png(text, "x", max_pixels=99)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_second_header_does_not_get_past_the_first():
    def header(side):
        return chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))

    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 9 * 8)) + chunk(b"IEND", b"")
    good, bad = (b"\x89PNG\r\n\x1a\n" + heads + pixels for heads in (header(8), header(2) + header(8)))
    text = base64.b64encode(good).decode()
    assert png_size(text, "x") == from_png(text, "x", 64).size == (8, 8)
    text = base64.b64encode(bad).decode()
    assert png_size(text, "x") == (2, 2)
    with pytest.raises(ValueError, match=r"x: got .*8x8 pixels where the file begins with 2x2"):
        from_png(text, "x", 64)


def test_transparency_is_kept():
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    assert from_png(to_png(image), "x").convert("RGBA").tobytes() == bytes([1, 2, 3, 255, 4, 5, 6, 0])


def test_pictures_that_look_alike_are_made_something_of_once():
    made = []
    once = once_each(lambda image: made.append(image) or len(made))
    grey = Image.new("L", (4, 4), 7)
    palette = grey.convert("P")
    other = palette.copy()
    other.putpalette([255 - value for value in palette.getpalette()])
    alike = [(grey, grey.copy()), (palette, palette.copy()), (other, other.copy()), (grey.convert("RGB"),)]
    assert [[once(image) for image in images] for images in alike] == [[1, 1], [2, 2], [3, 3], [4]]
    assert once(Image.new("L", (2, 8), 7)) == 5 and once(Image.new("L", (4, 4), 8)) == 6 and once(grey) == 1
