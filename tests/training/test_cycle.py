"""`cycle.py`: rolled out, scored and kept for as many updates as a rollout serves; evaluation."""

from dataclasses import fields, replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from rcgrpo.editors.attention import AttentionOptions
from rcgrpo.groups.rollout import make_groups
from rcgrpo.groups.transitions import gather
from tiny_kontext import build_tiny_kontext
from tiny_training import (
    FLOW_GRPO,
    brightness,
    by_number,
    distance,
    history,
    last,
    make,
    redness,
    rolled_out,
    same,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def test_evaluation_of_a_stochastic_policy_follows_the_ode(tmp_path, data, held_out):
    results = [make(tmp_path, data, eval_dataset=held_out, **o).evaluate() for o in ({}, FLOW_GRPO)]
    assert results[0]["eval_reward"] == results[1]["eval_reward"]


class Seen(TrainerCallback):
    """What a callback is handed."""

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs = {**getattr(self, "logs", {}), **logs}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics, self.given = {**getattr(self, "metrics", {}), **metrics}, kwargs


def test_several_held_out_sets_are_judged_each_by_itself(tmp_path, data, held_out, capsys):
    """And callbacks see of it what TRL's see, and a person can read it."""
    sets, seen = {"near": held_out, "far": held_out.select([1])}, Seen()
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "metric_for_best_model": "eval_far_reward"}
    trainer = make(tmp_path, data, eval_dataset=sets, callbacks=[seen], log_completions=True, **options)
    trainer.train()
    near, far = (last(trainer, f"eval_{name}_reward") for name in sets)
    assert len(near) == len(far) == 1 and near != far
    assert {path.stem for path in (tmp_path / "completions").glob("eval*.parquet")} == {
        "eval_near_completions_00001",
        "eval_far_completions_00001",
    }
    assert trainer.state.best_metric == far[0]
    assert [seen.metrics[f"eval_{name}_reward"] for name in sets] == [near[0], far[0]]
    assert seen.logs.keys() >= {"reward", "loss", "learning_rate", "eval_near_reward", "eval_far_reward"}
    assert seen.given["model"] is trainer.model and seen.given["processing_class"] is trainer.pipeline.tokenizer
    assert all(seen.given[name] is not None for name in ("optimizer", "lr_scheduler", "train_dataloader"))
    said = capsys.readouterr().out
    assert "eval near 1/1  reward 0." in said and "eval far 1/1  reward 0." in said and "{'" not in said
    again = trainer.evaluate({"one": held_out})
    assert again["eval_one_reward"] == pytest.approx(near[0], abs=1e-7)
    assert trainer.evaluate(held_out)["eval_reward"] == again["eval_one_reward"]


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
