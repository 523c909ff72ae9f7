import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rcgrpo.cli import diagnose
from rcgrpo.cli.parsing import UsageError
from rcgrpo.data.edits import Edit
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.evaluation import diagnosis
from rcgrpo.evaluation.survey import depth_variance, judge, match_strength, survey
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
from rcgrpo.reporting.statistics import PairedDifference
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


# Matching


@settings(deadline=None, max_examples=30)
@given(st.floats(0.001, 0.99), st.floats(0.5, 3))
def test_match_strength_finds_what_it_is_asked_for(strength, power):
    def measure(value):
        return value**power

    found = match_strength(measure, measure(strength), tolerance=0.02, max_evaluations=40)
    assert found.reached == measure(found.strength)
    assert abs(found.reached - measure(strength)) <= 0.02 * measure(strength)


def test_match_strength_says_when_even_full_noise_falls_short_and_never_overspends():
    calls = []

    def measure(strength):
        calls.append(strength)
        return strength**2

    assert match_strength(measure, 1.5) == (1.0, 1.0, 1)
    calls.clear()
    found = match_strength(measure, 1e-7, tolerance=0, max_evaluations=5)
    assert found.evaluations == len(calls) == 5
    assert abs(found.strength - 1e-7**0.5) == min(abs(strength - 1e-7**0.5) for strength in calls)


def test_match_strength_follows_the_power_law_from_what_is_known():
    calls = []

    def measure(strength):
        calls.append(strength)
        return 0.02 * strength**1.5

    known = {0.5: measure(0.5)}
    calls.clear()
    found = match_strength(measure, measure(0.4), known=known)
    assert found.evaluations == len(calls) - 1 <= 2 and found.strength == pytest.approx(0.4, rel=0.02)
    calls.clear()
    assert match_strength(measure, known[0.5] * 1.01, known=known) == (0.5, known[0.5], 0) and not calls
    # what is known falls short of the target, and so does full strength
    assert match_strength(measure, 0.03, known=known)[:2] == (1.0, 0.02)


# Groups


def picture(seed, size=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def edit_of(row):
    mask = torch.zeros(32, 32)
    mask[4 : 14 + row, 8:18] = 1
    return Edit(row, f"test row {row}", picture(row), "make it red", mask, {"edited_image": picture(row + 50)})


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


def test_hidden_states_vary_where_the_noise_does(editor):
    model = editor.pipeline.transformer
    (group,) = make_groups(editor, model, [edit_of(0)], 3, Exploration(0.9), ("key",))
    found = depth_variance(editor, model, group, 0)
    assert found.inside.shape == found.outside.shape == (5,)  # the embedder, two double and two single blocks
    assert float(found.outside[0]) == pytest.approx(0, abs=1e-10) and (found.inside > 0).all()
    assert (found.outside[1:] > 0).all(), "attention carries the difference outside"
    assert not model.x_embedder._forward_hooks
    embedded = model.x_embedder(group.trajectory[0])
    expected = embedded.var(0).mean(-1)[group.region == 1].mean() / embedded.square().mean()
    torch.testing.assert_close(found.inside[0], expected.detach())
    (same,) = make_groups(editor, model, [edit_of(0)], 3, Exploration(0.0), ("key",))
    torch.testing.assert_close(depth_variance(editor, model, same, 1).inside, torch.zeros(5), rtol=0, atol=1e-9)


def test_survey_measures_every_edit_and_explorations_share_their_draws(editor):
    def half(images, **columns):
        return [float(np.asarray(image).mean()) for image in images]

    judges = dict(zip(("reward", "edit", "keep", "held_out"), [resolve_rewards(half)[0]] * 3, strict=False))
    judges["held_out"] = resolve_rewards(target_closeness)[0]
    edits, model = [edit_of(0), edit_of(1), edit_of(2)], editor.pipeline.transformer
    found = survey(
        editor, model, edits, 3, Exploration(0.9), ("key",), judges, depth_step=1, num_maps=1, edits_at_once=2
    )
    assert [finding.edit.row for finding in found] == [0, 1, 2]
    assert [finding.attention_map is None for finding in found] == [False, True, True]
    for finding in found:
        (group,) = make_groups(editor, model, [finding.edit], 3, Exploration(0.9), ("key",))
        scores = judge(group, judges)
        torch.testing.assert_close(finding.scores["reward"], scores["reward"], rtol=0, atol=0.2)
        assert finding.numbers["reward_var"] == pytest.approx(variance(finding.scores["reward"]))
        assert finding.numbers["edit_spearman"] == pytest.approx(1, abs=1e-5)
        assert finding.numbers["held_out"] == pytest.approx(float(scores["held_out"].mean()), abs=1e-3)
        assert 0 < finding.numbers["attention_mass"] < 1
        assert finding.steps.inside.shape == finding.sigmas.shape == (4,)
        assert float(finding.steps.outside[0]) == 0 < float(finding.steps.outside[-1])
        assert finding.depth.inside.shape == (5,)
    wide = survey(editor, model, edits[:1], 3, Exploration(0.9, kind="global"), ("key",), {})
    torch.testing.assert_close(wide[0].steps.inside[0], found[0].steps.inside[0])
    assert "reward" not in wide[0].numbers and wide[0].depth is None


# The command


def difference(metric, before, after, clear=True):
    change = after - before
    low, high = (change - 1e-9, change + 1e-9) if clear else (-1.0, 1.0)
    return PairedDifference(metric, before, after, change, low, high, 9)


def test_alarms_go_off_for_clear_changes_only():
    hacked = [difference("reward", 0.5, 0.6), difference("held-out reward", 0.5, 0.45)]
    assert "is being hacked" in diagnosis.alarms(hacked)[0]
    assert not diagnosis.alarms([hacked[0], difference("held-out reward", 0.5, 0.45, clear=False)])
    assert not diagnosis.alarms([hacked[0], difference("held-out reward", 0.5, 0.498)]), "less than 1 % is no matter"
    assert "falls by 10.0%" in diagnosis.alarms([hacked[0], difference("held-out reward", -0.5, -0.55)])[0]
    assert not diagnosis.alarms([difference("reward", 0.6, 0.5), hacked[1]])
    (grid,) = diagnosis.alarms([difference("edge density", 0.1, 0.13)])
    assert "+30%" in grid and "grids" in grid
    (blur,) = diagnosis.alarms([difference("edge density", 0.1, 0.08)])
    assert "blur" in blur
    assert not diagnosis.alarms([difference("edge density", 0.1, 0.105)])
    assert "alike" in diagnosis.alarms([difference("diversity inside", 0.1, 0.05)])[0]


def test_more_variance_of_the_edit_reward_is_better_and_of_the_whole_reward_neither():
    def findings(variance):
        numbers = {"reward_var": variance, "edit_reward_var": variance, "keep_reward_var": variance}
        return [SimpleNamespace(numbers=numbers)] * 6

    rows = diagnosis.paired(findings(2.0), findings(1.0), ("reward_var", "edit_reward_var", "keep_reward_var"))
    lines = diagnosis.difference_table(rows).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["↓", "↓ worse", "↓ better"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_generations", "1"], "--num_generations: got 1"),
        (["--edit_strength", "1.5"], "--edit_strength: got 1.5"),
        (["--num_generations", "3", "--antithetic"], "even number"),
        (["--solver", "foo"], "--solver: got 'foo', expected one of euler, heun, dpmpp_2m, unipc"),
        (["--resolution", "0"], "--resolution: got 0, expected 16 to 8192 pixels"),
        (
            ["--output", "taken/out"],
            "--output_dir: got 'taken/out', expected a folder that can be written to .*Not a dir",
        ),
        (["--dataset", "some/where"], "--reward: got none"),
        (["--num_edit", "3"], "nearest known one is --num_edits"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(UsageError, match=message):
        diagnose.run(flags)


def test_the_model_is_opened_as_other_commands_do(monkeypatch, tmp_path):
    opened = []

    def stop(model):
        opened.append(model)
        raise UsageError("far enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rcgrpo.cli.opening.open_pipeline", stop)  # with its dtype and device
    Path("some/model").mkdir(parents=True)
    Path("some/model/model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    with pytest.raises(UsageError, match="far enough"):
        diagnose.run(["--model", "some/model", "--num_samples", "2"])
    assert opened == ["some/model"]


def test_diagnosis_is_written_whole(editor, tmp_path):
    def half(images, **columns):
        return [float(np.asarray(image).mean()) for image in images]

    judges = dict.fromkeys(("reward", "edit", "keep", "held_out"), resolve_rewards(half)[0])
    edits = [edit_of(0), edit_of(1)]
    settings = asdict(diagnose.DiagnoseArguments(num_generations=3))

    def found(kind, **options):
        explored = Exploration(0.9, kind=kind)
        return survey(editor, editor.pipeline.transformer, edits, 3, explored, ("key",), judges, **options)

    arms = {
        diagnosis.REGION: found("region", depth_step=1, num_maps=2),
        diagnosis.GLOBAL: found("global", depth_step=1),
        diagnosis.MATCHED: found("global", depth_step=1),
        diagnosis.BASE: found("region"),
    }
    match = match_strength(lambda strength: strength, 0.5)
    text = diagnosis.write_diagnosis(tmp_path, settings, arms, match, 0.5)
    assert (tmp_path / "diagnostics.md").read_text() == text and "No alarm." in text
    content = json.loads((tmp_path / "diagnostics.json").read_text())
    assert content["match"]["strength"] == pytest.approx(0.5, rel=0.02) and content["match"]["within_tolerance"]
    region = content["arms"]["region"]
    assert region["by_step"]["outside"][0] == 0 and len(region["by_block"]["inside"]) == 5
    mean = np.mean([f.numbers["leakage"] for f in arms["region"]])
    assert region["numbers"]["leakage"]["mean"] == pytest.approx(mean)
    split = region["reward_variance"]
    assert split["edit"] + split["keep"] + split["rest"] == pytest.approx(split["total"])
    for name in ("leakage", "reward_variance", "attention"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 100
    assert not list(tmp_path.glob(".*"))


def test_split_by_region_keeps_leading_dimensions():
    values = torch.arange(12.0).view(2, 2, 3)
    found = split_by_region(values, torch.tensor([0.0, 1.0, 1.0]))
    assert found.inside.tolist() == [[1.5, 4.5], [7.5, 10.5]] and found.outside.tolist() == [[0, 3], [6, 9]]
