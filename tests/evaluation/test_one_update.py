"""`one_update.py`: the step that is shown is the one that training takes, and its parts say what they claim."""

import json
import math

import pytest
import torch

from rcgrpo.evaluation.one_update import _round_number, describe, explain_update, write_update
from rcgrpo.evaluation.one_update_picture import update_pictures
from rcgrpo.groups.transitions import gather
from rcgrpo.maths.objective import predict_clean
from rcgrpo.maths.regions import to_places
from tiny_kontext import build_tiny_kontext
from tiny_training import FLOW_GRPO, brightness, by_number, make, redness, same, weights

pytestmark = pytest.mark.filterwarnings("ignore")

ONE = {"per_device_train_batch_size": 1, "max_steps": 1, "mask_growth": 0.0}
REGIONS = {"region_advantages": True, "reward_regions": ["edit", "keep"], "keep_strength": 0.2}


def explained(trainer, row=0):
    return explain_update(trainer, trainer.train_dataset.edit(row))


def predictions(trainer, update):
    place = gather([update.group], update.where, trainer.policy, {})
    with torch.no_grad():
        velocity = trainer.editor.velocity(trainer.model, place.latents, place.timestep, place.conditions)
    return predict_clean(place.latents, velocity, place.sigma)


@pytest.mark.parametrize("options", [{}, {"optim": "adamw_torch", "learning_rate": 1e-3, "train_micro_batch_size": 1}])
def test_the_step_is_the_one_that_training_takes(tmp_path, data, options):
    trainer = make(tmp_path, data.select([3]), reward=redness, **ONE, **options)
    before = weights(trainer)
    update = explained(trainer)
    assert same(before, weights(trainer)) and not trainer._metrics["train"]
    assert all(p.grad is None for p in trainer.model.parameters()) and trainer.optimizer is None
    old = predictions(trainer, update)
    trainer.train()
    (kept,) = trainer._buffer[0]
    assert torch.equal(kept.trajectory, update.group.trajectory)
    assert torch.equal(kept.advantages, update.group.advantages)
    moved = predictions(trainer, update) - old
    grid = trainer.editor.grid_for(*update.group.size)
    lengths = to_places(moved, grid).square().sum(-3).sqrt().mean(0)
    assert torch.allclose(update.moved, lengths, rtol=1e-3, atol=1e-3 * float(lengths.max()))
    assert update.change == pytest.approx(float(moved.norm() / old.norm()), rel=1e-3) and update.stretch == 1
    again = explained(trainer)  # after training, from a fresh optimizer at the full rate
    assert again.change > 0 and not torch.equal(again.moved, update.moved)


def test_what_is_shared_and_what_is_asked_stays_in_the_region(tmp_path, data):
    update = explained(make(tmp_path, data, keep_weight=0.0, **ONE))
    assert update.noise.outside == 0 and 0.3 < update.noise.inside < 0.7  # edit_strength 0.5, of four candidates
    assert torch.equal(update.spread > 0, update.region > 0) and 0 < update.region.mean() < 1
    assert update.asked[update.region > 0].all() and update.inside(update.asked) == 1
    assert 0 < update.inside(update.moved) < 1, "the model passes on what it is taught elsewhere"
    assert math.isnan(update.inside(0 * update.asked))


def test_the_step_goes_the_way_of_the_advantages(tmp_path, data):
    """The whole model, all anchors and the one step at which the group starts: a step is nearly the pull itself."""
    whole = {"peft": None, "learning_rate": 0.05, "num_policy_steps": 1, "policy_steps_range": [0, 0.34]}
    update = explained(make(tmp_path, data, redness, num_generations=6, num_anchors=6, **whole, **ONE))
    found = update.numbers()
    assert found["follows_advantages"]["all"] > 0.5
    assert [c["candidate"] for c in found["candidates"]] == update.best_first
    assert found["candidates"][0]["rewards"]["redness"] == max(c["rewards"]["redness"] for c in found["candidates"])


def test_a_group_without_spread_teaches_nothing(tmp_path, data):
    update = explained(make(tmp_path, data, lambda images, **columns: [1.0] * len(images), **ONE))
    assert not update.moved.any() and not update.asked.any() and update.pulls.isnan().all()
    text = write_update(tmp_path / "out", update, {})
    assert "the group teaches nothing" in text
    assert json.loads((tmp_path / "out" / "update.json").read_text())["moved_inside"] is None


@pytest.mark.parametrize(
    "options", [{"policy": "nft"}, FLOW_GRPO, {"exploration": "global"}, {**REGIONS, "num_generations": 14}]
)
def test_every_policy_is_drawn(tmp_path, data, options):
    rewards = [brightness, by_number] if "reward_regions" in options else brightness
    update = explained(make(tmp_path, data, rewards, **{**ONE, **options}), row=2)
    folder = tmp_path / "out"
    text = write_update(folder, update, {"seed": 0})
    assert sorted(path.name for path in folder.iterdir()) == ["update.json", "update.md", "update.png"]
    assert update.group.edit.prompt in text and f"#{update.best_first[0]}" in text.splitlines()[4]
    content = json.loads((folder / "update.json").read_text())
    assert (
        content["settings"]["seed"] == 0
        and content["change"] > 0
        and len(content["candidates"]) == len(update.group.images)
    )
    pictures = update_pictures(update)
    assert pictures["what one step moves"].size == (32, 32) and pictures["#1"] is update.group.images[1]
    assert update.rows == (["edit", "keep"] if "reward_regions" in options else ["all"])


def test_half_precision_gets_a_step_that_is_seen(tmp_path, data):
    pipe = build_tiny_kontext().to(torch.bfloat16)
    small = {"learning_rate": 1e-5, "optim": "adamw_torch", **ONE}
    update = explained(make(tmp_path, data, redness, pipe=pipe, **small))
    assert update.stretch > 1 and 0.003 < update.change < 0.03
    assert f"drawn {update.stretch:.0f} times as long" in describe(update)


def test_numbers_that_a_person_can_read():
    assert [_round_number(value) for value in (0.3, 1, 4.9, 37, 2222)] == [1, 1, 2, 20, 2000]
