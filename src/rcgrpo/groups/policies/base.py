"""What every policy has: the places of a group that teach, what to read at one, the loss of what was read.

Where it fits: `transitions` asks a policy which places teach (`teaches`) and what stands at one (`read`); the trainer
asks for the loss of a micro-batch from the model's velocity there (`loss`). The formulas are pure functions in
`maths.objective`; here they meet groups and regions.

Gotchas: with region advantages there is one row of advantages and of token weights for each region that has a reward;
without them, one row in all.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...maths.regions import region_weights
from ..rollout import Group, kick_std
from ..transitions import Reading, Transitions

Metrics = dict[str, float]


def region_mask(group: Group, name: str) -> Tensor:
    """Tokens of a named region, `[tokens]` in [0, 1]: `"edit"`, `"keep"`, or `"region_k"`, the k-th of several.

    A region that this edit does not have is empty.
    """
    if name == "edit":
        return group.region
    if name == "keep":
        return 1 - group.region
    index = int(name.removeprefix("region_")) - 1
    several = group.region.unsqueeze(0) if group.regions is None else group.regions
    return several[index] if index < len(several) else torch.zeros_like(group.region)


@dataclass(frozen=True)
class Policy(ABC):
    """What the policies share: which tokens count how much, and what is read.

    Args:
        keep_weight: weight λ_keep of tokens outside the region.
        regions: names of the regions with rewards of their own; none for one objective on all tokens.
        importance: u_r, the weight of each of these objectives.
    """

    keep_weight: float = 0.1
    regions: Sequence[str] = ()
    importance: Sequence[float] = (1.0,)

    def weights(self, group: Group) -> Tensor:
        """Distance weights, `[rows, tokens]`: `m + λ_keep (1 - m)` (section 4), or each region's mask (section 7)."""
        if not self.regions:
            return region_weights(group.region, self.keep_weight).unsqueeze(0)
        return torch.stack([region_mask(group, name) for name in self.regions])

    def teaches(self, group: Group, steps: Sequence[int]) -> tuple[Sequence[bool], list[int]]:
        """Trajectories and steps that an update may read; here those of candidates that have a say."""
        return torch.atleast_2d(group.advantages).any(0).tolist(), list(steps)  # type: ignore[arg-type]

    def read(self, group: Group, anchor: int, step: int) -> Reading:
        """A candidate's own step."""
        return self._reading(group, anchor, step, group.trajectory[step + 1, anchor].unsqueeze(0), [anchor])

    def _reading(
        self, group: Group, anchor: int, step: int, candidates: Tensor, members: Sequence[int] | slice
    ) -> Reading:
        schedule, region = group.schedule, group.region
        std = torch.zeros_like(region)
        if group.kick_strength is not None:
            std = kick_std(schedule, step, group.kick_strength[step, anchor], group.noise_level)
        return Reading(
            latents=group.trajectory[step, anchor],
            timestep=schedule.timesteps[step],
            sigma=schedule.sigmas[step],
            next_sigma=schedule.sigmas[step + 1],
            candidates=candidates,
            advantages=torch.atleast_2d(group.advantages)[:, members],  # type: ignore[arg-type]
            weights=self.weights(group),
            std=std,
            noise=torch.zeros_like(group.trajectory[step, anchor]),
            next_latents=group.trajectory[step + 1, anchor],
        )

    @abstractmethod
    def loss(self, velocity: Tensor, transitions: Transitions) -> tuple[Tensor, Metrics]:
        """Loss `[B]` of the model's velocity `[B, N, C]`, and numbers for the log; fills in `transitions.old`."""
