"""`reward_gradient.py`: where a prediction ends, and which pixels a reward's gradient reaches."""

import numpy as np
import pytest
import torch

from rcgrpo.groups.reward_gradient import follow, reward_of_prediction
from rcgrpo.groups.transitions import gather
from rcgrpo.maths.objective import predict_clean
from tiny_training import brightness, make

pytestmark = pytest.mark.filterwarnings("ignore")


def bright(images, **columns):
    return brightness(images)


bright.differentiable = lambda pictures, **columns: pictures.mean((1, 2, 3))  # type: ignore[attr-defined]


@pytest.mark.parametrize("region", ["edit", "keep", None])
def test_a_rewards_gradient_reaches_the_pixels_of_its_own_region(tmp_path, data, region):
    regions = {"region_advantages": True, "reward_regions": [region]} if region else {}
    trainer = make(tmp_path, data, bright, reward_gradient_weight=1.0, reward_weights=[3.0], **regions)
    groups = trainer.make_groups([trainer.train_dataset.edit(i) for i in range(2)], 4, ("key",))
    trainer.score_groups(groups)
    found = gather(groups, [(0, 0, 0), (1, 2, 1)], trainer.policy, {})
    pictures = torch.rand(2, 3, 32, 32, requires_grad=True)
    trainer.editor.decode_tensor = lambda clean, height, width: pictures
    weights = trainer.reward_weights.tolist()
    values = reward_of_prediction(
        trainer.editor, found.latents, found.groups, trainer.rewards, weights, trainer.reward_regions
    )
    assert values.tolist() == pytest.approx((3 * pictures.mean((1, 2, 3))).tolist())
    values.sum().backward()
    inside = torch.stack([torch.from_numpy(np.asarray(group.mask) > 127) for group in groups]).unsqueeze(1)
    reached = {"edit": inside, "keep": ~inside, None: torch.ones_like(inside)}[region].expand(-1, 3, -1, -1)
    assert bool(inside.any()) and torch.equal(pictures.grad != 0, reached)


def test_a_rewards_gradient_can_draw_views_that_come_again_in_the_same_run(tmp_path, data):
    seen = []

    def drawn(images, **columns):
        return brightness(images)

    def on_tensors(pictures, generators, **columns):
        seen.append([float(torch.rand(1, generator=generator)) for generator in generators])
        return pictures.mean((1, 2, 3))

    drawn.differentiable = on_tensors  # type: ignore[attr-defined]
    for _ in range(2):
        trainer = make(tmp_path, data, drawn, reward_gradient_weight=1.0, max_steps=2)
        trainer.train()
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert first == second
    everything = [draw for batch in first for draw in batch]
    assert len(set(everything)) == len(everything) > 2  # each candidate of each update has a view of its own


PLACES = [(0, 0, 0), (1, 2, 1), (1, 3, 2)]


@pytest.fixture(scope="module")
def asked(tmp_path_factory, data):
    """A trainer whose rollouts have three steps, transitions at each of them, and the model's answer there."""
    trainer = make(tmp_path_factory.mktemp("asked"), data, bright, num_inference_steps=3)
    groups = trainer.make_groups([trainer.train_dataset.edit(i) for i in range(2)], 4, ("key",))
    trainer.score_groups(groups)
    found = gather(groups, PLACES, trainer.policy, {})
    velocity = trainer.editor.velocity(trainer.model, found.latents, found.timestep, found.conditions)
    return trainer, found, velocity


def test_all_steps_end_where_the_rollout_ended(asked):
    trainer, found, velocity = asked
    result = follow(trainer.editor, trainer.model, found, velocity, 3).clean
    ends = torch.stack([group.trajectory[-1, where[1]] for group, where in zip(found.groups, PLACES, strict=True)])
    torch.testing.assert_close(result, ends, rtol=0, atol=1e-5)
    assert torch.equal(follow(trainer.editor, trainer.model, found, velocity, 9).clean, result)


@pytest.mark.parametrize(("steps", "calls"), [(1, []), (2, [2]), (3, [2, 1])])
def test_a_step_asks_only_where_the_rollout_is_not_over(asked, monkeypatch, steps, calls):
    trainer, found, velocity = asked
    seen, ask = [], trainer.editor.velocity
    monkeypatch.setattr(trainer.editor, "velocity", lambda m, x, t, c: seen.append(len(x)) or ask(m, x, t, c))
    result = follow(trainer.editor, trainer.model, found, velocity, steps).clean
    assert seen == calls
    straight = predict_clean(found.latents, velocity, found.sigma)
    assert torch.equal(result[2], straight[2]) and torch.equal(result[0], straight[0]) == (steps == 1)


def test_the_gradient_is_that_of_the_whole_way(asked):
    """Against finite differences of the rollout's end along a direction of one of the LoRA's weights."""
    trainer, found, _ = asked
    weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    probe = torch.randn(found.latents.shape, generator=torch.Generator().manual_seed(1))

    def value():
        velocity = trainer.editor.velocity(trainer.model, found.latents, found.timestep, found.conditions)
        return (follow(trainer.editor, trainer.model, found, velocity, 3).clean * probe)[0].sum()

    (gradient,) = torch.autograd.grad(value(), [weight])
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight.add_(direction, alpha=sign * 1e-2)
            ends.append(float(value()))
            weight.sub_(direction, alpha=sign * 1e-2)
    expected = (ends[0] - ends[1]) / 2e-2
    assert abs(expected) > 1e-3
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=0.02)


def drawing(near):
    """A generator whose next number is less than 0.01 from the given one."""
    seeds = (seed for seed in range(10_000) if abs(float(torch.rand(1, generator=seeded(seed))) - near) < 0.01)
    return seeded(next(seeds))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_places_are_drawn_from_each_way_alone(asked):
    """Ways of 3, 2 and 1 places: what the model was asked there is what the rollout saw, and no other place comes."""
    trainer, found, velocity = asked
    way = follow(trainer.editor, trainer.model, found, velocity, 3)
    assert way.lengths.tolist() == [3, 2, 1]
    for draw, steps in ((0.0, [0, 1, 2]), (0.4, [1, 1, 2]), (0.999, [2, 2, 2])):
        latents, timesteps, answers = way.places([drawing(draw) for _ in range(3)])
        for i, ((_, anchor, _), step) in enumerate(zip(PLACES, steps, strict=True)):
            group = found.groups[i]
            assert timesteps[i] == group.schedule.timesteps[step]
            torch.testing.assert_close(latents[i], group.trajectory[step, anchor], rtol=0, atol=1e-5)
        again = trainer.editor.velocity(trainer.model, latents, timesteps, found.conditions)
        torch.testing.assert_close(answers, again, rtol=0, atol=1e-4)


def test_the_kl_holds_every_step_that_the_reward_moves(tmp_path, data):
    """Over many groups the drawn places are those of all steps, and the same again after a resume."""
    trainer = make(tmp_path, data, bright, num_inference_steps=3)
    seen = []
    for cycle in range(8):
        groups = trainer.make_groups([trainer.train_dataset.edit(i) for i in range(2)], 4, ("key", cycle))
        trainer.score_groups(groups)
        drawn = []
        for _ in range(2):
            generators = gather(groups, [(0, 0, 0), (1, 1, 0)], trainer.policy, {}).generators("kl")
            drawn.append([int(3 * torch.rand(1, generator=generator)) for generator in generators])
        assert drawn[0] == drawn[1]
        seen += drawn[0]
    assert set(seen) == {0, 1, 2}
