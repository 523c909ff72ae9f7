import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from rcgrpo.data import compbench_mini, scenes
from rcgrpo.data.mini import ASSETS, KINDS, OBJECTS, PHOTOS, load_object, pairings, render
from rcgrpo.data.scenes import FEATURES, TASKS
from rcgrpo.rewards.region_scorer import split_mask

COLUMNS = ["task", "image_path", "input_image", "edited_image", "instruction", "caption", "mask"]
PATHS = {
    **dict.fromkeys(["add", "remove", "replace"], r"[0-9a-f]{{8}}/{seed}/{index:05d}\.png"),
    **dict.fromkeys(["multi_object_add", "multi_object_remove"], r"[0-9a-f]{{8}}_{index:05d}\.png"),
    "implicit_reasoning": r"[0-9a-f]{{8}}_{seed}_{index:05d}\.png",
}
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
        ("train", 64, 0, "250fa56df639226579eef480b5d46487574510bac2f451b366bcebb9afaf3fcc"),
        ("test", 64, 0, "6f214057c2c6147ddf7890f56eb9609e5870b3ce423e3fc21b94db179c4e7a4a"),
        ("train", 96, 7, "23d91f5d15a1f19089a4277c253caaa5d5b5a55603d808628abbe08f3f86e6c8"),
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
        # one or two objects of 34 to 42 % of the side, and room left to keep
        assert 0.02 < (mask > 0).mean() < 0.5


@pytest.mark.parametrize("size", [32, 64, 100])
def test_two_objects_have_two_masks_that_do_not_touch(size):
    for index in [*range(3, 60, 6), *range(4, 60, 6)]:
        row = render("test", index, size)
        assert row["task"].startswith("multi_object") and row["caption"].count("|") == 1
        assert len(split_mask(row["mask"], 2)) == 2


def split_place(text):
    """`"an apple in the top left"` as caption, vertical and horizontal."""
    caption, _, place = text.partition(" in the ")
    return caption, *place.split()


def test_instructions_say_what_was_done():
    for index in range(120):
        row = render("train", index)
        task, instruction, captions = row["task"], row["instruction"], row["caption"].split("|")
        names = [caption.partition(" ")[2] for caption in captions]
        assert all(name in NAMES for name in names) and len(names) == 1 + ("multi" in task)
        assert captions == [("an " if name[0] in "aeiou" else "a ") + name for name in names]
        if task == "replace":
            old = instruction.removeprefix("replace the ").removesuffix(f" with {captions[0]}")
            assert old in NAMES - set(names)
        elif task == "implicit_reasoning":
            assert names[0] in KINDS[instruction.removeprefix("remove the ")]
        elif task.endswith("remove"):
            assert instruction == "remove " + " and ".join(f"the {name}" for name in names)
        else:
            places = [split_place(part) for part in instruction.removeprefix("add ").split(" and ")]
            assert [caption for caption, *_ in places] == captions
            centres = set()
            for part in split_mask(row["mask"], len(captions)):
                rows, columns = np.nonzero(np.asarray(part))
                centres.add(("top" if rows.mean() < 32 else "bottom", "left" if columns.mean() < 32 else "right"))
            assert centres == {tuple(place) for _, *place in places}


def test_a_kind_names_one_object_only(monkeypatch):
    """In *implicit_reasoning* no bystander may be of the kind that is to go, nor of none."""
    shown = []
    paste = scenes.Placed.paste

    def note(placed, scene):
        shown.append(placed.thing)
        paste(placed, scene)

    monkeypatch.setattr(scenes.Placed, "paste", note)
    for index in range(5, 300, 6):
        shown.clear()
        kind = render("train", index)["instruction"].removeprefix("remove the ")
        assert len(shown) >= 2 and None not in {thing.kind for thing in shown}
        assert [thing.kind for thing in shown].count(kind) == 1


@pytest.mark.parametrize("implicit", [False, True])
def test_no_pair_of_objects_is_in_both_splits(implicit):
    train, test = ({frozenset(pair) for pair in pairings(split, implicit)} for split in ("train", "test"))
    assert not train & test
    assert {name for pair in train for name in pair} == {name for pair in test for name in pair}
    if not implicit:
        assert len(train | test) == 24 * 23 // 2 and 0.2 < len(test) / len(train | test) < 0.35


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_row_is_about_a_pair_of_its_split(split, monkeypatch):
    placed = []
    original = scenes.place_object

    def note(rng, thing, *rest):
        placed.append(thing)
        return original(rng, thing, *rest)

    monkeypatch.setattr(scenes, "place_object", note)
    for index in range(60):
        placed.clear()
        render(split, index)
        assert tuple(placed[:2]) in pairings(split)  # the edit's objects are placed first, then the first bystander
        assert 2 <= len(placed) <= 5 and len(set(placed)) == len(placed)


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
    assert dataset["task"][:] == list(TASKS)
    for index, row in enumerate(dataset):
        drawn = render("test", index, 48, 3)
        assert row["mask"].mode == "L" and row["input_image"].mode == "RGB"
        assert digest([row]) == digest([drawn])
        assert re.fullmatch(PATHS[row["task"]].format(seed=3, index=index), row["image_path"])


def test_stored_pictures_are_lossless():
    from datasets import Image as ImageFeature

    raw = compbench_mini(num_samples=1).cast_column("input_image", ImageFeature(decode=False))[0]["input_image"]
    assert Image.open(io.BytesIO(raw["bytes"])).format == "PNG"


def test_the_held_out_split_sees_other_photographs():
    photos = {split: {photo.video_id for photo in PHOTOS if photo.split == split} for split in ("train", "test")}
    assert photos["train"] and photos["test"] and not photos["train"] & photos["test"]
    for split, expected in photos.items():
        assert {render(split, index)["image_path"][:8] for index in range(60)} == expected


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


def test_tasks_take_turns_as_often_as_they_are_named():
    """And each turn is another row of the task, the same one as among all tasks."""
    tasks = ["replace", "add", "replace"]
    rows = compbench_mini("train", 7, tasks=tasks)
    assert rows["task"] == ["replace", "add", "replace"] * 2 + ["replace"]
    plain = [row for row in compbench_mini("train", 6 * 5) if row["task"] == "replace"]
    drawn = [row["image_path"] for row in rows if row["task"] == "replace"]
    assert drawn == [row["image_path"] for row in plain]
    assert compbench_mini("test", 8, tasks=TASKS)["image_path"] == compbench_mini("test", 8)["image_path"]
    for wrong in ([], ["paint"]):
        with pytest.raises(ValueError, match=r"tasks: got .*expected some of add, remove"):
            compbench_mini("train", 6, tasks=wrong)
