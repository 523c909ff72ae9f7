import math

import numpy as np
import pytest
from PIL import Image

from rcgrpo.maths.metrics import MAX_PSNR, background_psnr, background_ssim, masked_psnr


def grey(value: int, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), (value, value, value))


def left_half(side: int = 64) -> Image.Image:
    mask = Image.new("L", (side, side))
    mask.paste(255, (0, 0, side // 2, side))
    return mask


def noise(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_masked_psnr_by_hand():
    # 51/255 = 0.2 off on every background pixel: -10 log10(0.04) = 13.979 dB, whatever the mask.
    for mask in (left_half(), Image.new("L", (64, 64))):
        assert masked_psnr([grey(151)], [grey(100)], [mask]) == [pytest.approx(13.9794, abs=1e-3)]


@pytest.mark.parametrize("size", [None, 512])
def test_frame_psnr_reads_the_background_share_above_the_masked_one(size):
    frame = background_psnr([grey(151)], [grey(100)], [left_half()], size=size)
    assert frame == [pytest.approx(13.9794 - 10 * math.log10(0.5), abs=1e-3)]
    pair = [noise(0)], [noise(1)], [left_half()]
    assert background_psnr(*pair, size=None)[0] == pytest.approx(masked_psnr(*pair)[0] + 3.0103, abs=1e-3)


def test_the_edit_region_is_not_seen():
    edited = grey(100)
    edited.paste((255, 0, 0), (0, 0, 32, 64))
    for metric, perfect in ((background_psnr, MAX_PSNR), (masked_psnr, MAX_PSNR), (background_ssim, 1.0)):
        assert metric([edited], [grey(100)], [left_half()], size=None) == [pytest.approx(perfect)]


def test_ssim_is_one_on_identical_pictures_and_falls_with_noise():
    same, other = background_ssim([noise(0)] * 2, [noise(0), noise(1)], [left_half()] * 2)
    assert same == pytest.approx(1)
    assert 0.3 < other < 0.7  # the black half matches, the other half does not


def test_without_background_there_is_nothing_to_measure():
    everything = Image.new("L", (64, 64), 255)
    for metric in (background_psnr, background_ssim, masked_psnr):
        assert math.isnan(metric([grey(1)], [grey(1)], [everything])[0])


def test_sizes_and_lengths_that_do_not_match_are_named():
    with pytest.raises(ValueError, match=r"references\[1\] is 32x32 but images\[1\] is 64x64"):
        background_psnr([grey(0)] * 2, [grey(0), grey(0, 32)], [left_half()] * 2, size=None)
    with pytest.raises(ValueError, match=r"masks\[0\] is 32x32"):
        masked_psnr([grey(0)], [grey(0)], [left_half(32)])
    with pytest.raises(ValueError, match="1 images, 2 references"):
        background_ssim([grey(0)], [grey(0)] * 2, [left_half()])
    assert background_psnr([grey(0)], [grey(0, 32)], [left_half()], size=64) == [MAX_PSNR]


def test_a_transparent_target_is_compared_as_it_is_seen():
    clear = noise(1).convert("RGBA")
    clear.putalpha(0)
    white = Image.new("RGB", clear.size, "white")
    assert masked_psnr([noise(0)], [clear], [left_half()]) == masked_psnr([noise(0)], [white], [left_half()])
