"""The rewards that need no download: edit and background on the embedded data, preservation on any data, attention.

Where it fits: importing `rcgrpo.rewards` registers them; `reward_funcs="compbench_mini"` is the embedded default. Why
it exists: training must be able to start on any machine, and preservation needs no model at all.

Gotchas: images, sources and masks must share one size; masks are read at ≥ 128 = edit. `region_edit` and
`compbench_mini` know the 24 embedded objects and the tasks in `ADDS` and `REMOVES`; anything else is `None`.
Preservation rewards are at their best for an editor that does nothing: never train on one alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .pictures import image_tensor, outside, place
from .region_scorer import get_region_scorer
from .registry import RewardError, register_reward

ADDS = ("add", "replace", "multi_object_add")
REMOVES = ("remove", "multi_object_remove", "implicit_reasoning")
KEEP_SCALE = 0.1
PSNR_CAP = 60.0


@register_reward("region_edit", columns=("task", "caption", "edited_image"), value_range=(0.0, 1.0))
def region_edit(
    images: list[Image.Image],
    masks: list[Image.Image],
    task: list[str],
    caption: list[str],
    edited_image: list[Image.Image | None],
    **columns: Any,
) -> list[float | None]:
    """How well the masked region shows the wanted edit, in [0, 1], on the embedded scorer's cosines.

    With `T = (1 + LP-T) / 2`, closeness to the captioned object, and `I = (1 + LP-I) / 2`, to the ground truth:

    - `ADDS`: `(T + I) / 2`. The prototype alone would accept any apple anywhere in the crop; the ground truth alone
      would reward the right surroundings. Either one moves the score wherever the other is.
    - `REMOVES`: `I · (1 - max(0, LP-T))`, as the caption names what must disappear. Only the object's presence costs;
      being *unlike* it earns nothing, or an editor would be paid for distortion.

    Returns:
        `None` for other tasks, objects outside the catalogue, and masks or targets that are missing or degenerate.
    """
    lp_t, lp_i = get_region_scorer().lp(images, masks, caption, edited_image)
    return [edit_score(*values) for values in zip(task, lp_t, lp_i, strict=True)]


def edit_score(task: str, lp_t: float | None, lp_i: float | None) -> float | None:
    """`region_edit` of one candidate, of its LP-T and LP-I."""
    if lp_t is None or lp_i is None:
        return None
    if task in ADDS:
        return (2 + lp_t + lp_i) / 4
    return (1 + lp_i) / 2 * (1 - max(0.0, lp_t)) if task in REMOVES else None


def background_keep_gradient(
    pictures: Tensor, source_images: Sequence[Image.Image], masks: Sequence[Image.Image], **columns: Any
) -> Tensor:
    """`background_keep` of pictures `[n, 3, height, width]` in [0, 1], with a gradient: `[n]`, NaN for `None`."""
    scores = []
    for picture, source, mask in zip(pictures, source_images, masks, strict=True):
        keep = outside(source, source, mask).to(pictures.device)
        mse = (picture - image_tensor(source).to(picture)).square()[:, keep].mean()
        scores.append((-mse.clamp(min=1e-12).sqrt() / KEEP_SCALE).exp())
    return torch.stack(scores)


@register_reward("background_keep", value_range=(0.0, 1.0), differentiable=background_keep_gradient)
def background_keep(
    images: list[Image.Image], source_images: list[Image.Image], masks: list[Image.Image], **columns: Any
) -> list[float | None]:
    """How well everything outside the mask is kept: `exp(-rmse / 0.1)`, in (0, 1]; 1 = every pixel is the source's.

    `rmse` is over the outside's pixels and channels, in units of the full range. An all-edit mask gives `None`.
    """
    return [
        None if mse is None else math.exp(-math.sqrt(mse) / KEEP_SCALE)
        for mse in map(_outside_mse, images, source_images, masks)
    ]


@register_reward("background_psnr", value_range=(0.0, PSNR_CAP))
def background_psnr(
    images: list[Image.Image], source_images: list[Image.Image], masks: list[Image.Image], **columns: Any
) -> list[float | None]:
    """PSNR against the source over the pixels outside the mask alone, in dB, at most 60. An all-edit mask gives `None`.

    Not CompBench's figure, which blackens the region and averages over the whole frame, and so reads higher.
    """
    return [
        None if mse is None else min(PSNR_CAP, -10 * math.log10(max(mse, 1e-12)))
        for mse in map(_outside_mse, images, source_images, masks)
    ]


@register_reward("background_ssim", value_range=(-1.0, 1.0))
def background_ssim(
    images: list[Image.Image], source_images: list[Image.Image], masks: list[Image.Image], **columns: Any
) -> list[float | None]:
    """Mean of the SSIM map against the source over the pixels outside the mask, in [-1, 1].

    The source is pasted into the region first, or else its 11-pixel windows that overlap the region would
    punish the edit itself.
    An all-edit mask gives `None`; so small an image that a window does not fit is a failure.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # slow to import

    scores: list[float | None] = []
    for image, source, mask in zip(images, source_images, masks, strict=True):
        pixels = image_tensor(image), image_tensor(source), outside(image, source, mask)
        shown, kept, keep = (tensor.to(place()) for tensor in pixels)
        if not keep.any():
            scores.append(None)
            continue
        shown = torch.where(keep, shown, kept)
        _, ssim_map = structural_similarity_index_measure(
            shown[None], kept[None], data_range=1.0, return_full_image=True
        )
        scores.append(ssim_map[0, :, keep].mean().item())
    return scores


@register_reward("compbench_mini", columns=("task", "caption", "edited_image"), value_range=(0.0, 1.0))
def compbench_mini(
    images: list[Image.Image], source_images: list[Image.Image], masks: list[Image.Image], **columns: Any
) -> list[float | None]:
    """The embedded default: `sqrt(region_edit · background_keep)`, in [0, 1]. `None` where either does not apply.

    The geometric mean lets neither a perfect edit nor an untouched background win alone.
    """
    edit = region_edit(images=images, masks=masks, **columns)
    keep = background_keep(images, source_images, masks)
    return [None if e is None or k is None else math.sqrt(e * k) for e, k in zip(edit, keep, strict=True)]


@register_reward("attention_concentration")
def attention_concentration(attention_density: list[float] | None = None, **columns: Any) -> list[float]:
    """The instruction's attention density on the region over the rollout: uniform attention = 1, higher = inside.

    The paper's intrinsic reward (arXiv 2604.09386); the formula is ours, `algorithm.md` section 6.

    Raises:
        RewardError: attention was not recorded.
    """
    return _recorded("attention_concentration", "attention_density", attention_density)


@register_reward("attention_mass", value_range=(0.0, 1.0))
def attention_mass(attention_mass: list[float] | None = None, **columns: Any) -> list[float]:
    """As `attention_concentration`, the share of the attention that falls on the region, whatever the region's size."""
    return _recorded("attention_mass", "attention_mass", attention_mass)


@register_reward("attention_contrast", value_range=(0.0, 1.0))
def attention_contrast(attention_contrast: list[float] | None = None, **columns: Any) -> list[float]:
    """As `attention_concentration`, `inside / (inside + outside)` of the mean attention there: uniform = 0.5."""
    return _recorded("attention_contrast", "attention_contrast", attention_contrast)


ATTENTION_REWARDS = ("attention_concentration", "attention_mass", "attention_contrast")
"""Rewards for which the trainer records attention."""


def _recorded(reward: str, column: str, values: list[float] | None) -> list[float]:
    if values is None:
        raise RewardError(
            f"{reward}: there is no `{column}`; the trainer records it when this reward is used, so name it in "
            "`reward_funcs`, or record attention during your own rollout and pass the list in `context`"
        )
    return values


def _outside_mse(image: Image.Image, source: Image.Image, mask: Image.Image) -> float | None:
    keep = outside(image, source, mask)
    if not keep.any():
        return None
    return (image_tensor(image) - image_tensor(source)).square()[:, keep].mean().item()
