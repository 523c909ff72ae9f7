import csv
import hashlib
import io
import random
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from rcgrpo.cli.data_tux import run
from rcgrpo.cli.parsing import UsageError
from rcgrpo.data import stamps as pictures
from rcgrpo.data import tux
from rcgrpo.data.scenes import FEATURES
from rcgrpo.data.stamps import find_sources, read_photographs, read_stamps
from rcgrpo.data.tux import build_tux, render, split
from stamp_files import save_stamp

NAMES = [
    *("owl", "crow", "duck", "rose", "iris", "pear", "plum", "saw", "lamp", "drum"),
    *("bus", "car", "kite", "bell", "boat", "vase", "cup", "hat", "key", "ball"),
]
FOLDERS = {"owl": "animals/birds", "crow": "animals/birds", "rose": "plants/flowers", "iris": "plants/flowers"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    stamps, photographs = tmp_path_factory.mktemp("stamps"), tmp_path_factory.mktemp("photographs")
    for seed, name in enumerate(NAMES):
        article = "An" if name[0] in "aeiou" else "A"
        save_stamp(stamps / FOLDERS.get(name, "things") / f"{name}.png", seed, caption=f"{article} {name}.")
    save_stamp(stamps / "things" / "cartoon" / "cat.png", 99, caption="A cat.")
    for seed in range(5):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(photographs / f"place{seed}.jpg")
    return stamps, photographs


@pytest.fixture(scope="module")
def pack(folders, tmp_path_factory):
    return build_tux(tmp_path_factory.mktemp("pack") / "edits", 64, 24, 12, 1, *folders)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assets(folder):
    return list(csv.DictReader(io.StringIO((folder / "assets.csv").read_text(encoding="utf-8"))))


def test_a_fifth_is_held_out_whatever_the_order():
    names = [f"thing {number}" for number in range(40)]
    parts = split(names)
    assert len(parts["test"]) == 8 and sorted(parts["train"] + parts["test"]) == sorted(names)
    assert split(random.Random(0).sample(names, 40)) == parts
    assert {part: len(ids) for part, ids in split("ab").items()} == {"train": 1, "test": 1}
    with pytest.raises(ValueError, match=r"got 1 pictures \(a\), expected at least 2"):
        split(["a"])


def test_the_pack_opens_with_compbenchs_columns(pack, tmp_path):
    dataset = load_dataset(str(pack), cache_dir=str(tmp_path))
    assert {name: len(rows) for name, rows in dataset.items()} == {"train": 24, "validation": 12, "test": 12}
    for rows in dataset.values():
        assert rows.features == FEATURES
        assert rows[0]["mask"].mode == "L" and rows[0]["input_image"].size == (64, 64)


def test_held_out_edits_show_other_photographs_and_objects(pack, folders, tmp_path):
    dataset = load_dataset(str(pack), cache_dir=str(tmp_path))
    listed = assets(pack)
    phrases = {part: {a["phrase"] for a in listed if a["split"] == part} - {""} for part in ("train", "test")}
    photographs = {
        part: [a["file"] for a in listed if (a["kind"], a["split"]) == ("photograph", part)] for part in phrases
    }
    assert len(photographs["train"]) == 4 and len(photographs["test"]) == 1
    assert len(phrases["train"]) == 16 and len(phrases["test"]) == 4
    for name, (photo_part, object_part) in {
        "train": ("train", "train"),
        "validation": ("test", "train"),
        "test": ("test", "test"),
    }.items():
        ids = {hashlib.sha256(photo.encode()).hexdigest()[:8] for photo in photographs[photo_part]}
        assert {path[:8] for path in dataset[name]["image_path"]} <= ids
        assert {c for caption in dataset[name]["caption"] for c in caption.split("|")} <= phrases[object_part]
    (left_out,) = [a for a in listed if a["left out because"]]
    assert (left_out["file"], left_out["split"]) == ("things/cartoon/cat", "")


def test_every_changed_pixel_lies_inside_the_mask_and_the_instruction_says_what_was_done(folders):
    photographs, (stamps, _) = read_photographs(folders[1]), read_stamps(folders[0])
    names = {stamp.name for stamp in stamps}
    seen = set()
    for index in range(48):
        row = render(photographs, stamps, "train", index, 64, 0)
        source, target, mask = (np.asarray(row[c]) for c in ("input_image", "edited_image", "mask"))
        changed = (source != target).any(-1)
        assert set(np.unique(mask)) == {0, 255} and not changed[mask == 0].any()
        assert changed[mask > 0].mean() > 0.25
        captions = [caption.split(" ", 1)[1] for caption in row["caption"].split("|")]
        assert set(captions) <= names and len(captions) == 1 + ("multi" in row["task"])
        words = row["instruction"].split()
        if row["task"] == "implicit_reasoning":
            assert row["instruction"] in ("remove the bird", "remove the flower")
        else:
            assert words[0] == row["task"].split("_")[-1] and set(captions) <= set(words)
        seen.add(row["task"])
    assert len(seen) == 6


def test_the_kind_names_one_object_only(folders):
    stamps = read_stamps(folders[0])[0]
    for seed in range(20):
        cast = tux._cast(random.Random(seed), stamps, "implicit_reasoning")
        assert sorted(stamp.kind for stamp in cast) == ["bird", "flower"]


def test_no_two_objects_of_a_scene_share_a_last_word(tmp_path):
    for seed, name in enumerate(["pear", "red apple", "green apple", "cup", "tea cup", "saw"]):
        save_stamp(tmp_path / f"{seed}.png", seed, caption=f"A {name}.")
    stamps = read_stamps(tmp_path)[0]
    for seed in range(20):
        cast = tux._cast(random.Random(seed), stamps, "remove")
        assert sorted(stamp.name.split()[-1] for stamp in cast) == ["apple", "cup", "pear", "saw"]


def test_the_same_seed_builds_the_same_bytes(pack, folders, tmp_path):
    again = build_tux(tmp_path / "again", 64, 24, 12, 1, *folders)
    assert files(again) == files(pack)
    other = build_tux(tmp_path / "other", 64, 24, 12, 2, *folders)
    assert files(other)["data/test-00000-of-00001.parquet"] != files(pack)["data/test-00000-of-00001.parquet"]
    assert files(other)["assets.csv"] == files(pack)["assets.csv"]


def test_many_rows_make_several_files(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(tux, "ROWS_IN_A_FILE", 5)
    folder = build_tux(tmp_path / "edits", 64, 12, 1, 0, *folders)
    assert [name for name in files(folder) if "train" in name] == [
        f"data/train-0000{number}-of-00003.parquet" for number in range(3)
    ]
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert [path.split(".")[0][-5:] for path in rows["image_path"]] == [f"{number:05d}" for number in range(12)]


def test_a_failure_leaves_nothing_behind(folders, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tux, "_write_assets", fail)
    with pytest.raises(OSError, match="disk full"):
        build_tux(tmp_path / "out" / "edits", 64, 6, 1, 0, *folders)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_card_names_licence_and_origin(pack, tmp_path):
    card = (pack / "README.md").read_text(encoding="utf-8")
    assert "license: other" in card and "Fill it in before" in card
    sources = pictures.Sources(Path("s"), Path("p"), "Debian's tuxpaint-stamps-default_1", "gpl-2.0")
    card = tux._card(sources, 64, 2, 1, 0, 3, [], {})
    assert "license: gpl-2.0" in card and "tuxpaint-stamps-default_1" in card and "Bill Kendrick" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 100}, "size: got 100, expected one of 64, 128, 256"),
        ({"num_train": 0}, "num_train: got 0"),
        ({"num_test": -1}, "num_test: got -1"),
    ],
)
def test_wrong_numbers_are_refused(folders, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_tux(tmp_path / "x", stamps_folder=folders[0], backgrounds_folder=folders[1], **arguments)


def test_a_folder_that_is_there_is_not_touched(folders, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        build_tux(tmp_path, 64, 6, 1, 0, *folders)
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_too_few_objects_are_refused(folders, tmp_path):
    for seed in range(9):
        save_stamp(tmp_path / "stamps" / f"{seed}.png", seed, caption="An owl.")
    with pytest.raises(ValueError, match="got 7 objects in this split, of which a scene can hold 1"):
        build_tux(tmp_path / "x", 64, 6, 1, 0, tmp_path / "stamps", folders[1])
    assert not (tmp_path / "x").exists()


def test_folders_without_pictures_are_named(folders, tmp_path):
    with pytest.raises(ValueError, match=r"stamps_folder: got .* with 0 PNG cut-outs with captions \(0 are left out\)"):
        build_tux(tmp_path / "x", 64, 6, 1, 0, tmp_path, folders[1])
    with pytest.raises(ValueError, match=r"backgrounds_folder: got .* with 0 JPEG photographs, expected at least 2"):
        build_tux(tmp_path / "x", 64, 6, 1, 0, folders[0], tmp_path)


def test_the_command_builds_and_reports(folders, tmp_path, capsys):
    flags = ["--stamps_folder", str(folders[0]), "--backgrounds_folder", str(folders[1]), "--size", "64"]
    output = tmp_path / "edits"
    run(["--output", str(output), "--num_train", "6", "--num_test", "1", *flags])
    assert str(output) in capsys.readouterr().out and (output / "README.md").is_file()
    with pytest.raises(UsageError, match="is there already"):
        run(["--output", str(output), *flags])
    with pytest.raises(UsageError, match="nearest known one is --size"):
        run(["--sise", "64"])


def test_the_real_package_has_some_300_photographic_objects():
    try:
        sources = find_sources()
    except FileNotFoundError:
        pytest.skip("tuxpaint-stamps-default and tuxpaint-data are neither installed nor downloaded")
    photographs, (stamps, excluded) = read_photographs(sources.backgrounds), read_stamps(sources.stamps)
    assert len(photographs) >= 15 and len(stamps) >= 250
    assert not {stamp.id for stamp in stamps} & excluded.keys()
    assert set(pictures.PHRASES) <= {stamp.id for stamp in stamps}
    assert {stamp.kind for stamp in stamps} >= set(pictures.KINDS.values())
    for index in range(6):
        render(photographs, stamps, "train", index, 64, 0)
