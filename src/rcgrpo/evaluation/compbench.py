"""CompBench's protocol (arXiv 2505.12200): the edited region's two scores, the sub-tasks, and what others published.

The background's metrics are in `maths.metrics`; `held_out` gives all of them names, `benchmark` runs them. Written from
the owners' evaluation code, with the same steps: everything at 512x512, the foreground cut out along the mask's
bounding box.

Gotchas:
- The box is `(min x, min y, max x, max y)` used as a PIL box, so the last row and column of the region are cut off.
- Any mask pixel above 0 belongs to the box, while the background metrics weigh a grey pixel by its value.
- Crops go through CLIP's own preprocessing: the shorter side to 224 pixels, then the square in the middle.
- A degenerate box scores 0 in both, and an empty caption is compared as one space, because the owners count so.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..inputs.pictures import to_rgb
from ..maths.metrics import COMPBENCH_SIZE
from ..rewards.clip_model import Clip

CATEGORIES: dict[str, tuple[str, ...]] = {
    "Local": ("add", "remove", "replace"),
    "Multi-object": ("multi_object_add", "multi_object_remove"),
    "Implicit": ("implicit_reasoning",),
    "Multi-turn, turn 1": ("turn1_add", "turn1_remove"),
    "Multi-turn, turn 2": ("turn2_add", "turn2_remove"),
}
"""Category to sub-tasks; a category's score is the mean of its sub-tasks' means."""

NOT_SCORED = ("action", "location", "view")
"""Tasks without a mask, which the owners give to vision-language judges and people; their code for it is not public."""

PUBLISHED_SOURCE = "arXiv 2505.12200"
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "Local": {
        "FLUX.1 Kontext": {"lc_t": 21.328, "lc_i": 0.821, "psnr": 25.613, "ssim": 0.941, "lpips": 0.050},
        "Bagel": {"lc_t": 21.059, "lc_i": 0.838, "psnr": 27.692, "ssim": 0.935, "lpips": 0.045},
    }
}
"""Category to model to score, as published; the settings they were sampled with are not known."""


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One turn of a multi-turn edit: its number from 1, its sub-task, and the name that all its turns share."""

    number: int
    sub_task: str
    name: str


def parse_turn(image_path: str) -> Turn | None:
    """What a path such as `turn1_add/02b72b8d_00002_t1.png` says; None for a row that stands alone.

    The folder tells the turn. The `_t1` in the name tells which of two objects comes first, and is part of the name.
    """
    found = re.fullmatch(r"(turn(\d+)_(\w+))/(.+)", image_path)
    return Turn(int(found[2]), found[1], f"{found[3]}/{found[4]}") if found else None


def sub_task(task: str, image_path: str) -> str:
    """Where a row is averaged: its turn for multi-turn rows, else its task."""
    turn = parse_turn(image_path)
    return task if turn is None else turn.sub_task


def video_id(image_path: str) -> str:
    """The eight hex digits of the video that a frame comes from; the whole path where there are none."""
    found = re.search(r"(?<![0-9a-f])[0-9a-f]{8}(?![0-9a-f])", image_path)
    return found[0] if found else image_path


def split_captions(caption: str | None) -> list[str]:
    """The captions that a region is compared with: those joined by `|` apart, and a space where there is none."""
    return [part for part in (caption or "").split("|") if part] or [" "]


# Foreground -----------------------------------------------------------------------------------------------------------


def foreground_box(mask: Image.Image) -> tuple[int, int, int, int] | None:
    """The box that the owners crop to, `(min x, min y, max x, max y)` of the pixels above 0; None if degenerate."""
    rows, columns = np.nonzero(np.asarray(mask.convert("L")))
    if not len(rows):
        return None
    left, top, right, bottom = (int(v) for v in (columns.min(), rows.min(), columns.max(), rows.max()))
    return (left, top, right, bottom) if right > left and bottom > top else None


def local_clip_scores(
    images: Sequence[Image.Image],
    targets: Sequence[Image.Image | None],
    masks: Sequence[Image.Image],
    captions: Sequence[str | None],
    clip: Clip,
    size: int | None = COMPBENCH_SIZE,
) -> tuple[list[float], list[float | None]]:
    """LC-T and LC-I of each edited picture.

    LC-T is torchmetrics' CLIPScore, `max(0, 100 · cosine)`, of the edited crop and the caption; several captions
    (`split_captions`) are scored one by one and averaged. LC-I is the cosine of the edited crop's and the ground
    truth's image features.

    Args:
        images: the edited pictures.
        targets: the ground-truth edits; LC-I is None where one is missing.
        masks: 255 = edit; a degenerate box scores 0 in both.
        captions: what the region shows, several joined by `|`.
        clip: the model.
        size: side in pixels to which all are resized first; None if they share a size already.
    """
    text_scores: list[float] = []
    image_scores: list[float | None] = []
    for image, target, mask, caption in zip(images, targets, masks, captions, strict=True):
        if size is not None:
            mask = mask.convert("L").resize((size, size), Image.Resampling.NEAREST)
        box = foreground_box(mask)
        if box is None:
            text_scores.append(0.0)
            image_scores.append(0.0)
            continue
        crops = [_crop(picture, box, size) for picture in (image, target) if picture is not None]
        features = clip.image_features(crops)
        cosines = clip.text_features(split_captions(caption)) @ features[0]
        text_scores.append(float((100 * cosines).clamp(min=0).mean()))
        image_scores.append(None if target is None else float(features[0] @ features[1]))
    return text_scores, image_scores


def _crop(picture: Image.Image, box: tuple[int, int, int, int], size: int | None) -> Image.Image:
    picture = to_rgb(picture)
    if size is not None:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return picture.crop(box)


# Categories -----------------------------------------------------------------------------------------------------------


def categorise(sub_tasks: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """The categories that occur, each with those of its sub-tasks that do; unknown ones make one called "Other"."""
    present = dict.fromkeys(sub_tasks)
    categories = {name: tuple(t for t in tasks if t in present) for name, tasks in CATEGORIES.items()}
    known = {task for tasks in CATEGORIES.values() for task in tasks}
    categories["Other"] = tuple(task for task in present if task not in known)
    return {name: tasks for name, tasks in categories.items() if tasks}
