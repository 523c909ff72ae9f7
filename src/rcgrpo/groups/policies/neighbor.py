"""Neighbor GRPO with a mask: the algorithm of RC-GRPO-Editing (arXiv 2604.09386; algorithm section 4).

for a few anchors and steps of a group:
    take one Euler step from the anchor                       step
    distance to where each candidate went, by region          surrogate_log_probs
    softmax(-distance / τ) is the policy                      log_probs
    its clipped ratio times the candidates' advantages        RatioPolicy.loss
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...maths.objective import euler_step, predict_clean, surrogate_log_probs
from ..rollout import Group
from ..transitions import Reading, Transitions
from .ratio import RatioPolicy


@dataclass(frozen=True)
class NeighborPolicy(RatioPolicy):
    """A softmax over distances to where the group's candidates went (Neighbor GRPO, mask-aware; section 4).

    Args:
        temperature: τ of the softmax.
        distance_space: `"latents"` compares next latents, `"clean"` one-step predictions of the result, which for the
            candidates are those that their own stored step implies.
    """

    temperature: float = 1.0
    distance_space: Literal["latents", "clean"] = "latents"

    def default_epsilon(self, transitions: Transitions, weights: Tensor) -> float | Tensor:
        # What an update changes about the velocity moves the next latents by the step's length times that.
        t = transitions
        moved = (t.sigma - t.next_sigma).unsqueeze(-1) if self.distance_space == "latents" else 1.0
        return 1e-3 / self.temperature * moved

    def teaches(self, group: Group, steps: Sequence[int]) -> tuple[Sequence[bool], list[int]]:
        """Any trajectory may be an anchor: what it teaches is the others' advantages."""
        return [True] * len(group.images), list(steps)

    def read(self, group: Group, anchor: int, step: int) -> Reading:
        """An anchor, with where all of its group went."""
        candidates = group.trajectory[step + 1]
        if self.distance_space == "clean":
            sigma, next_sigma = group.schedule.sigmas[step : step + 2].to(candidates.device)
            before = group.trajectory[step]
            candidates = before - sigma * ((candidates - before) / (next_sigma - sigma))
        return self._reading(group, anchor, step, candidates, slice(None))

    def step(self, velocity: Tensor, transitions: Transitions) -> Tensor:
        t = transitions
        return euler_step(t.latents, velocity, t.sigma, t.next_sigma)

    def log_probs(self, velocity: Tensor, transitions: Transitions, weights: Tensor) -> Tensor:
        t = transitions
        if self.distance_space == "clean":
            predicted = predict_clean(t.latents, velocity, t.sigma)
        else:
            predicted = self.step(velocity, t)
        return surrogate_log_probs(t.candidates, predicted, weights, self.temperature)
