"""Flow-GRPO (arXiv 2505.05470; algorithm section 9): a rollout whose steps are Gaussian has probabilities of its own.

for a few candidates and stochastic steps of a group:
    mean and deviation of the step from where it began        sde_step
    density of where it went, by region, is the policy        gaussian_log_prob
    its clipped ratio times the candidate's advantage         RatioPolicy.loss
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...maths.noise import keyed_noise
from ...maths.objective import gaussian_log_prob, sde_step, weighted_mean
from ..rollout import Group, kick_key
from ..transitions import Reading, Transitions
from .ratio import RatioPolicy


@dataclass(frozen=True)
class FlowGRPOPolicy(RatioPolicy):
    """Gaussian steps of an SDE with the ODE's marginals (Flow-GRPO; section 9), on the candidate's own trajectory."""

    def default_epsilon(self, transitions: Transitions, weights: Tensor) -> Tensor:
        # What an update changes about the velocity moves the mean by the step's length times that, in units of the
        # injected noise, g √(σ - σ'), of each token.
        t, moves = transitions, transitions.std > 0
        moved = weighted_mean(1 / torch.where(moves, t.std, 1.0), weights * moves)
        return (4e-4 * (t.sigma - t.next_sigma).sqrt() * moved).unsqueeze(-1)

    def teaches(self, group: Group, steps: Sequence[int]) -> tuple[Sequence[bool], list[int]]:
        """Candidates that have a say, at the steps that were stochastic."""
        eligible, _ = super().teaches(group, steps)
        return eligible, [step for step in steps if bool(group.kick_strength[step].any())]  # type: ignore[index]

    def read(self, group: Group, anchor: int, step: int) -> Reading:
        """A candidate's own step, with the noise that was injected into it."""
        reading = super().read(group, anchor, step)
        noise = keyed_noise(tuple(reading.latents.shape), *kick_key(group.key, step), anchor)
        return reading._replace(noise=noise.to(reading.latents.device))

    def step(self, velocity: Tensor, transitions: Transitions) -> Tensor:
        t = transitions
        mean, std = sde_step(t.latents, velocity, t.sigma, t.next_sigma, t.std)
        return mean + std * t.noise

    def log_probs(self, velocity: Tensor, transitions: Transitions, weights: Tensor) -> Tensor:
        t = transitions
        mean, std = sde_step(t.latents, velocity, t.sigma, t.next_sigma, t.std)
        return gaussian_log_prob(t.candidates[:, 0], mean, std, weights).unsqueeze(-1)
