"""Policies with probabilities: a clipped ratio of the new ones to the old, as in PPO (algorithm section 4).

Gotcha: the old policy never costs a forward, since the first update on a rollout computes what it had to say.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...maths.objective import policy_loss
from ..transitions import Transitions
from .base import Metrics, Policy

LOW_HIGH = ("low", "high")
CLIPPED_AGAIN = "clip_ratio/later_mean"
"""After a rollout's first update: of the candidates that have a say, the share whose gradient the clip took away."""


@dataclass(frozen=True)
class RatioPolicy(Policy):
    """A policy with probabilities, whose ratio to the old ones is clipped (section 4).

    Args:
        epsilon, epsilon_high: clip range of the ratio below and above 1; by default `default_epsilon`, on both sides.
    """

    epsilon: float | None = None
    epsilon_high: float | None = None

    @abstractmethod
    def default_epsilon(self, transitions: Transitions, weights: Tensor) -> float | Tensor:
        """A clip range, or `[B, 1]`, that takes a tenth or two of a rollout's second update (docs/training.md).

        Args:
            weights: `[B, N]`, of the distances that it is for.
        """

    @abstractmethod
    def step(self, velocity: Tensor, transitions: Transitions) -> Tensor:
        """Where the policy takes the anchor, with the noise that its rollout met, `[B, N, C]`."""

    @torch.no_grad()
    def mismatch(self, velocity: Tensor, transitions: Transitions) -> float:
        """How far the update's step lies from the rollout's own, in lengths of that step, averaged over transitions.

        0 as long as rollout and update ask the same model the same thing, except for what rounding makes of another
        batch shape; only before the first update on a rollout, and only for rollouts that take Euler steps.
        """
        t = transitions
        off = (self.step(velocity, t) - t.next_latents).flatten(1).norm(dim=-1)
        length = (t.next_latents - t.latents).flatten(1).norm(dim=-1)
        return float((off / length.clamp(min=1e-12)).mean())

    @abstractmethod
    def log_probs(self, velocity: Tensor, transitions: Transitions, weights: Tensor) -> Tensor:
        """Log-probabilities of the candidates, `[B, S]`, with distances weighted by `[B, N]`."""

    def loss(self, velocity: Tensor, transitions: Transitions) -> tuple[Tensor, Metrics]:
        rows = range(transitions.advantages.shape[1])
        each = [self.log_probs(velocity, transitions, transitions.weights[:, row]) for row in rows]
        log_probs = torch.stack(each, dim=1)
        again = transitions.old is not None
        if transitions.old is None:
            # The policy has not moved since the rollout: it is its own old policy, without another forward.
            transitions.old = log_probs.detach()
        old, advantages = transitions.old, transitions.advantages
        given, weights = self.epsilon, transitions.weights
        ranges = [self.default_epsilon(transitions, weights[:, r]) if given is None else given for r in rows]
        results = [
            policy_loss(log_probs[:, row], old[:, row], advantages[:, row], ranges[row], self.epsilon_high)
            for row in rows
        ]
        loss = sum(u * result.loss for u, result in zip(self.importance, results, strict=True))
        clipped = {side: torch.stack([getattr(result, f"clipped_{side}") for result in results]) for side in LOW_HIGH}
        metrics = {f"clip_ratio/{side}_mean": float(clipped[side].float().mean()) for side in LOW_HIGH}
        metrics["policy/log_ratio_max"] = float((log_probs.detach() - old).abs().max())
        if again and bool(advantages.any()):
            away = sum(clipped[side].sum() for side in LOW_HIGH)
            metrics[CLIPPED_AGAIN] = float(away / advantages.ne(0).sum())
        return loss, metrics  # type: ignore[return-value]
