"""The objective: from rewards to advantages, from latents to a clipped policy-gradient loss. Pure functions on tensors.

A deterministic ODE has no step probabilities. Neighbor GRPO (arXiv 2511.16955) makes some up: the candidates of a group
are neighbours of an anchor, and the policy's probability of candidate i is a softmax over negative distances between
where one Euler step takes the anchor and where candidate i really went. RC-GRPO-Editing (arXiv 2604.09386) makes that
distance mask-aware. Shapes below: B anchors-and-steps ("transitions"), G candidates, N tokens, C channels.

Gotchas: distances are *means* over weighted elements; with a sum the softmax is one-hot and every ratio is clipped.
At θ = θ_old the gradient does not depend on τ or the clip, because advantages sum to zero.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, std_floor: float = 0.0) -> Tensor:
    """`A_i = (r_i - mean r) / max(std r, std_floor)` within each group.

    Args:
        rewards: `[..., group]`; NaN marks a candidate without a score.
        std_floor: smallest standard deviation to divide by, so that a group's noise is not blown up.

    Returns:
        `[..., group]`; 0 for candidates without a score, for groups with fewer than two scores and for groups whose
        scores are all equal. The standard deviation is the biased one, so that p = 2 of `quasi_norm` returns A itself.
    """
    scored = ~rewards.isnan()
    count = scored.sum(-1, keepdim=True)
    centred = torch.where(scored, rewards - rewards.nanmean(-1, keepdim=True), 0.0)
    std = (centred.square().sum(-1, keepdim=True) / count.clamp(min=1)).sqrt()
    scale = std.clamp(min=std_floor)
    # Identical rewards leave rounding noise in `centred`; it must not be divided up to unit size.
    flat = std <= 1e-6 * rewards.abs().nan_to_num(0.0).amax(-1, keepdim=True)
    return torch.where((count < 2) | flat, 0.0, centred / torch.where(scale > 0, scale, 1.0))


def spread(values: Tensor) -> float:
    """Standard deviation (biased) of the values that are not NaN; NaN where there are none."""
    scored = values[~values.isnan()]
    return float(scored.std(correction=0)) if len(scored) else float("nan")


def quasi_norm(advantages: Tensor, power: float = 0.8) -> Tensor:
    """`A'_i = √G · A_i / (Σ_k |A_k|^p)^{1/p}` (Neighbor GRPO's reweighting; the √G is ours).

    With p < 1 a group with one clear winner counts more than an evenly spread one; p = 2 gives back z-scores. G is the
    group's size; candidates without a say have advantage 0 and stay there.

    Args:
        advantages: `[..., group]`.
        power: p > 0.
    """
    if power <= 0:
        raise ValueError(f"advantage_power: got {power}, expected a number above 0")
    norm = advantages.abs().pow(power).sum(-1, keepdim=True).pow(1 / power)
    size = advantages.shape[-1]
    return torch.where(norm > 0, size**0.5 * advantages / torch.where(norm > 0, norm, 1.0), 0.0)


def aggregate_rewards(
    rewards: Tensor,
    weights: Tensor,
    how: Literal["sum_then_normalize", "normalize_then_sum"],
    std_floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Several rewards to one score and one advantage per candidate, with TRL's names for the two ways.

    Args:
        rewards: `[..., group, rewards]`, NaN = no score.
        weights: `[rewards]`.
        how: `"sum_then_normalize"`: weighted sum, then group advantages; `"normalize_then_sum"` (GDPO): advantages of
            each reward, then their weighted sum, normalised again.

    Returns:
        `(scores, advantages)`, each `[..., group]`. A candidate's score is the weighted sum of the rewards that it
        has, NaN if it has none. A reward counts for a candidate only where its whole group can be compared: one that
        scored some candidates of a group and not others takes the others out of the group.
    """
    applicable = ~rewards.isnan().all(-2, keepdim=True)
    missing = (rewards.isnan() & applicable).any(-1) | rewards.isnan().all(-1)
    scores = torch.where(missing, torch.nan, (rewards * weights).nansum(-1))
    if how == "sum_then_normalize":
        return scores, group_advantages(scores, std_floor)
    comparable = rewards.masked_fill(missing.unsqueeze(-1), torch.nan)
    each = group_advantages(comparable.transpose(-1, -2), std_floor).transpose(-1, -2)
    total = torch.where(missing, torch.nan, (each * weights).sum(-1))
    return scores, group_advantages(total)


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """`x_{σ'} = x_σ + (σ' - σ) v`, with `[B]` sigmas over `[B, N, C]` latents, in fp32."""
    return latents + (next_sigma - sigma).view(-1, 1, 1) * velocity.float()


def predict_clean(latents: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """One-step prediction of the clean latents, `x̂_0 = x_σ - σ v`."""
    return latents - sigma.view(-1, 1, 1) * velocity.float()


def surrogate_log_probs(candidates: Tensor, predicted: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Log of the surrogate policy, `softmax_i(-d_i / τ)` with `d_i = Σ w (x_i - x_θ)² / Σ w` (mask-aware form ours).

    Args:
        candidates: `[B, G, N, C]`, where the group's candidates went.
        predicted: `[B, N, C]`, where the policy takes the anchor; the only input with a gradient.
        weights: `[B, N]` of tokens, ≥ 0, not all 0.
        temperature: τ > 0.

    Returns:
        `[B, G]`.
    """
    squared = (candidates - predicted.unsqueeze(1)).square().mean(-1)
    distances = (weights.unsqueeze(1) * squared).sum(-1) / weights.sum(-1, keepdim=True)
    return torch.log_softmax(-distances / temperature, dim=-1)


class PolicyLoss(NamedTuple):
    """`loss` `[B]` per transition; `clipped_low` and `clipped_high` `[B, G]` tell whose gradient the clip removed."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, epsilon: float) -> PolicyLoss:
    """`-Σ_i min(A'_i ρ_i, A'_i clip(ρ_i, 1 - ε, 1 + ε))` for each transition (algorithm section 4).

    Args:
        log_probs, old_log_probs: `[B, G]`; no gradient flows through the old ones.
        advantages: `[B, G]`, 0 for candidates without a say.
        epsilon: clip range.
    """
    ratio = (log_probs - old_log_probs.detach()).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = -torch.minimum(advantages * ratio, advantages * clipped).sum(-1)
    return PolicyLoss(loss, (ratio < 1 - epsilon) & (advantages < 0), (ratio > 1 + epsilon) & (advantages > 0))


def velocity_kl(velocity: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    """`mean w (v_θ - v_ref)²` `[B]`, the velocity KL to the frozen base (algorithm section 8); `weights` `[B, N]`."""
    squared = (velocity.float() - reference.float()).square().mean(-1)
    return (weights * squared).sum(-1) / weights.sum(-1)
