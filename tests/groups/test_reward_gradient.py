"""`reward_gradient.py`: which pixels a reward's gradient reaches."""

import numpy as np
import pytest
import torch

from rcgrpo.groups.reward_gradient import reward_of_prediction
from rcgrpo.groups.transitions import gather
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
