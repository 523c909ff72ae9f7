"""`trainer.py`: what must hold for any model, checked on a random one of 32 x 32 pixels."""

import json
import logging
import socket
from dataclasses import fields, replace
from importlib.util import find_spec

import datasets
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxKontextPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

import rcgrpo.policies
from processes import on_processes
from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
from rcgrpo.attention import AttentionOptions
from rcgrpo.evaluation import judge_held_out
from rcgrpo.objective import quasi_norm
from rcgrpo.rewards import RequiredRewardError, RewardError
from rcgrpo.rollout import make_groups
from rcgrpo.transitions import gather
from tiny_kontext import TINY_CALL, build_tiny_kontext, in_own_memory

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = ["to_q", "to_v", "to_k", "to_out.0"]


@pytest.fixture(scope="module")
def data():
    return compbench_mini("train", 12, 32)


@pytest.fixture(scope="module")
def held_out():
    return compbench_mini("test", 3, 32)


def brightness(images, **columns):
    return [float(np.asarray(image).mean()) / 255 for image in images]


def redness(images, **columns):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def by_number(images, prompts, **columns):
    """Blind, because eight-bit pixels would blow up the last bits in which batches of other shapes differ."""
    return [float((len(prompt) + i) % 4 % 3) for i, prompt in enumerate(prompts)]


def flat_for_removals(task, **columns):
    return [0.5 if t == "remove" else score for t, score in zip(task, by_number(**columns), strict=True)]


def make(folder, data, reward=brightness, eval_dataset=None, pipe=None, peft=True, callbacks=None, **options):
    """A trainer whose optimizer is plain SGD, so that weights show gradients."""
    small = {"resolution": 32, "max_sequence_length": 16, "num_inference_steps": 3, "num_policy_steps": 2}
    small |= {"policy_steps_range": [0, 1], "num_generations": 4, "num_anchors": 2, "max_steps": 2}
    small |= {"per_device_train_batch_size": 2, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant"}
    small |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS) if peft is True else peft
    pipe = pipe or build_tiny_kontext()
    pipe.set_progress_bar_config(disable=True)
    args = RCGRPOConfig(str(folder), **(small | options))
    return RCGRPOTrainer(pipe, reward, args, data, eval_dataset, lora, callbacks)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def trained_step_by_step(trainer):
    """Weights after each update."""
    found = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append(weights(trainer))

    trainer.add_callback(Keep())
    trainer.train()
    return found


def distance(new, old, start):
    """Relative to how far training moved."""
    norm = sum((old[name] - start[name]).square().sum() for name in old).sqrt()
    assert norm > 0
    return float(sum((new[name] - old[name]).square().sum() for name in old).sqrt() / norm)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(trainer, first=0):
    timing = ("step_time", "train_", "eval_runtime", "eval_samples", "eval_step")
    rows = [row for row in trainer.state.log_history if row["step"] > first and "train_runtime" not in row]
    return [{k: v for k, v in row.items() if not k.startswith(timing)} for row in rows]


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    source = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    generator = torch.Generator().manual_seed(3)
    return pipe(image=source, prompt="remove it", generator=generator, output_type="np", **TINY_CALL).images


def last(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


# ------------------------------------------------------------------------------------------ invariants


@pytest.mark.parametrize(
    "shape",
    [
        {"per_device_train_batch_size": 1},
        {"train_micro_batch_size": 3, "rollout_batch_size": 5, "bf16": True},
        {"num_iterations": 2, "attention_reward_weight": 0.1, "beta": 0.1},
        {"num_iterations": 2, "train_micro_batch_size": 3, "bf16": True},
    ],
)
def test_ratio_is_one_exactly_until_the_first_update(tmp_path, data, shape):
    trainer = make(tmp_path, data, epsilon=0.2, **shape)  # or the second update clips every ratio
    trainer.train()
    first, second = last(trainer, "policy/log_ratio_max")
    assert first == 0
    assert (second > 0) == ("num_iterations" in shape)
    assert all(norm > 0 for norm in last(trainer, "grad_norm"))


@pytest.mark.parametrize(("bf16", "attention"), [(False, 0.0), (False, 0.1), (True, 0.0)])
def test_update_takes_an_anchor_where_the_rollout_took_it(tmp_path, data, monkeypatch, bf16, attention):
    """In one batch shape; the trainer's own ratio could not tell, as its old policy is its first forward."""
    seen = []

    def spy(candidates, predicted, *rest, _original=rcgrpo.policies.surrogate_log_probs):
        seen.append((candidates, predicted.detach()))
        return _original(candidates, predicted, *rest)

    monkeypatch.setattr(rcgrpo.policies, "surrogate_log_probs", spy)
    shape = {"per_device_train_batch_size": 1, "num_anchors": 4, "num_policy_steps": 1}  # 4 candidates, 4 transitions
    trainer = make(tmp_path, data, bf16=bf16, attention_reward_weight=attention, max_steps=1, **shape)
    where = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs: where.extend(inputs.where) or compute_loss(model, inputs)
    trainer.train()
    ((candidates, predicted),) = seen
    assert sorted(anchor for _, anchor, _ in where) == [0, 1, 2, 3]
    for i, (_, anchor, _) in enumerate(where):
        off, apart = ((predicted[i] - candidates[i, other]).norm() for other in (anchor, anchor - 1))
        assert off < 1e-4 * apart  # zero on most CPUs; some round a row by its place in the batch


FLOW_GRPO = {"policy": "flow_grpo", "policy_steps_range": [0, 0.7]}
OPTIONS = {
    "flow_grpo": FLOW_GRPO,
    "flow_grpo without region": FLOW_GRPO | {"exploration": "global", "keep_weight": 1.0},
    "flow_grpo in a window": FLOW_GRPO | {"sde_window": 1, "num_policy_steps": 1, "beta": 0.1},
    "nft": {"policy": "nft"},
    "nft without region": {"policy": "nft", "exploration": "global", "keep_weight": 1.0, "train_micro_batch_size": 3},
    "solver": {"solver": "heun"},
    "true CFG": {"true_cfg_scale": 2.0, "negative_prompt": "blurry", "attention_reward_weight": 0.1},
    "hinge": {"keep_hinge_weight": 1.0},
    "batch": {"scale_rewards": "batch", "epsilon_high": 0.5},
    "independent": {"independent_share": 0.5},
    "region advantages": {"region_advantages": True, "reward_regions": ["edit"], "attention_reward_weight": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_and_meets_its_old_policy_exactly(tmp_path, data, name):
    # A wide clip, as these first updates are large and a group whose every ratio is clipped has no gradient.
    trainer = make(tmp_path, data, **({"num_iterations": 2, "epsilon": 0.2} | OPTIONS[name]))
    start = weights(trainer)
    trainer.train()
    measure = "policy/velocity_change" if name.startswith("nft") else "policy/log_ratio_max"
    first, second = last(trainer, measure)
    assert first == 0 < second
    assert all(0 < norm < float("inf") for norm in last(trainer, "grad_norm"))
    assert not same(weights(trainer), start)
    assert ("keep_hinge" in trainer.state.log_history[0]) == (name == "hinge")


def test_evaluation_of_a_stochastic_policy_follows_the_ode(tmp_path, data, held_out):
    results = [make(tmp_path, data, eval_dataset=held_out, **o).evaluate() for o in ({}, FLOW_GRPO)]
    assert results[0]["eval_reward"] == results[1]["eval_reward"]


def test_region_advantages_are_compared_within_their_rewards(tmp_path, data):
    def first(images, **columns):
        return [float(i % 4) for i in range(len(images))]

    def second(images, **columns):
        return [float(-((i % 4) ** 2)) for i in range(len(images))]

    def third(images, **columns):
        return [1.0] * len(images)

    options = {"region_advantages": True, "advantage_power": 2.0, "reward_weights": [1.0, 3.0, 1.0]}
    trainer = make(tmp_path, data, [first, second, third], reward_regions=["keep", "edit", "edit"], **options)
    (group,) = rolled_out(trainer, data)
    one, other = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, -1.0, -4.0, -9.0])
    expected = [(values - values.mean()) / values.std() for values in (one, other)]
    assert np.allclose(group.advantages.numpy(), expected, atol=1e-4)
    assert np.allclose(group.scores.numpy(), one + 3 * other + 1)
    with pytest.raises(ValueError, match="reward_regions: got 1, expected 2, a region for each reward"):
        make(tmp_path, data, [first, second], reward_regions=["keep"], region_advantages=True)


def test_the_log_tells_regions_apart(tmp_path, data):
    def rising(images, **columns):
        return [float(i % 4) for i in range(len(images))]

    def flat(images, **columns):
        return [0.25] * len(images)

    options = {"region_advantages": True, "advantage_power": 2.0, "reward_weights": [2.0, 1.0, 1.0]}
    regions = ["edit", "keep", "keep"]
    flatter = lambda images, **columns: [0.5] * len(images)  # noqa: E731
    trainer = make(tmp_path, data, [rising, flat, flatter], reward_regions=regions, max_steps=1, **options)
    trainer.train()
    row = {k: v for k, v in trainer.state.log_history[0].items() if k.startswith("regions/")}
    spread = np.std([0.0, 2.0, 4.0, 6.0])
    assert row.pop("regions/edit/reward_std") == pytest.approx(spread, rel=1e-4)
    assert row.pop("regions/edit/advantage_std") == pytest.approx(1, rel=1e-4)
    assert row == {
        "regions/edit/reward": 3.0,
        "regions/edit/frac_reward_zero_std": 0.0,
        "regions/keep/reward": 0.75,
        "regions/keep/reward_std": 0.0,
        "regions/keep/frac_reward_zero_std": 1.0,
        "regions/keep/advantage_std": 0.0,
    }


def test_several_regions_reach_noise_and_objective(tmp_path, data, caplog):
    def labels(row):
        mask = np.asarray(row["mask"].convert("L")) > 127
        left = np.arange(mask.shape[1]) < np.argwhere(mask)[:, 1].mean()
        return {"labels": Image.fromarray((mask * np.where(left, 1, 2)).astype(np.uint8))}

    regions = {"regions_column": "labels", "region_strengths": [0.0, 0.9], "mask_growth": 0.0}
    objective = {"region_advantages": True, "reward_regions": ["region_2"]}
    rows = data.map(labels, features=datasets.Features({**data.features, "labels": datasets.Image()}))
    trainer = make(tmp_path, rows, **regions, **objective)
    (group,) = rolled_out(trainer, rows)
    assert group.regions.shape == (2, 64) and group.advantages.shape == (1, 4)
    start = group.trajectory[0]
    assert torch.equal((start[0] != start[1]).all(-1), group.regions[1] > 0)
    trainer.train()
    assert last(trainer, "grad_norm")[0] > 0
    with pytest.raises(ValueError, match="train row 0, column 'labels': got nothing"):
        make(tmp_path, data, **regions)
    assert "reward_regions" not in caplog.text
    named = {**regions, **objective, "reward_regions": ["region_3"], "region_strengths": None}
    trainer = make(tmp_path, rows, max_steps=1, **named)
    assert "none of the checked rows of train_dataset has region_3, so rewards there teach nothing" in caplog.text
    trainer.train()
    assert last(trainer, "regions/region_3/frac_reward_zero_std") == [1.0] and last(trainer, "grad_norm") == [0.0]
    one = data.map(lambda row: {"labels": row["mask"].convert("1").convert("L").point(bool)}, features=rows.features)
    with pytest.raises(ValueError, match="region_strengths: got 1 of them, expected 2 for eval row 0"):
        make(tmp_path, one, eval_dataset=rows, regions_column="labels", region_strengths=[0.5])


def test_a_second_turn_starts_from_the_best_of_the_first(tmp_path, data):
    """Only row 1 has one: to change the lower half."""
    half = np.zeros((32, 32), np.uint8)
    half[16:] = 255
    rows = [dict(data[i]) for i in range(2)]
    rows[0]["turns"], rows[1]["turns"] = None, [{"instruction": "add a red ball", "mask": Image.fromarray(half)}]
    seen = []

    def telling(images, source_images, prompts, **columns):
        seen.append((list(prompts), list(source_images), list(images)))
        return brightness(images)

    options = {"max_steps": 1, "shuffle_dataset": False, "mask_growth": 0.0}
    trainer = make(tmp_path, rows, telling, turns_column="turns", **options)
    seen.clear()
    trainer.train()
    (first, _, images), (second, sources, _) = seen
    assert len(first) == 8 and second == ["add a red ball"] * 4
    best = max(images[4:], key=lambda image: np.asarray(image).mean())
    assert all(np.array_equal(np.asarray(source), np.asarray(best)) for source in sources)
    (groups,) = trainer._buffer
    assert [group.edit.label for group in groups] == ["train row 0", "train row 1", "train row 1, turn 2"]
    start = groups[2].trajectory[0]
    assert torch.equal((start[0] == start[1]).all(-1), groups[2].region == 0) and groups[2].region[:32].sum() == 0
    assert (start[0] != groups[1].trajectory[0, 0]).all(), "each turn has noise of its own"
    rows[1]["turns"].append({"instruction": "add a ball"})
    with pytest.raises(ValueError, match=r"train row 1, turn 3, column 'turns': got \['instruction'\], expected"):
        make(tmp_path, rows, turns_column="turns")
    with pytest.raises(ValueError, match="turns_column: got 'turn', expected a column of train_dataset, which has "):
        make(tmp_path, rows, turns_column="turn")


def squares(*corners):
    """A mask for each corner, 8 x 8 of 32 x 32 pixels."""
    masks = np.zeros((len(corners), 32, 32), np.uint8)
    for mask, (top, left) in zip(masks, corners, strict=True):
        mask[top : top + 8, left : left + 8] = 255
    return [Image.fromarray(mask) for mask in masks]


def test_a_turn_explores_its_own_regions_at_the_size_of_the_run(tmp_path, data):
    """Data of 32 pixels, edited at 48: 12 x 12 tokens of 4 pixels."""
    left, right, below = squares((0, 0), (0, 24), (24, 0))
    turns = [{"instruction": "two", "mask": below}, {"instruction": "three", "mask": below, "parts": [left, right]}]
    row = {**dict(data[0]), "mask": left, "parts": [left, below], "turns": turns}
    options = {"max_steps": 1, "mask_growth": 0.0, "resolution": 48, "per_device_train_batch_size": 1}
    options |= {"turns_column": "turns", "regions_column": "parts"}
    trainer = make(tmp_path, [row], **options)
    trainer.train()
    (groups,) = trainer._buffer
    corners = [[(0, 0), (9, 0)], [(9, 0)], [(0, 0), (0, 9)]]
    for group, expected in zip(groups, corners, strict=True):
        regions = group.regions.unflatten(-1, (12, 12))
        assert [tuple(region.nonzero()[0].tolist()) for region in regions] == expected
        assert (regions.sum((-1, -2)) == 9).all()
        assert torch.equal((group.trajectory[0, 0] != group.trajectory[0, 1]).all(-1), group.region > 0)
    # what would fail in the middle of the run is refused before it
    dot = np.zeros((32, 32), np.uint8)
    dot[30, 30] = 255  # which half the size leaves out
    for change, size, message in [
        ({"parts": []}, 48, "got no region"),
        ({"parts": [left, dot]}, 48, "region_strengths: got 1 of them, expected 2 for (train|eval) row 0, turn 2"),
        ({"mask": Image.fromarray(dot)}, 16, "turn 2, column 'turns': got an empty mask"),
    ]:
        bad = [{**row, "parts": [left], "turns": [{**turns[0], **change}]}]
        with pytest.raises(ValueError, match=message):
            make(tmp_path, bad, **(options | {"resolution": size, "region_strengths": [0.5]}))
        good = [{**row, "parts": [left], "turns": None}]
        trainer = make(tmp_path, good, **(options | {"resolution": size, "region_strengths": [0.5]}))
        trainer.make_groups = None  # nothing is rolled out
        with pytest.raises(ValueError, match=message):
            trainer.evaluate(bad)


def at_once(tmp_path, data, reward, **options):
    """A trainer on one row with two instructions, for corners that share no token."""
    first, second = squares((0, 0), (16, 16))
    turns = [{"instruction": "Remove the dog.", "mask": second, "caption": "dog"}]
    row = {**dict(data[0]), "instruction": "Add a cube.", "mask": first, "caption": "cube", "turns": turns}
    shape = {"max_steps": 1, "mask_growth": 0.0, "per_device_train_batch_size": 1, "eval_dataset": [row]}
    return make(tmp_path, [row], reward, turns_column="turns", turns_at_once=True, **(shape | options))


def test_turns_at_once_are_one_edit_for_noise_rewards_and_evaluation(tmp_path, data):
    seen = []

    def telling(images, prompts, masks, regions, caption, **columns):
        seen.append((prompts[0], [np.asarray(mask) for mask in (masks[0], *regions[0])], caption[0]))
        return brightness(images)

    trainer = at_once(tmp_path, data, telling, region_advantages=True, reward_regions=["region_2"], eval_steps=1)
    trainer.train()
    trainer.evaluate()
    ((group,),) = trainer._buffer
    first, second = (np.asarray(mask) for mask in squares((0, 0), (16, 16)))
    for prompt, (mask, *regions), caption in seen:  # start-up, training, evaluation
        assert (prompt, caption) == ("Add a cube and remove the dog", "cube")
        assert np.array_equal(mask, first | second) and np.array_equal(regions, [first, second])
    assert len(seen) == 3 and group.regions.sum(-1).tolist() == [4, 4] and group.advantages.shape == (1, 4)
    assert last(trainer, "grad_norm")[0] > 0
    rows = [{**trainer.train_dataset.rows[0], "turns": [{"instruction": "two"}]}]
    with pytest.raises(ValueError, match=r"train row 0, turn 2, column 'turns': got \['instruction'\], expected"):
        make(tmp_path, rows, turns_column="turns", turns_at_once=True)
    with pytest.raises(ValueError, match="region_strengths: got 1 of them, expected 2 for train row 0"):
        at_once(tmp_path, data, brightness, region_strengths=[0.5])


@pytest.mark.parametrize("policy", [{}, {"distance_space": "clean"}, {"policy": "nft"}, FLOW_GRPO])
def test_regions_of_turns_at_once_do_not_disturb_each_other(tmp_path, data, policy):
    """The other's strength leaves a region's noise alone, the other's reward its gradient, to the last bit."""
    rewards = [by_number, redness]
    objective = {"region_advantages": True, "reward_regions": ["region_1", "region_2"], "num_policy_steps": 1, **policy}
    trainer, other = (at_once(tmp_path, data, rewards, region_strengths=[0.4, s], **objective) for s in (0.4, 0.9))
    (group,), (louder,) = rolled_out(trainer, data), rolled_out(other, data)
    first, second = group.regions > 0
    changed = (group.trajectory[0] != louder.trajectory[0]).any(-1)
    assert not changed[:, first].any() and changed[:, second].all()
    if group.kick_strength is not None:
        assert torch.equal(group.kick_strength[..., first], louder.kick_strength[..., first])

    def gradient(row):
        group.advantages = torch.tensor([[1.5, -0.5, -0.5, -0.5], row])
        found = gather([group], [(0, 0, 1)], trainer.policy, {})
        velocity = (0.5 * found.latents).requires_grad_()
        trainer.policy.loss(velocity.detach(), found)  # the old policy
        loss, _ = trainer.policy.loss(velocity, found)
        return torch.autograd.grad(loss.sum(), velocity)[0][0]

    one, two = gradient([0.7, 0.1, -0.4, -0.4]), gradient([-0.3, 0.9, -0.3, -0.3])
    assert torch.equal(one[first], two[first]) and one[first].abs().max() > 0
    assert not torch.equal(one[second], two[second]) and not one[~(first | second)].any()


def test_the_log_follows_the_latents_step_by_step(tmp_path, data):
    """And one edit's numbers are those of its group."""
    trainer = make(tmp_path, data, max_steps=1, per_device_train_batch_size=1)
    trainer.train()
    ((group,),) = trainer._buffer
    row, variances = trainer.state.log_history[0], group.trajectory.var(1).mean(-1)
    for side, tokens in (("inside", group.region > 0), ("outside", group.region == 0)):
        names = [name for name in row if name.startswith(f"diagnostics/latent_var_{side}/")]
        assert names == [f"diagnostics/latent_var_{side}/step_{step}" for step in (1, 2, 3)]
        assert [row[name] for name in names] == pytest.approx(variances[1:, tokens].mean(-1).tolist(), rel=1e-5)
        assert row[names[-1]] == pytest.approx(row[f"diagnostics/latent_var_{side}"], rel=1e-5)


def test_further_turns_take_nothing_from_other_edits(tmp_path, data):
    """Two edits of one micro-step or of two, one of them with a second turn."""
    rows = [dict(data[i]) for i in range(2)]
    rows[0]["turns"], rows[1]["turns"] = None, [{"instruction": "add a red ball", "mask": rows[1]["mask"]}]
    updates = []
    for edits, accumulated in ((2, 1), (1, 2)):
        shape = {"per_device_train_batch_size": edits, "gradient_accumulation_steps": accumulated}
        trainer = make(tmp_path, rows, max_steps=1, shuffle_dataset=False, turns_column="turns", **shape)
        start = weights(trainer)
        trainer.train()
        updates.append(weights(trainer))
    assert distance(*updates, start) < 1e-4


@pytest.fixture(scope="module")
def moved(data, tmp_path_factory):
    """A trainer one update after its base, two transitions, and what base and adapter say there."""
    trainer = make(tmp_path_factory.mktemp("moved"), data, by_number, max_steps=1, beta=0.5)
    trainer.train()
    found = gather(trainer._buffer[0], [(0, 0, 0), (1, 1, 1)], trainer.policy, {})
    inputs = (found.latents, found.timestep, found.conditions)
    with torch.no_grad():
        base, now = (trainer.editor.velocity(m, *inputs) for m in (build_tiny_kontext().transformer, trainer.model))
    return trainer, found, base, now


def loss_with(trainer, transitions, **options):
    off = {"beta": 0.0, "beta_keep": 1.0, "keep_hinge_weight": 0.0, "keep_hinge_margin": 0.0}
    for name, value in (off | options).items():
        setattr(trainer.args, name, value)
    return float(trainer.compute_loss(trainer.model, transitions))


def test_the_kl_is_to_the_base_and_stronger_outside(moved):
    """The base is another model's, so an adapter that stayed on for the reference would be found out."""
    trainer, found, base, now = moved
    assert last(trainer, "kl") == [0.0], "exactly, before the first update"
    squared, region = (now - base).square().mean(-1), found.region
    inside, outside = ((squared * side).sum(-1).mean() / 64 for side in (region, 1 - region))
    assert inside > 1e-8 and outside > 1e-8
    plain = loss_with(trainer, found)
    for beta, beta_keep in ((10.0, 1.0), (10.0, 3.0), (20.0, 0.0)):
        expected = float(beta * (inside + beta_keep * outside))
        assert loss_with(trainer, found, beta=beta, beta_keep=beta_keep) - plain == pytest.approx(expected, rel=1e-3)


def test_the_hinge_begins_beyond_its_margin(moved):
    trainer, found, _, now = moved
    clean = found.latents - found.sigma.view(2, 1, 1) * now
    squared, keep = (clean - found.conditions.image_latents).square().mean(-1), 1 - found.region
    margin = float(squared.median())
    plain = loss_with(trainer, found)
    for weight, allowed in ((2.0, 0.0), (2.0, margin), (4.0, margin), (1.0, 1e6)):
        expected = weight * ((squared - allowed).clamp(min=0) * keep).sum(-1) / keep.sum(-1)
        given = loss_with(trainer, found, keep_hinge_weight=weight, keep_hinge_margin=allowed) - plain
        assert given == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-7)
    assert 0 < margin < 1e6


def brighter_tensors(pictures, **columns):
    return pictures.mean((1, 2, 3))


def bright(images, **columns):
    return brightness(images)


bright.differentiable = brighter_tensors  # type: ignore[attr-defined]


def test_a_rewards_own_gradient_is_followed(tmp_path, data):
    """Along the prediction of the result; with a weight on nothing else the reward of predictions rises."""
    alone = {"reward_gradient_weight": 1.0, "max_steps": 6, "learning_rate": 3.0, "keep_weight": 0.0}
    trainer = make(tmp_path, data, bright, edit_strength=1e-3, per_device_train_batch_size=4, seed=5, **alone)
    trainer.train()
    predicted = last(trainer, "reward_of_prediction")
    assert len(predicted) == 6 and predicted[-1] > predicted[0] + 0.002
    with pytest.raises(ValueError, match=r"reward_gradient_weight: got 1\.0 with \['brightness'\]"):
        make(tmp_path, data, brightness, reward_gradient_weight=1.0)
    with pytest.raises(ValueError, match="reward_gradient_weight: got -1"):
        make(tmp_path, data, bright, reward_gradient_weight=-1.0)


@pytest.mark.parametrize("region", ["edit", "keep", None])
def test_a_rewards_gradient_reaches_the_pixels_of_its_own_region(tmp_path, data, region):
    regions = {"region_advantages": True, "reward_regions": [region]} if region else {}
    trainer = make(tmp_path, data, bright, reward_gradient_weight=1.0, reward_weights=[3.0], **regions)
    groups = trainer.make_groups([trainer.train_dataset.edit(i) for i in range(2)], 4, ("key",))
    trainer.score_groups(groups)
    found = gather(groups, [(0, 0, 0), (1, 2, 1)], trainer.policy, {})
    pictures = torch.rand(2, 3, 32, 32, requires_grad=True)
    trainer.editor.decode_tensor = lambda clean, height, width: pictures
    values = trainer._differentiable_rewards(found.latents, found)
    assert values.tolist() == pytest.approx((3 * pictures.mean((1, 2, 3))).tolist())
    values.sum().backward()
    inside = torch.stack([torch.from_numpy(np.asarray(group.mask) > 127) for group in groups]).unsqueeze(1)
    reached = {"edit": inside, "keep": ~inside, None: torch.ones_like(inside)}[region].expand(-1, 3, -1, -1)
    assert bool(inside.any()) and torch.equal(pictures.grad != 0, reached)


def test_dropped_groups_are_held_to_nothing(moved):
    """Section 8: the anchors to base and source are off where a group teaches nothing."""
    trainer, found, _, _ = moved
    given = {"beta": 10.0, "keep_hinge_weight": 2.0}
    dropped = replace(found, advantages=found.advantages.clone())
    dropped.advantages[1] = 0
    alone = [loss_with(trainer, found, **{name: given[name]}) - loss_with(trainer, found) for name in given]
    left = [loss_with(trainer, dropped, **{name: given[name]}) - loss_with(trainer, dropped) for name in given]
    assert all(0 < less < more for less, more in zip(left, alone, strict=True))
    dropped.advantages.zero_()
    assert loss_with(trainer, dropped, **given) == 0


# ------------------------------------------------------------------------------------------ cached conditions


def encoder_calls(pipe):
    calls = {"text": 0, "image": 0}
    pipe.text_encoder_2.register_forward_pre_hook(lambda *_: calls.update(text=calls["text"] + 1))
    pipe.vae.encoder.register_forward_pre_hook(lambda *_: calls.update(image=calls["image"] + 1))
    return calls


def test_the_condition_cache_changes_no_bit_and_spares_the_encoders(tmp_path, data, held_out):
    """Two epochs over four rows, with evaluations and a second turn, whose source is no one's but this rollout's."""
    half = np.zeros((32, 32), np.uint8)
    half[16:] = 255
    rows = [{**dict(data[i]), "turns": None} for i in range(4)]
    rows[1]["turns"] = [{"instruction": "add a red ball", "mask": Image.fromarray(half)}]
    held_out = [{**dict(row), "turns": None} for row in held_out]
    folder = tmp_path / "conditions"
    cached = {"cache_conditions": True, "conditions_cache_dir": str(folder)}
    results, calls = [], []
    for options in ({}, cached, cached):
        pipe = build_tiny_kontext()
        calls.append(encoder_calls(pipe))
        evaluation = {"eval_dataset": held_out, "eval_strategy": "epoch", "per_device_eval_batch_size": 2}
        settings = {"turns_column": "turns", "max_steps": 4, **evaluation, **options}
        trainer = make(tmp_path / str(len(calls)), rows, pipe=pipe, **settings)
        trainer.train()
        results.append((weights(trainer), history(trainer)))
    assert results[0][1] == results[1][1] == results[2][1] and len(results[0][1]) == 6
    assert all(same(results[0][0], other) for other, _ in results[1:])
    prompts = {row["instruction"] for row in [*rows, *held_out]} | {"add a red ball"}
    assert calls[0] == {"text": 16, "image": 16}  # in each epoch four rows, a turn and three held-out rows
    assert calls[1] == {"text": len(prompts), "image": 7 + 2}
    assert calls[2] == {"text": 0, "image": 2}
    assert len(list(folder.glob("text-*/*"))) == len(prompts) and len(list(folder.glob("image-*/*"))) == 7


FOUR = {"per_device_train_batch_size": 4, "seed": 1}


@pytest.fixture(scope="module", params=[by_number, flat_for_removals])
def reference(request, data, tmp_path_factory):
    """One micro-step of four edits per update, after one update and two, with and without groups that are dropped."""
    trainer = make(tmp_path_factory.mktemp("reference"), data, request.param, **FOUR)
    start, results = weights(trainer), trained_step_by_step(trainer)
    dropped = last(trainer, "frac_reward_zero_std")
    assert any(dropped) == (request.param is flat_for_removals) and min(dropped) < 1
    return request.param, start, results


@pytest.mark.parametrize(
    "shape",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "train_micro_batch_size": 3},
        {"train_micro_batch_size": 5, "rollout_batch_size": 3, "gradient_checkpointing": False},
    ],
)
def test_how_an_update_is_split_does_not_matter(tmp_path, data, reference, shape):
    reward, start, expected = reference
    trainer = make(tmp_path, data, reward, **(FOUR | shape))
    assert same(weights(trainer), start)
    for found, wanted in zip(trained_step_by_step(trainer), expected, strict=True):
        assert distance(found, wanted, start) < 1e-5


@pytest.mark.parametrize(
    ("rows", "stop", "total", "options"),
    [
        (12, 2, 4, {}),  # within an epoch
        (4, 3, 5, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),  # epochs of two updates
        (4, 4, 6, {"num_iterations": 2}),  # at an epoch's end
    ],
)
def test_resume_is_bit_exact(tmp_path, data, rows, stop, total, options):
    adam = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    options = {"save_strategy": "steps", "save_steps": stop, "max_steps": total, **adam, **options}
    whole = make(tmp_path, data.select(range(rows)), **options)
    whole.train()
    resumed = make(tmp_path, data.select(range(rows)), **(options | {"save_strategy": "no"}))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert history(resumed)[stop:] == history(whole)[stop:] and len(history(whole)) == total
    assert same(weights(resumed), weights(whole))


def test_same_seed_same_run_and_every_epoch_its_own_order(tmp_path, data):
    torch.manual_seed(1)
    first = make(tmp_path, data.select(range(4)), max_steps=4)
    torch.manual_seed(2)
    second = make(tmp_path, data.select(range(4)), max_steps=4)
    assert same(weights(first), weights(second))
    sampler = first._get_train_sampler()
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == [0, 1, 2, 3]


def test_each_rollout_serves_its_own_iterations(tmp_path, data):
    trainer = make(tmp_path, data, num_iterations=2, max_steps=4)
    trainer.train()
    rewards, ratios = last(trainer, "reward"), last(trainer, "policy/log_ratio_max")
    assert len(rewards) == 2
    assert [ratio > 0 for ratio in ratios] == [False, True, False, True]


# ------------------------------------------------------------------------------------------ the result


def test_stock_pipeline_draws_what_was_trained(tmp_path, data, monkeypatch):
    """Also the trap that only users step into: without CI set, TRL reports to its server in `__init__`."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*_):
        raise AssertionError("a training run must not open connections")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    base = build_tiny_kontext()
    trainer = make(tmp_path, data, pipe=build_tiny_kontext(), save_strategy="steps", save_steps=1)
    assert trainer.args.gradient_checkpointing and trainer.pipeline.transformer.is_gradient_checkpointing is False
    trainer.train()
    assert trainer.pipeline.transformer.is_gradient_checkpointing
    trainer.save_model()
    trained, plain = draw(trainer.pipeline), draw(base)
    assert not np.array_equal(trained, plain)
    with trainer.model.disable_adapter():
        assert np.array_equal(draw(trainer.pipeline), plain)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        stock = build_tiny_kontext()
        stock.load_lora_weights(str(folder))
        assert np.array_equal(draw(stock), trained)
    assert "library_name: diffusers" in (tmp_path / "checkpoint-1" / "README.md").read_text()


def test_gradient_checkpointing_can_be_off(tmp_path, data):
    trainer = make(tmp_path, data, gradient_checkpointing=False, max_steps=1)
    trainer.train()
    assert not trainer.pipeline.transformer.is_gradient_checkpointing


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard(tmp_path, data, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make(tmp_path, data, report_to="tensorboard", max_steps=1).train()
    assert list((tmp_path / "board").rglob("events*"))


def test_full_fine_tuning_saves_resumes_and_keeps_the_best(tmp_path, data, held_out):
    def best_after_one(images, trainer_state, **columns):
        return [b + 9 * (trainer_state.global_step == 1) for b in brightness(images)]

    options = {"peft": None, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path, data, **options)
    whole.train()
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    resumed = make(tmp_path, data, **(options | {"eval_strategy": "no", "load_best_model_at_end": False}))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(weights(resumed), weights(whole)) and len(weights(whole)) > 50
    stock = FluxKontextPipeline(**build_tiny_kontext().components)
    stock.transformer = type(stock.transformer).from_pretrained(tmp_path / "checkpoint-2" / "transformer")
    assert np.array_equal(draw(in_own_memory(stock)), draw(whole.pipeline))

    best = make(tmp_path / "best", data, best_after_one, held_out, metric_for_best_model="eval_reward", **options)
    best.train()
    saved = load_file(next((tmp_path / "best" / "checkpoint-1" / "transformer").glob("*.safetensors")))
    assert same(weights(best), saved)


@pytest.mark.parametrize("as_folder", [True, False])
def test_half_precision_base_stays_so(tmp_path, data, as_folder):
    """A Kontext of 24 GB must not silently become one of 48."""
    pipe = build_tiny_kontext()
    options = {"max_steps": 1}
    if as_folder:
        pipe.save_pretrained(tmp_path / "base")
        options["model_init_kwargs"] = json.dumps({"torch_dtype": "bfloat16"})
    else:
        pipe = pipe.to(torch.bfloat16)
    small = {"resolution": 32, "max_sequence_length": 16, "num_inference_steps": 3, "num_policy_steps": 2}
    args = RCGRPOConfig(str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **small, **options)
    model = str(tmp_path / "base") if as_folder else pipe
    trainer = RCGRPOTrainer(model, brightness, args, data, None, LoraConfig(target_modules=LAYERS))
    base = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in [*base, *trainer.pipeline.vae.parameters()]} == {torch.bfloat16}
    trainer.train()
    assert last(trainer, "grad_norm")[0] > 0 and last(trainer, "policy/log_ratio_max") == [0.0]


# ------------------------------------------------------------------------------------------ rewards


def rolled_out(trainer, data, edits=1):
    groups = trainer.make_groups(
        [trainer.train_dataset.edit(i) for i in range(edits)], trainer.args.num_generations, (0, 0)
    )
    trainer.score_groups(groups)
    trainer.forget_metrics()
    return groups


def test_rewards_of_every_kind_meet_in_the_score(tmp_path, data):
    async def waiting(images, **columns):
        return redness(images)

    options = {"reward_weights": [1.0, 2.0, 3.0], "attention_reward_weight": 0.5}
    trainer = make(tmp_path, data, [brightness, waiting, "background_keep"], **options)
    (group,) = rolled_out(trainer, data)
    names = [reward.name for reward in trainer.rewards]
    assert names == ["brightness", "waiting", "background_keep", "attention_concentration"]
    assert torch.allclose(group.rewards[:, 0], torch.tensor(brightness(group.images)))
    assert torch.allclose(group.rewards[:, 1], torch.tensor(redness(group.images)))
    assert torch.equal(group.rewards[:, 3], group.attention.density.cpu().float())
    assert torch.allclose(group.scores, group.rewards @ torch.tensor([1.0, 2.0, 3.0, 0.5]))
    assert group.advantages.sum().abs() < 1e-4 < group.advantages.abs().max()


@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_aggregation(tmp_path, data, how):
    def big(images, **columns):
        return [100.0 * i**2 for i in range(len(images))]

    def small(images, **columns):
        return [float(-i) for i in range(len(images))]

    options = {"multi_objective_aggregation": how, "advantage_power": 2.0, "reward_weights": [1.0, 2.0]}
    (group,) = rolled_out(make(tmp_path, data, [big, small], **options), data)

    def z_scores(values):
        return (values - values.mean()) / values.std()

    one, other = np.array([0.0, 100.0, 400.0, 900.0]), np.array([0.0, -1.0, -2.0, -3.0])
    total = one + 2 * other if how == "sum_then_normalize" else z_scores(one) + 2 * z_scores(other)
    assert np.allclose(group.advantages.numpy(), z_scores(total), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1.0),
        ({"advantage_std_floor": 0.1}, 0.1),
        ({"min_reward_std": 0.02}, 0.0),
        ({"advantage_std_floor": 0.1, "multi_objective_aggregation": "normalize_then_sum"}, 0.1),
        ({"scale_rewards": "none"}, 0.01),
    ],
)
def test_small_spreads_are_scaled_as_asked(tmp_path, data, options, expected):
    def close(images, **columns):
        return [0.5 + 0.02 * (i % 2) for i in range(len(images))]  # a spread of .01

    (group,) = rolled_out(make(tmp_path, data, close, advantage_power=2.0, **options), data)
    assert group.advantages.tolist() == pytest.approx([-expected, expected] * 2, rel=1e-4)


def sized(size, **columns):
    return [float(s * (i % 4)) for i, s in enumerate(size)]


def pairs(size, **columns):
    return [float(i % 2) if s > 2 else None for i, s in enumerate(size)]


def sized_rows(data):
    """Four edits whose rewards spread by 1, 2, 3 and 4 times as much, the second with a turn of 5."""
    rows = [{**dict(data[i]), "size": i + 1, "turns": None} for i in range(4)]
    rows[1]["turns"] = [{"instruction": "add a red ball", "mask": rows[1]["mask"], "size": 5}]
    return rows


BATCH = {"per_device_train_batch_size": 4, "turns_column": "turns", "shuffle_dataset": False, "max_steps": 1}
BATCH |= {"advantage_power": 2.0}
BY_BATCH = {"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}


def batch_advantages_of(trainer):
    """By the size of the edit's rewards."""
    return {g.edit.columns["size"]: g.advantages.tolist() for groups in trainer._buffer for g in groups}


def by_hand(options):
    rising, paired = np.arange(4.0), np.array([0.0, 1.0, 0.0, 1.0])
    if options == BY_BATCH[0]:  # of the sums of both rewards
        scores = {size: size * rising + paired * (size > 2) for size in range(1, 6)}
        std = np.concatenate(list(scores.values())).std()
        return {size: (values - values.mean()) / std for size, values in scores.items()}
    one, other = ((values - values.mean()) / values.std() for values in (rising, paired))
    sums = {size: one + other * (size > 2) for size in range(1, 6)}
    std = np.concatenate(list(sums.values())).std()
    return {size: values / std for size, values in sums.items()}


@pytest.mark.parametrize("options", BY_BATCH)
def test_the_batch_is_all_that_an_update_sees(tmp_path, data, options):
    """However its edits are accumulated, and with their further turns."""
    results = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make(tmp_path, sized_rows(data), [sized, pairs], **(BATCH | options | shape))
        start = weights(trainer)
        trainer.train()
        results.append(weights(trainer))
        found, expected = batch_advantages_of(trainer), by_hand(options)
        assert found.keys() == expected.keys()
        assert all(found[n] == pytest.approx(expected[n], abs=1e-5) for n in found)
    assert all(distance(other, results[0], start) < 1e-5 for other in results[1:])


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_candidates_without_a_score_leave_the_statistics(tmp_path, data, caplog, nothing):
    def partial(images, **columns):
        return [1.0, nothing, 2.0, 6.0][: len(images)] * (len(images) // 4 or 1)

    trainer = make(tmp_path, data, partial)
    caplog.clear()
    (group,) = rolled_out(trainer, data)
    kept = np.array([1.0, 2.0, 6.0])
    expected = (kept - kept.mean()) / kept.std()
    advantages = torch.tensor([expected[0], 0, expected[1], expected[2]], dtype=torch.float32)
    assert torch.allclose(group.advantages, quasi_norm(advantages, 0.8, 3), atol=1e-5)
    failed = [record.getMessage() for record in caplog.records]
    assert any("'partial'" in m and "train row 0, candidate 1" in m for m in failed) == (nothing is not None)
    trainer.train()
    assert last(trainer, "grad_norm")[0] > 0
    assert last(trainer, "rewards/failures") == [0.0 if nothing is None else 2.0] * 2
    assert last(trainer, "groups/scored_candidates") == [3.0, 3.0]


def test_group_with_one_score_teaches_nothing(tmp_path, data):
    def lonely(images, **columns):
        return [1.0, None, None, None][: len(images)] * (len(images) // 4 or 1)

    trainer = make(tmp_path, data, lonely)
    start = weights(trainer)
    trainer.train()
    assert same(weights(trainer), start) and last(trainer, "frac_reward_zero_std") == [1.0, 1.0]


def test_a_reward_that_raises_is_named_and_the_run_goes_on(tmp_path, data, caplog):
    def broken(images, **columns):
        raise OSError("no such server")

    trainer = make(tmp_path, data, [brightness, broken])
    caplog.clear()
    trainer.train()
    assert trainer.state.global_step == 2 and last(trainer, "grad_norm")[1] > 0
    assert last(trainer, "rewards/failures") == [8.0, 8.0]
    # what is left to compare by is no score: with the next batch's it would be averaged with sums of two rewards
    assert len(last(trainer, "rewards/brightness/mean")) == 2 and last(trainer, "reward") == []
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("'broken'" in m and "train row" in m and "no such server" in m for m in messages)
    assert trainer.failures.counts == {"brightness": 0, "broken": 16}


@pytest.mark.parametrize(("nothing", "expected"), [(float("nan"), 3.0), (None, (3 + 1 + 3) / 3)])
def test_what_failed_is_not_averaged_with_other_sums(tmp_path, data, held_out, nothing, expected):
    """One of three held-out edits, of one candidate each, whose second reward fails or does not apply."""
    bad = held_out[1]["instruction"]
    assert [row["instruction"] for row in held_out].count(bad) == 1

    def steady(images, **columns):
        return [1.0] * len(images)

    def partial(prompts, **columns):
        return [nothing if prompt == bad else 2.0 for prompt in prompts]

    found = make(tmp_path, data, [steady, partial], held_out).evaluate()
    assert found["eval_reward"] == pytest.approx(expected)
    assert found["eval_rewards/steady/mean"] == 1 and found["eval_rewards/partial/mean"] == 2
    assert found["eval_rewards/failures"] == (nothing is not None)


def test_rewards_can_log(tmp_path, data):
    def telling(images, log_extra, log_metric, trainer_state, **columns):
        log_extra("step", [trainer_state.global_step] * len(images))
        log_metric("my/metric", 2.0 + trainer_state.global_step)
        return brightness(images)

    trainer = make(tmp_path, data, telling)
    assert trainer.extra_columns == {}
    trainer.train()
    assert last(trainer, "my/metric") == [2.0, 3.0]
    assert trainer.extra_columns == {"step": [1] * 8}


def test_candidates_of_updates_and_evaluations_are_kept_for_people(tmp_path, data, held_out):
    def telling(images, log_extra, **columns):
        log_extra("half", [score / 2 for score in brightness(images)])
        return brightness(images)

    runs = {}
    for kept in (False, True):
        shape = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3, "gradient_accumulation_steps": 2}
        shape |= {"per_device_train_batch_size": 1, "logging_steps": 2, "log_completions": kept}
        runs[kept] = make(tmp_path / str(kept), data, [telling, redness], held_out, **shape)
        runs[kept].train()
    assert same(weights(runs[True]), weights(runs[False])) and history(runs[True]) == history(runs[False])
    assert not (tmp_path / "False" / "completions").exists()
    folder = tmp_path / "True" / "completions"
    names = ("completions_00002", "completions_00003", "eval_completions_00002", "eval_completions_00003")
    assert {file.name for file in folder.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("parquet", "jpg")
    }
    table = datasets.Dataset.from_parquet(str(folder / "completions_00002.parquet")).to_pandas()
    assert len(table) == 2 * 4 and table["edit"].nunique() == 2  # of the second update alone
    assert np.allclose(table["reward"], table["rewards/telling"] + table["rewards/redness"])
    assert np.allclose(table["half"], table["rewards/telling"] / 2)
    assert np.allclose(table.groupby("edit")["advantage"].mean(), 0, atol=1e-4)
    evaluated = datasets.Dataset.from_parquet(str(folder / "eval_completions_00002.parquet")).to_pandas()
    assert list(evaluated["edit"]) == [f"eval row {i}" for i in range(3)]
    assert evaluated["reward"].mean() == pytest.approx(last(runs[True], "eval_reward")[0])


def test_attention_reward_changes_the_training(tmp_path, data):
    results = []
    for weight in (0.0, 0.5):
        trainer = make(tmp_path, data, attention_reward_weight=weight, max_steps=1)
        trainer.train()
        results.append((weights(trainer), trainer.state.log_history[0]))
    (plain, log), (steered, other) = results
    assert not same(plain, steered)
    assert "rewards/attention_concentration/mean" in other.keys() - log.keys()
    density = other["rewards/attention_concentration/mean"]
    assert other["reward"] == pytest.approx(log["reward"] + 0.5 * density, rel=1e-5)
    assert other["attention/density"] == pytest.approx(density, rel=1e-6)


def test_only_the_chosen_attention_is_recorded_and_paid(tmp_path, data):
    """What the reward sees is what a rollout with the same options and noise reads."""
    data = data.map(lambda row: {"words": row["instruction"].split()[0]})
    chosen = {"attention_blocks": [1, 2], "attention_steps_range": [0.3, 1.0], "attention_words_column": "words"}
    seen = []

    def watching(attention_density, **columns):
        seen.append(list(attention_density))
        return attention_density

    def densities(**options):
        trainer = make(tmp_path, data, [watching, "attention_contrast"], max_steps=1, learning_rate=0.0, **options)
        assert trainer.args.attention_options.reads(3) == range(1 if options else 0, 3)
        seen.clear()
        trainer.train()
        edits, read = [group.edit for group in trainer._buffer[0]], trainer.args.attention_options
        key = trainer._buffer[0][0].key[:-1]
        rolled = (trainer.editor, trainer.model, edits, 4, trainer.exploration, key)
        expected = [make_groups(*rolled, "mass", options=o) for o in (read, *one_changed(read))]
        readings = [torch.cat([group.attention.density for group in groups]).tolist() for groups in expected]
        assert seen[0] == pytest.approx(readings[0], rel=1e-5)
        for other in readings[1:]:
            assert not np.allclose(seen[0], other, atol=1e-4), "each option matters"
        return seen[0], trainer.state.log_history[0]

    def one_changed(read):
        if read == AttentionOptions():
            return []
        return [replace(read, **{f.name: f.default}) for f in fields(AttentionOptions)]

    (plain, _), (some, log) = densities(), densities(attention_direction="image_to_text", **chosen)
    assert not np.allclose(plain, some, atol=1e-3)
    assert log["attention/density"] == pytest.approx(np.mean(some), rel=1e-6)
    assert log["rewards/attention_contrast/mean"] == pytest.approx(log["attention/contrast"], rel=1e-6)


def test_attention_is_recorded_of_a_compiled_model(tmp_path, data):
    logs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = make(tmp_path, data, log_attention=True, **compiled)
        trainer.train()
        logs.append(last(trainer, "attention/density"))
    assert logs[1] == pytest.approx(logs[0], rel=1e-3) and logs[0][0] != logs[0][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_blocks": [0]},
            "attention_blocks.*expected the defaults, as .* without log_attention=True or one of",
        ),
        ({"attention_blocks": [4], "log_attention": True}, r"blocks: got \[4\], expected block numbers in 0..3"),
        ({"attention_words_column": "other", "log_attention": True}, "train row 0, column 'other': got .*words of"),
        ({"attention_words_column": "last", "log_attention": True}, "expected words of .* within its first 16 tokens"),
    ],
)
def test_attention_that_cannot_be_recorded_is_refused(tmp_path, data, options, message):
    data = data.map(lambda row: {"other": "nowhere", "last": row["instruction"].split()[-1]})
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data, **options)


class Flaky:
    """Works at start-up and for the first updates, then fails with `error`."""

    required, reward_name = True, "flaky"

    def __init__(self, error, works):
        self.error, self.works = error, works

    def __call__(self, images, trainer_state, **columns):
        if trainer_state.global_step >= self.works:
            raise self.error
        return brightness(images)


@pytest.mark.parametrize(
    ("error", "raised", "saved"),
    [(OSError("gone"), RequiredRewardError, 3), (KeyboardInterrupt(), KeyboardInterrupt, 2)],
)
def test_what_was_trained_survives_a_stop_and_goes_on_bit_by_bit(tmp_path, data, error, raised, saved):
    """The reward breaks after two updates; batches without a score do not count as failures until patience ends."""
    options = {"max_steps": 5, "max_reward_failures": 2}
    trainer = make(tmp_path, data, Flaky(error, 2), **options)
    with pytest.raises(raised):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert (tmp_path / f"checkpoint-{saved}" / "pytorch_lora_weights.safetensors").exists()
    stopped = weights(trainer)
    resumed = make(tmp_path, data, Flaky(error, 9), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5 and not same(weights(resumed), stopped)
    if saved == 2:
        whole = make(tmp_path / "whole", data, Flaky(error, 9), **options)
        whole.train()
        assert same(weights(resumed), weights(whole))


class StopAt(TrainerCallback):
    """Ctrl-C, or whatever `act` does with the model, after an update."""

    def __init__(self, step, act=None):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            if self.act is None:
                raise KeyboardInterrupt
            self.act(model)


@torch.no_grad()
def poison(model):
    [p for p in model.parameters() if p.requires_grad][3].view(-1)[1] = float("nan")


@pytest.mark.parametrize("regular", [True, False])
def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path, data, caplog, regular):
    """Whether the next save is due before the loss shows it, or the run stops at a loss of NaN."""
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 6}
    trainer = make(tmp_path, data, callbacks=[StopAt(4 if regular else 3, poison)], **options)
    expected = r"lora_\w+.*: got NaN.*after step 4.*lower learning_rate" if regular else "loss: got nan at step 3"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert any("no checkpoint is written" in record.getMessage() for record in caplog.records)
    resumed = make(tmp_path, data, **(options | {"max_steps": 3}))
    resumed.train(resume_from_checkpoint=True)
    assert all(w.isfinite().all() for w in weights(resumed).values())


def test_a_loss_of_nan_does_not_cost_good_weights(tmp_path, data):
    trainer = make(tmp_path, data)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *given: compute_loss(*given) * (float("nan") if trainer.state.global_step else 1)
    with pytest.raises(FloatingPointError, match="loss: got nan at step 1"):
        trainer.train()
    assert trainer._last_complete_checkpoint() == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("where", ["_load_from_checkpoint", "_load_optimizer_and_scheduler", "make_groups"])
def test_a_stop_while_resuming_leaves_the_checkpoint_alone(tmp_path, data, monkeypatch, where):
    def stop(*_, **__):
        raise KeyboardInterrupt

    trainer = make(tmp_path, data, save_strategy="steps", save_steps=1, optim="adamw_torch")
    trainer.train()
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()}
    for resumed in (trainer, make(tmp_path, data, max_steps=3, optim="adamw_torch")):
        monkeypatch.setattr(resumed, where, stop)
        with pytest.raises(KeyboardInterrupt):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before


@pytest.mark.parametrize("stop", [1, 3])
def test_resume_in_the_middle_of_a_cycle_is_sound(tmp_path, data, caplog, stop):
    options = {"num_iterations": 2, "max_steps": 6}
    saving = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, data, callbacks=[StopAt(stop)], **options, **saving).train()
    resumed = make(tmp_path, data, **options)
    resumed.train(resume_from_checkpoint=True)
    ratios = last(resumed, "policy/log_ratio_max")  # the update after the resume meets a new rollout
    logged = [step for step in range(6) if step != stop - 1]
    assert [ratio > 0 for ratio in ratios] == [step % 2 == 1 and step != stop for step in logged]
    told = [r.getMessage() for r in caplog.records if "in the middle of a cycle" in r.getMessage()]
    assert len(told) == 2  # as it was written and as it was resumed from
    which = {1: "no earlier checkpoint is at the end", 3: "checkpoint-2 is at the end of a whole cycle"}[stop]
    assert all(f"checkpoint-{stop} is" in m and "not bit-exact" in m and which in m for m in told)


def test_incomplete_checkpoints_are_passed_over(tmp_path, data):
    trainer = make(tmp_path, data, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: found no complete checkpoint.*train from the start"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    for name in ("checkpoint-9", "checkpoint-final"):
        (tmp_path / name).mkdir()
    assert trainer._last_complete_checkpoint() == str(tmp_path / "checkpoint-2")


# ------------------------------------------------------------------------------------------ evaluation


def test_evaluation_is_deterministic_and_leaves_training_alone(tmp_path, data, held_out):
    trainer = make(tmp_path, data, "compbench_mini", held_out, eval_strategy="steps", eval_steps=1)
    before = trainer.evaluate()
    again = trainer.evaluate()
    names = ("eval_reward", "eval_background/psnr", "eval_rewards/compbench_mini/mean")
    assert all(before[name] == again[name] for name in names)
    trainer.train()
    during = last(trainer, "eval_reward")
    after = trainer.evaluate()
    assert during[-1] == after["eval_reward"] and len({before["eval_reward"], *during}) == 3
    assert trainer.evaluate(held_out.select([0, 1, 2]))["eval_reward"] == after["eval_reward"]
    assert trainer.evaluate(held_out.select([0]))["eval_reward"] != after["eval_reward"]

    alone = make(tmp_path, data, "compbench_mini")
    alone.train()
    assert last(alone, "reward") == last(trainer, "reward") and same(weights(alone), weights(trainer))


def test_evaluation_under_another_name(tmp_path, data, held_out):
    trainer = make(tmp_path, data, eval_dataset=held_out)
    named = trainer.evaluate(held_out.select([0]), metric_key_prefix="test")
    usual, again = trainer.evaluate(), trainer.evaluate(held_out.select([0]), metric_key_prefix="test")
    assert not any(name.startswith("eval_") for name in named)
    assert named["test_reward"] == again["test_reward"] != usual["eval_reward"]
    assert named["test_background/psnr"] == again["test_background/psnr"]
    trainer.train()
    assert not any(name.startswith(("eval_", "test_")) for row in history(trainer) for name in row)


def test_evaluation_has_its_own_number_of_steps(tmp_path, data, held_out):
    steps = {"short": {}, "long": {"num_inference_steps": 6}, "mixed": {"num_inference_steps_eval": 6}}
    made = {name: make(tmp_path, data, eval_dataset=held_out, **given) for name, given in steps.items()}
    found = {name: trainer.evaluate()["eval_reward"] for name, trainer in made.items()}
    assert found["mixed"] == found["long"] != found["short"]
    for name in ("short", "mixed"):
        made[name].train()
    assert same(weights(made["short"]), weights(made["mixed"]))


def test_a_report_beforehand_leaves_no_trace_in_the_run(tmp_path, data, held_out):
    def logging(images, log_metric, **columns):
        log_metric("brightest", max(brightness(images)))
        return brightness(images)

    logs = []
    for reported in (False, True):
        trainer = make(tmp_path, data, logging, held_out, max_steps=1)
        if reported:
            judged = judge_held_out(trainer, trainer.eval_dataset, "before", batch_size=2)
            assert [one.row for one in judged] == [0, 1, 2] and all("attention" in one.pictures for one in judged)
            assert {"reward", "edit score", "background PSNR (dB)"} <= judged[0].scores.keys()
        trainer.train()
        logs.append(history(trainer))
    assert logs[0] == logs[1] and "brightest" in logs[0][0]


def test_best_adapter_is_loaded_at_the_end(tmp_path, data, held_out):
    def best_after_one(images, trainer_state, **columns):
        return [b + 9 * (trainer_state.global_step == 1) for b in brightness(images)]

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
    trainer = make(tmp_path, data, best_after_one, held_out, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    assert same({name.replace(".default", ""): w for name, w in weights(trainer).items()}, saved)


# ------------------------------------------------------------------------------------------ bad input


def broken_picture(rows):
    features = datasets.Features({**rows.features, "input_image": datasets.Image()})
    listed = [dict(rows[i]) for i in range(4)]
    listed[2]["input_image"] = {"bytes": b"not a picture", "path": None}
    return datasets.Dataset.from_list(listed, features=features)


def with_mask(rows, mask):
    listed = [dict(rows[i]) for i in range(4)]
    listed[1]["mask"] = mask
    return listed


BAD = {
    "mask of another size": (
        ValueError,
        r"train row 1, column 'mask': got .*\(16, 32\).*\(32, 32\).*resize",
        dict(change=lambda rows: with_mask(rows, Image.new("L", (32, 16), 255))),
    ),
    "empty mask": (
        ValueError,
        "train row 1, column 'mask': got an empty mask.*255 = edit",
        dict(change=lambda rows: with_mask(rows, Image.new("L", (32, 32)))),
    ),
    "no mask": (
        ValueError,
        "train row 1, column 'mask': got None.*drop the row",
        dict(change=lambda rows: with_mask(rows, None)),
    ),
    "no mask column": (
        ValueError,
        "mask_column: .*no column 'mask'.*'caption'.*rename",
        dict(change=lambda rows: rows.remove_columns("mask")),
    ),
    "no column for a reward": (
        ValueError,
        "columns .*'task'.*expected also 'caption'.*leave the reward out",
        dict(change=lambda rows: rows.remove_columns("caption"), reward="compbench_mini"),
    ),
    "broken picture": (
        ValueError,
        "train row 2, column 'input_image': got 13 bytes.*fix or drop",
        dict(change=broken_picture),
    ),
    "no rows": (ValueError, "train_dataset: got no rows", dict(change=lambda rows: [])),
    "no dataset": (ValueError, "train_dataset: got None, expected rows", dict(change=lambda rows: None)),
    "stream": (
        TypeError,
        "train_dataset: got IterableDataset.*turn a streaming dataset into",
        dict(change=lambda rows: rows.to_iterable_dataset()),
    ),
    "several evaluations": (
        TypeError,
        r"eval_dataset: got a dictionary of \['easy', 'hard'\], expected one set",
        dict(eval_dataset={"easy": [], "hard": []}),
    ),
    "too few rows": (
        ValueError,
        "train_dataset: got 12 rows, expected at least .* 16 edits .*lower one",
        dict(gradient_accumulation_steps=8),
    ),
    "no such layer": (
        ValueError,
        r"peft_config.target_modules: got \{'q_proj'\}, expected .* to_q,",
        dict(peft=LoraConfig(target_modules=["q_proj"])),
    ),
    "dropout": (
        ValueError,
        "peft_config.lora_dropout: got 0.1, expected 0",
        dict(peft=LoraConfig(target_modules=LAYERS, lora_dropout=0.1)),
    ),
    "KL without base": (ValueError, "beta: got 0.1 without peft_config, expected LoRA", dict(peft=None, beta=0.1)),
    "unknown reward": (
        ValueError,
        "reward_funcs: got 'compbench_mimi'.*did you mean 'compbench_mini'",
        dict(reward="compbench_mimi"),
    ),
    "weights": (ValueError, "reward_weights: got 2 weights, expected 1, one for each", dict(reward_weights=[1.0, 2.0])),
    "no rewards": (ValueError, "reward_funcs: got an empty list", dict(reward=[])),
    "scores for one too many": (
        RewardError,
        "'one_more' returned 3 scores, expected 2.*None where",
        dict(reward=lambda images, **columns: [0.0] * (len(images) + 1)),
    ),
    "no editor": (
        TypeError,
        "model: got Linear, expected a FluxKontextPipeline, a Hub id or a folder",
        dict(pipe=torch.nn.Linear(1, 1)),
    ),
}
BAD["scores for one too many"][2]["reward"].__name__ = "one_more"


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, data, case):
    error, message, given = BAD[case]
    given = {"pipe": None, **given}
    if case == "no editor":
        given["pipe"].set_progress_bar_config = lambda disable: None
    change = given.pop("change", lambda rows: rows)
    with pytest.raises(error, match=message):
        make(tmp_path, change(data), **given)


def test_refuses_engines_that_shard_the_model(tmp_path, data, monkeypatch):
    create = RCGRPOTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        RCGRPOTrainer,
        "create_accelerator_and_postprocess",
        lambda trainer: [create(trainer), setattr(trainer, "is_fsdp_enabled", True)],
    )
    with pytest.raises(ValueError, match="FSDP: got a sharded engine, expected plain data parallelism"):
        make(tmp_path, data)


def test_refuses_a_step_cache(tmp_path, data):
    pipe = build_tiny_kontext()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"model: the transformer has a step cache enabled.*disable_cache"):
        make(tmp_path, data, pipe=pipe)


def test_evaluate_refuses_what_start_up_refuses(tmp_path, data, held_out):
    trainer = make(tmp_path, data)
    with pytest.raises(TypeError, match="eval_dataset: got a dictionary"):
        trainer.evaluate({"easy": held_out})
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate(held_out.remove_columns("mask"))


def test_full_masks_are_only_a_warning(tmp_path, data, caplog):
    trainer = make(tmp_path, with_mask(data, Image.new("L", (32, 32), 255)), max_steps=1)
    (warning,) = [r.getMessage() for r in caplog.records if "covers the whole picture" in r.getMessage()]
    assert warning.startswith("train_dataset: 1 of the checked rows")
    trainer.train()
    assert last(trainer, "grad_norm")[0] > 0


def test_non_finite_loss_stops_at_once(tmp_path, data):
    trainer = make(tmp_path, data)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss: got nan at step 0 on train row \d.*lower learning_rate"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# ------------------------------------------------------------------------------------------ several processes


def on_two_processes(folder, worker):
    """The exit status and the errors of a script, whose argument is the folder."""
    (folder / "worker.py").write_text(worker)
    return on_processes(2, folder / "worker.py", folder)


WORKER = """
import sys
from pathlib import Path
import torch
import test_trainer as t
from rcgrpo import compbench_mini
from rcgrpo.evaluation import judge_held_out
folder, data = Path(sys.argv[1]), compbench_mini("train", 12, 32)
options = {**t.FOUR, "per_device_train_batch_size": 2, "train_micro_batch_size": 3}
options |= {"cache_conditions": True, "conditions_cache_dir": str(folder / "conditions"), "log_completions": True}
trainer = t.make(folder, data, t.flat_for_removals, compbench_mini("test", 3, 32), **options)
before = judge_held_out(trainer, trainer.eval_dataset, "before")
trainer.train()
after = judge_held_out(trainer, trainer.eval_dataset, "after")
judged = [[(one.row, one.scores, list(one.pictures)) for one in some] for some in (before, after)]
torch.save((t.weights(trainer), t.history(trainer), judged), folder / f"rank{trainer.args.process_index}.pt")
trainer.close()
"""


@pytest.mark.parametrize("reference", [flat_for_removals], indirect=True)
def test_two_processes_train_and_judge_what_one_does(tmp_path, reference, data, held_out):
    """With groups that one rank drops and the other has not, so that ranks differ in micro-batches."""
    status, errors = on_two_processes(tmp_path, WORKER)
    assert status == 0, errors[-3000:]
    (first, log, judged), (second, _, of_second) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert same(first, second)
    assert judged == of_second and judged[0] != judged[1]
    alone = make(tmp_path / "alone", data, flat_for_removals, held_out, **FOUR)
    for one, (row, scores, pictures) in zip(judge_held_out(alone, alone.eval_dataset, ""), judged[0], strict=True):
        assert (one.row, list(one.pictures), list(one.scores)) == (row, pictures, list(scores))
        measured = [[v or 0.0 for name, v in s.items() if name != "reward"] for s in (one.scores, scores)]
        assert measured[0] == pytest.approx(measured[1], rel=1e-3)  # this reward is a place in the batch
    _, start, (_, single) = reference
    assert distance(first, single, start) < 1e-5
    assert len(log) == 2 and 0 < log[0]["reward"] < 1
    cached = list(tmp_path.glob("conditions/image-*/*.safetensors"))
    assert len(cached) == 2 * 4 + 3  # of two updates, and the held-out edits
    for row in log:
        kept = str(tmp_path / "completions" / f"completions_{row['step']:05d}.parquet")
        table = datasets.Dataset.from_parquet(kept).to_pandas()
        assert table["edit"].nunique() == 4 and table["reward"].mean() == pytest.approx(row["reward"])


BATCH_WORKER = """
import sys
from pathlib import Path
import torch
import test_trainer as t
from rcgrpo import compbench_mini
folder, rows = Path(sys.argv[1]), t.sized_rows(compbench_mini("train", 12, 32))
shape = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": False}
for i, options in enumerate(t.BY_BATCH):
    trainer = t.make(folder, rows, [t.sized, t.pairs], **(t.BATCH | options | shape))
    trainer.train()
    torch.save(t.batch_advantages_of(trainer), folder / f"{i}rank{trainer.args.process_index}.pt")
"""


def test_the_batch_spans_the_processes(tmp_path):
    """One of which has a further turn."""
    status, errors = on_two_processes(tmp_path, BATCH_WORKER)
    assert status == 0, errors[-3000:]
    for i, options in enumerate(BY_BATCH):
        each = [torch.load(tmp_path / f"{i}rank{rank}.pt") for rank in (0, 1)]
        found, expected = each[0] | each[1], by_hand(options)
        assert sorted(map(len, each)) == [2, 3] and found.keys() == expected.keys()
        assert all(found[n] == pytest.approx(expected[n], abs=1e-5) for n in found)


FAILING_WORKER = """
import sys
from pathlib import Path
import test_trainer as t
from rcgrpo import compbench_mini
folder, rows = Path(sys.argv[1]), list(compbench_mini("train", 12, 32))
options = {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "shuffle_dataset": False, "max_steps": 4}
options |= {"train_micro_batch_size": 1, "check_rows": 1}

def run(name, data, change=lambda trainer: None):
    trainer = t.make(folder / name, data, **options)
    if trainer.args.process_index == 1:
        change(trainer)
    try:
        trainer.train()
    except Exception as error:
        (folder / f"{name}{trainer.args.process_index}").write_text(f"{type(error).__name__}: {error}")
        if name == "alone":
            raise

def poison(trainer):
    compute_loss, calls = trainer.compute_loss, []
    def spoiled(*given):
        calls.append(given)
        return compute_loss(*given) * float("nan" if len(calls) == 6 else 1)
    trainer.compute_loss = spoiled

def stop(model):
    raise LookupError("only here")

run("picture", rows[:5] + [{**rows[5], "input_image": b"not a picture"}] + rows[6:])
run("loss", rows, poison)
run("alone", rows, lambda trainer: trainer.add_callback(t.StopAt(1, stop)))
"""


def test_what_one_process_meets_stops_both(tmp_path):
    """A broken picture and a loss of NaN on the second are agreed on, after a checkpoint; else both end without one."""
    status, errors = on_two_processes(tmp_path, FAILING_WORKER)
    assert status != 0 and "LookupError: only here" in errors
    assert (tmp_path / "alone1").read_text() == "LookupError: only here"
    wanted = {"picture": "RuntimeError: process 1: ValueError: train row 5, column 'input_image': got 13 bytes"}
    wanted |= {"loss": "FloatingPointError: process 1: loss: got nan at step 1 on train row 3"}
    for name, message in wanted.items():
        told = [(tmp_path / f"{name}{rank}").read_text() for rank in (0, 1)]
        assert told[0] == told[1] and told[0].startswith(message)
    found = sorted(str(folder.relative_to(tmp_path)) for folder in tmp_path.glob("*/checkpoint-*"))
    assert found == ["loss/checkpoint-1", "picture/checkpoint-2"]


def test_judges_work_while_the_next_edits_are_rolled_out(tmp_path, data):
    import threading

    rolled_out = threading.Event()

    def patient(images, **columns):
        if len(scored) >= 1:
            assert rolled_out.wait(20), "the next micro-batch was not rolled out meanwhile"
        scored.append(len(images))
        return brightness(images)

    scored = []
    trainer = make(tmp_path, data, patient, gradient_accumulation_steps=2, max_steps=1)
    roll_out, calls = trainer.make_groups, []

    def watched(*given, **options):
        groups = roll_out(*given, **options)
        calls.append(len(groups))
        if len(calls) == 2:
            rolled_out.set()
        return groups

    trainer.make_groups = watched
    trainer.train()
    assert last(trainer, "rewards/failures") == [0.0] and len(calls) == 2
