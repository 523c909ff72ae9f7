"""`diagnostics.py`: formulas by hand, and what they say of a group of a random editor."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from random_edits import edit_of
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.groups.diagnostics import (
    InsideOutside,
    colour_entropy,
    diversity,
    edge_density,
    effective_group_size,
    gradient_snr,
    group_diagnostics,
    latent_variance,
    mean_curve,
    reward_parts,
    spearman,
    split_by_region,
    target_closeness,
    variance,
    variance_by_step,
    variance_split,
)
from rcgrpo.groups.rollout import Exploration, make_groups
from rcgrpo.rewards import background_keep, resolve_rewards
from tiny_kontext import build_tiny_kontext

NAN = float("nan")
numbers = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Rewards and advantages


def test_variance_leaves_out_what_has_no_score():
    assert variance(torch.tensor([1.0, NAN, 2.0, 4.0])) == pytest.approx(7 / 3)
    assert math.isnan(variance(torch.tensor([1.0, NAN])))


def test_spearman_by_hand():
    assert spearman(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([10.0, 30.0, 20.0])) == pytest.approx(1, abs=1e-5)
    # ranks 1 2 3 4 and 2 1 4 3: 1 - 6 · 4 / (4 · 15)
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 1.0, 9.0, 3.0])
    assert spearman(first, second) == pytest.approx(0.6, abs=1e-5)
    # a tie shares rank 1.5: ranks 1.5 1.5 3 and 1 2 3, so cov 1.5 / √(1.5 · 2)
    assert spearman(torch.tensor([0.0, 0.0, 7.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(
        1.5 / 3**0.5, abs=1e-5
    )


@pytest.mark.parametrize("first", [[1.0, 1.0, 1.0], [NAN, NAN, 1.0], []])
def test_spearman_without_a_ranking_is_not_a_number(first):
    assert math.isnan(spearman(torch.tensor(first), torch.arange(len(first)).float()))


@settings(deadline=None, max_examples=30)
@given(numbers, st.randoms())
def test_spearman_reads_ranks_alone_and_ignores_the_order_of_candidates(values, random):
    first = torch.tensor(values)
    second = torch.tensor(random.sample(values, len(values)))
    expected = spearman(first, second)
    order = torch.tensor(random.sample(range(len(values)), len(values)))
    for other in (spearman(first.double() ** 3, second), spearman(first[order], second[order])):
        assert other == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert spearman(second, first) == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert spearman(-first, second) == pytest.approx(-expected, abs=1e-5, nan_ok=True)


def test_effective_group_size_by_hand():
    assert effective_group_size(torch.tensor([1.0, -1.0, 1.0, -1.0])) == 4
    assert effective_group_size(torch.tensor([3.0, -1.0])) == pytest.approx(16 / 10)
    assert effective_group_size(torch.tensor([0.0, 5.0, 0.0])) == 1
    assert effective_group_size(torch.zeros(4)) == 0


@settings(deadline=None, max_examples=30)
@given(numbers, st.floats(0.01, 100))
def test_effective_group_size_lies_between_one_and_all_and_forgets_scale(values, scale):
    advantages = torch.tensor(values, dtype=torch.float64).round(decimals=3)
    size = effective_group_size(advantages)
    assert size == 0 if not advantages.any() else 1 - 1e-9 <= size <= int((advantages != 0).sum()) + 1e-9
    assert effective_group_size(scale * advantages) == pytest.approx(size)


def test_variance_of_a_sum_of_uncorrelated_parts_splits_into_theirs():
    edit = torch.tensor([[1.0, 1.0, -1.0, -1.0]]) + 5
    keep = torch.tensor([[1.0, -1.0, 1.0, -1.0]]) * 0.5
    split = variance_split(edit + keep, edit, keep)
    assert split == pytest.approx((5 / 3, 4 / 3, 1 / 3, 0), abs=1e-9)
    # what neither explains is the rest: the product of both is uncorrelated with each
    split = variance_split(edit + (edit - 5) * keep, edit, keep)
    assert split == pytest.approx((5 / 3, 4 / 3, 0, 1 / 3), abs=1e-9)


def test_equal_parts_share_the_variance_and_groups_of_different_level_add_none():
    edit = torch.tensor([[1.0, 3.0], [101.0, 103.0]])
    assert variance_split(edit, edit, edit) == pytest.approx((2, 1, 1, 0), abs=1e-9)
    assert variance_split(edit, edit, torch.zeros(2, 2)) == pytest.approx((2, 2, 0, 0), abs=1e-9)


def test_a_candidate_without_a_score_leaves_the_split():
    edit = torch.tensor([[1.0, 3.0, 7.0], [0.0, NAN, NAN]])
    rewards = torch.tensor([[1.0, 3.0, NAN], [9.0, 9.0, 9.0]])
    assert variance_split(rewards, edit, torch.zeros(2, 3)) == pytest.approx((2, 2, 0, 0), abs=1e-9)
    assert all(map(math.isnan, variance_split(rewards[1:], edit[1:], edit[1:])))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.1, 5))
def test_the_split_adds_up_and_scales_with_the_square(seed, a, b, scale):
    edit, keep, noise = torch.randn(3, 4, 5, generator=generator(seed), dtype=torch.float64)
    rewards = a * edit + b * keep + noise
    split = variance_split(rewards, edit, keep)
    assert split.edit + split.keep + split.rest == pytest.approx(split.total)
    expected = float((rewards - rewards.mean(1, keepdim=True)).square().sum() / 16)
    assert split.total == pytest.approx(expected)
    scaled = variance_split(scale * rewards + 3, edit - 7, 2 * keep)
    assert scaled == pytest.approx([scale**2 * value for value in split], rel=1e-6, abs=1e-9)
    swapped = variance_split(rewards, keep, edit)
    assert (swapped.edit, swapped.keep) == pytest.approx((split.keep, split.edit), abs=1e-9)


def test_gradient_snr_by_hand():
    # mean (2, 0), deviations (0, ±1): variance (1 + 1) / 1 = 2
    snr, unbiased = gradient_snr(torch.tensor([[2.0, 1.0], [2.0, -1.0]]))
    assert snr == pytest.approx(2 / 2**0.5)
    assert unbiased == pytest.approx((4 - 2 / 2) / 2)
    with pytest.raises(ValueError, match="gradients: got 1 groups"):
        gradient_snr(torch.ones(1, 3))


def test_gradient_snr_of_noise_is_what_chance_gives():
    noise = torch.randn(50, 2000, generator=generator())
    snr, unbiased = gradient_snr(noise)
    assert snr == pytest.approx(50**-0.5, rel=0.1)
    assert abs(unbiased) < 0.1 / 50


# Latents


def test_latent_variance_inside_and_outside_by_hand():
    latents = torch.zeros(2, 3, 4)  # group, tokens, channels
    latents[1, 0] = 2.0  # variance 2 in the first token, ½ in the second, 0 in the third
    latents[1, 1] = 1.0
    found = latent_variance(latents, torch.tensor([1.0, 0.0, 0.0]))
    assert (float(found.inside), float(found.outside), float(found.leakage)) == (2, 0.25, 0.125)
    soft = latent_variance(latents, torch.tensor([1.0, 0.5, 0.0]))
    assert (float(soft.inside), float(soft.outside)) == (1.5, pytest.approx(0.25 / 1.5))
    steps = latent_variance(latents.expand(5, -1, -1, -1), torch.tensor([1.0, 0.0, 0.0]))
    assert steps.inside.tolist() == [2.0] * 5
    assert latent_variance(latents, torch.ones(3)).outside.isnan()


def test_region_noise_starts_with_no_variance_outside_and_its_strength_squared_inside():
    region = (torch.arange(2000) < 1000).float()
    noise = Exploration(edit_strength=0.6).noise(region, 8, 12, ("seed",))
    found = latent_variance(noise, region)
    assert float(found.outside) == 0
    assert float(found.inside) == pytest.approx(0.36, rel=0.05)


def test_mean_curve_leaves_out_what_has_no_outside():
    one = InsideOutside(torch.tensor([1.0, 2.0]), torch.tensor([NAN, NAN]))
    two = InsideOutside(torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0]))
    mean = mean_curve([one, two])
    assert mean.inside.tolist() == [2, 3] and mean.outside.tolist() == [5, 6]


# Pictures


def test_diversity_by_hand():
    region = torch.zeros(2, 2)
    region[0, 0] = region[0, 1] = 1
    pictures = torch.zeros(3, 3, 2, 2)
    pictures[1, :, 0, 0] = 1.0  # half of the region's elements differ by 1
    pictures[:, :, 1] = torch.rand(3, 3, 2)  # outside, so it does not count
    assert diversity(pictures, region) == pytest.approx((2 * 0.5**0.5 + 0) / 3)
    assert diversity(pictures[:1].expand(4, -1, -1, -1), region) == 0
    assert math.isnan(diversity(pictures[:1], region)) and math.isnan(diversity(pictures, torch.zeros(2, 2)))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.floats(0.01, 10))
def test_diversity_is_in_the_pictures_units_whatever_their_order(seed, scale):
    pictures, region = (
        torch.rand(5, 3, 4, 4, generator=generator(seed)),
        torch.rand(4, 4, generator=generator(seed + 1)),
    )
    expected = diversity(pictures, region)
    assert diversity(scale * pictures.flip(0), region) == pytest.approx(scale * expected, rel=1e-4)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    squares = [((pictures[i] - pictures[j]).square().mean(0) * region).sum() / region.sum() for i, j in pairs]
    assert expected == pytest.approx(float(torch.stack(squares).sqrt().mean()), rel=1e-4)


def test_edge_density_of_ramps_steps_and_the_finest_grid():
    whole = torch.ones(8, 8)
    grid = (torch.arange(8) % 2).float().expand(8, 8)
    flat = torch.full((8, 8), 0.3)
    ramp = torch.arange(8).float().expand(8, 8) / 70
    pictures = torch.stack([flat, ramp, grid]).unsqueeze(1).expand(-1, 3, -1, -1)
    # the last column has no neighbour
    assert edge_density(pictures, whole).tolist() == pytest.approx([0, 7 / 8 / 70, 7 / 8], abs=1e-5)
    left = whole * (torch.arange(8) < 4)
    assert float(edge_density(pictures, left)[2]) == pytest.approx(1)


def test_colour_entropy_by_hand():
    region = torch.ones(4, 4)
    flat = torch.full((3, 4, 4), 0.5)
    halves = flat.clone()
    halves[0, :2] = 1.0
    quarters = halves.clone()
    quarters[2, :, :2] = 0.0
    found = colour_entropy(torch.stack([flat, halves, quarters]), region)
    assert found.tolist() == pytest.approx([0, 1, 2])
    assert colour_entropy(torch.stack([halves]), region * (torch.arange(4) < 1)[:, None]).tolist() == [0]
    assert colour_entropy(torch.stack([halves]), 0 * region).isnan().all()


def test_target_closeness_reads_the_region_alone():
    mask = Image.new("L", (4, 4))
    mask.paste(255, (0, 0, 4, 2))
    target, image = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    image.paste((51, 0, 0), (0, 0, 4, 2))
    assert target_closeness([image], [mask], [target]) == [pytest.approx(1 - 0.2 / 3)]
    assert target_closeness([image] * 2, [mask, Image.new("L", (4, 4))], [None, target]) == [None, None]
    assert target_closeness([image], [mask]) == [None]
    assert resolve_rewards("rcgrpo.groups.diagnostics.target_closeness")[0].name == "target_closeness"


# Groups


@pytest.fixture(scope="module")
def editor():
    return FluxKontextEditor(build_tiny_kontext(), 32, 3, max_sequence_length=48)


def test_group_diagnostics_of_a_group(editor):
    (group,) = make_groups(editor, editor.pipeline.transformer, [edit_of(0)], 4, Exploration(0.9), ("key",))
    advantages, scores = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([4.0, 1.0, 2.0, 2.0])
    found = group_diagnostics(group, advantages, {"edit": scores, "keep": -scores})
    assert all(name.startswith("diagnostics/") and math.isfinite(value) for name, value in found.items())
    assert found["diagnostics/effective_group_size"] == 2
    assert found["diagnostics/edit_spearman"] == pytest.approx(1, abs=1e-5)
    assert found["diagnostics/keep_spearman"] == pytest.approx(-1, abs=1e-5)
    assert found["diagnostics/edit_reward_var"] == found["diagnostics/keep_reward_var"] == pytest.approx(1.583333)
    expected = group.trajectory[-1].var(0).mean(-1)
    assert found["diagnostics/latent_var_inside"] == pytest.approx(float(expected[group.region == 1].mean()))
    assert found["diagnostics/leakage"] == pytest.approx(
        float(expected[group.region == 0].mean() / expected[group.region == 1].mean())
    )
    # region advantages: each part meets the row of its name, and a dropped row is no ranking
    rows = torch.stack([advantages, torch.zeros(4)])
    found = group_diagnostics(group, rows, {"edit": -scores, "keep": scores}, ["edit", "keep"])
    assert found["diagnostics/edit_spearman"] == pytest.approx(-1, abs=1e-5)
    assert math.isnan(found["diagnostics/keep_spearman"])
    assert found["diagnostics/effective_group_size"] == 1
    assert "diagnostics/edit_spearman" not in group_diagnostics(group, advantages)
    # regions by number are parts of the edit, and the background's row is none of theirs
    rows = torch.stack([advantages, -3 * advantages, torch.zeros(4)])
    found = group_diagnostics(group, rows, {"edit": scores, "keep": scores}, ["region_1", "keep", "region_2"])
    assert found["diagnostics/edit_spearman"] == pytest.approx(1, abs=1e-5)
    assert found["diagnostics/keep_spearman"] == pytest.approx(-1, abs=1e-5)
    # without a row of its own a part meets what all rows add up to
    found = group_diagnostics(group, advantages.unsqueeze(0), {"keep": scores}, ["edit"])
    assert found["diagnostics/keep_spearman"] == pytest.approx(1, abs=1e-5)


def test_latent_variance_after_each_step_by_hand():
    """Two candidates, three tokens of one channel, two steps; a pair's unbiased variance is (a - b)² / 2."""
    pairs = torch.tensor([[[9.0, 9, 9], [0, 0, 0]], [[2, 0, 0], [0, 0, 0]], [[4, 2, 0], [0, 0, 2]]])
    group = SimpleNamespace(trajectory=pairs.unsqueeze(-1), region=torch.tensor([1.0, 0, 0]))
    assert variance_by_step(group) == {
        "diagnostics/latent_var_inside/step_1": 2.0,
        "diagnostics/latent_var_outside/step_1": 0.0,
        "diagnostics/latent_var_inside/step_2": 8.0,
        "diagnostics/latent_var_outside/step_2": 2.0,
    }


def test_parts_of_a_reward_without_another_call(editor):
    (group,) = make_groups(editor, editor.pipeline.transformer, [edit_of(0)], 2, Exploration(0.9), ("key",))
    group.rewards = torch.tensor([[1.0, 10.0], [2.0, NAN]])
    weights = torch.tensor([0.5, 2.0])
    parts = reward_parts(group, ["region_edit", "other"], weights)
    assert parts["edit"].tolist() == [0.5, 1.0]
    expected = background_keep(group.images, [group.source] * 2, [group.mask] * 2)
    assert parts["keep"].tolist() == pytest.approx(expected) and 0 < parts["keep"].min() < 1
    torch.testing.assert_close(
        reward_parts(group, ["one", "two"], weights, ["edit", "edit"])["edit"],
        torch.tensor([20.5, NAN]),
        equal_nan=True,
    )
    assert reward_parts(group, ["one", "two"], weights, ["keep", "edit"])["edit"][0] == 20
    assert "edit" not in reward_parts(group, ["one", "two"], weights)
    # one that is only logged, or that does not apply to this edit, takes no part
    for group.rewards in (torch.tensor([[1.0, 10.0], [2.0, NAN]]), torch.tensor([[1.0, NAN], [2.0, NAN]])):
        parts = reward_parts(group, ["one", "two"], torch.tensor([0.5, 0.0]), ["edit", "edit"])
        assert parts["edit"].tolist() == [0.5, 1.0]
        found = group_diagnostics(group, torch.tensor([-1.0, 1.0]), parts)
        assert found["diagnostics/edit_reward_var"] == 0.125
        assert found["diagnostics/edit_spearman"] == pytest.approx(1, abs=1e-5)
    assert reward_parts(group, ["one", "two"], weights, ["edit", "edit"])["edit"].tolist() == [0.5, 1.0]


def test_split_by_region_keeps_leading_dimensions():
    values = torch.arange(12.0).view(2, 2, 3)
    found = split_by_region(values, torch.tensor([0.0, 1.0, 1.0]))
    assert found.inside.tolist() == [[1.5, 4.5], [7.5, 10.5]] and found.outside.tolist() == [[0, 3], [6, 9]]
