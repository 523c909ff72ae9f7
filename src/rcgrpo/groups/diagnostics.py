"""Does a group teach what it should? Where its reward and its latents vary, and what its pictures look like.

Formulas on tensors and on one group; no model runs. `group_log` hands `group_diagnostics` of every group to the
log; `evaluation.survey` rolls out many and asks the same. `docs/diagnostics.md` says which way each number should go.
Shapes below: G candidates, N tokens, C channels, H and W pixels.

Gotchas: variances are unbiased ones, so groups of different size can be compared. What cannot be measured (one
candidate, a mask without outside, a missing score) is NaN, never 0, and leaves every mean. Clip fractions are not here:
the policies log them as `clip_ratio/*`, since only an update has ratios.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import image_gradients
from torchmetrics.functional.regression import spearman_corrcoef

from ..inputs.pictures import to_rgb
from ..maths.objective import total_scores
from ..rewards import background_keep
from ..rewards.pictures import image_tensor
from .rollout import Group

NAN = float("nan")

# Rewards and advantages -----------------------------------------------------------------------------------------------


def variance(values: Tensor) -> float:
    """Unbiased variance of the values that are not NaN; NaN for fewer than two."""
    scored = values[~values.isnan()]
    return float(scored.double().var()) if len(scored) > 1 else NAN


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation in [-1, 1] of `[n]` with `[n]`, ties sharing their mean rank.

    Pairs with a NaN are left out; NaN for fewer than two pairs, and where one side is constant.
    """
    both = ~(first.isnan() | second.isnan())
    first, second = first[both].double(), second[both].double()
    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return NAN
    return float(spearman_corrcoef(first, second))


def effective_group_size(advantages: Tensor) -> float:
    """`(Σ|A|)² / ΣA²`, the inverse participation of `[G]` advantages: how many candidates have a real say.

    G when all weigh the same, 1 when one candidate has all of it, 0 in a dropped group.
    """
    sizes = advantages.double().abs()
    return float(sizes.sum().square() / sizes.square().sum()) if bool(sizes.any()) else 0.0


class VarianceSplit(NamedTuple):
    """Within-group reward variance and what of it goes with the edit, with the background, and with neither.

    The last three add up to `total`, in the reward's units squared.
    """

    total: float
    edit: float
    keep: float
    rest: float


def variance_split(rewards: Tensor, edit: Tensor, keep: Tensor) -> VarianceSplit:
    """Split the variance of rewards within groups by what their edit part and their keep part explain.

    Values are centred in each group and pooled, then the reward is regressed on both parts. A part's share is the mean
    of what it explains alone and of what it adds to the other (the Shapley value of R²), so the order does not matter
    and any reward can be split, not only sums.

    Args:
        rewards, edit, keep: `[groups, G]`. A candidate with a NaN anywhere is left out, and so is a group that has
            fewer than two others.

    Returns:
        NaN everywhere where no group has two candidates.
    """
    complete = ~(rewards.isnan() | edit.isnan() | keep.isnan())
    complete &= complete.sum(1, keepdim=True) > 1
    freedom = int(complete.sum() - complete.any(1).sum())
    if not freedom:
        return VarianceSplit(NAN, NAN, NAN, NAN)
    centred = []
    for values in (rewards, edit, keep):
        known = torch.where(complete, values.double(), 0.0)
        mean = known.sum(1, keepdim=True) / complete.sum(1, keepdim=True).clamp(min=1)
        deviations = torch.where(complete, known - mean, 0.0).flatten()
        # Equal scores leave rounding noise, which must not explain anything.
        scale = float(known.abs().max())
        centred.append(deviations if float(deviations.abs().max()) > 1e-6 * scale else torch.zeros_like(deviations))
    target, *parts = centred
    total = float(target.square().sum()) / freedom

    def explained(chosen: Sequence[Tensor]) -> float:
        columns = torch.stack(list(chosen), dim=1)
        fitted = columns @ torch.linalg.lstsq(columns, target.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        return float(fitted.square().sum()) / freedom

    alone, both = [explained([part]) for part in parts], explained(parts)
    shares = [(alone[i] + both - alone[1 - i]) / 2 for i in range(2)]
    return VarianceSplit(total, shares[0], shares[1], max(0.0, total - both))


def gradient_snr(gradients: Tensor) -> tuple[float, float]:
    """Signal to noise of a gradient: the norm of the groups' mean over their spread.

    Args:
        gradients: `[groups, parameters]`, one gradient for each group.

    Returns:
        `|mean| / √(Σ_i |g_i - mean|² / (groups - 1))`, which is about `1 / √groups` for pure noise; and the square of
        the true mean's norm over the same variance, estimated without that bias, which is about 0 for pure noise and
        may be negative.

    Raises:
        ValueError: fewer than two groups.
    """
    if len(gradients) < 2:
        raise ValueError(f"gradients: got {len(gradients)} groups, expected at least 2 to tell a spread")
    gradients = gradients.double()
    mean = gradients.mean(0)
    noise = (gradients - mean).square().sum() / (len(gradients) - 1)
    signal = mean.square().sum()
    return float((signal / noise).sqrt()), float((signal - noise / len(gradients)) / noise)


# Latents --------------------------------------------------------------------------------------------------------------


class InsideOutside(NamedTuple):
    """The same number in the region and outside, of equal shape; NaN on a side that has no tokens."""

    inside: Tensor
    outside: Tensor

    @property
    def leakage(self) -> Tensor:
        """`outside / inside`: 0 when nothing reaches the background, 1 when it varies as much as the region."""
        return self.outside / self.inside


def split_by_region(values: Tensor, region: Tensor) -> InsideOutside:
    """Weighted means of `[..., N]` over a region `[N]` in [0, 1] and over the rest, `[...]` each."""
    kept = 1 - region
    return InsideOutside((values * region).sum(-1) / region.sum(), (values * kept).sum(-1) / kept.sum())


def latent_variance(latents: Tensor, region: Tensor) -> InsideOutside:
    """Variance across a group, averaged over tokens and channels, inside and outside the region.

    Args:
        latents: `[..., G, N, C]`, such as a trajectory `[steps + 1, G, N, C]`, which gives one number for each noise
            level, from σ = 1 to σ = 0.
        region: `[N]` in [0, 1].
    """
    return split_by_region(latents.float().var(-3).mean(-1), region)


def mean_curve(curves: Sequence[InsideOutside]) -> InsideOutside:
    """The mean over edits; NaN sides are left out."""
    return InsideOutside(
        *(torch.stack([getattr(c, side) for c in curves]).nanmean(0) for side in InsideOutside._fields)
    )


# Pictures -------------------------------------------------------------------------------------------------------------


def diversity(pictures: Tensor, region: Tensor) -> float:
    """Mean over pairs of the root mean square difference in the region, for pictures `[G, channels, H, W]`.

    Args:
        region: `[H, W]` in [0, 1].

    Returns:
        In the pictures' units; 0 for equal candidates; NaN for fewer than two, or an empty region.
    """
    if len(pictures) < 2 or not bool((region > 0).any()):
        return NAN
    weighted = (pictures * region.sqrt()).flatten(1).double()
    return float(torch.pdist(weighted).mean() / (region.sum() * pictures.shape[1]).double().sqrt())


def edge_density(pictures: Tensor, region: Tensor) -> Tensor:
    """Mean slope of the brightness in the region, `[G]`: change from pixel to pixel in units of the full range.

    It falls as pictures blur and rises with grids and grain. Differences span one pixel, so the finest grid counts.

    Args:
        pictures: `[G, 3, H, W]` in [0, 1].
        region: `[H, W]` in [0, 1].
    """
    weights = pictures.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    down, across = image_gradients((pictures * weights).sum(1, keepdim=True))
    slope = (down.square() + across.square()).sqrt()[:, 0]
    return (slope * region).sum((-1, -2)) / region.sum()


def colour_entropy(pictures: Tensor, region: Tensor, levels: int = 8) -> Tensor:
    """Entropy of the colours in the region in bits, `[G]`, each channel cut into so many levels.

    0 for one colour, at most `3 log2(levels)`; it falls as an edit turns flat.

    Args:
        pictures: `[G, 3, H, W]` in [0, 1].
        region: `[H, W]`; pixels of at least 0.5 count.
    """
    inside = pictures[:, :, region >= 0.5]
    if inside.shape[-1] == 0:
        return torch.full([len(pictures)], NAN)
    level = (inside * levels).long().clamp(max=levels - 1)
    colours = level[:, 0] * levels**2 + level[:, 1] * levels + level[:, 2]
    shares = torch.stack([torch.bincount(row, minlength=levels**3) for row in colours]).double() / colours.shape[1]
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(2)


def target_closeness(
    images: list[Image.Image],
    masks: list[Image.Image],
    edited_image: list[Image.Image | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """`1 - mean |difference|` to the ground truth inside the mask, in [0, 1]: a held-out reward, never to train on.

    It reads pixels, as none of the built-in edit rewards does, so an editor that has learned to please features is
    found out. `None` without a ground truth or a region.
    """
    scores: list[float | None] = []
    for image, mask, target in zip(images, masks, edited_image or [None] * len(images), strict=True):
        inside = image_tensor(mask)[0] >= 0.5
        if target is None or not bool(inside.any()):
            scores.append(None)
            continue
        wanted = image_tensor(to_rgb(target).resize(image.size, Image.Resampling.BICUBIC))
        scores.append(1 - float((image_tensor(image) - wanted).abs()[:, inside].mean()))
    return scores


# One group ------------------------------------------------------------------------------------------------------------


def group_diagnostics(
    group: Group, advantages: Tensor, parts: Mapping[str, Tensor] | None = None, rows: Sequence[str] = ()
) -> dict[str, float]:
    """What the training log says of one group with at least two candidates; no model runs, no reward is called.

    Args:
        group: rolled out, its pictures decoded.
        advantages: `[G]`, or `[rows, G]` with region advantages.
        parts: `"edit"` and `"keep"`, as far as they are known: `[G]` scores that see the region alone and the
            background alone, NaN = no score.
        rows: names of the rows of advantages. The keep part is compared with `"keep"`'s, the edit part with the sum of
            the others'; where there is no such row, with the sum of all.

    Returns:
        Names that start with `diagnostics/`; NaN for what cannot be measured.
    """
    pictures = torch.stack([image_tensor(image) for image in group.images])
    mask = image_tensor(group.mask)[0].round()
    final = latent_variance(group.trajectory[-1].cpu(), group.region.cpu())
    several = torch.atleast_2d(advantages).cpu()
    numbers = {
        "effective_group_size": sum(map(effective_group_size, several)) / len(several),
        "latent_var_inside": float(final.inside),
        "latent_var_outside": float(final.outside),
        "leakage": float(final.leakage),
        "diversity_inside": diversity(pictures, mask),
        "edge_density": float(edge_density(pictures, mask).mean()),
        "colour_entropy": float(colour_entropy(pictures, mask).mean()),
    }
    for name, scores in (parts or {}).items():
        own = [i for i, region in enumerate(rows) if (region == "keep") == (name == "keep")]
        row = several[own or slice(None)].sum(0)
        numbers[f"{name}_reward_var"] = variance(scores)
        # A dropped group's zeros are no ranking.
        numbers[f"{name}_spearman"] = spearman(torch.where(row.any(), row, NAN), scores)
    return {f"diagnostics/{name}": value for name, value in numbers.items()}


def variance_by_step(group: Group) -> dict[str, float]:
    """Latent variance inside and outside the region after each step of the ODE: where the region's noise leaks.

    Returns:
        `diagnostics/latent_var_inside/step_k` and `diagnostics/latent_var_outside/step_k`, with k from 1 to the number
        of steps; NaN on a side that has no tokens.
    """
    latents = group.trajectory[1:]
    found = latent_variance(latents, group.region.to(latents.device))
    return {
        f"diagnostics/latent_var_{side}/step_{step}": value
        for side, values in found._asdict().items()
        for step, value in enumerate(values.tolist(), start=1)
    }


def reward_parts(group: Group, names: Sequence[str], weights: Tensor, regions: Sequence[str] = ()) -> dict[str, Tensor]:
    """A scored group's `parts` for `group_diagnostics`, as far as they can be known without another reward call.

    The keep part is always `background_keep`. The edit part is the score (`objective.total_scores`) of the rewards that
    belong to `"edit"` or `"region_k"` or, where they have no regions, of `region_edit`; left out where there is none.

    Args:
        group: with `rewards` `[G, rewards]`, and `compared` where any may have failed.
        names, weights: of its rewards.
        regions: of its rewards, with region advantages.
    """
    count = len(group.images)
    kept = background_keep(group.images, [group.source] * count, [group.mask] * count)
    parts = {"keep": torch.tensor([NAN if value is None else value for value in kept])}
    belongs = [region != "keep" for region in regions] or [name == "region_edit" for name in names]
    if any(belongs):
        rewards: Tensor = group.rewards if group.compared is None else group.compared  # type: ignore[assignment]
        parts["edit"] = total_scores(rewards.cpu()[:, belongs], weights.cpu()[belongs])
    return parts
