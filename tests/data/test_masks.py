"""`data/masks.py`: every encoding against arrays made by hand, and masks made of pictures and of velocities."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.filters import threshold_otsu

from rcgrpo.data.masks import (
    ENCODINGS,
    change_inside,
    decode_mask,
    difference_mask,
    feather_mask,
    fit_mask,
    grow_mask,
    mask_share,
    otsu,
    srgb_to_lab,
    velocity_map,
    velocity_mask,
)
from rcgrpo.maths.regions import grow

regions = npst.arrays(bool, npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24))


def on(mask):
    return np.asarray(mask) == 255


def box(size, left, top, right, bottom):
    array = np.zeros(size[::-1], dtype=bool)
    array[top:bottom, left:right] = True
    return array


def picture(array):
    return Image.fromarray(array.astype(np.uint8) * 255)


# Pictures


def test_luma_keeps_grey_and_reads_colours_by_their_brightness():
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    assert np.array_equal(np.asarray(decode_mask(Image.fromarray(grey), "luma", (6, 4))), grey)
    assert on(decode_mask(Image.new("1", (2, 2), 1), "luma", None)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_luma_keeps_what_is_transparent_whatever_lies_beneath(mode):
    layer = Image.new("RGBA", (6, 4), (255, 255, 255, 0))  # an empty layer of a painting program is often white
    layer.paste((255, 255, 255, 255), (2, 1, 5, 3))
    mask = np.asarray(decode_mask(layer.convert(mode), "luma", (6, 4)))
    assert (mask[1:3, 2:5] == 255).all() and mask.sum() == 6 * 255


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_nonzero_reads_small_numbers_of_deep_instance_maps(dtype):
    instances = np.zeros((3, 4), dtype=dtype)
    instances[0, 1], instances[2, 3] = 1, 300
    assert np.array_equal(on(decode_mask(Image.fromarray(instances), "nonzero", (4, 3))), instances > 0)


def test_nonzero_takes_any_colour_of_an_instance_map():
    instances = Image.fromarray(np.array([[0, 1, 2], [0, 0, 3]], dtype=np.uint8), mode="P")
    instances.putpalette([0, 0, 0, 40, 0, 0, 0, 0, 60, 255, 255, 255])
    expected = [[False, True, True], [False, False, True]]
    assert on(decode_mask(instances, "nonzero", (3, 2))).tolist() == expected
    assert on(decode_mask(instances.convert("RGB"), "nonzero", (3, 2))).tolist() == expected


@given(regions)
@settings(max_examples=20, deadline=None)
def test_alpha_reads_the_cut_out_part_and_not_its_colour(region):
    rgba = np.zeros((*region.shape, 4), dtype=np.uint8)  # HumanEdit: black where it is cut, the picture elsewhere
    rgba[~region] = (90, 120, 30, 255)
    rgba[region, 3] = 127
    assert np.array_equal(on(decode_mask(Image.fromarray(rgba), "alpha", None)), region)


def test_alpha_of_a_picture_without_one_is_refused():
    with pytest.raises(
        ValueError, match=r"row 3: got .* expected a mask encoded as 'alpha' \(a picture of mode RGB has"
    ):
        decode_mask(Image.new("RGB", (4, 4)), "alpha", (4, 4), "row 3")


def test_paint_is_white_or_cut_out():
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 250, (8, 12, 3), dtype=np.uint8)
    region = box((12, 8), 2, 1, 7, 5)
    painted = photo.copy()
    painted[region] = (250, 255, 252)
    painted[7, 11] = (255, 255, 249)  # nearly white is a part of the photograph
    assert np.array_equal(on(decode_mask(Image.fromarray(painted), "paint", (12, 8))), region)
    opaque = Image.fromarray(np.dstack([painted, np.full((8, 12), 255, np.uint8)]))
    assert np.array_equal(on(decode_mask(opaque, "paint", (12, 8))), region)
    white = np.full_like(photo, 255)  # if alpha varies, colours say nothing
    cut = Image.fromarray(np.dstack([white, np.where(region, 0, 255).astype(np.uint8)]))
    assert np.array_equal(on(decode_mask(cut, "paint", (12, 8))), region)


# Runs, boxes, COCO


def test_runs_count_along_rows():
    mask = on(decode_mask([0, 2, 512 + 3, 1, 512 * 512 - 2, 99], "runs", (512, 512)))
    expected = np.zeros((512, 512), dtype=bool)
    expected[0, :2] = expected[1, 3] = expected[511, 510:] = True
    assert np.array_equal(mask, expected)
    assert not on(decode_mask([], "runs", (512, 512))).any()


def test_the_border_is_an_option():
    plain, border = (on(decode_mask([512 * 100 + 7, 5], name, None)) for name in ("runs", "runs-border"))
    edge = np.ones((512, 512), dtype=bool)
    edge[1:-1, 1:-1] = False
    assert plain.sum() == 5 and np.array_equal(border, plain | edge)


@given(npst.arrays(bool, (512, 512), elements=st.booleans(), fill=st.just(False)))
@settings(max_examples=10, deadline=None)
def test_any_region_survives_being_written_as_runs(region):
    steps = np.flatnonzero(np.diff(np.concatenate([[0], region.ravel().view(np.int8), [0]])))
    starts, ends = steps[::2], steps[1::2]
    runs = np.stack([starts, ends - starts], axis=1).ravel().tolist()
    assert np.array_equal(on(decode_mask(runs, "runs", None)), region)
    assert np.array_equal(on(decode_mask(json.dumps(runs), "runs", None)), region)


@pytest.mark.parametrize(
    ("packed", "counts"),
    [  # packed by other implementations
        ("061M", [0, 6, 1, 3]),
        ("061", [0, 6, 1]),
        ("061K", [0, 6, 1, 1]),
        ("061O", [0, 6, 1, 5]),
        ("0610", [0, 6, 1, 6]),
        ("011101010", [0, 1, 1, 2, 1, 3, 1, 4, 1]),
        ("0PP1", [0, 1024]),
    ],
)
def test_packed_counts_of_coco(packed, counts):
    size = [1, sum(counts)]
    assert np.array_equal(
        on(decode_mask({"size": size, "counts": packed}, "rle", None)),
        on(decode_mask({"size": size, "counts": counts}, "rle", None)),
    )


def pack(counts):
    """COCO's packing, the other way round."""
    out = ""
    for i, count in enumerate(counts):
        number = count - (counts[i - 2] if i > 2 else 0)
        while True:
            bits, number = number & 31, number >> 5
            done = number == (-1 if bits & 16 else 0)
            out += chr(48 + bits + (0 if done else 32))
            if done:
                break
    return out


def test_counts_are_read_as_pycocotools_reads_them():
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools comes with the extra dev")
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = map(int, rng.integers(1, 40, 2))
        region = np.asfortranarray(rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98]), dtype=np.uint8)
        packed = coco.encode(region)
        assert np.array_equal(on(decode_mask(packed, "rle", None)), coco.decode(packed) > 0)
        edges = np.flatnonzero(np.diff(region.flatten(order="F"), prepend=0, append=2))
        runs = {"size": [height, width], "counts": np.diff(edges, prepend=0).tolist()}
        theirs = coco.decode(coco.frPyObjects(runs, height, width))
        assert np.array_equal(on(decode_mask(runs, "rle", None)), theirs > 0) and np.array_equal(theirs, region)


@given(regions)
@settings(max_examples=60, deadline=None)
def test_any_region_survives_coco_in_every_spelling(region):
    flat = region.T.ravel()  # along columns
    edges = np.flatnonzero(np.diff(flat.view(np.int8))) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    if flat[0]:
        counts = [0, *counts]
    size = list(region.shape)
    spellings = [counts, pack(counts), pack(counts).encode()]
    for value in [{"size": size, "counts": c} for c in spellings]:
        assert np.array_equal(on(decode_mask(value, "rle", None)), region)
    assert np.array_equal(on(decode_mask(json.dumps({"size": size, "counts": counts}), "rle", None)), region)


@pytest.mark.parametrize(
    ("encoding", "value"),
    [
        ("boxes-xyxy", [4, 2, 10, 7]),
        ("boxes-xywh", [4, 2, 6, 5]),
        ("boxes-xyxy-relative", [0.2, 0.2, 0.5, 0.7]),
        ("boxes-xywh-relative", [0.2, 0.2, 0.3, 0.5]),
        ("boxes-xyxy", [[4, 2, 10, 7]]),
        ("boxes-xyxy", "[[4, 2, 10, 7], [5, 3, 6, 4]]"),
    ],
)
def test_boxes_in_four_conventions(encoding, value):
    assert np.array_equal(on(decode_mask(value, encoding, (20, 10))), box((20, 10), 4, 2, 10, 7))


def test_boxes_cover_every_pixel_they_touch_and_are_cut_at_the_border():
    assert np.array_equal(on(decode_mask([3.5, 1.1, 5.2, 2.0], "boxes-xyxy", (8, 4))), box((8, 4), 3, 1, 6, 2))
    assert np.array_equal(on(decode_mask([-5, -5, 3, 99], "boxes-xyxy", (8, 4))), box((8, 4), 0, 0, 3, 4))
    two = on(decode_mask([[0, 0, 1, 1], [6, 2, 2, 2]], "boxes-xywh", (8, 4)))
    assert np.array_equal(two, box((8, 4), 0, 0, 1, 1) | box((8, 4), 6, 2, 8, 4))
    assert not on(decode_mask([], "boxes-xyxy", (8, 4))).any()


@pytest.mark.parametrize(
    ("value", "encoding", "said"),
    [
        ([1, 2, 3], "runs", "cannot reshape"),
        ([-1, 2], "runs", "runs outside the 512×512 pixels"),
        ([512 * 512, 1], "runs", "runs outside"),
        ({"size": [2, 2], "counts": [1, 1]}, "rle", "counts that sum to 2 for 2×2 pixels"),
        ({"size": [2, 2], "counts": "P"}, "rle", "end in the middle of a number"),
        ({"size": [2, 2], "counts": "0 "}, "rle", "character ' ' in packed counts"),
        ({"counts": [4]}, "rle", "size"),
        ([0, 0, 1], "boxes-xyxy", "cannot reshape"),
        ([5, 0, 1, 1], "boxes-xyxy", "ends before it begins"),
        ([0, 0, float("nan"), 1], "boxes-xyxy", "ends before it begins"),
        ("{not json", "rle", "Expecting"),
        (7, "luma", "7, expected [height, width] with 1 = edit, or a picture"),
        ("gone.png", "luma", "expected a picture that Pillow can decode"),
    ],
)
def test_what_an_encoding_cannot_read_is_named(value, encoding, said):
    with pytest.raises(ValueError, match=rf"^train row 5, column 'mask': got .*{re.escape(said)}"):
        decode_mask(value, encoding, (4, 4), "train row 5, column 'mask'")


def test_an_unknown_encoding_lists_the_known_ones():
    with pytest.raises(ValueError, match="mask_encoding: got 'png', expected one of luma, nonzero, alpha, paint, runs"):
        decode_mask(Image.new("L", (2, 2)), "png", None)
    assert len(ENCODINGS) == 11


def test_a_mask_of_another_size_is_brought_to_the_source():
    mask = picture(box((10, 5), 2, 1, 6, 3))
    assert np.array_equal(on(fit_mask(mask, (20, 10))), box((20, 10), 4, 2, 12, 6))
    assert fit_mask(mask, (10, 5)) is mask
    with pytest.raises(ValueError, match=r"row 1: got a mask of width × height \(10, 5\), expected the proportions of"):
        fit_mask(mask, (5, 10), "row 1")


# Edges


@given(regions, st.floats(0, 0.4))
@settings(max_examples=30, deadline=None)
def test_growing_is_what_regions_does(region, share):
    grown = grow_mask(picture(region), share)
    expected = grow(torch.from_numpy(region).float(), round(share * min(region.shape)))
    assert np.array_equal(on(grown), expected.numpy() == 1)


@given(regions.filter(np.any), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_feathering_only_adds_and_falls_with_the_distance(region, share):
    soft = np.asarray(feather_mask(picture(region), share)).astype(int)
    width = round(share * min(region.shape))
    distance = ndimage.distance_transform_edt(~region)
    assert (soft[region] == 255).all() and not soft[distance >= width + 1].any()
    assert (soft[(distance <= width) & ~region] > 0).all()
    order = np.argsort(distance.ravel(), kind="stable")
    assert (np.diff(soft.ravel()[order]) <= 0).all()


def test_feathering_an_edge_by_hand():
    mask = np.zeros((10, 10), dtype=np.uint8)
    mask[:, :2] = 200
    assert np.asarray(feather_mask(Image.fromarray(mask), 0.3))[4].tolist() == [200, 200, 150, 100, 50, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"mask_feather: got 2, expected a share"):
        feather_mask(Image.fromarray(mask), 2)


# The difference


def test_lab_is_scikit_images():
    photo = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert np.abs(srgb_to_lab(Image.fromarray(photo)) - rgb2lab(photo)).max() < 0.01


@given(npst.arrays(np.float32, 50, elements=st.floats(0, 1, width=32)).filter(lambda a: np.ptp(a) > 1e-3))
@settings(max_examples=40, deadline=None)
def test_otsu_is_scikit_images(values):
    assert otsu(values) == pytest.approx(threshold_otsu(values), abs=1e-4)


def test_otsu_of_one_value_is_that_value():
    assert otsu(np.full(9, 0.25)) == 0.25


def scene(seed=0, size=(120, 90)):
    """A smooth picture with a little noise, as a photograph is."""
    rng = np.random.default_rng(seed)
    small = rng.integers(60, 200, (6, 8, 3), dtype=np.uint8)
    photo = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)).astype(int)
    return photo + rng.integers(-3, 4, photo.shape)


def test_the_difference_finds_the_object_and_little_else():
    source = scene()
    target = source + np.random.default_rng(1).integers(-4, 5, source.shape)  # compression
    region = box((120, 90), 40, 20, 75, 60)
    target[region] = (240, 30, 40)
    target[80:82, 100:102] = (0, 255, 0)  # a speck
    source, target = (Image.fromarray(a.clip(0, 255).astype(np.uint8)) for a in (source, target))
    mask = on(difference_mask(source, target))
    assert mask[region].all()
    assert not mask[~ndimage.binary_dilation(region, np.ones((3, 3)), iterations=5)].any()
    exact = on(difference_mask(source, target, growth=0))
    assert (exact ^ region).mean() < 0.01 and exact.sum() < mask.sum()
    assert np.array_equal(mask, on(grow_mask(picture(exact), 0.02)))


def test_the_share_of_the_change_in_the_region():
    size = (240, 180)
    source, target = scene(size=size), scene(size=size)
    target[box(size, 40, 20, 80, 60)] = (240, 30, 40)
    source, target = Image.fromarray(source.astype(np.uint8)), Image.fromarray(target.astype(np.uint8))

    def inside(*corners):
        return change_inside(source, target, picture(box(source.size, *corners)))

    assert inside(30, 10, 90, 70) == 1 and inside(120, 20, 160, 60) == 0
    assert inside(30, 10, 60, 70) == pytest.approx(0.5, abs=0.03)
    assert change_inside(source, target, Image.new("L", source.size, 51)) == pytest.approx(0.2)
    assert change_inside(source, source, picture(box(source.size, 0, 0, 9, 9))) is None


@pytest.mark.parametrize("spot", [(200, 20, 204, 24), (0, 10, 240, 12)], ids=["speck", "thin line"])
def test_specks_and_thin_lines_are_dropped(spot):
    source = scene(size=(240, 180))
    target = source.copy()
    region = box((240, 180), 80, 60, 150, 140)
    target[region | box((240, 180), *spot)] = (240, 30, 40)
    source, target = (Image.fromarray(a.clip(0, 255).astype(np.uint8)) for a in (source, target))
    mask = on(difference_mask(source, target, growth=0))
    assert mask[62:138, 82:148].all() and not mask[:50].any()


def test_a_region_at_the_border_is_not_eaten():
    source = scene()
    target = source.copy()
    target[:, :12] = (255, 0, 0)
    source, target = (Image.fromarray(a.clip(0, 255).astype(np.uint8)) for a in (source, target))
    mask = on(difference_mask(source, target, growth=0))
    assert mask[:, 0].all() and mask[0, :10].all() and not mask[:, 16:].any()


def test_the_same_picture_has_no_difference():
    source = Image.fromarray(scene().clip(0, 255).astype(np.uint8))
    assert difference_mask(source, source) is None
    assert difference_mask(source, source.point(lambda v: min(255, v + 6))) is None  # below the least difference


def test_a_target_of_another_size_is_resized():
    source = Image.fromarray(scene().clip(0, 255).astype(np.uint8))
    target = source.copy()
    target.paste((255, 0, 0), (40, 20, 75, 60))
    mask = on(difference_mask(source, target.resize((240, 180), Image.Resampling.BICUBIC)))
    assert mask.shape == (90, 120) and mask[25:55, 45:70].all() and mask.mean() < 0.25


# Velocities


def test_velocity_map_by_hand():
    empty = torch.zeros(2, 4, 3)
    instructed = empty.clone()
    instructed[:, 1] = 2.0
    instructed[0, 2] = -1.0  # the sign does not matter, draws are averaged: 0.5
    tokens = velocity_map(instructed, empty)  # differences 0, 2, 0.5, 0; mean 0.625; ceiling 1.875
    assert tokens.tolist() == pytest.approx([0, 1, 0.5 / 1.875, 0])
    assert velocity_map(empty, empty).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"got shapes \(2, 4, 3\) and \(2, 4\)"):
        velocity_map(instructed, empty[..., 0])


def test_velocity_mask_is_the_grid_at_the_pictures_size():
    tokens = torch.zeros(4 * 6)
    tokens[1 * 6 + 2] = 1.0
    mask = on(velocity_mask(tokens, (4, 6), (60, 40)))
    rows, columns = np.nonzero(mask)
    assert mask.shape == (40, 60)
    assert (rows.mean(), columns.mean()) == pytest.approx((14.5, 24.5)) and 50 < mask.sum() < 70
    assert velocity_mask(tokens * 0.4, (4, 6), (60, 40)) is None


def test_mask_share():
    assert mask_share(picture(box((10, 10), 0, 0, 5, 4))) == pytest.approx(0.2)
