from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rcgrpo import RCGRPOConfig
from rcgrpo.data.edits import Edit
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.editors.attention import AttentionOptions
from rcgrpo.groups.policies import make_policy
from rcgrpo.groups.rollout import Exploration, Group, make_groups, rollout, words_of
from rcgrpo.groups.transitions import gather
from rcgrpo.maths.objective import euler_step, sde_std, sde_step, surrogate_log_probs
from rcgrpo.maths.regions import to_tokens
from tiny_kontext import build_tiny_kontext

STEPS = 3


def picture(seed, width=32, height=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def edit_of(row, prompt="make it red", width=32, height=32):
    mask = torch.zeros(height, width)
    mask[4 + row : 14 + row, 8:18] = 1
    return Edit(row, f"train row {row}", picture(row, width, height), prompt, mask, {})


def editor_of(dtype=torch.float32, scheduler=None):
    pipe = build_tiny_kontext().to(dtype)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return FluxKontextEditor(pipe, 32, STEPS, max_sequence_length=48)


@pytest.fixture(scope="module")
def editor():
    return editor_of()


def batch(editor, group=3):
    conditions = editor.encode([picture(1), picture(2)], ["make it red", "add a small boat"]).repeat(group)
    noise = torch.randn(2 * group, 64, 16, generator=torch.Generator().manual_seed(0))
    region = torch.rand(2 * group, 64, generator=torch.Generator().manual_seed(1))
    return noise, conditions, region


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_micro_batches_change_nothing(editor, batch_size):
    noise, conditions, region = batch(editor)
    whole = rollout(editor, editor.pipeline.transformer, noise, conditions, region, maps=True)
    parts = rollout(editor, editor.pipeline.transformer, noise, conditions, region, batch_size, maps=True)
    assert whole[0].shape == (STEPS + 1, 6, 64, 16)
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-5)
    for name in ("mass", "density", "contrast"):
        torch.testing.assert_close(getattr(parts[1], name), getattr(whole[1], name), rtol=0, atol=1e-5)
    torch.testing.assert_close(parts[2], whole[2], rtol=0, atol=1e-6)
    torch.testing.assert_close((whole[2] * region).sum(-1), whole[1].mass)


def test_micro_batches_of_a_multistep_solver_start_afresh():
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)
    editor = editor_of(scheduler=scheduler)
    noise, conditions, _ = batch(editor)
    whole, *_ = rollout(editor, editor.pipeline.transformer, noise, conditions)
    parts, *_ = rollout(editor, editor.pipeline.transformer, noise, conditions, batch_size=2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_euler_step_is_the_rolled_out_one_to_the_last_bit(dtype):
    editor = editor_of(dtype)
    noise, conditions, _ = batch(editor)
    trajectory, *_ = rollout(editor, editor.pipeline.transformer, noise, conditions)
    assert trajectory.dtype == torch.float32 and torch.equal(trajectory[0], noise)
    schedule = editor.schedule(32, 32)
    for t, timestep in enumerate(schedule.timesteps):
        velocity = editor.velocity(editor.pipeline.transformer, trajectory[t], timestep.expand(6), conditions)
        assert velocity.requires_grad, "the replay is what trains"
        sigmas = schedule.sigmas[t : t + 2].unsqueeze(1).expand(2, 6)
        predicted = euler_step(trajectory[t], velocity, *sigmas).detach()
        assert torch.equal(predicted, trajectory[t + 1])  # so every anchor's distance to itself is exactly 0
        # and the policy of each anchor over its group prefers the anchor itself
        groups = trajectory[t + 1].unflatten(0, (2, 3)).repeat_interleave(3, 0)
        log_probs = surrogate_log_probs(groups, predicted, torch.ones(6, 64), 0.01)
        assert log_probs.argmax(-1).tolist() == [0, 1, 2, 0, 1, 2]


def test_rollout_leaves_no_gradient_and_no_trace_in_the_scheduler(editor):
    noise, conditions, _ = batch(editor)
    first, *_ = rollout(editor, editor.pipeline.transformer, noise, conditions)
    second, *_ = rollout(editor, editor.pipeline.transformer, noise, conditions)
    assert not first.requires_grad
    assert torch.equal(first, second)


def test_exploration_moves_the_region_alone():
    region = (torch.arange(64) < 10).float()
    noise = Exploration(edit_strength=0.7).noise(region, 16, 4, ("seed", 0))
    assert noise.shape == (4, 64, 16)
    assert (noise[:, 10:] == noise[:1, 10:]).all()
    assert all((noise[i, :10] != noise[0, :10]).all() for i in range(1, 4))
    assert torch.equal(noise, Exploration(edit_strength=0.7).noise(region, 16, 4, ("seed", 0)))
    assert not torch.equal(noise, Exploration(edit_strength=0.7).noise(region, 16, 4, ("seed", 1)))


def test_antithetic_exploration_mirrors_about_the_base():
    region = torch.ones(64)
    noise = Exploration(0.6, antithetic=True).noise(region, 16, 4, ("seed", 0))
    base = Exploration(0.0).noise(region, 16, 1, ("seed", 0))
    torch.testing.assert_close((noise[:2] + noise[2:]) / 2, 0.8 * base.expand(2, -1, -1), rtol=0, atol=1e-6)
    # the evaluation's single picture needs no mirror image
    assert Exploration(0.6, antithetic=True).noise(region, 16, 1, ("seed", 0)).shape == (1, 64, 16)


REGION = (torch.arange(64) < 10).float()
PLAIN = Exploration(edit_strength=0.7)


@pytest.mark.parametrize(
    ("option", "inside", "outside", "members"),
    [
        ({"edit_strength": 0.3}, True, False, range(4)),
        ({"keep_strength": 0.1}, False, True, range(4)),
        ({"kind": "global"}, False, True, range(4)),
        ({"antithetic": True}, True, False, [2, 3]),
        ({"independent_share": 0.25}, True, True, [3]),
        ({"mask_growth": 0.5}, False, False, []),  # grows masks, before they get here
        ({"regions_column": "labels"}, False, False, []),
        ({"region_strengths": [0.2]}, True, False, range(4)),
        (
            {"noise_level": 0.7, "sde_steps": [0], "sde_window": 1},
            False,
            False,
            [],
        ),  # acts on the way
    ],
)
def test_each_option_changes_its_part_of_the_noise_and_nothing_else(option, inside, outside, members):
    plain = PLAIN.noise(REGION, 16, 4, ("seed", 0))
    changed = replace(PLAIN, **option).noise(REGION, 16, 4, ("seed", 0)) != plain
    for member in range(4):
        assert bool(changed[member, :10].any()) == (inside and member in members)
        assert bool(changed[member, 10:].any()) == (outside and member in members)


@given(st.floats(0, 1), st.floats(0, 1), st.booleans(), st.sampled_from([0.0, 0.5]), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=25)
def test_global_exploration_is_a_region_of_ones(edit_strength, keep_strength, antithetic, share, bits):
    exploration = Exploration(edit_strength, keep_strength, antithetic, independent_share=share)
    region = torch.tensor([float(bits >> token & 1) for token in range(64)])
    everywhere = replace(exploration, kind="global").noise(region, 16, 4, ("seed", 0))
    assert torch.equal(everywhere, exploration.noise(torch.ones(64), 16, 4, ("seed", 0)))


def test_a_soft_mask_softens_the_perturbation():
    region = torch.linspace(0, 1, 64)
    noise = PLAIN.noise(region, 16, 2, ("seed", 0))
    pair = (noise[0] - noise[1]).square().mean(-1)
    assert pair[0] == 0 and pair[:20].mean() < pair[20:40].mean() < pair[40:].mean()
    assert torch.equal(PLAIN.strength(region, 2), (0.7 * region).expand(2, -1))


def test_an_independent_candidate_shares_nothing_with_its_group():
    noise = replace(PLAIN, independent_share=0.25).noise(REGION, 16, 4, ("seed", 0))
    assert (noise[:3, 10:] == noise[0, 10:]).all() and (noise[3] != noise[0]).all()
    paired = replace(PLAIN, independent_share=0.5, antithetic=True).noise(REGION, 16, 4, ("seed", 0))
    assert torch.equal(paired[1], -paired[3]) and (paired[0, 10:] == paired[2, 10:]).all()
    # and evaluation draws its single picture as ever
    alone = replace(PLAIN, independent_share=1.0).noise(REGION, 16, 1, ("seed", 0))
    assert torch.equal(alone, PLAIN.noise(REGION, 16, 1, ("seed", 0)))


def labelled(row, second=2):
    """An edit with two regions, of tokens 0..1 × 0..1 and 4..7 × 4..7."""
    labels = np.zeros((32, 32), np.uint8)
    labels[:8, :8], labels[16:, 16:] = 1, second
    edit = edit_of(row)
    return replace(edit, columns={"labels": Image.fromarray(labels)})


def test_several_regions_have_their_own_strengths(editor):
    exploration = Exploration(regions_column="labels", region_strengths=[0.0, 0.9])
    model = editor.pipeline.transformer
    group, other = make_groups(editor, model, [labelled(0), labelled(1)], 2, exploration, ("key",))
    assert group.regions.sum(-1).tolist() == [4, 16] and torch.equal(group.region, group.regions.amax(0))
    start = group.trajectory[0]
    differs = (start[0] != start[1]).all(-1)
    assert torch.equal(differs, group.regions[1] > 0), "a strength of 0 leaves the first region as the background"
    assert (other.trajectory[0] != start).all()
    with pytest.raises(
        ValueError, match="region_strengths: got 2 of them, expected 3 for train row 5, column 'labels'"
    ):
        exploration.masks(labelled(5, second=3))
    with pytest.raises(ValueError, match="train row 4, column 'labels': got nothing, expected labels or masks"):
        exploration.masks(edit_of(4))


# ------------------------------------------------------------------------------------ noise on the way

STOCHASTIC = Exploration(edit_strength=0.5, noise_level=0.7, sde_steps=[0, 1])


def test_kicks_are_drawn_for_the_window_and_scaled_by_the_region():
    kicks = STOCHASTIC.kicks(REGION, 16, 4, STEPS, ("seed", 0))
    assert kicks.noise.shape == (STEPS, 4, 64, 16) and kicks.noise_level == 0.7
    assert (kicks.strength[:2] == 0.5 * REGION).all() and not kicks.strength[2].any()
    assert len({float(x) for x in kicks.noise[:2].flatten()}) == 2 * 4 * 64 * 16, "each step and member has its own"
    assert PLAIN.kicks(REGION, 16, 4, STEPS, ("seed", 0)) is None
    window = replace(STOCHASTIC, sde_steps=[0, 1, 2], sde_window=2)
    chosen = {
        tuple(window.kicks(REGION, 1, 2, STEPS, ("seed", row)).strength.flatten(1).any(-1).tolist()) for row in range(9)
    }
    assert chosen == {(True, True, False), (False, True, True)}


def test_stochastic_rollout_is_the_ode_plus_its_kicks(editor):
    model = editor.pipeline.transformer
    edits = [edit_of(0), edit_of(1)]
    plain = make_groups(editor, model, edits, 3, Exploration(0.5), ("key",))
    kicked = make_groups(editor, model, edits, 3, STOCHASTIC, ("key",))
    for before, after in zip(plain, kicked, strict=True):
        assert torch.equal(before.trajectory[0], after.trajectory[0])
        assert before.kick_strength is None and after.kick_strength.shape == (STEPS, 3, 64)
        inside = after.region > 0
        moved = (after.trajectory[1] - before.trajectory[1]).abs().amax(-1)
        assert (moved[:, inside] > 1e-2).all() and moved[:, ~inside].max() < 1e-5
        # what is left of the step after its mean is the noise that was drawn
        sigmas = after.schedule.sigmas
        conditions = after.conditions.repeat(3)
        with torch.no_grad():
            velocity = editor.velocity(model, after.trajectory[1], after.schedule.timesteps[1].expand(3), conditions)
        std = after.kick_strength[1] * sde_std(sigmas[1], sigmas[1], 0.7)
        mean, spread = sde_step(after.trajectory[1], velocity, sigmas[1], sigmas[2], std)
        noise = STOCHASTIC.kicks(after.region, 16, 3, STEPS, ("key", after.edit.row)).noise[1]
        torch.testing.assert_close(after.trajectory[2], mean + spread * noise, rtol=0, atol=1e-5)


def test_no_strength_makes_a_stochastic_rollout_the_ode(editor):
    model, still = editor.pipeline.transformer, replace(STOCHASTIC, edit_strength=0.0)
    (plain,) = make_groups(editor, model, [edit_of(0)], 2, Exploration(0.0), ("key",))
    (kicked,) = make_groups(editor, model, [edit_of(0)], 2, still, ("key",))
    torch.testing.assert_close(kicked.trajectory, plain.trajectory, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["neighbor", "flow_grpo", "nft"])
@pytest.mark.parametrize("region", [True, False])
def test_every_policy_learns_from_its_rollout_with_and_without_the_region(editor, tmp_path, policy, region):
    """A step against the gradient raises what the candidate with the advantage would say."""
    options = {"num_inference_steps": STEPS, "num_policy_steps": 1, "policy_steps_range": [0, 0.7]}
    constraint = {} if region else {"exploration": "global", "keep_weight": 1.0}
    args = RCGRPOConfig(str(tmp_path), use_cpu=True, policy=policy, **options, **constraint)
    exploration = replace(
        STOCHASTIC if policy == "flow_grpo" else PLAIN, kind=args.exploration, edit_strength=args.edit_strength
    )
    (group,) = make_groups(editor, editor.pipeline.transformer, [edit_of(0)], 4, exploration, ("key",))
    group.advantages = torch.tensor([1.5, -0.5, -0.5, -0.5])
    found = gather([group], [(0, 0, 1)], make_policy(args), {})
    velocity = editor.velocity(editor.pipeline.transformer, found.latents, found.timestep, found.conditions)
    velocity = velocity.detach().requires_grad_()
    loss, _ = make_policy(args).loss(velocity, found)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    assert gradient.abs().max() > 0
    outside = gradient[0, group.region == 0].abs().max()
    inside = gradient[0, group.region > 0].abs().max()
    if not region:
        assert outside > 0.1 * inside
    else:  # kept tokens have a tenth of the weight, and no noise of their own to learn from
        assert outside == 0 if policy == "flow_grpo" else outside < inside
    after, _ = make_policy(args).loss(velocity.detach() - 0.01 * gradient / gradient.norm(), found)
    assert after.item() < loss.item()


EXPLORATION = Exploration(edit_strength=0.9)


def grouped(editor, edits, size=3, **kwargs) -> list[Group]:
    return make_groups(editor, editor.pipeline.transformer, edits, size, EXPLORATION, ("key",), **kwargs)


def test_groups_come_in_the_order_of_the_edits_whatever_their_size(editor):
    edits = [edit_of(0), edit_of(1, width=48), edit_of(2, "add a small boat"), edit_of(3, width=48)]
    groups = grouped(editor, edits, attention="maps")
    assert [group.edit.row for group in groups] == [0, 1, 2, 3]
    assert [group.size for group in groups] == [(32, 32), (24, 36)] * 2
    assert (groups[0].trajectory[0] != groups[2].trajectory[0]).all(), "each edit has its own noise"
    for edit, group in zip(edits, groups, strict=True):
        alone = grouped(editor, [edit], attention="maps")[0]
        torch.testing.assert_close(group.trajectory, alone.trajectory, rtol=0, atol=1e-5)
        torch.testing.assert_close(group.attention.mass, alone.attention.mass, rtol=0, atol=1e-5)
        torch.testing.assert_close(group.attention_maps, alone.attention_maps, rtol=0, atol=1e-5)
        assert torch.equal(group.region, to_tokens(edit.mask, editor.grid_for(*group.size), "max"))
        assert len(group.conditions) == 1 and len(group.images) == 3
        assert {image.size for image in group.images} == {group.size[::-1]}
        assert group.attention_maps.shape == (3, *editor.grid_for(*group.size))
        assert group.source.size == group.mask.size == group.size[::-1]


def test_candidates_of_a_group_start_alike_outside_the_region(editor):
    group = grouped(editor, [edit_of(0)])[0]
    start = group.trajectory[0]
    outside = group.region == 0
    assert 0 < outside.sum() < 64
    assert (start[:, outside] == start[:1, outside]).all()
    assert (start[1:, ~outside] != start[:1, ~outside]).all()
    assert group.attention is None and group.attention_maps is None
    for latents, image in zip(group.trajectory[-1], group.images, strict=True):
        (alone,) = editor.decode(latents[None], 32, 32)
        assert np.abs(np.asarray(alone, int) - np.asarray(image, int)).max() <= 1


def test_mask_growth_widens_exploration_but_not_the_mask_that_rewards_see(editor):
    edit = edit_of(0)
    model = editor.pipeline.transformer
    grown = make_groups(editor, model, [edit], 2, Exploration(mask_growth=4 / 32), ("key",))[0]
    plain = grouped(editor, [edit])[0]
    # pixels 4..13 × 8..17 touch 3 × 3 tokens; grown by 4, pixels 0..17 × 4..21 touch 5 × 5
    assert plain.region.sum() == 9 and grown.region.sum() == 25
    assert np.asarray(grown.mask).sum() == np.asarray(plain.mask).sum() == 255 * 100
    assert (np.asarray(grown.mask) == edit.mask.numpy() * 255).all()


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_attention_of_some_blocks_steps_and_words(solver):
    """Blocks and steps add up to the whole, weighted by how many model calls a step has."""
    editor = editor_of()
    editor = FluxKontextEditor(editor.pipeline, 32, STEPS, max_sequence_length=48, solver=solver)
    edits = [replace(edit_of(row), columns={"what": what}) for row, what in ((0, "red"), (1, ["make", "red"]))]

    def mass(**options):
        groups = grouped(editor, edits, attention="mass", options=AttentionOptions(**options))
        return torch.stack([group.attention.mass for group in groups])

    whole = mass()
    assert torch.equal(whole, torch.stack([g.attention.mass for g in grouped(editor, edits, attention="mass")]))
    blocks = [mass(blocks=[block]) for block in range(4)]
    torch.testing.assert_close(torch.stack(blocks).mean(0), whole)
    calls = torch.tensor([2.0, 2.0, 1.0] if solver == "heun" else [1.0] * 3)
    steps = torch.stack([mass(steps_range=(i / 3, (i + 1) / 3)) for i in range(3)])
    torch.testing.assert_close((steps * (calls / calls.sum()).view(3, 1, 1)).sum(0), whole)
    assert (steps[0] - steps[2]).abs().max() > 1e-4
    words = mass(words_column="what")
    assert not torch.allclose(words, whole, atol=1e-4)
    edits = [replace(edit, columns={"what": "make it red"}) for edit in edits]
    torch.testing.assert_close(mass(words_column="what"), whole)
    assert not torch.allclose(mass(direction="image_to_text"), whole, atol=1e-3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "got None, expected words"),
        ([], r"got \[\], expected words"),
        (["red", 3], r"got \['red', 3\], expected words"),
        ("boat", r"got \['boat'\], expected words of 'make it red'"),
    ],
)
def test_words_that_an_instruction_does_not_have(value, message):
    edit = replace(edit_of(0), columns={"what": value})
    with pytest.raises(ValueError, match=f"train row 0, column 'what': {message}"):
        words_of(edit, "what")


def test_attention_is_measured_on_the_covered_share(editor):
    edit = edit_of(0)
    group = grouped(editor, [edit], attention="mass")[0]
    with_maps = grouped(editor, [edit], attention="maps")[0]
    covered = to_tokens(edit.mask, (8, 8), "mean")
    torch.testing.assert_close((with_maps.attention_maps.flatten(1) * covered).sum(-1), group.attention.mass)
    torch.testing.assert_close(group.attention.density, group.attention.mass / (100 / 1024))
    assert group.attention_maps is None
