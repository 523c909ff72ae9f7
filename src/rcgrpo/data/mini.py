"""CompBench-mini: the embedded data set, drawn on the user's machine from a seed.

Rendered objects are pasted on real photographs, so every edit has an exact target and an exact mask. The columns are
CompBench's, verbatim (arXiv 2505.12200), and so are the tasks' names. The same `(split, size, seed, index)` gives the
same pixels everywhere: assets are lossless, and only `random.Random` and integer arithmetic take part.

The held-out split uses photographs that the training split never sees, and pairs of objects that it never pairs (see
`pairings`). Both share the objects, because a reward that knows 24 objects can only judge those.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from .scenes import FEATURES, TASKS, Photo, compose, draw_square

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Emoji:
    """An object of the catalogue. Without a `kind` it takes no part in *implicit_reasoning*: its kind is disputable."""

    name: str
    code_point: str
    kind: str | None

    @property
    def phrase(self) -> str:
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    def drawn(self, side: int) -> PILImage.Image:
        """The object as RGBA, its longer side `side` pixels."""
        return load_object(self.name, side)


PHOTOS = tuple(
    Photo(name, split)
    for split, names in {
        "train": "astronaut camera chelsea rocket flower grass hubble_deep_field retina",
        "test": "coffee china brick",
    }.items()
    for name in names.split()
)

KINDS = {
    "fruit": ("apple", "banana", "watermelon"),
    "animal": ("duck", "penguin", "fish"),
    "vehicle": ("bus", "sailboat", "rocket"),
    "plant": ("sunflower", "tree", "cactus"),
    "ball": ("basketball", "soccer ball"),
}

OBJECTS = tuple(
    Emoji(name, code_point, next((kind for kind, names in KINDS.items() if name in names), None))
    for name, code_point in {
        "apple": "1f34e",
        "banana": "1f34c",
        "donut": "1f369",
        "sunflower": "1f33b",
        "rocket": "1f680",
        "house": "1f3e0",
        "guitar": "1f3b8",
        "bus": "1f68c",
        "tree": "1f333",
        "cactus": "1f335",
        "mushroom": "1f344",
        "balloon": "1f388",
        "basketball": "1f3c0",
        "soccer ball": "26bd",
        "pizza": "1f355",
        "watermelon": "1f349",
        "hamburger": "1f354",
        "duck": "1f986",
        "penguin": "1f427",
        "fish": "1f420",
        "sailboat": "26f5",
        "teddy bear": "1f9f8",
        "gift": "1f381",
        "crown": "1f451",
    }.items()
)


@cache
def pairings(split: str, implicit: bool = False) -> tuple[tuple[Emoji, Emoji], ...]:
    """The pairs of objects that a split's edits may be about; a quarter of them are held out.

    A pair is the old and the new object of *replace*, the two of the multi-object tasks, and elsewhere the edited
    object with the first bystander.

    Args:
        split: `"train"` or `"test"`; no pair is in both.
        implicit: only pairs of two different kinds, so that naming the kind names the object.
    """
    pairs = [
        (a, b)
        for a, b in combinations(OBJECTS, 2)
        if (hashlib.sha256(f"{a.name}|{b.name}".encode()).digest()[0] < 64) == (split == "test")
    ]
    return tuple(
        ordered
        for a, b in pairs
        for ordered in ((a, b), (b, a))
        if not implicit or (a.kind and b.kind and a.kind != b.kind)
    )


@cache
def load_photo(name: str) -> PILImage.Image:
    with PILImage.open(ASSETS / "photos" / f"{name}.png") as image:
        return image.convert("RGB")


@cache
def load_object(name: str, side: int) -> PILImage.Image:
    """The object as RGBA, its longer side `side` pixels."""
    with PILImage.open(ASSETS / "objects" / f"{name.replace(' ', '_')}.png") as stored:
        image = stored.convert("RGBA")
    scale = side / max(image.size)
    return image.resize([max(1, round(s * scale)) for s in image.size], PILImage.Resampling.LANCZOS)


def _draw_background(rng: random.Random, photo: Photo, size: int) -> PILImage.Image:
    """A random square of the photograph, mirrored half of the time, its brightness and saturation varied."""
    scene = draw_square(rng, load_photo(photo.name), size)
    # In 1/256 and integers: floating point may round another way on another machine.
    brightness, saturation = rng.randint(192, 320), rng.randint(154, 358)
    pixels = np.asarray(scene, dtype=np.int64) * brightness >> 8
    grey = (pixels @ np.array([77, 150, 29]) >> 8)[..., None]
    pixels = grey + ((pixels - grey) * saturation >> 8)
    return PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8))


def render(split: str, index: int, size: int = 64, seed: int = 0) -> dict[str, Any]:
    """One row, drawn from `(split, size, seed, index)` alone.

    A scene holds one to three bystanders besides the objects that the edit is about.

    Args:
        split: `"train"` or `"test"`; the two share no photograph and no pair of objects.
        index: the row's number, ≥ 0; any number of rows can be drawn.
        size: side of the square pictures, in pixels, at least 32.
        seed: another seed is another data set.

    Returns:
        CompBench's columns, with PIL images: `input_image` and `edited_image` RGB, `mask` "L" with 255 = edit.
        `caption` names what the edit is about: the new objects where there are any, else the removed ones; two are
        joined by `|`.
    """
    photos = [photo for photo in PHOTOS if photo.split == split]
    if not photos:
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    if size < 32:
        raise ValueError(f"size: got {size}, expected at least 32 pixels")
    rng = random.Random(f"compbench-mini-1/{split}/{size}/{seed}/{index}")
    task = TASKS[index % len(TASKS)]
    photo = rng.choice(photos)
    background = _draw_background(rng, photo, size)
    implicit = task == "implicit_reasoning"
    pair = rng.choice(pairings(split, implicit))
    others = [o for o in OBJECTS if o not in pair and (not implicit or o.kind not in (None, pair[0].kind))]
    return compose(rng, task, photo, background, [*pair, *rng.sample(others, 3)], seed, index)


def compbench_mini(
    split: str = "train", num_samples: int = 512, size: int = 64, seed: int = 0, tasks: Sequence[str] = TASKS
) -> Dataset:
    """CompBench-mini as a `datasets.Dataset` with CompBench's columns.

    Args:
        split: `"train"`, or `"test"` on held-out photographs.
        num_samples: number of rows.
        size: side of the square pictures, in pixels.
        seed: another seed is another data set.
        tasks: take turns; one that is named twice comes twice as often.

    Raises:
        ValueError: a task that is none, or none at all.
    """
    if not tasks or not set(tasks) <= set(TASKS):
        raise ValueError(f"tasks: got {list(tasks)}, expected some of {', '.join(TASKS)}")
    # Rows of a task are every sixth, whatever turn it has.
    turns = [(TASKS.index(task), tasks[:i].count(task), tasks.count(task)) for i, task in enumerate(tasks)]
    indices = [
        first + len(TASKS) * (cycle * times + before)
        for cycle in range(-(-num_samples // len(tasks)))
        for first, before, times in turns
    ]
    rows = [render(split, index, size, seed) for index in indices[:num_samples]]
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    return Dataset.from_dict(columns, features=FEATURES)
