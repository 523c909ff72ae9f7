"""`group_log.py`: one group's numbers, by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.data.edits import Edit
from rcgrpo.editors.attention import Concentration
from rcgrpo.groups.group_log import group_log
from rcgrpo.groups.rollout import Group
from rcgrpo.groups.scoring import GroupScoring
from rcgrpo.rewards import ScoredBatch, resolve_rewards


def first(images, **columns):
    return [0.0] * len(images)


def second(images, **columns):
    return [0.0] * len(images)


def grey(*levels):
    return [Image.new("RGB", (8, 8), (level,) * 3) for level in levels]


def group_of(images, attention=None):
    """An edit of the left half of a grey square; of its 4 tokens the first two are the region."""
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    edit = Edit(0, "row 0", grey(100)[0], "go", mask, {})
    trajectory = torch.arange(3.0 * len(images) * 4).view(3, len(images), 4, 1)
    region = torch.tensor([1.0, 1, 0, 0])
    return Group(edit, None, None, region, trajectory, images, attention, None)


def scored(group, values, **options):
    """Scored and compared as a batch of its own would be."""
    rewards = resolve_rewards([first, second])
    scoring = GroupScoring(rewards, torch.tensor([1.0, 2.0]), power=2.0, **options)
    scoring.fill_in([group], ScoredBatch([r.name for r in rewards], torch.tensor(values), []))
    scoring.compare([group])
    return scoring


def test_a_group_of_two():
    group = group_of(grey(100, 110), Concentration(*torch.tensor([[0.2, 0.4], [1.0, 2.0], [0.0, 1.0]])))
    found = group_log(group, scored(group, [[1.0, 0.0], [3.0, 1.0]]))
    psnr = found.pop("background/psnr")
    assert psnr == pytest.approx([100, -20 * np.log10(10 / 255)], abs=1e-3)  # the same pixels, and 10 of 255 apart
    numbers = {name: value for name, value in found.items() if not name.startswith("diagnostics/")}
    assert numbers == pytest.approx(
        {
            "reward": 3.0,  # of 1 and 5
            "rewards/first/mean": 2.0,
            "rewards/first/std": 1.0,
            "rewards/second/mean": 0.5,
            "rewards/second/std": 0.5,
            "reward_std": 2.0,
            "frac_reward_zero_std": 0.0,
            "groups/scored_candidates": 2.0,
            "attention/mass": 0.3,
            "attention/density": 1.5,
            "attention/contrast": 0.5,
        }
    )
    assert {"diagnostics/leakage", "diagnostics/latent_var_inside/step_2"} <= found.keys()
    assert list(found)[:2] == ["reward", "rewards/first/mean"]


def test_one_candidate_has_no_spread():
    group = group_of(grey(100))
    found = group_log(group, scored(group, [[1.0, 0.5]]))
    assert found.keys() == {"reward", "background/psnr", "rewards/first/mean", "rewards/second/mean"}
    assert found["reward"] == 2.0


def test_regions_tell_their_own_scores():
    group = group_of(grey(100, 110))
    regions = {"reward_regions": ["keep", "edit"], "named_regions": ["edit", "keep"]}
    found = group_log(group, scored(group, [[1.0, 0.5], [1.0, 1.5]], **regions))
    assert {name: value for name, value in found.items() if name.startswith("regions/")} == pytest.approx(
        {
            "regions/edit/reward": 2.0,  # of 1 and 3
            "regions/edit/reward_std": 1.0,
            "regions/edit/frac_reward_zero_std": 0.0,
            "regions/edit/advantage_std": 1.0,
            "regions/keep/reward": 1.0,
            "regions/keep/reward_std": 0.0,
            "regions/keep/frac_reward_zero_std": 1.0,
            "regions/keep/advantage_std": 0.0,
        },
        abs=1e-6,
    )
