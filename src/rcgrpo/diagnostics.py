"""Does a group teach what it should? Where its reward and its latents vary, and what its pictures look like.

Three users: the trainer logs `group_diagnostics` of every group; `rcgrpo diagnose` surveys held-out edits under several
kinds of exploration; the study in `benchmarks/study` does so with error bars. `docs/diagnostics.md` says which way each
number should go. Shapes below: G candidates, N tokens, C channels, H and W pixels.

Gotchas: variances are unbiased ones, so groups of different size can be compared. What cannot be measured (one
candidate, a mask without outside, a missing score) is NaN, never 0, and leaves every mean. Clip fractions are not here:
the policies log them as `clip_ratio/*`, since only an update has ratios.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import image_gradients
from torchmetrics.functional.regression import spearman_corrcoef

from .data.edits import Edit
from .editors import FluxKontextEditor
from .objective import group_advantages, quasi_norm
from .rewards import Reward, background_keep, score
from .rewards.pictures import image_tensor
from .rollout import Exploration, Group, make_groups

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


@torch.no_grad()
def depth_variance(editor: FluxKontextEditor, model: nn.Module, group: Group, step: int) -> InsideOutside:
    """How much a group's hidden states differ, before the first block and after each, `[blocks + 1]` on the CPU.

    One forward of the whole group at the latents that it had at this step. The variance across candidates is divided by
    the states' mean square at that depth, because blocks differ in scale.

    Args:
        model: the transformer as `editor.velocity` takes it; adapters inside are fine.
        step: which step of the rollout, from 0.
    """
    transformer = editor.pipeline.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    tokens, region = len(group.region), group.region.cpu()
    found: list[InsideOutside] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # Blocks return (text, image); reference tokens follow the noisy ones.
        states = (output[1] if isinstance(output, tuple) else output)[:, :tokens].float()
        spread = states.var(0).mean(-1) / states.square().mean().clamp(min=1e-20)
        found.append(split_by_region(spread.cpu(), region))

    handles = [module.register_forward_hook(hook) for module in (transformer.x_embedder, *blocks)]
    try:
        latents = group.trajectory[step]
        timestep = group.schedule.timesteps[step].expand(len(latents))
        editor.velocity(model, latents, timestep, group.conditions.repeat(len(latents)))
    finally:
        for handle in handles:
            handle.remove()
    return InsideOutside(torch.stack([f.inside for f in found]), torch.stack([f.outside for f in found]))


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
        wanted = image_tensor(target.convert("RGB").resize(image.size, Image.Resampling.BICUBIC))
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
        rows: names of the rows of advantages. A part is compared with the row of its name, else with their sum.

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
        row = several[rows.index(name)] if name in rows else several.sum(0)
        numbers[f"{name}_reward_var"] = variance(scores)
        # A dropped group's zeros are no ranking.
        numbers[f"{name}_spearman"] = spearman(torch.where(row.any(), row, NAN), scores)
    return {f"diagnostics/{name}": value for name, value in numbers.items()}


def reward_parts(group: Group, names: Sequence[str], weights: Tensor, regions: Sequence[str] = ()) -> dict[str, Tensor]:
    """A scored group's `parts` for `group_diagnostics`, as far as they can be known without another reward call.

    The keep part is always `background_keep`. The edit part is the weighted sum of the rewards that belong to `"edit"`
    or, where rewards have no regions, `region_edit`'s; it is left out where there is none.

    Args:
        group: with `rewards` `[G, rewards]`.
        names, weights: of its rewards.
        regions: of its rewards, with region advantages.
    """
    count = len(group.images)
    kept = background_keep(group.images, [group.source] * count, [group.mask] * count)
    parts = {"keep": torch.tensor([NAN if value is None else value for value in kept])}
    belongs = [region == "edit" for region in regions] or [name == "region_edit" for name in names]
    if any(belongs):
        parts["edit"] = (group.rewards.cpu() * weights.cpu())[:, belongs].sum(1)  # type: ignore[union-attr]
    return parts


# Many edits -----------------------------------------------------------------------------------------------------------

JUDGES = ("reward", "edit", "keep", "held_out")
"""What a survey asks of every candidate: the whole reward, its two parts, and one that nothing is trained on."""


@dataclass(frozen=True)
class Finding:
    """What a survey found on one edit.

    `numbers` by name; `scores` of each judge `[G]`; `steps` and, where asked for, `depth`: latent and hidden variance
    at each noise level and after each block; `picture` is the first candidate, `attention_map` `[rows, columns]` its
    attention where recorded.
    """

    edit: Edit
    numbers: dict[str, float]
    scores: dict[str, Tensor]
    sigmas: Tensor
    steps: InsideOutside
    depth: InsideOutside | None
    picture: Image.Image
    attention_map: Tensor | None


def survey(
    editor: FluxKontextEditor,
    model: nn.Module,
    edits: Sequence[Edit],
    num_generations: int,
    exploration: Exploration,
    key: tuple[Any, ...],
    judges: Mapping[str, Reward],
    depth_step: int | None = None,
    num_maps: int = 0,
    edits_at_once: int = 4,
    batch_size: int | None = None,
) -> list[Finding]:
    """Roll out and judge a group of each edit, and keep numbers instead of latents.

    Args:
        num_generations: candidates of each edit, at least 2.
        key: what the noise is drawn from; explorations with the same key start from the same draws.
        judges: rewards under the names of `JUDGES`; a missing one leaves its numbers out.
        depth_step: also look at hidden states at this step, one more forward of each group.
        num_maps: of so many edits, the first ones, keep attention maps.
        edits_at_once: how many groups are held in memory.
        batch_size: candidates at a time in rollouts.
    """
    findings: list[Finding] = []
    while len(findings) < len(edits):
        start = len(findings)
        mapping = start < num_maps
        part = edits[start : min(start + edits_at_once, num_maps) if mapping else start + edits_at_once]
        attention: Any = "maps" if mapping else "mass"
        groups = make_groups(editor, model, part, num_generations, exploration, key, attention, batch_size)
        findings += [_find(editor, model, group, judges, depth_step) for group in groups]
    return findings


def _find(
    editor: FluxKontextEditor, model: nn.Module, group: Group, judges: Mapping[str, Reward], depth_step: int | None
) -> Finding:
    scores = judge(group, judges)
    rewards = scores.get("reward", torch.full([len(group.images)], NAN))
    advantages = quasi_norm(group_advantages(rewards))
    parts: dict[str, Tensor] = {name: scores[name] for name in ("edit", "keep") if name in scores}
    logged = group_diagnostics(group, advantages, parts)
    numbers = {name.removeprefix("diagnostics/"): value for name, value in logged.items()}
    for name, values in scores.items():
        numbers[name] = float(values.nanmean())
    if "reward" in scores:
        numbers["reward_var"] = variance(rewards)
    if group.attention is not None:
        for measure in ("mass", "density", "contrast"):
            numbers[f"attention_{measure}"] = float(getattr(group.attention, measure).mean())
    return Finding(
        edit=group.edit,
        numbers=numbers,
        scores=scores,
        sigmas=group.schedule.sigmas.cpu(),
        steps=latent_variance(group.trajectory.cpu(), group.region.cpu()),
        depth=None if depth_step is None else depth_variance(editor, model, group, depth_step),
        picture=group.images[0],
        attention_map=None if group.attention_maps is None else group.attention_maps[0],
    )


def judge(group: Group, judges: Mapping[str, Reward]) -> dict[str, Tensor]:
    """Each judge's scores of a group, `[G]`; NaN where there is none."""
    if not judges:
        return {}
    count = len(group.images)
    columns = {name: [value] * count for name, value in group.edit.columns.items()}
    if group.attention is not None:
        for measure in ("mass", "density", "contrast"):
            columns[f"attention_{measure}"] = getattr(group.attention, measure).tolist()
    scored = score(
        list(judges.values()),
        [group.edit.prompt] * count,
        group.images,
        [group.source] * count,
        [group.mask] * count,
        columns,
        [f"{group.edit.label}, candidate {i}" for i in range(count)],
        {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore},
    )
    return dict(zip(judges, scored.values.T, strict=True))


def _ignore(name: str, value: Any) -> None:
    """A survey keeps no log for rewards."""


def mean_curve(curves: Sequence[InsideOutside]) -> InsideOutside:
    """The mean over edits; NaN sides are left out."""
    return InsideOutside(
        *(torch.stack([getattr(c, side) for c in curves]).nanmean(0) for side in InsideOutside._fields)
    )


class Match(NamedTuple):
    """A strength, the diversity that it reaches, and how often it was tried."""

    strength: float
    reached: float
    evaluations: int


def match_strength(
    measure: Callable[[float], float], target: float, tolerance: float = 0.02, max_evaluations: int = 10
) -> Match:
    """The strength at which a measure of spread hits a target, by bisection in [0, 1].

    Args:
        measure: strength to spread, rising from 0 at strength 0; each call costs a rollout.
        target: ≥ 0.
        tolerance: relative; the search ends within it.
        max_evaluations: calls of `measure` at most.

    Returns:
        The nearest that was tried; strength 1 where even that falls short of the target.
    """
    reached = measure(1.0)
    best = Match(1.0, reached, 1)
    if reached <= target:
        return best
    low, high = 0.0, 1.0
    for evaluations in range(2, max_evaluations + 1):
        if abs(best.reached - target) <= tolerance * target:
            break
        middle = (low + high) / 2
        reached = measure(middle)
        low, high = (middle, high) if reached < target else (low, middle)
        nearer = abs(reached - target) <= abs(best.reached - target)
        best = Match(middle, reached, evaluations) if nearer else best._replace(evaluations=evaluations)
    return best
