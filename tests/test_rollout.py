import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.data.edits import Edit
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.objective import euler_step, surrogate_log_probs
from rcgrpo.regions import to_tokens
from rcgrpo.rollout import Exploration, Group, make_groups, rollout
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


def test_attention_is_measured_on_the_covered_share(editor):
    edit = edit_of(0)
    group = grouped(editor, [edit], attention="mass")[0]
    with_maps = grouped(editor, [edit], attention="maps")[0]
    covered = to_tokens(edit.mask, (8, 8), "mean")
    torch.testing.assert_close((with_maps.attention_maps.flatten(1) * covered).sum(-1), group.attention.mass)
    torch.testing.assert_close(group.attention.density, group.attention.mass / (100 / 1024))
    assert group.attention_maps is None
