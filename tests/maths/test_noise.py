import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcgrpo.maths.noise import (
    group_deltas,
    independent_members,
    keyed_noise,
    perturb,
    region_strength,
    regions_strength,
)

STRENGTHS = st.floats(0, 1)
SHAPE = (4096, 4)


def half_mask(soft=False):
    mask = (torch.arange(SHAPE[0]) < SHAPE[0] // 2).float()
    return mask * torch.linspace(0.1, 0.9, SHAPE[0]) if soft else mask


def group(edit_strength, keep_strength, mask, size=4):
    base, deltas = keyed_noise(SHAPE, 0, "base"), group_deltas(SHAPE, size, 0, "delta")
    return base, perturb(base, deltas, region_strength(mask, edit_strength, keep_strength).unsqueeze(-1))


def test_strength_interpolates_between_the_two():
    strength = region_strength(torch.tensor([1.0, 0.0, 0.25]), 0.8, 0.4)
    assert strength.tolist() == pytest.approx([0.8, 0.4, 0.5])


@pytest.mark.parametrize("strengths", [(1.1, 0.0), (0.5, -0.1), (float("nan"), 0.0)])
def test_a_strength_outside_0_to_1_is_refused_by_name(strengths):
    name = "keep_strength" if strengths[1] < 0 else "edit_strength"
    with pytest.raises(ValueError, match=rf"{name}: got .*, expected a strength in \[0, 1\]"):
        region_strength(torch.ones(2), *strengths)


def test_perturbation_by_hand():
    # sqrt(1 - .6²) · 2 + .6 · (-1) = 1
    assert perturb(torch.tensor(2.0), torch.tensor(-1.0), torch.tensor(0.6)).item() == pytest.approx(1.0)


@given(STRENGTHS)
@settings(max_examples=15, deadline=None)
def test_background_keeps_every_bit_of_the_base(edit_strength):
    mask = half_mask()
    base, noise = group(edit_strength, 0.0, mask)
    assert all(torch.equal(member[mask == 0], base[mask == 0]) for member in noise)
    if edit_strength > 0.01:
        assert not any(torch.equal(member[mask == 1], base[mask == 1]) for member in noise)


def test_no_strength_repeats_the_base_and_full_strength_forgets_it():
    base, still = group(0.0, 0.0, half_mask())
    assert torch.equal(still, base.expand_as(still))
    _, fresh = group(1.0, 1.0, half_mask())
    assert torch.equal(fresh, group_deltas(SHAPE, 4, 0, "delta"))


@given(STRENGTHS, STRENGTHS, st.booleans())
@settings(max_examples=20, deadline=None)
def test_noise_stays_standard_normal_on_both_sides_of_the_seam(edit_strength, keep_strength, soft):
    mask = half_mask(soft)
    _, noise = group(edit_strength, keep_strength, mask)
    for side in (noise[:, mask > 0], noise[:, mask == 0]):
        # 8192 base values at least: five standard errors of the mean and of the variance
        assert abs(side.mean()) < 5 / 8192**0.5
        assert abs(side.var() - 1) < 5 * (2 / 8192) ** 0.5


@given(STRENGTHS)
@settings(max_examples=15, deadline=None)
def test_two_members_correlate_by_their_shared_part(strength):
    _, noise = group(strength, strength, half_mask(), size=2)
    assert (noise[0] * noise[1]).mean().item() == pytest.approx(1 - strength**2, abs=0.06)


def test_mask_of_ones_is_the_global_neighbourhood():
    base, noise = group(0.3, 0.0, torch.ones(SHAPE[0]))
    deltas = group_deltas(SHAPE, 4, 0, "delta")
    torch.testing.assert_close(noise, 0.91**0.5 * base + 0.3 * deltas, rtol=0, atol=1e-6)


def test_keyed_noise_depends_on_the_key_alone():
    torch.manual_seed(1)
    first = keyed_noise((3, 5), 7, 2, "row")
    state = torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(10)
    assert torch.equal(first, keyed_noise((3, 5), 7, 2, "row"))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "drawing must not move the global generator"


def test_keys_that_look_alike_draw_different_noise():
    keys = [(1, 23), (12, 3), (123,), ("1", 23), (1, "23"), (23, 1), ((1, 23),), ()]
    drawn = {tuple(keyed_noise((4,), *key).tolist()) for key in keys}
    assert len(drawn) == len(keys)


def test_a_member_of_a_group_does_not_depend_on_the_size_of_the_group():
    assert torch.equal(group_deltas((6, 2), 3, "k"), group_deltas((6, 2), 5, "k")[:3])


def test_antithetic_halves_mirror_each_other():
    deltas = group_deltas((6, 2), 4, "k", antithetic=True)
    assert torch.equal(deltas[:2], -deltas[2:])
    assert torch.equal(deltas[:2], group_deltas((6, 2), 2, "k"))
    assert not torch.equal(deltas[0], deltas[1])


def test_antithetic_group_must_be_even():
    with pytest.raises(ValueError, match="num_generations: got 5, expected an even number"):
        group_deltas((6, 2), 5, "k", antithetic=True)


def test_strength_of_several_regions_by_hand():
    masks = torch.tensor([[1.0, 0.0, 1.0, 0.5, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0]])
    # its own, its own, the mean of both, half way to the background, the background
    assert regions_strength(masks, [0.8, 0.4], 0.2).tolist() == pytest.approx([0.8, 0.4, 0.6, 0.5, 0.2])


@given(STRENGTHS, STRENGTHS)
@settings(max_examples=15, deadline=None)
def test_one_region_of_several_is_the_region(edit_strength, keep_strength):
    mask = torch.linspace(0, 1, 9)
    expected = region_strength(mask, edit_strength, keep_strength)
    torch.testing.assert_close(regions_strength(mask.unsqueeze(0), [edit_strength], keep_strength), expected)
    both = regions_strength(torch.stack([mask, mask]), [edit_strength] * 2, keep_strength)
    torch.testing.assert_close(both, expected)


def test_a_strength_of_several_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"edit_strength: got 1.5, expected a strength in \[0, 1\]"):
        regions_strength(torch.ones(2, 3), [0.5, 1.5], 0.0)


def test_independent_members_are_the_last_and_keep_pairs_together():
    assert independent_members(4, 0.0).tolist() == [False] * 4
    assert independent_members(4, 0.3).tolist() == [False, False, False, True]
    assert independent_members(6, 0.34, antithetic=True).tolist() == [False, False, True] * 2
    assert independent_members(3, 1.0).tolist() == [True] * 3
