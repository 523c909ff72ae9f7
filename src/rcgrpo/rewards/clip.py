"""CLIP rewards: does the region show the caption or look like the ground truth, did it move the way the words did.

Where it fits: local rewards for any data set with captions or ground truth, on CompBench's crop (the mask's bounding
box, no margin). Why it exists: CompBench measures LC-T and LC-I with the same model, so these are the proxies nearest
to what is reported. Weights are loaded by the first call, from the Hub or a folder, and shared between the rewards.

Gotchas: a reward that is also the metric is optimised beyond what it means: report another metric as well. Captions
longer than CLIP's 77 tokens are cut. A crop is squeezed to CLIP's square by its own processor, which keeps the aspect
ratio and cuts the longer side's ends.
"""

from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import normalize

from .clip_model import CLIP_MODEL, Clip
from .pictures import crop_to_region
from .registry import register_reward


@lru_cache(maxsize=4)
def load_clip(model: str, device: str) -> Clip:
    """The shared encoder of a model on a device; loaded on first use."""
    return Clip(model, device)


class _ClipReward:
    """A model id, a device, and how many candidates can be judged at all.

    Args:
        model: Hub id or folder; by default the model of CompBench's metrics.
        device: "cuda", "cpu", …; by default the current GPU if there is one.
    """

    def __init__(self, model: str = CLIP_MODEL, device: str | None = None) -> None:
        self.model, self.device = model, device

    @property
    def encoder(self) -> Clip:
        # With its number, because several processes or threads may each have a GPU of their own.
        current = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        return load_clip(self.model, self.device or current)


def split_caption(caption: str | None) -> list[str]:
    """CompBench joins the captions of several objects with `|`; an empty list if there is none."""
    return [part.strip() for part in (caption or "").split("|") if part.strip()]


@register_reward("clip_text", columns=("caption",), value_range=(0.0, 1.0))
class ClipTextReward(_ClipReward):
    """Cosine of the region's crop with its caption, at least 0; a hundredth of CompBench's LC-T (arXiv 2505.12200).

    The mean over the captions of several objects. `None` without a caption, and for a degenerate mask.
    """

    def __call__(
        self, images: list[Image.Image], masks: list[Image.Image], caption: list[str | None], **columns: Any
    ) -> list[float | None]:
        crops = [crop_to_region(image, mask) for image, mask in zip(images, masks, strict=True)]
        pairs = [
            (row, crop, text)
            for row, (crop, given) in enumerate(zip(crops, caption, strict=True))
            if crop is not None
            for text in split_caption(given)
        ]
        scores: list[float | None] = [None] * len(images)
        if not pairs:
            return scores
        shown = {row: crop for row, crop, _ in pairs}
        features = dict(zip(shown, self.encoder.image_features(list(shown.values())), strict=True))
        texts = list(dict.fromkeys(text for *_, text in pairs))  # a group shares its caption
        words = dict(zip(texts, self.encoder.text_features(texts), strict=True))
        cosines: dict[int, list[float]] = {}
        for row, _, text in pairs:
            cosines.setdefault(row, []).append(max(0.0, float(features[row] @ words[text])))
        for row, values in cosines.items():
            scores[row] = min(1.0, sum(values) / len(values))
        return scores


@register_reward("clip_image", columns=("edited_image",), value_range=(-1.0, 1.0))
class ClipImageReward(_ClipReward):
    """Cosine of the region's crop with the ground truth's, CompBench's LC-I (arXiv 2505.12200), in [-1, 1].

    `None` without a ground truth, and for a degenerate mask.
    """

    def __call__(
        self,
        images: list[Image.Image],
        masks: list[Image.Image],
        edited_image: list[Image.Image | None],
        **columns: Any,
    ) -> list[float | None]:
        pairs: dict[int, tuple[Image.Image, Image.Image]] = {}
        for row, (image, mask, target) in enumerate(zip(images, masks, edited_image, strict=True)):
            shown = crop_to_region(image, mask)
            wanted = None if target is None else crop_to_region(target, mask)
            if shown is not None and wanted is not None:
                pairs[row] = shown, wanted
        scores: list[float | None] = [None] * len(images)
        if pairs:
            both = self.encoder.image_features([crop for side in zip(*pairs.values(), strict=True) for crop in side])
            shown_rows, wanted_rows = both.chunk(2)
            for row, cosine in zip(pairs, (shown_rows * wanted_rows).sum(-1).clamp(-1, 1).tolist(), strict=True):
                scores[row] = cosine
        return scores


@register_reward("clip_direction", columns=("source_caption", "target_caption"), value_range=(-1.0, 1.0))
class ClipDirectionReward(_ClipReward):
    """Directional similarity (StyleGAN-NADA, arXiv 2108.00946): cosine of the change of picture and of words, -1..1.

    `cos(I(edited) - I(source), T(target caption) - T(source caption))`, on whole pictures.

    `None` where a caption is missing or both are the same, and where the picture did not change at all.

    Args:
        model, device: as in the other CLIP rewards.
        source_caption, target_caption: the columns with captions of the picture before and after the edit.
    """

    def __init__(
        self,
        model: str = CLIP_MODEL,
        device: str | None = None,
        source_caption: str = "source_caption",
        target_caption: str = "target_caption",
    ) -> None:
        super().__init__(model, device)
        self.columns = (source_caption, target_caption)

    def __call__(
        self, images: list[Image.Image], source_images: list[Image.Image], **columns: Any
    ) -> list[float | None]:
        before, after = (columns[name] for name in self.columns)
        rows = [row for row, pair in enumerate(zip(before, after, strict=True)) if all(pair) and pair[0] != pair[1]]
        scores: list[float | None] = [None] * len(images)
        if not rows:
            return scores
        sources = {id(source_images[row]): source_images[row] for row in rows}  # a group shares its source
        position = {key: index for index, key in enumerate(sources)}
        features = self.encoder.image_features([*sources.values(), *(images[row] for row in rows)])
        source_rows = features[[position[id(source_images[row])] for row in rows]]
        moved = features[len(sources) :] - source_rows
        words = self.encoder.text_features([after[row] for row in rows]) - self.encoder.text_features(
            [before[row] for row in rows]
        )
        cosines = (normalize(moved, dim=-1) * normalize(words, dim=-1)).sum(-1).clamp(-1, 1)
        for row, distance, cosine in zip(rows, moved.norm(dim=-1).tolist(), cosines.tolist(), strict=True):
            scores[row] = cosine if distance > 1e-4 else None
        return scores
