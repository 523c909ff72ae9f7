"""DiffusionNFT (arXiv 2509.16117; algorithm section 9): learn from results alone, without trajectory or probability.

for a few candidates and noise levels of a group:
    noise the candidate's result afresh                       read
    optimality r in [0, 1] of its advantage                   loss
    pull the velocity towards it by r, away by 1 - r          nft_loss
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...maths.noise import keyed_noise
from ...maths.objective import nft_loss
from ..rollout import Group
from ..transitions import Reading, Transitions
from .base import Metrics, Policy


@dataclass(frozen=True)
class NFTPolicy(Policy):
    """Contrast of two implicit policies on noised results (DiffusionNFT; section 9): no trajectory, no probabilities.

    Args:
        nft_beta: how far the implicit policies lie from the old one.
        advantage_clip: advantage at which the optimality `r = (1 + clip(A / advantage_clip, ±1)) / 2` reaches 0 or 1.
    """

    nft_beta: float = 1.0
    advantage_clip: float = 5.0

    def read(self, group: Group, anchor: int, step: int) -> Reading:
        """A candidate's result, noised afresh to the step's level."""
        clean = group.trajectory[-1, anchor]
        sigma = group.schedule.sigmas[step].to(clean.device)
        noise = keyed_noise(tuple(clean.shape), *group.key, "renoise", anchor, step).to(clean.device)
        reading = self._reading(group, anchor, step, (noise - clean).unsqueeze(0), [anchor])
        return reading._replace(latents=(1 - sigma) * clean + sigma * noise)

    def loss(self, velocity: Tensor, transitions: Transitions) -> tuple[Tensor, Metrics]:
        t = transitions
        if t.old is None:
            t.old = velocity.detach().float()
        loss = torch.zeros(len(velocity), device=velocity.device)
        for row, u in enumerate(self.importance):
            advantages = t.advantages[:, row, 0]
            optimality = (1 + (advantages / self.advantage_clip).clamp(-1, 1)) / 2
            contrast = nft_loss(velocity, t.old, t.candidates[:, 0], optimality, t.weights[:, row], self.nft_beta)
            loss = loss + u * contrast * advantages.ne(0)  # a candidate without a score is no mediocre one
        return loss, {"policy/velocity_change": float((velocity.detach().float() - t.old).abs().max())}
