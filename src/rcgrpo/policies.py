"""What an update does with a rollout: RC-GRPO's surrogate policy and two relatives, behind one small interface.

The trainer asks a policy three things: which places of a group teach (`teaches`), what to read at one (`read`), and the
loss of a micro-batch from the model's velocity there (`loss`). The formulas are pure functions in `objective.py`; here
they meet groups and regions.

Gotchas: the old policy never costs a forward, since the first update on a rollout computes what it had to say. With
region advantages there is one row of advantages and of token weights for each region that has a reward; without them,
one row in all.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .noise import keyed_noise
from .objective import (
    euler_step,
    gaussian_log_prob,
    nft_loss,
    policy_loss,
    predict_clean,
    sde_step,
    surrogate_log_probs,
    weighted_mean,
)
from .regions import region_weights
from .rollout import Group, kick_key, kick_std
from .transitions import Reading, Transitions

if TYPE_CHECKING:
    from .config import RCGRPOConfig

Metrics = dict[str, float]
LOW_HIGH = ("low", "high")
CLIPPED_AGAIN = "clip_ratio/later_mean"
"""After a rollout's first update: of the candidates that have a say, the share whose gradient the clip took away."""


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


def make_policy(args: "RCGRPOConfig", regions: Sequence[str] = ()) -> Policy:
    """The policy that a configuration asks for.

    Args:
        regions: with region advantages, the names of the regions that have a reward.
    """
    importance = args.region_advantage_weights or [1.0] * max(1, len(regions))
    shared = (args.keep_weight, tuple(regions), tuple(importance))
    if args.policy == "nft":
        return NFTPolicy(*shared, args.nft_beta, args.nft_advantage_clip)
    clip = (args.epsilon, args.epsilon_high)
    if args.policy == "flow_grpo":
        return FlowGRPOPolicy(*shared, *clip)
    return NeighborPolicy(*shared, *clip, args.temperature, args.distance_space)  # type: ignore[arg-type]
