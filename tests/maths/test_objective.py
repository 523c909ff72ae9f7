import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcgrpo.maths.objective import (
    advantage_size,
    batch_advantages,
    comparable,
    euler_step,
    gaussian_log_prob,
    group_advantages,
    keep_hinge,
    nft_loss,
    policy_loss,
    predict_clean,
    quasi_norm,
    sde_std,
    sde_step,
    spread,
    surrogate_log_probs,
    total_advantages,
    total_scores,
    velocity_kl,
    weighted_mean,
)
from rcgrpo.maths.regions import region_weights

NAN = math.nan
WAYS = ["sum_then_normalize", "normalize_then_sum"]
REWARDS = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=2, max_size=8)


def randn(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


# ------------------------------------------------------------------------------------ advantages


def test_advantages_by_hand():
    # mean 3, deviations -2 -1 0 3, biased variance 14 / 4
    advantages = group_advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert advantages.tolist() == pytest.approx([n / 3.5**0.5 for n in (-2, -1, 0, 3)])


@pytest.mark.parametrize(("clip", "worst"), [(math.inf, -2), (1.0, -(3.5**0.5)), (0.1, None), (0.0, None)])
def test_negative_advantages_are_bounded(clip, worst):
    """mean 3, deviations -2 -1 0 3, biased variance 14 / 4; a candidate without a score stays out."""
    rewards = torch.tensor([[1.0], [2.0], [3.0], [6.0], [NAN]])
    (found,) = batch_advantages([rewards], torch.ones(1), power=2.0, negative_clip=clip)
    expected = [max(n / 3.5**0.5, -clip) for n in (-2, -1, 0, 3)]
    assert found.tolist() == pytest.approx([*expected, 0]) and (
        worst is None or found[0] == pytest.approx(worst / 3.5**0.5)
    )
    (double,) = batch_advantages([rewards], torch.tensor([2.0]), "normalize_then_sum", power=2.0, negative_clip=clip)
    assert double.tolist() == pytest.approx(found.tolist())


@pytest.mark.parametrize(("worse", "slope"), [(-1.0, -4.0), (0.0, -2.0)])
def test_without_the_push_half_of_the_gradient_is_left(worse, slope):
    """Candidates at ±1 of an anchor at 0: towards the good one by 2, away from the bad one by as much."""
    predicted = torch.zeros(1, 1, 1, requires_grad=True)
    log_probs = surrogate_log_probs(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1), predicted, torch.ones(1, 1), 1.0)
    policy_loss(log_probs, log_probs, torch.tensor([[1.0, worse]]), 0.1).loss.sum().backward()
    assert float(predicted.grad) == pytest.approx(slope)


def test_std_floor_keeps_small_spreads_small():
    rewards = torch.tensor([[0.0, 0.02], [0.0, 2.0]])  # stds .01 and 1
    assert group_advantages(rewards, 0.1).flatten().tolist() == pytest.approx([-0.1, 0.1, -1, 1])


def test_a_candidate_without_a_score_leaves_the_statistics():
    assert group_advantages(torch.tensor([1.0, NAN, 3.0])).tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    "rewards", [[NAN, NAN, NAN], [NAN, 5.0, NAN], [2.0, 2.0, 2.0], [0.7] * 8, [0.1, 0.1, NAN], [0.0, 0.0]]
)
def test_groups_that_cannot_be_compared_have_no_say(rewards):
    advantages = group_advantages(torch.tensor(rewards))
    assert advantages.tolist() == [0] * len(rewards)
    assert quasi_norm(advantages).tolist() == [0] * len(rewards)


def test_spread_counts_scored_candidates_alone():
    assert spread(torch.tensor([1.0, NAN, 3.0])) == 1
    assert spread(torch.tensor([NAN, 5.0])) == 0
    assert math.isnan(spread(torch.tensor([NAN, NAN])))


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [NAN, 7.0, 100.0]])
    together = group_advantages(rewards)
    assert torch.equal(together, torch.stack([group_advantages(row) for row in rewards]))


@given(REWARDS, st.randoms(use_true_random=False), st.sampled_from([0.0, 0.5]))
@settings(deadline=None, max_examples=50)
def test_advantages_follow_a_permutation(rewards, rng, std_floor):
    rewards = torch.tensor(rewards)
    order = torch.tensor(rng.sample(range(len(rewards)), len(rewards)))
    expected = quasi_norm(group_advantages(rewards, std_floor))[order]
    torch.testing.assert_close(quasi_norm(group_advantages(rewards[order], std_floor)), expected, rtol=1e-4, atol=1e-5)


@given(REWARDS, st.integers(-8, 8), st.sampled_from([0.25, 0.5, 3.0, 16.0]))
@settings(deadline=None, max_examples=50)
def test_advantages_forget_shift_and_scale_and_sum_to_zero(rewards, shift, scale):
    rewards = torch.tensor(rewards)
    expected = quasi_norm(group_advantages(rewards))
    torch.testing.assert_close(quasi_norm(group_advantages(scale * rewards + shift)), expected, rtol=1e-4, atol=1e-4)
    assert abs(expected.sum()) < 1e-4
    # A floor is an absolute size: it survives a shift, and a scale only when it is scaled too.
    floored = group_advantages(rewards, 2.0)
    torch.testing.assert_close(group_advantages(scale * rewards + shift, 2.0 * scale), floored, rtol=1e-4, atol=1e-4)


@given(REWARDS)
@settings(deadline=None, max_examples=50)
def test_power_2_returns_the_z_scores(rewards):
    advantages = group_advantages(torch.tensor(rewards))
    torch.testing.assert_close(quasi_norm(advantages, 2.0), advantages, rtol=1e-5, atol=1e-6)


def test_quasi_norm_by_hand():
    # |A|^.8: 1, 2^.8 = 1.741101, 1, 0 -> sum 3.741101, ^1.25 = 5.202946; √4 = 2
    result = quasi_norm(torch.tensor([1.0, -2.0, 1.0, 0.0]), 0.8)
    assert result.tolist() == pytest.approx([0.384398, -0.768795, 0.384398, 0], abs=2e-6)


def test_quasi_norm_favours_one_clear_winner():
    winner = quasi_norm(group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0])))
    spread = quasi_norm(group_advantages(torch.tensor([1.0, 1.0, 0.0, 0.0])))
    assert winner.norm() > spread.norm()


def test_quasi_norm_forgets_scale_and_refuses_a_bad_power():
    advantages = group_advantages(torch.tensor([0.0, 1.0, 5.0]))
    torch.testing.assert_close(quasi_norm(7 * advantages), quasi_norm(advantages))
    with pytest.raises(ValueError, match="advantage_power: got 0"):
        quasi_norm(advantages, 0)


# ------------------------------------------------------------------------------------ several rewards


def aggregated(rewards, weights, how, **options):
    """A batch of one group, whose advantages keep their size."""
    (advantages,) = batch_advantages([rewards], weights, how, power=2.0, **options)
    return advantages


def test_the_two_ways_to_aggregate_by_hand():
    rewards = torch.tensor([[0.0, 1.0], [4.0, 0.0], [2.0, 2.0]])  # candidates × rewards
    weights = torch.tensor([1.0, 2.0])
    assert total_scores(rewards, weights).tolist() == [2, 4, 6]
    assert aggregated(rewards, weights, "sum_then_normalize").tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    # z-scores times √(2/3): (-1, 1, 0) and (0, -1, 1); sum (-1, -1, 2), whose std is √2
    assert total_advantages(rewards, weights).tolist() == pytest.approx([n * 1.5**0.5 for n in (-1, -1, 2)])
    assert aggregated(rewards, weights, "normalize_then_sum").tolist() == pytest.approx(
        [n / 2**0.5 for n in (-1, -1, 2)]
    )


@pytest.mark.parametrize("how", WAYS)
def test_a_reward_that_does_not_apply_to_a_group_changes_nothing(how):
    rewards = torch.tensor([[0.0, 1.0], [4.0, 0.0], [2.0, 2.0]])
    with_nan = torch.cat([rewards, torch.full((3, 1), NAN)], dim=-1)
    assert torch.equal(total_scores(with_nan, torch.tensor([1.0, 2.0, 5.0])), torch.tensor([2.0, 4.0, 6.0]))
    expected = aggregated(rewards, torch.tensor([1.0, 2.0]), how)
    assert torch.equal(aggregated(with_nan, torch.tensor([1.0, 2.0, 5.0]), how), expected)


@pytest.mark.parametrize("how", WAYS)
def test_a_candidate_that_misses_one_reward_leaves_the_group(how):
    rewards = torch.tensor([[0.0, 1.0], [9.0, NAN], [4.0, 0.0], [2.0, 2.0]])
    kept = [0, 2, 3]
    weights = torch.tensor([1.0, 2.0])
    scores, advantages = total_scores(rewards, weights), aggregated(rewards, weights, how)
    assert scores[1].isnan() and advantages[1] == 0
    assert scores[kept].tolist() == [2, 4, 6]
    torch.testing.assert_close(advantages[kept], aggregated(rewards[kept], weights, how))


@pytest.mark.parametrize("how", WAYS)
def test_a_reward_of_weight_0_takes_nobody_out(how):
    rewards = torch.tensor([[0.0, 1.0], [1.0, NAN], [2.0, 1.0], [3.0, NAN]])
    weights = torch.tensor([1.0, 0.0])
    assert total_scores(rewards, weights).tolist() == [0, 1, 2, 3]
    assert torch.equal(aggregated(rewards, weights, how), aggregated(rewards[:, :1], torch.ones(1), how))


@pytest.mark.parametrize("how", WAYS)
def test_a_reward_of_weight_0_scores_nobody(how):
    """Else 0.0 would stand in for a score: a low one, and one that other groups' spread is measured with."""
    rewards, weights = torch.tensor([[NAN, 0.3], [NAN, 0.9]]), torch.tensor([1.0, 0.0])
    assert total_scores(rewards, weights).isnan().all()
    assert aggregated(rewards, weights, how).tolist() == [0, 0]
    assert total_scores(torch.tensor([[NAN, 0.3], [2.0, 0.9]]), weights).isnan().tolist() == [True, False]
    other = torch.tensor([[10.0, NAN], [14.0, NAN]])
    *_, beside = batch_advantages([rewards, other], weights, how, "batch", power=2.0)
    assert beside.tolist() == [-1, 1]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_who_fails_one_reward_is_compared_by_none(how, scale):
    """The second reward fails on all of one group and on two of another; the first is as alive as ever."""
    weights = torch.tensor([1.0, 2.0])
    rewards = [
        torch.tensor([[1.0, NAN], [3.0, NAN], [9.0, NAN]]),
        torch.tensor([[1.0, 0.0], [50.0, NAN], [4.0, 1.0], [-70.0, NAN]]),
        torch.tensor([[2.0, 3.0], [3.0, 1.0]]),
    ]
    failed = [torch.zeros_like(values, dtype=torch.bool) for values in rewards]
    failed[0][:, 1] = failed[1][[1, 3], 1] = True

    def advantages(values):
        return batch_advantages(values, weights, how, scale, power=2.0)

    dead, half, whole = advantages([comparable(r, weights, f) for r, f in zip(rewards, failed, strict=True)])
    assert dead.tolist() == [0, 0, 0] and half[[1, 3]].tolist() == [0, 0]
    # Nobody else notices: neither the batch's spread nor the group's mean has seen what was taken out.
    alone = advantages([rewards[1][[0, 2]], rewards[2]])
    torch.testing.assert_close([half[[0, 2]], whole], alone)
    not_applicable, *_ = advantages(rewards)
    assert not_applicable.any(), "a reward that does not apply leaves the comparison to the other"
    unweighted = comparable(rewards[0], torch.tensor([1.0, 0.0]), failed[0])
    assert torch.equal(unweighted.nan_to_num(7.0), rewards[0].nan_to_num(7.0)), "a weight of 0 takes nobody out"


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e15, 1e30, 3e38])
def test_the_size_of_rewards_costs_no_advantage(how, scale, unit):
    rewards, weights = torch.tensor([[0.0, 0.1], [0.5, 0.3], [1.0, 0.0]]), torch.tensor([1.0, 1.0])
    (expected,) = batch_advantages([rewards], weights, how, scale, power=2.0)
    (found,) = batch_advantages([rewards * unit], weights, how, scale, power=2.0)
    factor = unit if scale == "none" and how == "sum_then_normalize" else 1.0
    torch.testing.assert_close(found.double() / factor, expected.double(), rtol=1e-5, atol=1e-6)


def test_advantages_are_finite_whatever_finite_rewards_are():
    largest = torch.finfo(torch.float32).max
    rewards = torch.tensor([[largest, largest], [-largest, -largest], [0.0, 0.0]])
    for how in WAYS:
        for scale in ("group", "batch", "none"):
            (found,) = batch_advantages([rewards], torch.tensor([1.0, 2.0]), how, scale)
            assert found.isfinite().all() and found[0] > 0 > found[1] and found[2].abs() < 1e-6
    assert spread(rewards) == pytest.approx(largest * (2 / 3) ** 0.5)
    assert total_scores(rewards, torch.ones(2)).tolist() == [largest, -largest, 0]


def test_a_reward_that_failed_on_a_whole_group_leaves_no_score_of_another_sum():
    rewards, weights = torch.tensor([[1.0, NAN], [3.0, NAN]]), torch.tensor([1.0, 2.0])
    failed = torch.tensor([[False, True], [False, False]])
    assert total_scores(rewards, weights).tolist() == [1, 3]  # it does not apply here
    assert total_scores(rewards, weights, failed).isnan().tolist() == [True, False]
    assert total_scores(rewards, torch.tensor([1.0, 0.0]), failed).tolist() == [1, 3]


@pytest.mark.parametrize("how", WAYS)
def test_a_group_without_any_score_has_no_say(how):
    rewards = torch.full((3, 2), NAN)
    assert total_scores(rewards.expand(2, 3, 2), torch.ones(2)).isnan().all()
    assert aggregated(rewards, torch.ones(2), how).tolist() == [0, 0, 0]


def test_normalising_first_makes_units_irrelevant():
    rewards, weights = randn(6, 2), torch.tensor([1.0, 1.0])
    other_units = rewards * torch.tensor([1.0, 1000.0])
    advantages = aggregated(rewards, weights, "normalize_then_sum")
    torch.testing.assert_close(aggregated(other_units, weights, "normalize_then_sum"), advantages)
    summed = [aggregated(r, weights, "sum_then_normalize") for r in (rewards, other_units)]
    assert (summed[0] - summed[1]).abs().max() > 0.1


def test_normalised_sums_are_divided_by_their_spread_over_the_batch():
    """As in TRL: the second group, whose rewards disagree, counts for less than the first."""
    agreeing = torch.tensor([[0.0, 0.0], [2.0, 20.0]])  # z-scores (-1, 1) twice, sum (-2, 2)
    opposed = torch.tensor([[0.0, 5.0], [8.0, 5.0]])  # (-1, 1) and none, sum (-1, 1)
    found = batch_advantages([agreeing, opposed], torch.ones(2), "normalize_then_sum", power=2.0)
    assert torch.stack(found).flatten().tolist() == pytest.approx([n / 2.5**0.5 for n in (-2, 2, -1, 1)])


def test_a_floor_is_as_absolute_after_normalising_as_before():
    small, large = torch.tensor([[0.0], [0.02]]), torch.tensor([[0.0], [2.0]])  # stds .01 and 1
    for batch in ([small], [large], [small, large]):
        found = [batch_advantages(batch, torch.ones(1), how, std_floor=0.1, power=2.0) for how in WAYS]
        torch.testing.assert_close(*found)
    assert aggregated(small, torch.ones(1), "normalize_then_sum", std_floor=0.1).tolist() == pytest.approx([-0.1, 0.1])


def test_what_cancels_is_not_blown_up():
    rising, falling = torch.tensor([0.1, 0.7, 1.3]), torch.tensor([7.0, 4.0, 1.0])  # in units that cancel in no score
    rewards = torch.stack([rising, falling], dim=1)
    assert aggregated(rewards, torch.ones(2), "normalize_then_sum").tolist() == [0, 0, 0]
    # Nearly so: 1 - .95 of the z-scores is left, whose std of .05 is below the floor.
    found = aggregated(rewards, torch.tensor([1.0, 0.95]), "normalize_then_sum", std_floor=0.2)
    assert found.tolist() == pytest.approx([n * 1.5**0.5 * 0.05 / 0.2 for n in (-1, 0, 1)], abs=1e-5)


# ------------------------------------------------------------------------------------ sizes of advantages

SCALES = ["group", "batch", "none"]


def test_advantage_size_by_hand():
    scores = torch.tensor([2.0, NAN, 6.0])  # std 2
    assert advantage_size(scores, "group", 0.5) == 1
    assert advantage_size(scores, "group", 8.0) == 0.25
    assert advantage_size(scores, "batch", 0.5, batch_std=4.0) == 0.5
    assert advantage_size(scores, "batch", 8.0, batch_std=4.0) == 0.25
    assert advantage_size(scores, "none", 8.0) == 2
    assert [advantage_size(torch.full((3,), NAN), scale, 0.1) for scale in SCALES] == [0, 0, 0]


def test_power_2_gives_each_scale_its_plain_form():
    rewards = [torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [8.0]])]
    found = {scale: batch_advantages(rewards, torch.ones(1), scale_rewards=scale, power=2.0) for scale in SCALES}
    everybody = torch.tensor([1.0, 3, 2, 8]).std(correction=0)
    for i, deviations in enumerate([[-1, 1], [-3, 3]]):
        for scale, divisor in {"group": deviations[1], "batch": everybody, "none": 1.0}.items():
            torch.testing.assert_close(found[scale][i], torch.tensor(deviations) / divisor)


def test_floor_and_filter_tame_small_groups_alone():
    rewards = [torch.tensor([[0.0], [0.02]]), torch.tensor([[0.0], [2.0]])]  # stds .01 and 1
    plain = batch_advantages(rewards, torch.ones(1))
    floored = batch_advantages(rewards, torch.ones(1), std_floor=0.1)
    torch.testing.assert_close(floored[0], 0.1 * plain[0])
    assert torch.equal(floored[1], plain[1])
    filtered = batch_advantages(rewards, torch.ones(1), min_std=0.1)
    assert not filtered[0].any() and torch.equal(filtered[1], plain[1])


def test_the_filter_sees_each_reward_where_each_is_normalised():
    """These two cancel in the sum, not in the sum of their advantages."""
    rewards, weights = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]), torch.tensor([2.0, 1.0])
    steady = torch.tensor([[5.0, 1.0], [5.0, 1.0], [5.0, 1.0], [5.0, 1.001]])
    given = {"how": "normalize_then_sum", "min_std": 1e-2}
    summed, flat = batch_advantages([rewards, steady], weights, min_std=1e-2)
    assert not summed.any() and not flat.any()
    uneven = rewards * torch.tensor([1.0, 0.5])  # other units: the sum no longer cancels, the advantages are the same
    (here, gone), (there, _) = (batch_advantages([r, steady], weights, **given) for r in (rewards, uneven))
    assert here.any() and not gone.any()
    torch.testing.assert_close(here, there)


def test_the_default_is_the_quasi_norm_of_z_scores_to_the_bit():
    rewards = randn(5, 8, 1)
    for values, advantages in zip(rewards, batch_advantages(list(rewards), torch.ones(1)), strict=True):
        assert torch.equal(advantages, quasi_norm(group_advantages(values[:, 0].double())).float())


@pytest.mark.parametrize("power", [0.8, 2.0])
def test_missing_scores_make_no_advantage_larger(power):
    rewards = torch.tensor([[0.0], [NAN], [1.0], [NAN], [5.0]])
    (advantages,) = batch_advantages([rewards], torch.ones(1), power=power)
    (expected,) = batch_advantages([rewards[[0, 2, 4]]], torch.ones(1), power=power)
    torch.testing.assert_close(advantages[[0, 2, 4]], expected)


@given(
    st.lists(REWARDS, min_size=1, max_size=3), st.integers(-8, 8), st.sampled_from([0.25, 3.0]), st.sampled_from(SCALES)
)
@settings(deadline=None, max_examples=50)
def test_every_scale_forgets_shifts_and_each_its_own_units(groups, shift, factor, scale):
    rewards = [torch.tensor(values).unsqueeze(1) for values in groups]

    def advantages(values):
        return torch.cat(batch_advantages(values, torch.ones(1), scale_rewards=scale))

    expected = advantages(rewards)
    torch.testing.assert_close(advantages([r + shift for r in rewards]), expected, rtol=1e-3, atol=1e-3)
    scaled = advantages([factor * r for r in rewards])
    torch.testing.assert_close(scaled, expected * (factor if scale == "none" else 1), rtol=1e-3, atol=1e-3)
    assert abs(float(expected.sum())) < 1e-3


@given(REWARDS, st.randoms(use_true_random=False), st.sampled_from(SCALES), st.booleans())
@settings(deadline=None, max_examples=50)
def test_a_permutation_of_a_group_permutes_its_advantages(rewards, rng, scale, hole):
    order = rng.sample(range(len(rewards)), len(rewards))
    values = torch.tensor(rewards).unsqueeze(1)
    if hole:
        values[0] = NAN
    other = torch.tensor([[0.0], [5.0]])

    def advantages(values):
        return batch_advantages([values, other], torch.ones(1), scale_rewards=scale)[0]

    found = advantages(values)
    torch.testing.assert_close(advantages(values[order]), found[order], rtol=1e-4, atol=1e-4)
    assert not hole or found[0] == 0


@st.composite
def groups_with_holes(draw):
    """Rewards `[group, rewards]`, of which any may be missing, and their weights, of which any may be 0."""
    size, number = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    row = st.lists(st.integers(-8, 8).map(lambda n: n / 4) | st.just(NAN), min_size=number, max_size=number)
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=number, max_size=number))
    return torch.tensor(draw(st.lists(row, min_size=size, max_size=size))), torch.tensor(weights)


@given(groups_with_holes(), st.sampled_from(WAYS), st.sampled_from(SCALES), st.sampled_from([0.0, 0.5]))
@settings(deadline=None, max_examples=100)
def test_whatever_is_missing_the_present_are_compared_as_if_alone(group, how, scale, std_floor):
    """Who misses a reward that counts and that others have is out, and no one else in the batch notices."""
    rewards, weights = group
    applies = [j for j in range(len(weights)) if weights[j] and not rewards[:, j].isnan().all()]
    out = rewards[:, applies].isnan().any(1) if applies else torch.ones(len(rewards), dtype=torch.bool)
    assert torch.equal(total_scores(rewards, weights).isnan(), out)

    def advantages(values):
        other = torch.tensor([[0.0], [5.0]]).expand(2, len(weights))
        return batch_advantages([values, other], weights, how, scale, std_floor)

    present = torch.full_like(rewards, NAN) if out.all() else rewards[~out]
    (found, beside), (alone, beside_alone) = advantages(rewards), advantages(present)
    assert not found[out].any()
    assert out.all() or torch.allclose(found[~out], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(beside, beside_alone, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ policy


def test_steps_by_hand():
    latents, velocity = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[4.0]], [[-2.0]]]).bfloat16()
    sigma, next_sigma = torch.tensor([1.0, 0.5]), torch.tensor([0.75, 0.0])
    assert euler_step(latents, velocity, sigma, next_sigma).flatten().tolist() == [0, 3]
    assert predict_clean(latents, velocity, sigma).flatten().tolist() == [-3, 3]


def test_one_step_to_sigma_0_is_the_clean_prediction():
    latents, velocity, sigma = randn(2, 3, 4), randn(2, 3, 4, seed=1), torch.tensor([0.9, 0.3])
    expected = predict_clean(latents, velocity, sigma)
    torch.testing.assert_close(euler_step(latents, velocity, sigma, torch.zeros(2)), expected)


def test_surrogate_by_hand():
    # two tokens of two channels, weights 1 and .5, two candidates
    predicted = torch.zeros(1, 2, 2)
    candidates = torch.tensor([[[[1.0, 1.0], [0.0, 2.0]], [[0.0, 0.0], [3.0, 1.0]]]])
    # d: (1·1 + .5·2) / 1.5 = 4/3 and (0 + .5·5) / 1.5 = 5/3
    log_probs = surrogate_log_probs(candidates, predicted, torch.tensor([[1.0, 0.5]]), temperature=0.5)
    logits = [-8 / 3, -10 / 3]
    total = math.log(sum(math.exp(x) for x in logits))
    assert log_probs.flatten().tolist() == pytest.approx([x - total for x in logits])


def test_tokens_of_weight_0_are_invisible():
    candidates, predicted, weights = randn(2, 3, 4, 5), randn(2, 4, 5, seed=1), torch.tensor([[1.0, 0, 2, 0]] * 2)
    expected = surrogate_log_probs(candidates[:, :, ::2], predicted[:, ::2], weights[:, ::2], 0.3)
    torch.testing.assert_close(surrogate_log_probs(candidates, predicted, weights, 0.3), expected)
    torch.testing.assert_close(surrogate_log_probs(candidates, predicted, 10 * weights, 0.3), expected)


@given(st.floats(0, 4), st.integers(0, 99), st.sampled_from([0.01, 1.0]))
@settings(deadline=None, max_examples=25)
def test_a_mask_of_ones_is_the_objective_without_a_region(keep_weight, seed, temperature):
    """In each policy, whatever the weight outside; and so is any mask whose outside weighs as much."""
    candidates, predicted = randn(2, 3, 6, 4, seed=seed), randn(2, 6, 4, seed=seed + 1)
    std, old, sure = torch.full((2, 6, 1), 0.5), predicted + 0.1, torch.tensor([0.9, 0.2])
    errors = (candidates - predicted.unsqueeze(1)).square().mean((-1, -2))
    density = torch.distributions.Normal(predicted, std).log_prob(candidates[:, 0])
    away = [(old + sign * (predicted - old) - candidates[:, 0]).square().mean((-1, -2)) for sign in (1, -1)]
    mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed))
    for weights in (region_weights(torch.ones(2, 6), keep_weight), region_weights(mask, 1.0)):
        found = surrogate_log_probs(candidates, predicted, weights, temperature)
        torch.testing.assert_close(found, (-errors / temperature).log_softmax(-1), rtol=1e-4, atol=1e-5)
        constant = math.log(0.5 * (2 * math.pi) ** 0.5)
        found = gaussian_log_prob(candidates[:, 0], predicted, std, weights)
        torch.testing.assert_close(found, density.mean((-1, -2)) + constant, rtol=1e-4, atol=1e-5)
        found = nft_loss(predicted, old, candidates[:, 0], sure, weights, 1.0)
        torch.testing.assert_close(found, sure * away[0] + (1 - sure) * away[1], rtol=1e-4, atol=1e-5)


def test_log_ratio_of_the_same_policy_is_exactly_0():
    candidates, predicted, weights = randn(2, 5, 16, 4), randn(2, 16, 4, seed=1), torch.ones(2, 16)
    first, second = (surrogate_log_probs(candidates, predicted.clone(), weights, 1e-3) for _ in range(2))
    assert (first - second).abs().max() == 0
    loss = policy_loss(first, second, torch.ones(2, 5), 1e-4)
    assert loss.loss.tolist() == [-5, -5]
    assert not (loss.clipped_low | loss.clipped_high).any()


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("epsilon", [1e-5, 0.2])
def test_gradient_on_policy_is_the_closed_form(temperature, epsilon):
    """-(2/τ) Σ A'_i w (x_i - x_θ) / Σw (algorithm section 4), over channels too, which the distance averages."""
    channels = 3
    # neighbours within 0.02, so that a small τ does not saturate the softmax
    predicted = randn(2, 6, channels, dtype=torch.float64).requires_grad_()
    candidates = predicted.detach().unsqueeze(1) + 0.02 * randn(2, 5, 6, channels, seed=1, dtype=torch.float64)
    weights = torch.rand(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    advantages = quasi_norm(group_advantages(randn(2, 5, seed=3, dtype=torch.float64)))
    log_probs = surrogate_log_probs(candidates, predicted, weights, temperature)
    loss = policy_loss(log_probs, log_probs.detach(), advantages, epsilon).loss.sum()
    (gradient,) = torch.autograd.grad(loss, predicted)

    pull = (advantages[:, :, None, None] * (candidates - predicted.detach().unsqueeze(1))).sum(1)
    share = weights / weights.sum(-1, keepdim=True) / channels
    torch.testing.assert_close(gradient, -2 / temperature * share.unsqueeze(-1) * pull, rtol=1e-9, atol=1e-12)


def test_loss_gradient_agrees_with_finite_differences_off_policy():
    """A flow of two parameters, v = a x + b, in float64, with some ratios clipped."""
    latents = randn(2, 4, 3, dtype=torch.float64)
    candidates = latents.unsqueeze(1) + 0.3 * randn(2, 6, 4, 3, seed=1, dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.0, 0.2, 0.0]] * 2, dtype=torch.float64)
    advantages = group_advantages(randn(2, 6, seed=2, dtype=torch.float64))

    def log_probs(a, b):
        return surrogate_log_probs(candidates, latents - 0.25 * (a * latents + b), weights, 0.05)

    old = log_probs(torch.tensor(0.5).double(), torch.tensor(-0.2).double())
    new = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 0.1)]
    result = policy_loss(log_probs(*new), old, advantages, 0.2)
    clipped = result.clipped_low | result.clipped_high
    assert clipped.any() and not clipped.all()
    assert torch.autograd.gradcheck(lambda *p: policy_loss(log_probs(*p), old, advantages, 0.2).loss, new)


def test_a_step_against_the_gradient_raises_the_winner():
    predicted = torch.zeros(1, 4, 2, requires_grad=True)
    candidates, weights = randn(1, 3, 4, 2), torch.ones(1, 4)
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0]]))
    before = surrogate_log_probs(candidates, predicted, weights, 1.0)
    policy_loss(before, before, advantages, 0.2).loss.sum().backward()
    after = surrogate_log_probs(candidates, predicted - 0.5 * predicted.grad, weights, 1.0)
    assert after[0, 0] > before[0, 0]


def test_clip_by_hand():
    ratios = torch.tensor([[0.5, 0.5, 1.0, 2.0, 2.0, 2.0]])
    advantages = torch.tensor([[1.0, -1.0, 3.0, 1.0, -1.0, 0.0]])
    log_probs = ratios.log().requires_grad_()
    result = policy_loss(log_probs, torch.zeros(1, 6), advantages, 0.2)
    # min(A ρ, A clip(ρ)): .5, -.8, 3, 1.2, -2, 0
    assert result.loss.item() == pytest.approx(-(0.5 - 0.8 + 3 + 1.2 - 2))
    assert result.clipped_low.tolist() == [[False, True, False, False, False, False]]
    assert result.clipped_high.tolist() == [[False, False, False, True, False, False]]
    result.loss.sum().backward()
    # the flags tell whose gradient is gone; the others have -A ρ
    assert log_probs.grad.flatten().tolist() == pytest.approx([-0.5, 0, -3, 0, 2, 0])


def test_the_two_sides_of_the_clip_are_set_apart():
    ratios = torch.tensor([[0.95, 0.85, 1.4, 1.6]])
    advantages = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])
    result = policy_loss(ratios.log(), torch.zeros(1, 4), advantages, 0.1, 0.5)
    # min(A ρ, A clip(ρ, .9, 1.5)): -.95, -.9, 1.4, 1.5
    assert result.loss.item() == pytest.approx(-(-0.95 - 0.9 + 1.4 + 1.5))
    assert result.clipped_low.tolist() == [[False, True, False, False]]
    assert result.clipped_high.tolist() == [[False, False, False, True]]
    same = (policy_loss(ratios.log(), torch.zeros(1, 4), advantages, 0.1, high).loss for high in (None, 0.1))
    assert torch.equal(*same)


def test_no_gradient_reaches_the_old_policy():
    old = torch.zeros(1, 2, requires_grad=True)
    assert not policy_loss(torch.zeros(1, 2), old, torch.ones(1, 2), 0.1).loss.requires_grad


def test_velocity_kl_by_hand():
    velocity = torch.tensor([[[1.0, 3.0], [2.0, 0.0]]]).bfloat16()
    weights = torch.tensor([[[1.0, 0.0], [3.0, 2.0]]])
    kl = velocity_kl(velocity, torch.zeros(1, 2, 2), weights)
    assert kl.tolist() == [(1 * 1 + 0 * 9 + 3 * 4 + 2 * 0) / 4]
    assert velocity_kl(velocity, velocity, weights).tolist() == [0]


def test_weighted_mean_of_nothing_is_0():
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert weighted_mean(values, torch.tensor([[1.0, 3.0], [0.0, 0.0]])).tolist() == [2.5, 0]


def test_keep_hinge_by_hand():
    # squared errors per token 1, 4, .25; the first is edited, the third half
    predicted = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [0.5, 0.5]]])
    region, source = torch.tensor([[1.0, 0.0, 0.5]]), torch.zeros(1, 3, 2)
    assert keep_hinge(predicted, source, region, 0.0).item() == pytest.approx((4 + 0.125) / 1.5)
    assert keep_hinge(predicted, source, region, 1.0).item() == pytest.approx(3 / 1.5)
    assert keep_hinge(predicted, source, region, 4.0).item() == 0
    assert keep_hinge(predicted, source, torch.ones(1, 3), 0.0).item() == 0


@pytest.mark.parametrize("space", ["kl", "hinge"])
def test_gradients_of_the_anchors_to_base_and_source(space):
    """A flow of two parameters, in float64."""
    latents, other = randn(2, 4, 3, dtype=torch.float64), randn(2, 4, 3, seed=1, dtype=torch.float64)
    region = torch.tensor([[1.0, 0.5, 0, 0.2]] * 2, dtype=torch.float64)
    sigma = torch.tensor([0.9, 0.4], dtype=torch.float64)

    def loss(a, b):
        velocity = a * latents + b
        if space == "kl":
            return velocity_kl(velocity, other, region.unsqueeze(-1))
        return keep_hinge(predict_clean(latents, velocity, sigma), other, region, 0.3)

    start = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 0.1)]
    assert torch.autograd.gradcheck(loss, start)


# ------------------------------------------------------------------------------------ Flow-GRPO


def test_sde_std_by_hand():
    sigma, second = torch.tensor([1.0, 0.8, 0.5, 0.0]), torch.tensor(0.8)
    assert sde_std(sigma, second, 0.7).tolist() == pytest.approx([0.7 * 5**0.5, 0.7 * 2, 0.7, 0])


def test_sde_step_by_hand():
    latents, velocity = torch.tensor([[[2.0], [2.0]]]), torch.tensor([[[1.0], [1.0]]])
    mean, std = sde_step(latents, velocity, torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([[1.0, 0.0]]))
    # 2 - .25 (1 + (2 + .5) / (2 · .5)) and the Euler step
    assert mean.flatten().tolist() == pytest.approx([1.125, 1.75])
    assert std.flatten().tolist() == pytest.approx([0.5, 0])


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_sde_keeps_the_marginals_of_the_ode(strength):
    """On data N(0, .25), whose velocity is known, the variance after a step is right but for the step's square."""

    def variance(sigma):
        return (1 - sigma) ** 2 * 0.25 + sigma**2

    sigma, errors = 0.6, []
    slope = (sigma - (1 - sigma) * 0.25) / variance(sigma)
    for size in (0.02, 0.01):
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        std = strength * sde_std(torch.tensor([[sigma]]).double(), torch.tensor(0.9).double(), 0.7)
        levels = torch.tensor([[sigma], [sigma - size]], dtype=torch.float64)
        mean, kick = sde_step(one, slope * one, *levels, std)
        errors.append(float(mean**2 * variance(sigma) + kick**2) - variance(sigma - size))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_gaussian_log_prob_by_hand():
    values, mean = torch.tensor([[[1.0, 2.0], [9.0, 9.0], [3.0, 3.0]]]), torch.zeros(1, 3, 2)
    std = torch.tensor([[[2.0], [0.0], [1.0]]])
    # tokens: -½ (1/4 + 4/4) / 2 = -.3125, none, -½ · 9 = -4.5; weights 3, 1 and 1
    log_prob = gaussian_log_prob(values, mean, std, torch.tensor([[3.0, 1.0, 1.0]]))
    assert log_prob.item() == pytest.approx((3 * -0.3125 - 4.5) / 4)
    assert gaussian_log_prob(values, mean, torch.zeros(1, 3, 1), torch.ones(1, 3)).tolist() == [0]


def test_gaussian_log_prob_is_the_density_where_weights_are_even():
    values, mean, std = randn(2, 3, 4), randn(2, 3, 4, seed=1), torch.rand(2, 3, 1) + 0.5

    def density(mean):
        return torch.distributions.Normal(mean, std).log_prob(values).mean((1, 2))

    ratio = density(mean) - density(mean + 0.1)
    ours = [gaussian_log_prob(values, m, std, torch.ones(2, 3)) for m in (mean, mean + 0.1)]
    torch.testing.assert_close(ours[0] - ours[1], ratio, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ DiffusionNFT


def test_nft_loss_by_hand():
    new, old, target = (torch.full((1, 2, 1), x) for x in (2.0, 1.0, 0.0))
    new[0, 1] = 1.0
    # token 0: v+ = 1.5, v- = .5; token 1: both 1; weights 3 and 1
    loss = nft_loss(new, old, target, torch.tensor([0.75]), torch.tensor([[3.0, 1.0]]), 0.5)
    wanted, unwanted = (3 * 2.25 + 1) / 4, (3 * 0.25 + 1) / 4
    assert loss.item() == pytest.approx(0.75 * wanted + 0.25 * unwanted)


def test_nft_gradient_at_the_old_policy_is_the_advantage_times_the_error():
    old, target, weights = randn(2, 3, 4), randn(2, 3, 4, seed=1), torch.rand(2, 3) + 0.1
    velocity = old.clone().requires_grad_()
    optimality = torch.tensor([0.9, 0.5])
    loss = nft_loss(velocity, old, target, optimality, weights, 0.3)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    share = (weights / weights.sum(-1, keepdim=True) / 4).unsqueeze(-1)
    expected = 2 * 0.3 * (2 * optimality - 1).view(-1, 1, 1) * share * (old - target)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
