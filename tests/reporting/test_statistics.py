import dataclasses

import numpy as np
import pytest
from PIL import Image
from scipy.stats import bootstrap

from rcgrpo.reporting.curves import plot_curves
from rcgrpo.reporting.files import write_atomically
from rcgrpo.reporting.statistics import (
    PairedDifference,
    compare,
    macro_bootstrap,
    markdown_table,
    pad_table,
    paired_bootstrap,
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


@pytest.mark.parametrize("n", [2, 7, 48, 192])
def test_the_interval_is_scipys(n):
    """The very resamples, so that it could take the place of ours without changing a published number."""
    rng = np.random.default_rng(n)
    before, after = rng.normal(size=n), rng.exponential(size=n)
    mine = paired_bootstrap(before, after, confidence=0.9, num_resamples=2000, seed=5)
    given = {"n_resamples": 2000, "confidence_level": 0.9, "method": "percentile", "rng": np.random.default_rng(5)}
    theirs = bootstrap((after - before,), np.mean, **given).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_bootstrap_is_deterministic_by_seed():
    before, after = [0.0, 1.0, 2.0, 3.0, 5.0], [1.0, 0.0, 4.0, 3.5, 9.0]
    first, again, other = (paired_bootstrap(before, after, num_resamples=99, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_constant_difference_has_an_interval_without_width():
    row = paired_bootstrap([1, 2, 3], [1.5, 2.5, 3.5])
    assert (row.before, row.after, row.difference, row.low, row.high) == (2, 2.5, 0.5, 0.5, 0.5)


@pytest.mark.parametrize(("n", "verdict"), [(5, "too few to tell"), (6, "↑ better")])
def test_a_handful_of_pairs_is_too_few_to_tell_even_if_all_go_one_way(n, verdict):
    before = list(range(n))
    row = paired_bootstrap(before, [value + 1 + 0.1 * value for value in before])
    assert row.low > 0 and row.verdict == verdict and row.significant is (n == 6)


def test_incomplete_pairs_are_left_out():
    row = paired_bootstrap([1, None, 3, float("nan"), 5], [2, 2, None, 4, 8])
    assert (row.n, row.before, row.after, row.difference) == (2, 3, 5, 2)
    with pytest.raises(ValueError, match="ssim: 1 of 2 pairs"):
        paired_bootstrap([1, None], [1, 1], metric="ssim")
    with pytest.raises(ValueError, match="2 values before and 1 after"):
        paired_bootstrap([1, 2], [1])


def test_compare_keeps_order_and_refuses_lone_metrics():
    before, more, less = [1, 2] * 3, [2, 3] * 3, [0, 1] * 3
    rows = compare({"b": before, "a": before}, {"a": less, "b": more}, lower_is_better=["a"])
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


# Macro means


def test_macro_mean_weighs_strata_alike():
    values = [[1.0, 0.0], [1.0, float("nan")], [1.0, 2.0], [4.0, 6.0]]
    first, second = macro_bootstrap(values, ["a", "a", "a", "b"], num_resamples=200)
    assert (first.mean, first.n) == (2.5, 4)
    assert (second.mean, second.n) == (3.5, 3)
    assert first.low <= first.mean <= first.high


def test_interval_of_one_stratum_is_the_paired_one():
    rng = np.random.default_rng(1)
    values = rng.normal(0.2, 1, size=400)
    (row,) = macro_bootstrap(values[:, None], ["all"] * 400)
    half = 1.96 * values.std(ddof=1) / 20
    assert (row.low, row.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08 * half)


def test_interval_over_strata_is_the_normal_one():
    rng = np.random.default_rng(2)
    few, many = rng.normal(0, 2, size=200), rng.normal(1, 1, size=800)
    (row,) = macro_bootstrap(np.concatenate([few, many])[:, None], ["few"] * 200 + ["many"] * 800)
    half = 1.96 * 0.5 * (few.var(ddof=1) / 200 + many.var(ddof=1) / 800) ** 0.5
    centre = (few.mean() + many.mean()) / 2
    assert row.mean == pytest.approx(centre)
    assert (row.low, row.high) == pytest.approx((centre - half, centre + half), abs=0.1 * half)


def test_copies_of_a_cluster_do_not_narrow_its_interval():
    rng = np.random.default_rng(3)
    once = rng.normal(size=(50, 1))
    copies = np.repeat(once, 8, axis=0)
    (alone,) = macro_bootstrap(once, ["a"] * 50)
    (together,) = macro_bootstrap(copies, ["a"] * 400, clusters=[i // 8 for i in range(400)])
    (fooled,) = macro_bootstrap(copies, ["a"] * 400)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert fooled.high - fooled.low < 0.5 * (alone.high - alone.low)


def test_where_there_is_nothing_to_resample():
    one, none = macro_bootstrap([[1.0, None], [3.0, None]], ["a", "a"], clusters=["v", "v"])
    assert (one.mean, one.n) == (2, 2) and np.isnan([one.low, one.high]).all()
    assert none.n == 0 and np.isnan(none.mean)
    with pytest.raises(ValueError, match=r"shape \(2, 1\), 3 strata and 2 clusters"):
        macro_bootstrap([[1.0], [2.0]], ["a"] * 3)


def test_one_letter_columns_still_make_a_markdown_rule():
    assert pad_table([["x", "n"], ["a", "4"]]).splitlines()[1] == "| -- | -: |"
