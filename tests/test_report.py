import dataclasses

import numpy as np
import pytest
from PIL import Image

from rcgrpo.report import (
    PairedDifference,
    compare,
    contact_sheet,
    heatmap,
    markdown_table,
    outline,
    paired_bootstrap,
    plot_curves,
    write_atomically,
)

# Statistics


def test_interval_of_a_large_sample_is_the_normal_one():
    rng = np.random.default_rng(0)
    before = rng.normal(size=2000)
    change = rng.normal(0.3, 1.5, size=2000)
    row = paired_bootstrap(list(before), list(before + change), num_resamples=4000)
    half = 1.96 * change.std(ddof=1) / 2000**0.5
    assert row.difference == pytest.approx(change.mean())
    assert (row.low, row.high) == pytest.approx((change.mean() - half, change.mean() + half), abs=0.05 * half)
    assert row.significant
    assert row.n == 2000


def test_bootstrap_is_deterministic_by_seed():
    before, after = [0.0, 1.0, 2.0, 3.0, 5.0], [1.0, 0.0, 4.0, 3.5, 9.0]
    first, again, other = (paired_bootstrap(before, after, num_resamples=99, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_constant_difference_has_an_interval_without_width():
    row = paired_bootstrap([1, 2, 3], [1.5, 2.5, 3.5])
    assert (row.before, row.after, row.difference, row.low, row.high) == (2, 2.5, 0.5, 0.5, 0.5)


def test_incomplete_pairs_are_left_out():
    row = paired_bootstrap([1, None, 3, float("nan"), 5], [2, 2, None, 4, 8])
    assert (row.n, row.before, row.after, row.difference) == (2, 3, 5, 2)
    with pytest.raises(ValueError, match="ssim: 1 of 2 pairs"):
        paired_bootstrap([1, None], [1, 1], metric="ssim")
    with pytest.raises(ValueError, match="2 values before and 1 after"):
        paired_bootstrap([1, 2], [1])


def test_compare_keeps_order_and_refuses_lone_metrics():
    rows = compare({"b": [1, 2], "a": [1, 2]}, {"a": [0, 1], "b": [2, 3]}, lower_is_better=["a"])
    assert [(row.metric, row.verdict) for row in rows] == [("b", "↑ better"), ("a", "↓ better")]
    with pytest.raises(ValueError, match=r"\['b'\]"):
        compare({"a": [1, 2]}, {"a": [1, 2], "b": [1, 2]})


# Tables


def test_markdown_table():
    rows = [
        PairedDifference("background_psnr", 25.613, 25.98, 0.367, 0.1, 0.634, 200),
        PairedDifference("lpips", 0.05, 0.06, 0.01, 0.001, 0.019, 9, higher_is_better=False),
        PairedDifference("clip", 0.5, 0.4999, -0.0001, -0.2, 0.2, 12),
    ]
    assert markdown_table(rows).splitlines() == [
        "| metric          |   n | before | after | difference |    95 % interval | verdict           |",
        "| --------------- | --: | -----: | ----: | ---------: | ---------------: | ----------------- |",
        "| background_psnr | 200 |  25.61 | 25.98 |      +0.37 |   [+0.10, +0.63] | ↑ better          |",
        "| lpips           |   9 |  0.050 | 0.060 |     +0.010 | [+0.001, +0.019] | ↑ worse           |",
        "| clip            |  12 |  0.500 | 0.500 |     +0.000 | [-0.200, +0.200] | ≈ no clear change |",
    ]


def test_a_narrow_interval_gets_the_digits_it_needs():
    row = PairedDifference("ssim", 0.9, 0.90042, 0.00042, 0.00012, 0.00072, 50)
    assert "[+0.0001, +0.0007]" in markdown_table([row])
    assert "99 % interval" in markdown_table([dataclasses.replace(row, confidence=0.99)])


# Pictures

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


# Curves and files


def test_plot_curves_writes_a_picture_and_leaves_out_empty_panels(tmp_path):
    rows = [{"step": step, "reward": step / 30, "rewards/clip/mean": 0.5, "reward_std": None} for step in range(1, 31)]
    rows += [{"step": 30, "eval_reward": 0.9}, {"train_runtime": 3.0}]
    plot_curves(rows, tmp_path / "two.png")
    plot_curves([*rows, {"step": 30, "background/psnr": 25.0, "attention/density": 0.1}], tmp_path / "four.png")
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "four.png") as four:
        two.load(), four.load()
        assert two.format == "PNG"
        assert four.width > two.width
        assert four.height > two.height
    assert sorted(file.name for file in tmp_path.iterdir()) == ["four.png", "two.png"]


@pytest.mark.parametrize("rows", [[], [{"train_runtime": 1.0}], [{"step": 1, "reward": float("nan")}], [{"reward": 1}]])
def test_plot_curves_needs_something_to_draw(rows, tmp_path):
    with pytest.raises(ValueError, match=f"none of {len(rows)} rows"):
        plot_curves(rows, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_write_atomically(tmp_path):
    path = tmp_path / "new" / "table.md"
    with write_atomically(path) as part:
        assert (part.parent, part.suffix) == (path.parent, ".md")
        part.write_text("old")
    with pytest.raises(RuntimeError), write_atomically(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
