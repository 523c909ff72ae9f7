"""`policies`: the three objectives on flows small enough to solve by hand."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from rcgrpo import RCGRPOConfig
from rcgrpo.data.edits import Edit
from rcgrpo.editors import Conditions, Schedule
from rcgrpo.groups.policies import CLIPPED_AGAIN, FlowGRPOPolicy, NeighborPolicy, NFTPolicy, make_policy, region_mask
from rcgrpo.groups.rollout import Exploration, Group
from rcgrpo.groups.transitions import choose, gather
from rcgrpo.maths.noise import keyed_noise
from rcgrpo.maths.objective import batch_advantages, sde_std, sde_step

STEPS, SIZE, TOKENS, CHANNELS = 4, 6, 5, 3
SIGMAS = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.0])


def conditions_of():
    return Conditions({"prompt_embeds": torch.ones(1, 2, 3)}, torch.ones(1, 2), torch.zeros(1, 1, 1), 32, 32)


def group_of(trajectory, advantages, region=None, regions=None, kick_strength=None, noise_level=0.0):
    picture = Image.new("RGB", (32, 32))
    return Group(
        edit=Edit(0, "train row 0", picture, "do it", torch.ones(32, 32), {}),
        conditions=conditions_of(),
        schedule=Schedule(SIGMAS.to(trajectory.dtype), 1000 * SIGMAS[:-1]),
        region=torch.ones(trajectory.shape[2]) if region is None else region,
        regions=regions,
        trajectory=trajectory,
        images=[picture] * trajectory.shape[1],
        attention=None,
        attention_maps=None,
        kick_strength=kick_strength,
        noise_level=noise_level,
        key=("seed", 0),
        advantages=advantages,
    )


def random_group(rows=None, dtype=torch.float32, **kwargs):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    advantages = draw(SIZE) if rows is None else draw(rows, SIZE)
    advantages = advantages - advantages.mean(-1, keepdim=True)
    given = {"region": draw(TOKENS), "kick_strength": draw(STEPS, SIZE, TOKENS), "noise_level": 0.7} | kwargs
    return group_of(draw(STEPS + 1, SIZE, TOKENS, CHANNELS), advantages, **given)


POLICIES = {
    "latents": NeighborPolicy(temperature=0.05),
    "clean": NeighborPolicy(temperature=0.05, distance_space="clean"),
    "flow_grpo": FlowGRPOPolicy(),
    "nft": NFTPolicy(advantage_clip=0.4, nft_beta=0.7),
}
STOCHASTIC = Exploration(noise_level=0.7, sde_steps=range(STEPS))
ROWS = {"regions": ("edit", "keep"), "importance": (1.0, 0.3)}


# ------------------------------------------------------------------------------------ what every policy keeps


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rows", [None, 2])
def test_gradient_agrees_with_finite_differences(name, rows):
    """A flow of two parameters, v = a x + b, off policy, in float64, where no ratio is at a corner of the clip."""
    options = ({} if name == "nft" else {"epsilon": 0.05, "epsilon_high": 0.1}) | (ROWS if rows else {})
    policy = replace(POLICIES[name], **options)
    group = random_group(rows, torch.float64)
    where = [(0, 1, 0), (0, 4, 2), (0, 2, 3)]
    found = gather([group], where, policy, {})

    def loss(a, b):
        return policy.loss(a * found.latents + b, found)[0]

    loss(torch.tensor(0.5, dtype=torch.float64), torch.tensor(-0.2, dtype=torch.float64))  # the old policy
    assert found.old is not None and not found.old.requires_grad
    new = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.55, -0.1)]
    # NFT remembers a velocity in fp32, which is a constant here
    assert torch.autograd.gradcheck(loss, new, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["latents", "clean", "flow_grpo"])
def test_ratio_is_one_before_the_first_update_and_clips_after_it(name):
    policy = POLICIES[name]
    found = gather([random_group()], [(0, 1, 0), (0, 4, 2)], policy, {})
    _, first = policy.loss(found.latents, found)
    assert first["policy/log_ratio_max"] == 0 and first["clip_ratio/low_mean"] == first["clip_ratio/high_mean"] == 0
    _, second = policy.loss(0.5 * found.latents, found)
    assert second["policy/log_ratio_max"] > 0
    assert second["clip_ratio/low_mean"] + second["clip_ratio/high_mean"] > 0


def test_clipped_share_counts_those_with_a_say_after_the_first_update():
    group = random_group()
    group.advantages[:3] = 0
    found = gather([group], [(0, 1, 0)], NeighborPolicy(), {})
    shares = {}
    for epsilon in (1e-9, 10.0):
        policy = NeighborPolicy(epsilon=epsilon)
        found.old = None
        _, first = policy.loss(found.latents, found)
        assert CLIPPED_AGAIN not in first
        _, second = policy.loss(0.5 * found.latents, found)
        shares[epsilon] = second[CLIPPED_AGAIN]
        both = second["clip_ratio/low_mean"] + second["clip_ratio/high_mean"]
        assert second[CLIPPED_AGAIN] == pytest.approx(2 * both)  # half of the group has a say
    assert shares[10.0] == 0 < shares[1e-9] <= 1


@pytest.mark.parametrize("name", ["latents", "clean", "flow_grpo"])
def test_a_clip_range_that_nobody_gave_is_the_policys_own(name):
    policy, group = POLICIES[name], random_group()
    found = gather([group], [(0, 1, 0), (0, 4, 2)], policy, {})
    policy.loss(found.latents, found)
    velocity = 1.5 * found.latents
    loss, metrics = policy.loss(velocity, found)
    assert metrics[CLIPPED_AGAIN] > 0
    for i, step in enumerate((0, 2)):  # each transition has its own, as steps differ in length
        alone = gather([group], [found.where[i]], policy, {found.where[i]: found.old[i]})
        epsilon, length = float(policy.default_epsilon(alone, alone.weights[:, 0])), SIGMAS[step] - SIGMAS[step + 1]
        if name == "latents":
            assert epsilon == pytest.approx(1e-3 / policy.temperature * float(length))
        if name == "flow_grpo":
            moved = (alone.weights[0, 0] / alone.std[0]).sum() / alone.weights.sum()
            assert epsilon == pytest.approx(4e-4 * float(length.sqrt() * moved), rel=1e-5)
        explicit = replace(policy, epsilon=epsilon)
        torch.testing.assert_close(explicit.loss(velocity[i : i + 1], alone)[0], loss[i : i + 1])
    if name != "flow_grpo":  # log-ratios grow as the temperature falls
        warm, cold = (replace(policy, temperature=t).default_epsilon(alone, alone.weights[:, 0]) for t in (1.0, 0.01))
        assert float(cold) == pytest.approx(100 * float(warm))


@pytest.mark.parametrize("name", ["latents", "clean", "flow_grpo"])
def test_mismatch_is_0_on_the_rollouts_own_policy_and_else_a_share_of_the_step(name):
    policy, group, step, anchor = POLICIES[name], random_group(), 1, 2
    velocity = torch.rand(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(5))
    before, (sigma, next_sigma) = group.trajectory[step, anchor], SIGMAS[step : step + 2]
    if name == "flow_grpo":
        noise = STOCHASTIC.kicks(torch.ones(TOKENS), CHANNELS, SIZE, STEPS, group.key).noise[step, anchor]
        spread = group.kick_strength[step, anchor] * sde_std(sigma, SIGMAS[1], 0.7)
        mean, std = sde_step(before[None], velocity, sigma, next_sigma, spread[None])
        group.trajectory[step + 1, anchor] = (mean + std * noise)[0]
    else:
        group.trajectory[step + 1, anchor] = before + (next_sigma - sigma) * velocity[0]
    found = gather([group], [(0, anchor, step)], policy, {})
    assert policy.mismatch(velocity, found) == 0
    if name == "flow_grpo":
        assert policy.mismatch(1.1 * velocity, found) > 0.01
    else:
        assert policy.mismatch(1.1 * velocity, found) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_a_candidate_without_a_say_teaches_nothing(name):
    policy = POLICIES[name]
    group = random_group()
    group.advantages[2] = 0
    found = gather([group], [(0, 2, 1)], replace(policy), {})
    eligible, _ = policy.teaches(group, range(STEPS))
    if name in ("flow_grpo", "nft"):
        assert eligible == [True, True, False, True, True, True]
        velocity = torch.randn_like(found.latents).requires_grad_()
        policy.loss(velocity.detach(), found)
        loss, _ = policy.loss(velocity, found)
        assert loss.tolist() == [0] and not torch.autograd.grad(loss.sum(), velocity)[0].any()
        assert found.taught.tolist() == [0]
        places = choose([group], policy, SIZE, 1, range(STEPS), ("key",))
        assert sorted(anchor for _, anchor, _ in places) == [0, 1, 3, 4, 5]
    else:
        assert eligible == [True] * SIZE and found.taught.tolist() == [1]


def test_placeholder_of_dropped_groups_costs_nothing():
    for policy in POLICIES.values():
        group = random_group(kick_strength=torch.zeros(STEPS, SIZE, TOKENS))
        group.advantages[:] = 0
        found = gather([group], choose([group], policy, 2, 2, [1, 2], ("key",)), policy, {})
        velocity = torch.randn_like(found.latents).requires_grad_()
        loss, _ = policy.loss(velocity, found)
        assert loss.item() == pytest.approx(0, abs=1e-6) and loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), velocity)[0].abs().max() < 1e-6


# ------------------------------------------------------------------------------------ regions


def test_named_regions():
    regions = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    group = group_of(torch.zeros(5, 2, 3, 1), None, region=torch.tensor([1.0, 1, 0.25]), regions=regions)
    names = ("edit", "keep", "region_1", "region_2", "region_3")
    expected = [[1, 1, 0.25], [0, 0, 0.75], [1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert [region_mask(group, name).tolist() for name in names] == expected
    assert region_mask(replace(group, regions=None), "region_1").tolist() == [1, 1, 0.25]
    assert NeighborPolicy(0.5).weights(group).tolist() == [[1, 1, 0.625]]
    assert NeighborPolicy(regions=("keep", "region_2")).weights(group).tolist() == [[0, 0, 0.75], [0, 1, 0]]


@pytest.mark.parametrize("name", POLICIES)
def test_each_region_feels_its_own_reward_alone(name):
    """Tokens 0, 1 edit, the others keep: a region's gradient comes from its own row, times its weight."""
    region = torch.tensor([1.0, 1, 0, 0, 0])
    group = random_group(rows=2, region=region)
    policy = replace(POLICIES[name], regions=("edit", "keep"), importance=(1.0, 0.5))

    def gradient(policy, group):
        found = gather([group], [(0, 1, 2)], policy, {})
        velocity = (0.5 * found.latents).requires_grad_()
        return torch.autograd.grad(policy.loss(velocity, found)[0].sum(), velocity)[0][0]

    both = gradient(policy, group)
    for row, (own, other, weight) in enumerate([(region > 0, region == 0, 1.0), (region == 0, region > 0, 0.5)]):
        alone = replace(group, advantages=group.advantages.clone())
        alone.advantages[1 - row] = 0
        torch.testing.assert_close(gradient(policy, alone)[own], both[own])
        assert not gradient(policy, alone)[other].any() and both[own].abs().max() > 0
        # and it is section 4 on these tokens
        single = replace(group, advantages=group.advantages[row], region=own.float())
        expected = weight * gradient(replace(POLICIES[name], keep_weight=0.0), single)
        torch.testing.assert_close(both[own], expected[own])


@pytest.mark.parametrize("name", POLICIES)
def test_keep_weight_1_knows_no_region(name):
    policy = replace(POLICIES[name], keep_weight=1.0)
    losses = []
    for region in (torch.ones(TOKENS), torch.tensor([1.0, 0, 0.5, 0, 1])):
        found = gather([random_group(region=region)], [(0, 1, 2)], policy, {})
        policy.loss(found.latents, found)
        losses.append(policy.loss(0.9 * found.latents, found)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", POLICIES)
def test_a_soft_mask_lies_between_hard_ones(name):
    """The gradient on a token is its weight's share: linear in the mask where the weights' sum stays the same."""
    policy = replace(POLICIES[name], keep_weight=0.0)

    def gradient(*region):
        found = gather([random_group(region=torch.tensor(region))], [(0, 1, 2)], policy, {})
        velocity = (0.5 * found.latents).requires_grad_()
        return torch.autograd.grad(policy.loss(velocity, found)[0].sum(), velocity)[0][0]

    first, second = gradient(1.0, 0, 1, 0, 0), gradient(0.0, 1, 1, 0, 0)
    soft = gradient(0.25, 0.75, 1, 0, 0)
    torch.testing.assert_close(soft[0], 0.25 * first[0])
    torch.testing.assert_close(soft[1], 0.75 * second[1])
    assert not soft[3:].any()


# ------------------------------------------------------------------------------------ what each one reads


def test_neighbor_reads_the_group_and_the_others_a_candidate_of_their_own():
    group = random_group()
    found = gather([group], [(0, 3, 1)], POLICIES["latents"], {})
    assert torch.equal(found.candidates[0], group.trajectory[2])
    assert torch.equal(found.advantages[0, 0], group.advantages)
    found = gather([group], [(0, 3, 1)], POLICIES["flow_grpo"], {})
    assert torch.equal(found.candidates[0, 0], group.trajectory[2, 3])
    assert found.advantages[0, 0].tolist() == [group.advantages[3]]
    torch.testing.assert_close(found.std[0], 0.7 * 2 * group.kick_strength[1, 3])  # √(.8 / .2) = 2
    found = gather([group], [(0, 3, 1)], POLICIES["nft"], {})
    noise = keyed_noise((TOKENS, CHANNELS), "seed", 0, "renoise", 3, 1)
    torch.testing.assert_close(found.latents[0], 0.2 * group.trajectory[-1, 3] + 0.8 * noise)
    torch.testing.assert_close(found.candidates[0, 0], noise - group.trajectory[-1, 3])
    assert found.timestep.tolist() == [800] and found.sigma.tolist() == pytest.approx([0.8])


def test_flow_grpo_trains_on_stochastic_steps_alone():
    strength = torch.zeros(STEPS, SIZE, TOKENS)
    strength[1:3, :, :2] = 0.5
    group = random_group(kick_strength=strength)
    assert POLICIES["flow_grpo"].teaches(group, range(STEPS))[1] == [1, 2]
    found = gather([group], [(0, 0, 1)], POLICIES["flow_grpo"], {})
    velocity = found.latents.clone().requires_grad_()
    loss, _ = POLICIES["flow_grpo"].loss(velocity, found)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    assert (gradient[0, :2] != 0).all() and not gradient[0, 2:].any(), "where nothing was injected nothing is learnt"


def test_optimality_by_hand():
    """v_old = 0, target 2, v_θ = 1, β = .5: |.5 - 2|² = 2.25 and |-.5 - 2|² = 6.25; A / clip = -.6 / 1.2 → r = .25."""
    group = group_of(torch.zeros(STEPS + 1, 1, 1, 1), torch.tensor([-0.6]))
    policy = NFTPolicy(nft_beta=0.5, advantage_clip=1.2)
    found = gather([group], [(0, 0, 1)], policy, {})
    found.candidates.fill_(2)
    policy.loss(torch.zeros(1, 1, 1), found)
    loss, numbers = policy.loss(torch.ones(1, 1, 1), found)
    assert loss.item() == pytest.approx(0.25 * 2.25 + 0.75 * 6.25)
    assert numbers == {"policy/velocity_change": 1.0}
    found.advantages.fill_(9.0)  # beyond the clip: entirely good
    assert policy.loss(torch.ones(1, 1, 1), found)[0].item() == pytest.approx(2.25)


# ------------------------------------------------------------------------------------ a flow that theory knows

SPREAD = 0.5
"""Data N(0, .5²): x_σ ~ N(0, V), and the optimal velocity is (σ - (1 - σ) .25) / V · x."""


def variance(sigma):
    return (1 - sigma) ** 2 * SPREAD**2 + sigma**2


def slope(sigma):
    return (sigma - (1 - sigma) * SPREAD**2) / variance(sigma)


def linear_rollout(theta, noise, level=0.0):
    """Euler (or SDE) steps of v = slope · x + θ from given noise; the reward is the result itself."""
    strength = torch.full((STEPS, len(noise), 1), float(level > 0))
    strength[-1] = 0
    trajectory = [noise.view(-1, 1, 1)]
    for step in range(STEPS):
        std = strength[step] * sde_std(SIGMAS[step], SIGMAS[1], level)
        mean, spread = sde_step(
            trajectory[-1], slope(SIGMAS[step]) * trajectory[-1] + theta, SIGMAS[step], SIGMAS[step + 1], std
        )
        trajectory.append(mean + spread * keyed_noise(tuple(mean.shape), "kick", step, float(theta)))
    rewards = trajectory[-1][:, 0, 0]
    (advantages,) = batch_advantages([rewards.unsqueeze(1)], torch.ones(1), power=2.0)
    kicks = strength if level else None
    return group_of(torch.stack(trajectory), advantages, kick_strength=kicks, noise_level=level), rewards


def factors(level=0.0):
    """Of each step, x_{t+1} = own · x_t + push · θ + noise."""
    own, push = [], []
    for step in range(STEPS):
        sigma, dt = float(SIGMAS[step]), float(SIGMAS[step + 1] - SIGMAS[step])
        g2 = 0.0 if step == STEPS - 1 else float(sde_std(SIGMAS[step], SIGMAS[1], level)) ** 2
        shift = 1 + g2 * (1 - sigma) / (2 * sigma)
        own.append(1 + dt * (slope(sigma) * shift + g2 / (2 * sigma)))
        push.append(dt * shift)
    return own, push


def gradient_at(policy, group, theta, steps, anchors):
    where = [(0, anchor, step) for anchor in anchors for step in steps]
    found = gather([group], where, policy, {})
    theta = torch.tensor(theta, requires_grad=True)
    slopes = torch.tensor([slope(float(sigma)) for sigma in found.sigma]).view(-1, 1, 1)
    loss, _ = policy.loss(slopes * found.latents + theta, found)
    return torch.autograd.grad(loss.mean(), theta)[0].item()


def test_neighbor_policy_climbs_a_linear_reward_as_theory_says():
    """grad = -(2/τ) mean_t(dt_t · P_{t+1}) G std(ε), where x_t = P_t ε; the reward then rises by κ Δθ exactly."""
    noise, policy = keyed_noise((16,), "start"), NeighborPolicy(temperature=2.0)
    own, push = factors()
    reach = torch.tensor(own).cumprod(0)
    kappa = sum(push[t] * math.prod(own[t + 1 :]) for t in range(STEPS))
    expected = -(2 / 2.0) * float((torch.tensor(push) * reach).mean()) * 16 * float(noise.std(correction=0))
    theta, before, change = 0.0, None, 0.0
    for _ in range(10):
        group, rewards = linear_rollout(theta, noise)
        if before is not None:
            assert float(rewards.mean()) - before == pytest.approx(kappa * change, rel=1e-3)
            assert kappa * change > 0
        gradient = gradient_at(policy, group, theta, range(STEPS), range(16))
        assert gradient == pytest.approx(expected, rel=1e-4)
        before, change = float(rewards.mean()), -0.05 * gradient
        theta += change


def test_flow_grpo_estimates_the_gradient_of_the_expected_reward():
    """REINFORCE: E[A ∇ log p_t] = ∂E[r]/∂θ through step t alone, over the reward's spread."""
    level, count = 0.7, 3000
    group, rewards = linear_rollout(0.0, keyed_noise((count,), "start"), level)
    own, push = factors(level)
    for step in range(STEPS - 1):
        expected = -push[step] * math.prod(own[step + 1 :]) / float(rewards.std())
        found = gradient_at(FlowGRPOPolicy(), group, 0.0, [step], range(count))
        assert found == pytest.approx(expected, rel=0.12)


def test_nft_pushes_along_the_reward_as_theory_says():
    """E[2β (2r - 1)(v_old - v)] = 2β/clip · σ/V · s0, where s0 is the spread of the results that data and A share."""
    count, policy = 3000, NFTPolicy(nft_beta=0.5, advantage_clip=10.0)
    group, rewards = linear_rollout(0.0, keyed_noise((count,), "start"))
    spread = float(rewards.std())
    for step in (1, 2, 3):
        sigma = float(SIGMAS[step])
        expected = 2 * 0.5 / 10.0 * (slope(sigma) * (1 - sigma) + 1) * spread
        assert gradient_at(policy, group, 0.0, [step], range(count)) == pytest.approx(expected, rel=0.12)
        assert slope(sigma) * (1 - sigma) + 1 == pytest.approx(sigma / variance(sigma))
    kappa = sum(push * math.prod(factors()[0][t + 1 :]) for t, push in enumerate(factors()[1]))
    assert kappa < 0, "so a step against this gradient raises the reward"


# ------------------------------------------------------------------------------------ from the configuration


def config(tmp_path, **options):
    return RCGRPOConfig(str(tmp_path), use_cpu=True, **options)


def test_each_option_reaches_the_policy_and_nothing_else(tmp_path):
    plain = make_policy(config(tmp_path))
    assert plain == NeighborPolicy()
    for name, value in {"keep_weight": 0.3, "epsilon": 0.2, "epsilon_high": 0.3, "temperature": 0.5}.items():
        assert make_policy(config(tmp_path, **{name: value})) == replace(plain, **{name: value})
    assert make_policy(config(tmp_path, distance_space="clean")) == replace(plain, distance_space="clean")
    assert make_policy(config(tmp_path, policy="flow_grpo", epsilon=1e-5)) == FlowGRPOPolicy(epsilon=1e-5)
    given = {"nft_beta": 0.1, "nft_advantage_clip": 2.0, "keep_weight": 1.0}
    nft = make_policy(config(tmp_path, policy="nft", **given))
    assert nft == NFTPolicy(keep_weight=1.0, nft_beta=0.1, advantage_clip=2.0)
    args = config(tmp_path, region_advantages=True, reward_regions=["keep", "edit", "keep"])
    assert args.named_regions == ["keep", "edit"]
    found = make_policy(args, args.named_regions)
    assert found == replace(plain, regions=("keep", "edit"), importance=(1.0, 1.0))
    args = config(
        tmp_path,
        region_advantages=True,
        reward_regions=["keep"],
        attention_reward_weight=0.1,
        region_advantage_weights=[0.5, 1.0],
    )
    assert make_policy(args, args.named_regions).importance == (0.5, 1.0) and args.named_regions == ["keep", "edit"]
