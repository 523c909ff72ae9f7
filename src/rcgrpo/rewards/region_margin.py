"""The embedded edit reward with more margin, and with a gradient: the log-probability of the wanted object.

`region_edit` pays cosines, of which the last tenths decide whether an object is recognised and earn next to nothing;
this reward pays for being taken for the wanted object and none of the others. It is written on tensors, so that
`reward_gradient_weight` can follow it into the picture, and called on PIL images like any other. In training its
gradient looks at a region in a random view, mirrored or not and a little shifted: what pleases a network in one exact
crop alone cancels out, what is there to be seen stays.

Gotchas: a network's own gradient also finds what pleases that network alone, so judge what it taught by another one
(`get_second_scorer`). A score is a log-probability plus a cosine: at most 1, without a lower bound.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .builtin import ADDS, REMOVES
from .pictures import image_tensor
from .region_scorer import RegionScorer, get_region_scorer, object_name, split_mask
from .registry import register_reward

TEMPERATURE = 0.1
"""Of the softmax over the cosines with the 24 prototypes, which are between -.3 and .9."""

Box = tuple[int, int, int, int]

SHIFT = 0.15
"""How far a view's sides may lie from the region's bounding box, as a share of its width or height."""

LEAST_LEFT = 1e-3
"""Least probability that an object is gone, so that one which is plainly there has a finite score."""


def region_margin_gradient(pictures: Sequence[Tensor] | Tensor, **columns: Any) -> Tensor:
    """`region_margin` of pictures `[3, height, width]` in [0, 1], with a gradient: `[pictures]`, NaN for `None`."""
    return margins(get_region_scorer(), pictures, **columns)


def margins(
    scorer: RegionScorer,
    pictures: Sequence[Tensor] | Tensor,
    /,
    masks: Sequence[Image.Image],
    task: Sequence[str],
    caption: Sequence[str],
    edited_image: Sequence[Image.Image | None],
    generators: Sequence[torch.Generator] | None = None,
    **columns: Any,
) -> Tensor:
    """As `region_margin_gradient`, by any judge.

    Args:
        generators: one for each picture, to draw a view of each of its parts from; the ground truth is seen in the
            same. Without them every part is seen as it is, in its bounding box.
    """
    crops: list[Tensor] = []
    wanted: list[Tensor] = []
    spans: dict[int, slice] = {}
    for i, (picture, mask, target) in enumerate(zip(pictures, masks, edited_image, strict=True)):
        boxes = _boxes(mask, (caption[i] or "").count("|") + 1)
        names = [object_name(name) for name in (caption[i] or "").split("|")]
        if task[i] in (*ADDS, *REMOVES) and target is not None and boxes and set(names) <= scorer.prototypes.keys():
            truth = image_tensor(target.resize(mask.size, Image.Resampling.BICUBIC))
            spans[i] = slice(len(crops), len(crops) + len(boxes))
            for box in boxes:
                seen, mirrored = (box, False) if generators is None else _view(box, mask.size, generators[i])
                for found, whole in ((crops, picture), (wanted, truth)):
                    part = scorer.crop_tensor(whole, seen)
                    found.append(part.flip(-1) if mirrored else part)
    scores = torch.full((len(masks),), math.nan)
    if not spans:
        return scores
    shown = scorer.tensor_features(torch.stack(crops))
    with torch.no_grad():
        truths = scorer.tensor_features(torch.stack(wanted))
    paid = [
        _score(scorer, shown[span], truths[span], task[i] in ADDS, [object_name(n) for n in caption[i].split("|")])
        for i, span in spans.items()
    ]
    return scores.index_put((torch.tensor(list(spans)),), torch.stack(paid))


@register_reward("region_margin", columns=("task", "caption", "edited_image"), differentiable=region_margin_gradient)
@torch.no_grad()
def region_margin(
    images: list[Image.Image],
    masks: list[Image.Image],
    task: list[str],
    caption: list[str],
    edited_image: list[Image.Image | None],
    **columns: Any,
) -> list[float | None]:
    """How clearly the masked region shows the wanted edit, and how near it is to the ground truth.

    With p(·) the softmax over the cosines of a part of the mask with the 24 prototypes, divided by `TEMPERATURE`, and
    the mean over the parts of

    - `ADDS`: `log p(wanted) + LP-I`; which part is to show which object is read from the ground truth.
    - `REMOVES`: `log(1 - p(removed)) + LP-I`.

    Returns:
        `None` for other tasks, objects outside the catalogue, and masks or targets that are missing or degenerate.
    """
    pictures = [image_tensor(image) for image in images]
    scores = region_margin_gradient(pictures, masks=masks, task=task, caption=caption, edited_image=edited_image)
    return [None if score != score else score for score in scores.tolist()]


def _boxes(mask: Image.Image, count: int) -> list[Box]:
    """Of each part of the mask; none where one is degenerate."""
    boxes = [part.convert("L").point(lambda v: 255 * (v >= 128)).getbbox() for part in split_mask(mask, count)]
    fit = [box for box in boxes if box is not None and min(box[2] - box[0], box[3] - box[1]) >= 2]
    return fit if len(fit) == len(boxes) else []


def _view(box: Box, size: tuple[int, int], generator: torch.Generator) -> tuple[Box, bool]:
    """The box with each side moved by a random share of its length, within the picture; and whether it is mirrored."""
    *moves, mirrored = torch.rand(5, generator=generator).tolist()
    sides = (box[2] - box[0], box[3] - box[1])
    left, upper, right, lower = (
        min(max(round(place + SHIFT * (2 * move - 1) * sides[i % 2]), 0), size[i % 2])
        for i, (place, move) in enumerate(zip(box, moves, strict=True))
    )
    return (left, upper, right, lower), mirrored < 0.5


def _score(scorer: RegionScorer, shown: Tensor, truth: Tensor, draws: bool, names: Sequence[str]) -> Tensor:
    """Of one picture, from the features of its parts and of the ground truth's, `[parts, 1280]`."""
    table = torch.stack(list(scorer.prototypes.values()))
    order = list(scorer.prototypes)
    # The parts' order is the picture's and not the caption's.
    indices = itertools.permutations([order.index(name) for name in names], len(shown))
    places = torch.arange(len(shown))
    labels = max(
        (torch.tensor(each) for each in indices), key=lambda each: float((truth @ table.T)[places, each].sum())
    )
    log_p = torch.log_softmax(shown @ table.T / TEMPERATURE, dim=-1)[places, labels]
    paid = log_p if draws else (1 - log_p.exp()).clamp(min=LEAST_LEFT).log()
    return (paid + (shown * truth).sum(-1)).mean()
