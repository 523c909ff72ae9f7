"""What the log says of one scored group: `docs/metrics.md` and `docs/diagnostics.md` tell what each number means.

Gotcha: NaN stands for what a group cannot tell; the log averages over the groups that can.
"""

from collections.abc import Iterator, Sequence

from ..maths.metrics import masked_psnr
from ..maths.objective import spread
from .diagnostics import group_diagnostics, reward_parts, variance_by_step
from .policies import region_mask
from .rollout import Group
from .scoring import GroupScoring


def group_log(group: Group, scoring: GroupScoring) -> dict[str, float | list[float]]:
    """Numbers of a group with advantages, by their names in the log; a list has one for each candidate.

    Args:
        scoring: what scored and compared it.
    """
    assert group.rewards is not None and group.scores is not None and group.advantages is not None
    count, scores = len(group.images), group.scores
    numbers: dict[str, float | list[float]] = {
        "reward": float(scores.nanmean()),
        "background/psnr": masked_psnr(group.images, [group.source] * count, [group.mask] * count),
    }
    names = [reward.name for reward in scoring.rewards]
    for i, name in enumerate(names):
        numbers[f"rewards/{name}/mean"] = float(group.rewards[:, i].nanmean())
        if count > 1:
            numbers[f"rewards/{name}/std"] = spread(group.rewards[:, i])
    if count > 1:
        numbers["reward_std"] = spread(scores)
        numbers["frac_reward_zero_std"] = float(not group.advantages.any())
        numbers["groups/scored_candidates"] = float((~scores.isnan()).sum())
        parts = reward_parts(group, names, scoring.weights, scoring.reward_regions)
        numbers |= group_diagnostics(group, group.advantages, parts, scoring.named_regions) | variance_by_step(group)
    numbers |= dict(_of_regions(group, scoring.named_regions))
    if group.attention is not None:
        for measure in ("mass", "density", "contrast"):
            numbers[f"attention/{measure}"] = float(getattr(group.attention, measure).mean())
    return numbers


def _of_regions(group: Group, regions: Sequence[str]) -> Iterator[tuple[str, float]]:
    """With region advantages, each region's own score and what it teaches."""
    for row, region in enumerate(regions):
        own, advantages = group.region_scores[row], group.advantages[row]  # type: ignore[index]
        yield f"regions/{region}/reward", float(own.nanmean())
        if len(group.images) > 1:
            taught = bool(advantages.any()) and bool(region_mask(group, region).any())
            yield f"regions/{region}/reward_std", spread(own)
            yield f"regions/{region}/frac_reward_zero_std", float(not taught)
            yield f"regions/{region}/advantage_std", spread(advantages)
