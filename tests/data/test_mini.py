import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from rcgrpo.data import compbench_mini
from rcgrpo.data.mini import ASSETS, FEATURES, OBJECTS, PHOTOS, load_object, render

COLUMNS = ["task", "image_path", "input_image", "edited_image", "instruction", "caption", "mask"]
NAMES = {thing.name for thing in OBJECTS}


def digest(rows):
    parts = hashlib.sha256()
    for row in rows:
        for column in ("input_image", "edited_image", "mask"):
            parts.update(np.asarray(row[column]).tobytes())
        parts.update("|".join(row[c] for c in ("task", "image_path", "instruction", "caption")).encode())
    return parts.hexdigest()


@pytest.mark.parametrize(
    ("split", "size", "seed", "expected"),
    [
        ("train", 64, 0, "a301f5caedd04e3922fed8efe9b712065e1f223724e1bc5fd0f6fe7c25b41701"),
        ("test", 64, 0, "c039d42e5ba73c9c8c7e61931d59543be5b140f57e72deb2582612d9eafd3004"),
        ("train", 96, 7, "aef3ec4f5dd7950dd262ba41005db57ba772cdc9626354aa20b979ab98a38fdc"),
    ],
)
def test_the_same_seed_draws_the_same_bytes_everywhere(split, size, seed, expected):
    assert digest([render(split, index, size, seed) for index in range(6)]) == expected


def test_a_row_depends_on_everything_in_its_key():
    keys = [("train", 3, 64, 0), ("test", 3, 64, 0), ("train", 6, 64, 0), ("train", 3, 64, 1), ("train", 3, 65, 0)]
    assert len({digest([render(*key)]) for key in keys}) == len(keys)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [32, 64, 100])
def test_every_changed_pixel_lies_inside_the_mask(split, size):
    for index in range(24):
        row = render(split, index, size)
        source, target, mask = (np.asarray(row[c]) for c in ("input_image", "edited_image", "mask"))
        assert source.shape == target.shape == (size, size, 3) and mask.shape == (size, size)
        changed = (source != target).any(-1)
        assert set(np.unique(mask)) == {0, 255}
        assert changed.any() and not changed[mask == 0].any()
        # an object of 36 to 44 % of the side, and room left to keep
        assert 0.02 < (mask > 0).mean() < 0.4


def test_instructions_say_what_was_done():
    for index in range(60):
        row = render("train", index)
        article, _, name = row["caption"].partition(" ")
        assert name in NAMES and article == ("an" if name[0] in "aeiou" else "a")
        if row["task"] == "add":
            assert row["instruction"].startswith(f"add {row['caption']} in the ")
            vertical, horizontal, corner = row["instruction"].split(" in the ")[1].split()
            rows, columns = np.nonzero(np.asarray(row["mask"]))
            assert corner == "corner"
            assert (rows.mean() < 32) == (vertical == "top") and (columns.mean() < 32) == (horizontal == "left")
        elif row["task"] == "remove":
            assert row["instruction"] == f"remove the {name}"
        else:
            old = row["instruction"].removeprefix("replace the ").removesuffix(f" with {row['caption']}")
            assert old in NAMES - {name}


def test_removing_gives_back_the_background_of_adding():
    """The scene without the edit's object is the target of *remove*; the object shows in the source."""
    row = render("train", 1)
    assert row["task"] == "remove"
    inside = np.asarray(row["mask"]) > 0
    difference = np.abs(np.asarray(row["input_image"], int) - np.asarray(row["edited_image"], int)).max(-1)
    assert (difference[inside] > 8).mean() > 0.3


def test_columns_and_features_are_compbenchs():
    dataset = compbench_mini("test", num_samples=6, size=48, seed=3)
    assert dataset.column_names == COLUMNS == list(FEATURES)
    assert dataset.features == FEATURES
    assert dataset["task"][:] == ["add", "remove", "replace"] * 2
    for index, row in enumerate(dataset):
        drawn = render("test", index, 48, 3)
        assert row["mask"].mode == "L" and row["input_image"].mode == "RGB"
        assert digest([row]) == digest([drawn])
        video, middle, number = row["image_path"].split("/")
        assert len(video) == 8 and (middle, number) == ("3", f"{index:05d}.png")


def test_stored_pictures_are_lossless():
    from datasets import Image as ImageFeature

    raw = compbench_mini(num_samples=1).cast_column("input_image", ImageFeature(decode=False))[0]["input_image"]
    assert Image.open(io.BytesIO(raw["bytes"])).format == "PNG"


def test_the_held_out_split_sees_other_photographs():
    photos = {split: {photo.video_id for photo in PHOTOS if photo.split == split} for split in ("train", "test")}
    assert photos["train"] and photos["test"] and not photos["train"] & photos["test"]
    for split, expected in photos.items():
        assert {render(split, index)["image_path"].split("/")[0] for index in range(60)} == expected


def test_there_are_24_objects_each_with_its_picture():
    assert len(OBJECTS) == len(NAMES) == len({thing.code_point for thing in OBJECTS}) == 24
    assert len(list((ASSETS / "objects").glob("*.png"))) == 24
    for name in NAMES:
        picture = load_object(name, 28)
        assert max(picture.size) == 28 and picture.mode == "RGBA"
        assert picture.getchannel("A").getextrema()[1] > 200


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"split": "val"}, "split: got 'val'"), ({"size": 31}, "size: got 31")]
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        render(**{"split": "train", "index": 0, **kwargs})
