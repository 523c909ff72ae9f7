import csv
import hashlib
import io
import random
import stat
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from rcgrpo.cli.data_tux import run
from rcgrpo.cli.parsing import UsageError
from rcgrpo.data import tux
from rcgrpo.data.scenes import FEATURES
from rcgrpo.data.tux import build_tux, download_packages, find_sources, read_photographs, read_stamps, render, split

NAMES = [
    *("owl", "crow", "duck", "rose", "iris", "pear", "plum", "saw", "lamp", "drum"),
    *("bus", "car", "kite", "bell", "boat", "vase", "cup", "hat", "key", "ball"),
]
FOLDERS = {"owl": "animals/birds", "crow": "animals/birds", "rose": "plants/flowers", "iris": "plants/flowers"}


def save_stamp(path, seed=0, size=(70, 60), caption=None, flat=False, alpha=255):
    """An ellipse full of colours on a transparent ground."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[1], : size[0]]
    inside = ((rows / size[1] - 0.5) ** 2 + (columns / size[0] - 0.5) ** 2) < 0.24
    pixels = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if flat:
        pixels[..., :3] = rng.integers(0, 256, 3)
    pixels[..., 3] = alpha * inside
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Etwas anderes.\n", encoding="utf-8")


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


@pytest.mark.parametrize(
    ("caption", "phrase"),
    [
        ("An owl.", "an owl"),
        ("A very long-eared owl!", "a very long-eared owl"),
        ("An albino peahen (a female peafowl, or peacock).", "an albino peahen"),
        ("A spiny lobster, from the Hawaiian islands.", "a spiny lobster"),
        ("A wheelie bin! Give me your trash!", "a wheelie bin"),
        ("A “Fuji” apple.", "a Fuji apple"),
        ("A ginger 'root'.", "a ginger root"),
        ("A plumber’s wrench.", "a plumber's wrench"),
        ("Eat your bread!", None),
        ("Mars—the red planet.", None),
        ("A candy cane is a traditional Christmas treat in the United States.", None),
        ("A ", None),
        ("", None),
    ],
)
def test_a_caption_becomes_a_name_or_nothing(tmp_path, caption, phrase):
    (tmp_path / "x.txt").write_text(f"{caption}\n", encoding="utf-8")
    assert tux._phrase("x", tmp_path / "x.txt") == phrase
    assert tux._phrase("x", tmp_path / "missing.txt") is None
    assert tux._phrase("household/toilet", tmp_path / "x.txt") == "a toilet"


def test_stamps_are_kept_or_left_out_with_a_reason(tmp_path):
    save_stamp(tmp_path / "a" / "owl.png", 1, caption="An owl.")
    (tmp_path / "a" / "twin.png").write_bytes((tmp_path / "a" / "owl.png").read_bytes())
    (tmp_path / "a" / "twin.txt").write_text("An owl.")
    save_stamp(tmp_path / "a" / "owl_mirror.png", 1)
    save_stamp(tmp_path / "a" / "nameless.png", 2)
    save_stamp(tmp_path / "a" / "small.png", 3, (30, 20), "A pea.")
    save_stamp(tmp_path / "a" / "flat.png", 4, caption="A flag.", flat=True)
    save_stamp(tmp_path / "a" / "glass.png", 5, caption="A glass.", alpha=100)
    save_stamp(tmp_path / "a" / "nothing.png", 6, caption="A ghost.", alpha=0)
    save_stamp(tmp_path / "symbols" / "deep" / "star.png", 7, caption="A star.")
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "a" / "broken.txt").write_text("A wreck.")
    stamps, excluded = read_stamps(tmp_path)
    assert [(stamp.id, stamp.phrase, stamp.name) for stamp in stamps] == [("a/owl", "an owl", "owl")]
    assert excluded.pop("a/broken").startswith("no picture that Pillow can read")
    assert excluded == {
        "a/twin": "same picture as a/owl",
        "a/owl_mirror": "mirrored twin",
        "a/nameless": "caption names no object",
        "a/small": "only 29×19 pixels",
        "a/flat": "0.0 bits of colour, a drawing",
        "a/glass": "opaque on 0% of its box",
        "a/nothing": "only 1×1 pixels",
        "symbols/deep/star": "folder symbols",
    }


def test_a_cut_out_is_cropped_and_loses_its_halo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 120, 4), dtype=np.uint8)
    pixels[..., 3] = 9  # nobody sees this
    pixels[20:80, 30:90, 3] = 255
    pixels[40:50, 40:50, 3] = 9
    Image.fromarray(pixels).save(tmp_path / "owl.png")
    (tmp_path / "owl.txt").write_text("An owl.")
    picture = read_stamps(tmp_path)[0][0].picture
    alpha = np.asarray(picture.getchannel("A"))
    assert picture.size == (60, 60) and set(np.unique(alpha)) == {0, 255} and (alpha == 0).sum() == 100


def test_photographs_lose_black_bars_and_what_no_size_needs(tmp_path):
    wide = Image.new("RGB", (1200, 900))
    wide.paste((90, 120, 150), (0, 100, 1200, 900))
    wide.save(tmp_path / "wide.jpg", quality=95)
    Image.new("RGB", (80, 60), (9, 200, 9)).save(tmp_path / "small.jpeg")
    sizes = {name: picture.size for name, picture in read_photographs(tmp_path).items()}
    assert sizes["small"] == (80, 60)
    assert sizes["wide"][1] == 512 and sizes["wide"][0] / 512 == pytest.approx(1200 / 800, rel=0.02)


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
    sources = tux.Sources(Path("s"), Path("p"), "Debian's tuxpaint-stamps-default_1", "gpl-2.0")
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


# Where the pictures come from -----------------------------------------------------------------------------------------


def test_sources_are_given_or_downloaded_or_installed_in_this_order(tmp_path):
    given, cache, installed = tmp_path / "given", tmp_path / "cache", tmp_path / "installed"
    for folder in (given, installed / "stamps", installed / "templates"):
        folder.mkdir(parents=True)
    sources = find_sources(installed=installed, cache=cache)
    assert (sources.stamps, sources.backgrounds) == (installed / "stamps", installed / "templates")
    assert "tuxpaint-data, as installed" in sources.origin and sources.licence == "gpl-2.0"
    for package, name in zip(tux.PACKAGES, ("stamps", "templates"), strict=True):
        (cache / f"{package}_7" / "usr" / "share" / "tuxpaint" / name).mkdir(parents=True)
    sources = find_sources(installed=installed, cache=cache)
    assert cache in sources.stamps.parents and "tuxpaint-stamps-default_7" in sources.origin
    sources = find_sources(given, given, installed=installed, cache=cache)
    assert (sources.stamps, sources.backgrounds, sources.licence) == (given, given, "other")


def test_without_pictures_the_error_says_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--download.*apt-get install tuxpaint-stamps-default.*dpkg-deb -x"):
        find_sources(installed=tmp_path, cache=tmp_path)


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """A Debian of two shell scripts: `apt-get download` makes an archive, `dpkg-deb -x` unpacks it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "apt-get": 'echo "$*" >> "$CALLS"; shift; for p in "$@"; do echo > "${p}_1%3a2_all.deb"; done',
        "dpkg-deb": 'mkdir -p "$3/usr/share/tuxpaint/stamps" "$3/usr/share/tuxpaint/templates"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return programs


def test_packages_are_downloaded_once(debian, tmp_path):
    cache = tmp_path / "cache"
    for _ in range(2):
        sources = find_sources(download=True, cache=cache)
    assert (tmp_path / "calls").read_text().split("\n") == [f"download {' '.join(tux.PACKAGES)}", ""]
    assert sorted(p.name for p in cache.iterdir()) == [f"{package}_1:2" for package in sorted(tux.PACKAGES)]
    assert sources.stamps.is_dir() and "tuxpaint-data_1:2" in sources.origin


def test_a_failed_download_says_why_and_leaves_nothing(debian, tmp_path):
    (debian / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    with pytest.raises(RuntimeError, match=r"`apt-get download .*failed with 100: E: Unable to locate package"):
        download_packages(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_machine_without_apt_is_told_what_to_do(debian, tmp_path, monkeypatch):
    (debian / "apt-get").chmod(stat.S_IRUSR)
    monkeypatch.setenv("PATH", str(debian))
    with pytest.raises(FileNotFoundError, match="apt-get not found, expected a Debian-like system"):
        download_packages(tmp_path / "cache")


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
    assert set(tux.PHRASES) <= {stamp.id for stamp in stamps}
    assert {stamp.kind for stamp in stamps} >= set(tux.KINDS.values())
    for index in range(6):
        render(photographs, stamps, "train", index, 64, 0)
