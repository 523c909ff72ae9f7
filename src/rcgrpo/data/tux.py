"""A second pack of edits, with photographic objects, built on the user's machine from Tux Paint's pictures.

Debian's packages `tuxpaint-stamps-default` and `tuxpaint-data` hold some 300 photographs of single objects with
transparency and English captions, and 19 photographs of places. They are GPL-2, so they are never part of this package,
and what is built from them is GPL-2 too. Columns and tasks are those of CompBench-mini; objects and photographs are
split, so that held-out edits show neither (`test`), or familiar objects in new places (`validation`).

Which stamps are photographs is decided by `EXCLUDED_FOLDERS` and by how many colours a picture needs; what is left out
is listed with its reason beside the pack. Gotcha: the photographs are JPEG, and decoders may differ by a grey level, so
the same seed gives the same bytes where Pillow brings the same decoder.
"""

import csv
import hashlib
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage
from tqdm.auto import tqdm

from .. import __version__
from .scenes import FEATURES, MASK_GROWTH, TASKS, Photo, compose, draw_square

PACKAGES = ("tuxpaint-stamps-default", "tuxpaint-data")
SIZES = (64, 128, 256)
ROWS_IN_A_FILE = 500
HELD_OUT = 1 / 5

EXCLUDED_FOLDERS = frozenset(
    [
        *("cartoon", "symbols", "roadsigns", "flags", "body_parts", "clothes"),
        *("easter", "halloween", "hanukkah", "newyears", "naturalforces", "planets"),
    ]
)
"""Folders that hold drawings, signs, letters, or nothing that stands in a place."""
MIN_SIDE = 48
"""Pixels of the longer side; the largest objects of a 256-pixel picture are enlarged up to 2.2 times."""
MIN_COVER = 0.1
"""Share of its own bounding box that an object must cover."""
MIN_COLOUR_BITS = 4
"""Entropy of the colours of the opaque pixels, at 5 bits a channel. Among the stamps of the other folders no drawing
reaches it, and of the photographs only three pale or dark ones do not (seen by eye, version 2022.06.04)."""
FAINT = 16
"""Alpha below this counts as transparent: halos that nobody sees would widen the mask."""

PHRASES = {
    "animals/fish/bluegroper": "a blue groper",
    "animals/fish/lionfish": "a lionfish",
    "animals/insects/hoverfly": "a hoverfly",
    "animals/mammals/bears/european-bear": "a European bear",
    "animals/mammals/bears/toys/edward_bear": "a teddy bear",
    "animals/mammals/bovines/gnu-baby": "a baby gnu",
    "animals/mammals/bovines/gnu-baby-stand": "a baby gnu",
    "animals/mammals/hippopotamus": "a hippopotamus",
    "food/vegetables/broccoli": "a head of broccoli",
    "food/vegetables/corn": "an ear of corn",
    "food/vegetables/tomato": "a ripe red tomato",
    "household/toilet": "a toilet",
    "household/tools/measuring_tape": "a measuring tape",
    "medical/stethoscope": "a stethoscope",
    "people/toys/grannysmith": "a rag doll",
    "plants/flowers/adeenia": "a desert rose",
    "plants/flowers/anthoorium": "an anthurium",
    "plants/flowers/bolsom": "a balsam flower",
    "plants/flowers/chemparathi": "a hibiscus flower",
    "plants/flowers/plastic/chuvanna_plastic_poo": "a red plastic flower",
    "plants/trees/holly_leaves": "a sprig of holly",
    "plants/trees/rambutan": "a rambutan",
    "seasonal/christmas/Candy_cane_photo_1": "a candy cane",
    "seasonal/christmas/Candy_cane_photo_2": "a candy cane",
    "seasonal/christmas/Christmas_pudding": "a Christmas pudding",
    "seasonal/christmas/German_Christmas_toy": "a wooden toy",
    "seasonal/christmas/Mince_Pie": "a mince pie",
    "seasonal/christmas/Roast_turkey": "a roast turkey",
    "space/apollo_lander": "a lunar lander",
    "space/voyager2": "a space probe",
    "sports/australian_rules_football": "an Australian football",
}
"""Names for stamps whose caption is a remark instead."""

KINDS = {
    "animals/birds": "bird",
    "food/fruit": "fruit",
    "plants/flowers": "flower",
    "hobbies/music": "musical instrument",
    "vehicles/auto": "vehicle",
    "vehicles/emergency": "vehicle",
    "vehicles/masstransit": "vehicle",
    "vehicles/ship": "vehicle",
}
"""Folders whose every object is plainly of one kind, for *implicit_reasoning*."""


@dataclass(frozen=True)
class Stamp:
    """A cut-out object: `id` is its path below the stamps' folder without suffix, `phrase` its name with an article."""

    id: str
    phrase: str
    picture: PILImage.Image = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.phrase.split(" ", 1)[1]

    @property
    def kind(self) -> str | None:
        return next((kind for folder, kind in KINDS.items() if self.id.startswith(f"{folder}/")), None)

    def drawn(self, side: int) -> PILImage.Image:
        """The object as RGBA, its longer side `side` pixels."""
        scale = side / max(self.picture.size)
        return self.picture.resize([max(1, round(s * scale)) for s in self.picture.size], PILImage.Resampling.LANCZOS)


@dataclass(frozen=True)
class Sources:
    """Where the pictures are, and what the card says of them."""

    stamps: Path
    backgrounds: Path
    origin: str
    licence: str


# Finding the pictures -------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where downloaded packages are kept: `$XDG_CACHE_HOME/rcgrpo/tuxpaint`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rcgrpo" / "tuxpaint"


def find_sources(
    stamps_folder: str | os.PathLike[str] | None = None,
    backgrounds_folder: str | os.PathLike[str] | None = None,
    download: bool = False,
    installed: Path = Path("/usr/share/tuxpaint"),
    cache: Path | None = None,
) -> Sources:
    """The folders of stamps and of photographs: the given ones, else the installed packages', else downloaded ones'.

    Raises:
        FileNotFoundError: none of these, with the commands that help.
    """
    unpacked = cache_folder() if cache is None else cache
    if download and None in (stamps_folder, backgrounds_folder):
        download_packages(unpacked)
    found: dict[str, Path] = {}
    origins = []
    for given, package, name in zip(
        (stamps_folder, backgrounds_folder), PACKAGES, ("stamps", "templates"), strict=True
    ):
        downloaded = sorted(unpacked.glob(f"{package}_*/usr/share/tuxpaint/{name}"))
        if given is not None:
            found[name], origin = Path(given), f"the folder given for {name}"
        elif downloaded:
            found[name], origin = downloaded[-1], f"Debian's {downloaded[-1].relative_to(unpacked).parts[0]}"
        else:
            found[name], origin = installed / name, f"Debian's {package}, as installed"
        if not found[name].is_dir():
            raise FileNotFoundError(
                f"{found[name]}: no such folder, expected {name} of Debian's {package}. Run `rcgrpo data build-tux "
                f"--download`, or `sudo apt-get install {' '.join(PACKAGES)}`, or without root `apt-get download "
                f"{' '.join(PACKAGES)} && for f in tuxpaint-*.deb; do dpkg-deb -x $f tux; done` and then pass "
                "--stamps_folder tux/usr/share/tuxpaint/stamps --backgrounds_folder tux/usr/share/tuxpaint/templates"
            )
        origins.append(origin)
    own = stamps_folder is not None or backgrounds_folder is not None
    return Sources(found["stamps"], found["templates"], " and ".join(origins), "other" if own else "gpl-2.0")


def download_packages(folder: Path) -> None:
    """Fetch Debian's packages (169 MB) and unpack them into `folder/<package>_<version>`; no root, nothing installed.

    Packages that are there already are left alone.

    Raises:
        FileNotFoundError: a machine without `apt-get` or `dpkg-deb`.
        RuntimeError: the download failed.
    """
    wanted = [package for package in PACKAGES if not any(folder.glob(f"{package}_*"))]
    if not wanted:
        return
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise FileNotFoundError(
                f"--download: {program} not found, expected a Debian-like system; unpack the packages elsewhere and "
                "pass --stamps_folder and --backgrounds_folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as part:
        _run(["apt-get", "download", *wanted], part)
        for package in wanted:
            (archive,) = Path(part).glob(f"{package}_*.deb")
            _run(["dpkg-deb", "-x", archive.name, package], part)
            version = archive.name.split("_")[1].replace("%3a", ":")
            os.rename(Path(part) / package, folder / f"{package}_{version}")


def _run(command: Sequence[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"`{' '.join(command)}` failed with {done.returncode}: {done.stderr.strip()[-500:]}; where the list of "
            "packages is old, run `sudo apt-get update` first"
        )


# Choosing the pictures ------------------------------------------------------------------------------------------------


def read_stamps(folder: Path) -> tuple[list[Stamp], dict[str, str]]:
    """The photographic stamps below a folder, sorted by id, and why each of the others is left out.

    Every stamp is a PNG with transparency and a `.txt` of the same name beside it, its English caption in the first
    line. Pictures are kept at 256 pixels at most.
    """
    stamps: list[Stamp] = []
    excluded: dict[str, str] = {}
    seen: dict[str, str] = {}
    for path in tqdm(sorted(folder.rglob("*.png")), desc="reading stamps", leave=False, delay=2):
        id = path.relative_to(folder).with_suffix("").as_posix()
        phrase = _phrase(id, path.with_suffix(".txt"))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if closed := EXCLUDED_FOLDERS.intersection(id.split("/")[:-1]):
            excluded[id] = f"folder {min(closed)}"
        elif id.endswith("_mirror"):
            excluded[id] = "mirrored twin"
        elif phrase is None:
            excluded[id] = "caption names no object"
        elif digest in seen:
            excluded[id] = f"same picture as {seen[digest]}"
        else:
            picture = _cut_out(path)
            if isinstance(picture, str):
                excluded[id] = picture
            else:
                seen[digest] = id
                stamps.append(Stamp(id, phrase, picture))
    return stamps, excluded


def _phrase(id: str, caption: Path) -> str | None:
    """The object's name with its article, or None where the caption is missing or a remark."""
    if id in PHRASES:
        return PHRASES[id]
    if not caption.is_file():
        return None
    line = (caption.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[0]
    line = re.sub("[“”\"]|(?<!\\w)['‘’]|['’](?!\\w)", "", line).replace("’", "'")
    line = re.split(r"[(),.!?:;—]", line)[0].strip()
    match = re.fullmatch(r"(An?) (\S+(?: \S+){0,4})", line)
    return f"{match[1].lower()} {match[2]}" if match else None


def _cut_out(path: Path) -> PILImage.Image | str:
    """A photographic stamp as RGBA, cropped to what can be seen of it, or why it is none."""
    try:
        with PILImage.open(path) as stored:
            picture = stored.convert("RGBA")
    except OSError as error:
        return f"no picture that Pillow can read ({error})"
    alpha = picture.getchannel("A").point(lambda a: a * (a >= FAINT))
    picture.putalpha(alpha)
    picture = picture.crop(alpha.getbbox() or (0, 0, 1, 1))
    if max(picture.size) < MIN_SIDE:
        return f"only {picture.width}×{picture.height} pixels"
    opaque = np.asarray(picture.getchannel("A")) > 200
    if opaque.mean() < MIN_COVER:
        return f"opaque on {opaque.mean():.0%} of its box"
    coarse = (np.asarray(picture)[opaque][:, :3] >> 3).astype(np.int64) @ np.array([1024, 32, 1])
    shares = np.unique(coarse, return_counts=True)[1] / len(coarse)
    bits = float((shares * np.log2(1 / shares)).sum())
    if bits < MIN_COLOUR_BITS:
        return f"{bits:.1f} bits of colour, a drawing"
    picture.thumbnail((max(SIZES), max(SIZES)), PILImage.Resampling.LANCZOS)
    return picture


def read_photographs(folder: Path) -> dict[str, PILImage.Image]:
    """The JPEG pictures of a folder by name, RGB, without black bars, their shorter side 512 pixels at most."""
    photographs = {}
    for path in sorted(folder.glob("*.jp*g")):
        with PILImage.open(path) as stored:
            picture = stored.convert("RGB")
        picture = picture.crop(picture.convert("L").point(lambda level: 255 * (level > 24)).getbbox())
        scale = min(1, 2 * max(SIZES) / min(picture.size))
        size = (round(picture.width * scale), round(picture.height * scale))
        photographs[path.stem] = picture.resize(size, PILImage.Resampling.LANCZOS)
    return photographs


def split(names: Iterable[str]) -> dict[str, list[str]]:
    """`train` and `test` of photographs or objects, the same for every seed and size: a fifth is held out.

    Raises:
        ValueError: fewer than two.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(ordered) < 2:
        raise ValueError(f"got {len(ordered)} pictures ({', '.join(ordered)}), expected at least 2 to hold one out")
    held_out = max(1, round(HELD_OUT * len(ordered)))
    return {"train": sorted(ordered[held_out:]), "test": sorted(ordered[:held_out])}


# Drawing the edits ----------------------------------------------------------------------------------------------------


def render(
    photographs: Mapping[str, PILImage.Image], stamps: Sequence[Stamp], split: str, index: int, size: int, seed: int
) -> dict[str, Any]:
    """One row with CompBench-mini's columns, drawn from the split's pictures and `(split, size, seed, index)` alone.

    As in CompBench-mini, one to three bystanders stand by the objects that the edit is about. No two objects of a scene
    are called by the same last word, so "remove the apple" can mean one only.

    Raises:
        ValueError: too few differently called objects for a scene.
    """
    rng = random.Random(f"tux-1/{split}/{size}/{seed}/{index}")
    kinds = {stamp.kind for stamp in stamps} - {None}
    tasks = [task for task in TASKS if task != "implicit_reasoning" or len(kinds) > 1]
    task = tasks[index % len(tasks)]
    photo = Photo(rng.choice(sorted(photographs)), split)
    background = draw_square(rng, photographs[photo.name], size)
    return compose(rng, task, photo, background, _cast(rng, stamps, task), seed, index)


def _cast(rng: random.Random, stamps: Sequence[Stamp], task: str) -> list[Stamp]:
    """Up to five objects, no two of one last word, and for *implicit_reasoning* no two of one kind."""
    cast: list[Stamp] = []
    for stamp in rng.sample(stamps, len(stamps)):
        implicit = task == "implicit_reasoning"
        if implicit and (stamp.kind is None or any(stamp.kind == other.kind for other in cast)):
            continue
        if all(stamp.name.split()[-1] != other.name.split()[-1] for other in cast):
            cast.append(stamp)
        if len(cast) == 5:
            break
    if len(cast) < 3 and not (implicit and len(cast) > 1):
        raise ValueError(
            f"stamps_folder: got {len(stamps)} objects in this split, of which a scene can hold {len(cast)}; expected "
            "more of different names"
        )
    return cast


# Writing the pack -----------------------------------------------------------------------------------------------------


def build_tux(
    output: str | os.PathLike[str],
    size: int = 128,
    num_train: int = 2048,
    num_test: int = 256,
    seed: int = 0,
    stamps_folder: str | os.PathLike[str] | None = None,
    backgrounds_folder: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Path:
    """Build the pack: Parquet files, a data card and a list of every picture with its fate, in a new folder.

    `datasets.load_dataset(output)` opens it, with CompBench-mini's columns. Splits: `train`; `validation`, with
    held-out photographs and the objects of the training; `test`, with the same photographs and held-out objects.

    Args:
        output: folder to make; it appears only when it is complete.
        size: side of the square pictures, 64, 128 or 256 pixels.
        num_train: rows of `train`; tasks take turns.
        num_test: rows of `validation`, and as many of `test`.
        seed: another seed is another data set, over the same split of photographs and objects.
        stamps_folder: Tux Paint's `stamps`, or any folder of PNG cut-outs with a `.txt` beside each; by default the
            downloaded or installed `tuxpaint-stamps-default`.
        backgrounds_folder: JPEG photographs; by default the `templates` of `tuxpaint-data`.
        download: fetch the packages with `apt-get download` where they are missing (169 MB, no root needed).

    Returns:
        The folder.

    Raises:
        FileExistsError: `output` is there already and not an empty folder.
        FileNotFoundError: no source of pictures, with the commands that help.
        ValueError: another size, or too few pictures to split and to fill a scene.
    """
    output = Path(output)
    if size not in SIZES:
        raise ValueError(f"size: got {size}, expected one of {', '.join(map(str, SIZES))} pixels")
    for name, count in (("num_train", num_train), ("num_test", num_test)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, expected at least 1")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output: {output} is there already; choose another folder or remove it")
    sources = find_sources(stamps_folder, backgrounds_folder, download)
    photographs = read_photographs(sources.backgrounds)
    stamps, excluded = read_stamps(sources.stamps)
    photo_split, stamp_split = split(photographs), split(stamp.id for stamp in stamps)
    with _folder_at_once(output) as part:
        for name, photo_part, stamp_part, count in (
            ("train", "train", "train", num_train),
            ("validation", "test", "train", num_test),
            ("test", "test", "test", num_test),
        ):
            chosen = {key: photographs[key] for key in photo_split[photo_part]}
            objects = [stamp for stamp in stamps if stamp.id in stamp_split[stamp_part]]
            rows = (render(chosen, objects, name, index, size, seed) for index in range(count))
            _write_rows(part, name, tqdm(rows, desc=f"drawing {name}", total=count, leave=False, delay=2), count)
        _write_assets(part / "assets.csv", photo_split, stamps, stamp_split, excluded)
        (part / "README.md").write_text(
            _card(sources, size, num_train, num_test, seed, len(photographs), stamps, excluded), encoding="utf-8"
        )
    return output


@contextmanager
def _folder_at_once(output: Path) -> Iterator[Path]:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as made:
        part = Path(made) / output.name
        part.mkdir()
        yield part
        os.replace(part, output)


def _write_rows(folder: Path, name: str, rows: Iterable[dict[str, Any]], count: int) -> None:
    """`data/<name>-00000-of-00003.parquet` and so on: few enough rows at a time for any memory."""
    (folder / "data").mkdir(exist_ok=True)
    iterator, files = iter(rows), -(-count // ROWS_IN_A_FILE)
    for number in range(files):
        some = list(islice(iterator, ROWS_IN_A_FILE))
        columns = {column: [row[column] for row in some] for column in FEATURES}
        path = folder / "data" / f"{name}-{number:05d}-of-{files:05d}.parquet"
        Dataset.from_dict(columns, features=FEATURES).to_parquet(path)


def _write_assets(
    path: Path,
    photo_split: Mapping[str, Sequence[str]],
    stamps: Sequence[Stamp],
    stamp_split: Mapping[str, Sequence[str]],
    excluded: Mapping[str, str],
) -> None:
    rows = [("photograph", name, "", part, "") for part, names in photo_split.items() for name in names]
    parts = {id: part for part, ids in stamp_split.items() for id in ids}
    rows += [("object", stamp.id, stamp.phrase, parts[stamp.id], "") for stamp in stamps]
    rows += [("object", id, "", "", reason) for id, reason in excluded.items()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "file", "phrase", "split", "left out because"))
        writer.writerows(rows)


def _card(
    sources: Sources,
    size: int,
    num_train: int,
    num_test: int,
    seed: int,
    num_photographs: int,
    stamps: Sequence[Stamp],
    excluded: Mapping[str, str],
) -> str:
    licence = {
        "gpl-2.0": "GPL-2.0, as all of Debian's Tux Paint packages: © 2002-2022 Bill Kendrick and the contributors to "
        "Tux Paint (https://tuxpaint.org). Pass this folder on under the GPL-2.0 only, and name the packages.",
        "other": "that of the pictures in the folders given; GPL-2.0 if they are Tux Paint's. Fill it in before you "
        "pass this folder on.",
    }[sources.licence]
    return f"""---
license: {sources.licence}
task_categories: [image-to-image]
language: [en]
configs:
- config_name: default
  data_files:
  - {{split: train, path: data/train-*.parquet}}
  - {{split: validation, path: data/validation-*.parquet}}
  - {{split: test, path: data/test-*.parquet}}
---
# Edits with photographic objects

{size}×{size} pictures with exact targets and masks, drawn by `rcgrpo data build-tux` ({__version__}) with seed {seed}.
Columns are CompBench's: `task, image_path, input_image, edited_image, instruction, caption, mask` (255 = edit).

| split | rows | photographs | objects |
|---|---|---|---|
| train | {num_train} | training | training |
| validation | {num_test} | held out | training |
| test | {num_test} | held out | held out |

- Origin: {sources.origin}.
- {num_photographs} photographs and {len(stamps)} objects; {len(excluded)} stamps are left out.
  [assets.csv](assets.csv) names every one of them, its split, or the reason why it is left out.
- Licence of every picture, before and after composition: {licence}
- The mask is the object's alpha grown by {MASK_GROWTH:g} of the side; outside it the two pictures are equal.
- Objects are pasted, so lighting, scale and place need not be plausible.
"""
