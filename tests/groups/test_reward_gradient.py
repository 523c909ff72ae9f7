"""`reward_gradient.py`: where a prediction ends, and which pixels a reward's gradient reaches."""

import numpy as np
import pytest
import torch

from rcgrpo.groups.reward_gradient import predict_result, reward_of_prediction, reward_pull
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
    result = predict_result(trainer.editor, trainer.model, found, velocity, 3)
    ends = torch.stack([group.trajectory[-1, where[1]] for group, where in zip(found.groups, PLACES, strict=True)])
    torch.testing.assert_close(result, ends, rtol=0, atol=1e-5)
    assert torch.equal(predict_result(trainer.editor, trainer.model, found, velocity, 9), result)


@pytest.mark.parametrize(("steps", "calls"), [(1, []), (2, [2]), (3, [2, 1])])
def test_a_step_asks_only_where_the_rollout_is_not_over(asked, monkeypatch, steps, calls):
    trainer, found, velocity = asked
    seen, ask = [], trainer.editor.velocity
    monkeypatch.setattr(trainer.editor, "velocity", lambda m, x, t, c: seen.append(len(x)) or ask(m, x, t, c))
    result = predict_result(trainer.editor, trainer.model, found, velocity, steps)
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
        return (predict_result(trainer.editor, trainer.model, found, velocity, 3) * probe)[0].sum()

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


def test_the_pull_is_the_rewards_slope_at_the_transitions_own_answer(asked):
    """Against finite differences along the pull itself: later calls move with what the answer leads to."""
    trainer, found, velocity = asked
    given = (trainer.rewards, [3.0], [], 3)
    values, pull = reward_pull(trainer.editor, trainer.model, found, velocity, *given)
    assert pull.shape == velocity.shape and not pull.requires_grad and not values.requires_grad
    scaled = reward_pull(trainer.editor, trainer.model, found, velocity, *given, scale=64.0)[1]
    torch.testing.assert_close(scaled, pull, rtol=1e-4, atol=1e-9)
    step = 1.0 / pull.flatten(1).norm(dim=1).view(-1, 1, 1)
    moved = [reward_pull(trainer.editor, trainer.model, found, velocity + s * step * pull, *given)[0] for s in (1, -1)]
    slope = (moved[0] - moved[1]) / 2 / step.flatten()
    torch.testing.assert_close(slope, pull.flatten(1).square().sum(1), rtol=0.1, atol=0)


def test_parameters_learn_of_the_reward_at_the_transition_alone(asked):
    """The loss's gradient is the pull's through the transition's own call, clipped, and nothing of the calls behind."""
    trainer, found, _ = asked
    args = trainer.args
    args.reward_gradient_weight, args.reward_gradient_steps = 2.0, 3
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]

    def gradients(loss):
        found.old = None
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])

    def answer():
        return trainer.editor.velocity(trainer.model, found.latents, found.timestep, found.conditions)

    try:
        plain, followed = answer(), {}
        _, pull = reward_pull(
            trainer.editor, trainer.model, found, plain, trainer.rewards, trainer.reward_weights.tolist(), [], 3
        )
        norms = pull.flatten(1).norm(dim=1)
        limit = float(norms.median())
        for clip in (None, limit):
            args.reward_gradient_clip = clip
            with_reward = gradients(trainer.loss_of(trainer.model, plain, found))
            args.reward_gradient_weight = 0.0
            followed[clip] = with_reward - gradients(trainer.loss_of(trainer.model, plain, found))
            args.reward_gradient_weight = 2.0
        assert trainer._metrics["train"]["reward_gradient/norm"][-1] == pytest.approx(limit)
        for clip, found_there in followed.items():
            short = torch.ones_like(norms) if clip is None else (clip / norms).clamp(max=1)
            expected = gradients(-2.0 * (plain * pull * short.view(-1, 1, 1)).sum() / len(norms))
            torch.testing.assert_close(found_there, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        assert 0 < float(followed[limit].norm()) < 0.95 * float(followed[None].norm())
    finally:
        args.reward_gradient_weight, args.reward_gradient_steps, args.reward_gradient_clip = 0.0, 1, None
