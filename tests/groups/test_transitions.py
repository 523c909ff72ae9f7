"""`transitions.py`: which anchors and steps an update reads, and what it reads there."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from rcgrpo.data.edits import Edit
from rcgrpo.editors import Conditions, Schedule
from rcgrpo.groups.policies import NeighborPolicy
from rcgrpo.groups.rollout import Group
from rcgrpo.groups.transitions import choose, gather, micro_batches
from rcgrpo.maths.objective import euler_step, predict_clean
from rcgrpo.maths.regions import region_weights

STEPS, SIZE, TOKENS, CHANNELS = 5, 6, 4, 3
POLICY = NeighborPolicy()


def group(row, side=32, flat=False):
    """A group whose every number is random but known."""
    generator = torch.Generator().manual_seed(row)

    def draw(*shape):
        return torch.rand(shape, generator=generator)

    picture = Image.new("RGB", (side, side))
    conditions = Conditions({"prompt_embeds": draw(1, 2, 3)}, torch.ones(1, 2), draw(1, TOKENS, CHANNELS), side, side)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    return Group(
        edit=Edit(row, f"train row {row}", picture, "do it", torch.ones(side, side), {}),
        conditions=conditions,
        schedule=Schedule(sigmas, 1000 * sigmas[:-1]),
        region=draw(TOKENS),
        trajectory=draw(STEPS + 1, SIZE, TOKENS, CHANNELS),
        images=[picture] * SIZE,
        attention=None,
        attention_maps=None,
        advantages=torch.zeros(SIZE) if flat else draw(SIZE) - 0.5,
    )


def test_choose_takes_so_many_different_anchors_and_steps_of_each_group():
    groups = [group(7), group(9)]
    chosen = choose(groups, POLICY, 3, 2, [0, 1, 3], ("key",))
    assert len(chosen) == len(set(chosen)) == 2 * 3 * 2
    for g in (0, 1):
        anchors = [anchor for i, anchor, _ in chosen if i == g]
        assert len(set(anchors)) == 3 and all(anchors.count(anchor) == 2 for anchor in anchors)
    assert {step for _, _, step in chosen} <= {0, 1, 3}


def test_choice_depends_on_key_and_row_and_on_nothing_else():
    """Or a resume, another rank or another split into micro-steps would train on something else."""
    torch.manual_seed(0)
    alone = choose([group(9)], POLICY, 3, 2, range(STEPS), (0, 4))
    torch.manual_seed(1)
    second = choose([group(7), group(9)], POLICY, 3, 2, range(STEPS), (0, 4))
    assert [place[1:] for place in second if place[0] == 1] == [place[1:] for place in alone]
    others = [choose([group(9)], POLICY, 3, 2, range(STEPS), (0, k)) for k in range(5, 15)]
    assert sum(other == alone for other in others) < 2
    assert {step for other in others for _, _, step in other} == set(range(STEPS))
    assert {anchor for other in others for _, anchor, _ in other} == set(range(SIZE))


def test_flat_groups_are_left_out_but_something_always_stays():
    chosen = choose([group(1, flat=True), group(2)], POLICY, 2, 2, range(STEPS), ("key",))
    assert len(chosen) == 4 and {i for i, _, _ in chosen} == {1}
    assert choose([group(1, flat=True)], POLICY, 2, 2, [1, 2], ("key",)) == [(0, 0, 1)]
    assert choose([replace(group(1), advantages=None)], POLICY, 2, 2, [1, 2], ("key",)) == [(0, 0, 1)]


@pytest.mark.parametrize("size", [None, 1, 3, 100])
def test_micro_batches_lose_nothing_and_never_mix_sizes(size):
    groups = [group(1), group(2, side=48), group(3)]
    chosen = choose(groups, POLICY, 3, 2, range(STEPS), ("key",))
    batches = micro_batches(groups, chosen, size)
    assert sorted(place for batch in batches for place in batch) == sorted(chosen)
    assert all(len({groups[i].size for i, _, _ in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) <= (size or 12)
    assert len(batches) == sum(-(-count // (size or count)) for count in (12, 6))


def test_gather_reads_each_place():
    groups = [group(1), group(2)]
    where = [(1, 5, 0), (0, 2, 4), (1, 0, 3)]
    known = {place: torch.full((SIZE,), float(i)) for i, place in enumerate(where)}
    found = gather(groups, where, POLICY, known)
    for k, (i, anchor, step) in enumerate(where):
        source = groups[i]
        assert torch.equal(found.latents[k], source.trajectory[step, anchor])
        assert torch.equal(found.candidates[k], source.trajectory[step + 1])
        assert found.sigma[k] == source.schedule.sigmas[step]
        assert found.next_sigma[k] == source.schedule.sigmas[step + 1]
        assert found.timestep[k] == source.schedule.timesteps[step]
        assert torch.equal(found.region[k], source.region) and torch.equal(found.advantages[k, 0], source.advantages)
        assert torch.equal(found.weights[k, 0], region_weights(source.region, 0.1)) and not found.std[k].any()
        assert torch.equal(found.conditions.source[k], source.conditions.source[0])
        assert torch.equal(found.old[k], known[where[k]])
    assert gather(groups, where, POLICY, {}).old is None


@pytest.mark.parametrize("space", ["latents", "clean"])
def test_a_candidate_compared_with_itself_is_at_distance_zero(space):
    """Whatever the velocity was: both spaces measure candidates by what their own Euler step says."""
    origin = group(1)
    sigmas, velocity = origin.schedule.sigmas, torch.randn(SIZE, TOKENS, CHANNELS)
    for step in range(STEPS):
        sigma, following = sigmas[step].expand(SIZE), sigmas[step + 1].expand(SIZE)
        origin.trajectory[step + 1] = euler_step(origin.trajectory[step], velocity, sigma, following)
        found = gather([origin], [(0, 2, step)], NeighborPolicy(distance_space=space), {})
        if space == "latents":
            predicted = euler_step(found.latents, velocity[2:3], found.sigma, found.next_sigma)
            assert torch.equal(predicted[0], found.candidates[0, 2])
        else:
            predicted = predict_clean(found.latents, velocity[2:3], found.sigma)
            assert torch.allclose(predicted[0], found.candidates[0, 2], atol=1e-5)
