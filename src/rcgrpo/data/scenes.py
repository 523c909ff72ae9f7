"""Scenes of pasted objects, and the edits between them: what CompBench-mini and the Tux Paint pack have in common.

A scene is a square photograph whose four quarters hold at most one object each. Source and target differ by the objects
that an edit is about, so target and mask are exact. Columns and tasks' names are CompBench's (arXiv 2505.12200).
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from datasets import Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageChops, ImageFilter

TASKS = ("add", "remove", "replace", "multi_object_add", "multi_object_remove", "implicit_reasoning")
PLACES = ("top left", "top right", "bottom left", "bottom right")
MASK_GROWTH = 1 / 32
"""How far the mask reaches beyond the object's alpha, as a share of the picture's side (2 pixels at 64)."""

FEATURES = Features(
    {
        "task": Value("string"),
        "image_path": Value("string"),
        "input_image": Image(),
        "edited_image": Image(),
        "instruction": Value("string"),
        "caption": Value("string"),
        "mask": Image(),
    }
)


@dataclass(frozen=True)
class Photo:
    name: str
    split: str

    @property
    def video_id(self) -> str:
        """Eight hex digits, as CompBench's paths carry for the video that a frame comes from."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:8]


class Thing(Protocol):
    """An object that can be pasted.

    `name` without article, `phrase` with one; `kind` is what *implicit_reasoning* calls it, `None` for no part in that.
    """

    @property
    def name(self) -> str: ...

    @property
    def phrase(self) -> str: ...

    @property
    def kind(self) -> str | None: ...

    def drawn(self, side: int) -> PILImage.Image:
        """The object as RGBA, its longer side `side` pixels."""
        ...


@dataclass
class Placed:
    """An object with its place in a scene."""

    thing: Thing
    place: int
    picture: PILImage.Image
    corner: tuple[int, int]

    def paste(self, scene: PILImage.Image) -> None:
        scene.paste(self.picture, self.corner, self.picture)

    def mask(self, size: int) -> PILImage.Image:
        """Every pixel that pasting may change, grown by `MASK_GROWTH`."""
        mask = PILImage.new("L", (size, size))
        mask.paste(self.picture.getchannel("A").point(lambda a: 255 * (a > 0)), self.corner)
        return mask.filter(ImageFilter.MaxFilter(2 * round(MASK_GROWTH * size) + 1))


def draw_square(rng: random.Random, picture: PILImage.Image, size: int) -> PILImage.Image:
    """A random square of a photograph, at least half its shorter side, mirrored half of the time."""
    side = rng.randint(min(picture.size) // 2, min(picture.size))
    left, top = (rng.randint(0, limit - side) for limit in picture.size)
    scene = picture.resize((size, size), PILImage.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return scene.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else scene


def place_object(rng: random.Random, thing: Thing, place: int, size: int) -> Placed:
    """The object in its quarter of the picture, so far from the others that not even grown masks touch."""
    picture = thing.drawn(rng.randint(round(0.34 * size), round(0.42 * size)))
    cell, border = size // 2, round(MASK_GROWTH * size)
    row, column = divmod(place, 2)
    x, y = (border + rng.randint(0, max(0, cell - side - 2 * border - 1)) for side in picture.size)
    return Placed(thing, place, picture, (column * cell + x, row * cell + y))


def compose(
    rng: random.Random,
    task: str,
    photo: Photo,
    background: PILImage.Image,
    cast: Sequence[Thing],
    seed: int,
    index: int,
) -> dict[str, Any]:
    """One row with CompBench's columns; `background` is drawn on.

    Args:
        cast: who may appear, the objects that the edit is about first: old and new for *replace*, both for the
            multi-object tasks, else one. Of the others, one to three stand by as far as there is room.
        seed, index: for the row's `image_path`.
    """
    size = background.width
    places = rng.sample(range(4), 4)
    if task == "replace":
        old, new = ([place_object(rng, thing, places[0], size)] for thing in cast[:2])
        bystanders = cast[2:]
    else:
        edited = [place_object(rng, *spot, size) for spot in zip(cast[: 1 + ("multi" in task)], places, strict=False)]
        old, new = ([], edited) if task.endswith("add") else (edited, [])
        bystanders = cast[len(edited) :]
    free = places[len(old or new) :]
    for thing, place in zip(bystanders[: rng.randint(1, len(free))], free, strict=False):
        place_object(rng, thing, place, size).paste(background)

    source, target, mask = background.copy(), background.copy(), PILImage.new("L", (size, size))
    for scene, placed in [*((source, placed) for placed in old), *((target, placed) for placed in new)]:
        placed.paste(scene)
        mask = ImageChops.lighter(mask, placed.mask(size))
    return {
        "task": task,
        "image_path": _image_path(task, photo, seed, index),
        "input_image": source,
        "edited_image": target,
        "instruction": _instruction(task, old, new),
        "caption": "|".join(placed.thing.phrase for placed in new or old),
        "mask": mask,
    }


def _instruction(task: str, old: Sequence[Placed], new: Sequence[Placed]) -> str:
    if task == "replace":
        return f"replace the {old[0].thing.name} with {new[0].thing.phrase}"
    if task == "implicit_reasoning":
        return f"remove the {old[0].thing.kind}"
    if new:
        return "add " + " and ".join(f"{placed.thing.phrase} in the {PLACES[placed.place]}" for placed in new)
    return "remove " + " and ".join(f"the {placed.thing.name}" for placed in old)


def _image_path(task: str, photo: Photo, seed: int, index: int) -> str:
    """As CompBench writes them, for each kind of task in its own way, always with the video's id in front."""
    if task == "implicit_reasoning":
        return f"{photo.video_id}_{seed}_{index:05d}.png"
    return f"{photo.video_id}_{index:05d}.png" if "multi" in task else f"{photo.video_id}/{seed}/{index:05d}.png"
