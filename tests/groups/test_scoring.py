"""`scoring.py`: from rewards to advantages, as a trainer on a random model of 32 x 32 pixels meets them."""

import itertools
import logging

import numpy as np
import pytest
import torch

from rcgrpo import compbench_mini
from rcgrpo.maths.objective import quasi_norm
from tiny_training import (
    BATCH,
    BY_BATCH,
    batch_advantages_of,
    brightness,
    by_number,
    distance,
    history,
    last,
    make,
    on_two_processes,
    pairs,
    redness,
    rolled_out,
    same,
    sized,
    sized_rows,
    trained_step_by_step,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def data():
    return compbench_mini("train", 12, 32)


@pytest.fixture(scope="module")
def held_out():
    return compbench_mini("test", 3, 32)


def test_negative_advantages_are_clipped_in_each_region(tmp_path, data):
    options = {"region_advantages": True, "reward_regions": ["edit", "keep"], "keep_strength": 0.5, "max_steps": 1}
    pair = []
    for clip in (0.2, None):
        trainer = make(tmp_path, data, [by_number, brightness], negative_advantage_clip=clip, **options)
        trainer.train()
        pair.append(trainer._buffer[0][0].advantages)
    assert (pair[1] < -0.2).any(-1).all() and torch.equal(pair[0], pair[1].clamp(min=-0.2)) and len(pair[0]) == 2


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


class Dying:
    """A judge that works at start-up and for so many updates."""

    reward_name = "judge"

    def __init__(self, works=0):
        self.works, self.probed = works, False

    def __call__(self, images, trainer_state, **columns):
        if self.probed and trainer_state.global_step >= self.works:
            raise OSError("no such server")
        self.probed = True
        return brightness(images)


def test_a_reward_that_raises_is_named_and_the_run_goes_on(tmp_path, data, caplog):
    trainer = make(tmp_path, data, ["background_keep", Dying()], max_reward_failures=2, max_steps=4)
    caplog.clear()
    trainer.train()
    assert trainer.state.global_step == 4 and last(trainer, "grad_norm") == [0, 0, 0, 0]
    assert last(trainer, "rewards/failures") == [8.0] * 4
    # what is left to compare by is no score: with the next batch's it would be averaged with sums of two rewards
    assert len(last(trainer, "rewards/background_keep/mean")) == 4 and last(trainer, "reward") == []
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("'judge'" in m and "train row" in m and "no such server" in m for m in messages)
    assert trainer.failures.counts == {"background_keep": 0, "judge": 32}
    loud = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [n for n in (2, 4) if any(f"'judge' failed on every candidate of {n} batches" in m for m in loud)] == [2, 4]
    assert [n for n in (2, 4) if any(f"no candidate of {n} batches in a row has a score" in m for m in loud)] == [2, 4]
    assert last(trainer, "rewards/judge/silent_batches") == [1, 2, 3, 4] == last(trainer, "groups/unscored_batches")


REGIONS_OF_TWO = {"region_advantages": True, "reward_regions": ["edit", "keep"], "keep_strength": 0.2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"multi_objective_aggregation": "normalize_then_sum"},
        REGIONS_OF_TWO,
        {**REGIONS_OF_TWO, "scale_rewards": "batch", "beta": 0.1, "keep_hinge_weight": 1.0},
        {**REGIONS_OF_TWO, "policy": "nft", "attention_reward_weight": 0.1},
        {"policy": "flow_grpo", "policy_steps_range": [0, 0.67]},
        {"policy": "nft", "beta": 0.1},
        {"beta": 0.1, "keep_hinge_weight": 1.0, "num_iterations": 2, "max_grad_norm": 0.0},
    ],
)
def test_a_dead_judge_teaches_nothing(tmp_path, data, options):
    """Beside a living reward; neither weight decay nor what the optimizer remembers of better days moves a bit."""
    works = dead = options.get("num_iterations", 1)
    adam = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01, "max_steps": works + dead}
    trainer = make(tmp_path, data, [Dying(works), "background_keep"], **(adam | options))
    start = weights(trainer)
    found = [start, *trained_step_by_step(trainer)]
    moved = [not same(a, b) for a, b in itertools.pairwise(found)]
    assert moved == [True] * works + [False] * dead and trainer.state.global_step == works + dead


@pytest.mark.parametrize("options", [{}, {"scale_rewards": "batch"}, REGIONS_OF_TWO])
def test_candidates_that_the_judge_fails_on_teach_nothing(tmp_path, data, options):
    """The others are compared as if these had not been drawn, by either reward and in either region."""

    def judge(images, **columns):
        return [float("nan") if i % 4 == 2 else value for i, value in enumerate(by_number(images, **columns))]

    def other(images, **columns):
        return [float(i % 4) ** 2 for i in range(len(images))]

    (group,) = rolled_out(make(tmp_path, data, [judge, other], advantage_power=2.0, **options), data)
    advantages = torch.atleast_2d(group.advantages)
    assert not advantages[:, 2].any() and group.scores[2].isnan() and group.rewards[2, 1] == 4
    assert group.compared[2].isnan().all() and group.compared[[0, 1, 3]].isfinite().all()
    kept = torch.tensor([0.0, 1.0, 9.0])
    if options is REGIONS_OF_TWO:
        assert torch.allclose(advantages[1, [0, 1, 3]], (kept - kept.mean()) / kept.std(correction=0), atol=1e-5)
        assert group.region_scores[:, 2].isnan().all()


def test_a_region_of_no_weight_takes_nobody_out(tmp_path, data):
    def judge(images, **columns):
        return [float("nan")] * len(images)

    options = REGIONS_OF_TWO | {"region_advantage_weights": [0.0, 1.0]}
    (group,) = rolled_out(make(tmp_path, data, [judge, by_number], **options), data)
    assert not group.advantages[0].any() and group.advantages[1].any()


def test_rewards_that_draw_spoil_neither_logs_nor_later_updates(tmp_path, data, held_out):
    def drawing(images, source_images, masks, edited_image, **columns):
        for picture in (*images, *source_images, *masks, *edited_image):
            picture.thumbnail((4, 4))
            picture.paste(0, (0, 0, *picture.size))
        return by_number(images, **columns)

    found = []
    for first in (drawing, by_number):  # under one name
        first.reward_name = "first"
        trainer = make(tmp_path, data, [first, "background_keep", brightness], held_out, num_iterations=2)
        trainer.train()
        found.append((weights(trainer), history(trainer), trainer.evaluate()["eval_background/psnr"]))
    assert same(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_sources_and_masks_may_have_any_name(tmp_path, data):
    seen = {}

    def look(images, prompts, masks, labels, **columns):
        seen.update(prompt=prompts[0], mask=masks[0], label=labels[0], names=sorted(columns))
        return brightness(images)

    names = {"input_image": "images", "instruction": "prompts", "mask": "masks"}
    rows = [{names.get(key, key): value for key, value in row.items()} | {"labels": "mine"} for row in data]
    columns = {"image_column": "images", "prompt_column": "prompts", "mask_column": "masks"}
    (group,) = rolled_out(make(tmp_path, rows, look, **columns), data)
    assert (seen["prompt"], seen["label"]) == (data[0]["instruction"], "mine") and seen["mask"] == group.mask
    assert {"caption", "edited_image", "completions", "log_extra"} <= set(seen["names"])


def test_large_rewards_teach_as_small_ones_do(tmp_path, data):
    found = []
    for factor in (1.0, 3e38):

        def scaled(images, factor=factor, **columns):
            return [factor * value / 2 for value in by_number(images, **columns)]

        trainer = make(tmp_path / str(factor), data, scaled, max_steps=1)
        start = weights(trainer)
        trainer.train()
        found.append(weights(trainer))
    assert distance(found[1], found[0], start) < 1e-4


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


BATCH_WORKER = """
import sys
from pathlib import Path
import torch
import tiny_training as t
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
