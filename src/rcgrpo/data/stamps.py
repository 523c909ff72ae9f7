"""Tux Paint's pictures: where they are, which of them are photographs of one object, and what those are called.

Debian's packages `tuxpaint-stamps-default` and `tuxpaint-data` hold some 300 photographs of single objects with
transparency and English captions, and 19 photographs of places; `tux` makes edits of them. Which stamps are photographs
is decided by `EXCLUDED_FOLDERS` and by how many colours a picture needs; what is left out comes with its reason.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from tqdm.auto import tqdm

PACKAGES = ("tuxpaint-stamps-default", "tuxpaint-data")
SIZES = (64, 128, 256)

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
    line = caption.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
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
