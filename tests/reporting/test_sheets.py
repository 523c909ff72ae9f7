import numpy as np
import pytest
from PIL import Image

from rcgrpo.reporting.sheets import contact_sheet, heatmap, outline

RED, GREEN = (255, 0, 0), (0, 128, 0)


def flat(color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def box_of(sheet: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(axis=-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_contact_sheet_places_pictures(tmp_path):
    path = tmp_path / "sheet.png"
    sheet = contact_sheet({"before": [flat(RED)], "after": [flat(GREEN)]}, ["make it green"], path=path)
    left, top, right, bottom = box_of(sheet, RED)
    assert (left, right - left, bottom - top) == (16, 128, 128)
    assert box_of(sheet, GREEN) == (right + 4, top, right + 4 + 128, bottom)
    assert sheet.width == 16 + 128 + 4 + 128 + 16
    assert np.asarray(sheet)[bottom + 1 :].min() < 128  # the caption
    with Image.open(path) as saved:
        assert saved.tobytes() == sheet.tobytes()


def test_small_pictures_grow_by_whole_factors_and_large_ones_shrink():
    picture = flat(RED, (50, 20))
    picture.putpixel((0, 0), GREEN)
    sheet = contact_sheet({"small": [picture], "large": [flat((0, 0, 255), (400, 200))]})
    left, top, right, bottom = box_of(sheet, RED)
    assert (right - left, bottom - top) == (100, 40)
    assert box_of(sheet, GREEN) == (left, top, left + 2, top + 2)
    left, top, right, bottom = box_of(sheet, (0, 0, 255))
    assert (right - left, bottom - top) == (128, 64)


def test_more_than_eight_rows_make_two_blocks():
    pictures = [flat(GREEN)] * 8 + [flat(RED)]
    one, two = (contact_sheet({"a": pictures[start:]}, cell=64) for start in (1, 0))
    assert two.width == 2 * one.width - 2 * 16 + 28
    assert two.height < one.height
    left, top, *_ = box_of(two, RED)  # nine: five on the left, four on the right
    assert left == 16 + 64 + 28
    assert (top - box_of(two, GREEN)[1]) % (64 + 4) == 0


def test_labels_stand_below_the_pictures_of_their_column():
    pictures = {"before": [flat(RED)] * 2, "after": [flat(GREEN)] * 2}
    plain = contact_sheet(pictures, ["first", "second"])
    labelled = contact_sheet(pictures, ["first", "second"], labels={"after": ["0.25", "0.5"]})
    below = 20  # a line and its distance
    assert labelled.size == (plain.width, plain.height + 2 * below)
    assert box_of(labelled, GREEN)[:3] == box_of(plain, GREEN)[:3]
    left, top, right, _ = box_of(labelled, GREEN)
    strip = np.asarray(labelled)[top + 130 : top + 130 + below]
    assert strip[:, left:right].min() < 128 and strip[:, : left - 4].min() == 255


def test_labels_are_of_columns_and_one_for_each_picture():
    with pytest.raises(ValueError, match=r"labels for \['later'\].*\['before', 'after'\]"):
        contact_sheet({"before": [flat(RED)], "after": [flat(GREEN)]}, labels={"later": ["1"]})
    with pytest.raises(ValueError, match="'labels of a': 2"):
        contact_sheet({"a": [flat(RED)]}, labels={"a": ["1", "2"]})


def test_contact_sheet_refuses_ragged_columns():
    with pytest.raises(ValueError, match="'a': 1, 'b': 2"):
        contact_sheet({"a": [flat(RED)], "b": [flat(RED)] * 2})
    for nothing in ({}, {"a": []}):
        with pytest.raises(ValueError, match="needs one picture"):
            contact_sheet(nothing)


def test_outline_runs_just_outside_the_region():
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 16, 16))
    drawn = outline(flat(GREEN, (64, 64)), mask, color="red")
    assert box_of(drawn, RED) == (15, 15, 33, 33)
    assert drawn.getpixel((16, 16)) == drawn.getpixel((31, 31)) == GREEN


def test_heatmap_scale():
    picture = flat((128, 128, 128), (8, 8))
    values = np.zeros((2, 2))
    values[0, 0] = 2
    drawn = np.asarray(heatmap(values, picture)).astype(int)
    assert drawn[0, 0].sum() > drawn[7, 7].sum()
    # 0.15 of inferno's near-black over grey 128.
    assert drawn[7, 7] == pytest.approx([109, 109, 109], abs=1)
    assert np.array_equal(heatmap(values, picture, vmax=4), heatmap(values / 2, picture, vmax=2))
    assert np.ptp(np.asarray(heatmap(np.zeros((2, 2)), picture)), axis=(0, 1)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"\(4,\)"):
        heatmap(np.zeros(4), picture)
