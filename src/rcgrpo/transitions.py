"""From groups to what one update reads: anchors at a step, with where their group's candidates went.

Between rollout and `compute_loss`. Which anchors and steps are taken is drawn from a key, so every process, every
iteration over the same rollout and every resume takes the same ones. Micro-batches are gathered one at a time.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .editors import Conditions
from .noise import keyed_generator
from .rollout import Group

Where = tuple[int, int, int]
"""A transition's place: (group, anchor, step)."""


@dataclass
class Transitions:
    """A micro-batch for `compute_loss`: anchors at a step, with where their group's candidates went.

    `latents` `[B, N, C]`, `timestep`, `sigma`, `next_sigma` `[B]`, `candidates` `[B, G, N, C]` (next latents, or clean
    predictions), `region` `[B, N]`, `advantages` `[B, G]`; `old_log_probs` `[B, G]` once known.
    """

    latents: Tensor
    timestep: Tensor
    sigma: Tensor
    next_sigma: Tensor
    candidates: Tensor
    region: Tensor
    advantages: Tensor
    conditions: Conditions
    old_log_probs: Tensor | None
    where: list[Where]


def choose(
    groups: Sequence[Group], num_anchors: int, num_steps: int, steps: Sequence[int], key: tuple[Any, ...]
) -> list[Where]:
    """Draw `num_anchors` trajectories of each group and `num_steps` of the allowed steps of each.

    Groups whose advantages are all zero teach nothing and are left out. If that leaves nothing, one transition stays,
    so that every process takes part in the exchange of gradients.
    """
    chosen: list[Where] = []
    for i, group in enumerate(groups):
        if group.advantages is None or not bool(group.advantages.any()):
            continue
        generator = keyed_generator(*key, group.edit.row, "anchors")
        for anchor in torch.randperm(len(group.images), generator=generator)[:num_anchors].tolist():
            order = torch.randperm(len(steps), generator=generator)[:num_steps].tolist()
            chosen += [(i, anchor, steps[k]) for k in sorted(order)]
    return chosen or [(0, 0, steps[0])]


def micro_batches(groups: Sequence[Group], chosen: Sequence[Where], size: int | None) -> list[list[Where]]:
    """Split into micro-batches of at most `size` transitions, each of one picture size."""

    def picture_size(where: Where) -> tuple[int, int]:
        return groups[where[0]].size

    batches: list[list[Where]] = []
    for _, same in itertools.groupby(sorted(chosen, key=picture_size), picture_size):
        members = list(same)
        limit = size or len(members)
        batches += [members[i : i + limit] for i in range(0, len(members), limit)]
    return batches


def gather(
    groups: Sequence[Group], where: list[Where], distance_space: str, old_log_probs: Mapping[Where, Tensor]
) -> Transitions:
    """Collect one micro-batch.

    Args:
        where: transitions of one picture size.
        distance_space: `"latents"`: candidates are compared where their next step took them; `"clean"`: by the one-step
            predictions of the result that their own velocity implies.
        old_log_probs: `[group]` for each transition that an earlier iteration has seen.
    """
    picked = [groups[g] for g, _, _ in where]
    device = picked[0].trajectory.device

    def stack(values: Any) -> Tensor:
        return torch.stack(list(values)).to(device)

    placed = list(zip(picked, where, strict=True))
    sigma = stack(g.schedule.sigmas[t] for g, (_, _, t) in placed)
    next_sigma = stack(g.schedule.sigmas[t + 1] for g, (_, _, t) in placed)
    candidates = stack(g.trajectory[t + 1] for g, (_, _, t) in placed)
    if distance_space == "clean":
        before = stack(g.trajectory[t] for g, (_, _, t) in placed)
        velocity = (candidates - before) / (next_sigma - sigma).view(-1, 1, 1, 1)
        candidates = before - sigma.view(-1, 1, 1, 1) * velocity
    return Transitions(
        latents=stack(g.trajectory[t, b] for g, (_, b, t) in placed),
        timestep=stack(g.schedule.timesteps[t] for g, (_, _, t) in placed),
        sigma=sigma,
        next_sigma=next_sigma,
        candidates=candidates,
        region=stack(g.region for g in picked),
        advantages=stack(g.advantages for g in picked),
        conditions=Conditions.concatenate([g.conditions for g in picked]),
        old_log_probs=stack(old_log_probs[w] for w in where) if where[0] in old_log_probs else None,
        where=where,
    )
