"""The rewards' own gradient, for those that are written on tensors: into predictions of results, region by region.

Where it fits: the trainer's loss may follow it beside the policy (`reward_gradient_weight`; algorithm section 8). Why:
a group of a dozen candidates guesses its reward's direction from a dozen numbers; here the direction is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..editors.base import FlowEditor
from ..inputs.masks import mask_to_tensor
from ..maths.objective import predict_clean
from ..rewards import Reward
from .rollout import Group
from .transitions import Transitions


@dataclass
class Way:
    """The ODE's way from transitions to their results, with a gradient through all of it.

    `clean` `[B, N, C]`: where it ends. `latents` and `velocity` `[steps, B, N, C]`, `timesteps` `[steps, B]`: where the
    model was asked, and what it answered; a transition with fewer steps repeats its last. `lengths` `[B]`: how many.
    """

    clean: Tensor
    latents: Tensor
    velocity: Tensor
    timesteps: Tensor
    lengths: Tensor

    def places(self, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """One place of each way, all equally likely: latents, timesteps and velocity there.

        Args:
            generators: on the CPU, one for each way.
        """
        draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        step = (draws.to(self.lengths.device) * self.lengths).long()
        each = torch.arange(len(step), device=step.device)
        return self.latents[step, each], self.timesteps[step, each], self.velocity[step, each]


def follow(editor: FlowEditor, model: nn.Module, transitions: Transitions, velocity: Tensor, steps: int) -> Way:
    """Where the ODE leads from each transition, and the places on the way.

    Euler's steps along the rollout's own noise levels, of which the last goes straight to the end: one step is
    `predict_clean`, as many as the rollout has are the rollout itself (DRaFT, arXiv 2309.17400, with its K the steps
    that are left). Memory and time grow with every step.

    Args:
        velocity: `[batch, tokens, channels]`, the model's answer at the transitions.
        steps: model calls of a transition at most, that answer among them; at late noise levels fewer are left.
    """
    schedule = transitions.groups[0].schedule
    levels, times = schedule.sigmas.to(velocity.device), schedule.timesteps.to(velocity.device)
    start = torch.tensor([step for _, _, step in transitions.where], device=velocity.device)
    at = start.clone()
    latents, velocity = transitions.latents, velocity.float()
    visited = [(latents, velocity, times[at])]
    for _ in range(steps - 1):
        (going,) = torch.nonzero(at + 1 < len(times), as_tuple=True)
        if not len(going):
            break
        taken = latents[going] + (levels[at + 1] - levels[at])[going].view(-1, 1, 1) * velocity[going]
        at[going] += 1
        answer = editor.velocity(model, taken, times[at[going]], transitions.conditions[going]).float()
        latents, velocity = latents.index_put((going,), taken), velocity.index_put((going,), answer)
        visited.append((latents, velocity, times[at]))
    asked, answers, timesteps = map(torch.stack, zip(*visited, strict=True))
    return Way(predict_clean(latents, velocity, levels[at]), asked, answers, timesteps, at - start + 1)


def reward_of_prediction(
    editor: FlowEditor,
    clean: Tensor,
    groups: Sequence[Group],
    rewards: Sequence[Reward],
    weights: Sequence[float],
    regions: Sequence[str] = (),
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """The weighted sum of the rewards that have a gradient, on clean latents; 0 where none applies.

    Args:
        clean: `[batch, tokens, channels]`, predictions of results, all of one size.
        groups: whose predictions they are, `batch` of them.
        rewards, weights: of the run.
        regions: `edit` or `keep` for each reward: it reaches the pixels of its own region alone, and the others are
            constants to it. Without them a reward reaches all pixels.
        generators: on the CPU, one for each picture, for rewards that look at it in a random view.

    Returns:
        `[batch]`, with a gradient into `clean`.
    """
    pictures = editor.decode_tensor(clean, *groups[0].size)
    masks = [group.mask for group in groups]
    inside = torch.stack([mask_to_tensor(mask) for mask in masks]).unsqueeze(1).to(pictures)
    names = set.intersection(*(set(group.edit.columns) for group in groups))
    columns: dict[str, Any] = {name: [group.edit.columns[name] for group in groups] for name in sorted(names)}
    columns |= {"prompts": [group.edit.prompt for group in groups], "source_images": [g.source for g in groups]}
    columns["generators"] = generators
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
