"""The rewards' own gradient, for those that are written on tensors: into one-step predictions, region by region.

Where it fits: the trainer's loss may follow it beside the policy (`reward_gradient_weight`; algorithm section 8). Why:
a group of a dozen candidates guesses its reward's direction from a dozen numbers; here the direction is known.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..editors.base import FlowEditor
from ..inputs.masks import mask_to_tensor
from ..rewards import Reward
from .rollout import Group


def reward_of_prediction(
    editor: FlowEditor,
    clean: Tensor,
    groups: Sequence[Group],
    rewards: Sequence[Reward],
    weights: Sequence[float],
    regions: Sequence[str] = (),
) -> Tensor:
    """The weighted sum of the rewards that have a gradient, on clean latents; 0 where none applies.

    Args:
        clean: `[batch, tokens, channels]`, predictions of results, all of one size.
        groups: whose predictions they are, `batch` of them.
        rewards, weights: of the run.
        regions: `edit` or `keep` for each reward: it reaches the pixels of its own region alone, and the others are
            constants to it. Without them a reward reaches all pixels.

    Returns:
        `[batch]`, with a gradient into `clean`.
    """
    pictures = editor.decode_tensor(clean, *groups[0].size)
    masks = [group.mask for group in groups]
    inside = torch.stack([mask_to_tensor(mask) for mask in masks]).unsqueeze(1).to(pictures)
    names = set.intersection(*(set(group.edit.columns) for group in groups))
    columns = {name: [group.edit.columns[name] for group in groups] for name in sorted(names)}
    columns |= {"prompts": [group.edit.prompt for group in groups], "source_images": [g.source for g in groups]}
    total = torch.zeros(len(groups), device=clean.device)
    for reward, weight, region in zip(rewards, weights, regions or [""] * len(rewards), strict=True):
        if reward.differentiable is None or not weight:
            continue
        shown = pictures
        if region:
            shown = pictures.detach().lerp(pictures, 1 - inside if region == "keep" else inside)
        values = reward.differentiable(shown, masks=masks, **columns).to(total)
        total = total + weight * values.nan_to_num(0.0)
    return total
