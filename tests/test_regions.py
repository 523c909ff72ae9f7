import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.regions import check_mask, grow, is_full, mask_to_tensor, region_weights, to_tokens

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
    assert mask_to_tensor(Image.fromarray(PATTERN * 51)).tolist() == (torch.from_numpy(PATTERN) * 51 / 255).tolist()
    assert mask_to_tensor(np.array([[0, 2]], dtype=np.uint8)).tolist() == [[0, pytest.approx(2 / 255)]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, 3, 3)), r"mask: got shape \(2, 3, 3\), expected \[height, width\]"),
        (np.zeros(4), r"mask: got shape \(4,\)"),
        (np.zeros((1, 1, 2, 2)), r"mask: got shape \(1, 1, 2, 2\)"),
        (np.array([[0.0, 1.5]]), r"mask: got values in \[0.0, 1.5\], expected \[0, 1\]"),
        (np.array([[-0.5, 1.0]]), r"mask: got values in \[-0.5, 1.0\]"),
        (np.array([[np.nan, 1.0]]), r"mask: got values in \[nan, nan\]"),
        (np.array([[0, 300]]), "mask: got values in"),
        (np.array([[-1, 1]]), "mask: got values in"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        mask_to_tensor(mask)


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


def test_grow_refuses_a_negative_radius():
    with pytest.raises(ValueError, match="pixels: got -1"):
        grow(torch.ones(2, 2), -1)


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
