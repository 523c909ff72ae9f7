import math
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rcgrpo.maths.regions import (
    CORRUPTIONS,
    at_size,
    check_mask,
    corrupt,
    grow,
    is_full,
    mask_to_tensor,
    region_weights,
    to_elements,
    to_places,
    to_tokens,
)

PATTERN = np.array([[1, 0, 0], [0, 1, 1]], dtype=np.uint8)
LUMA = Image.fromarray(PATTERN * 255)
PALETTE = Image.fromarray(PATTERN, "P")
PALETTE.putpalette([0, 0, 0, 255, 255, 255])
SOFT = PATTERN.astype(np.float32) / 2


@pytest.mark.parametrize(
    "mask",
    [
        LUMA,
        LUMA.convert("RGB"),
        LUMA.convert("RGBA"),
        LUMA.convert("1"),
        PALETTE,
        PATTERN,
        PATTERN * 255,
        PATTERN.astype(bool),
        PATTERN.astype(np.int64),
        PATTERN.astype(np.float64),
        PATTERN.tolist(),
        torch.from_numpy(PATTERN),
        torch.from_numpy(PATTERN).bool(),
        torch.from_numpy(PATTERN).half(),
        PATTERN[None],
        PATTERN[..., None],
        torch.from_numpy(PATTERN * 255)[None],
    ],
)
def test_every_usual_mask_reads_the_same(mask):
    tensor = mask_to_tensor(mask)
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == PATTERN.tolist()


def test_soft_masks_keep_their_values():
    assert mask_to_tensor(SOFT).tolist() == SOFT.tolist()
    grey = np.array([[0, 51, 255]], dtype=np.uint8)
    assert (
        mask_to_tensor(Image.fromarray(grey)).tolist() == mask_to_tensor(grey).tolist() == [[0, pytest.approx(0.2), 1]]
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, 3, 3)), r"mask: got shape \(2, 3, 3\), expected \[height, width\]"),
        (np.zeros(4), r"mask: got shape \(4,\)"),
        (np.zeros((1, 1, 2, 2)), r"mask: got shape \(1, 1, 2, 2\)"),
        (np.array([[0.0, 1.5]]), r"mask: got values in \[0.0, 1.5\], expected \[0, 1\]"),
        (np.array([[-0.5, 1.0]]), r"mask: got values in \[-0.5, 1.0\]"),
        (np.array([[np.nan, 1.0]]), r"mask: got values in \[nan, nan\]"),
        (np.array([[-1, 1]]), "mask: got values in"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        mask_to_tensor(mask)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["bool", "uint8", "float32", "picture", "tensor"]),
    st.none() | st.tuples(st.integers(0, 1599), st.floats(0.01, 1)),
)
@settings(deadline=None, max_examples=50)
def test_a_mask_of_zeros_is_refused_and_one_pixel_is_enough(height, width, kind, pixel):
    """In every encoding; soft values count in those that have them."""
    values = np.zeros((height, width), np.float32)
    if pixel is not None:
        values.flat[pixel[0] % values.size] = pixel[1] if kind in ("float32", "tensor") else 1
    how = {"picture": lambda v: Image.fromarray((255 * v).astype(np.uint8)), "tensor": torch.from_numpy}
    mask = mask_to_tensor(how.get(kind, lambda v: v.astype(kind))(values))
    with nullcontext() if pixel else pytest.raises(ValueError, match="got an empty mask"):
        check_mask(mask, (height, width))


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="train row 3: got an empty mask, expected at least one edit pixel"):
        check_mask(torch.zeros(4, 4), where="train row 3")


def test_a_mask_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"mask: got a mask of height × width \(4, 6\), .* source picture's \(6, 4\)"):
        check_mask(torch.ones(4, 6), (6, 4))


def test_a_mask_with_one_faint_pixel_is_enough():
    mask = torch.zeros(4, 6)
    mask[1, 2] = 0.1
    check_mask(mask, (4, 6))


def test_only_a_mask_without_a_pixel_to_keep_is_full():
    mask = torch.ones(3, 3)
    assert is_full(mask)
    mask[2, 0] = 0.99
    assert not is_full(mask)


def test_grow_dilates_by_a_square_and_stops_at_the_border():
    mask = torch.zeros(5, 7)
    mask[0, 1], mask[4, 6] = 1, 0.5
    grown = grow(mask, 1)
    expected = torch.zeros(5, 7)
    expected[:2, :3], expected[3:, 5:] = 1, 0.5
    assert torch.equal(grown, expected)
    assert torch.equal(grow(grow(mask, 1), 1), grow(mask, 2))
    assert grow(mask, 0) is mask


def test_grow_keeps_leading_dimensions_apart():
    masks = torch.zeros(2, 3, 5, 7)
    masks[1, 2, 2, 3] = 1
    grown = grow(masks, 1)
    assert grown.shape == masks.shape
    assert grown.sum() == grown[1, 2].sum() == 9


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_grow_is_the_maximum_over_a_square_to_the_bit(height, width, pixels, seed):
    mask = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed))
    padded = F.pad(mask, (pixels,) * 4, value=-1.0)
    assert torch.equal(grow(mask, pixels), F.max_pool2d(padded, 2 * pixels + 1, stride=1))


def test_grow_takes_no_longer_for_a_large_radius():
    mask = (torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) > 0.999).float()

    def seconds(pixels):
        began = time.perf_counter()
        grow(mask, pixels)
        return time.perf_counter() - began

    small, large = (min(seconds(pixels) for _ in range(3)) for pixels in (4, 64))
    assert large < 10 * small + 0.05  # a maximum over all pixels of the square: 200 times


def test_a_mask_at_another_size_loses_no_edit_pixel():
    for y, x in ((0, 0), (3, 5), (6, 9)):
        mask = torch.zeros(7, 10)
        mask[y, x] = 0.5
        assert at_size(mask, (2, 3)).amax() == 0.5 and at_size(mask, (2, 3)).shape == (2, 3)
        assert at_size(mask, (14, 20)).eq(0.5).sum() == 4
    assert torch.equal(at_size(mask, (7, 10)), mask)


def test_grow_refuses_a_negative_radius():
    with pytest.raises(ValueError, match="pixels: got -1"):
        grow(torch.ones(2, 2), -1)


@pytest.mark.parametrize("grid", [(2, 3), (4, 4)])
def test_elements_are_packed_as_the_pipelines_pack_latents(grid):
    """Each latent pixel that the mask touches, in all of its channels, where FLUX, FLUX.2 and Qwen-Image put it."""
    from diffusers import Flux2KleinPipeline, FluxKontextPipeline, QwenImageEditPlusPipeline

    rows, columns, channels = *grid, 5
    mask = (torch.rand(2, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(0)) > 0.95).float()
    found = to_elements(mask, grid, 4 * channels)
    latents = torch.nn.functional.max_pool2d(mask, 4).unsqueeze(1).expand(-1, channels, -1, -1)
    assert 0 < latents.mean() < 0.9
    flux = FluxKontextPipeline._pack_latents(latents, 2, channels, 2 * rows, 2 * columns)
    qwen = QwenImageEditPlusPipeline._pack_latents(latents, 2, channels, 2 * rows, 2 * columns)
    klein = Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(latents))
    for packed in (flux, qwen, klein):
        assert torch.equal(found, packed)
    assert torch.equal(found.amax(-1), to_tokens(mask, grid, "max"))
    assert torch.equal(to_places(found, grid), latents)


def test_tokens_by_max_and_by_mean():
    mask = torch.zeros(4, 6)
    mask[0, 0] = mask[3, 5] = mask[3, 4] = 1
    mask[0, 4] = 0.5
    # tokens of 2 × 2 pixels, row by row
    assert to_tokens(mask, (2, 3), "max").tolist() == [1, 0, 0.5, 0, 0, 1]
    assert to_tokens(mask, (2, 3), "mean").tolist() == [0.25, 0, 0.125, 0, 0, 0.5]


def test_tokens_of_a_size_that_does_not_divide_lose_no_pixel():
    for y in range(5):
        for x in range(7):
            mask = torch.zeros(5, 7)
            mask[y, x] = 1
            assert to_tokens(mask, (2, 3), "max").max() == 1
            assert to_tokens(mask, (2, 3), "mean").max() > 0
    assert to_tokens(torch.ones(5, 7), (2, 3), "mean").tolist() == [1] * 6


def test_tokens_of_a_batch():
    masks = torch.zeros(2, 4, 4)
    masks[1, :2, 2:] = 1
    assert to_tokens(masks, (2, 2), "mean").tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]


def test_weights_by_hand():
    assert region_weights(torch.tensor([1.0, 0.0, 0.5]), 0.2).tolist() == pytest.approx([1, 0.2, 0.6])
    assert region_weights(torch.tensor([1.0, 0.0]), 0.0).tolist() == [1, 0]
    with pytest.raises(ValueError, match="keep_weight: got -1"):
        region_weights(torch.ones(1), -1)


# Imperfect masks on purpose

kinds = st.sampled_from(CORRUPTIONS)
severities = st.floats(0, 1)
keys = st.integers(0, 10**6)
quick = settings(max_examples=60, deadline=None)


def ellipse(size, y, x, height, width):
    rows, columns = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    return (((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 < 1).float()


def ellipses(size=48):
    """One convex region, somewhere in the picture and smaller than it."""
    return st.builds(
        lambda *shape: ellipse(size, *shape),
        *[st.floats(0.3, 0.7)] * 2,
        *[st.floats(0.08, 0.25)] * 2,
    )


def any_masks():
    """Any non-empty mask: soft values, any shape, any number of parts, full ones too."""

    def draw(height, width, key, share):
        values = torch.rand(height, width, generator=torch.Generator().manual_seed(key))
        mask = torch.where(values < share, values / share, torch.zeros(()))
        mask[key % height, key % width] = 1
        return mask

    return st.builds(draw, st.integers(1, 30), st.integers(1, 30), keys, st.floats(0.05, 1))


def iou(a, b):
    return (torch.minimum(a, b).sum() / torch.maximum(a, b).sum()).item()


@quick
@given(any_masks(), kinds, severities, keys)
def test_a_corrupted_mask_is_a_mask_again(mask, kind, severity, key):
    spoilt = corrupt(mask, kind, severity, key)
    assert spoilt.dtype == torch.float32 and spoilt.shape == mask.shape
    assert spoilt.min() >= 0 and spoilt.max() <= 1
    check_mask(spoilt)
    assert torch.equal(spoilt, corrupt(mask.clone(), kind, severity, key))


@quick
@given(any_masks(), kinds, keys)
def test_severity_0_changes_nothing(mask, kind, key):
    assert torch.equal(corrupt(mask, kind, 0, key), mask)


@quick
@given(any_masks(), severities, keys)
def test_soft_values_stay_where_the_region_stays(mask, severity, key):
    for kind in ("grow", "shrink", "holes", "box"):
        spoilt = corrupt(mask, kind, severity, key)
        stays = (mask > 0) & (spoilt > 0)
        assert torch.equal(spoilt[stays], mask[stays])
        assert set(spoilt[mask == 0].tolist()) <= {0.0, 1.0}


@quick
@given(any_masks(), severities, severities, keys)
def test_growing_and_boxing_only_add_and_shrinking_and_holes_only_take_away(mask, low, high, key):
    low, high = sorted((low, high))
    for kind, sign in {"grow": 1, "box": 1, "shrink": -1, "holes": -1}.items():
        weak, strong = corrupt(mask, kind, low, key), corrupt(mask, kind, high, key)
        assert (sign * (strong - weak) >= 0).all() and (sign * (weak - mask) >= 0).all()


@quick
@given(ellipses(), kinds, severities, severities, keys)
def test_more_severe_is_further_from_the_truth(mask, kind, low, high, key):
    low, high = sorted((low, high))
    assert iou(corrupt(mask, kind, high, key), mask) <= iou(corrupt(mask, kind, low, key), mask) + 1e-6


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_strongest_fault_is_a_real_one(kind):
    mask = ellipse(64, 0.45, 0.4, 0.22, 0.15)
    limits = {"holes": 0.26, "blob_noise": 0.34, "box": 0.83, "grow": 0.3, "missing": 0.11}
    assert iou(corrupt(mask, kind, 1), mask) <= limits.get(kind, 0.07)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(0.4, 0.35, 0.2, 0.15), (0.6, 0.3, 0.1, 0.2), (0.7, 0.62, 0.22, 0.22)])
def test_a_severity_means_the_same_at_every_resolution(kind, shape):
    small, large = ellipse(64, *shape), ellipse(256, *shape)
    for key, severity in enumerate((0.2, 0.45, 0.7, 1)):
        a, b = corrupt(small, kind, severity, key), corrupt(large, kind, severity, key)
        b = F.interpolate(b[None, None], (64, 64), mode="area")[0, 0]
        assert abs(a.mean() - b.mean()) < 0.01
        # they differ along edges only, and noise has long ones
        assert (a - b).abs().mean() < (0.04 if kind == "blob_noise" else 0.02)


def test_another_key_draws_another_fault():
    mask = ellipse(64, 0.45, 0.4, 0.22, 0.15)
    for kind in ("shift", "holes", "blob_noise"):
        assert len({tuple(corrupt(mask, kind, 0.5, (seed, "row")).flatten().tolist()) for seed in range(8)}) > 5


def picture(*rows):
    return torch.tensor([[float(c == "#") for c in row] for row in rows])


def test_growing_by_hand():
    mask = torch.zeros(20, 20)
    mask[8:12, 8:12] = 1
    grown = corrupt(mask, "grow", 1)  # reach: √16 / 2 = 2 pixels
    expected = torch.zeros(20, 20)
    expected[6:14, 6:14] = 1
    for y, x in ((6, 6), (6, 13), (13, 6), (13, 13)):  # a corner is 2.8 pixels off
        expected[y, x] = 0
    assert torch.equal(grown, expected)


def test_shrinking_by_hand():
    mask = picture("#######", "#######", "#######", "#######", "#######")
    # depths run from 0.5 at the border to 2.5 in the middle row
    assert torch.equal(corrupt(mask, "shrink", 0.5), F.pad(torch.ones(3, 5), (1, 1, 1, 1)))
    assert torch.equal(corrupt(mask, "shrink", 1), F.pad(torch.ones(1, 3), (2, 2, 2, 2)))


def test_shifting_keeps_the_shape_and_goes_by_its_size():
    mask = torch.zeros(40, 40)
    mask[0:6, 34:40] = 1  # a corner: both directions have to turn round
    for key in range(12):
        moved = corrupt(mask, "shift", 1, key)
        rows, columns = moved.nonzero().unbind(1)
        assert moved.sum() == 36 and rows.max() - rows.min() == columns.max() - columns.min() == 5
        assert math.hypot(rows.min().item(), columns.min().item() - 34) == pytest.approx(6, abs=0.8)


def test_holes_take_three_quarters_of_the_area():
    mask = ellipse(64, 0.5, 0.5, 0.3, 0.3)
    for severity in (0.2, 0.6, 1):
        assert corrupt(mask, "holes", severity).sum() / mask.sum() == pytest.approx(1 - 0.75 * severity, abs=2e-3)


def test_blob_noise_keeps_the_area_and_moves_half_of_it():
    mask = ellipse(64, 0.5, 0.5, 0.3, 0.2)
    spoilt = corrupt(mask, "blob_noise", 1)
    assert spoilt.sum().item() == pytest.approx(mask.sum().item(), abs=2)
    assert (spoilt * mask).sum() / mask.sum() == pytest.approx(0.5, abs=2e-3)


def test_every_part_gets_its_box():
    mask = picture("#......", "##...#.", "......#", ".......")
    boxed = picture("##.....", "##...##", ".....##", ".......")
    assert torch.equal(corrupt(mask, "box", 1), boxed)
    assert torch.equal(corrupt(boxed, "box", 1), boxed)


def test_a_missing_mask_is_the_full_picture_as_often_as_the_severity_says():
    mask = picture("#..", "...")
    outcomes = [is_full(corrupt(mask, "missing", 0.3, key)) for key in range(400)]
    assert np.mean(outcomes) == pytest.approx(0.3, abs=0.07)
    assert all(torch.equal(corrupt(mask, "missing", 0.3, k), mask) for k in range(400) if not outcomes[k])
    assert is_full(corrupt(mask, "missing", 1))


def test_the_wrong_object_is_the_other_one_or_a_mirrored_place():
    mask, other = picture("##..", "#...", "...."), picture("....", "....", "..#.")
    assert torch.equal(corrupt(mask, "wrong_object", 1, other=other), other)
    assert torch.equal(corrupt(mask, "wrong_object", 1), picture("..##", "...#", "...."))
    tall = picture(".#.", ".#.", "...")  # mirrored left to right it would stay
    assert iou(corrupt(tall, "wrong_object", 1), tall) < iou(tall.flip(1), tall)
    middle = picture("....", ".##.", ".##.", "....")
    assert torch.equal(corrupt(middle, "wrong_object", 1), picture("#..#", "....", "....", "#..#"))
    chosen = [torch.equal(corrupt(mask, "wrong_object", 0.5, key, other), other) for key in range(200)]
    assert np.mean(chosen) == pytest.approx(0.5, abs=0.11)


def test_pictures_and_arrays_can_be_corrupted_too():
    assert torch.equal(corrupt(LUMA, "grow", 1), corrupt(torch.from_numpy(PATTERN), "grow", 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "blur"}, "kind: got 'blur', expected one of grow, shrink"),
        ({"severity": 1.5}, r"severity: got 1.5, expected a number in \[0, 1\]"),
        ({"severity": float("nan")}, "severity: got nan"),
        ({"mask": torch.zeros(2, 3)}, "mask: got an empty mask"),
        ({"other": torch.zeros(2, 3)}, "other: got an empty mask"),
        ({"other": torch.ones(3, 2)}, r"other: got a mask of height × width \(3, 2\)"),
    ],
)
def test_wrong_corruptions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt(**{"mask": torch.ones(2, 3), "kind": "wrong_object", "severity": 0.5, **arguments})
