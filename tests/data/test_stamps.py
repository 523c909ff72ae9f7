"""`data/stamps.py`: which pictures are photographs of one object, and where they come from."""

import stat

import numpy as np
import pytest
from PIL import Image

from rcgrpo.data import stamps
from rcgrpo.data.stamps import download_packages, find_sources, read_photographs, read_stamps
from stamp_files import save_stamp


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
    assert stamps._phrase("x", tmp_path / "x.txt") == phrase
    assert stamps._phrase("x", tmp_path / "missing.txt") is None
    assert stamps._phrase("household/toilet", tmp_path / "x.txt") == "a toilet"


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
    kept, excluded = read_stamps(tmp_path)
    assert [(stamp.id, stamp.phrase, stamp.name) for stamp in kept] == [("a/owl", "an owl", "owl")]
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


# Where the pictures come from -----------------------------------------------------------------------------------------


def test_sources_are_given_or_downloaded_or_installed_in_this_order(tmp_path):
    given, cache, installed = tmp_path / "given", tmp_path / "cache", tmp_path / "installed"
    for folder in (given, installed / "stamps", installed / "templates"):
        folder.mkdir(parents=True)
    sources = find_sources(installed=installed, cache=cache)
    assert (sources.stamps, sources.backgrounds) == (installed / "stamps", installed / "templates")
    assert "tuxpaint-data, as installed" in sources.origin and sources.licence == "gpl-2.0"
    for package, name in zip(stamps.PACKAGES, ("stamps", "templates"), strict=True):
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
    assert (tmp_path / "calls").read_text().split("\n") == [f"download {' '.join(stamps.PACKAGES)}", ""]
    assert sorted(p.name for p in cache.iterdir()) == [f"{package}_1:2" for package in sorted(stamps.PACKAGES)]
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
