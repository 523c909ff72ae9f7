"""`comparing.py`: the same noise for all, and numbers that are those of the pictures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from app_edits import SAMPLING, make_edit, make_lora, make_pipeline
from rcgrpo.app import LoraSlot, changes_outside, compare
from rcgrpo.evaluation.benchmark import Sampling, contenders


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


def test_base_and_lora_start_from_the_same_noise(pipeline, tmp_path):
    source, mask = make_edit()
    slot = LoraSlot(pipeline)
    entrants = slot.entrants(make_lora(tmp_path / "nothing", scale=0.0))
    base, lora = compare(pipeline, entrants, source, mask, "make it red", SAMPLING, 2).outcomes
    assert lora.name == "nothing" and all(a == b for a, b in zip(base.images, lora.images, strict=True))

    entrants = slot.entrants(make_lora(tmp_path / "something"))
    again, lora = compare(pipeline, entrants, source, mask, "make it red", SAMPLING, 2).outcomes
    assert all(a == b for a, b in zip(base.images, again.images, strict=True))
    assert all(a != b for a, b in zip(base.images, lora.images, strict=True))
    assert not torch.equal(base.attention, lora.attention)


def test_a_seed_is_one_noise_and_strength_zero_one_picture(pipeline):
    source, mask = make_edit()

    def images(seed=3, **options):
        sampling = Sampling(32, 2, max_sequence_length=48, seed=seed)
        return compare(pipeline, contenders([]), source, mask, "go", sampling, **options)

    assert images().outcomes[0].images[0] == images().outcomes[0].images[0]
    assert images().outcomes[0].images[0] != images(seed=4).outcomes[0].images[0]
    first, second = images(num_candidates=2).outcomes[0].images
    assert first != second
    first, second = images(num_candidates=2, edit_strength=0.0).outcomes[0].images
    assert first == second


def test_the_numbers_are_those_of_the_pictures(pipeline):
    source, mask = make_edit((64, 48))
    comparison = compare(pipeline, contenders([]), source, mask, "go", SAMPLING, 2)
    (outcome,) = comparison.outcomes
    assert comparison.source.size == comparison.mask.size == outcome.images[0].size
    assert comparison.source.width > comparison.source.height  # the aspect ratio is kept
    before, outside = np.asarray(comparison.source, dtype=float) / 255, np.asarray(comparison.mask) == 0
    for image, psnr, change in zip(outcome.images, outcome.background_psnr, outcome.changes, strict=True):
        error = np.asarray(image, dtype=float) / 255 - before
        assert psnr == pytest.approx(-10 * math.log10(np.mean(error[outside] ** 2)), abs=1e-3)
        np.testing.assert_allclose(change[outside], np.abs(error).max(-1)[outside], atol=1e-6)
        assert not change[~outside].any()
    assert outcome.attention.sum((1, 2)).tolist() == pytest.approx([1, 1], abs=1e-4)
    region = torch.from_numpy(1.0 - outside)[None, None]
    covered = torch.nn.functional.adaptive_avg_pool2d(region, outcome.attention.shape[1:])[0, 0]
    expected = (outcome.attention * covered).sum((1, 2)) / covered.mean()
    assert outcome.density == pytest.approx(expected.tolist(), rel=1e-3)


def test_changes_are_the_largest_channel_outside_the_mask():
    source, image = Image.new("RGB", (2, 1), (10, 20, 30)), Image.new("RGB", (2, 1), (15, 20, 81))
    mask = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    np.testing.assert_allclose(changes_outside(image, source, mask), [[51 / 255, 0]], atol=1e-6)


def test_a_thin_line_survives_being_reduced(pipeline):
    source, mask = Image.new("RGB", (320, 320), "grey"), Image.new("L", (320, 320))
    mask.paste(255, (101, 0, 102, 320))
    comparison = compare(pipeline, contenders([]), source, mask, "go", SAMPLING)
    assert comparison.mask.getextrema() == (0, 255) and comparison.mask.getbbox() == (10, 0, 11, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": " "}, "instruction: got nothing"),
        ({"num_candidates": 0}, "num_candidates: got 0"),
        ({"mask": Image.new("L", (32, 32))}, "mask: got an empty mask"),
        ({"mask": Image.new("L", (16, 32), 255)}, r"mask: got \(16, 32\), expected the source's size \(32, 32\)"),
        ({"edit_strength": 1.5}, "strength"),
    ],
)
def test_what_cannot_be_compared_is_said(pipeline, change, message):
    source, mask = make_edit()
    given = {"source": source, "mask": mask, "instruction": "go", "sampling": SAMPLING, **change}
    with pytest.raises(ValueError, match=message):
        compare(pipeline, contenders([]), **given)


def test_a_mask_of_0_and_1_is_compared_as_one_of_0_and_255(pipeline):
    source, mask = make_edit((48, 24))
    ones = Image.fromarray((np.asarray(mask) > 0).astype(np.uint8))
    clear = source.convert("RGBA")
    clear.putalpha(mask)
    first, second = (compare(pipeline, contenders([]), source, m, "x", SAMPLING) for m in (mask, ones))
    assert first.mask.tobytes() == second.mask.tobytes() and np.asarray(first.mask).any()
    assert first.outcomes[0].images[0].tobytes() == second.outcomes[0].images[0].tobytes()
    shown = np.asarray(compare(pipeline, contenders([]), clear, mask, "x", SAMPLING).source)
    assert (shown[-1, -1] == 255).all()
