"""The objective: from rewards to advantages, from latents to a clipped policy-gradient loss. Pure functions on tensors.

A deterministic ODE has no step probabilities. Neighbor GRPO (arXiv 2511.16955) makes some up: the candidates of a group
are neighbours of an anchor, and the policy's probability of candidate i is a softmax over negative distances between
where one Euler step takes the anchor and where candidate i really went. RC-GRPO-Editing (arXiv 2604.09386) makes that
distance mask-aware. Two relatives stand beside it: Flow-GRPO (arXiv 2505.05470), whose steps are Gaussian, and
DiffusionNFT (arXiv 2509.16117), which needs no probabilities. `groups/policies` joins the pieces. Shapes below: B
anchors-and-steps ("transitions"), G candidates, N tokens, C channels.

Gotchas: distances are *means* over weighted elements; with a sum the softmax is one-hot and every ratio is clipped.
At θ = θ_old the gradient does not depend on τ or the clip, because advantages sum to zero. Everything between rewards
and advantages is computed in fp64, because squares of large rewards overflow in fp32, and handed back in the dtype of
what came in.
"""

from collections.abc import Sequence
from math import inf
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
    values = rewards.double()
    scored = ~values.isnan()
    count = scored.sum(-1, keepdim=True)
    centred = torch.where(scored, values - values.nanmean(-1, keepdim=True), 0.0)
    std = (centred.square().sum(-1, keepdim=True) / count.clamp(min=1)).sqrt()
    scale = std.clamp(min=std_floor)
    # Identical rewards leave rounding noise in `centred`; it must not be divided up to unit size.
    flat = std <= 1e-6 * values.abs().nan_to_num(0.0).amax(-1, keepdim=True)
    return torch.where((count < 2) | flat, 0.0, centred / torch.where(scale > 0, scale, 1.0)).to(rewards.dtype)


def spread(values: Tensor) -> float:
    """Standard deviation (biased) of the values that are not NaN; NaN where there are none."""
    scored = values[~values.isnan()].double()
    return float(scored.std(correction=0)) if len(scored) else float("nan")


def advantage_size(
    scores: Tensor, scale_rewards: Literal["group", "batch", "none"], std_floor: float, batch_std: float = float("nan")
) -> float:
    """What a group's reshaped advantages are multiplied by, `std r / denominator`, because `quasi_norm` forgets sizes.

    Args:
        scores: `[group]`, NaN = no score.
        scale_rewards: TRL's names for the denominator: `"group"`: the group's own standard deviation, so the result is
            1 unless that is below the floor; `"batch"`: `batch_std`; `"none"`: 1.
        std_floor: smallest standard deviation to divide by.
        batch_std: standard deviation of all scores of the batch.

    Returns:
        A factor ≥ 0, 0 for a group without scores. With `advantage_power=2` the product is exactly
        `(r_i - mean r) / denominator`.
    """
    own = spread(scores)
    if not own > 0:
        return 0.0
    if scale_rewards == "none":
        return own
    return own / max(own if scale_rewards == "group" else batch_std, std_floor)


def quasi_norm(advantages: Tensor, power: float = 0.8, size: int | None = None) -> Tensor:
    """`A'_i = √G · A_i / (Σ_k |A_k|^p)^{1/p}` (Neighbor GRPO's reweighting; the √G is ours).

    With p < 1 a group with one clear winner counts more than an evenly spread one; p = 2 gives back z-scores.

    Args:
        advantages: `[..., group]`; candidates without a say have advantage 0 and stay there.
        power: p > 0.
        size: G, the candidates that have a say; all by default.
    """
    if power <= 0:
        raise ValueError(f"advantage_power: got {power}, expected a number above 0")
    values = advantages.double()
    norm = values.abs().pow(power).sum(-1, keepdim=True).pow(1 / power)
    size = advantages.shape[-1] if size is None else size
    return torch.where(norm > 0, size**0.5 * values / torch.where(norm > 0, norm, 1.0), 0.0).to(advantages.dtype)


def comparable(rewards: Tensor, weights: Tensor, failed: Tensor) -> Tensor:
    """The rewards of the candidates that can be compared: NaN in *every* reward where one that counts failed.

    What is left of a candidate without the reward that failed is another sum. A preservation reward, say, would teach
    alone what it was only meant to balance, so a failure takes its candidate out of all comparisons, of other rewards
    and of other regions, also where the reward failed on the whole group.

    Args:
        rewards: `[..., group, rewards]`, NaN = no score.
        weights: `[rewards]`; a reward of weight 0 takes nobody out.
        failed: `[..., group, rewards]`, where a reward failed, unlike one that does not apply.

    Returns:
        `[..., group, rewards]`.
    """
    return rewards.masked_fill((failed & (weights != 0)).any(-1, keepdim=True), torch.nan)


def total_scores(rewards: Tensor, weights: Tensor, failed: Tensor | None = None) -> Tensor:
    """Several rewards to one score per candidate: the weighted sum of those that it has.

    A reward counts for a candidate only where its whole group can be compared: one that scored some candidates of a
    group and not others takes the others out of the group; one that scored nobody does not apply. A reward of weight 0
    neither counts nor takes anybody out.

    Args:
        rewards: `[..., group, rewards]`, NaN = no score.
        weights: `[rewards]`.
        failed: `[..., group, rewards]`, where a reward failed; see `comparable`, which these go through first.

    Returns:
        `[..., group]`, NaN for candidates that are out, or that no reward with a weight scored.
    """
    if failed is not None:
        rewards = comparable(rewards, weights, failed)
    counts, missing = weights != 0, rewards.isnan()
    expected = counts & ~missing.all(-2, keepdim=True)
    out = (missing & expected).any(-1) | (missing | ~counts).all(-1)
    return _narrowed(torch.where(out, torch.nan, (rewards.double() * weights).nansum(-1)), rewards.dtype)


def total_advantages(rewards: Tensor, weights: Tensor, std_floor: float = 0.0) -> Tensor:
    """The weighted sum of each reward's advantages within its group (GDPO).

    Args:
        rewards, weights: as in `total_scores`; the same candidates are out.
        std_floor: as in `group_advantages`.

    Returns:
        `[..., group]`, NaN for candidates that are out; 0 throughout a group where the rewards cancel.
    """
    out = total_scores(rewards, weights).isnan()
    compared = rewards.double().masked_fill(out.unsqueeze(-1), torch.nan)
    each = weights * group_advantages(compared.transpose(-1, -2), std_floor).transpose(-1, -2)
    total = each.sum(-1)
    # What cancels leaves rounding noise, which must not be divided up to unit size.
    cancelled = total.abs().amax(-1, keepdim=True) <= 1e-6 * each.abs().sum(-1).amax(-1, keepdim=True)
    return torch.where(out, torch.nan, torch.where(cancelled, 0.0, total)).to(rewards.dtype)


def batch_advantages(
    rewards: Sequence[Tensor],
    weights: Tensor,
    how: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
    scale_rewards: Literal["group", "batch", "none"] = "group",
    std_floor: float = 0.0,
    min_std: float = 0.0,
    power: float = 0.8,
    negative_clip: float = inf,
) -> list[Tensor]:
    """Final advantages A' of the groups of one batch (algorithm section 5), with TRL's names for the options.

    Args:
        rewards: `[group, rewards]` for each group, NaN = no score; where a reward failed, see `comparable`.
        weights: `[rewards]`.
        how: `"sum_then_normalize"`: advantages of the scores; `"normalize_then_sum"` (GDPO): of `total_advantages`,
            divided by the spread that these would have in the whole batch without a floor. So a floor tames a group
            by as much as the other way does, and one reward gives the same both ways where no group is flat.
        scale_rewards: as in `advantage_size`; with `"normalize_then_sum"` only `"group"` means anything.
        std_floor: smallest standard deviation to divide by.
        min_std: groups whose scores spread less than this get advantages of 0; with `"normalize_then_sum"`, where units
            do not matter, groups in which no reward times its weight spreads so much.
        power: of the quasi-norm.
        negative_clip: size of the largest negative advantage; with 0 only what is better than its group teaches. A
            policy is pulled towards good candidates and comes to rest there, but nothing bounds how far it is pushed
            away from bad ones over many updates.

    Returns:
        `[group]` for each group, finite, 0 for candidates that are out. They add up to 0 unless the clip cut some.
    """
    dtypes, rewards = [values.dtype for values in rewards], [values.double() for values in rewards]
    scores = [total_scores(values, weights) for values in rewards]
    compared, batch = scores, scores
    if how == "normalize_then_sum":
        compared = [total_advantages(values, weights, std_floor) for values in rewards]
        batch, scale_rewards = [total_advantages(values, weights) for values in rewards], "batch"
    batch_std = spread(torch.cat(batch))
    results = []
    for own, values, each in zip(scores, compared, rewards, strict=True):
        seen = [own]
        if how == "normalize_then_sum":
            seen = list((each * weights).masked_fill(own.isnan().unsqueeze(-1), torch.nan).unbind(-1))
        if not any(spread(column) >= min_std for column in seen):  # NaN, where nobody was scored, is flat too
            results.append(torch.zeros_like(own))
            continue
        scored = int((~own.isnan()).sum())
        size = advantage_size(values, scale_rewards, std_floor, batch_std)
        shaped = quasi_norm(group_advantages(values, std_floor), power, scored) * size
        results.append(shaped.clamp(min=-negative_clip))
    return [_narrowed(result, dtype) for result, dtype in zip(results, dtypes, strict=True)]


def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype, what it cannot hold as its largest number, because infinity less infinity is none."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def _full(values: Tensor) -> Tensor:
    """fp32 at least, so that a model in half precision costs no distances."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """`Σ w x / Σ w` over the last dimension, 0 where all weights are 0."""
    return (weights * values).sum(-1) / weights.sum(-1).clamp(min=1e-12)


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """`x_{σ'} = x_σ + (σ' - σ) v`, with `[B]` sigmas over `[B, N, C]` latents, in fp32."""
    return latents + (next_sigma - sigma).view(-1, 1, 1) * _full(velocity)


def predict_clean(latents: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """One-step prediction of the clean latents, `x̂_0 = x_σ - σ v`."""
    return latents - sigma.view(-1, 1, 1) * _full(velocity)


def surrogate_log_probs(candidates: Tensor, predicted: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Log of the surrogate policy, `softmax_i(-d_i / τ)` with `d_i = Σ w (x_i - x_θ)² / Σ w` (mask-aware form ours).

    Args:
        candidates: `[B, G, N, C]`, where the group's candidates went.
        predicted: `[B, N, C]`, where the policy takes the anchor; the only input with a gradient.
        weights: `[B, N]` of tokens, ≥ 0; where all are 0 every candidate is as likely as any other.
        temperature: τ > 0.

    Returns:
        `[B, G]`.
    """
    squared = (candidates - predicted.unsqueeze(1)).square().mean(-1)
    distances = weighted_mean(squared, weights.unsqueeze(1))
    return torch.log_softmax(-distances / temperature, dim=-1)


class PolicyLoss(NamedTuple):
    """`loss` `[B]` per transition; `clipped_low` and `clipped_high` `[B, G]` tell whose gradient the clip removed."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    epsilon: float | Tensor,
    epsilon_high: float | None = None,
) -> PolicyLoss:
    """`-Σ_i min(A'_i ρ_i, A'_i clip(ρ_i, 1 - ε, 1 + ε_high))` for each transition (algorithm section 4).

    Args:
        log_probs, old_log_probs: `[B, G]`; no gradient flows through the old ones.
        advantages: `[B, G]`, 0 for candidates without a say.
        epsilon: clip range below 1, or `[B, 1]`, one for each transition.
        epsilon_high: clip range above 1, the same by default.
    """
    ratio = (log_probs - old_log_probs.detach()).exp()
    ends = (1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    low, high = (torch.as_tensor(end, dtype=ratio.dtype, device=ratio.device) for end in ends)
    loss = -torch.minimum(advantages * ratio, advantages * ratio.clamp(low, high)).sum(-1)
    return PolicyLoss(loss, (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0))


def velocity_kl(velocity: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    """`mean w (v_θ - v_ref)²` `[B]` over tokens and channels, the velocity KL to the frozen base (algorithm section 8).

    The weights, `[B, N, C]`, are not normalised: a larger one outside the region takes nothing from the pull inside.
    """
    return (weights * (_full(velocity) - _full(reference)).square()).mean((-2, -1))


def keep_hinge(predicted_clean: Tensor, source: Tensor, region: Tensor, margin: float) -> Tensor:
    """`Σ (1 - m) max(0, |x̂_0 - x_src|² - margin) / Σ (1 - m)` `[B]`, 0 where nothing is kept.

    Holds the one-step prediction of the result to the source outside the region and is silent within the margin
    (the idea is CoCoEdit's, arXiv 2602.14068; the form ours).

    Args:
        predicted_clean: x̂_0, `[B, N, C]`.
        source: latents of the source on the same tokens.
        region: m, `[B, N]` in [0, 1].
        margin: squared error, averaged over a token's channels, that is allowed for free, ≥ 0.
    """
    squared = (_full(predicted_clean) - _full(source)).square().mean(-1)
    return weighted_mean((squared - margin).clamp(min=0), 1 - region)


# Flow-GRPO ------------------------------------------------------------------------------------------------------------


def sde_std(sigma: Tensor, second_sigma: Tensor, noise_level: float) -> Tensor:
    """Flow-GRPO's diffusion coefficient `a √(σ / (1 - σ))`; in `1 - σ`, σ is at most the schedule's second, below 1."""
    return noise_level * (sigma / (1 - torch.minimum(sigma, second_sigma))).sqrt()


def sde_step(
    latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of one stochastic step that keeps the ODE's marginals (Flow-GRPO).

        mean = x + [v + g²/(2σ) (x + (1 - σ) v)] (σ' - σ) ,   std = g √(σ - σ')

    A coefficient g that differs from token to token keeps them just as well, as it does not depend on x; where it is 0
    this is the Euler step (the region-constrained form is ours).

    Args:
        latents, velocity: `[B, N, C]`.
        sigma, next_sigma: `[B]`, σ > 0.
        std: g, `[B, N]`.

    Returns:
        The mean `[B, N, C]` and the standard deviation `[B, N, 1]`.
    """
    sigma, next_sigma = sigma.view(-1, 1, 1), next_sigma.view(-1, 1, 1)
    std, velocity = std.unsqueeze(-1), _full(velocity)
    drift = velocity + std.square() / (2 * sigma) * (latents + (1 - sigma) * velocity)
    return latents + (next_sigma - sigma) * drift, std * (sigma - next_sigma).sqrt()


def gaussian_log_prob(values: Tensor, mean: Tensor, std: Tensor, weights: Tensor) -> Tensor:
    """Log-density under N(mean, std²), up to a constant, *averaged* over weighted elements, `[B]`.

    Args:
        values, mean: `[B, N, C]`.
        std: `[B, N, 1]`; tokens where it is 0 have no density and do not count.
        weights: `[B, N]`, ≥ 0.
    """
    moves = std > 0
    errors = torch.where(moves, (values - mean) / torch.where(moves, std, 1.0), 0.0)
    return weighted_mean(-0.5 * errors.square().mean(-1), weights * moves.squeeze(-1))


# DiffusionNFT ---------------------------------------------------------------------------------------------------------


def nft_loss(
    velocity: Tensor, old_velocity: Tensor, target: Tensor, optimality: Tensor, weights: Tensor, beta: float
) -> Tensor:
    """`r |v⁺ - v|² + (1 - r) |v⁻ - v|²` `[B]` with `v± = (1 ∓ β) v_old ± β v_θ` (DiffusionNFT, arXiv 2509.16117).

    Args:
        velocity: v_θ, `[B, N, C]`; the only input with a gradient.
        old_velocity: of the policy that made the candidate, at the same noisy latents.
        target: v = ε - x_0 of the candidate, `[B, N, C]`.
        optimality: r in [0, 1], `[B]`.
        weights: `[B, N]` of the norms' tokens.
        beta: > 0, how far v± lie from the old policy.
    """
    velocity, old = _full(velocity), _full(old_velocity.detach())
    towards, away = (old + sign * beta * (velocity - old) for sign in (1, -1))
    wanted, unwanted = (weighted_mean((v - target).square().mean(-1), weights) for v in (towards, away))
    return optimality * wanted + (1 - optimality) * unwanted
