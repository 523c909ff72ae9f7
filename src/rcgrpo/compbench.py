"""CompBench's protocol (arXiv 2505.12200): the edited region's two scores, the sub-tasks, and what others published.

The background's metrics are in `metrics`; `evaluation` gives all of them names, `benchmark` runs them. Written from the
owners' evaluation code, with the same steps: everything at 512x512, the foreground cut out along the mask's bounding
box.

Gotchas:
- The box is `(min x, min y, max x, max y)` used as a PIL box, so the last row and column of the region are cut off.
- Any mask pixel above 0 belongs to the box, while the background metrics weigh a grey pixel by its value.
- Crops go through CLIP's own preprocessing: the shorter side to 224 pixels, then the square in the middle.
- A degenerate box scores 0 in both, and an empty caption is compared as one space, because the owners count so.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from .metrics import COMPBENCH_SIZE, first_words
from .pictures import to_rgb

CLIP_MODEL = "openai/clip-vit-large-patch14"
"""The CLIP that LC-T and LC-I are defined with. Any other one gives other numbers."""

CLIP_BATCH = 32
"""Pictures that CLIP looks at together."""

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


class Clip:
    """CLIP's two towers, frozen, in fp32. Features have unit norm.

    Args:
        name: Hub id or folder of a `CLIPModel`, such as `CLIP_MODEL`.
        device: where it runs; by default the current GPU if there is one.

    Raises:
        ValueError: it cannot be loaded.
    """

    def __init__(self, name: str = CLIP_MODEL, device: str | None = None) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        try:
            model = CLIPModel.from_pretrained(name, dtype=torch.float32)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(name)
            # Pillow's resizing, as in the owners' time; torchvision's differs in the last digits.
            self.image_processor: Any = CLIPImageProcessorPil.from_pretrained(name)
        except Exception as error:  # huggingface_hub, safetensors and transformers raise their own kinds
            raise ValueError(
                f"CLIP: got {name!r}, expected a Hub id or folder of a CLIP model, which could not be loaded "
                f"({first_words(error)})"
            ) from error
        self.model = model.eval().requires_grad_(False).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """`[images, width]` on the CPU."""
        rows = []
        for start in range(0, len(images), CLIP_BATCH):
            pixels = self.image_processor(
                [np.asarray(image.convert("RGB")) for image in images[start : start + CLIP_BATCH]],
                return_tensors="pt",
                input_data_format="channels_last",  # a crop of three rows would be taken for three channels
            )["pixel_values"]
            pooled = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
            rows.append(normalize(self.model.visual_projection(pooled), dim=-1).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """`[texts, width]` on the CPU; what exceeds the model's positions is cut off, as torchmetrics does."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        ids, attention = (tokens[key][:, :limit].to(self.model.device) for key in ("input_ids", "attention_mask"))
        pooled = self.model.text_model(input_ids=ids, attention_mask=attention).pooler_output
        return normalize(self.model.text_projection(pooled), dim=-1).cpu()


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
