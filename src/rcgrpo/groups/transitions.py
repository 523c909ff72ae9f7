"""From groups to what one update reads: anchors at a step, with where their group's candidates went.

Between rollout and `compute_loss`. Which anchors and steps are taken is drawn from a key, so every process, every
iteration over the same rollout and every resume takes the same ones. What is read at a place, a `Reading`, is the
policy's business (`policies`); here readings are chosen and collected, one micro-batch at a time.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..editors import Conditions
from ..maths.noise import keyed_generator
from .rollout import Group

Where = tuple[int, int, int]
"""A transition's place: (group, anchor, step)."""


class Reading(NamedTuple):
    """What a policy reads at one place.

    `latents` `[N, C]` and, scalars, `timestep`, `sigma`, `next_sigma`: what the model is asked; `candidates`
    `[S, N, C]`: what its answer is compared with; `advantages` and `weights`, `[rows, S]` and `[rows, N]`: one row for
    each objective that acts on tokens of its own; `std` `[N]` and `noise` `[N, C]`: what was injected there;
    `next_latents` `[N, C]`: where the rollout went from there.
    """

    latents: Tensor
    timestep: Tensor
    sigma: Tensor
    next_sigma: Tensor
    candidates: Tensor
    advantages: Tensor
    weights: Tensor
    std: Tensor
    noise: Tensor
    next_latents: Tensor


class Reader(Protocol):
    """What this room knows of a policy."""

    def teaches(self, group: Group, steps: Sequence[int]) -> tuple[Sequence[bool], list[int]]:
        """Which of the group's trajectories may be anchors, and which of the steps may be trained on."""

    def read(self, group: Group, anchor: int, step: int) -> Reading:
        """One place."""


@dataclass
class Transitions:
    """A micro-batch for `compute_loss`: readings, stacked, and what comes with them.

    `latents` `[B, N, C]`, `timestep`, `sigma`, `next_sigma` `[B]`, `candidates` `[B, S, N, C]`, `advantages`
    `[B, rows, S]`, `weights` `[B, rows, N]`, `std` and `region` `[B, N]`, `noise` and `next_latents` `[B, N, C]`;
    `old`, what the policy that made the candidates had to say of them, `[B, ...]`, once known; `groups`,
    each one's own.
    """

    latents: Tensor
    timestep: Tensor
    sigma: Tensor
    next_sigma: Tensor
    candidates: Tensor
    advantages: Tensor
    weights: Tensor
    std: Tensor
    noise: Tensor
    next_latents: Tensor
    region: Tensor
    conditions: Conditions
    old: Tensor | None
    where: list[Where]
    groups: list[Group]

    @property
    def taught(self) -> Tensor:
        """`[B]`, 1 where any candidate has a say; 0 in the placeholder of a batch of dropped groups."""
        return self.advantages.ne(0).flatten(1).any(-1).float()

    @property
    def elements(self) -> Tensor:
        """`[B, N, C]` in {0, 1}, the region on the elements of the latents."""
        return torch.stack([cast(Tensor, group.elements) for group in self.groups]).to(self.latents.device)

    def generators(self, name: str) -> list[torch.Generator]:
        """One for each transition, from its own key: the same on every process and after a resume."""
        places = zip(self.groups, self.where, strict=True)
        return [keyed_generator(*group.key, *where[1:], name) for group, where in places]


def choose(
    groups: Sequence[Group],
    policy: Reader,
    num_anchors: int,
    num_steps: int,
    steps: Sequence[int],
    key: tuple[Any, ...],
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
        eligible, allowed = policy.teaches(group, steps)
        shuffled = torch.randperm(len(group.images), generator=generator).tolist()
        for anchor in [anchor for anchor in shuffled if eligible[anchor]][:num_anchors]:
            order = torch.randperm(len(allowed), generator=generator)[:num_steps].tolist()
            chosen += [(i, anchor, allowed[k]) for k in sorted(order)]
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


def gather(groups: Sequence[Group], where: list[Where], policy: Reader, old: Mapping[Where, Tensor]) -> Transitions:
    """Collect one micro-batch.

    Args:
        where: transitions of one picture size.
        policy: reads each place.
        old: what an earlier iteration kept of each transition that it has seen.
    """
    picked = [groups[g] for g, _, _ in where]
    device = picked[0].trajectory.device
    readings = [policy.read(group, anchor, step) for group, (_, anchor, step) in zip(picked, where, strict=True)]

    def stack(values: Any) -> Tensor:
        return torch.stack(list(values)).to(device)

    return Transitions(
        **{name: stack(getattr(reading, name) for reading in readings) for name in Reading._fields},
        region=stack(group.region for group in picked),
        conditions=Conditions.concatenate([group.conditions for group in picked]),
        old=stack(old[w] for w in where) if where[0] in old else None,
        where=where,
        groups=picked,
    )
