"""CompBench-mini: the embedded data set, drawn on the user's machine from a seed.

Rendered objects are pasted on real photographs, so every edit has an exact target and an exact mask. The columns are
CompBench's, verbatim (arXiv 2505.12200). The same `(split, size, seed, index)` gives the same pixels everywhere: assets
are lossless, and only `random.Random` and Pillow's integer arithmetic take part.

The held-out split uses photographs that the training split never sees; both share the objects, because a reward that
knows 24 objects can only judge those.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageChops, ImageEnhance, ImageFilter

ASSETS = Path(__file__).parent / "assets"
TASKS = ("add", "remove", "replace")
PLACES = ("top left corner", "top right corner", "bottom left corner", "bottom right corner")
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


@dataclass(frozen=True)
class Thing:
    name: str
    code_point: str

    @property
    def phrase(self) -> str:
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


PHOTOS = tuple(
    Photo(name, split)
    for split, names in {
        "train": "astronaut camera chelsea rocket flower grass hubble_deep_field retina",
        "test": "coffee china brick",
    }.items()
    for name in names.split()
)

OBJECTS = tuple(
    Thing(name, code_point)
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
        "umbrella": "2602-fe0f",
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


def _draw_background(rng: random.Random, photo: Photo, size: int) -> PILImage.Image:
    picture = load_photo(photo.name)
    side = rng.randint(min(picture.size) // 2, min(picture.size))
    left, top = (rng.randint(0, limit - side) for limit in picture.size)
    scene = picture.resize((size, size), PILImage.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        scene = scene.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
    scene = ImageEnhance.Brightness(scene).enhance(rng.uniform(0.75, 1.25))
    return ImageEnhance.Color(scene).enhance(rng.uniform(0.6, 1.4))


def _place(rng: random.Random, thing: Thing, place: int, size: int) -> Placed:
    picture = load_object(thing.name, rng.randint(round(0.36 * size), round(0.44 * size)))
    cell = size // 2
    row, column = divmod(place, 2)
    free = [cell - side for side in picture.size]
    corner = (column * cell + rng.randint(0, free[0]), row * cell + rng.randint(0, free[1]))
    return Placed(thing, place, picture, corner)


def render(split: str, index: int, size: int = 64, seed: int = 0) -> dict[str, Any]:
    """One row, drawn from `(split, size, seed, index)` alone.

    Args:
        split: `"train"` or `"test"`; the two share no photograph.
        index: the row's number, ≥ 0; any number of rows can be drawn.
        size: side of the square pictures, in pixels, at least 32.
        seed: another seed is another data set.

    Returns:
        CompBench's columns, with PIL images: `input_image` and `edited_image` RGB, `mask` "L" with 255 = edit.
        `caption` names the object that the edit is about: the new one for *add* and *replace*, the removed one for
        *remove*.
    """
    photos = [photo for photo in PHOTOS if photo.split == split]
    if not photos:
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    if size < 32:
        raise ValueError(f"size: got {size}, expected at least 32 pixels")
    rng = random.Random(f"compbench-mini/{split}/{size}/{seed}/{index}")
    task = TASKS[index % len(TASKS)]
    photo = rng.choice(photos)
    background = _draw_background(rng, photo, size)
    things = rng.sample(OBJECTS, 4)
    places = rng.sample(range(4), 3)
    for thing, place in zip(things[2:], places[1 : 1 + rng.randint(0, 2)], strict=False):
        _place(rng, thing, place, size).paste(background)

    old, new = (_place(rng, thing, places[0], size) for thing in things[:2])
    source, target = background.copy(), background.copy()
    if task != "add":
        old.paste(source)
    if task != "remove":
        new.paste(target)
    if task == "add":
        mask, caption = new.mask(size), new.thing.phrase
        instruction = f"add {caption} in the {PLACES[new.place]}"
    elif task == "remove":
        mask, caption = old.mask(size), old.thing.phrase
        instruction = f"remove the {old.thing.name}"
    else:
        mask, caption = ImageChops.lighter(old.mask(size), new.mask(size)), new.thing.phrase
        instruction = f"replace the {old.thing.name} with {caption}"
    return {
        "task": task,
        "image_path": f"{photo.video_id}/{seed}/{index:05d}.png",
        "input_image": source,
        "edited_image": target,
        "instruction": instruction,
        "caption": caption,
        "mask": mask,
    }


def compbench_mini(split: str = "train", num_samples: int = 512, size: int = 64, seed: int = 0) -> Dataset:
    """CompBench-mini as a `datasets.Dataset` with CompBench's columns.

    Args:
        split: `"train"`, or `"test"` on held-out photographs.
        num_samples: number of rows; tasks take turns (add, remove, replace).
        size: side of the square pictures, in pixels.
        seed: another seed is another data set.
    """
    rows = [render(split, index, size, seed) for index in range(num_samples)]
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    return Dataset.from_dict(columns, features=FEATURES)
